"""BAGS with half as many others as foreground rows; all layers train for 20 epochs."""

_base_ = "bags_faster-rcnn_r50_fpn_ratio-0.5_train-all_lvis-v0.5.py"

model = dict(test_cfg=dict(rcnn=dict(score_thr=0.0)))
train_cfg = dict(max_epochs=20, val_interval=20)
param_scheduler = [
    _base_.param_scheduler[0],
    dict(_base_.param_scheduler[1], end=20, milestones=[16, 19]),
]
