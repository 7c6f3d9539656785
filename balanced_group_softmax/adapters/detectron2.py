"""Balanced Group Softmax in detectron2, for YAML and for LazyConfig.

YAML: call `add_bags_config(cfg)` before a file is merged, and name the RoI heads in it:

    MODEL:
      WEIGHTS: "softmax/model_final.pth"  # the classifier starts from this one
      ROI_HEADS:
        NAME: "BAGSStandardROIHeads"  # or "BAGSCascadeROIHeads"

LazyConfig: name the box predictor, and for a cascade the RoI heads as well:

    model.roi_heads.box_predictor.update(
        _target_=BAGSFastRCNNOutputLayers, annotations="lvis_v1_train.json")

In both, `freeze(model)` between building the model and its optimiser leaves nothing but the
classifier to train. Labels are 0..K-1, in ascending order of category ids, and background is K.

A softmax classifier in a checkpoint is converted when it is loaded; one that does not fit raises.
The parts: box predictors (`detectron2_predictors`), where groups come from (`detectron2_layouts`),
detections (`detectron2_detections`), and here the RoI heads, the config's keys and freezing.
"""

from typing import Any, Literal, get_args

import torch
from detectron2.config import CfgNode, configurable
from detectron2.layers import ShapeSpec
from detectron2.modeling import GeneralizedRCNN
from detectron2.modeling.proposal_generator import RPN
from detectron2.modeling.roi_heads import (
    ROI_HEADS_REGISTRY,
    BaseKeypointRCNNHead,
    BaseMaskRCNNHead,
    CascadeROIHeads,
    ROIHeads,
    StandardROIHeads,
)
from detectron2.structures import Instances
from torch import Tensor, nn

from balanced_group_softmax.adapters.detectron2_detections import select_instances
from balanced_group_softmax.adapters.detectron2_layouts import read_layout
from balanced_group_softmax.adapters.detectron2_predictors import (
    BAGSFastRCNNOutputLayers,
    ClassifierOutputLayers,
)
from balanced_group_softmax.adapters.freezing import freeze_all_but

__all__ = [
    "BAGSCascadeROIHeads",
    "BAGSFastRCNNOutputLayers",
    "BAGSStandardROIHeads",
    "ClassifierOutputLayers",
    "add_bags_config",
    "freeze",
    "read_layout",
    "select_instances",
]

Train = Literal["classifier", "box_head", "box_and_mask_heads", "all"]
Fusion = Literal["logits", "probabilities"]


# --- RoI heads -----------------------------------------------------------------------------------


@ROI_HEADS_REGISTRY.register()
class BAGSStandardROIHeads(StandardROIHeads):
    """`StandardROIHeads` whose box predictor is built from a config as BAGS; masks included."""

    @classmethod
    def _init_box_head(cls, cfg: CfgNode, input_shape: dict[str, ShapeSpec]) -> dict[str, Any]:
        parts: dict[str, Any] = super()._init_box_head(cfg, input_shape)
        parts["box_predictor"] = BAGSFastRCNNOutputLayers(cfg, parts["box_head"].output_shape)
        return parts


