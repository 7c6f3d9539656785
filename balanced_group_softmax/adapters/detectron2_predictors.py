"""Box predictors of detectron2 with another classifier, such as Balanced Group Softmax.

State dict of `BAGSFastRCNNOutputLayers`: `cls_score.weight` and `.bias` give way to
`cls_score.fc.weight`, `cls_score.fc.bias`, `cls_score._extra_state`, which holds the layout, and
`_extra_state`, its fingerprint. That of another classifier is of its kind and shapes.
"""

import logging
import os
from collections.abc import Sequence
from typing import Any, Literal

import torch
from detectron2.config import CfgNode, configurable
from detectron2.layers import ShapeSpec
from detectron2.modeling.roi_heads import FastRCNNOutputLayers
from detectron2.structures import Instances
from torch import Tensor, nn

from balanced_group_softmax.adapters.detectron2_detections import select_instances
from balanced_group_softmax.adapters.detectron2_layouts import (
    fingerprint,
    read_layout,
    same_category_ids,
    same_groups,
    training_annotations,
)
from balanced_group_softmax.adapters.protocol import check_classifier
from balanced_group_softmax.head import BAGSHead
from balanced_group_softmax.layout import GroupLayout

__all__ = ["BAGSFastRCNNOutputLayers", "ClassifierOutputLayers"]

_logger = logging.getLogger(__name__)

_FRESH = (
    "To start from a fresh classifier, put the model's own {0}cls_score.* and {0}_extra_state into "
    "the checkpoint"
)


