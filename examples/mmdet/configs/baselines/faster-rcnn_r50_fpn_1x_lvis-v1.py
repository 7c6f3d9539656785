"""Faster R-CNN R50-FPN with plain softmax on LVIS v1."""

_base_ = [
    "../_base_/models/faster-rcnn_r50_fpn.py",
    "../_base_/lvis_v1_detection.py",
    "../_base_/runtime.py",
]

model = dict(roi_head=dict(bbox_head=dict(num_classes=_base_.num_classes)))
load_from = (  # COCO, of mmdet's model zoo
    "https://download.openmmlab.com/mmdetection/v2.0/faster_rcnn/faster_rcnn_r50_fpn_2x_coco/"
    "faster_rcnn_r50_fpn_2x_coco_bbox_mAP-0.384_20200504_210434-a5d8aa15.pth"
)