@ROI_HEADS_REGISTRY.register()
class BAGSCascadeROIHeads(CascadeROIHeads):
    """`CascadeROIHeads` whose box predictors are built from a config as BAGS; masks included.

    Args:
        fusion: what is averaged over the stages at test: `"logits"`, as the original does, which
            are then activated once; or `"probabilities"`, as detectron2 does.
        kwargs: as for `CascadeROIHeads`.

    Raises:
        TypeError: a box predictor is not a `ClassifierOutputLayers`.
        ValueError: `fusion` is unknown, or its logits cannot be averaged because stages have
            different layouts.
    """

    @configurable
    def __init__(self, *, fusion: Fusion = "logits", **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if fusion not in get_args(Fusion):
            raise ValueError(f"Expected `fusion` to be one of {get_args(Fusion)}, got {fusion!r}")
        for predictor in self.box_predictor:
            if not isinstance(predictor, ClassifierOutputLayers):
                raise TypeError(
                    "Expected `box_predictors` of type BAGSFastRCNNOutputLayers, got "
                    f"{type(predictor).__name__}"
                )
        layouts = {getattr(one.cls_score, "layout", None) for one in self.box_predictor}
        if fusion == "logits" and len(layouts) > 1:
            raise ValueError(
                f"Expected one layout in all stages for fusion='logits', got {len(layouts)}; "
                "use 'probabilities'"
            )
        self.fusion = fusion

    @classmethod
    def from_config(cls, cfg: CfgNode, input_shape: dict[str, ShapeSpec]) -> dict[str, Any]:
        """Return the arguments that a config node stands for."""
        return {**super().from_config(cfg, input_shape), "fusion": cfg.MODEL.BAGS.CASCADE_FUSION}

    @classmethod
    def _init_box_head(cls, cfg: CfgNode, input_shape: dict[str, ShapeSpec]) -> dict[str, Any]:
        parts: dict[str, Any] = super()._init_box_head(cfg, input_shape)
        parts["box_predictors"] = [
            BAGSFastRCNNOutputLayers(
                cfg, head.output_shape, box2box_transform=plain.box2box_transform
            )
            for head, plain in zip(parts["box_heads"], parts["box_predictors"], strict=True)
        ]
        return parts

    def _forward_box(
        self,
        features: dict[str, Tensor],
        proposals: list[Instances],
        targets: list[Instances] | None = None,
    ) -> Any:
        if self.training:
            return super()._forward_box(features, proposals, targets)
        # detectron2 has the average of probabilities and its NMS written into this method, so its
        # half for inference is written anew here.
        pyramid = [features[name] for name in self.box_in_features]
        image_sizes = [one.image_size for one in proposals]
        logits: list[Tensor] = []
        scores: list[Tensor] = []
        boxes: Any = ()
        for stage, predictor in enumerate(self.box_predictor):
            if stage > 0:
                proposals = self._create_proposals_from_boxes(boxes, image_sizes)
            predictions = self._run_stage(pyramid, proposals, stage)
            boxes = predictor.predict_boxes(predictions, proposals)
            if self.fusion == "logits":
                logits.append(predictions[0].float())
            else:
                scores.append(predictor.cls_score.scores(predictions[0]))
        last = self.box_predictor[-1]
        fused = last.cls_score.scores(_mean(logits)) if logits else _mean(scores)
        instances, _ = select_instances(
            boxes,
            fused.split([len(one) for one in proposals]),
            image_sizes,
            last.test_score_thresh,
            last.test_nms_thresh,
            last.test_topk_per_image,
        )
        return instances


def _mean(values: list[Tensor]) -> Tensor:
    return torch.stack(values).mean(dim=0)


# --- configs and freezing ------------------------------------------------------------------------


def add_bags_config(cfg: CfgNode) -> None:
    """Add the keys of BAGS to a config, under `MODEL.BAGS`.

    | key | default | means |
    |---|---|---|
    | `LAYOUT` | "" | a layout's JSON file, or a checkpoint with a BAGS classifier |
    | `ANNOTATIONS` | "" | training annotations to count instances in |
    | `THRESHOLDS` | (10, 100, 1000) | boundaries between groups, in instances |
    | `OTHERS_RATIO` | 8.0 | others that count for each foreground row of a group |
    | `CASCADE_FUSION` | "logits" | or "probabilities": what cascades average at test |
    | `IMPL` | "auto" | which implementation computes loss and scores |
    | `TRAIN` | "classifier" | what trains, for `freeze(model, cfg.MODEL.BAGS.TRAIN)` |

    Without `LAYOUT` and `ANNOTATIONS`, instances are counted in the `json_file` of the one data set
    in `DATASETS.TRAIN`.
    """
    cfg.MODEL.BAGS = CfgNode(
        {
            "LAYOUT": "",
            "ANNOTATIONS": "",
            "THRESHOLDS": (10, 100, 1000),
            "OTHERS_RATIO": 8.0,
            "CASCADE_FUSION": "logits",
            "IMPL": "auto",
            "TRAIN": "classifier",
        }
    )


def freeze(model: nn.Module, train: Train = "classifier") -> list[nn.Parameter]:
    """Choose what of a two-stage detector trains; the rest is frozen. Before the optimiser is made.

    | `train` | trains |
    |---|---|
    | "classifier" | `cls_score` only, of every stage: the original's second stage |
    | "box_head" | box heads and box predictors |
    | "box_and_mask_heads" | these and the mask and keypoint heads |
    | "all" | everything that trained before the first call |

    Frozen parameters get `requires_grad=False`; frozen modules go to eval mode and return to it
    whenever `model.train()` is called. See `adapters.freezing.freeze_all_but`.

    Args:
        model: a `GeneralizedRCNN` with `StandardROIHeads` or `CascadeROIHeads`, BAGS or not. Wrap
            it in DDP afterwards.
        train: what trains. Another call takes the place of the first.

    Returns:
        The parameters that train.

    Raises:
        TypeError: `model` is no such detector.
        ValueError: `train` is unknown.
    """
    roi_heads = getattr(model, "roi_heads", None)
    if not isinstance(roi_heads, StandardROIHeads):
        raise TypeError(
            "Expected `model` to be a detector of detectron2 with StandardROIHeads or "
            f"CascadeROIHeads, got {type(model).__name__}"
            + ("" if roi_heads is None else f" with {type(roi_heads).__name__}")
        )
    if train not in get_args(Train):
        raise ValueError(f"Expected `train` to be one of {get_args(Train)}, got {train!r}")
    predictors = roi_heads.box_predictor
    stages: list[Any] = list(predictors) if isinstance(predictors, nn.ModuleList) else [predictors]
    trainable: list[nn.Module] = [model]
    if train == "classifier":
        trainable = [stage.cls_score for stage in stages]
    elif train != "all":
        names = ["box_head", "box_predictor"]
        if train == "box_and_mask_heads":
            names += ["mask_head", "keypoint_head"]
        trainable = [one for name in names if (one := getattr(roi_heads, name, None)) is not None]
    # Where the mode chooses a procedure: losses or predictions.
    follow = (GeneralizedRCNN, RPN, ROIHeads, BaseMaskRCNNHead, BaseKeypointRCNNHead)
    return freeze_all_but(model, trainable, follow_train=follow)
