"""Finetune tail: on with the annotations of few instances alone. The original has box AP 22.28.

The original's config does not say which categories; tail_annotations.py makes the file, by default
of categories with fewer than 100 instances.
"""

_base_ = "../baselines/faster-rcnn_r50_fpn_1x_lvis-v0.5.py"

train_dataloader = dict(dataset=dict(ann_file="annotations/lvis_v0.5_train_tail.json"))
train_cfg = dict(max_epochs=10, val_interval=10)
optim_wrapper = dict(optimizer=dict(lr=0.0001))
param_scheduler = [
    _base_.param_scheduler[0],
    dict(_base_.param_scheduler[1], end=10, milestones=[7]),
]
load_from = "work_dirs/faster-rcnn_r50_fpn_1x_lvis-v0.5/epoch_12.pth"
