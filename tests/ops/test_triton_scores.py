"""Scores by the Triton kernels, with background and in the joint form without."""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from bags_oracle import scores
from kernel_cases import (
    DEVICE,
    FORTY_GROUPS,
    LAYOUTS,
    MARKS,
    MEMORY,
    assert_close,
    exactly,
    layout_around_block,
    layout_of,
    logits_for,
    oracle_of,
    triton_ops,
)
from torch import Tensor

from balanced_group_softmax import GroupLayout, grouped_softmax_scores
from balanced_group_softmax.ops import reference

pytestmark = MARKS
Cut = Callable[..., None]
every_background = pytest.mark.parametrize("background", ["first", "last", None])


def scores_of(logits: Tensor, layout: GroupLayout) -> Tensor:
    result: Tensor = triton_ops.group_scores(logits, layout.tables(DEVICE))
    assert result.shape == (len(logits), layout.num_labels)
    assert result.dtype == torch.promote_types(logits.dtype, torch.float32)
    assert result.is_contiguous()
    return result


def check(logits: Tensor, layout: GroupLayout, exact: np.ndarray | None = None) -> None:
    """To 1e-6, and 1e-5 of each score; `exact` are the logits before they were put elsewhere."""
    expected = scores(oracle_of(layout), exactly(logits) if exact is None else exact)
    ours = scores_of(logits, layout)
    assert_close(ours, expected)
    relative = 1e-5 if ours.dtype == torch.float32 else 1e-12
    # Below 1e-37 a float32 has fewer digits, and soon none.
    np.testing.assert_allclose(exactly(ours), expected, rtol=relative, atol=1e-37)


@pytest.mark.parametrize("rows", [0, 1, 3])
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_layouts(layout: GroupLayout, rows: int) -> None:
    check(logits_for(layout, rows), layout)


def test_forty_groups() -> None:
    check(logits_for(FORTY_GROUPS, 1), FORTY_GROUPS)


@pytest.mark.parametrize(
    "dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str
)
@pytest.mark.parametrize("kind", ["odd", "sixteen", "none"])
def test_dtypes(kind: str, dtype: torch.dtype) -> None:
    """Of the rounded logits: what is computed with them is not rounded further."""
    check(logits_for(LAYOUTS[kind], 2, dtype=dtype), LAYOUTS[kind])


# The joint form reads no blocks, and where background is moves no columns.
@pytest.mark.parametrize(
    ("dtype", "vector", "offset"),
    [
        (dtype, vector, offset)
        for dtype, vector in ((torch.float32, 4), (torch.bfloat16, 8))
        for offset in range(vector)
    ],
    ids=str,
)
def test_groups_about_as_wide_as_a_block(
    dtype: torch.dtype, vector: int, offset: int, cut: Cut
) -> None:
    cut(WIDEST_BLOCK=16)
    layout = layout_around_block(16, offset, vector, background="first")
    assert layout.num_logits % vector == 0
    assert layout.group_starts[2] % vector == offset
    check(logits_for(layout, 1, dtype=dtype), layout)


@every_background
@pytest.mark.parametrize("labels", [2048, 2049])
def test_labels_of_a_block_and_one_more(background: Any, labels: int) -> None:
    categories = labels - (background is not None)
    layout = layout_of(categories - 40, 40, background=background)
    assert layout.num_labels == labels
    check(logits_for(layout, 1), layout)


# Large and non-finite logits ----------------------------------------------------------------


@every_background
@pytest.mark.parametrize(
    ("size", "dtype"),
    [(1e4, torch.float16), (1e4, torch.float32), (1e30, torch.bfloat16), (1e30, torch.float32)],
    ids=str,
)
def test_large_logits(size: float, dtype: torch.dtype, background: Any) -> None:
    layout = layout_of(2, 4, 1, background=background)
    logits = (logits_for(layout, 3).sign() * size).to(dtype)
    assert_close(scores_of(logits, layout), scores(oracle_of(layout), exactly(logits)))


PLACES = {
    "background": lambda layout: 0,
    "foreground": lambda layout: 1,
    "others": lambda layout: layout.group_starts[-2],
    "category": lambda layout: layout.group_starts[-2] + 7,
    "group": lambda layout: slice(layout.group_starts[-2], layout.group_starts[-1]),
    "first-block": lambda layout: slice(layout.group_starts[-2], layout.group_starts[-2] + 12),
    "everything": lambda layout: slice(None),
}


@every_background
@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("value", [-math.inf, math.inf, math.nan], ids=str)
def test_values_that_are_not_finite_propagate(
    place: str, value: float, background: Any, cut: Cut
) -> None:
    """As in the reference; the other row stays as it is. Both of one block and of several."""
    layout = layout_of(3, 19, 2, background=background)
    logits = logits_for(layout, 2)
    logits[1, PLACES[place](layout)] = value
    expected = reference.group_scores(logits, layout.tables(DEVICE))
    assert expected[0].isfinite().all()
    for block in (64, 8) if background == "first" else (64,):
        cut(WIDEST_BLOCK=block)
        ours = scores_of(logits, layout)
        torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-30, equal_nan=True)


# Memory layouts and gradients ---------------------------------------------------------------


@pytest.mark.parametrize("kind", MEMORY)
@pytest.mark.parametrize("layout", [LAYOUTS["twelve"], LAYOUTS["none"]], ids=["twelve", "none"])
def test_strided_logits(kind: str, layout: GroupLayout) -> None:
    logits = logits_for(layout, 3)
    placed = MEMORY[kind](logits)
    assert torch.equal(placed, logits)
    check(placed, layout, exactly(logits))
    assert torch.equal(placed, logits)


@pytest.mark.parametrize("layout", [LAYOUTS["twelve"], LAYOUTS["none"]], ids=["twelve", "none"])
def test_expanded_logits(layout: GroupLayout) -> None:
    row = logits_for(layout, 1)
    check(row.expand(3, -1), layout)
    check(row[:, :1].expand(2, layout.num_logits), layout)


@every_background
def test_a_gradient_is_given_where_it_is_wanted(background: Any) -> None:
    layout = layout_of(2, 3, background=background)
    logits = logits_for(layout, 2, dtype=torch.float64).requires_grad_()
    plain = scores_of(logits.detach(), layout)
    assert not plain.requires_grad
    ours = scores_of(logits, layout)
    torch.testing.assert_close(ours.detach(), plain)
    assert torch.autograd.gradcheck(lambda values: scores_of(values, layout), (logits,))
    with torch.no_grad():
        assert torch.equal(scores_of(logits, layout), plain)


def test_public_function() -> None:
    layout = GroupLayout.from_counts([3, 50, 700, 8])
    logits = logits_for(layout, 2)
    ours = grouped_softmax_scores(logits, layout, impl="triton")
    assert torch.equal(ours, scores_of(logits, layout))
