"""Stage one on the drawn data set: a detector small enough for two CPU cores, plain softmax.

docs/detectron2.md has the command; the data sets are `demo_train` and `demo_val`.
"""

from typing import Any

import detectron2.data.transforms as T
import torch
from detectron2.config import LazyCall as L
from detectron2.data import (
    DatasetMapper,
    build_detection_test_loader,
    build_detection_train_loader,
    get_detection_dataset_dicts,
)
from detectron2.layers import ShapeSpec
from detectron2.modeling import GeneralizedRCNN
from detectron2.modeling.anchor_generator import DefaultAnchorGenerator
from detectron2.modeling.box_regression import Box2BoxTransform
from detectron2.modeling.matcher import Matcher
from detectron2.modeling.poolers import ROIPooler
from detectron2.modeling.proposal_generator import RPN, StandardRPNHead
from detectron2.modeling.roi_heads import (
    FastRCNNConvFCHead,
    FastRCNNOutputLayers,
    StandardROIHeads,
)
from detectron2.solver import WarmupParamScheduler
from detectron2.solver.build import get_default_optimizer_params
from detectron2_evaluation import LVISReport
from fvcore.common.param_scheduler import CosineParamScheduler
from omegaconf import OmegaConf
from small_backbone import STRIDES, SmallBackbone

LEVELS = list(STRIDES)
STEPS = 600

model = L(GeneralizedRCNN)(
    backbone=L(SmallBackbone)(),
    proposal_generator=L(RPN)(
        in_features=LEVELS,
        head=L(StandardRPNHead)(in_channels=64, num_anchors=3),
        anchor_generator=L(DefaultAnchorGenerator)(
            sizes=[[20], [36], [56]],
            aspect_ratios=[0.5, 1.0, 2.0],
            strides=list(STRIDES.values()),
            offset=0.5,
        ),
        anchor_matcher=L(Matcher)(
            thresholds=[0.3, 0.7], labels=[0, -1, 1], allow_low_quality_matches=True
        ),
        box2box_transform=L(Box2BoxTransform)(weights=[1.0, 1.0, 1.0, 1.0]),
        batch_size_per_image=64,
        positive_fraction=0.5,
        pre_nms_topk=(300, 200),
        post_nms_topk=(100, 100),
        nms_thresh=0.7,
    ),
    roi_heads=L(StandardROIHeads)(
        num_classes=72,
        batch_size_per_image=48,
        positive_fraction=0.334,
        proposal_matcher=L(Matcher)(
            thresholds=[0.5], labels=[0, 1], allow_low_quality_matches=False
        ),
        box_in_features=LEVELS,
        box_pooler=L(ROIPooler)(
            output_size=6,
            scales=[1 / stride for stride in STRIDES.values()],
            sampling_ratio=1,
            pooler_type="ROIAlignV2",
            canonical_box_size=56,
            canonical_level=3,
        ),
        box_head=L(FastRCNNConvFCHead)(
            input_shape=ShapeSpec(channels=64, height=6, width=6), conv_dims=[], fc_dims=[256, 256]
        ),
        # One box regression for all: a category seen five times cannot learn its own.
        box_predictor=L(FastRCNNOutputLayers)(
            input_shape=ShapeSpec(channels=256),
            test_score_thresh=0.0,
            test_topk_per_image=300,
            cls_agnostic_bbox_reg=True,
            box2box_transform=L(Box2BoxTransform)(weights=(10, 10, 5, 5)),
            num_classes="${..num_classes}",
        ),
    ),
    pixel_mean=[103.53, 116.28, 123.675],
    pixel_std=[57.375, 57.12, 58.395],
    input_format="BGR",
)

dataloader = OmegaConf.create()
dataloader.train = L(build_detection_train_loader)(
    dataset=L(get_detection_dataset_dicts)(names="demo_train"),
    mapper=L(DatasetMapper)(
        is_train=True, augmentations=[L(T.RandomFlip)(horizontal=True)], image_format="BGR"
    ),
    total_batch_size=8,
    num_workers=0,
)
dataloader.test = L(build_detection_test_loader)(
    dataset=L(get_detection_dataset_dicts)(names="demo_val", filter_empty=False),
    mapper=L(DatasetMapper)(is_train=False, augmentations=[], image_format="BGR"),
    num_workers=0,
    batch_size=8,
)
dataloader.evaluator = L(LVISReport)(
    dataset_name="${..test.dataset.names}",
    train_dataset_name="${..train.dataset.names}",
    output_dir="${train.output_dir}/inference",
)

optimizer = L(torch.optim.AdamW)(
    params=L(get_default_optimizer_params)(), lr=2e-3, weight_decay=1e-2
)
lr_multiplier = L(WarmupParamScheduler)(
    scheduler=L(CosineParamScheduler)(start_value=1.0, end_value=0.0),
    warmup_factor=0.05,
    warmup_length=19 / STEPS,
)

train: Any = {
    "output_dir": "runs/detectron2_softmax",
    "init_checkpoint": "",
    "max_iter": STEPS,
    "trainable": "all",
    "amp": {"enabled": False},
    "ddp": {"broadcast_buffers": False},
    "checkpointer": {"period": 200, "max_to_keep": 2},
    "eval_period": 0,  # at the end
    "log_period": 20,
    "device": "cpu",
    "seed": 0,
}
