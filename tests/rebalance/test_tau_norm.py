"""Tau-normalisation, the rule by which the original selects rows, and the search."""

import math
import re
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from balanced_group_softmax import category_counts
from balanced_group_softmax.adapters.protocol import check_classifier
from balanced_group_softmax.rebalance.tail_subset import tail_categories
from balanced_group_softmax.rebalance.tau_norm import (
    TauSearch,
    balanced_accuracy,
    search_tau,
    tau_normalize,
)
from balanced_group_softmax.rebalance.tau_norm_select import TauSelectClassifier, select_scores


def linear_of(rows: int = 6, columns: int = 5) -> nn.Linear:
    torch.manual_seed(1)
    linear = nn.Linear(columns, rows).double()
    with torch.no_grad():
        linear.weight.mul_(torch.arange(1, rows + 1)[:, None])
    return linear


def normalized(weight: Tensor, tau: float, rows: set[int]) -> list[list[float]]:
    """The definition, number by number."""
    found = []
    for i, row in enumerate(weight.tolist()):
        norm = math.sqrt(math.fsum(value * value for value in row))
        found.append([value / norm**tau if i in rows and norm else value for value in row])
    return found


# --- the formula ---------------------------------------------------------------------------------


@given(
    tau=st.floats(-2, 2),
    background=st.sampled_from(["first", "last", None]),
    select=st.none() | st.sets(st.integers(0, 4)),
)
def test_equals_the_definition(tau: float, background: Any, select: set[int] | None) -> None:
    linear = linear_of(5 + (background is not None))
    categories = set(range(5)) if select is None else select
    rows = {c + (background == "first") for c in categories}
    chosen = None if select is None else sorted(select)
    found = tau_normalize(linear, tau, select=chosen, background=background)
    expected = torch.tensor(normalized(linear.weight, tau, rows), dtype=torch.float64)
    torch.testing.assert_close(found.weight.detach(), expected)
    assert torch.equal(found.bias, linear.bias)
    same = tau_normalize(linear.weight, tau, select=chosen, background=background)
    assert torch.equal(same, found.weight)


def test_real_counts_of_lvis(lvis_data: Any) -> None:
    """A classifier whose norms follow the counts, as trained ones do; the tail is selected."""
    for file, number in (("lvis_v0.5", 1230), ("lvis_v1", 1203)):
        counts = category_counts(lvis_data / f"{file}_train_categories.json")
        assert len(counts) == number
        weight = torch.randn(number + 1, 8, dtype=torch.float64)
        norms = torch.tensor([1.0] + [math.log1p(n) for n in counts], dtype=torch.float64)
        weight *= (norms / weight.norm(dim=1))[:, None]
        for select in (None, tail_categories(counts)):
            rows = set(range(1, number + 1)) if select is None else set((select + 1).tolist())
            assert 0 not in rows
            found = tau_normalize(weight, 0.7, select=select)
            torch.testing.assert_close(
                found, torch.tensor(normalized(weight, 0.7, rows), dtype=torch.float64)
            )


def test_tau_zero_changes_nothing_and_one_makes_unit_norms() -> None:
    linear = linear_of()
    assert torch.equal(tau_normalize(linear, 0.0).weight, linear.weight)
    norms = tau_normalize(linear, 1.0, background="last").weight.norm(dim=1)
    torch.testing.assert_close(norms[:5], torch.ones(5, dtype=torch.float64))
    torch.testing.assert_close(norms[5], linear.weight[5].norm())


def test_rows_of_zeros_stay() -> None:
    weight = torch.tensor([[1.0, 2.0], [0.0, 0.0], [0.0, 3.0]])
    found = tau_normalize(weight, 1.0)
    assert found.tolist() == [[1.0, 2.0], [0.0, 0.0], [0.0, 1.0]]


def test_a_mask_selects_as_indices_do() -> None:
    linear = linear_of()
    mask = torch.tensor([True, False, False, True, False])
    by_mask, by_index = (tau_normalize(linear, 1, select=s).weight for s in (mask, [3, 0]))
    assert torch.equal(by_mask, by_index)
    assert torch.equal(tau_normalize(linear, 1, select=mask.numpy()).weight, by_mask)
    assert torch.equal(tau_normalize(linear, 1, select=[]).weight, linear.weight)


