"""Which rows count: exact numbers, a uniform draw, and the same rows in the loss."""

import math
from itertools import combinations
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from bags_oracle import (
    IGNORE,
    OracleLayout,
    Recipe,
    check_rows_that_count,
    group_losses,
    labelled,
    number_of_others,
    ratios,
    recipes,
    rows_in_group,
    weights_of,
)
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from scipy import stats
from torch import Tensor

from balanced_group_softmax import (
    BAGSHead,
    BAGSLoss,
    GroupLayout,
    grouped_softmax_loss,
    sample_others,
)
from balanced_group_softmax.ops import cpu_ops, eager, reference, torch_ops

BAD = (ValueError, TypeError)
IMPLS = ("auto", "torch", "reference")


def make(recipe: Recipe) -> GroupLayout:
    return GroupLayout.from_counts(
        recipe.counts, thresholds=recipe.thresholds, background=recipe.background
    )


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def tensor(labels: list[int]) -> Tensor:
    return torch.tensor(labels, dtype=torch.int64)


# How many -----------------------------------------------------------------------------------


@given(recipes(), ratios(), st.sampled_from([IGNORE, -1, 255, 0]), st.data())
def test_rows_that_count_are_those_of_the_method(
    recipe: Recipe, ratio: float, ignore_index: int, data: st.DataObject
) -> None:
    labels = data.draw(labelled(recipe, ignore_index=ignore_index))
    mask = sample_others(
        tensor(labels), make(recipe), others_ratio=ratio, ignore_index=ignore_index
    )
    assert mask.dtype == torch.bool
    check_rows_that_count(recipe.oracle, labels, ratio, mask.numpy(), ignore_index)


# Group 1 owns the first label, group 2 the second; background is 0.
TWO = GroupLayout.from_counts([5, 50], thresholds=(10,))
TWO_NONE = GroupLayout.from_counts([5, 50], thresholds=(10,), background=None)


def drawn(n_inside: int, n_others: int, ratio: float) -> int:
    labels = tensor([1] * n_inside + [0] * n_others)
    mask = sample_others(labels, TWO, others_ratio=ratio)
    assert mask[:n_inside, 1].all()
    return int(mask[n_inside:, 1].sum())


@pytest.mark.parametrize(
    ("n_inside", "ratio", "expected"),
    [
        # The float64 products fall just below or above a whole number; float32 differs.
        (100, 0.29, 28),
        (100, 0.57, 56),
        (100, 0.58, 57),
        (10, 1.1, 11),
        (3, 1.1, 3),
        (100, 1.1, 110),
        (70, 1.1, 77),
        (25, 2.2, 55),
        (7, 1 / 7, 1),
        (49, 1 / 49, 0),
        (1, 0.999999999, 0),
        (1, 8.0, 8),
        (3, 8.0, 24),
        (5, 0.0, 0),
        (5, -0.0, 0),
        (2, 0.49999999999999994, 0),
        (3, np.nextafter(8.0, 0), 23),
    ],
)
def test_number_drawn_is_the_truncated_float64_product(
    n_inside: int, ratio: float, expected: int
) -> None:
    assert int(ratio * n_inside) == expected, "the table itself is wrong"
    assert drawn(n_inside, 200, float(ratio)) == expected


@given(st.integers(1, 120), st.floats(0, 4), st.integers(0, 150))
@example(100, 0.29, 150)
@example(49, 1 / 49, 150)
def test_number_drawn_for_any_ratio(n_inside: int, ratio: float, n_others: int) -> None:
    assert drawn(n_inside, n_others, ratio) == min(int(ratio * n_inside), n_others)


@pytest.mark.parametrize("ratio", [4.0, 4.5, 5.0, 1e18, 1e19, 1e300, math.inf])
def test_all_others_count_once_there_are_few(ratio: float) -> None:
    assert drawn(2, 8, ratio) == 8


@pytest.mark.parametrize("ratio", [0.0, 8.0, 1e300, math.inf])
def test_group_without_foreground_counts_no_row(ratio: float) -> None:
    mask = sample_others(tensor([0, 0, 1, 0]), TWO, others_ratio=ratio)
    assert not mask[:, 2].any()
    assert mask[:, 0].all()


