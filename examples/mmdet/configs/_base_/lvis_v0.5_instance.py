"""LVIS v0.5, boxes and masks; otherwise as for boxes alone."""

_base_ = "lvis_v0.5_detection.py"

train_pipeline = [
    _base_.train_pipeline[0],
    dict(type="LoadAnnotations", with_bbox=True, with_mask=True),
    *_base_.train_pipeline[2:],
]
train_dataloader = dict(dataset=dict(pipeline=train_pipeline))
val_evaluator = dict(metric=["bbox", "segm"])
test_evaluator = val_evaluator
