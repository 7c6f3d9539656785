"""The fast path without Triton.

On the CPU the loss is that of `cpu_ops`. Elsewhere, and while a graph is traced, shapes depend on
nothing but the shapes of the input, so that nothing waits for the device and everything compiles.
"""

from __future__ import annotations

import torch
from torch import Tensor

from balanced_group_softmax.ops import cpu_ops
from balanced_group_softmax.ops.reference import (
    bin_labels,
    category_weights_of,
    is_group_zero,
    row_groups,
)
from balanced_group_softmax.tables import GroupTables


def sample_others(
    labels: Tensor, keys: Tensor, tables: GroupTables, *, others_ratio: float, ignore_index: int
) -> Tensor:
    """Which rows count in which group, as `reference.sample_others`; [R, G], stored by group."""
    if _can_look_at_values(labels):
        return cpu_ops.sample_others(
            labels, keys, tables, others_ratio=others_ratio, ignore_index=ignore_index
        )
    num_rows = labels.shape[0]
    valid = labels != ignore_index
    if num_rows == 0:
        return valid[:, None].expand(0, tables.num_groups)
    groups = row_groups(labels, tables, ignore_index)
    group_indices = torch.arange(
        tables.first_category_group, tables.num_groups, device=groups.device
    )
    foreground = groups == group_indices[:, None]
    others = valid & ~foreground
    num_foreground = foreground.sum(dim=1)
    # In float64 and clamped there: float32 truncates some products to one less.
    wanted = (num_foreground.double() * others_ratio).clamp(max=num_rows)
    kept = torch.where(num_foreground > 0, wanted, 0).long()[:, None]
    last = torch.iinfo(torch.int64).max
    ranked = keys.long() << 32 | torch.arange(num_rows, device=groups.device)
    ranked = torch.where(others, ranked, last)
    largest_kept = ranked.sort(dim=1).values.gather(1, (kept - 1).clamp(min=0))
    active = foreground | (others & (kept > 0) & (ranked <= largest_kept))
    if tables.has_background:
        active = torch.cat([valid[None], active])
    return active.T


def group_losses(
    logits: Tensor,
    labels: Tensor,
    row_weights: Tensor,
    tables: GroupTables,
    *,
    category_weights: Tensor | None,
    ignore_index: int,
) -> Tensor:
    """Loss of each group, [G], as `reference.group_losses`."""
    if _can_look_at_values(logits):
        return cpu_ops.group_losses(
            logits,
            labels,
            row_weights,
            tables,
            category_weights=category_weights,
            ignore_index=ignore_index,
        )
    groups = row_groups(labels, tables, ignore_index)
    labels = labels.masked_fill(groups < 0, 0)
    dtype = torch.promote_types(logits.dtype, torch.float32)
    losses = []
    for group, (start, size) in enumerate(zip(tables.starts, tables.sizes, strict=True)):
        weights = row_weights[:, group].to(dtype)
        if category_weights is not None and not is_group_zero(group, tables):
            own = category_weights_of(labels, category_weights, tables).to(dtype)
            weights = torch.where(groups == group, weights * own, weights)
        weights = torch.where(groups >= 0, weights, 0)
        counts = weights > 0
        # Rows that do not count must not bring a NaN along, neither here nor in the gradient.
        group_logits = logits[:, start : start + size].to(dtype)
        group_logits = torch.where(counts[:, None], group_logits, 0)
        targets = bin_labels(labels, groups, group, tables)
        log_likelihood = torch.log_softmax(group_logits, dim=1).gather(1, targets[:, None])
        weighted = torch.where(counts, -log_likelihood.squeeze(1) * weights, 0)
        losses.append(weighted.sum() / weights.sum().clamp(min=1))
    return torch.stack(losses)


def group_scores(logits: Tensor, tables: GroupTables) -> Tensor:
    """Scores in the label convention, [R, num_labels], as `reference.group_scores`."""
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if not tables.has_background:
        others = logits[:, list(tables.starts)]
        own = logits.index_select(1, tables.category_columns)
        return torch.softmax(own - others.index_select(1, tables.category_groups), dim=1)
    parts = [torch.softmax(part, dim=1) for part in logits.split(list(tables.sizes), dim=1)]
    foreground = parts[0][:, 1:]
    probabilities = torch.cat([parts[0], *(part * foreground for part in parts[1:])], dim=1)
    background_column = tables.category_columns.new_zeros(1)
    in_order = (
        [background_column, tables.category_columns]
        if tables.foreground_start
        else [tables.category_columns, background_column]
    )
    return probabilities.index_select(1, torch.cat(in_order))


def _can_look_at_values(tensor: Tensor) -> bool:
    return tensor.device.type == "cpu" and not torch.compiler.is_compiling()
