"""Loss and gradient by the Triton kernels for logits of any dtype, value and place in memory."""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from bags_oracle import IGNORE, gradient, group_losses, normalizers
from kernel_cases import (
    DEVICE,
    LAYOUT,
    LAYOUTS,
    MARKS,
    MEMORY,
    ROUNDING,
    ROWS,
    assert_close,
    assert_gradient_close,
    check_loss,
    draw,
    exactly,
    given_weights,
    labels_for,
    layout_of,
    logits_for,
    loss_of,
    oracle_of,
    triton_ops,
    weights_that_count,
    with_dead_slices,
)
from torch import Tensor

from balanced_group_softmax import GroupLayout
from balanced_group_softmax.ops import reference

pytestmark = MARKS
Cut = Callable[..., None]
few_programs_too = pytest.mark.usefixtures("few_programs")


# Number formats -----------------------------------------------------------------------------


@few_programs_too
@pytest.mark.parametrize("layout", [LAYOUTS["twelve"], LAYOUTS["sixteen"]], ids=["twelve", "16"])
def test_float64(layout: GroupLayout) -> None:
    labels = labels_for(layout, ROWS)
    active, counts = draw(labels, layout)
    weights = weights_that_count(layout, labels, active)
    logits = logits_for(layout, ROWS, dtype=torch.float64)
    check_loss(logits, labels, active, layout, weights, normalizers=counts)
    given = given_weights(layout, torch.float64)
    weights = weights_that_count(layout, labels, given)
    check_loss(logits, labels, given, layout, weights)


def native(logits: Tensor, labels: Tensor, weights: np.ndarray, layout: GroupLayout) -> Tensor:
    """The loss of each group by PyTorch in the dtype of the logits throughout."""
    expected = oracle_of(layout)
    losses = []
    for group, scale in enumerate(normalizers(weights).tolist()):
        rows = np.flatnonzero(weights[:, group]).tolist()
        targets = [expected.bin_label(group, int(labels[row])) for row in rows]
        cross_entropy = F.cross_entropy(
            logits[rows, expected.columns(group)],
            torch.tensor(targets, dtype=torch.int64, device=logits.device),
            reduction="none",
        )
        shares = torch.from_numpy(weights[rows, group] / scale).to(logits)
        losses.append((cross_entropy * shares).sum())
    return torch.stack(losses)


