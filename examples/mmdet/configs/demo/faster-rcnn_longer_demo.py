"""Plain softmax for 400 steps more, as many as BAGS takes: what longer training alone gives."""

_base_ = "faster-rcnn_demo.py"

train_cfg = dict(max_iters=400, val_interval=400)
param_scheduler = [
    dict(type="LinearLR", start_factor=0.05, by_epoch=False, begin=0, end=19),
    dict(type="CosineAnnealingLR", by_epoch=False, begin=19, end=400, eta_min=0),
]
load_from = "work_dirs/faster-rcnn_demo/iter_600.pth"
