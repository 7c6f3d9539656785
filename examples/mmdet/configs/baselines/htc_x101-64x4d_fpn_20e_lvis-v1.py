"""Hybrid Task Cascade X101-64x4d-FPN with plain softmax on LVIS v1."""

_base_ = [
    "../_base_/models/htc_x101-64x4d_fpn.py",
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
train_pipeline = [
    dict(type="LoadImageFromFile"),
    dict(type="LoadAnnotations", with_bbox=True, with_mask=True, with_seg=True),
    *_base_.train_pipeline[2:],
]
train_dataloader = dict(
    batch_size=1,
    dataset=dict(data_prefix=dict(img="", seg="stuffthingmaps/"), pipeline=train_pipeline),
)
load_from = (  # COCO, of mmdet's model zoo
    "https://download.openmmlab.com/mmdetection/v2.0/htc/htc_x101_64x4d_fpn_16x1_20e_coco/"
    "htc_x101_64x4d_fpn_16x1_20e_coco_20200318-b181fd7a.pth"
)