class ClassifierOutputLayers(FastRCNNOutputLayers):
    """detectron2's `FastRCNNOutputLayers` with the loss and the scores of a `Classifier`.

    In training, `loss_cls` is replaced by the classifier's own entries, which detectron2's trainers
    put into the event storage by name; in a cascade they end in `_stage0` and so on. The accuracies
    in the storage are those of the scores. Box regression is detectron2's, class-agnostic or
    class-specific.

    Loading a state dict whose classifier is of another kind or shape raises ValueError, also by
    detectron2's checkpointer, which drops entries of other shapes with a warning; so does one with
    `bbox_pred` and without a classifier. One without either, such as a backbone, is none of its
    concern. A plain softmax classifier that would fit is left out: to start from it, make the
    classifier by its own `from_linear`.

    Args:
        input_shape: of the features, or their number.
        classifier: an `nn.Module` that meets `adapters.protocol.Classifier`, with
            `background="last"`.
        num_classes: K, for configs that say it; that of the classifier.
        kwargs: as for `FastRCNNOutputLayers`. `loss_weight["loss_cls"]` is a factor of every
            classification loss.

    Raises:
        TypeError: `classifier` is not one.
        ValueError: it does not fit the features or `num_classes`, sigmoid or federated losses are
            asked for, or boxes are rotated.
    """

    cls_score: Any  # a `Classifier` and an `nn.Module`

    def __init__(
        self,
        input_shape: ShapeSpec | int,
        *,
        classifier: Any,
        num_classes: int | None = None,
        **kwargs: Any,
    ) -> None:
        check_classifier(classifier, background="last")
        if not isinstance(classifier, nn.Module):
            raise TypeError(
                f"Expected `classifier` to be an nn.Module, got {type(classifier).__name__}"
            )
        if num_classes not in (None, classifier.num_categories):
            raise ValueError(
                f"Expected `num_classes` {classifier.num_categories}, as many categories as the "
                f"classifier or its layout has, got {num_classes}"
            )
        if kwargs.get("use_sigmoid_ce") or kwargs.get("use_fed_loss"):
            raise ValueError(
                "Expected `use_sigmoid_ce` and `use_fed_loss` (USE_SIGMOID_CE, USE_FED_LOSS) to be "
                "False: the classifier has a loss of its own"
            )
        transform = kwargs.get("box2box_transform")
        if transform is not None and len(transform.weights) != 4:
            raise ValueError(
                "Expected a `box2box_transform` of boxes with 4 numbers, got "
                f"{type(transform).__name__} with {len(transform.weights)}: rotated boxes are not "
                "served"
            )
        super().__init__(input_shape, num_classes=classifier.num_categories, **kwargs)
        if classifier.in_features != self.cls_score.in_features:
            raise ValueError(
                f"Expected `classifier` with in_features={self.cls_score.in_features}, as the box "
                f"head gives, got {classifier.in_features}"
            )
        self.cls_score = classifier

    def losses(
        self, predictions: tuple[Tensor, Tensor], proposals: list[Instances]
    ) -> dict[str, Tensor]:
        """Return the classifier's losses and `loss_box_reg`.

        Args:
            predictions: logits [R, L] and deltas, as `forward` returns them.
            proposals: sampled, with `gt_classes` in [0, K], K for background.
        """
        logits, deltas = predictions
        labels = torch.cat(
            [logits.new_zeros(0, dtype=torch.int64), *(one.gt_classes for one in proposals)]
        )
        # detectron2 logs accuracies and takes the last of K + 1 columns for background. Its
        # cross-entropy of the scores is thrown away.
        with torch.no_grad():
            scores = self.cls_score.scores(logits)
        losses: dict[str, Tensor] = super().losses((scores, deltas), proposals)
        del losses["loss_cls"]
        weight = self.loss_weight.get("loss_cls", 1.0)
        own = self.cls_score.losses(logits, labels)
        return {**{name: weight * loss for name, loss in own.items()}, **losses}

    def predict_probs(
        self, predictions: tuple[Tensor, Tensor], proposals: list[Instances]
    ) -> tuple[Tensor, ...]:
        """Return the scores of each image, [Ri, K + 1] each, background last."""
        scores: Tensor = self.cls_score.scores(predictions[0])
        return scores.split([len(one) for one in proposals])

    def inference(
        self, predictions: tuple[Tensor, Tensor], proposals: list[Instances]
    ) -> tuple[list[Instances], list[Tensor]]:
        """Return the detections of each image and their RoIs, by `select_instances`."""
        return select_instances(
            self.predict_boxes(predictions, proposals),
            self.predict_probs(predictions, proposals),
            [one.image_size for one in proposals],
            self.test_score_thresh,
            self.test_nms_thresh,
            self.test_topk_per_image,
        )

    def get_extra_state(self) -> Tensor:
        """A fingerprint of the classifier, [64] uint8, whatever the classifier.

        detectron2's checkpointer drops what has another shape before it loads. This never has, so
        it tells that there was a classifier, and which.
        """
        return fingerprint(self.cls_score)

    def set_extra_state(self, state: Tensor) -> None:
        """Nothing to set: it was compared before loading began."""

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        # torch gives each module a dict of its own, so that it may be changed here.
        own = f"{prefix}cls_score."
        mine = self.cls_score.state_dict()
        expected = [own + name for name in mine]
        if (mark := state_dict.get(f"{prefix}_extra_state")) is not None:
            self._check_fingerprint(mark, prefix)
            if isinstance(self.cls_score, BAGSHead):
                # Category ids that one side knows make it longer; then it was dropped.
                state_dict.setdefault(f"{own}_extra_state", mine["_extra_state"])
        else:
            expected = [name for name in expected if not name.endswith("_extra_state")]
            is_softmax = f"{own}weight" in state_dict and f"{own}weight" not in expected
            has_predictor = any(
                name.startswith((own, f"{prefix}bbox_pred.")) for name in state_dict
            )
            if is_softmax:
                self._check_softmax(state_dict[f"{own}weight"], own)
                _logger.warning(
                    "%s* of the checkpoint is a softmax classifier and left out; %s.from_linear "
                    "starts from one",
                    own,
                    type(self.cls_score).__name__,
                )
            if is_softmax or not has_predictor:
                expected = []  # or only a backbone
        missing = [name for name in expected if name not in state_dict]
        if missing:
            raise ValueError(
                f"Expected {', '.join(missing)} in the checkpoint, for {self._described()}, as it "
                f"has other entries of {prefix}*, got none: missing, or of another name or shape "
                f"and dropped on the way. {_FRESH.format(prefix)}"
            )
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def _check_softmax(self, weight: Tensor, own: str) -> None:
        categories, features = self.cls_score.num_categories, self.cls_score.in_features
        if tuple(weight.shape) != (categories + 1, features):
            raise ValueError(
                f"Expected {own}weight of the checkpoint to be a softmax classifier of shape "
                f"{[categories + 1, features]} ({categories} categories, then background), "
                f"got {list(weight.shape)}. {_FRESH.format(own.removesuffix('cls_score.'))}"
            )

    def _check_fingerprint(self, mark: Any, prefix: str) -> None:
        mine, theirs = self.get_extra_state(), torch.as_tensor(mark).cpu()
        groups_agree = same_groups(mine, theirs)
        if groups_agree and same_category_ids(mine, theirs):
            return
        has = "other category ids" if groups_agree else "another kind or shape"
        hint = ""
        if isinstance(self.cls_score, BAGSHead):
            has = "other category ids" if groups_agree else "other groups"
            hint = (
                "Give the checkpoint itself as `layout` (MODEL.BAGS.LAYOUT), or compare "
                'GroupLayout.from_state_dict(torch.load(path)["model"]). '
            )
        raise ValueError(
            f"The checkpoint's {prefix}cls_score.* has {has} than {self._described()}. "
            f"{hint}{_FRESH.format(prefix)}"
        )

    def _described(self) -> str:
        one = self.cls_score
        if isinstance(one, BAGSHead):
            kind = f"the layout of {one.num_categories} categories, {one.layout.num_logits} logits"
        else:
            kind = f"a {type(one).__name__} of {one.num_categories} categories"
        return f"{kind} and {one.in_features} features here"


