"""BAGS with eight groups."""

_base_ = "../bags/bags_faster-rcnn_r50_fpn_1x_lvis-v0.5.py"

model = dict(
    roi_head=dict(bbox_head=dict(loss_cls=dict(thresholds=(5, 10, 50, 100, 500, 1000, 5000))))
)
