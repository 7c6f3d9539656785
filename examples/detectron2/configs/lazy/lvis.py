"""What the LVIS configs share: the original's recipe, for two stages."""

from typing import Any

import torch
from detectron2.config import LazyCall as L
from detectron2.data.samplers import RepeatFactorTrainingSampler
from detectron2.model_zoo import get_config
from detectron2.modeling.backbone.resnet import BottleneckBlock, ResNet
from detectron2.solver import WarmupParamScheduler
from detectron2.solver.build import get_default_optimizer_params
from detectron2_evaluation import LVISReport
from detectron2_setup import annotations_of
from fvcore.common.param_scheduler import MultiStepParamScheduler

from balanced_group_softmax.adapters.detectron2 import (
    BAGSCascadeROIHeads,
    BAGSFastRCNNOutputLayers,
)

NUM_CATEGORIES = {"v0.5": 1230, "v1": 1203}
NUM_IMAGES = {"v0.5": 56_740, "v1": 99_388}  # with annotations
EPOCHS, BATCH = 12, 16
R50 = "detectron2://ImageNetPretrained/MSRA/R-50.pkl"
# detectron2 has weights of 32x8d; the original is 64x4d.
X101 = "detectron2://ImageNetPretrained/FAIR/X-101-32x8d.pkl"

Parts = tuple[Any, Any, Any, Any, Any]
"""Of a config: model, dataloader, optimizer, lr_multiplier, train."""


def baseline(detector: str, version: str, batch: int = BATCH) -> Parts:
    """Stage one, plain softmax: 12 epochs from ImageNet weights.

    `batch` is the images of a step, over all processes; learning rate and schedule follow it.
    """
    dataloader = make_dataloader(version, batch, with_masks="mask" in detector)
    train = get_config("common/train.py").train
    train.update(
        output_dir=output_dir(detector, version),
        init_checkpoint=X101 if "x101" in detector else R50,
        max_iter=EPOCHS * NUM_IMAGES[version] // batch,
        eval_period=0,  # at the end
        trainable="all",
        max_gradient_norm=35.0,
    )
    optimizer = L(torch.optim.SGD)(
        params=L(get_default_optimizer_params)(),
        lr=0.02 * batch / BATCH,
        momentum=0.9,
        weight_decay=1e-4,
    )
    lr_multiplier = L(WarmupParamScheduler)(
        scheduler=L(MultiStepParamScheduler)(
            values=[1.0, 0.1, 0.01], milestones=[8, 11], num_updates=EPOCHS
        ),
        warmup_factor=1 / 3,
        warmup_length=500 * BATCH / (EPOCHS * NUM_IMAGES[version]),
    )
    return make_model(detector, version), dataloader, optimizer, lr_multiplier, train


def bags(detector: str, version: str, batch: int = BATCH) -> Parts:
    """Stage two: from stage one's detector, nothing but the classifier trains."""
    model, dataloader, optimizer, lr_multiplier, train = baseline(detector, version, batch)
    heads = model.roi_heads
    if "cascade" in detector:
        heads._target_ = BAGSCascadeROIHeads
    for predictor in heads.box_predictors if "cascade" in detector else [heads.box_predictor]:
        predictor.update(
            _target_=BAGSFastRCNNOutputLayers,
            annotations=L(annotations_of)(name="${dataloader.train.dataset.names}"),
        )
    optimizer.lr = 0.01 * batch / BATCH
    train.update(
        init_checkpoint=f"{train.output_dir}/model_final.pth",
        output_dir=f"{train.output_dir}_bags",
        trainable="classifier",
    )
    return model, dataloader, optimizer, lr_multiplier, train


def make_model(detector: str, version: str) -> Any:
    cascade = "cascade" in detector
    name = "cascade_rcnn" if cascade else "mask_rcnn_fpn"
    model = get_config(f"common/models/{name}.py").model
    heads = model.roi_heads
    heads.num_classes = NUM_CATEGORIES[version]
    for predictor in heads.box_predictors if cascade else [heads.box_predictor]:
        predictor.test_score_thresh = 0.0 if detector == "faster_rcnn_r50" else 0.001
        predictor.test_topk_per_image = 300
    model.proposal_generator.post_nms_topk = (2000, 1000)
    if "mask" not in detector:
        for key in ("mask_in_features", "mask_pooler", "mask_head"):
            del heads[key]
    if "x101" in detector:
        model.pixel_std = [57.375, 57.12, 58.395]
        model.backbone.bottom_up.stages = resnext101_stages()
    model.backbone.bottom_up.freeze_at = 2  # as in the YAML configs
    return model


def resnext101_stages(num_groups: int = 32, width_per_group: int = 8) -> list[Any]:
    return [
        L(ResNet.make_stage)(
            block_class=BottleneckBlock,
            num_blocks=blocks,
            stride_per_block=[1 if stage == 0 else 2] + [1] * (blocks - 1),
            in_channels=64 if stage == 0 else 128 * 2**stage,
            out_channels=256 * 2**stage,
            bottleneck_channels=num_groups * width_per_group * 2**stage,
            num_groups=num_groups,
            stride_in_1x1=False,
            norm="FrozenBN",
        )
        for stage, blocks in enumerate([3, 4, 23, 3])
    ]


def make_dataloader(version: str, batch: int, *, with_masks: bool) -> Any:
    dataloader = get_config("common/data/coco.py").dataloader
    dataloader.train.dataset.names = f"lvis_{version}_train"
    dataloader.train.mapper.augmentations[0].short_edge_length = (800,)
    dataloader.train.mapper.use_instance_mask = with_masks
    dataloader.train.total_batch_size = batch
    dataloader.test.dataset.names = f"lvis_{version}_val"
    dataloader.evaluator = L(LVISReport)(
        dataset_name="${..test.dataset.names}",
        train_dataset_name="${..train.dataset.names}",
        kinds=["bbox", "segm"] if with_masks else ["bbox"],
        output_dir="${train.output_dir}/inference",
    )
    return dataloader


def repeat_factor_sampler(threshold: float) -> Any:
    """detectron2's own sampler, for `dataloader.train.sampler`."""
    factors = RepeatFactorTrainingSampler.repeat_factors_from_category_frequency
    return L(RepeatFactorTrainingSampler)(
        repeat_factors=L(factors)(
            dataset_dicts="${dataloader.train.dataset}", repeat_thresh=threshold
        )
    )


def output_dir(detector: str, version: str) -> str:
    return f"runs/lazy_{detector}_{version}"
