"""BAGS with every row in every group, if the group has a foreground row."""

_base_ = "../bags/bags_faster-rcnn_r50_fpn_1x_lvis-v0.5.py"

model = dict(roi_head=dict(bbox_head=dict(loss_cls=dict(others_ratio=1000.0))))
