"""Mask R-CNN R50-FPN with plain softmax on LVIS v1."""

_base_ = [
    "../_base_/models/mask-rcnn_r50_fpn.py",
    "../_base_/lvis_v1_instance.py",
    "../_base_/runtime.py",
]

model = dict(
    roi_head=dict(
        bbox_head=dict(num_classes=_base_.num_classes),
        mask_head=dict(num_classes=_base_.num_classes),
    )
)
