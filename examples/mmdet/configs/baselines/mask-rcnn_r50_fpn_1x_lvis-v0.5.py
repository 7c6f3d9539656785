"""Mask R-CNN R50-FPN with plain softmax on LVIS v0.5.

The original has box AP 20.78, mask AP 20.68.
"""

_base_ = [
    "../_base_/models/mask-rcnn_r50_fpn.py",
    "../_base_/lvis_v0.5_instance.py",
    "../_base_/runtime.py",
]

model = dict(
    roi_head=dict(
        bbox_head=dict(num_classes=_base_.num_classes),
        mask_head=dict(num_classes=_base_.num_classes),
    )
)