class BAGSFastRCNNOutputLayers(ClassifierOutputLayers):
    """A box predictor whose classifier is a `BAGSHead`.

    Give the groups by `layout` or by `annotations`. From a config node it takes what
    `add_bags_config` adds.

    Loading a state dict with a plain softmax classifier converts it (`BAGSHead.from_linear`).
    Loading one of another layout or width raises ValueError, as in `ClassifierOutputLayers`.

    Args:
        input_shape: of the features, or their number.
        layout: a `GroupLayout` with background, or the path of one: a layout's JSON file, or a
            detectron2 checkpoint (.pth) with a BAGS classifier. A LazyConfig cannot hold the object
            itself, but a path, or `LazyCall(GroupLayout.from_counts)(counts=[...])`.
        annotations: path of the training annotations, LVIS or COCO.
        thresholds: boundaries between groups, in instances, for `annotations`.
        others_ratio: others that count for each foreground row of a group; may be infinite.
        impl: which implementation computes loss and scores.
        kwargs: as for `ClassifierOutputLayers`, without `classifier`.

    Raises:
        OSError: a file cannot be read.
        TypeError: an argument is of the wrong type.
        ValueError: the groups are given in no way or in both, are not valid or not of
            `num_classes` categories; or as for `ClassifierOutputLayers`.

    Source: Li et al., CVPR 2020, section 4.
    """

    @configurable
    def __init__(
        self,
        input_shape: ShapeSpec | int,
        *,
        layout: GroupLayout | str | os.PathLike[str] | None = None,
        annotations: str | os.PathLike[str] | None = None,
        thresholds: Sequence[int] = (10, 100, 1000),
        others_ratio: float = 8.0,
        impl: Literal["auto", "triton", "torch", "reference"] = "auto",
        **kwargs: Any,
    ) -> None:
        head = BAGSHead(
            _num_features(input_shape),
            read_layout(layout, annotations, thresholds),
            others_ratio=others_ratio,
            impl=impl,
        )
        super().__init__(input_shape, classifier=head, **kwargs)

    @classmethod
    def from_config(cls, cfg: CfgNode, input_shape: ShapeSpec) -> dict[str, Any]:
        """Return the arguments that a config node stands for."""
        node = cfg.MODEL.BAGS
        annotations = node.ANNOTATIONS
        if not node.LAYOUT and not annotations:
            annotations = training_annotations(cfg.DATASETS.TRAIN)
        arguments: dict[str, Any] = super().from_config(cfg, input_shape)
        del arguments["get_fed_loss_cls_weights"]
        return {
            **arguments,
            "layout": node.LAYOUT or None,
            "annotations": annotations or None,
            "thresholds": node.THRESHOLDS,
            "others_ratio": node.OTHERS_RATIO,
            "impl": node.IMPL,
        }

    @property
    def layout(self) -> GroupLayout:
        """The groups."""
        layout: GroupLayout = self.cls_score.layout
        return layout

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        own = f"{prefix}cls_score."
        if f"{own}weight" in state_dict and f"{own}fc.weight" not in state_dict:
            self._convert(state_dict, own)
            state_dict[f"{prefix}_extra_state"] = self.get_extra_state()
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def _convert(self, state_dict: dict[str, Any], own: str) -> None:
        """Replace a softmax classifier by what `BAGSHead.from_linear` makes of it."""
        weight = torch.as_tensor(state_dict.pop(f"{own}weight"))
        bias = state_dict.pop(f"{own}bias", None)
        self._check_softmax(weight, own)
        labels, features = weight.shape
        linear = nn.Linear(features, labels, bias=bias is not None, device="meta")
        linear.weight = nn.Parameter(weight.detach(), requires_grad=False)
        if bias is not None:
            linear.bias = nn.Parameter(torch.as_tensor(bias).detach(), requires_grad=False)
        head = BAGSHead.from_linear(linear, self.layout, bias=self.cls_score.fc.bias is not None)
        state_dict.update({own + name: value for name, value in head.state_dict().items()})
        _logger.info("%s* starts from the checkpoint's softmax classifier", own)


def _num_features(input_shape: ShapeSpec | int) -> int:
    if isinstance(input_shape, int):
        return input_shape
    channels: int = input_shape.channels
    return channels * (input_shape.height or 1) * (input_shape.width or 1)
