"""Hybrid Task Cascade X101-64x4d-MS-DCN with plain softmax on LVIS v0.5.

The original has box AP 34.61, mask AP 31.94.
"""

_base_ = "htc_x101-64x4d_fpn_20e_lvis-v0.5.py"

model = dict(
    backbone=dict(
        dcn=dict(type="DCN", deform_groups=1, fallback_on_stride=False),
        stage_with_dcn=(False, True, True, True),
    )
)
train_pipeline = [
    *_base_.train_pipeline[:2],
    dict(type="RandomResize", scale=[(1600, 400), (1600, 1400)], keep_ratio=True),
    *_base_.train_pipeline[3:],
]
train_dataloader = dict(dataset=dict(pipeline=train_pipeline))
load_from = (  # COCO, of mmdet's model zoo
    "https://download.openmmlab.com/mmdetection/v2.0/htc/htc_x101_64x4d_fpn_dconv_c3-c5_mstrain_400_1400_16x1_20e_coco/"
    "htc_x101_64x4d_fpn_dconv_c3-c5_mstrain_400_1400_16x1_20e_coco_20200312-946fd751.pth"
)
