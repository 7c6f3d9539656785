"""BAGS on the small Faster R-CNN of the drawn data set; only `fc_cls` trains, from softmax."""

_base_ = "faster-rcnn_demo.py"

model = dict(
    roi_head=dict(
        bbox_head=dict(loss_cls=dict(type="BAGSLoss", annotations=_base_.train_annotations))
    )
)
custom_hooks = [
    dict(type="BAGSStartHook"),
    dict(type="BAGSFreezeHook", train="classifier"),
]
train_cfg = dict(max_iters=400, val_interval=400)
optim_wrapper = dict(
    optimizer=dict(_delete_=True, type="SGD", lr=0.005, momentum=0.9, weight_decay=0.0001)
)
param_scheduler = [
    dict(type="LinearLR", start_factor=0.05, by_epoch=False, begin=0, end=19),
    dict(type="CosineAnnealingLR", by_epoch=False, begin=19, end=400, eta_min=0),
]
load_from = "work_dirs/faster-rcnn_demo/iter_600.pth"
