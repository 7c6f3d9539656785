"""mmdet's Faster R-CNN X101-64x4d-FPN, with proposals and thresholds of the original."""

_base_ = "faster-rcnn_r50_fpn.py"

model = dict(
    backbone=dict(
        type="ResNeXt",
        depth=101,
        groups=64,
        base_width=4,
        init_cfg=dict(type="Pretrained", checkpoint="open-mmlab://resnext101_64x4d"),
    ),
    test_cfg=dict(rcnn=dict(score_thr=0.001)),
)
