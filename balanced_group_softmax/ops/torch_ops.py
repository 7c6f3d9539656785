"""The fast path without Triton.

On the CPU only rows that count are looked at, and the gradient is written in the forward pass:
the loss costs what its live part costs. Elsewhere, and while a graph is traced, shapes depend on
nothing but the shapes of the input, so that nothing waits for the device and everything compiles.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

from balanced_group_softmax.ops.reference import (
    bin_labels,
    category_weights_of,
    count_others,
    is_group_zero,
    row_groups,
)
from balanced_group_softmax.tables import GroupTables


def sample_others(
    labels: Tensor, keys: Tensor, tables: GroupTables, *, others_ratio: float, ignore_index: int
) -> Tensor:
    """Which rows count in which group, as `reference.sample_others`; [R, G], stored by group."""
    active = torch.empty(tables.num_groups, labels.shape[0], dtype=torch.bool, device=labels.device)
    valid = labels != ignore_index
    if tables.has_background:
        active[0] = valid
    if labels.shape[0] > 0:
        groups = row_groups(labels, tables, ignore_index)
        sample = _sample_on_cpu if _can_look_at_values(labels) else _sample_without_waiting
        active[tables.first_category_group :] = sample(groups, valid, keys, tables, others_ratio)
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
    groups = row_groups(labels, tables, ignore_index)
    if _can_look_at_values(logits):
        losses: Tensor = _LossOfActiveRows.apply(
            logits, labels, groups, row_weights, category_weights, tables
        )
        return losses
    labels = labels.masked_fill(groups < 0, 0)
    dtype = torch.promote_types(logits.dtype, torch.float32)
    losses_of_groups = []
    for group, (start, size) in enumerate(zip(tables.starts, tables.sizes, strict=True)):
        counts = (row_weights[:, group] > 0) & (groups >= 0)
        weights = _weights_of_rows(
            labels, groups, row_weights[:, group], group, category_weights, tables, dtype
        ) * counts.to(dtype)
        counts = counts & (weights > 0)
        # Rows that do not count must not bring a NaN along, neither here nor in the gradient.
        group_logits = logits[:, start : start + size].to(dtype)
        group_logits = torch.where(counts[:, None], group_logits, 0)
        targets = bin_labels(labels, groups, group, tables)
        log_likelihood = torch.log_softmax(group_logits, dim=1).gather(1, targets[:, None])
        weighted = torch.where(counts, -log_likelihood.squeeze(1) * weights, 0)
        losses_of_groups.append(weighted.sum() / weights.sum().clamp(min=1))
    return torch.stack(losses_of_groups)


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


def _sample_on_cpu(
    groups: Tensor, valid: Tensor, keys: Tensor, tables: GroupTables, others_ratio: float
) -> Tensor:
    num_rows = groups.shape[0]
    active = torch.empty(keys.shape, dtype=torch.bool)
    counts = torch.bincount(groups + 1, minlength=tables.num_groups + 1).tolist()
    num_valid = num_rows - counts[0]
    for row, group in enumerate(range(tables.first_category_group, tables.num_groups)):
        num_foreground = counts[group + 1]
        num_others = num_valid - num_foreground
        kept = count_others(others_ratio, num_foreground, num_others)
        if num_foreground == 0:
            active[row] = False
        elif kept == num_others:
            active[row] = valid
        else:
            foreground = groups == group
            active[row] = foreground
            if kept > 0:
                others = (valid & ~foreground).nonzero().squeeze(1)
                ranked = keys[row, others].long() << 32 | others
                active[row, others[ranked <= ranked.kthvalue(kept).values]] = True
    return active


def _sample_without_waiting(
    groups: Tensor, valid: Tensor, keys: Tensor, tables: GroupTables, others_ratio: float
) -> Tensor:
    num_rows = groups.shape[0]
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
    return foreground | (others & (kept > 0) & (ranked <= largest_kept))


def _weights_of_rows(
    labels: Tensor,
    groups: Tensor,
    row_weights: Tensor,
    group: int,
    category_weights: Tensor | None,
    tables: GroupTables,
    dtype: torch.dtype,
) -> Tensor:
    weights = row_weights.to(dtype)
    if category_weights is None or is_group_zero(group, tables):
        return weights
    own = category_weights_of(labels, category_weights, tables).to(dtype)
    return torch.where(groups == group, weights * own, weights)


class _LossOfActiveRows(torch.autograd.Function):
    """Dense cross-entropy over the rows that count, group by group, gradient included."""

    @staticmethod
    def forward(
        ctx: Any,
        logits: Tensor,
        labels: Tensor,
        groups: Tensor,
        row_weights: Tensor,
        category_weights: Tensor | None,
        tables: GroupTables,
    ) -> Tensor:
        ctx.save_for_backward(logits, labels, groups, row_weights, category_weights)
        ctx.tables = tables
        # float16 cannot hold a small gradient that a loss scale has not multiplied yet.
        ahead = ctx.needs_input_grad[0] and logits.dtype != torch.float16
        losses, ctx.gradient = _losses_and_gradient(
            logits,
            labels,
            groups,
            row_weights,
            category_weights,
            tables=tables,
            factors=[1.0] * tables.num_groups if ahead else None,
        )
        return losses

    @staticmethod
    def backward(ctx: Any, grad_losses: Tensor) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors  # raises after a backward that did not retain the graph
        factors = grad_losses.tolist()
        # Let go of it: autograd would copy a gradient that is held elsewhere too.
        gradient, ctx.gradient = ctx.gradient, None
        # None for float16, and in a second backward through a retained graph. An overflowing loss
        # scale must not meet the zeros of rows that do not count.
        if gradient is None or not all(map(math.isfinite, factors)):
            with torch.no_grad():
                _, gradient = _losses_and_gradient(*saved, tables=ctx.tables, factors=factors)
        else:
            for start, size, factor in zip(
                ctx.tables.starts, ctx.tables.sizes, factors, strict=True
            ):
                if factor != 1:
                    gradient[:, start : start + size] *= factor
        if torch.is_grad_enabled():  # create_graph=True
            gradient = _NotTwiceDifferentiable.apply(gradient, saved[0], grad_losses)
        return gradient, None, None, None, None, None


class _NotTwiceDifferentiable(torch.autograd.Function):
    """The identity, with an error for whoever differentiates it."""

    @staticmethod
    def forward(ctx: Any, gradient: Tensor, *depends_on: Tensor) -> Tensor:
        return gradient.view_as(gradient)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        raise RuntimeError(
            "The gradient of grouped_softmax_loss cannot be differentiated again on the CPU's "
            "fast path; impl='reference' can"
        )


def _losses_and_gradient(
    logits: Tensor,
    labels: Tensor,
    groups: Tensor,
    row_weights: Tensor,
    category_weights: Tensor | None,
    *,
    tables: GroupTables,
    factors: list[float] | None,
) -> tuple[Tensor, Tensor | None]:
    """The losses and, if there is a factor for each group, the gradient of their weighted sum."""
    dtype = torch.promote_types(logits.dtype, torch.float32)
    gradient = None if factors is None else _zeros(logits.shape, logits.dtype)
    losses = torch.zeros(tables.num_groups, dtype=dtype)
    labels = labels.masked_fill(groups < 0, 0)
    counting = (row_weights > 0) & (groups >= 0)[:, None]
    for group, (start, size) in enumerate(zip(tables.starts, tables.sizes, strict=True)):
        weights = None
        counts = counting[:, group]
        if row_weights.dtype != torch.bool or category_weights is not None:
            weights = _weights_of_rows(
                labels, groups, row_weights[:, group], group, category_weights, tables, dtype
            )
            weights = weights * counts  # of all rows, those that do not count at 0
            counts = weights > 0
        rows = counts.nonzero().squeeze(1)
        if len(rows) == 0:
            continue
        all_rows = len(rows) == len(counts)
        targets = bin_labels(labels, groups, group, tables)[:, None]
        group_logits = logits[:, start : start + size]
        if not all_rows:
            targets, group_logits = targets[rows], group_logits.index_select(0, rows)
        log_probabilities = torch.log_softmax(group_logits.to(dtype), dim=1)
        log_likelihood = log_probabilities.gather(1, targets)
        if weights is None:
            shares: float | Tensor = 1 / len(rows)
        else:
            shares = weights[rows, None] / weights.sum().clamp(min=1)
        losses[group] = -(log_likelihood * shares).sum()
        if gradient is not None and factors is not None:
            grad_log_probabilities = torch.zeros_like(log_probabilities)
            grad_log_probabilities.scatter_(1, targets, -shares * factors[group])
            # The derivative that autograd itself would call, at a third of the time of exp().
            row_gradient = torch._log_softmax_backward_data(
                grad_log_probabilities, log_probabilities, 1, dtype
            ).to(gradient.dtype)
            group_gradient = gradient[:, start : start + size]
            if all_rows:
                group_gradient.copy_(row_gradient)
            else:
                group_gradient.index_copy_(0, rows, row_gradient)
    return losses, gradient


def _zeros(shape: torch.Size, dtype: torch.dtype) -> Tensor:
    """Zeros that cost nothing until they are touched.

    NumPy takes them from the system as zero pages, huge ones where it can; `torch.zeros` writes
    each small page once, which at 40 MB takes longer than all the rest of the loss.
    """
    size = shape.numel() * dtype.itemsize
    if size == 0:
        return torch.zeros(shape, dtype=dtype)
    return torch.from_numpy(np.zeros(size, dtype=np.uint8)).view(dtype).view(shape)
