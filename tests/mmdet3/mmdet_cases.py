"""Configs of the examples, made small enough for a CPU, and batches for them."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from mmdet.registry import MODELS
from mmdet.structures import DetDataSample
from mmdet.structures.mask import BitmapMasks
from mmengine.config import Config
from mmengine.registry import init_default_scope
from mmengine.structures import InstanceData, PixelData
from torch import nn

EXAMPLES = Path(__file__).parents[2] / "examples"
CONFIGS = EXAMPLES / "mmdet" / "configs"
NAMES = sorted(
    str(path.relative_to(CONFIGS).with_suffix(""))
    for path in CONFIGS.glob("*/*.py")
    if not path.parent.name.startswith("_")
)
SIZE = (96, 128)  # the deepest level is no smaller than a kernel, which mmcv wants


def counts_for(num_categories: int) -> list[int]:
    """Instance counts with categories in every count group, also of eight."""
    kinds = (2, 7, 20, 70, 200, 700, 2000, 9000)
    return [kinds[5 * i % len(kinds)] for i in range(num_categories)]


def read_config(name: str) -> Config:
    """A config of the examples, with counts for annotations, no downloads, and few proposals."""
    config = Config.fromfile(CONFIGS / f"{name}.py")
    init_default_scope("mmdet")
    model = config.model
    model.backbone.init_cfg = None
    for loss in losses_of(config):
        if loss.pop("annotations", None) is not None:
            loss["counts"] = counts_for(config.num_classes)
    model.train_cfg.rpn_proposal.update(nms_pre=60, max_per_img=40)
    model.test_cfg.rpn.update(nms_pre=60, max_per_img=20)
    model.test_cfg.rcnn.max_per_img = 10
    stages = model.train_cfg.rcnn
    for stage in stages if isinstance(stages, list) else [stages]:
        stage.sampler.num = 32
    return config


def losses_of(config: Config) -> list[Any]:
    """The configs of the classification losses, one for each box head."""
    heads = config.model.roi_head.bbox_head
    return [head.loss_cls for head in (heads if isinstance(heads, list) else [heads])]


def build(config: Config) -> nn.Module:
    """The detector of a config, with random weights."""
    torch.manual_seed(0)
    return MODELS.build(config.model)


def batch(num_categories: int, seed: int = 0) -> dict[str, Any]:
    """Two noisy images with three objects each, with masks and a semantic map."""
    generator = torch.Generator().manual_seed(seed)
    height, width = SIZE
    inputs, samples = [], []
    for index in range(2):
        inputs.append(
            torch.randint(0, 256, (3, height, width), generator=generator, dtype=torch.uint8)
        )
        corners = torch.tensor([[4.0, 6, 40, 50], [30, 10, 90, 60], [50, 2, 80, 20]])
        masks = np.zeros((3, height, width), np.uint8)
        for mask, (x1, y1, x2, y2) in zip(masks, corners.int().tolist(), strict=True):
            mask[y1:y2, x1:x2] = 1
        sample = DetDataSample(
            metainfo={
                "img_id": index,
                "img_shape": SIZE,
                "ori_shape": SIZE,
                "pad_shape": SIZE,
                "scale_factor": (1.0, 1.0),
                "flip": False,
            }
        )
        sample.gt_instances = InstanceData(
            bboxes=corners,
            labels=torch.randint(0, num_categories, (3,), generator=generator),
            masks=BitmapMasks(masks, height, width),
        )
        seg = torch.randint(0, 183, (1, height, width), generator=generator)
        sample.gt_sem_seg = PixelData(sem_seg=seg)
        samples.append(sample)
    return {"inputs": inputs, "data_samples": samples}