def test_all_background() -> None:
    mask = sample_others(torch.zeros(9, dtype=torch.int64), TWO)
    assert mask.tolist() == [[True, False, False]] * 9


def test_all_ignored() -> None:
    mask = sample_others(torch.full((9,), IGNORE), TWO, others_ratio=math.inf)
    assert mask.tolist() == [[False] * 3] * 9


@pytest.mark.parametrize("layout", [TWO, TWO_NONE], ids=["background", "no-background"])
def test_zero_rows(layout: GroupLayout) -> None:
    mask = sample_others(torch.zeros(0, dtype=torch.int64), layout)
    assert mask.shape == (0, layout.num_groups)
    assert mask.dtype == torch.bool


def test_without_background_the_others_are_the_other_categories() -> None:
    mask = sample_others(tensor([0, 1, 1, 1, 1]), TWO_NONE, others_ratio=2)
    assert mask.shape == (5, 2)
    assert mask[0, 0]
    assert mask[1:, 0].sum() == 2
    assert mask[:, 1].all()


def test_ignored_rows_are_not_among_the_others() -> None:
    labels = tensor([1, IGNORE, 0, IGNORE, 0])
    mask = sample_others(labels, TWO, others_ratio=math.inf)
    assert mask[:, 0].tolist() == [True, False, True, False, True]
    assert mask[:, 1].tolist() == [True, False, True, False, True]


@pytest.mark.parametrize("background", ["first", "last"])
def test_background_may_be_first_or_last(background: Any) -> None:
    layout = GroupLayout.from_counts([5, 50], thresholds=(10,), background=background)
    empty, own = (0, 1) if background == "first" else (2, 0)
    mask = sample_others(tensor([empty, own, empty]), layout, others_ratio=1)
    assert mask[1, 1]
    assert mask[:, 1].sum() == 2
    assert not mask[:, 2].any()


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(recipes(), ratios(), st.sampled_from([IGNORE, 255, 0]), st.integers(0, 2**31), st.data())
def test_rows_are_the_same_where_no_value_is_looked_at(
    monkeypatch: pytest.MonkeyPatch,
    recipe: Recipe,
    ratio: float,
    ignore_index: int,
    seed: int,
    data: st.DataObject,
) -> None:
    """On a GPU and under `torch.compile` the same keys must choose the same rows."""
    labels = tensor(data.draw(labelled(recipe, ignore_index=ignore_index)))
    masks = []
    for operations in (cpu_ops, torch_ops):
        with monkeypatch.context() as patch:
            patch.setattr(eager, "cpu_ops", operations)
            masks.append(
                sample_others(
                    labels,
                    make(recipe),
                    others_ratio=ratio,
                    ignore_index=ignore_index,
                    generator=seeded(seed),
                )
            )
    assert torch.equal(*masks)


def smallest_keys(
    layout: GroupLayout, expected: OracleLayout, labels: list[int], keys: Tensor, ratio: float
) -> np.ndarray:
    """The rule for given keys, row by row: the smallest count, the lower row among equals."""
    mask = np.zeros((len(labels), layout.num_groups), dtype=bool)
    for group in range(layout.num_groups):
        inside, others = rows_in_group(expected, labels, group)
        if expected.is_binary(group):
            mask[inside + others, group] = True
            continue
        own = keys[group - expected.has_binary].tolist()
        kept = number_of_others(ratio, len(inside), len(others))
        mask[inside + sorted(others, key=lambda row: (own[row], row))[:kept], group] = True
    return mask


@pytest.mark.parametrize("operations", [reference, cpu_ops, torch_ops])
@given(recipes(), ratios(), st.integers(0, 2**31), st.sampled_from([1, 3, 2**31 - 1]))
def test_smallest_keys_count_and_lower_rows_among_equals(
    operations: ModuleType,
    recipe: Recipe,
    ratio: float,
    seed: int,
    largest: int,
) -> None:
    """Enough rows, and keys equal enough, that a sort that is not stable would show."""
    layout, rows = make(recipe), 80
    tables = layout.tables(torch.device("cpu"))
    labels = torch.randint(0, 4 * layout.num_labels, (rows,), generator=seeded(seed))
    labels = labels.where(labels < layout.num_labels, IGNORE)
    size = (layout.num_groups - tables.first_category_group, rows)
    keys = torch.randint(0, largest, size, dtype=torch.int32, generator=seeded(seed))
    mask, _ = operations.sample_others(
        labels, keys, tables, others_ratio=ratio, ignore_index=IGNORE
    )
    rule = smallest_keys(layout, recipe.oracle, labels.tolist(), keys, ratio)
    np.testing.assert_array_equal(mask.numpy(), rule)


