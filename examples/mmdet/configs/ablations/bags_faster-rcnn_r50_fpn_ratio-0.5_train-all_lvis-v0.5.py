"""BAGS with half as many others as foreground rows; all layers train."""

_base_ = "../bags/bags_faster-rcnn_r50_fpn_1x_lvis-v0.5.py"

model = dict(
    roi_head=dict(bbox_head=dict(loss_cls=dict(others_ratio=0.5))),
    test_cfg=dict(rcnn=dict(score_thr=0.001)),
)
custom_hooks = [dict(type="BAGSFreezeHook", train="all")]
