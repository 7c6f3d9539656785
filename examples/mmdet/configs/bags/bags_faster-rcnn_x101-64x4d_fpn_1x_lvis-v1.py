"""Faster R-CNN X101-64x4d-FPN with BAGS on LVIS v1, from its baseline."""

_base_ = "../baselines/faster-rcnn_x101-64x4d_fpn_1x_lvis-v1.py"

bags_loss = dict(type="BAGSLoss", annotations=_base_.train_annotations)
model = dict(roi_head=dict(bbox_head=dict(loss_cls=dict(_delete_=True, **bags_loss))))
custom_hooks = [dict(type="BAGSFreezeHook", train="classifier")]
load_from = "work_dirs/faster-rcnn_x101-64x4d_fpn_1x_lvis-v1/epoch_12.pth"