@pytest.mark.parametrize(("n_inside", "ratio", "expected"), [(100, 0.29, 28), (49, 1 / 49, 0)])
def test_float64_product_where_no_value_is_looked_at(
    monkeypatch: pytest.MonkeyPatch, n_inside: int, ratio: float, expected: int
) -> None:
    monkeypatch.setattr(eager, "cpu_ops", torch_ops)
    assert drawn(n_inside, 200, ratio) == expected


# Uniform and independent --------------------------------------------------------------------

ALPHA = 1e-3  # Seeds are fixed, so a test either always passes or never does.


def subsets(masks: list[Tensor], rows: list[int], size: int) -> np.ndarray:
    """How often each subset of `rows` of this size was drawn."""
    places = {frozenset(subset): i for i, subset in enumerate(combinations(rows, size))}
    tally = np.zeros(len(places), dtype=int)
    for mask in masks:
        tally[places[frozenset(row for row in rows if mask[row])]] += 1
    return tally


@pytest.mark.parametrize("size", [1, 2, 3, 5])
@pytest.mark.parametrize("seed", [0, 1])
def test_every_subset_is_as_likely(size: int, seed: int) -> None:
    generator = seeded(seed)
    labels = tensor([0, 0, 1, 0, 0, 0, 0])
    others = [0, 1, 3, 4, 5, 6]
    masks = [
        sample_others(labels, TWO, others_ratio=size, generator=generator)[:, 1]
        for _ in range(2000)
    ]
    assert stats.chisquare(subsets(masks, others, size)).pvalue > ALPHA


def test_every_subset_is_as_likely_over_seeds() -> None:
    # One draw from each of many fresh seeds: the first numbers of a generator must do too.
    labels = tensor([0, 0, 1, 0, 0, 0])
    masks = [
        sample_others(labels, TWO, others_ratio=2, generator=seeded(seed))[:, 1]
        for seed in range(2000)
    ]
    assert stats.chisquare(subsets(masks, [0, 1, 3, 4, 5], 2)).pvalue > ALPHA


def test_no_row_is_preferred_among_many() -> None:
    rows, own, draws = 600, 10, 400
    labels = torch.zeros(rows, dtype=torch.int64)
    labels[::60] = 1
    generator = seeded(3)
    tally = sum(
        sample_others(labels, TWO, generator=generator)[:, 1].double() for _ in range(draws)
    )
    assert isinstance(tally, Tensor)
    others, kept = rows - own, 8 * own
    share = kept / others
    deviation = (tally[labels == 0] - draws * share).square().sum()
    # Drawing without replacement shrinks the variance of each tally by 1 - share, and couples
    # the tallies, which takes one degree of freedom.
    statistic = deviation / (draws * share * (1 - share)) * (others - 1) / others
    assert ALPHA < stats.chi2.cdf(statistic.item(), others - 1) < 1 - ALPHA


def test_groups_draw_independently() -> None:
    # Each group draws one of the same three background rows or the other group's row.
    labels = tensor([0, 0, 0, 1, 2])
    generator = seeded(5)
    table = np.zeros((3, 3), dtype=int)
    for _ in range(4000):
        mask = sample_others(labels, TWO, others_ratio=1, generator=generator)
        first, second = mask[:3, 1].nonzero(), mask[:3, 2].nonzero()
        if len(first) and len(second):
            table[first.item(), second.item()] += 1
    assert table.sum() > 1500
    assert stats.chi2_contingency(table).pvalue > ALPHA
    assert stats.chisquare(table.sum(0)).pvalue > ALPHA
    assert stats.chisquare(table.sum(1)).pvalue > ALPHA


