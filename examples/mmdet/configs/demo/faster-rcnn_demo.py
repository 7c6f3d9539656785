"""A small Faster R-CNN with plain softmax on the drawn data set, from scratch."""

_base_ = "../_base_/demo.py"

train_cfg = dict(_delete_=True, type="IterBasedTrainLoop", max_iters=600, val_interval=600)
optim_wrapper = dict(optimizer=dict(_delete_=True, type="AdamW", lr=0.002, weight_decay=0.01))
param_scheduler = [
    dict(type="LinearLR", start_factor=0.05, by_epoch=False, begin=0, end=19),
    dict(type="CosineAnnealingLR", by_epoch=False, begin=19, end=600, eta_min=0),
]
