"""The drawn data set of the examples, and a detector that trains from scratch on two CPU cores.

`data_root` is a folder that lvis_demo_data.py drew; train.py draws it where it is missing.
"""

_base_ = "runtime.py"

num_classes = 72
data_root = "data/demo/"
train_annotations = data_root + "train.json"
names = [str(i) for i in range(1, num_classes + 1)]  # for the data set's own texts
pipeline_start = [dict(type="LoadImageFromFile"), dict(type="LoadAnnotations", with_bbox=True)]
pipeline_end = [
    dict(type="Resize", scale=(128, 128), keep_ratio=True),
    dict(type="RandomFlip", prob=0.5),
    dict(type="PackDetInputs"),
]
test_pipeline = [
    *pipeline_start,
    pipeline_end[0],
    dict(
        type="PackDetInputs",
        meta_keys=("img_id", "img_path", "ori_shape", "img_shape", "scale_factor"),
    ),
]
train_dataloader = dict(
    batch_size=8,
    num_workers=0,
    sampler=dict(type="InfiniteSampler", shuffle=True),
    dataset=dict(
        type="LVISV05Dataset",  # of the two it is the one that takes file names
        data_root=data_root,
        ann_file="train.json",
        data_prefix=dict(img="train/"),
        metainfo=dict(classes=names),
        filter_cfg=dict(filter_empty_gt=True),
        pipeline=[*pipeline_start, *pipeline_end],
    ),
)
val_dataloader = dict(
    batch_size=8,
    num_workers=0,
    sampler=dict(type="DefaultSampler", shuffle=False),
    dataset=dict(
        type="LVISV05Dataset",
        data_root=data_root,
        ann_file="val.json",
        data_prefix=dict(img="val/"),
        metainfo=dict(classes=names),
        test_mode=True,
        pipeline=test_pipeline,
    ),
)
test_dataloader = val_dataloader
val_evaluator = dict(type="LVISMetric", ann_file=data_root + "val.json", metric="bbox")
test_evaluator = val_evaluator

rpn = dict(nms_pre=300, max_per_img=100, nms=dict(type="nms", iou_threshold=0.7), min_bbox_size=0)
model = dict(
    type="FasterRCNN",
    data_preprocessor=dict(
        type="DetDataPreprocessor",
        mean=[123.675, 116.28, 103.53],
        std=[58.395, 57.12, 57.375],
        bgr_to_rgb=True,
        pad_size_divisor=32,
    ),
    backbone=dict(
        type="ResNet",
        depth=18,
        base_channels=32,
        stem_channels=32,
        num_stages=3,
        strides=(1, 2, 2),
        dilations=(1, 1, 1),
        out_indices=(0, 1, 2),
        norm_eval=False,
    ),
    neck=dict(type="FPN", in_channels=[32, 64, 128], out_channels=64, num_outs=3),
    rpn_head=dict(
        type="RPNHead",
        in_channels=64,
        feat_channels=64,
        anchor_generator=dict(
            type="AnchorGenerator",
            scales=[1],
            ratios=[0.5, 1.0, 2.0],
            base_sizes=[20, 36, 56],
            strides=[4, 8, 16],
        ),
        bbox_coder=dict(type="DeltaXYWHBBoxCoder"),
        loss_cls=dict(type="CrossEntropyLoss", use_sigmoid=True),
        loss_bbox=dict(type="SmoothL1Loss", beta=1 / 9),
    ),
    roi_head=dict(
        type="StandardRoIHead",
        bbox_roi_extractor=dict(
            type="SingleRoIExtractor",
            roi_layer=dict(type="RoIAlign", output_size=6, sampling_ratio=1),
            out_channels=64,
            featmap_strides=[4, 8, 16],
            finest_scale=20,
        ),
        bbox_head=dict(
            type="SelectDetectionsShared2FCBBoxHead",
            in_channels=64,
            fc_out_channels=256,
            roi_feat_size=6,
            num_classes=num_classes,
            reg_class_agnostic=True,
            bbox_coder=dict(type="DeltaXYWHBBoxCoder", target_stds=[0.1, 0.1, 0.2, 0.2]),
            loss_cls=dict(type="CrossEntropyLoss"),
            loss_bbox=dict(type="SmoothL1Loss", beta=1 / 9),
        ),
    ),
    train_cfg=dict(
        rpn=dict(
            assigner=dict(type="MaxIoUAssigner", pos_iou_thr=0.7, neg_iou_thr=0.3, min_pos_iou=0.3),
            sampler=dict(type="RandomSampler", num=64, pos_fraction=0.5, add_gt_as_proposals=False),
            allowed_border=-1,
            pos_weight=-1,
        ),
        rpn_proposal=rpn,
        rcnn=dict(
            assigner=dict(
                type="MaxIoUAssigner",
                pos_iou_thr=0.5,
                neg_iou_thr=0.5,
                min_pos_iou=0.5,
                match_low_quality=False,
            ),
            sampler=dict(type="RandomSampler", num=48, pos_fraction=0.334),
            pos_weight=-1,
        ),
    ),
    test_cfg=dict(
        rpn=rpn,
        rcnn=dict(score_thr=0.0, nms=dict(type="nms", iou_threshold=0.5), max_per_img=300),
    ),
)
default_hooks = dict(
    checkpoint=dict(by_epoch=False, interval=10_000, save_last=True),
    visualization=dict(_delete_=True, type="DetVisualizationHook"),
)
log_processor = dict(by_epoch=False)