def test_steps_draw_independently() -> None:
    labels = tensor([1, 0, 0, 0, 0])
    generator = seeded(6)
    chosen = [
        int(sample_others(labels, TWO, others_ratio=1, generator=generator)[1:, 1].nonzero().item())
        for _ in range(3000)
    ]
    table = np.zeros((4, 4), dtype=int)
    np.add.at(table, (chosen[:-1:2], chosen[1::2]), 1)
    assert stats.chi2_contingency(table).pvalue > ALPHA


# Generators ---------------------------------------------------------------------------------

MANY = tensor([0] * 200 + [1, 1, 2])


def test_same_generator_state_same_rows() -> None:
    first = sample_others(MANY, TWO, generator=seeded(11))
    assert torch.equal(first, sample_others(MANY, TWO, generator=seeded(11)))
    assert not torch.equal(first, sample_others(MANY, TWO, generator=seeded(12)))


def test_generator_moves_on() -> None:
    generator = seeded(11)
    first = sample_others(MANY, TWO, generator=generator)
    assert not torch.equal(first, sample_others(MANY, TWO, generator=generator))


def test_without_generator_the_global_one_serves() -> None:
    torch.manual_seed(4)
    first = sample_others(MANY, TWO)
    second = sample_others(MANY, TWO)
    torch.manual_seed(4)
    assert torch.equal(first, sample_others(MANY, TWO))
    assert not torch.equal(first, second)


def test_a_generator_leaves_the_global_one_alone() -> None:
    torch.manual_seed(4)
    before = torch.get_rng_state()
    sample_others(MANY, TWO, generator=seeded(1))
    grouped_softmax_loss(torch.zeros(len(MANY), TWO.num_logits), MANY, TWO, generator=seeded(1))
    assert torch.equal(before, torch.get_rng_state())


def test_labels_are_left_alone() -> None:
    labels = tensor([IGNORE, 0, 1, 2, 0])
    before = labels.clone()
    sample_others(labels, TWO)
    assert torch.equal(labels, before)


def test_labels_may_be_strided() -> None:
    wide = torch.stack([MANY, torch.full_like(MANY, 99)], dim=1)
    rows = sample_others(wide[:, 0], TWO, generator=seeded(2))
    assert torch.equal(rows, sample_others(MANY, TWO, generator=seeded(2)))


# The rows that count in the loss are these --------------------------------------------------


@pytest.mark.parametrize("impl", IMPLS)
@given(recipes(), ratios(), st.integers(0, 2**31), st.data())
def test_loss_reads_exactly_the_sampled_rows(
    impl: Any, recipe: Recipe, ratio: float, seed: int, data: st.DataObject
) -> None:
    """Logits that do not count are NaN: they must reach neither loss nor gradient."""
    labels = data.draw(labelled(recipe))
    layout, expected = make(recipe), recipe.oracle
    mask = sample_others(tensor(labels), layout, others_ratio=ratio, generator=seeded(seed))
    logits = torch.randn(len(labels), layout.num_logits, generator=seeded(seed))
    clean = logits.clone()
    counted = torch.zeros(logits.shape, dtype=torch.bool)
    for group in range(layout.num_groups):
        counted[:, expected.columns(group)] = mask[:, group : group + 1]
    logits[~counted] = math.nan
    logits.requires_grad_()
    parts = grouped_softmax_loss(
        logits,
        tensor(labels),
        layout,
        others_ratio=ratio,
        generator=seeded(seed),
        reduction="groups",
        impl=impl,
    )
    weights = weights_of(expected, labels, mask.numpy())
    reference = group_losses(expected, clean.double().numpy(), labels, weights)
    np.testing.assert_allclose(parts.detach().numpy(), reference, rtol=1e-6, atol=1e-6)
    (slope,) = torch.autograd.grad(parts.sum(), logits)
    assert not slope[~counted].any(), "a row that does not count has a gradient"
    # Softmax minus one-hot is 0 nowhere for finite logits of a group of two columns or more.
    assert torch.equal(slope != 0, counted)


@pytest.mark.parametrize("impl", IMPLS)
def test_loss_without_generator_draws_as_sample_others(impl: Any) -> None:
    logits = torch.randn(len(MANY), TWO.num_logits, requires_grad=True)
    torch.manual_seed(21)
    mask = sample_others(MANY, TWO)
    torch.manual_seed(21)
    (slope,) = torch.autograd.grad(grouped_softmax_loss(logits, MANY, TWO, impl=impl), logits)
    assert torch.equal(slope[:, 2:4].any(1), mask[:, 1])
    assert torch.equal(slope[:, 4:6].any(1), mask[:, 2])


