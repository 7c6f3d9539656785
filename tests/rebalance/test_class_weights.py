"""Class weights: exact fractions on the real counts of LVIS, and their use in two losses."""

import math
import re
from decimal import Decimal, localcontext
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional as F

from balanced_group_softmax import GroupLayout, category_counts, grouped_softmax_loss
from balanced_group_softmax.rebalance.class_weights import (
    class_balanced_weights,
    inverse_frequency_weights,
)

# --- an independent re-expression ----------------------------------------------------------------

LVIS = ["lvis_v0.5_train_categories.json", "lvis_v1_train_categories.json"]


def inverse(count: int) -> Fraction:
    return Fraction(1, max(count, 1))


def one_over_effective(count: int, beta: Fraction) -> Fraction:
    """One over 1 + beta + beta^2 + ..., `count` terms: the sum, not its closed form."""
    total, term = Fraction(0), Fraction(1)
    for _ in range(max(count, 1)):
        total, term = total + term, term * beta
    return 1 / total


def finished(values: list[Fraction], low: Fraction, high: Fraction) -> list[Fraction]:
    mean = sum(values, Fraction(0)) / len(values)
    return [min(max(value / mean, low), high) for value in values]


CLIP = (Fraction(1, 10), Fraction(5))


def close(found: list[float], exact: list[Fraction], tolerance: float = 1e-12) -> bool:
    pairs = zip(found, exact, strict=True)
    return all(math.isclose(value, float(other), rel_tol=tolerance) for value, other in pairs)


# --- on real counts ------------------------------------------------------------------------------


@pytest.mark.parametrize("file", LVIS)
def test_inverse_frequency_of_real_counts(file: str, lvis_data: Path) -> None:
    counts = category_counts(lvis_data / file)
    weights = inverse_frequency_weights(counts)
    assert weights.dtype == torch.float64
    assert weights[0] == 1
    assert close(weights[1:].tolist(), finished([inverse(n) for n in counts], *CLIP))
    assert int((weights == 5).sum()) > 0
    assert int((weights == 0.1).sum()) > 0


@pytest.mark.parametrize("file", LVIS)
def test_class_balanced_of_real_counts(file: str, lvis_data: Path) -> None:
    counts = category_counts(lvis_data / file)
    weights = class_balanced_weights(counts, background="last")
    # Exact powers of 0.999 have millions of digits; 60 are enough.
    with localcontext() as context:
        context.prec = 60
        beta = Decimal("0.999")
        values = [(1 - beta) / (1 - beta ** max(n, 1)) for n in counts]
        mean = sum(values) / len(values)
        exact = [min(max(value / mean, Decimal("0.1")), Decimal(5)) for value in values]
    assert weights[-1] == 1
    for found, value in zip(weights[:-1].tolist(), exact, strict=True):
        assert math.isclose(found, float(value), rel_tol=1e-10)
    # Beyond a few thousand instances all weigh the same.
    order = np.argsort(counts, kind="stable")
    assert (np.diff(weights[:-1].numpy()[order]) <= 0).all()


def test_class_balanced_is_milder_than_inverse_frequency(lvis_data: Path) -> None:
    counts = category_counts(lvis_data / LVIS[0])
    # Not clipped: the clip hides how far they go.
    milder, harder = (
        weights(counts, clip=None, background=None)
        for weights in (class_balanced_weights, inverse_frequency_weights)
    )
    assert milder.max() / milder.min() < harder.max() / harder.min() / 10


# --- properties ----------------------------------------------------------------------------------

counts_of_few = st.lists(st.integers(0, 300), min_size=1, max_size=8)


@given(counts=counts_of_few, background=st.sampled_from(["first", "last", None]))
def test_inverse_frequency_equals_the_definition(counts: list[int], background: Any) -> None:
    weights = inverse_frequency_weights(counts, background=background).tolist()
    exact = finished([inverse(n) for n in counts], *CLIP)
    front, back = (background == "first") * [Fraction(1)], (background == "last") * [Fraction(1)]
    assert close(weights, front + exact + back)


@given(counts=counts_of_few, beta=st.fractions(0, Fraction(999, 1000), max_denominator=1000))
def test_class_balanced_equals_the_definition(counts: list[int], beta: Fraction) -> None:
    values = [one_over_effective(n, beta) for n in counts]
    found = class_balanced_weights(counts, beta=float(beta), background=None)
    assert close(found.tolist(), finished(values, *CLIP), 1e-9)


