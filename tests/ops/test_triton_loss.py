"""Loss and gradient by the Triton kernels against the float64 oracle: layouts, weights, labels.

In every test the slices that do not count are NaN, in the logits and, before it is written, in the
gradient.
"""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from bags_oracle import IGNORE, normalizers
from kernel_cases import (
    DEVICE,
    FORTY_GROUPS,
    LAYOUT,
    LAYOUTS,
    MARKS,
    ROUNDING,
    ROWS,
    assert_close,
    check_loss,
    draw,
    given_weights,
    labels_for,
    layout_around_block,
    layout_of,
    logits_for,
    loss_of,
    seeded,
    weights_that_count,
)

from balanced_group_softmax import GroupLayout
from balanced_group_softmax.ops import triton_kernels

pytestmark = MARKS
Cut = Callable[..., None]
every_background = pytest.mark.parametrize("background", ["first", "last", None])


few_programs_too = pytest.mark.usefixtures("few_programs")


# Layouts and rows ---------------------------------------------------------------------------


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize(
    ("rows", "sizes"),
    [
        pytest.param(1, {}, id="one-row"),
        # A row for each program, as with few rows on a GPU.
        pytest.param(7, {}, id="a-row-each"),
        # Programs of 16 rows in one tile, which for the second one is not full.
        pytest.param(ROWS, {"MOST_PROGRAMS": 2}, id="a-tile-each"),
        # Tiles of 2 to 16 rows, up to eight to a program.
        pytest.param(37, {"MOST_PROGRAMS": 3, "TILE_SIZE": 32}, id="tiles"),
    ],
)
def test_drawn(layout: GroupLayout, rows: int, sizes: dict[str, int], cut: Cut) -> None:
    cut(**sizes)
    labels = labels_for(layout, rows)
    active, counts = draw(labels, layout, ratio=1.0)
    weights = weights_that_count(layout, labels, active)
    check_loss(logits_for(layout, rows), labels, active, layout, weights, normalizers=counts)


def test_forty_groups(cut: Cut) -> None:
    cut(MOST_PROGRAMS=1)
    labels = labels_for(FORTY_GROUPS, 11)
    active, counts = draw(labels, FORTY_GROUPS, ratio=2.0)
    weights = weights_that_count(FORTY_GROUPS, labels, active)
    logits = logits_for(FORTY_GROUPS, 11)
    check_loss(logits, labels, active, FORTY_GROUPS, weights, normalizers=counts)


# As many parts as a block holds, one more, and several blocks with a rest.
@pytest.mark.parametrize("length", [16, 17, 100])
@pytest.mark.parametrize("sums", [1, 3])
def test_parts_are_added_up(length: int, sums: int) -> None:
    parts = torch.rand(sums, length, generator=seeded(1)).to(DEVICE)
    losses = torch.empty(sums, device=DEVICE)
    triton_kernels.finish_kernel[(sums,)](parts, losses, length, BLOCK=16, num_warps=1)
    assert_close(losses, parts.double().sum(dim=1).cpu().numpy())


@pytest.mark.parametrize("reduction", ["groups", "sum"])
@pytest.mark.parametrize("layout", [LAYOUTS["twelve"], LAYOUTS["none"]], ids=["twelve", "none"])
def test_zero_rows(layout: GroupLayout, reduction: str) -> None:
    labels, logits = labels_for(layout, 0), logits_for(layout, 0).requires_grad_()
    active, _ = draw(labels, layout)
    losses = loss_of(logits, labels, active, layout, reduction=reduction)
    assert losses.tolist() == (0.0 if reduction == "sum" else [0.0] * layout.num_groups)
    losses.sum().backward()
    assert logits.grad is not None
    assert logits.grad.shape == logits.shape


