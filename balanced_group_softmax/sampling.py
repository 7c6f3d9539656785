"""Which rows of "others" count this step."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from balanced_group_softmax._arguments import as_float, as_int
from balanced_group_softmax.layout import GroupLayout
from balanced_group_softmax.ops import dispatch


def sample_others(
    labels: Tensor,
    layout: GroupLayout,
    *,
    others_ratio: float = 8.0,
    generator: torch.Generator | None = None,
    ignore_index: int = -100,
) -> Tensor:
    """Draw the rows that count in each group.

    Group 0 counts every row. In another group all `n` rows whose category is in it count, and
    exactly `int(others_ratio * n)` of the other rows, drawn uniformly without replacement and
    independently for each group; all of them if there are no more than that, none if `n` is 0.

    Args:
        labels: integers [R] in the layout's label convention.
        layout: the groups.
        others_ratio: others for each foreground row of a group; may be infinite.
        generator: random state on the device of the labels. From the same state
            `grouped_softmax_loss` draws the same rows.
        ignore_index: the label of rows that take part in nothing.

    Returns:
        bool [R, G].

    Raises:
        TypeError: if the labels are not integers.
        ValueError: if a label is out of range (checked on the CPU; elsewhere its row is
            ignored), the labels are not one-dimensional, or the ratio is negative or NaN.

    Source: Li et al., CVPR 2020, section 4.2.

    Example:
        >>> layout = GroupLayout.from_counts([3, 50, 2000])
        >>> generator = torch.Generator().manual_seed(0)
        >>> labels = torch.tensor([0, 0, 0, 0, 0, 1])
        >>> sample_others(labels, layout, others_ratio=2, generator=generator).sum(dim=0)
        tensor([6, 3, 0, 0])
    """
    check_layout(layout)
    labels = check_labels(labels, layout, ignore_index)
    others_ratio = as_float(others_ratio, "others_ratio", lowest=0)
    active, _ = draw(labels, layout, others_ratio, generator, ignore_index, impl="auto")
    return active


def draw(
    labels: Tensor,
    layout: GroupLayout,
    others_ratio: float,
    generator: torch.Generator | None,
    ignore_index: int,
    impl: str,
) -> tuple[Tensor, Tensor | None]:
    """`sample_others` for arguments that have been checked, and the normalizers where known.

    The keys are drawn whatever the labels are, so a step moves the random state by R and G alone.
    """
    if generator is not None and not isinstance(generator, torch.Generator):
        raise TypeError(
            f"Expected `generator` to be a torch.Generator or None, got {type(generator).__name__}"
        )
    tables = layout.tables(labels.device)
    num_category_groups = len(layout.groups)
    # Graph tracing knows no generators, and with symbolic shapes not even the keyword.
    source: dict[str, Any] = {} if generator is None else {"generator": generator}
    keys = torch.randint(
        torch.iinfo(torch.int32).max,
        (num_category_groups, labels.shape[0]),
        dtype=torch.int32,
        device=labels.device,
        **source,
    )
    ops = dispatch.choose(impl, labels.device)
    drawn: tuple[Tensor, Tensor | None] = ops.sample_others(
        labels, keys, tables, others_ratio=others_ratio, ignore_index=ignore_index
    )
    return drawn


def check_layout(layout: Any) -> None:
    """Raise TypeError unless it is a layout."""
    if not isinstance(layout, GroupLayout):
        raise TypeError(f"Expected `layout` to be a GroupLayout, got {type(layout).__name__}")


def check_labels(labels: Tensor, layout: GroupLayout, ignore_index: int) -> Tensor:
    """Labels as int64; values are checked where that costs no wait for a device.

    Raises:
        TypeError: if they are not a tensor of integers.
        ValueError: if they are not one-dimensional or, on the CPU, one is out of range.
    """
    if not -(2**63) <= as_int(ignore_index, "ignore_index") < 2**63:
        raise ValueError(f"Expected `ignore_index` to fit 64 bits, got {ignore_index}")
    if not isinstance(labels, Tensor):
        raise TypeError(f"Expected `labels` to be a Tensor, got {type(labels).__name__}")
    if labels.dtype.is_floating_point or labels.dtype.is_complex or labels.dtype == torch.bool:
        raise TypeError(f"Expected `labels` of an integer dtype, got {labels.dtype}")
    if labels.ndim != 1:
        raise ValueError(f"Expected `labels` of shape [R], got {list(labels.shape)}")
    labels = labels.long()
    if labels.device.type == "cpu" and not torch.compiler.is_compiling():
        # The extremes alone tell that all is well, as it nearly always is.
        if labels.numel() and not _all_within(labels, layout.num_labels):
            bad = ((labels < 0) | (labels >= layout.num_labels)) & (labels != ignore_index)
            if bool(bad.any()):
                row = int(bad.int().argmax())
                raise ValueError(
                    f"Expected `labels` in [0, {layout.num_labels - 1}] or {ignore_index}, "
                    f"got {int(labels[row])} at row {row}"
                )
    return labels


def _all_within(labels: Tensor, num_labels: int) -> bool:
    values: np.ndarray | Tensor
    try:
        values = labels.numpy()
    except RuntimeError:  # wrapped by a transform of `torch.func`, memory out of reach
        values = labels
    return int(values.min()) >= 0 and int(values.max()) < num_labels
