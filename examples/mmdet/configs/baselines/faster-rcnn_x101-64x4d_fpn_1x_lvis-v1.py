"""Faster R-CNN X101-64x4d-FPN with plain softmax on LVIS v1."""

_base_ = [
    "../_base_/models/faster-rcnn_x101-64x4d_fpn.py",
    "../_base_/lvis_v1_detection.py",
    "../_base_/runtime.py",
]

model = dict(roi_head=dict(bbox_head=dict(num_classes=_base_.num_classes)))
load_from = (  # COCO, of mmdet's model zoo
    "https://download.openmmlab.com/mmdetection/v2.0/faster_rcnn/faster_rcnn_x101_64x4d_fpn_1x_coco/"
    "faster_rcnn_x101_64x4d_fpn_1x_coco_20200204-833ee192.pth"
)