@given(counts=counts_of_few)
def test_without_clipping_the_mean_is_one(counts: list[int]) -> None:
    for weights in (inverse_frequency_weights, class_balanced_weights):
        found = weights(counts, clip=None, background=None)
        assert found.mean().item() == pytest.approx(1)


def test_beta_from_none_to_all() -> None:
    counts = [1, 10, 100]
    assert class_balanced_weights(counts, beta=0).tolist() == [1, 1, 1, 1]
    near_one = class_balanced_weights(counts, beta=1 - 1e-12)
    torch.testing.assert_close(near_one, inverse_frequency_weights(counts), rtol=1e-9, atol=0)


def test_count_zero_is_taken_as_one() -> None:
    for weights in (inverse_frequency_weights, class_balanced_weights):
        assert weights([0, 5, 900]).tolist() == weights([1, 5, 900]).tolist()


@pytest.mark.parametrize("kind", [list, tuple, np.array, torch.tensor], ids=lambda k: k.__name__)
def test_counts_may_be_given_in_any_of_the_usual_ways(kind: Any) -> None:
    assert inverse_frequency_weights(kind([1, 2]), clip=None).tolist() == [1, 4 / 3, 2 / 3]


# --- within groups, and in losses ----------------------------------------------------------------


def test_within_groups_equals_each_group_by_itself() -> None:
    counts = [5, 2000, 1, 40, 9000, 30, 0]
    layout = GroupLayout.from_counts(counts)
    assert len(layout.groups) > 2
    for weights in (inverse_frequency_weights, class_balanced_weights):
        found = weights(counts, within=layout.groups, background=None)
        for group in layout.groups:
            alone = weights([counts[c] for c in group], background=None)
            assert found[list(group)].tolist() == alone.tolist()


def test_weights_within_groups_serve_the_grouped_loss() -> None:
    counts = [5, 2000, 1, 40, 9000, 30, 700]
    layout = GroupLayout.from_counts(counts)
    weights = inverse_frequency_weights(counts, within=layout.groups, background=None).float()
    logits = torch.randn(30, layout.num_logits, requires_grad=True)
    labels = torch.arange(30) % layout.num_labels
    active = torch.ones(30, layout.num_groups, dtype=torch.bool)
    found = grouped_softmax_loss(
        logits, labels, layout, weights=active, category_weights=weights, reduction="groups"
    )
    for g in range(1, layout.num_groups):
        start, size = layout.group_starts[g], layout.group_sizes[g]
        bins = layout.bin_labels[g][labels]
        table = torch.ones(size)  # `others` weighs 1
        table[1:] = weights[list(layout.groups[g - 1])]
        # The mean of torch divides by the sum of the weights, as the original does within a group.
        expected = F.cross_entropy(logits[:, start : start + size], bins, weight=table)
        torch.testing.assert_close(found[g], expected)


# --- bad input -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"counts": [1, -2]}, ValueError, "Expected `counts` of at least 0, got -2 at position 1"),
        ({"counts": []}, ValueError, "Expected `counts` of at least one category, got none"),
        ({"counts": [1.5]}, TypeError, "Expected `counts` to be integers"),
        ({"counts": [1], "clip": (0, 5)}, ValueError, "Expected `clip` with 0 < lowest"),
        ({"counts": [1], "clip": (2, 1)}, ValueError, "Expected `clip` with 0 < lowest"),
        ({"counts": [1], "clip": (1,)}, ValueError, "Expected `clip` to be (lowest, highest)"),
        ({"counts": [1], "clip": 3}, TypeError, "Expected `clip` to be a sequence"),
        ({"counts": [1], "background": "middle"}, ValueError, "Expected `background` to be"),
        ({"counts": [1, 2], "within": [[0]]}, ValueError, "Expected `within` to hold each of 0..1"),
        ({"counts": [1, 2], "within": [[0, 1], [1]]}, ValueError, "Expected `within` to hold"),
    ],
)
def test_bad_input_is_named(arguments: dict[str, Any], error: Any, message: str) -> None:
    for weights in (inverse_frequency_weights, class_balanced_weights):
        with pytest.raises(error, match=re.escape(message)):
            weights(**arguments)


@pytest.mark.parametrize("beta", [1.0, -0.1, 1.1, float("nan")])
def test_beta_out_of_range(beta: float) -> None:
    with pytest.raises(ValueError, match=r"Expected `beta` to be in \[0, 1"):
        class_balanced_weights([1, 2], beta=beta)
