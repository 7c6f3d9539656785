"""Loss and scores of Balanced Group Softmax as functions of logits."""

from __future__ import annotations

from typing import Any, Literal, get_args

import torch
from torch import Tensor

from balanced_group_softmax._arguments import as_float
from balanced_group_softmax.layout import GroupLayout
from balanced_group_softmax.ops import dispatch
from balanced_group_softmax.sampling import (
    check_labels,
    check_layout,
    draw,
)

Reduction = Literal["sum", "groups"]
REDUCTIONS: tuple[str, ...] = get_args(Reduction)
LOGIT_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def grouped_softmax_loss(
    logits: Tensor,
    labels: Tensor,
    layout: GroupLayout,
    *,
    others_ratio: float = 8.0,
    weights: Tensor | None = None,
    category_weights: Tensor | None = None,
    generator: torch.Generator | None = None,
    reduction: Reduction = "sum",
    ignore_index: int = -100,
    impl: dispatch.Impl = "auto",
) -> Tensor:
    r"""Cross-entropy of each group's own softmax over the rows that count in it.

    .. math:: \ell_g = \frac{1}{S_g} \sum_{r:\, w_{rg} > 0} w_{rg}\,
        \mathrm{CE}(z_{r,g}, b_{g, y_r}), \qquad S_g = \max\Big(\sum_r w_{rg}, 1\Big)

    with the bin labels `b` of `GroupLayout.bin_labels` and, unless `weights` are given, the
    rows `w` drawn by `sample_others`. A row that does not count in a group is not read there,
    and its gradient is exactly 0. A NaN or infinity in a row that counts is in the loss.

    Args:
        logits: floating point [R, L]. Loss and softmax are computed in float32 at least.
        labels: integers [R] in the layout's label convention.
        layout: the groups.
        others_ratio: others that count for each foreground row of a group; may be infinite.
        weights: bool or floating point [R, G], replaces the draw.
        category_weights: floating point [C], multiplies the weights of foreground rows in the
            group of their category (not in group 0), and so enters the normaliser.
        generator: random state for the draw, on the device of the logits.
        reduction: `"sum"` over groups (a scalar) or `"groups"` ([G]).
        ignore_index: the label of rows that take part in nothing.
        impl: `"auto"`, `"triton"`, `"torch"` or `"reference"`. Only `"reference"` can be
            differentiated twice on every device.

    Returns:
        float32, or float64 for float64 logits: a scalar, or [G] in the order of
        `GroupLayout.group_names`.

    Raises:
        TypeError: for an argument of the wrong type or dtype.
        ValueError: for one of the wrong shape, device or value. Label values are checked on the
            CPU; elsewhere, where that would wait for the device, a label out of range reads
            nothing out of bounds and makes every group's loss NaN.
        RuntimeError: if a forced `impl` cannot serve.

    Source: Li et al., CVPR 2020, equations 3 to 5.

    Example:
        >>> layout = GroupLayout.from_counts([3, 2500, 40])
        >>> logits = torch.zeros(2, layout.num_logits)
        >>> labels = torch.tensor([1, 0])  # category 0, and background
        >>> grouped_softmax_loss(logits, labels, layout, reduction="groups")
        tensor([0.6931, 0.6931, 0.0000, 0.0000])
    """
    check_layout(layout)
    dispatch.check_impl(impl)
    _check_logits(logits, layout)
    labels = check_labels(labels, layout, ignore_index)
    _check_same_rows(logits, labels)
    others_ratio = as_float(others_ratio, "others_ratio", lowest=0)
    if reduction not in REDUCTIONS:
        raise ValueError(f"Expected `reduction` to be one of {REDUCTIONS}, got {reduction!r}")
    if weights is not None:
        rows_by_groups = (labels.shape[0], layout.num_groups)
        _check_weights(weights, "weights", "[R, G]", rows_by_groups, logits.device, bools=True)
    if category_weights is not None:
        categories = (layout.num_categories,)
        _check_weights(category_weights, "category_weights", "[C]", categories, logits.device)

    normalizers = None
    if weights is None:
        weights, normalizers = draw(labels, layout, others_ratio, generator, ignore_index, impl)
    losses: Tensor = dispatch.choose(impl, logits.device).group_losses(
        logits,
        labels,
        weights,
        layout.tables(logits.device),
        category_weights=category_weights,
        normalizers=normalizers if category_weights is None else None,
        ignore_index=ignore_index,
        reduction=reduction,
    )
    return losses


