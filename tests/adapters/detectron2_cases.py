"""What the tests of the detectron2 adapter share: a small detector and images for it."""

import logging
from pathlib import Path
from typing import Any

import torch
from detectron2.config import CfgNode, get_cfg
from detectron2.modeling import build_model
from detectron2.structures import BitMasks, Boxes, Instances
from detectron2.utils.events import EventStorage
from torch import Tensor, nn

from balanced_group_softmax import GroupLayout
from balanced_group_softmax.adapters.detectron2 import add_bags_config

logging.getLogger("detectron2").setLevel(logging.ERROR)
logging.getLogger("fvcore").setLevel(logging.ERROR)

COUNTS = [3, 50, 700, 9000, 4, 60, 800, 20000]
NUM_CATEGORIES = len(COUNTS)
IDS = tuple(range(10, 10 + NUM_CATEGORIES))
LAYOUT = GroupLayout.from_counts(COUNTS, background="last", category_ids=IDS)
GROUP_LOSSES = [f"loss_cls_{name}" for name in LAYOUT.group_names]
KINDS = ["faster", "mask", "cascade", "cascade_mask"]


def small_config(folder: Path, kind: str = "faster", *, bags: bool = True, **bags_keys: Any) -> Any:
    """A config of a detector that runs in a moment on images of 64 pixels."""
    cfg: CfgNode = get_cfg()
    add_bags_config(cfg)
    if bags and not bags_keys:
        bags_keys["LAYOUT"] = str(folder / "layout.json")
        LAYOUT.save(bags_keys["LAYOUT"])
    cascade = "cascade" in kind
    name = f"{'BAGS' if bags else ''}{'Cascade' if cascade else 'Standard'}ROIHeads"
    model = cfg.MODEL
    model.DEVICE = "cpu"
    model.WEIGHTS = ""
    model.MASK_ON = "mask" in kind
    model.BACKBONE.NAME = "build_resnet_fpn_backbone"
    model.RESNETS.DEPTH = 18
    model.RESNETS.RES2_OUT_CHANNELS = 64
    model.RESNETS.OUT_FEATURES = ["res2", "res3", "res4", "res5"]
    model.FPN.IN_FEATURES = ["res2", "res3", "res4", "res5"]
    model.FPN.OUT_CHANNELS = 16
    model.ANCHOR_GENERATOR.SIZES = [[8], [16], [32], [64], [128]]
    model.RPN.IN_FEATURES = ["p2", "p3", "p4", "p5", "p6"]
    model.RPN.POST_NMS_TOPK_TRAIN = model.RPN.POST_NMS_TOPK_TEST = 40
    model.ROI_HEADS.NAME = name
    model.ROI_HEADS.IN_FEATURES = ["p2", "p3", "p4", "p5"]
    model.ROI_HEADS.NUM_CLASSES = NUM_CATEGORIES
    model.ROI_HEADS.BATCH_SIZE_PER_IMAGE = 32
    model.ROI_HEADS.SCORE_THRESH_TEST = 0.0
    model.ROI_BOX_HEAD.NAME = "FastRCNNConvFCHead"
    model.ROI_BOX_HEAD.NUM_FC = 1
    model.ROI_BOX_HEAD.FC_DIM = 24
    model.ROI_BOX_HEAD.POOLER_RESOLUTION = 3
    model.ROI_BOX_HEAD.CLS_AGNOSTIC_BBOX_REG = cascade
    model.ROI_MASK_HEAD.NAME = "MaskRCNNConvUpsampleHead"
    model.ROI_MASK_HEAD.NUM_CONV = 1
    model.ROI_MASK_HEAD.CONV_DIM = 8
    model.ROI_MASK_HEAD.POOLER_RESOLUTION = 4
    for key, value in bags_keys.items():
        setattr(model.BAGS, key, value)
    return cfg


def small_model(folder: Path, kind: str = "faster", **options: Any) -> nn.Module:
    return build_model(small_config(folder, kind, **options))


def images(*, labelled: bool = True) -> list[dict[str, Any]]:
    """Two images as a data loader gives them."""
    batch = []
    for index in range(2):
        item: dict[str, Any] = {"image": torch.randint(256, (3, 64, 64)).float()}
        item |= {"height": 64, "width": 64}
        if labelled:
            boxes = torch.tensor([[4.0, 4, 30, 28], [20, 30, 60, 60]])
            masks = torch.zeros(2, 64, 64, dtype=torch.bool)
            masks[0, 4:28, 4:30] = masks[1, 30:60, 20:60] = True
            item["instances"] = Instances(
                (64, 64),
                gt_boxes=Boxes(boxes),
                gt_classes=torch.tensor([index, NUM_CATEGORIES - 1]),
                gt_masks=BitMasks(masks),
            )
        batch.append(item)
    return batch


def step(model: nn.Module, batch: list[dict[str, Any]] | None = None) -> dict[str, Tensor]:
    """A forward pass of training; returns the losses."""
    model.train()
    with EventStorage():
        losses: dict[str, Tensor] = model(batch or images())
    return losses


def predictors(model: nn.Module) -> list[Any]:
    found: Any = model.roi_heads.box_predictor
    return list(found) if isinstance(found, nn.ModuleList) else [found]
