"""The operations as `torch.library` operators, opaque to whoever traces a graph.

A compiled graph calls the same fast code as an eager call would; tracing sees no more of it than
shapes. The gradient is computed in backward, when its factor is known: a graph may not write into
what forward saved, and beside a pass over the whole gradient the rows that count are few.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from balanced_group_softmax.ops import eager, torch_ops
from balanced_group_softmax.ops.reference import nan_for_no_label, row_groups
from balanced_group_softmax.tables import GroupTables

LAYOUT = (
    "bool has_background, int foreground_start, int[] starts, int[] sizes, "
    "Tensor label_groups, Tensor label_positions, Tensor label_columns"
)  # the fields of GroupTables, in order
NUM_LAYOUT = len(GroupTables._fields)
LOSS = (
    "Tensor logits, Tensor labels, Tensor row_weights, Tensor? category_weights, "
    f"Tensor? normalizers, {LAYOUT}, int ignore_index, str reduction"
)


def sample_others(
    labels: Tensor, keys: Tensor, tables: GroupTables, *, others_ratio: float, ignore_index: int
) -> tuple[Tensor, Tensor | None]:
    """Which rows count in which group, as `reference.sample_others`; [R, G], stored by group."""
    active, normalizers = _sample_others(labels, keys, *tables, others_ratio, ignore_index)
    return active.T, normalizers


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
    losses: Tensor = _group_losses(
        logits,
        labels,
        row_weights,
        category_weights,
        normalizers,
        *tables,
        ignore_index,
        reduction,
    )
    return losses


def group_scores(logits: Tensor, tables: GroupTables) -> Tensor:
    """Scores in the label convention, [R, num_labels], as `reference.group_scores`."""
    if logits.requires_grad and torch.is_grad_enabled():
        return torch_ops.group_scores(logits, tables)
    scores: Tensor = _group_scores(logits, *tables)
    return scores


# --- the draw ------------------------------------------------------------------------------------


def _run_sample_others(labels: Tensor, keys: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
    tables, (others_ratio, ignore_index) = _tables(arguments)
    active, normalizers = eager.choose("auto", labels.device).sample_others(
        _known(labels, tables, ignore_index),
        keys,
        tables,
        others_ratio=others_ratio,
        ignore_index=ignore_index,
    )
    if normalizers is None:
        normalizers = active.sum(dim=0).clamp(min=1).float()
    return active.T.contiguous(), normalizers


_sample_others = torch.library.custom_op(
    "balanced_group_softmax::sample_others",
    _run_sample_others,
    mutates_args=(),
    schema=f"(Tensor labels, Tensor keys, {LAYOUT}, float others_ratio, int ignore_index) -> "
    f"(Tensor, Tensor)",
)


@_sample_others.register_fake
def _(labels: Tensor, keys: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
    num_groups = len(_tables(arguments)[0].starts)
    active = labels.new_empty((num_groups, labels.shape[0]), dtype=torch.bool)
    return active, labels.new_empty(num_groups, dtype=torch.float32)


# --- the loss ------------------------------------------------------------------------------------


def _run_group_losses(
    logits: Tensor,
    labels: Tensor,
    row_weights: Tensor,
    category_weights: Tensor | None,
    normalizers: Tensor | None,
    *arguments: Any,
) -> Tensor:
    tables, (ignore_index, reduction) = _tables(arguments)
    losses: Tensor = eager.choose("auto", logits.device).group_losses(
        logits.detach(),
        _known(labels, tables, ignore_index),
        row_weights,
        tables,
        category_weights=category_weights,
        normalizers=normalizers,
        ignore_index=ignore_index,
        reduction=reduction,
    )
    if _values_are_near(labels):
        losses = nan_for_no_label(losses, labels, tables, ignore_index, reduction="groups")
    return losses


_group_losses = torch.library.custom_op(
    "balanced_group_softmax::group_losses",
    _run_group_losses,
    mutates_args=(),
    schema=f"({LOSS}) -> Tensor",
)


@_group_losses.register_fake
def _(logits: Tensor, *arguments: Any) -> Tensor:
    tables, (_, reduction) = _tables(arguments[4:])
    dtype = torch.promote_types(logits.dtype, torch.float32)
    shape = () if reduction == "sum" else (len(tables.starts),)
    return logits.new_empty(shape, dtype=dtype)


def _run_group_losses_backward(
    grad_losses: Tensor,
    logits: Tensor,
    labels: Tensor,
    row_weights: Tensor,
    category_weights: Tensor | None,
    normalizers: Tensor | None,
    *arguments: Any,
) -> Tensor:
    tables, (ignore_index, reduction) = _tables(arguments)
    _, gradient = eager.choose("auto", logits.device).losses_and_gradient(
        logits,
        _known(labels, tables, ignore_index),
        row_weights,
        tables,
        category_weights=category_weights,
        normalizers=normalizers,
        ignore_index=ignore_index,
        reduction=reduction,
        with_gradient=True,
        factors=grad_losses.expand(tables.num_groups),
    )
    return gradient


_group_losses_backward = torch.library.custom_op(
    "balanced_group_softmax::group_losses_backward",
    _run_group_losses_backward,
    mutates_args=(),
    schema=f"(Tensor grad_losses, {LOSS}) -> Tensor",
)


@_group_losses_backward.register_fake
def _(grad_losses: Tensor, logits: Tensor, *arguments: Any) -> Tensor:
    return logits.new_empty(logits.shape)


def _save_for_backward(ctx: Any, inputs: Sequence[Any], output: Tensor) -> None:
    tensors = 5  # of the loss; the layout's follow
    tables = GroupTables(*inputs[tensors : tensors + NUM_LAYOUT])
    ctx.save_for_backward(*inputs[:tensors], *tables[-3:])
    ctx.constants = tables[:-3]
    ctx.settings = inputs[tensors + NUM_LAYOUT :]


def _backward(ctx: Any, grad_losses: Tensor) -> tuple[Tensor | None, ...]:
    saved = ctx.saved_tensors
    gradient = _group_losses_backward(
        grad_losses, *saved[:-3], *ctx.constants, *saved[-3:], *ctx.settings
    )
    return gradient, *[None] * (4 + NUM_LAYOUT + len(ctx.settings))


_group_losses.register_autograd(_backward, setup_context=_save_for_backward)


# --- the scores ----------------------------------------------------------------------------------


def _run_group_scores(logits: Tensor, *arguments: Any) -> Tensor:
    tables, _ = _tables(arguments)
    with torch.no_grad():
        scores: Tensor = eager.choose("auto", logits.device).group_scores(logits, tables)
    return scores


_group_scores = torch.library.custom_op(
    "balanced_group_softmax::group_scores",
    _run_group_scores,
    mutates_args=(),
    schema=f"(Tensor logits, {LAYOUT}) -> Tensor",
)


@_group_scores.register_fake
def _(logits: Tensor, *arguments: Any) -> Tensor:
    tables, _ = _tables(arguments)
    dtype = torch.promote_types(logits.dtype, torch.float32)
    return logits.new_empty((logits.shape[0], tables.num_labels), dtype=dtype)


# --- what they share -----------------------------------------------------------------------------


def _tables(arguments: Sequence[Any]) -> tuple[GroupTables, Sequence[Any]]:
    """The layout among an operator's arguments, and what follows it."""
    has_background, foreground_start, starts, sizes, *tensors = arguments[:NUM_LAYOUT]
    tables = GroupTables(has_background, foreground_start, tuple(starts), tuple(sizes), *tensors)
    return tables, arguments[NUM_LAYOUT:]


def _known(labels: Tensor, tables: GroupTables, ignore_index: int) -> Tensor:
    """Labels as `cpu_ops` takes them, which are checked; others check for themselves."""
    if not _values_are_near(labels):
        return labels
    return labels.masked_fill(row_groups(labels, tables, ignore_index) < 0, ignore_index)


def _values_are_near(labels: Tensor) -> bool:
    return labels.device.type == "cpu"
