"""Draw and loss on the CPU: only rows that count are read, and forward writes the gradient.

Labels and rows are NumPy's affair, whose calls cost a fraction of torch's at a few thousand
elements; the few large matrices are torch's.
"""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from balanced_group_softmax.ops import autograd, torch_ops
from balanced_group_softmax.ops.reference import count_others
from balanced_group_softmax.tables import GroupTables

LOGITS_AT_A_TIME = 1 << 17
"""What lies between logits and result stays in the cache, and small, with this many at a time."""

LEAST_PROBABILITY = {
    dtype: np.array(1e7 * torch.finfo(dtype).tiny, dtype=str(dtype).removeprefix("torch."))
    for dtype in (torch.float32, torch.float64)
}
"""Probabilities below have lost digits, or may be 0."""


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
    counting = np.arange(len(groups))
    likelihoods = []
    for group, (start, size) in enumerate(zip(tables.starts, tables.sizes, strict=True)):
        rows = weights[group].nonzero()[0]
        if group < tables.first_category_group:
            targets = (groups > 0).astype(np.int64)
        else:
            targets = positions * (groups == group)
        share: float | np.ndarray = 1 / max(len(rows), 1)
        if weights.dtype != np.bool_:
            share = weights[group] / max(weights[group].sum(), 1)
        columns = slice(start, start + size)
        for part in _parts(rows, logits.shape, size):
            part_share = share if isinstance(share, float) else share[part]
            probabilities = _softmax(_take(logits[:, columns], part), dtype)
            at_target = counting[: len(probabilities)], targets[part]
            of_target = probabilities.numpy()[at_target]
            likelihoods.append(
                _Likelihoods(group, columns, part, at_target[1], of_target, part_share)
            )
            if gradient is not None:
                probabilities.numpy()[at_target] = of_target - 1
                _put(gradient[:, columns], part, probabilities, part_share * factor_of_group[group])
    losses = torch.from_numpy(_losses(likelihoods, logits, tables.num_groups, dtype)).to(dtype)
    return losses.sum() if reduction == "sum" else losses, gradient


def scale_gradient(
    gradient: Tensor, factors: Tensor, row_weights: Tensor, tables: GroupTables
) -> bool:
    """Multiply by each group's factor in place; see `autograd.Kernels`."""
    values = factors.tolist()
    # An overflowing loss scale must not meet the zeros of rows that do not count.
    if not all(map(math.isfinite, values)):
        return False
    if all(value == values[0] for value in values):  # one sweep costs half of one a group
        if values[0] != 1:
            gradient *= values[0]
        return True
    for start, size, factor in zip(tables.starts, tables.sizes, values, strict=True):
        if factor != 1:
            gradient[:, start : start + size] *= factor
    return True


group_losses = functools.partial(
    autograd.group_losses, autograd.Kernels(losses_and_gradient, scale_gradient)
)


def group_scores(logits: Tensor, tables: GroupTables) -> Tensor:
    """Scores in the label convention, [R, num_labels], as `reference.group_scores`."""
    step = max(1, LOGITS_AT_A_TIME // logits.shape[1])
    if logits.shape[0] <= step:
        return torch_ops.group_scores(logits, tables)
    return torch.cat([torch_ops.group_scores(rows, tables) for rows in logits.split(step)])


Part = slice | np.ndarray
"""Some rows: a range of them, or their indices."""


def _parts(rows: np.ndarray, shape: torch.Size, size: int) -> list[Part]:
    """The rows that count in a group of `size` columns, as many at a time as the cache holds.

    Of a small matrix no more than a fraction, lest the memory for them be more than another.
    """
    num_rows, num_logits = shape
    logits_at_a_time = min(LOGITS_AT_A_TIME, max(1 << 16, num_rows * num_logits // 16))
    step = max(1, logits_at_a_time // size)
    if len(rows) == num_rows:
        return [slice(first, min(first + step, num_rows)) for first in range(0, num_rows, step)]
    return [rows[first : first + step] for first in range(0, len(rows), step)]


def _take(matrix: Tensor, part: Part) -> Tensor:
    return (
        matrix[part] if isinstance(part, slice) else matrix.index_select(0, torch.from_numpy(part))
    )


def _put(matrix: Tensor, part: Part, values: Tensor, factor: float | np.ndarray) -> None:
    """Writes values times a factor, of all or of each, to some rows; the values are lost."""
    factors = factor if isinstance(factor, float) else torch.from_numpy(factor)[:, None]
    if isinstance(part, slice):
        torch.mul(values, factors, out=matrix[part])
    else:
        # NumPy writes rows at several times the speed of `index_copy_`.
        _bits(matrix)[part] = _bits(values.mul_(factors).to(matrix.dtype))


def _bits(tensor: Tensor) -> np.ndarray:
    """A tensor's memory as integers, for types that NumPy does not know."""
    integers = {2: torch.int16, 4: torch.int32, 8: torch.int64}
    return tensor.view(integers[tensor.dtype.itemsize]).numpy()


def _softmax(logits: Tensor, dtype: torch.dtype) -> Tensor:
    if logits.shape[1] < 8:  # shorter than a vector: along the rows instead
        return torch.softmax(logits.T.contiguous(), dim=0, dtype=dtype).T
    return torch.softmax(logits, dim=1, dtype=dtype)


class _Likelihoods(NamedTuple):
    """Probabilities of the targets of some rows in a group."""

    group: int
    columns: slice  # of the logits
    rows: Part
    targets: np.ndarray  # int64 [n], positions in the group
    of_target: np.ndarray  # float [n]
    share: float | np.ndarray  # of a row in the group's loss, of all or of each


def _losses(
    parts: list[_Likelihoods], logits: Tensor, num_groups: int, dtype: torch.dtype
) -> np.ndarray:
    """The loss of each group, float64 [G]: the sum of its rows' cross-entropies times shares.

    A cross-entropy is minus the logarithm of a probability. That loses nothing against a softmax of
    logarithms, and spares the gradient an exponential, but where a probability is so small that
    it has lost digits, or is 0.
    """
    losses = np.zeros(num_groups)
    if not parts:
        return losses
    of_target = np.concatenate([part.of_target for part in parts])
    smallest = LEAST_PROBABILITY[dtype]
    cross_entropy = -np.log(np.maximum(of_target, smallest), dtype=of_target.dtype)
    any_small = bool((of_target < smallest).any())
    last = 0
    for part in parts:
        first, last = last, last + len(part.of_target)
        own = cross_entropy[first:last]
        if any_small:
            few = (part.of_target < smallest).nonzero()[0]
            picked = _take(logits[:, part.columns], part.rows)[torch.from_numpy(few)]
            logarithms = torch.log_softmax(picked, dim=1, dtype=dtype).numpy()
            own[few] = -logarithms[np.arange(len(few)), part.targets[few]]
        losses[part.group] += np.multiply(own, part.share, dtype=np.float64).sum()
    return losses


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
    # Nobody has looked at the values in a compiled graph; what is not positive counts nowhere.
    return np.where(weights > 0, weights, 0.0)


def _zeros(shape: torch.Size, dtype: torch.dtype) -> Tensor:
    """Zeros that cost nothing until they are touched.

    NumPy takes them from the system as zero pages, huge ones where it can; `torch.zeros` writes
    each small page once, which at 40 MB takes longer than all the rest of the loss.
    """
    size = shape.numel() * dtype.itemsize
    if size == 0:
        return torch.zeros(shape, dtype=dtype, device="cpu")
    return torch.from_numpy(np.zeros(size, dtype=np.uint8)).view(dtype).view(shape)
