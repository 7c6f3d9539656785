"""Cascade R-CNN X101-64x4d-FPN with plain softmax on LVIS v0.5.

The original has box AP 27.16.
"""

_base_ = [
    "../_base_/models/cascade-rcnn_x101-64x4d_fpn.py",
    "../_base_/lvis_v0.5_detection.py",
    "../_base_/runtime.py",
]

model = dict(
    roi_head=dict(
        bbox_head=[
            dict(head, num_classes=_base_.num_classes) for head in _base_.model.roi_head.bbox_head
        ],
    )
)
load_from = (  # COCO, of mmdet's model zoo
    "https://download.openmmlab.com/mmdetection/v2.0/cascade_rcnn/cascade_rcnn_x101_64x4d_fpn_20e_coco/"
    "cascade_rcnn_x101_64x4d_fpn_20e_coco_20200509_224357-051557b1.pth"
)
