"""Cascade R-CNN X101-64x4d-FPN with BAGS on LVIS v0.5, from its baseline.

The original has box AP 32.77.
"""

_base_ = "../baselines/cascade-rcnn_x101-64x4d_fpn_1x_lvis-v0.5.py"

bags_loss = dict(type="BAGSLoss", annotations=_base_.train_annotations)
model = dict(
    roi_head=dict(
        bbox_head=[dict(head, loss_cls=bags_loss) for head in _base_.model.roi_head.bbox_head]
    )
)
custom_hooks = [dict(type="BAGSFreezeHook", train="classifier")]
load_from = "work_dirs/cascade-rcnn_x101-64x4d_fpn_1x_lvis-v0.5/epoch_12.pth"
