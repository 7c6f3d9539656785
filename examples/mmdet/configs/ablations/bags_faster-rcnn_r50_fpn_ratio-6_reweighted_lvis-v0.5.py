"""BAGS with weights by inverse frequency within each group."""

_base_ = "../bags/bags_faster-rcnn_r50_fpn_1x_lvis-v0.5.py"

model = dict(
    roi_head=dict(
        bbox_head=dict(loss_cls=dict(others_ratio=6.0, category_weights="inverse_frequency"))
    ),
    test_cfg=dict(rcnn=dict(score_thr=0.001)),
)