def test_the_layer_is_not_changed_and_shares_nothing() -> None:
    linear = linear_of()
    before = {key: value.clone() for key, value in linear.state_dict().items()}
    found = tau_normalize(linear, 0.0)
    with torch.no_grad():
        found.weight.zero_()
        found.bias.zero_()
    assert all(torch.equal(linear.state_dict()[key], value) for key, value in before.items())
    assert found.weight.requires_grad
    assert tau_normalize(nn.Linear(3, 4, bias=False), 1.0).bias is None


def test_narrow_types_keep_their_type() -> None:
    weight = (300 * torch.randn(4, 64)).to(torch.float16)  # squares do not fit
    found = tau_normalize(weight, 1.0)
    assert found.dtype == torch.float16
    torch.testing.assert_close(found[1:].float().norm(dim=1), torch.ones(3), rtol=1e-3, atol=0)


# --- the rule of the original --------------------------------------------------------------------


@pytest.mark.parametrize("background", ["first", "last"])
def test_select_scores_row_by_row(background: Any) -> None:
    generator = torch.Generator().manual_seed(0)
    plain, other = (torch.rand(60, 5, generator=generator) for _ in range(2))
    select = [1, 2]
    found = select_scores(plain, other, select, background=background)
    at, first = (0, 1) if background == "first" else (4, 0)
    taken = 0
    for row in range(60):
        best = max(range(5), key=lambda column: plain[row, column].item())
        of_other = max(range(5), key=lambda column: other[row, column].item())
        use = best != at and of_other - first in select and of_other != at
        taken += use
        assert torch.equal(found[row], (other if use else plain)[row])
    assert 10 < taken < 50


@pytest.mark.parametrize("background", ["first", "last"])
def test_the_classifier_selects_as_the_function_does(background: Any) -> None:
    linear = linear_of()
    classifier = TauSelectClassifier(linear, 0.8, [0, 3], background=background)
    check_classifier(classifier, background=background)
    assert (classifier.in_features, classifier.num_categories) == (5, 5)
    features = torch.randn(40, 5, dtype=torch.float64)
    twin = tau_normalize(linear, 0.8, background=background)
    plain, other = (layer(features).softmax(dim=1).detach() for layer in (linear, twin))
    expected = select_scores(plain, other, [0, 3], background=background)
    assert (expected != plain).any()
    assert (expected == plain).all(dim=1).any()
    torch.testing.assert_close(classifier.scores(classifier(features)), expected)
    with pytest.raises(RuntimeError, match="Expected no training"):
        classifier.losses(classifier(features), torch.zeros(40).long())
    with pytest.raises(ValueError, match=r"Expected `logits` of shape \[R, 12\], got \[40, 6\]"):
        classifier.scores(plain)


def test_a_checkpoint_of_both_classifiers() -> None:
    classifier = TauSelectClassifier(linear_of(), 0.8, [0, 3])
    state = {f"head.{key}": value for key, value in classifier.state_dict().items()}
    other = TauSelectClassifier.from_state_dict(state, "head.")
    features = torch.randn(40, 5, dtype=torch.float64)
    assert torch.equal(other.scores(other(features)), classifier.scores(classifier(features)))
    assert other.describe() == classifier.describe()
    assert not any(parameter.requires_grad for parameter in other.parameters())
    with pytest.raises(ValueError, match="background 'first' instead of 'last'"):
        TauSelectClassifier(linear_of(), 0.8, [0], background="last").load_state_dict(
            classifier.state_dict()
        )


# --- the search ----------------------------------------------------------------------------------


def held_out() -> tuple[nn.Linear, Tensor, Tensor]:
    """Two categories and background; the rare one's weights are short and lose where it matters."""
    linear = nn.Linear(3, 3, bias=False).double()
    with torch.no_grad():
        linear.weight.copy_(torch.diag(torch.tensor([2.0, 5.0, 0.5])))
    features = torch.tensor(
        [[3.0, 0, 0], [0, 2.0, 0.5], [0, 1.0, 3.0], [0, 2.0, 3.0]], dtype=torch.float64
    )
    return linear, features, torch.tensor([0, 1, 2, 2])


def test_search_finds_the_best_and_the_smallest_of_equals() -> None:
    linear, features, labels = held_out()
    found = search_tau(linear, features, labels)
    assert isinstance(found, TauSearch)
    assert list(found.values) == [step / 10 for step in range(11)]
    for tau, value in found.values.items():
        # Category 2 wins a row if its logit does; both other labels are always right.
        wins = sum(b * 0.5 ** (1 - tau) > a * 5 ** (1 - tau) for a, b in ((1.0, 3.0), (2.0, 3.0)))
        assert value == pytest.approx((1 + 1 + wins / 2) / 3)
    assert found.values[found.tau] == max(found.values.values()) == 1
    assert all(value < 1 for tau, value in found.values.items() if tau < found.tau)


