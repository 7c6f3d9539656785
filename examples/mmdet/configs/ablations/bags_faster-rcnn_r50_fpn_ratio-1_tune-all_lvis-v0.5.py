"""BAGS with as many others as foreground rows, all trained, then all at a low rate."""

_base_ = "bags_faster-rcnn_r50_fpn_ratio-1_train-all_lvis-v0.5.py"

train_cfg = dict(max_epochs=10, val_interval=10)
optim_wrapper = dict(optimizer=dict(lr=0.0001))
param_scheduler = [
    _base_.param_scheduler[0],
    dict(_base_.param_scheduler[1], end=10, milestones=[7]),
]
load_from = "work_dirs/bags_faster-rcnn_r50_fpn_ratio-1_train-all_lvis-v0.5/epoch_12.pth"
