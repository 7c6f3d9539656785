"""Hybrid Task Cascade X101-64x4d-FPN without semantic branch, on mmdet's Cascade Mask R-CNN.

mmdet has no base of this model alone; heads and losses are those of its COCO config.
"""

_base_ = "mmdet::_base_/models/cascade-mask-rcnn_r50_fpn.py"

model = dict(
    type="HybridTaskCascade",
    backbone=dict(
        type="ResNeXt",
        depth=101,
        groups=64,
        base_width=4,
        init_cfg=dict(type="Pretrained", checkpoint="open-mmlab://resnext101_64x4d"),
    ),
    roi_head=dict(
        type="HybridTaskCascadeRoIHead",
        interleaved=True,
        mask_info_flow=True,
        bbox_head=[
            dict(head, type="SelectDetectionsShared2FCBBoxHead")
            for head in _base_.model.roi_head.bbox_head
        ],
        mask_head=[
            dict(_base_.model.roi_head.mask_head, type="HTCMaskHead", with_conv_res=stage > 0)
            for stage in range(3)
        ],
    ),
    test_cfg=dict(rcnn=dict(score_thr=0.001, max_per_img=300)),
)