def test_search_by_a_metric_of_ones_own() -> None:
    linear, features, labels = held_out()
    seen = []

    def metric(scores: Tensor, given: Tensor) -> float:
        assert torch.equal(given, labels)
        seen.append(scores)
        return -abs(len(seen) - 2)  # the second is best

    found = search_tau(linear, features, labels, taus=(0.0, 0.3, 1), metric=metric)
    assert found == TauSearch(0.3, {0.0: -1, 0.3: 0, 1.0: -1})
    expected = tau_normalize(linear, 0.3)(features).softmax(dim=1)
    torch.testing.assert_close(seen[1], expected)
    only_rare = search_tau(linear, features, labels, taus=(1.0,), select=[1])
    assert only_rare.values[1.0] < 1  # 1.0 against 3.0 / sqrt, the frequent one as it was


def test_balanced_accuracy() -> None:
    scores = torch.eye(4)[torch.tensor([0, 1, 1, 2, 0, 3])]
    labels = torch.tensor([0, 0, 1, 2, 2, -100])
    # Recalls 1/2, 1, 1/2; label 3 has no row.
    assert balanced_accuracy(scores, labels) == pytest.approx(2 / 3)
    assert balanced_accuracy(scores, labels, [[0, 1], [2], [3]]) == pytest.approx(5 / 8)
    assert balanced_accuracy(scores, labels, [[1, 3]]) == 1


# --- bad input -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: tau_normalize(nn.Conv2d(1, 1, 1), 1), TypeError, "Expected `classifier` to be"),
        (lambda: tau_normalize(torch.ones(3), 1), TypeError, "Expected `classifier` to be"),
        (lambda: tau_normalize(torch.ones(1, 3), 1), ValueError, "a row for each label"),
        (lambda: tau_normalize(torch.ones(3, 3), "1"), TypeError, "Expected `tau` to be a number"),
        (lambda: tau_normalize(torch.ones(3, 3), math.inf), ValueError, "Expected `tau`"),
        (
            lambda: tau_normalize(torch.ones(3, 3), 1, select=[2]),
            ValueError,
            "Expected `select` in [0, 1], got 2",
        ),
        (
            lambda: tau_normalize(torch.ones(3, 3), 1, select=torch.ones(3, dtype=torch.bool)),
            ValueError,
            "Expected `select` as bool [2], got shape [3]",
        ),
        (lambda: tau_normalize(torch.ones(3, 3), 1, background=0), ValueError, "`background`"),
        (lambda: select_scores([], torch.ones(1, 3), [0]), TypeError, "Expected `scores` to be"),
        (
            lambda: select_scores(torch.ones(1, 3), torch.ones(2, 3), [0]),
            ValueError,
            "of one shape [R, num_labels], got [1, 3] and [2, 3]",
        ),
        (
            lambda: search_tau(linear_of(), torch.ones(2, 5).double(), torch.tensor([0, 6])),
            ValueError,
            "Expected `labels` in [0, 5] or -100, got 6 at row 1",
        ),
        (
            lambda: search_tau(linear_of(), torch.ones(2, 5).double(), torch.tensor([0])),
            ValueError,
            "Expected `labels` for 2 rows, got 1",
        ),
        (
            lambda: search_tau(linear_of(), [[1.0]], torch.tensor([0])),
            TypeError,
            "Expected `features` to be a Tensor [N, F]",
        ),
        (
            lambda: search_tau(linear_of(), torch.ones(1, 5).double(), torch.tensor([0]), taus=()),
            ValueError,
            "Expected `taus` with at least one power, got none",
        ),
        (
            lambda: search_tau(
                linear_of(),
                torch.ones(1, 5).double(),
                torch.tensor([0]),
                metric=lambda scores, labels: math.nan,
            ),
            ValueError,
            "Expected a number from `metric`, got NaN for tau 0.0",
        ),
        (
            lambda: balanced_accuracy(torch.ones(1, 2), torch.tensor([-100])),
            ValueError,
            "Expected rows of at least one label",
        ),
        (
            lambda: balanced_accuracy(torch.ones(1, 2), torch.tensor([0]), [[2]]),
            ValueError,
            "Expected `groups[0]` in [0, 1], got [2]",
        ),
    ],
)
def test_bad_input_is_named(call: Any, error: Any, message: str) -> None:
    with pytest.raises(error, match=re.escape(message)):
        call()
