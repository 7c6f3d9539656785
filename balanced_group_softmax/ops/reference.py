"""The specification in plain PyTorch: one group after the other, nothing clever.

Autograd differentiates it, as often as asked. It waits for the device where that reads better.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from balanced_group_softmax.tables import GroupTables


def sample_others(
    labels: Tensor, keys: Tensor, tables: GroupTables, *, others_ratio: float, ignore_index: int
) -> tuple[Tensor, Tensor | None]:
    """Which rows count in which group, and how many.

    Args:
        labels: int64 [R]; rows with a label that is none count nowhere.
        keys: int32 [groups of categories, R], random; the others with the smallest keys count,
            among equal keys those of the lower rows.
        tables: the layout.
        others_ratio: others that count for each foreground row of a group; may be infinite.
        ignore_index: the label of rows that take part in nothing.

    Returns:
        bool [R, G], and the rows that count in each group, at least 1, as float32 [G]; None for
        those where the implementation has no use for them.
    """
    active = torch.zeros(labels.shape[0], tables.num_groups, dtype=torch.bool, device=labels.device)
    groups = row_groups(labels, tables, ignore_index)
    valid = groups >= 0
    if tables.has_background:
        active[:, 0] = valid
    for keys_of_group, group in zip(
        keys, range(tables.first_category_group, tables.num_groups), strict=True
    ):
        foreground = groups == group
        others = (valid & ~foreground).nonzero().squeeze(1)
        kept = count_others(others_ratio, int(foreground.sum()), len(others))
        order = torch.argsort(keys_of_group[others], stable=True)
        active[foreground, group] = bool(foreground.any())
        active[others[order[:kept]], group] = True
    return active, active.sum(dim=0).clamp(min=1).float()


def group_losses(
    logits: Tensor,
    labels: Tensor,
    row_weights: Tensor,
    tables: GroupTables,
    *,
    category_weights: Tensor | None,
    normalizers: Tensor | None,
    ignore_index: int,
    reduction: str,
) -> Tensor:
    """Loss of each group, [G], or their sum, in at least float32.

    Args:
        logits: [R, L].
        labels: int64 [R]; one that is no label makes every group's loss NaN.
        row_weights: bool or float [R, G]; a row counts where it is positive.
        tables: the layout.
        category_weights: [C] or None; multiplies the foreground rows' weights of their group.
        normalizers: float32 [G], the sums of the weights where they are known, at least 1.
        ignore_index: the label of rows that take part in nothing.
        reduction: "groups" or "sum".
    """
    dtype = torch.promote_types(logits.dtype, torch.float32)
    groups = row_groups(labels, tables, ignore_index)
    losses = []
    for group, (start, size) in enumerate(zip(tables.starts, tables.sizes, strict=True)):
        rows = ((row_weights[:, group] > 0) & (groups >= 0)).nonzero().squeeze(1)
        weights = row_weights[rows, group].to(dtype)
        if category_weights is not None and not is_group_zero(group, tables):
            own = category_weights_of(labels[rows], category_weights, tables).to(dtype)
            weights = torch.where(groups[rows] == group, weights * own, weights)
            rows, weights = rows[weights > 0], weights[weights > 0]
        targets = bin_labels(labels[rows], groups[rows], group, tables)
        group_logits = logits[rows, start : start + size].to(dtype)
        cross_entropy = F.cross_entropy(group_logits, targets, reduction="none")
        losses.append((cross_entropy * weights).sum() / weights.sum().clamp(min=1))
    return nan_for_no_label(torch.stack(losses), labels, tables, ignore_index, reduction)


def group_scores(logits: Tensor, tables: GroupTables) -> Tensor:
    """Scores in the label convention, [R, num_labels], in at least float32."""
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if not tables.has_background:
        others = logits[:, list(tables.starts)]
        own = logits[:, tables.category_columns]
        return torch.softmax(own - others[:, tables.category_groups], dim=1)
    probabilities = torch.cat(
        [torch.softmax(part, dim=1) for part in logits.split(list(tables.sizes), dim=1)], dim=1
    )
    background, foreground = probabilities[:, :1], probabilities[:, 1:2]
    categories = probabilities[:, tables.category_columns] * foreground
    in_order = [background, categories] if tables.foreground_start else [categories, background]
    return torch.cat(in_order, dim=1)


def row_groups(labels: Tensor, tables: GroupTables, ignore_index: int) -> Tensor:
    """Group of each row's label, int64 [R]: 0 for background, -1 for rows that count nowhere."""
    known = (labels >= 0) & (labels < tables.num_labels) & (labels != ignore_index)
    # Masked before the look-up: a negative index would wrap around.
    return torch.where(known, tables.label_groups[labels.masked_fill(~known, 0)], -1)


def bin_labels(labels: Tensor, groups: Tensor, group: int, tables: GroupTables) -> Tensor:
    """The label of each row in one group's softmax, int64 [R]; each must be a label."""
    if is_group_zero(group, tables):
        return (groups != 0).long()
    return torch.where(groups == group, tables.label_positions[labels], 0)


def category_weights_of(labels: Tensor, category_weights: Tensor, tables: GroupTables) -> Tensor:
    """Weight of each row's category, [R]; of any category where the label is not one."""
    last = category_weights.shape[0] - 1
    return category_weights[(labels - tables.foreground_start).clamp(0, last)]


def nan_for_no_label(
    losses: Tensor, labels: Tensor, tables: GroupTables, ignore_index: int, reduction: str
) -> Tensor:
    """The losses, or their sum; NaN if one of the labels is neither a label nor `ignore_index`."""
    no_label = ((labels < 0) | (labels >= tables.num_labels)) & (labels != ignore_index)
    losses = torch.where(no_label.any(), torch.nan, losses)
    return losses.sum() if reduction == "sum" else losses


def is_group_zero(group: int, tables: GroupTables) -> bool:
    """Whether this group tells background from foreground."""
    return group == 0 and tables.has_background


def count_others(others_ratio: float, num_foreground: int, num_others: int) -> int:
    """How many others count beside `num_foreground` rows of a group: int(ratio * n), at most all.

    The product is taken in float64 and truncated; a group without foreground rows has none.
    """
    if num_foreground == 0:
        return 0
    return int(min(others_ratio * num_foreground, num_others))
