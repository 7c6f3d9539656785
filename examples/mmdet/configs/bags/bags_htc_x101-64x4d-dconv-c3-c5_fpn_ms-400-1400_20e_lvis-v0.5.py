"""Hybrid Task Cascade X101-64x4d-MS-DCN with BAGS on LVIS v0.5, from its baseline.

The original has box AP 37.71, mask AP 34.39.
"""

_base_ = "../baselines/htc_x101-64x4d-dconv-c3-c5_fpn_ms-400-1400_20e_lvis-v0.5.py"

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
load_from = "work_dirs/htc_x101-64x4d-dconv-c3-c5_fpn_ms-400-1400_20e_lvis-v0.5/epoch_20.pth"
