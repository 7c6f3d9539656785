"""BAGS with two groups, below and above 100 instances."""

_base_ = "../bags/bags_faster-rcnn_r50_fpn_1x_lvis-v0.5.py"

model = dict(
    roi_head=dict(bbox_head=dict(loss_cls=dict(thresholds=(100,)))),
    test_cfg=dict(rcnn=dict(score_thr=0.001)),
)
