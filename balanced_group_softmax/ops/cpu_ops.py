"""Draw and loss on the CPU: only rows that count are read, and forward writes the gradient.

Labels and rows are NumPy's affair, whose calls cost a fraction of torch's at a few thousand
elements; the few large matrices are torch's.
"""

from __future__ import annotations

import functools
import math

import numpy as np
import torch
from torch import Tensor

from balanced_group_softmax.ops import autograd, torch_ops
from balanced_group_softmax.ops.reference import count_others
from balanced_group_softmax.tables import GroupTables

SCORED_LOGITS = 1 << 17
"""Logits whose scores are computed at a time."""


def sample_others(
    labels: Tensor, keys: Tensor, tables: GroupTables, *, others_ratio: float, ignore_index: int
) -> tuple[Tensor, Tensor | None]:
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
    return torch.from_numpy(active.T), None


def losses_and_gradient(
    logits: Tensor,
    labels: Tensor,
    row_weights: Tensor,
    tables: GroupTables,
    *,
    category_weights: Tensor | None,
    normalizers: Tensor | None,
    ignore_index: int,
    reduction: str,
    with_gradient: bool,
    factors: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Dense cross-entropy over the rows that count, group by group; see `autograd.Kernels`."""
    dtype = torch.promote_types(logits.dtype, torch.float32)
    groups, positions = _groups_and_positions(labels, tables, ignore_index)
    weights = _row_weights(row_weights, category_weights, labels, groups, tables)
    gradient = _zeros(logits.shape, logits.dtype) if with_gradient else None
    factor_of_group = [1.0] * tables.num_groups if factors is None else factors.tolist()
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
        if gradient is not None:
            grad_log_probabilities = torch.zeros_like(log_probabilities)
            grad_log_probabilities.numpy()[np.arange(num_rows), bin_labels] = (
                -shares * factor_of_group[group]
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
    loss_of_group = torch.tensor(losses, dtype=dtype, device="cpu")
    return loss_of_group.sum() if reduction == "sum" else loss_of_group, gradient


def scale_gradient(
    gradient: Tensor, factors: Tensor, row_weights: Tensor, tables: GroupTables
) -> bool:
    """Multiply by each group's factor in place; see `autograd.Kernels`."""
    values = factors.tolist()
    # An overflowing loss scale must not meet the zeros of rows that do not count.
    if not all(map(math.isfinite, values)):
        return False
    for start, size, factor in zip(tables.starts, tables.sizes, values, strict=True):
        if factor != 1:
            gradient[:, start : start + size] *= factor
    return True


group_losses = functools.partial(
    autograd.group_losses, autograd.Kernels(losses_and_gradient, scale_gradient)
)


def group_scores(logits: Tensor, tables: GroupTables) -> Tensor:
    """Scores in the label convention, [R, num_labels], as `reference.group_scores`."""
    if logits.requires_grad and torch.is_grad_enabled():
        return torch_ops.group_scores(logits, tables)
    num_rows, num_logits = logits.shape
    dtype = torch.promote_types(logits.dtype, torch.float32)
    scores = torch.empty((num_rows, tables.num_labels), dtype=dtype, device="cpu")
    # A few rows at a time: what lies between logits and scores stays in the cache.
    step = max(1, SCORED_LOGITS // num_logits)
    by_group = torch.empty((min(step, num_rows), num_logits), dtype=dtype, device="cpu")
    for rows, result in zip(logits.split(step), scores.split(step), strict=True):
        parts = rows.to(dtype).split(list(tables.sizes), dim=1)
        outputs = by_group[: len(rows)].split(list(tables.sizes), dim=1)
        if tables.has_background:
            torch.softmax(parts[0], dim=1, out=outputs[0])
            foreground = outputs[0][:, 1:]
            for part, output in zip(parts[1:], outputs[1:], strict=True):
                torch.mul(torch.softmax(part, dim=1), foreground, out=output)
            torch.index_select(by_group[: len(rows)], 1, tables.label_columns, out=result)
        else:
            for part, output in zip(parts, outputs, strict=True):
                torch.sub(part, part[:, :1], out=output)
            margins = by_group[: len(rows)].index_select(1, tables.label_columns)
            torch.softmax(margins, dim=1, out=result)
    return scores


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
