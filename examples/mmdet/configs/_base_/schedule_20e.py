"""Twenty epochs."""

_base_ = "runtime.py"

train_cfg = dict(max_epochs=20, val_interval=20)
param_scheduler = [
    dict(type="LinearLR", start_factor=1 / 3, by_epoch=False, begin=0, end=500),
    dict(type="MultiStepLR", begin=0, end=20, by_epoch=True, milestones=[16, 19], gamma=0.1),
]
