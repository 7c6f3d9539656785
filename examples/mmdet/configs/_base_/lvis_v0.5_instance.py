"""LVIS v0.5, boxes and masks: each image once an epoch at one scale, as the original trains.

mmdet's own base for LVIS repeats images of rare categories and changes the scale.
"""

_base_ = "mmdet::_base_/datasets/lvis_v0.5_instance.py"

num_classes = 1230
data_root = "data/lvis_v0.5/"
train_annotations = data_root + "annotations/lvis_v0.5_train.json"
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
        type="LVISV05Dataset",
        data_root=data_root,
        ann_file="annotations/lvis_v0.5_train.json",
        data_prefix=dict(img="train2017/"),
        filter_cfg=dict(filter_empty_gt=True, min_size=32),
        pipeline=train_pipeline,
    )
)
val_evaluator = dict(metric=["bbox", "segm"])
test_evaluator = val_evaluator
