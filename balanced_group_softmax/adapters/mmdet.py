"""Balanced Group Softmax in mmdet 3, by config alone.

    custom_imports = dict(imports=["balanced_group_softmax.adapters.mmdet"])
    model = dict(roi_head=dict(bbox_head=dict(
        num_classes=1203,
        loss_cls=dict(_delete_=True, type="BAGSLoss", annotations="lvis_v1_train.json"))))
    custom_hooks = [dict(type="BAGSFreezeHook", train="classifier")]

`BAGSLoss` is all that a detector needs: mmdet asks the loss for the width of `fc_cls`, for the
scores and for the accuracy. It serves every head made of mmdet's `BBoxHead` that leaves `fc_cls` to
it: Faster, Mask and Cascade R-CNN, Hybrid Task Cascade. Labels have background last.

State dict: `fc_cls` has the layout's width, and `loss_cls._extra_state` holds the layout, so that a
checkpoint describes itself; loading one of another layout raises.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from mmdet.models.losses import CrossEntropyLoss
from mmdet.models.roi_heads.bbox_heads import Shared2FCBBoxHead
from mmdet.models.task_modules.samplers import OHEMSampler, ScoreHLRSampler
from mmdet.registry import HOOKS, MODELS
from mmengine.hooks import Hook
from mmengine.model import is_model_wrapper
from mmengine.structures import InstanceData
from torch import Tensor, nn

from balanced_group_softmax._arguments import as_float, as_int_array, as_int_tuple
from balanced_group_softmax.adapters.freezing import freeze_all_but
from balanced_group_softmax.counts import category_counts, category_ids, read_annotations
from balanced_group_softmax.detections import select_detections
from balanced_group_softmax.functional import grouped_softmax_loss, grouped_softmax_scores
from balanced_group_softmax.head import BAGSHead
from balanced_group_softmax.layout import GroupLayout
from balanced_group_softmax.rebalance.class_weights import (
    class_balanced_weights,
    inverse_frequency_weights,
)

__all__ = [
    "FreezeHook",
    "MMDetBAGSLoss",
    "ReweightedCrossEntropyLoss",
    "SelectDetections",
    "SelectDetectionsShared2FCBBoxHead",
    "StartHook",
    "bags_losses",
    "check_categories",
    "check_detector",
    "freeze",
    "start_from_softmax",
]

Train = Literal["classifier", "box_head", "box_and_mask_heads", "all"]
SELECTP: dict[int, Train] = {
    0: "all",
    1: "classifier",
    2: "box_head",
    3: "classifier",
    4: "box_and_mask_heads",
}
"""The original's numbers for what trains; 1 is for one box head, 3 for the stages of a cascade."""

_IGNORE = -100
_UNSERVED = (
    "DoubleHead, SABL, Sparse R-CNN and one-stage heads make a classifier of their own; use "
    "Shared2FCBBoxHead or another ConvFCBBoxHead"
)


