"""Static shapes: every tensor's shape depends on the shapes of the input alone.

So nothing waits for the device, any device serves, and graphs trace through it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from balanced_group_softmax.ops.reference import (
    bin_labels,
    category_weights_of,
    is_group_zero,
    nan_for_no_label,
    row_groups,
)
from balanced_group_softmax.tables import GroupTables


def sample_others(
    labels: Tensor, keys: Tensor, tables: GroupTables, *, others_ratio: float, ignore_index: int
) -> tuple[Tensor, Tensor | None]:
    """Which rows count in which group, as `reference.sample_others`; [R, G], stored by group."""
    num_rows = labels.shape[0]
    groups = row_groups(labels, tables, ignore_index)
    valid = groups >= 0
    if num_rows == 0:
        return valid[:, None].expand(0, tables.num_groups), None
    group_indices = torch.arange(
        tables.first_category_group, tables.num_groups, device=groups.device
    )
    foreground = groups == group_indices[:, None]
    others = valid & ~foreground
    num_foreground = foreground.sum(dim=1)
    if num_foreground.device.type == "mps":  # which has no float64: the one wait for a device
        num_foreground = num_foreground.cpu()
    # In float64 and clamped there: float32 truncates some products to one less.
    wanted = (num_foreground.double() * others_ratio).clamp(max=num_rows)
    kept = torch.where(num_foreground > 0, wanted, 0).long()[:, None].to(groups.device)
    last = torch.iinfo(torch.int64).max
    ranked = keys.long() << 32 | torch.arange(num_rows, device=groups.device)
    ranked = torch.where(others, ranked, last)
    largest_kept = ranked.sort(dim=1).values.gather(1, (kept - 1).clamp(min=0))
    active = foreground | (others & (kept > 0) & (ranked <= largest_kept))
    if tables.has_background:
        active = torch.cat([valid[None], active])
    return active.T, None


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
    """Loss of each group, [G], or their sum, as `reference.group_losses`."""
    groups = row_groups(labels, tables, ignore_index)
    known = labels.masked_fill(groups < 0, 0)
    dtype = torch.promote_types(logits.dtype, torch.float32)
    losses = []
    for group, (start, size) in enumerate(zip(tables.starts, tables.sizes, strict=True)):
        weights = row_weights[:, group].to(dtype)
        if category_weights is not None and not is_group_zero(group, tables):
            own = category_weights_of(known, category_weights, tables).to(dtype)
            weights = torch.where(groups == group, weights * own, weights)
        counts = (groups >= 0) & (weights > 0)
        weights = torch.where(counts, weights, 0)
        # Rows that do not count must not bring a NaN along, neither here nor in the gradient.
        group_logits = logits[:, start : start + size].to(dtype)
        group_logits = torch.where(counts[:, None], group_logits, 0)
        targets = bin_labels(known, groups, group, tables)
        log_likelihood = torch.log_softmax(group_logits, dim=1).gather(1, targets[:, None])
        weighted = torch.where(counts, -log_likelihood.squeeze(1) * weights, 0)
        losses.append(weighted.sum() / weights.sum().clamp(min=1))
    return nan_for_no_label(torch.stack(losses), labels, tables, ignore_index, reduction)


def group_scores(logits: Tensor, tables: GroupTables) -> Tensor:
    """Scores in the label convention, [R, num_labels], as `reference.group_scores`."""
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if not tables.has_background:
        # Not by a list, which would be copied to the device and waited for.
        others = torch.stack([logits[:, start] for start in tables.starts], dim=1)
        own = logits.index_select(1, tables.category_columns)
        return torch.softmax(own - others.index_select(1, tables.category_groups), dim=1)
    parts = [torch.softmax(part, dim=1) for part in logits.split(list(tables.sizes), dim=1)]
    scores = torch.cat(parts, dim=1).index_select(1, tables.label_columns)
    scores[:, tables.categories] *= parts[0][:, 1:]
    return scores