def grouped_softmax_scores(
    logits: Tensor, layout: GroupLayout, *, impl: dispatch.Impl = "auto"
) -> Tensor:
    r"""Put the groups together again: one score for each label.

    With background, each in [0, 1] though a row need not sum to 1 (`others` is dropped):

    .. math:: s_{bg} = p_0(bg), \qquad s_c = p_{g(c)}(c) \cdot p_0(fg)

    Without background a row is a distribution, which is this library's definition, the product
    of `p_g(c)` and every other group's `p_h(others)`, normalised:

    .. math:: s_c = \mathrm{softmax}_c\big(z_c - z_{others(g(c))}\big)

    Args:
        logits: floating point [R, L].
        layout: the groups.
        impl: `"auto"`, `"triton"`, `"torch"` or `"reference"`.

    Returns:
        float32 (float64 for float64 logits) [R, num_labels], columns in the label convention:
        `scores[:, layout.foreground]` are the categories.

    Raises:
        TypeError: for an argument of the wrong type or dtype.
        ValueError: if the logits are not of the layout's width.
        RuntimeError: if a forced `impl` cannot serve.

    Source: Li et al., CVPR 2020, section 4.3.

    Example:
        >>> layout = GroupLayout.from_counts([3, 2500, 40])
        >>> grouped_softmax_scores(torch.zeros(1, layout.num_logits), layout)
        tensor([[0.5000, 0.2500, 0.2500, 0.2500]])
    """
    check_layout(layout)
    _check_logits(logits, layout)
    ops = dispatch.choose_for_scores(impl, logits.device)
    scores: Tensor = ops.group_scores(logits, layout.tables(logits.device))
    return scores


def _check_logits(logits: Tensor, layout: GroupLayout) -> None:
    if not isinstance(logits, Tensor):
        raise TypeError(f"Expected `logits` to be a Tensor, got {type(logits).__name__}")
    if logits.dtype not in LOGIT_DTYPES:
        kinds = ", ".join(str(dtype).removeprefix("torch.") for dtype in LOGIT_DTYPES)
        raise TypeError(f"Expected `logits` of one of the dtypes {kinds}, got {logits.dtype}")
    if logits.layout != torch.strided:
        raise TypeError(f"Expected `logits` to be a dense tensor, got {logits.layout}")
    if logits.ndim != 2 or logits.shape[1] != layout.num_logits:
        raise ValueError(
            f"Expected `logits` of shape [R, {layout.num_logits}], as wide as the layout of "
            f"{layout.num_categories} categories in {layout.num_groups} groups, got "
            f"{list(logits.shape)}"
        )


def _check_same_rows(logits: Tensor, labels: Tensor) -> None:
    if labels.device != logits.device:
        raise ValueError(
            f"Expected `labels` on the device of the logits, {logits.device}, got {labels.device}"
        )
    if labels.shape[0] != logits.shape[0]:
        raise ValueError(
            f"Expected `labels` for {logits.shape[0]} rows of logits, got {labels.shape[0]}"
        )


def _check_weights(
    weights: Any,
    name: str,
    meaning: str,
    shape: tuple[int, ...],
    device: torch.device,
    *,
    bools: bool = False,
) -> None:
    if not isinstance(weights, Tensor):
        raise TypeError(f"Expected `{name}` to be a Tensor, got {type(weights).__name__}")
    if not weights.dtype.is_floating_point and not (bools and weights.dtype == torch.bool):
        kinds = "a bool or floating-point" if bools else "a floating-point"
        raise TypeError(f"Expected `{name}` of {kinds} dtype, got {weights.dtype}")
    if tuple(weights.shape) != shape:
        raise ValueError(
            f"Expected `{name}` of shape {meaning} = {list(shape)}, got {list(weights.shape)}"
        )
    if weights.device != device:
        raise ValueError(
            f"Expected `{name}` on the device of the logits, {device}, got {weights.device}"
        )
    if weights.requires_grad:
        raise ValueError(
            f"Expected `{name}` without gradient: gradients flow to the logits only; detach it"
        )
    if weights.device.type == "cpu" and not torch.compiler.is_compiling():
        bad = ~((weights >= 0) & weights.isfinite())
        if bool(bad.any()):
            first = [int(index) for index in bad.nonzero()[0]]
            raise ValueError(
                f"Expected `{name}` to be finite and non-negative, got "
                f"{float(weights[tuple(first)])} at {first}"
            )