@MODELS.register_module(name="BAGSLoss")
class MMDetBAGSLoss(nn.Module):
    """The loss of Balanced Group Softmax as mmdet's `loss_cls`, registered as `BAGSLoss`.

    Give the groups in exactly one of three ways: `layout`, `annotations` or `counts`.

    The normalisers are the method's own: mmdet's `avg_factor` is ignored, and rows of label weight
    0 take part in nothing. Logs have `loss_cls_<group>` and, in percent, `acc` (of the scores) and
    `acc_<group>`: right ones among the rows whose category is in the group (0 if there are none).

    Args:
        layout: path of a layout's JSON file, its content as a dict, or a `GroupLayout`, in any
            label convention with background.
        annotations: path of the training annotations, LVIS or COCO.
        counts: training instances of each category, C integers, in the order of the labels.
        thresholds: boundaries between groups, in instances, for annotations and counts.
        others_ratio: others that count for each foreground row of a group; may be infinite.
        category_weights: of foreground rows in the group of their category: C numbers, or
            `"inverse_frequency"`, which weights each group's categories by counts as the original's
            re-weighted variant does.
        loss_weight: factor of every group's loss.
        impl: which implementation computes loss and scores.

    Raises:
        OSError: a file cannot be read.
        TypeError: an argument is of the wrong type.
        ValueError: a value is not valid, the groups are given in no way or in several, or the
            layout has no background.

    Source: Li et al., CVPR 2020, section 4.
    """

    # What mmdet's BBoxHead asks for: width of fc_cls and scores at test; accuracy and refinement in
    # cascades; its name for the third says what it is.
    custom_cls_channels = True
    custom_activation = True
    custom_accuracy = True

    category_weights: Tensor | None

    def __init__(
        self,
        layout: str | Mapping[str, Any] | GroupLayout | None = None,
        *,
        annotations: str | None = None,
        counts: Sequence[int] | None = None,
        thresholds: Sequence[int] = (10, 100, 1000),
        others_ratio: float = 8.0,
        category_weights: Sequence[float] | str | None = None,
        loss_weight: float = 1.0,
        impl: str = "auto",
    ) -> None:
        super().__init__()
        given = {"layout": layout, "annotations": annotations, "counts": counts}
        names = [name for name, value in given.items() if value is not None]
        if len(names) != 1:
            raise ValueError(
                "Expected exactly one of `layout`, `annotations` and `counts`, got "
                + (" and ".join(names) or "none")
            )
        if layout is not None:
            self.layout, numbers = _as_layout(layout), None
        else:
            ids, numbers = _counts(annotations, counts)
            self.layout = GroupLayout.from_counts(
                numbers, as_int_tuple(list(thresholds), "thresholds"), "last", ids
            )
        self.others_ratio = as_float(others_ratio, "others_ratio", lowest=0)
        self.loss_weight = as_float(loss_weight, "loss_weight", lowest=0)
        self.impl = impl
        weights = _category_weights(category_weights, self.layout, numbers)
        self.register_buffer("category_weights", weights, persistent=False)

    @property
    def use_sigmoid(self) -> bool:
        """Asked for by heads that cannot serve; says so."""
        raise TypeError(f"Expected a head that leaves fc_cls to its loss: {_UNSERVED}")

    def get_cls_channels(self, num_classes: int) -> int:
        """The width of `fc_cls`, for mmdet: L logits for C categories.

        Raises:
            ValueError: the layout is not for `num_classes` categories.
        """
        if num_classes != self.layout.num_categories:
            raise ValueError(
                f"Expected `num_classes` {self.layout.num_categories}, as many categories as the "
                f"layout of BAGSLoss has, got {num_classes}"
            )
        return self.layout.num_logits

    def get_activation(self, cls_score: Tensor) -> Tensor:
        """Scores [R, C + 1], background last, of logits [R, L]."""
        self._check_width(cls_score)
        return grouped_softmax_scores(cls_score, self.layout, impl=self.impl)

    @torch.no_grad()
    def get_accuracy(self, cls_score: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """Accuracy in percent, of the scores and of each group, for the log."""
        layout, tables = self.layout, self.layout.tables(cls_score.device)
        predicted = self.get_activation(cls_score).argmax(1)
        groups, positions = tables.label_groups[labels], tables.label_positions[labels]
        every_row = torch.ones_like(labels, dtype=torch.bool)
        is_foreground = labels < layout.num_categories  # background is last
        accuracy = {"acc": _percent(predicted == labels, every_row)}
        columns = zip(layout.group_names, layout.group_starts, layout.group_sizes, strict=True)
        for index, (name, start, size) in enumerate(columns):
            column = cls_score[:, start : start + size].argmax(1)
            if index == 0:
                rows, wanted = every_row, is_foreground.long()
            else:
                rows, wanted = groups == index, positions
            accuracy[f"acc_{name}"] = _percent(column == wanted, rows)
        return accuracy

    def forward(
        self,
        cls_score: Tensor,
        label: Tensor,
        weight: Tensor | None = None,
        avg_factor: float | None = None,
        reduction_override: str | None = None,
    ) -> dict[str, Tensor]:
        """Return `loss_cls_<group>` of logits [R, L] for labels [R], background C.

        Raises:
            ValueError: the logits are not of the layout's width, or losses of single rows are asked
                for, which this loss does not have.
        """
        self._check_width(cls_score)
        if reduction_override == "none":
            raise ValueError(
                "Expected a sampler that works without the loss of each RoI, got one that wants "
                "it (OHEM, score-HLR, PISA): a group's loss is one number; use RandomSampler"
            )
        if weight is not None:
            label = torch.where(weight > 0, label, _IGNORE)
        losses = grouped_softmax_loss(
            cls_score,
            label,
            self.layout,
            others_ratio=self.others_ratio,
            category_weights=self.category_weights,
            reduction="groups",
            ignore_index=_IGNORE,
            impl=self.impl,
        )
        named = zip(self.layout.group_names, (self.loss_weight * losses).unbind(), strict=True)
        return {f"loss_cls_{name}": loss for name, loss in named}

    def get_extra_state(self) -> Tensor:
        """The layout, for the state dict."""
        return self.layout.to_extra_state()

    def set_extra_state(self, state: Tensor) -> None:
        """Nothing to set: the layout was compared before loading began."""

    def extra_repr(self) -> str:
        """The settings, for printing."""
        return f"layout={self.layout}, others_ratio={self.others_ratio:g}, impl={self.impl!r}"

    def _check_width(self, cls_score: Tensor) -> None:
        if cls_score.ndim != 2 or cls_score.shape[1] != self.layout.num_logits:
            raise ValueError(
                f"Expected `cls_score` of shape [R, {self.layout.num_logits}] from a head that "
                f"leaves fc_cls to its loss, got {list(cls_score.shape)}: {_UNSERVED}"
            )

    def _load_from_state_dict(
        self, state_dict: Mapping[str, Any], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        if prefix + "_extra_state" in state_dict:
            theirs = GroupLayout.from_state_dict(state_dict, prefix)
            differences = self.layout.differences(theirs)
            if differences:
                raise ValueError(
                    f"The checkpoint's {prefix}* has another layout: {'; '.join(differences)}. "
                    "Give BAGSLoss the layout of the checkpoint"
                )
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)


@MODELS.register_module()
class ReweightedCrossEntropyLoss(CrossEntropyLoss):
    """Softmax cross-entropy with weights by counts: the original's re-weighted baselines.

    The weighted sum is divided by the number of RoIs, as mmdet does with `class_weight`;
    background has weight 1.

    Args:
        annotations: path of the training annotations, LVIS or COCO.
        counts: training instances of each category, instead of `annotations`.
        scheme: `"inverse_frequency"` or `"class_balanced"`, see `rebalance.class_weights`.
        loss_weight: factor of the loss.

    Raises:
        OSError: the file cannot be read.
        TypeError: the counts are not integers.
        ValueError: the scheme is unknown, counts are not valid, or not given in exactly one way.
    """

    def __init__(
        self,
        annotations: str | None = None,
        counts: Sequence[int] | None = None,
        scheme: Literal["inverse_frequency", "class_balanced"] = "inverse_frequency",
        loss_weight: float = 1.0,
    ) -> None:
        schemes = {
            "inverse_frequency": inverse_frequency_weights,
            "class_balanced": class_balanced_weights,
        }
        if scheme not in schemes:
            raise ValueError(f"Expected `scheme` to be one of {list(schemes)}, got {scheme!r}")
        if (annotations is None) == (counts is None):
            raise ValueError("Expected exactly one of `annotations` and `counts`")
        weights = schemes[scheme](_counts(annotations, counts)[1], background="last")
        super().__init__(class_weight=weights.tolist(), loss_weight=loss_weight)


# --- what trains ---------------------------------------------------------------------------------


def freeze(model: nn.Module, train: Train | int = "classifier") -> list[nn.Parameter]:
    """Let only a part of a two-stage detector train, and keep the rest in eval mode.

    Args:
        model: the detector, not wrapped.
        train: `"classifier"` (`fc_cls`, of every stage), `"box_head"`, `"box_and_mask_heads"` or
            `"all"`, or the original's number for it, `selectp`: 1 (`fc_cls` of one box head), 2
            (box head), 3 (`fc_cls` of every stage of a cascade), 4 (box and mask heads), 0 (all).

    Returns:
        The parameters that train.

    Raises:
        TypeError: `model` is no two-stage detector.
        ValueError: `train` is unknown or does not fit the detector.
    """
    roi_head = getattr(model, "roi_head", None)
    box_head = getattr(roi_head, "bbox_head", None)
    if not isinstance(box_head, nn.Module):
        raise TypeError(
            "Expected `model` to be a two-stage detector of mmdet with `roi_head.bbox_head`, got "
            f"{type(model).__name__}"
        )
    stages = list(box_head) if isinstance(box_head, nn.ModuleList) else [box_head]
    if isinstance(train, int) and not isinstance(train, bool):
        if train not in SELECTP:
            raise ValueError(f"Expected `train` of the original's numbers 0 to 4, got {train}")
        if (train == 1 and len(stages) > 1) or (train == 3 and len(stages) == 1):
            raise ValueError(
                f"Expected 1 for one box head and 3 for a cascade, got {train} for {len(stages)} "
                "box heads; 'classifier' is for both"
            )
        train = SELECTP[train]
    if train not in get_args(Train):
        raise ValueError(f"Expected `train` to be one of {get_args(Train)}, got {train!r}")
    modules: list[Any] = [model]
    if train == "classifier":
        modules = [stage.fc_cls for stage in stages]
    elif train == "box_head":
        modules = stages
    elif train == "box_and_mask_heads":
        mask_head = getattr(roi_head, "mask_head", None)
        if not isinstance(mask_head, nn.Module):
            raise ValueError("Expected a detector with mask heads for 'box_and_mask_heads'")
        modules = [*stages, *(mask_head if isinstance(mask_head, nn.ModuleList) else [mask_head])]
    return freeze_all_but(model, modules)


@HOOKS.register_module(name="BAGSFreezeHook")
class FreezeHook(Hook):
    """Freezes before training what does not train, and checks that BAGS can serve.

    Registered as `BAGSFreezeHook`. Before the first step, after weights are loaded: `freeze`,
    `check_detector`, and for each BAGS loss `check_categories` of the training data.

    Args:
        train: as for `freeze`.
    """

    priority = "VERY_HIGH"

    def __init__(self, train: Train | int = "classifier") -> None:
        self.train = train

    def before_train(self, runner: Any) -> None:
        """Freeze and check; a wrapper for several processes is made anew, since it looks once."""
        wrapped = is_model_wrapper(runner.model)
        model = runner.model.module if wrapped else runner.model
        trained = freeze(model, self.train)
        check_detector(model)
        for loss in bags_losses(model):
            check_categories(runner.train_dataloader.dataset, loss.layout)
        if wrapped:
            runner.model = runner.wrap_model(runner.cfg.get("model_wrapper_cfg"), model)
        number = sum(parameter.numel() for parameter in trained)
        runner.logger.info(f"BAGSFreezeHook: {self.train!r} trains, {number} parameters")


def start_from_softmax(state_dict: dict[str, Any], model: nn.Module) -> int:
    """Make group logits of the softmax classifiers in a checkpoint, as `BAGSHead.from_linear` does.

    Without it mmdet drops `fc_cls` of a plain detector, whose width differs, with a warning, and
    BAGS starts from random weights, as in the original.

    Args:
        state_dict: of the detector with plain softmax; its `fc_cls` are replaced.
        model: the detector with BAGS losses.

    Returns:
        How many classifiers were replaced; those of the layout's width stay as they are.

    Raises:
        ValueError: a classifier is neither as wide as the labels nor as the logits.
    """
    replaced = 0
    for name, module in model.named_modules():
        loss = getattr(module, "loss_cls", None)
        weight = state_dict.get(f"{name}.fc_cls.weight")
        if not isinstance(loss, MMDetBAGSLoss) or weight is None:
            continue
        layout = loss.layout
        rows, width = weight.shape
        if rows == layout.num_logits:
            continue
        if rows != layout.num_labels:
            raise ValueError(
                f"Expected `{name}.fc_cls` of {layout.num_labels} rows, one for each label, or of "
                f"{layout.num_logits} logits, got {rows}"
            )
        linear = nn.Linear(width, rows)
        linear.load_state_dict({"weight": weight, "bias": state_dict[f"{name}.fc_cls.bias"]})
        for kind, value in BAGSHead.from_linear(linear, layout).fc.state_dict().items():
            state_dict[f"{name}.fc_cls.{kind}"] = value
        replaced += 1
    return replaced


@HOOKS.register_module(name="BAGSStartHook")
class StartHook(Hook):
    """Starts BAGS from the trained classifier of `load_from`: `start_from_softmax`.

    Registered as `BAGSStartHook`. A checkpoint that has group logits already is left alone.
    """

    def after_load_checkpoint(self, runner: Any, checkpoint: dict[str, Any]) -> None:
        """Change the checkpoint before its weights are copied."""
        model = runner.model.module if is_model_wrapper(runner.model) else runner.model
        state_dict = checkpoint.get("state_dict", checkpoint)
        number = start_from_softmax(state_dict, model)
        runner.logger.info(f"BAGSStartHook: {number} classifiers start from plain softmax")


# --- checks --------------------------------------------------------------------------------------


def bags_losses(model: nn.Module) -> list[MMDetBAGSLoss]:
    """Return the BAGS losses of a detector: one for each box head that has one."""
    return [module for module in model.modules() if isinstance(module, MMDetBAGSLoss)]


def check_detector(model: nn.Module) -> None:
    """Check that every head and sampler with a BAGS loss can work with it.

    Raises:
        ValueError: a head makes a classifier of its own, or a sampler wants the loss of each RoI.
    """
    for name, module in model.named_modules():
        loss = getattr(module, "loss_cls", None)
        if not isinstance(loss, MMDetBAGSLoss):
            continue
        width = getattr(getattr(module, "fc_cls", None), "out_features", None)
        if width != loss.layout.num_logits:
            raise ValueError(
                f"Expected `{name}.fc_cls` with the {loss.layout.num_logits} outputs of BAGSLoss, "
                f"got {type(module).__name__} with {width}: {_UNSERVED}"
            )
    if bags_losses(model):
        sampler = getattr(getattr(model, "roi_head", None), "bbox_sampler", None)
        for one in sampler if isinstance(sampler, list) else [sampler]:
            if isinstance(one, OHEMSampler | ScoreHLRSampler):
                raise ValueError(
                    "Expected a sampler that works without the loss of each RoI, such as "
                    f"RandomSampler, got {type(one).__name__}"
                )


def check_categories(dataset: Any, layout: GroupLayout) -> None:
    """Check that a data set's labels follow ascending category ids, as a layout's do.

    mmdet numbers categories as they stand in the file. Data sets without `cat2label` are not
    looked at.

    Args:
        dataset: an mmdet data set, or a wrapper with `dataset`.
        layout: the groups.

    Raises:
        ValueError: other labels, or other categories than the layout's.
    """
    while not hasattr(dataset, "cat2label") and hasattr(dataset, "dataset"):
        dataset = dataset.dataset
    if hasattr(dataset, "full_init"):
        dataset.full_init()
    labels = getattr(dataset, "cat2label", None)
    if labels is None:
        return
    ids = sorted(labels)
    if [labels[one] for one in ids] != list(range(layout.num_categories)):
        raise ValueError(
            f"Expected labels 0..{layout.num_categories - 1} in ascending order of category ids, "
            f"got {len(ids)} categories labelled in the order of {dataset.ann_file}; sort its "
            "categories by id"
        )
    if layout.category_ids is not None and tuple(ids) != layout.category_ids:
        missing = sorted(set(layout.category_ids) ^ set(ids))[:5]
        raise ValueError(
            f"Expected the category ids of the layout in {dataset.ann_file}, got others; the "
            f"first that only one of them has: {missing}"
        )


# --- detections ----------------------------------------------------------------------------------


class SelectDetections:
    """Makes a box head of mmdet select its detections by `select_detections`.

    Mix it in before a `BBoxHead`. It gives what mmdet's own class-wise NMS gives (whose boxes are
    shifted apart by category in float32, which can move an overlap across the threshold), some
    twenty times faster at LVIS scale. Other kinds of suppression than `nms` with an
    `iou_threshold` go to mmdet.
    """

    predict_box_type: str

    def _predict_by_feat_single(
        self,
        roi: Tensor,
        cls_score: Tensor,
        bbox_pred: Tensor,
        img_meta: dict[str, Any],
        rescale: bool = False,
        rcnn_test_cfg: Any = None,
    ) -> InstanceData:
        whole: Callable[..., InstanceData] = super()._predict_by_feat_single  # type: ignore[misc]
        nms = dict((rcnn_test_cfg or {}).get("nms", {}))
        threshold = nms.pop("iou_threshold", None)
        offset = nms.pop("offset", 0)
        is_plain = nms.pop("type", "nms") == "nms" and threshold is not None and not nms
        if not is_plain or len(roi) == 0 or self.predict_box_type != "hbox":
            return whole(roi, cls_score, bbox_pred, img_meta, rescale, rcnn_test_cfg)
        raw = whole(roi, cls_score, bbox_pred, img_meta, rescale, None)  # before suppression
        scores = raw.scores[:, :-1]
        boxes = raw.bboxes.view(len(scores), -1, 4)
        # Boxes that count their last pixel are boxes one pixel further.
        counted = boxes + boxes.new_tensor([0, 0, offset, offset]) if offset else boxes
        limit = rcnn_test_cfg.max_per_img
        found = select_detections(
            counted[:, 0] if boxes.shape[1] == 1 else counted,
            scores,
            score_threshold=rcnn_test_cfg.score_thr,
            nms_threshold=threshold,
            max_detections=limit if limit > 0 else scores.numel(),
        )
        column = torch.zeros_like(found.rows) if boxes.shape[1] == 1 else found.categories
        return InstanceData(
            bboxes=boxes[found.rows, column], scores=found.scores, labels=found.categories
        )


@MODELS.register_module()
class SelectDetectionsShared2FCBBoxHead(SelectDetections, Shared2FCBBoxHead):
    """mmdet's `Shared2FCBBoxHead` with `SelectDetections`; the same names in its state dict."""


# --- arguments -----------------------------------------------------------------------------------


def _as_layout(layout: Any) -> GroupLayout:
    if isinstance(layout, str | Path):
        layout = GroupLayout.load(layout)
    elif isinstance(layout, Mapping):
        layout = GroupLayout.from_json(json.dumps(dict(layout)))
    elif not isinstance(layout, GroupLayout):
        raise TypeError(
            f"Expected `layout` to be a path, a dict or a GroupLayout, got {type(layout).__name__}"
        )
    if layout.background is None:
        raise ValueError("Expected `layout` with background, got one for classification without")
    return replace(layout, background="last")


def _counts(
    annotations: str | None, counts: Sequence[int] | None
) -> tuple[tuple[int, ...] | None, tuple[int, ...]]:
    """Category ids, if known, and counts."""
    if annotations is None:
        return None, tuple(as_int_array(counts, "counts").tolist())
    status = Path(annotations).stat()
    return _read_counts(str(annotations), status.st_size, status.st_mtime_ns)


@lru_cache(maxsize=4)
def _read_counts(path: str, *_: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    # Every stage of a cascade asks for it.
    data = read_annotations(path)
    return tuple(category_ids(data)), tuple(category_counts(data))


def _category_weights(
    weights: Sequence[float] | str | None, layout: GroupLayout, counts: tuple[int, ...] | None
) -> Tensor | None:
    if weights is None:
        return None
    if isinstance(weights, str):
        if weights != "inverse_frequency" or counts is None:
            raise ValueError(
                "Expected `category_weights` of numbers, or 'inverse_frequency' with "
                f"`annotations` or `counts`, got {weights!r}"
            )
        return inverse_frequency_weights(counts, within=layout.groups, background=None).float()
    values = torch.tensor([as_float(one, "category_weights", lowest=0) for one in weights])
    if len(values) != layout.num_categories:
        raise ValueError(
            f"Expected `category_weights` for {layout.num_categories} categories, got {len(values)}"
        )
    return values


def _percent(right: Tensor, rows: Tensor) -> Tensor:
    return 100 * (right & rows).sum() / rows.sum().clamp(min=1)
