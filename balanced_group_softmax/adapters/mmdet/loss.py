"""The losses: that of the method, from which mmdet also takes width, scores and accuracy.

And cross-entropy with weights by counts.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from mmdet.models.losses import CrossEntropyLoss
from mmdet.registry import MODELS
from torch import Tensor, nn

from balanced_group_softmax._arguments import as_float, as_int_tuple, as_tuple
from balanced_group_softmax.adapters.mmdet.groups import as_layout, read_counts
from balanced_group_softmax.functional import grouped_softmax_loss, grouped_softmax_scores
from balanced_group_softmax.head import BAGSLoss
from balanced_group_softmax.layout import GroupLayout
from balanced_group_softmax.rebalance.class_weights import (
    class_balanced_weights,
    inverse_frequency_weights,
)

__all__ = ["UNSERVED", "MMDetBAGSLoss", "ReweightedCrossEntropyLoss", "bags_losses"]

UNSERVED = (
    "DoubleHead, SABL, Sparse R-CNN and one-stage heads make a classifier of their own; use "
    "Shared2FCBBoxHead or another ConvFCBBoxHead"
)
_IGNORE = -100


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
        impl: Literal["auto", "triton", "torch", "reference"] = "auto",
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
            self.layout, numbers = as_layout(layout), None
        else:
            ids, numbers = read_counts(annotations, counts)
            self.layout = GroupLayout.from_counts(
                numbers, as_int_tuple(thresholds, "thresholds"), "last", ids
            )
        checked = BAGSLoss(self.layout, others_ratio=others_ratio, impl=impl)
        self.others_ratio, self.impl = checked.others_ratio, checked.impl
        self.loss_weight = as_float(loss_weight, "loss_weight", lowest=0)
        weights = _category_weights(category_weights, self.layout, numbers)
        self.register_buffer("category_weights", weights, persistent=False)

    @property
    def use_sigmoid(self) -> bool:
        """Asked for by heads that cannot serve; says so."""
        raise TypeError(f"Expected a head that leaves fc_cls to its loss: {UNSERVED}")

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
                f"leaves fc_cls to its loss, got {list(cls_score.shape)}: {UNSERVED}"
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


def bags_losses(model: nn.Module) -> list[MMDetBAGSLoss]:
    """Return the BAGS losses of a detector: one for each box head that has one."""
    return [module for module in model.modules() if isinstance(module, MMDetBAGSLoss)]


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
    given = as_tuple(weights, "category_weights")
    values = torch.tensor([as_float(one, "category_weights", lowest=0) for one in given])
    if len(values) != layout.num_categories:
        raise ValueError(
            f"Expected `category_weights` for {layout.num_categories} categories, got {len(values)}"
        )
    return values


def _percent(right: Tensor, rows: Tensor) -> Tensor:
    return 100 * (right & rows).sum() / rows.sum().clamp(min=1)


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
        weights = schemes[scheme](read_counts(annotations, counts)[1], background="last")
        super().__init__(class_weight=weights.tolist(), loss_weight=loss_weight)
