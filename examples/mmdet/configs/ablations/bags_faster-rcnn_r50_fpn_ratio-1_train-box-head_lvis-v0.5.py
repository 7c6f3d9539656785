"""BAGS with as many others as foreground rows; the box head trains."""

_base_ = "../bags/bags_faster-rcnn_r50_fpn_1x_lvis-v0.5.py"

model = dict(roi_head=dict(bbox_head=dict(loss_cls=dict(others_ratio=1.0))))
custom_hooks = [dict(type="BAGSFreezeHook", train="box_head")]
