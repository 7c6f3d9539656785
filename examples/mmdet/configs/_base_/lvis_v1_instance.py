"""LVIS v1, boxes and masks: each image once an epoch at one scale, as the original trains.

mmdet's own base for LVIS repeats images of rare categories and changes the scale.
"""

_base_ = "mmdet::_base_/datasets/lvis_v1_instance.py"

num_classes = 1203
data_root = "data/lvis_v1/"
train_annotations = data_root + "annotations/lvis_v1_train.json"
train_pipeline = [
    dict(type="LoadImageFromFile"),
    dict(type="LoadAnnotations", with_bbox=True, with_mask=True),
    dict(type="Resize", scale=(1333, 800), keep_ratio=True),
    dict(type="RandomFlip", prob=0.5),
    dict(type="PackDetInputs"),
]
train_dataloader = dict(
    dataset=dict(
        _delete_=True,
        type="LVISV1Dataset",
        data_root=data_root,
        ann_file="annotations/lvis_v1_train.json",
        data_prefix=dict(img=""),
        filter_cfg=dict(filter_empty_gt=True, min_size=32),
        pipeline=train_pipeline,
    )
)
val_evaluator = dict(metric=["bbox", "segm"])
test_evaluator = val_evaluator
