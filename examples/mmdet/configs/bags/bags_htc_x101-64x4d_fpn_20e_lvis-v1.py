"""Hybrid Task Cascade X101-64x4d-FPN with BAGS on LVIS v1, from its baseline."""

_base_ = "../baselines/htc_x101-64x4d_fpn_20e_lvis-v1.py"

bags_loss = dict(type="BAGSLoss", annotations=_base_.train_annotations)
model = dict(
    roi_head=dict(
        bbox_head=[dict(head, loss_cls=bags_loss) for head in _base_.model.roi_head.bbox_head]
    )
)
custom_hooks = [dict(type="BAGSFreezeHook", train="classifier")]
train_cfg = dict(max_epochs=12, val_interval=12)
optim_wrapper = dict(optimizer=dict(lr=0.005))
param_scheduler = [
    _base_.param_scheduler[0],
    dict(_base_.param_scheduler[1], end=12, milestones=[8, 11]),
]
load_from = "work_dirs/htc_x101-64x4d_fpn_20e_lvis-v1/epoch_20.pth"
