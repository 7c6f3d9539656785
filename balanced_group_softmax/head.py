"""The loss as a module, and the classifier head: a linear layer, its loss and its scores."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from balanced_group_softmax._arguments import as_float, as_int, shown
from balanced_group_softmax.functional import (
    REDUCTIONS,
    Reduction,
    grouped_softmax_loss,
    grouped_softmax_scores,
)
from balanced_group_softmax.layout import Background, GroupLayout
from balanced_group_softmax.ops.dispatch import Impl, check_impl
from balanced_group_softmax.sampling import check_layout

LOSS_PREFIX = "loss_cls_"

_Head = TypeVar("_Head", bound="BAGSHead")


class BAGSLoss(nn.Module):
    """`grouped_softmax_loss` with its settings: a module without weights.

    Args:
        layout: the groups.
        others_ratio: others that count for each foreground row of a group; may be infinite.
        category_weights: [C], finite and at least 0: weights of foreground rows in the group of
            their category, for training alone; they are not in the state dict.
        ignore_index: the label of rows that take part in nothing.
        reduction: `"sum"` over groups (a scalar) or `"groups"` ([G]).
        impl: `"auto"`, `"triton"`, `"torch"` or `"reference"`.

    Example:
        >>> loss = BAGSLoss(GroupLayout.from_counts([3, 2500, 40]))
        >>> loss(torch.zeros(2, 8), torch.tensor([1, 0]))
        tensor(1.3863)
    """

    def __init__(
        self,
        layout: GroupLayout,
        *,
        others_ratio: float = 8.0,
        category_weights: Sequence[float] | np.ndarray | Tensor | None = None,
        ignore_index: int = -100,
        reduction: Reduction = "sum",
        impl: Impl = "auto",
    ) -> None:
        super().__init__()
        check_layout(layout)
        check_impl(impl)
        if reduction not in REDUCTIONS:
            raise ValueError(f"Expected `reduction` to be one of {REDUCTIONS}, got {reduction!r}")
        self.layout = layout
        self.others_ratio = as_float(others_ratio, "others_ratio", lowest=0)
        self.category_weights: Tensor | None
        self.register_buffer(
            "category_weights", _as_category_weights(category_weights, layout), persistent=False
        )
        self.ignore_index = as_int(ignore_index, "ignore_index")
        self.reduction = reduction
        self.impl = impl

    if TYPE_CHECKING:  # to torch it is Any

        def __call__(  # noqa: D102
            self, logits: Tensor, labels: Tensor, generator: torch.Generator | None = None
        ) -> Tensor: ...

    def forward(
        self, logits: Tensor, labels: Tensor, generator: torch.Generator | None = None
    ) -> Tensor:
        """The loss of `logits` [R, L] for `labels` [R]: a scalar, or [G]."""
        return grouped_softmax_loss(
            logits,
            labels,
            self.layout,
            others_ratio=self.others_ratio,
            category_weights=self.category_weights,
            generator=generator,
            reduction=self.reduction,
            ignore_index=self.ignore_index,
            impl=self.impl,
        )

    def extra_repr(self) -> str:
        """The settings, for printing."""
        return (
            f"layout={self.layout}, others_ratio={self.others_ratio:g}, "
            f"reduction={self.reduction!r}, impl={self.impl!r}"
        )


class BAGSHead(nn.Module):
    """The classifier of Balanced Group Softmax: a linear layer to group logits.

    Takes the place of a detector's last classification layer. The state dict holds `fc.weight`,
    `fc.bias` and, as `_extra_state`, the layout (a uint8 tensor of its JSON), so a checkpoint
    describes itself (`GroupLayout.from_state_dict`), and loading one of another layout raises
    before any weight of the head is copied.

    Args:
        in_features: width of the features.
        layout: the groups.
        others_ratio: others that count for each foreground row of a group; may be infinite.
        category_weights: [C], finite and at least 0: weights of foreground rows in the group of
            their category, for training alone; they are not in the state dict.
        bias: whether the linear layer has a bias.
        ignore_index: the label of rows that take part in nothing.
        impl: `"auto"`, `"triton"`, `"torch"` or `"reference"`.
        device: where the weights are made.
        dtype: of the weights.

    Raises:
        TypeError: for an argument of the wrong type.
        ValueError: for `in_features` below 1, a negative or NaN ratio, an unknown `impl`.

    Source: Li et al., CVPR 2020, section 4.

    Example:
        >>> layout = GroupLayout.from_counts([3, 2500, 40, 7, 600])
        >>> head = BAGSHead(256, layout)
        >>> features, labels = torch.randn(8, 256), torch.tensor([0, 0, 0, 0, 0, 1, 2, 5])
        >>> logits = head(features)
        >>> head.loss(logits, labels).backward()
        >>> head.scores(logits).shape  # background, then five categories
        torch.Size([8, 6])
    """

    def __init__(
        self,
        in_features: int,
        layout: GroupLayout,
        *,
        others_ratio: float = 8.0,
        category_weights: Sequence[float] | np.ndarray | Tensor | None = None,
        bias: bool = True,
        ignore_index: int = -100,
        impl: Impl = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        in_features = as_int(in_features, "in_features", lowest=1)
        check_layout(layout)
        check_impl(impl)
        self.layout = layout
        self.others_ratio = as_float(others_ratio, "others_ratio", lowest=0)
        self.category_weights: Tensor | None
        self.register_buffer(
            "category_weights",
            _as_category_weights(category_weights, layout, device),
            persistent=False,
        )
        self.ignore_index = as_int(ignore_index, "ignore_index")
        self.impl = impl
        self.fc = nn.Linear(in_features, layout.num_logits, bias=bias, device=device, dtype=dtype)
        self.reset_parameters()
        self._prepare_tables()

    @classmethod
    def from_linear(
        cls: type[_Head],
        linear: nn.Linear,
        layout: GroupLayout,
        *,
        others_ratio: float = 8.0,
        category_weights: Sequence[float] | np.ndarray | Tensor | None = None,
        bias: bool = True,
        ignore_index: int = -100,
        impl: Impl = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> _Head:
        """Start from a trained softmax classifier.

        Each category keeps its row. With background, `others` of every group and the background
        column start as the background row (most rows of "others" are background), and the
        foreground column as the mean of the category rows with log C added to its bias, the
        logsumexp of C equal logits. On a trained detector this led to the best head after a
        short training, of the starts tried that need no more than the classifier
        (docs/method.md). Without background `others` starts at zero, which makes the first
        scores exactly those of the softmax classifier.

        Args:
            linear: maps features to one logit for each label, in the layout's label convention
                (background first, last or none).
            layout: the groups.
            others_ratio: as for `BAGSHead`.
            category_weights: as for `BAGSHead`.
            bias: as for `BAGSHead`; without a bias that of `linear` is dropped.
            ignore_index: as for `BAGSHead`.
            impl: as for `BAGSHead`.
            device: where the weights are made; by default where those of `linear` are.
            dtype: of the weights; by default that of `linear`.

        Raises:
            TypeError: if `linear` is not an `nn.Linear`.
            ValueError: if its number of outputs is not the layout's number of labels.
        """
        if not isinstance(linear, nn.Linear):
            raise TypeError(f"Expected `linear` to be an nn.Linear, got {type(linear).__name__}")
        check_layout(layout)
        if linear.out_features != layout.num_labels:
            raise ValueError(
                f"Expected `linear` with {layout.num_labels} outputs, one for each label of the "
                f"layout ({layout.num_categories} categories, background {layout.background!r}), "
                f"got {linear.out_features}"
            )
        head = cls(
            linear.in_features,
            layout,
            others_ratio=others_ratio,
            bias=bias,
            ignore_index=ignore_index,
            impl=impl,
            device="meta",  # fresh weights would only move the random state
            dtype=linear.weight.dtype if dtype is None else dtype,
        )
        device = linear.weight.device if device is None else device
        head.to_empty(device=device)
        head.category_weights = _as_category_weights(category_weights, layout, device)
        biases = linear.bias
        if biases is None:
            biases = linear.weight.new_zeros(linear.out_features)
        with torch.no_grad():
            head.fc.weight.copy_(_group_rows(linear.weight, layout, is_bias=False))
            if head.fc.bias is not None:
                head.fc.bias.copy_(_group_rows(biases, layout, is_bias=True))
        return head

    @property
    def in_features(self) -> int:
        """Width of the features."""
        return self.fc.in_features

    @property
    def num_categories(self) -> int:
        """C, the number of foreground categories."""
        return self.layout.num_categories

    @property
    def background(self) -> Background:
        """Where the label convention puts background: `"first"`, `"last"` or None."""
        return self.layout.background

    def reset_parameters(self) -> None:
        """Start afresh: weights normal with standard deviation 0.01, biases zero."""
        nn.init.normal_(self.fc.weight, std=0.01)
        if self.fc.bias is not None:
            nn.init.zeros_(self.fc.bias)

    if TYPE_CHECKING:  # to torch it is Any

        def __call__(self, features: Tensor) -> Tensor: ...  # noqa: D102

    def forward(self, features: Tensor) -> Tensor:
        """Group logits [R, L] of `features` [R, in_features]."""
        logits: Tensor = self.fc(features)
        return logits

    def loss(
        self, logits: Tensor, labels: Tensor, generator: torch.Generator | None = None
    ) -> Tensor:
        """The loss of `logits` [R, L] for `labels` [R]: a scalar, the sum over groups."""
        return self._loss(logits, labels, generator, "sum")

    def group_losses(
        self, logits: Tensor, labels: Tensor, generator: torch.Generator | None = None
    ) -> Tensor:
        """The loss of each group, [G], in the order of `layout.group_names`."""
        return self._loss(logits, labels, generator, "groups")

    def losses(
        self, logits: Tensor, labels: Tensor, generator: torch.Generator | None = None
    ) -> dict[str, Tensor]:
        """The loss of each group by name, `loss_cls_<group name>`, for a framework's losses."""
        losses = self.group_losses(logits, labels, generator).unbind()
        names = self.layout.group_names
        return {LOSS_PREFIX + name: loss for name, loss in zip(names, losses, strict=True)}

    def _loss(
        self,
        logits: Tensor,
        labels: Tensor,
        generator: torch.Generator | None,
        reduction: Reduction,
    ) -> Tensor:
        return grouped_softmax_loss(
            logits,
            labels,
            self.layout,
            others_ratio=self.others_ratio,
            category_weights=self.category_weights,
            generator=generator,
            reduction=reduction,
            ignore_index=self.ignore_index,
            impl=self.impl,
        )

    def scores(self, logits: Tensor) -> Tensor:
        """Scores [R, num_labels] of `logits` [R, L], columns in the label convention."""
        return grouped_softmax_scores(logits, self.layout, impl=self.impl)

    def extra_repr(self) -> str:
        """The settings, for printing."""
        return f"layout={self.layout}, others_ratio={self.others_ratio:g}, impl={self.impl!r}"

    def check_state_dict(self, state_dict: Mapping[str, Any], prefix: str = "") -> None:
        """Raise ValueError if the entries under `prefix` are for another layout or width.

        Loading does so by itself before it copies a weight of the head; a whole detector calls
        it before it copies any. Entries that are absent are no concern of it: whether they may be
        is what `strict` says, which torch looks at in the end.
        """
        state = state_dict.get(prefix + "_extra_state")
        if state is not None:
            try:
                theirs = GroupLayout.from_state_dict({"_extra_state": state})
            except ValueError as error:
                raise ValueError(
                    f"Expected a layout in {prefix}_extra_state of the checkpoint: {error}"
                ) from None
            differences = self.layout.differences(theirs)
            if differences:
                raise ValueError(
                    f"The checkpoint's {prefix or 'head.'}* has another layout: "
                    f"{'; '.join(differences)}. Build the head with "
                    f"GroupLayout.from_state_dict(state_dict), or copy `fc` alone"
                )
        for name, parameter in self.fc.named_parameters():
            value = state_dict.get(f"{prefix}fc.{name}")
            if isinstance(value, Tensor) and value.shape != parameter.shape:
                raise ValueError(
                    f"Expected {prefix}fc.{name} of shape {list(parameter.shape)} (the layout has "
                    f"{self.layout.num_logits} logits), got {list(value.shape)} in the checkpoint"
                )

    def get_extra_state(self) -> Tensor:
        """The layout, for the state dict."""
        return self.layout.to_extra_state()

    def set_extra_state(self, state: Tensor) -> None:
        """Nothing to set: the layout was compared before loading began."""

    def _apply(self, *args: Any, **kwargs: Any) -> BAGSHead:
        super()._apply(*args, **kwargs)  # to another device, perhaps
        self._prepare_tables()
        return self

    def _prepare_tables(self) -> None:
        if not self.fc.weight.is_meta:
            self.layout.tables(self.fc.weight.device)

    def _load_from_state_dict(
        self, state_dict: Mapping[str, Any], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        self.check_state_dict(state_dict, prefix)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)