@pytest.mark.parametrize("kind", ["odd", "twelve", "sixteen", "one-column", "none"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision(kind: str, dtype: torch.dtype, cut: Cut) -> None:
    """The error is at most that of PyTorch in the same dtype, and a margin of 1e-6.

    Indeed it is much smaller: the loss is as exact as that of float32 logits, and the gradient is
    the true one rounded once. Where the interpreter rounds worse than PyTorch, by half a unit in
    bfloat16, that is allowed as well.
    """
    cut(MOST_PROGRAMS=1)
    layout = LAYOUTS[kind]
    labels = labels_for(layout, ROWS)
    active, counts = draw(labels, layout)
    weights = weights_that_count(layout, labels, active)
    logits = logits_for(layout, ROWS, dtype=dtype)
    exact, rows = exactly(logits), labels.tolist()
    losses_expected = group_losses(oracle_of(layout), exact, rows, weights)
    slope_expected = gradient(oracle_of(layout), exact, rows, weights)

    peer_logits = logits.clone().requires_grad_()
    peer = native(peer_logits, labels, weights, layout)
    (peer_slope,) = torch.autograd.grad(peer.sum(), peer_logits)
    logits = with_dead_slices(logits, layout, weights).requires_grad_()
    losses = loss_of(logits, labels, active, layout, normalizers=counts)
    (slope,) = torch.autograd.grad(losses.sum(), logits)
    assert losses.dtype == torch.float32
    assert slope.dtype == dtype

    for ours, theirs, truth in (
        (losses, peer, losses_expected),
        (slope, peer_slope, slope_expected),
    ):
        error = np.abs(exactly(ours) - truth).max()
        margin = 1e-6 * max(np.abs(truth).max(), 1)
        if ours is slope and ROUNDING[dtype] == 2.0**-7:
            margin += 2.0**-8 * np.abs(truth).max()
        assert error <= np.abs(exactly(theirs) - truth).max() + margin
    assert_close(losses, losses_expected)
    # 1e-7: where a float16 is subnormal, and what float32 loses at the label.
    np.testing.assert_allclose(
        exactly(slope), slope_expected, rtol=1.02 * ROUNDING[dtype], atol=1e-7
    )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_loss_scale_saves_small_gradients(dtype: torch.dtype, cut: Cut) -> None:
    """Unscaled most of these entries are below the least float16, 6e-8."""
    cut(MOST_PROGRAMS=2)
    scale, layout = 2.0**16, LAYOUTS["sixteen"]
    labels = labels_for(layout, ROWS)
    logits = logits_for(layout, ROWS)
    columns = layout.tables(DEVICE).label_columns[labels.clamp(min=0)].long()
    logits[torch.arange(ROWS), columns] += 16  # the label's probability is nearly 1
    logits = logits.to(dtype)
    active, counts = draw(labels, layout)
    weights = weights_that_count(layout, labels, active)
    expected = scale * gradient(oracle_of(layout), exactly(logits), labels.tolist(), weights)
    small = (expected != 0) & (np.abs(expected) < scale * 2.0**-25)
    assert small.mean() > 0.05
    logits.requires_grad_()
    losses = loss_of(logits, labels, active, layout, normalizers=counts)
    (losses.sum() * scale).backward()
    assert logits.grad is not None
    # 1e-7 of the scale is what float32 loses at the label.
    tolerance = ROUNDING[dtype] * np.abs(expected) * 2.02 + 1e-7 * scale * (weights > 0).repeat(
        layout.group_sizes, axis=1
    )
    assert (np.abs(exactly(logits.grad) - expected) <= tolerance).all()
    is_label = np.zeros_like(small)
    is_label[np.arange(ROWS), columns.cpu()] = True
    away = small & ~is_label
    np.testing.assert_allclose(
        exactly(logits.grad)[away], expected[away], rtol=2.02 * ROUNDING[dtype], atol=2.0**-24
    )


# Large and non-finite logits ----------------------------------------------------------------


@few_programs_too
@pytest.mark.parametrize(
    ("size", "dtype"),
    [(1e4, torch.float16), (1e4, torch.float32), (1e30, torch.bfloat16), (1e30, torch.float32)],
    ids=str,
)
def test_large_logits(size: float, dtype: torch.dtype) -> None:
    labels = labels_for(LAYOUT, ROWS)
    active, counts = draw(labels, LAYOUT)
    weights = weights_that_count(LAYOUT, labels, active)
    logits = (logits_for(LAYOUT, ROWS).sign() * size).to(dtype)
    tolerance = 2 * ROUNDING[dtype] if dtype in ROUNDING else None
    check_loss(
        logits,
        labels,
        active,
        LAYOUT,
        weights,
        gradient_tolerance=tolerance,
        normalizers=counts,
    )


PLACES: dict[str, Callable[[Tensor, int], Any]] = {
    "at-the-label": lambda columns, label: label,
    "elsewhere": lambda columns, label: columns[columns != label][-1],
    "everywhere": lambda columns, label: columns,
    "all-but-the-last": lambda columns, label: columns[:-1],  # of several blocks, the first ones
}


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("value", [-math.inf, math.inf, math.nan], ids=str)
@pytest.mark.parametrize("block", [64, 8], ids=["narrow", "wide"])
def test_values_that_are_not_finite_propagate(
    place: str, value: float, block: int, cut: Cut
) -> None:
    """As in the reference: the same losses and slopes are NaN or infinite, and no others."""
    cut(WIDEST_BLOCK=block, MOST_PROGRAMS=2, TILE_SIZE=8 * block)
    layout = layout_of(19, 3)
    labels = torch.tensor([0, 1, 5, IGNORE, 2, 20, 21, 0, 9, 22, 3], device=DEVICE)
    given, columns = torch.ones(11, 3, device=DEVICE), torch.arange(26)
    given[7] = 0
    logits = logits_for(layout, 11)
    logits[3] = logits[7] = value  # a row that is ignored, and one that does not count
    # Row 1 in group 0, row 4 in the wide group, where its label may be, and row 8 in the last.
    for row, group in ((1, 0), (4, 1), (8, 2)):
        own = columns[oracle_of(layout).columns(group)]
        target = own[oracle_of(layout).bin_label(group, int(labels[row]))]
        logits[row, PLACES[place](own, int(target))] = value
    results = []
    for operations in ({}, {"operations": reference}):
        leaf = logits.clone().requires_grad_()
        losses = loss_of(leaf, labels, given, layout, **operations)
        results.append((losses.detach(), *torch.autograd.grad(losses.sum(), leaf)))
    for ours, theirs in zip(*results, strict=True):
        for kind in (torch.isnan, torch.isposinf, torch.isneginf):
            assert torch.equal(kind(ours), kind(theirs)), kind
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6, equal_nan=True)
    losses, slope = results[0]
    assert not slope[[3, 7]].any()
    assert not losses.isfinite().all() or (value == -math.inf and place == "elsewhere")


# Memory layouts -----------------------------------------------------------------------------


@few_programs_too
@pytest.mark.parametrize(
    ("kind", "dtype"),
    [*((kind, torch.float32) for kind in MEMORY), ("columns-of-32", torch.float64)],
    ids=str,
)
def test_strided_logits(kind: str, dtype: torch.dtype) -> None:
    layout = LAYOUTS["twelve"]
    labels = labels_for(layout, ROWS)
    active, counts = draw(labels, layout)
    weights = weights_that_count(layout, labels, active)
    logits = logits_for(layout, ROWS, dtype=dtype)
    check_loss(logits, labels, active, layout, weights, place=MEMORY[kind], normalizers=counts)


@few_programs_too
@pytest.mark.parametrize("expanded", ["rows", "columns", "both"])
def test_expanded_logits(expanded: str) -> None:
    layout = LAYOUTS["twelve"]
    labels = labels_for(layout, ROWS)
    labels[labels == IGNORE] = 0
    given = torch.ones(ROWS, layout.num_groups, device=DEVICE)
    weights = weights_that_count(layout, labels, given)
    seen = logits_for(layout, ROWS)
    seen = seen if expanded == "columns" else seen[:1]
    seen = seen if expanded == "rows" else seen[:, :1]
    logits = seen.clone().requires_grad_()
    wide = logits.expand(ROWS, layout.num_logits)
    losses = loss_of(wide, labels, given, layout)
    exact, rows = exactly(wide), labels.tolist()
    assert_close(losses, group_losses(oracle_of(layout), exact, rows, weights))
    (slope,) = torch.autograd.grad(losses.sum(), wide)
    assert_gradient_close(
        slope,
        gradient(oracle_of(layout), exact, rows, weights),
        layout,
        weights / normalizers(weights),
    )


@pytest.mark.parametrize(
    ("stride", "is_copied"), [(2**29, False), (2**30 - 1, False), (2**30, True)]
)
def test_columns_too_far_apart_for_32_bits_are_copied(stride: int, is_copied: bool) -> None:
    """As those of a transposed matrix of many rows; on the meta device it takes no memory."""
    logits = torch.empty_strided((5, 3), (1, stride), device="meta")
    assert (triton_ops._with_near_columns(logits).stride(1) == 1) == is_copied