def test_head_and_module_draw_as_sample_others() -> None:
    logits = torch.randn(len(MANY), TWO.num_logits)
    mask = sample_others(MANY, TWO, others_ratio=3.0, generator=seeded(9))
    expected = grouped_softmax_loss(logits, MANY, TWO, weights=mask.float())
    head = BAGSHead(4, TWO, others_ratio=3.0)
    module = BAGSLoss(TWO, others_ratio=3.0)
    torch.testing.assert_close(head.loss(logits, MANY, generator=seeded(9)), expected)
    torch.testing.assert_close(module(logits, MANY, generator=seeded(9)), expected)
    parts = head.group_losses(logits, MANY, generator=seeded(9))
    torch.testing.assert_close(parts.sum(), expected)


def test_implementations_draw_the_same_rows() -> None:
    logits = torch.randn(len(MANY), TWO.num_logits, dtype=torch.float64)
    values = [
        grouped_softmax_loss(logits, MANY, TWO, generator=seeded(8), reduction="groups", impl=impl)
        for impl in ("torch", "reference")
    ]
    torch.testing.assert_close(*values)


# What is refused ----------------------------------------------------------------------------


@pytest.mark.parametrize("ratio", [-1, -1e-9, math.nan, -math.inf, "8", None, 1j, [8.0]], ids=repr)
def test_bad_ratio(ratio: Any) -> None:
    with pytest.raises(BAD, match="others_ratio"):
        sample_others(MANY, TWO, others_ratio=ratio)


@pytest.mark.parametrize(
    "labels",
    [
        pytest.param(torch.zeros(3), id="float"),
        pytest.param(torch.zeros(3, dtype=torch.bool), id="bool"),
        pytest.param(torch.zeros(3, dtype=torch.complex64), id="complex"),
        pytest.param(torch.zeros(3, 1, dtype=torch.int64), id="2-d"),
        pytest.param(torch.tensor(0), id="0-d"),
        pytest.param([0, 1], id="list"),
        pytest.param(np.zeros(3, dtype=np.int64), id="numpy"),
        pytest.param(None, id="none"),
    ],
)
def test_bad_labels(labels: Any) -> None:
    with pytest.raises(BAD, match="labels"):
        sample_others(labels, TWO)


@pytest.mark.parametrize("value", [3, -1, -99, 2**40, -(2**40)])
def test_label_out_of_range_names_value_and_row(value: int) -> None:
    with pytest.raises(ValueError, match=rf"labels.*{value}\b.*row 2"):
        sample_others(tensor([0, IGNORE, value, 1]), TWO)


def test_background_label_is_out_of_range_without_background() -> None:
    with pytest.raises(ValueError, match=r"got 2 at row 1"):
        sample_others(tensor([0, 2]), TWO_NONE)


@pytest.mark.parametrize("layout", [None, [5, 50], {}])
def test_bad_layout(layout: Any) -> None:
    with pytest.raises(BAD, match="layout"):
        sample_others(MANY, layout)


def test_bad_generator() -> None:
    with pytest.raises(BAD, match="generator"):
        sample_others(MANY, TWO, generator=7)  # type: ignore[arg-type]


@pytest.mark.parametrize("ignore_index", [1.0, None, "x", True])
def test_bad_ignore_index(ignore_index: Any) -> None:
    with pytest.raises(BAD, match="ignore_index"):
        sample_others(MANY, TWO, ignore_index=ignore_index)


def test_a_bad_label_that_cannot_be_looked_at_is_ignored() -> None:
    torch._dynamo.reset()
    layout = GroupLayout.from_counts([3, 50])
    layout.tables("cpu")
    sample = torch.compile(
        lambda labels: sample_others(labels, layout, others_ratio=math.inf),
        fullgraph=True,
        backend="aot_eager",
    )
    active = sample(torch.tensor([1, 99, 0, -5]))
    expected = sample_others(torch.tensor([1, -100, 0, -100]), layout, others_ratio=math.inf)
    assert torch.equal(active, expected)