def _as_category_weights(
    weights: Any, layout: GroupLayout, device: torch.device | str | None = None
) -> Tensor | None:
    """A copy of weights [C] in a floating-point dtype, checked."""
    if weights is None:
        return None
    try:
        made = torch.as_tensor(weights)
    except (TypeError, ValueError, RuntimeError):
        raise TypeError(
            f"Expected `category_weights` to be numbers [C], got {shown(weights)}"
        ) from None
    if made.shape != (layout.num_categories,):
        raise ValueError(
            f"Expected `category_weights` of shape [{layout.num_categories}], one for each "
            f"category of the layout, got {list(made.shape)}"
        )
    if not made.dtype.is_floating_point:
        made = made.to(torch.float32)
    if not bool((made.isfinite() & (made >= 0)).all()):
        raise ValueError("Expected `category_weights` to be finite and at least 0")
    return made.detach().to(device=device, copy=True)


def _group_rows(rows: Tensor, layout: GroupLayout, *, is_bias: bool) -> Tensor:
    """Rows of a softmax classifier, one for each label, as rows for each group logit."""
    categories = rows[layout.foreground]
    if layout.background_label is None:
        parts, others = [], torch.zeros_like(categories[:1])
    else:
        others = rows[layout.background_label][None]
        foreground = categories.mean(dim=0, keepdim=True)
        if is_bias:
            foreground = foreground + math.log(layout.num_categories)
        parts = [others, foreground]
    for group in layout.groups:
        parts += [others, categories[list(group)]]
    return torch.cat(parts)