# 4 logits of float32, 8 of bfloat16, 2 of float64 are an aligned load; a group may start anywhere
# in one.
@pytest.mark.parametrize(
    ("dtype", "vector", "offset"),
    [
        (dtype, vector, offset)
        for dtype, vector in ((torch.float64, 2), (torch.float32, 4), (torch.bfloat16, 8))
        for offset in range(vector)
    ],
    ids=str,
)
def test_groups_about_as_wide_as_a_block(
    dtype: torch.dtype, vector: int, offset: int, cut: Cut
) -> None:
    cut(WIDEST_BLOCK=16, MOST_PROGRAMS=1, TILE_SIZE=256)
    layout = layout_around_block(16, offset, vector)
    assert layout.num_logits % vector == 0
    assert layout.group_starts[1] % vector == offset
    labels = labels_for(layout, 13)
    active, counts = draw(labels, layout, ratio=0.5)
    weights = weights_that_count(layout, labels, active)
    assert (weights.any(axis=0) & ~weights.all(axis=0)).sum() >= 4
    tolerance = 2 * ROUNDING[dtype] if dtype in ROUNDING else None  # of factor, then of product
    check_loss(
        logits_for(layout, 13, dtype=dtype),
        labels,
        active,
        layout,
        weights,
        gradient_tolerance=tolerance,
        normalizers=counts,
    )


@few_programs_too
@pytest.mark.parametrize("background", [0, None])
def test_nothing_counts(background: int | None) -> None:
    """All rows background, or ignored: all groups, or all but the first, are dead."""
    labels = torch.full((ROWS,), IGNORE if background is None else background, device=DEVICE)
    active, counts = draw(labels, LAYOUT, ratio=math.inf)
    weights = weights_that_count(LAYOUT, labels, active)
    assert not weights[:, 1:].any()
    check_loss(logits_for(LAYOUT, ROWS), labels, active, LAYOUT, weights, normalizers=counts)


@few_programs_too
@every_background
def test_everything_counts(background: Any) -> None:
    layout = layout_of(2, 4, 1, background=background)
    labels = torch.arange(ROWS, device=DEVICE) % layout.num_labels
    active, counts = draw(labels, layout, ratio=math.inf)
    assert active.all()
    weights = weights_that_count(layout, labels, active)
    check_loss(logits_for(layout, ROWS), labels, active, layout, weights, normalizers=counts)


# Weights ------------------------------------------------------------------------------------


