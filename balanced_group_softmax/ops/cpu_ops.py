"""Draw and loss on the CPU: only rows that count are read, and forward writes the gradient.

Labels and rows are NumPy's affair, whose calls cost a fraction of torch's at a few thousand
elements; the few large matrices are torch's.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

from balanced_group_softmax.ops.reference import count_others
from balanced_group_softmax.tables import GroupTables


def sample_others(
    labels: Tensor, keys: Tensor, tables: GroupTables, *, others_ratio: float, ignore_index: int
) -> Tensor:
    """Which rows count in which group, as `reference.sample_others`; [R, G], stored by group."""
    groups, _ = _groups_and_positions(labels, tables, ignore_index)
    valid = groups >= 0
    num_valid = int(np.count_nonzero(valid))
    active = np.zeros((tables.num_groups, len(groups)), dtype=bool)
    if tables.has_background:
        active[0] = valid
    counts = np.bincount(groups[valid], minlength=tables.num_groups).tolist()
    key_rows = keys.numpy()
    for row, group in enumerate(range(tables.first_category_group, tables.num_groups)):
        num_others = num_valid - counts[group]
        kept = count_others(others_ratio, counts[group], num_others)
        if kept == num_others and counts[group] > 0:
            active[group] = valid
        elif counts[group] > 0:
            foreground = groups == group
            others = (valid ^ foreground).nonzero()[0]
            if kept > 0:
                ranked = key_rows[row].take(others).astype(np.int64) << 32 | others
                others = others[ranked <= np.partition(ranked, kept - 1)[kept - 1]]
                foreground[others] = True
            active[group] = foreground
    return torch.from_numpy(active.T)


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
    losses: Tensor = _LossOfActiveRows.apply(
        logits, labels, row_weights, category_weights, tables, ignore_index
    )
    return losses


class _LossOfActiveRows(torch.autograd.Function):
    """Dense cross-entropy over the rows that count, group by group, gradient included."""

    @staticmethod
    def forward(
        ctx: Any,
        logits: Tensor,
        labels: Tensor,
        row_weights: Tensor,
        category_weights: Tensor | None,
        tables: GroupTables,
        ignore_index: int,
    ) -> Tensor:
        ctx.save_for_backward(logits, labels, row_weights, category_weights)
        ctx.settings = (tables, ignore_index)
        # float16 cannot hold a small gradient that a loss scale has not multiplied yet.
        ahead = ctx.needs_input_grad[0] and logits.dtype != torch.float16
        losses, ctx.gradient = _losses_and_gradient(
            logits,
            labels,
            row_weights,
            category_weights,
            *ctx.settings,
            factors=[1.0] * tables.num_groups if ahead else None,
        )
        return losses

    @staticmethod
    def backward(ctx: Any, grad_losses: Tensor) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors  # raises after a backward that did not retain the graph
        tables = ctx.settings[0]
        factors = grad_losses.tolist()
        # Let go of it: autograd would copy a gradient that is held elsewhere too.
        gradient, ctx.gradient = ctx.gradient, None
        # None for float16, and in a second backward through a retained graph. An overflowing loss
        # scale must not meet the zeros of rows that do not count.
        if gradient is None or not all(map(math.isfinite, factors)):
            with torch.no_grad():
                _, gradient = _losses_and_gradient(*saved, *ctx.settings, factors=factors)
        else:
            for start, size, factor in zip(tables.starts, tables.sizes, factors, strict=True):
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
    row_weights: Tensor,
    category_weights: Tensor | None,
    tables: GroupTables,
    ignore_index: int,
    *,
    factors: list[float] | None,
) -> tuple[Tensor, Tensor | None]:
    """The losses and, if there is a factor for each group, the gradient of their weighted sum."""
    dtype = torch.promote_types(logits.dtype, torch.float32)
    groups, positions = _groups_and_positions(labels, tables, ignore_index)
    weights = _row_weights(row_weights, category_weights, labels, groups, tables)
    gradient = None if factors is None else _zeros(logits.shape, logits.dtype)
    losses = []
    for group, (start, size) in enumerate(zip(tables.starts, tables.sizes, strict=True)):
        weights_of_group = weights[group]
        rows = weights_of_group.nonzero()[0]
        num_rows = len(rows)
        if num_rows == 0:
            losses.append(0.0)
            continue
        if group < tables.first_category_group:
            bin_labels = (groups > 0).astype(np.int64)
        else:
            bin_labels = positions * (groups == group)
        group_logits = logits[:, start : start + size]
        row_index = None
        if num_rows < len(groups):
            bin_labels, row_index = bin_labels[rows], torch.from_numpy(rows)
            group_logits = group_logits.index_select(0, row_index)
        targets = torch.from_numpy(bin_labels[:, None])
        log_probabilities = torch.log_softmax(group_logits, dim=1, dtype=dtype)
        log_likelihood = log_probabilities.gather(1, targets).numpy()[:, 0]
        shares: float | np.ndarray = 1 / num_rows
        if weights_of_group.dtype != np.bool_:
            shares = weights_of_group[rows] / max(weights_of_group.sum(), 1)
        losses.append(-float((log_likelihood * shares).sum(dtype=np.float64)))
        if gradient is not None and factors is not None:
            grad_log_probabilities = torch.zeros_like(log_probabilities)
            grad_log_probabilities.numpy()[np.arange(num_rows), bin_labels] = (
                -shares * factors[group]
            )
            # The derivative that autograd itself would call, at a third of the time of exp().
            row_gradient = torch._log_softmax_backward_data(
                grad_log_probabilities, log_probabilities, 1, dtype
            )
            group_gradient = gradient[:, start : start + size]
            if row_index is None:
                group_gradient.copy_(row_gradient)
            else:
                group_gradient.index_copy_(0, row_index, row_gradient.to(gradient.dtype))
    return torch.tensor(losses, dtype=dtype, device="cpu"), gradient


def _groups_and_positions(
    labels: Tensor, tables: GroupTables, ignore_index: int
) -> tuple[np.ndarray, np.ndarray]:
    """Group of each row's label, -1 for ignored rows, and the label's position in it: int64 [R]."""
    label_of_row = labels.numpy()
    ignored = label_of_row == ignore_index
    known = np.where(ignored, 0, label_of_row)
    groups = tables.label_groups.numpy().take(known)
    groups[ignored] = -1
    return groups, tables.label_positions.numpy().take(known)


def _row_weights(
    row_weights: Tensor,
    category_weights: Tensor | None,
    labels: Tensor,
    groups: np.ndarray,
    tables: GroupTables,
) -> np.ndarray:
    """Weight of each row in each group, [G, R]: bool where every weight is 0 or 1, else float64."""
    valid = groups >= 0
    if row_weights.dtype == torch.bool:
        weights = row_weights.numpy().T & valid
        if category_weights is None:
            return weights
    weights = row_weights.double().numpy().T * valid
    if category_weights is not None:
        foreground = np.flatnonzero(groups >= tables.first_category_group)
        categories = labels.numpy()[foreground] - tables.foreground_start
        own = category_weights.double().numpy()[categories]
        weights[groups[foreground], foreground] *= own
    return weights


def _zeros(shape: torch.Size, dtype: torch.dtype) -> Tensor:
    """Zeros that cost nothing until they are touched.

    NumPy takes them from the system as zero pages, huge ones where it can; `torch.zeros` writes
    each small page once, which at 40 MB takes longer than all the rest of the loss.
    """
    size = shape.numel() * dtype.itemsize
    if size == 0:
        return torch.zeros(shape, dtype=dtype, device="cpu")
    return torch.from_numpy(np.zeros(size, dtype=np.uint8)).view(dtype).view(shape)
