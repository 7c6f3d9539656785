"""HTC X101-64x4d-FPN without semantic branch with plain softmax on LVIS v1."""

_base_ = [
    "../_base_/models/htc-without-semantic_x101-64x4d_fpn.py",
    "../_base_/lvis_v1_instance.py",
    "../_base_/schedule_20e.py",
]

model = dict(
    roi_head=dict(
        bbox_head=[
            dict(head, num_classes=_base_.num_classes) for head in _base_.model.roi_head.bbox_head
        ],
        mask_head=[
            dict(head, num_classes=_base_.num_classes) for head in _base_.model.roi_head.mask_head
        ],
    )
)
train_dataloader = dict(batch_size=1)
load_from = (  # COCO, of mmdet's model zoo
    "https://download.openmmlab.com/mmdetection/v2.0/htc/htc_x101_64x4d_fpn_16x1_20e_coco/"
    "htc_x101_64x4d_fpn_16x1_20e_coco_20200318-b181fd7a.pth"
)