@few_programs_too
@pytest.mark.parametrize("stored_by", ["row", "group"])
@pytest.mark.parametrize(
    "dtype", [torch.bool, torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str
)
def test_given_weights(dtype: torch.dtype, stored_by: str) -> None:
    labels = labels_for(LAYOUT, ROWS)
    given = given_weights(LAYOUT, dtype)
    weights = weights_that_count(LAYOUT, labels, given)
    if stored_by == "group":
        given = given.T.contiguous().T
    check_loss(logits_for(LAYOUT, ROWS), labels, given, LAYOUT, weights)


@few_programs_too
@pytest.mark.parametrize("shape", [(ROWS, 1), (1, 5), (1, 1)], ids=str)
def test_expanded_weights(shape: tuple[int, int]) -> None:
    labels = labels_for(LAYOUT, ROWS)
    given = torch.rand(shape, generator=seeded(5)).to(DEVICE).expand(ROWS, 5)
    weights = weights_that_count(LAYOUT, labels, given)
    check_loss(logits_for(LAYOUT, ROWS), labels, given, LAYOUT, weights)


@few_programs_too
@pytest.mark.parametrize("value", [-1.0, math.nan, -math.inf, -0.0], ids=str)
def test_a_weight_that_is_not_positive_counts_nowhere(value: float) -> None:
    """The public function refuses these where it can look; elsewhere they must do no harm."""
    labels = labels_for(LAYOUT, ROWS)
    given = given_weights(LAYOUT, torch.float32)
    given[given == 0] = value
    weights = weights_that_count(LAYOUT, labels, given)
    check_loss(logits_for(LAYOUT, ROWS), labels, given, LAYOUT, weights)


@few_programs_too
def test_normalizer_is_at_least_one() -> None:
    labels = labels_for(LAYOUT, ROWS)
    given = given_weights(LAYOUT, torch.float32) * 1e-3
    weights = weights_that_count(LAYOUT, labels, given)
    assert (normalizers(weights) == 1).all()
    check_loss(logits_for(LAYOUT, ROWS), labels, given, LAYOUT, weights)


@few_programs_too
@pytest.mark.parametrize(
    ("background", "kind", "dtype"),
    [
        *((place, "drawn", torch.float32) for place in ("first", "last", None)),
        *((place, "given", torch.float32) for place in ("first", "last", None)),
        ("first", "given", torch.float16),
        ("first", "given", torch.float64),
    ],
    ids=str,
)
def test_category_weights(background: Any, kind: str, dtype: torch.dtype) -> None:
    """Some of them 0; they enter the normalizers, which are computed then."""
    layout = layout_of(2, 4, 1, background=background)
    labels = labels_for(layout, ROWS)
    category_weights = torch.rand(layout.num_categories, generator=seeded(7)).to(DEVICE, dtype) * 3
    category_weights[::3] = 0
    given = draw(labels, layout)[0]
    if kind == "given":
        given = given_weights(layout, torch.float32)
    weights = weights_that_count(layout, labels, given, category_weights)
    check_loss(
        logits_for(layout, ROWS), labels, given, layout, weights, category_weights=category_weights
    )


@few_programs_too
def test_strided_category_weights() -> None:
    labels = labels_for(LAYOUT, ROWS)
    category_weights = torch.rand(2 * LAYOUT.num_categories, generator=seeded(7)).to(DEVICE)[::2]
    given = given_weights(LAYOUT, torch.float32)
    weights = weights_that_count(LAYOUT, labels, given, category_weights)
    check_loss(
        logits_for(LAYOUT, ROWS), labels, given, LAYOUT, weights, category_weights=category_weights
    )


# Labels -------------------------------------------------------------------------------------


@few_programs_too
@pytest.mark.parametrize("ignore_index", [-1, 0, 255, 2**40], ids=str)
def test_ignore_index(ignore_index: int) -> None:
    labels = labels_for(LAYOUT, ROWS)
    labels[labels == IGNORE] = ignore_index
    given = given_weights(LAYOUT, torch.float32)
    weights = weights_that_count(LAYOUT, labels, given, ignore_index=ignore_index)
    check_loss(logits_for(LAYOUT, ROWS), labels, given, LAYOUT, weights, ignore_index=ignore_index)


@few_programs_too
def test_strided_labels() -> None:
    labels = labels_for(LAYOUT, ROWS)
    strided = torch.stack([labels, torch.full_like(labels, 2**40)], dim=1)[:, 0]
    active, counts = draw(strided, LAYOUT)
    weights = weights_that_count(LAYOUT, labels, active)
    check_loss(logits_for(LAYOUT, ROWS), strided, active, LAYOUT, weights, normalizers=counts)


@pytest.mark.parametrize(
    ("background", "bad", "kind"),
    [
        *(("first", bad, "drawn") for bad in (-1, "num_labels", 2**40, -(2**40))),
        *(("first", bad, "by-category") for bad in (-1, "num_labels", 2**40, -(2**40))),
        *((place, bad, "given") for place in ("last", None) for bad in (-1, "num_labels")),
    ],
    ids=str,
)
def test_a_bad_label_makes_every_loss_nan(background: Any, bad: Any, kind: str, cut: Cut) -> None:
    """And nothing else: the gradient is that of a batch in which its row is ignored.

    The table of columns lies between entries that would make the row one of a category.
    """
    cut(MOST_PROGRAMS=1)
    layout = layout_of(2, 4, 1, background=background)
    tables = layout.tables(DEVICE)
    around = torch.full((tables.num_labels + 2,), layout.num_logits - 1, dtype=torch.int32)
    around = around.to(DEVICE)
    around[1:-1] = tables.label_columns
    tables = tables._replace(label_columns=around[1:-1])
    ignored = labels_for(layout, ROWS)
    ignored[5] = IGNORE
    labels = ignored.clone()
    labels[5] = layout.num_labels if bad == "num_labels" else bad
    given, counts = draw(labels, layout) if kind == "drawn" else (None, None)
    if given is None:
        given = given_weights(layout, torch.float32)
    given[5] = 1
    options: dict[str, Any] = {"tables": tables, "normalizers": counts}
    if kind == "by-category":
        options["category_weights"] = torch.rand(layout.num_categories).to(DEVICE)
    logits = logits_for(layout, ROWS)
    logits[5] = math.nan
    logits.requires_grad_()
    losses = loss_of(logits, labels, given, layout, **options)
    assert losses.isnan().all()
    assert loss_of(logits, labels, given, layout, reduction="sum", **options).isnan()
    good = loss_of(logits, ignored, given, layout, **options)
    assert good.isfinite().all()
    factors = torch.rand(layout.num_groups).to(DEVICE)
    (slope,) = torch.autograd.grad(losses, logits, factors)
    (expected,) = torch.autograd.grad(good, logits, factors)
    assert torch.equal(slope, expected)
    assert not slope[5].any()
