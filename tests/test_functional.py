"""Loss, gradient and scores against the float64 re-expression, and what is refused."""

import math
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from bags_oracle import (
    IGNORE,
    OracleLayout,
    Recipe,
    gradient,
    group_losses,
    labelled,
    normalizers,
    oracle_layout,
    ratios,
    recipes,
    scores,
    weights_of,
)
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from balanced_group_softmax import (
    GroupLayout,
    grouped_softmax_loss,
    grouped_softmax_scores,
    sample_others,
)
from balanced_group_softmax.ops import eager, torch_ops

BAD = (ValueError, TypeError)
IMPLS = ("auto", "torch", "reference")
FAST = ("auto", "torch")
every_impl = pytest.mark.parametrize("impl", IMPLS)
TOLERANCE = 1e-6  # of max(|reference|, 1), in float32


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def make(recipe: Recipe) -> GroupLayout:
    return GroupLayout.from_counts(
        recipe.counts, thresholds=recipe.thresholds, background=recipe.background
    )


def assert_close(ours: Tensor, reference: np.ndarray, tolerance: float = TOLERANCE) -> None:
    assert tuple(ours.shape) == reference.shape
    values = ours.detach().double().numpy()
    error = np.abs(values - reference) / np.maximum(np.abs(reference), 1)
    assert np.isfinite(values).all()
    assert error.size == 0 or error.max() <= tolerance, f"off by {error.max():.2e}"


# A layout with every kind of group: one category, several, never seen.
COUNTS = (0, 3, 50, 500, 700, 20, 5000, 8)
LAYOUT = GroupLayout.from_counts(COUNTS)
ORACLE = oracle_layout(COUNTS)
ROWS = 40
LABELS = torch.tensor(([0, 1, 2, 0, 3, 0, 7, 4, 0, IGNORE, 5, 0, 0, 8, 6, 0] * 3)[:ROWS])


def logits_of(rows: int = ROWS, layout: GroupLayout = LAYOUT, scale: float = 2.0) -> Tensor:
    return torch.randn(rows, layout.num_logits, generator=seeded(1)) * scale


def run(logits: Tensor, impl: Any = "auto", seed: int = 3, **options: Any) -> Tensor:
    """The loss of each group of the layout above."""
    return grouped_softmax_loss(
        logits, LABELS, LAYOUT, generator=seeded(seed), impl=impl, reduction="groups", **options
    )


def expected_weights(seed: int = 3, ratio: float = 8.0) -> np.ndarray:
    mask = sample_others(LABELS, LAYOUT, others_ratio=ratio, generator=seeded(seed))
    return weights_of(ORACLE, LABELS.tolist(), mask.numpy())


# The oracle itself --------------------------------------------------------------------------


@given(recipes(), st.integers(0, 1000), st.data())
def test_oracle_gradient_is_that_of_finite_differences(
    recipe: Recipe, seed: int, data: st.DataObject
) -> None:
    layout, labels = recipe.oracle, data.draw(labelled(recipe, max_rows=3))
    draw = np.random.default_rng(seed)
    logits = draw.normal(size=(len(labels), layout.num_logits)) * 2
    given_weights = draw.random((len(labels), layout.num_groups)) * draw.integers(0, 3)
    weights = weights_of(layout, labels, given_weights)
    upstream = draw.normal(size=layout.num_groups)
    slope = gradient(layout, logits, labels, weights, upstream)
    step = 1e-5
    for place in np.ndindex(*logits.shape):
        sides = []
        for sign in (1, -1):
            moved = logits.copy()
            moved[place] += sign * step
            sides.append(group_losses(layout, moved, labels, weights) @ upstream)
        assert abs((sides[0] - sides[1]) / (2 * step) - slope[place]) < 1e-8


@given(recipes(), st.integers(0, 1000))
def test_oracle_joint_scores_are_the_short_form(recipe: Recipe, seed: int) -> None:
    layout = oracle_layout(recipe.counts, recipe.thresholds, None)
    logits = np.random.default_rng(seed).normal(size=(3, layout.num_logits)) * 3
    margins = np.zeros((3, layout.num_categories))
    for group in range(layout.num_groups):
        own = logits[:, layout.columns(group)]
        margins[:, list(layout.members_of(group))] = own[:, 1:] - own[:, :1]
    short = np.exp(margins) / np.exp(margins).sum(1, keepdims=True)
    np.testing.assert_allclose(scores(layout, logits), short, rtol=1e-10)


# Equality with the oracle in float32 --------------------------------------------------------


@every_impl
@given(recipes(), ratios(), st.integers(0, 2**31), st.data())
def test_sampled_loss_and_gradient(
    impl: Any, recipe: Recipe, ratio: float, seed: int, data: st.DataObject
) -> None:
    labels = data.draw(labelled(recipe))
    layout, expected = make(recipe), recipe.oracle
    logits = torch.randn(len(labels), layout.num_logits, generator=seeded(seed)) * 2
    logits.requires_grad_()
    mask = sample_others(
        torch.tensor(labels, dtype=torch.int64),
        layout,
        others_ratio=ratio,
        generator=seeded(seed),
    )
    weights = weights_of(expected, labels, mask.numpy())
    parts = grouped_softmax_loss(
        logits,
        torch.tensor(labels, dtype=torch.int64),
        layout,
        others_ratio=ratio,
        generator=seeded(seed),
        reduction="groups",
        impl=impl,
    )
    assert parts.dtype == torch.float32
    exact = logits.detach().double().numpy()
    assert_close(parts, group_losses(expected, exact, labels, weights))
    upstream = torch.randn(layout.num_groups, generator=seeded(seed + 1))
    (slope,) = torch.autograd.grad(parts, logits, upstream)
    reference = gradient(expected, exact, labels, weights, upstream.double().numpy())
    assert_close(slope, reference)
    assert not slope[torch.from_numpy(reference == 0)].any()


@every_impl
@given(
    recipes(), st.integers(0, 2**31), st.booleans(), st.sampled_from([IGNORE, 255, 0]), st.data()
)
def test_weighted_loss_and_gradient(
    impl: Any,
    recipe: Recipe,
    seed: int,
    by_category: bool,
    ignore_index: int,
    data: st.DataObject,
) -> None:
    labels = data.draw(labelled(recipe, ignore_index=ignore_index))
    layout, expected = make(recipe), recipe.oracle
    size = (len(labels), layout.num_groups)
    scale = data.draw(st.sampled_from([0.01, 1.0, 30.0]))
    given_weights = torch.rand(size, generator=seeded(seed)) * scale
    given_weights *= torch.rand(size, generator=seeded(seed + 1)) < 0.7
    category_weights = None
    if by_category:
        category_weights = torch.rand(layout.num_categories, generator=seeded(seed + 2)) * 4
        category_weights *= torch.rand(layout.num_categories, generator=seeded(seed + 3)) < 0.8
    weights = weights_of(
        expected,
        labels,
        given_weights.double().numpy(),
        None if category_weights is None else category_weights.double().numpy(),
        ignore_index,
    )
    logits = torch.randn(len(labels), layout.num_logits, generator=seeded(seed + 4)) * 2
    logits.requires_grad_()
    parts = grouped_softmax_loss(
        logits,
        torch.tensor(labels, dtype=torch.int64),
        layout,
        weights=given_weights,
        category_weights=category_weights,
        ignore_index=ignore_index,
        reduction="groups",
        impl=impl,
    )
    exact = logits.detach().double().numpy()
    assert_close(parts, group_losses(expected, exact, labels, weights))
    (slope,) = torch.autograd.grad(parts.sum(), logits)
    assert_close(slope, gradient(expected, exact, labels, weights))


@every_impl
@given(recipes(), ratios(), st.integers(0, 2**31), st.data())
def test_category_weights_multiply_the_sampled_foreground(
    impl: Any, recipe: Recipe, ratio: float, seed: int, data: st.DataObject
) -> None:
    labels = data.draw(labelled(recipe))
    layout, expected = make(recipe), recipe.oracle
    ids = torch.tensor(labels, dtype=torch.int64)
    category_weights = torch.rand(layout.num_categories, generator=seeded(seed)) * 5
    mask = sample_others(ids, layout, others_ratio=ratio, generator=seeded(seed))
    weights = weights_of(expected, labels, mask.numpy(), category_weights.double().numpy())
    logits = torch.randn(len(labels), layout.num_logits, generator=seeded(seed)) * 2
    logits.requires_grad_()
    parts = grouped_softmax_loss(
        logits,
        ids,
        layout,
        others_ratio=ratio,
        category_weights=category_weights,
        generator=seeded(seed),
        reduction="groups",
        impl=impl,
    )
    exact = logits.detach().double().numpy()
    assert_close(parts, group_losses(expected, exact, labels, weights))
    (slope,) = torch.autograd.grad(parts.sum(), logits)
    assert_close(slope, gradient(expected, exact, labels, weights))


@every_impl
@given(recipes(), st.integers(0, 2**31), st.integers(0, 8))
def test_scores(impl: Any, recipe: Recipe, seed: int, rows: int) -> None:
    layout = make(recipe)
    logits = torch.randn(rows, layout.num_logits, generator=seeded(seed)) * 3
    ours = grouped_softmax_scores(logits, layout, impl=impl)
    assert ours.dtype == torch.float32
    assert ours.shape == (rows, layout.num_labels)
    assert_close(ours, scores(recipe.oracle, logits.double().numpy()))
    assert ((ours >= 0) & (ours <= 1)).all()


@every_impl
def test_lvis_sized_loss_gradient_and_scores(impl: Any) -> None:
    """As many columns and rows as in training: sums are long here."""
    counts = [5] * 294 + [50] * 453 + [500] * 302 + [5000] * 181
    layout, expected = GroupLayout.from_counts(counts), oracle_layout(counts)
    draw = np.random.default_rng(0)
    labels = np.where(draw.random(512) < 0.25, 1 + draw.integers(0, 1230, 512), 0)
    logits = torch.randn(512, layout.num_logits, generator=seeded(0)).requires_grad_()
    ids = torch.from_numpy(labels)
    mask = sample_others(ids, layout, others_ratio=1.0, generator=seeded(1))
    parts = grouped_softmax_loss(
        logits, ids, layout, others_ratio=1.0, generator=seeded(1), reduction="groups", impl=impl
    )
    weights = weights_of(expected, labels.tolist(), mask.numpy())
    exact = logits.detach().double().numpy()
    assert_close(parts, group_losses(expected, exact, labels.tolist(), weights))
    (slope,) = torch.autograd.grad(parts.sum(), logits)
    assert_close(slope, gradient(expected, exact, labels.tolist(), weights))
    # Entries are of the order 1/S: an error relative to 1 alone would hide a wrong one.
    reference = gradient(expected, exact, labels.tolist(), weights)
    np.testing.assert_allclose(slope.double().numpy(), reference, rtol=1e-4, atol=1e-9)
    ours = grouped_softmax_scores(logits[:64].detach(), layout, impl=impl)
    assert_close(ours, scores(expected, exact[:64]))
    np.testing.assert_allclose(ours.double().numpy(), scores(expected, exact[:64]), rtol=1e-5)


# The path that never waits for a device, on the CPU where it can be looked at ---------------


@pytest.fixture
def _not_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    """What `impl="torch"` does on a GPU and under `torch.compile`."""
    monkeypatch.setattr(eager, "cpu_ops", torch_ops)


@pytest.mark.usefixtures("_not_waiting")
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(recipes(), ratios(), st.integers(0, 2**31), st.sampled_from([IGNORE, 255, 0]), st.data())
def test_loss_and_gradient_without_waiting(
    recipe: Recipe, ratio: float, seed: int, ignore_index: int, data: st.DataObject
) -> None:
    labels = data.draw(labelled(recipe, ignore_index=ignore_index))
    layout, expected = make(recipe), recipe.oracle
    ids = torch.tensor(labels, dtype=torch.int64)
    clean = torch.randn(len(labels), layout.num_logits, generator=seeded(seed)) * 2
    category_weights = torch.rand(layout.num_categories, generator=seeded(seed)) * 3
    category_weights *= torch.rand(layout.num_categories, generator=seeded(seed + 1)) < 0.8
    options: dict[str, Any] = {"others_ratio": ratio, "ignore_index": ignore_index}
    mask = sample_others(ids, layout, generator=seeded(seed), **options)
    weights = weights_of(
        expected, labels, mask.numpy(), category_weights.double().numpy(), ignore_index
    )
    logits = clean.clone()
    for group in range(layout.num_groups):
        dead = torch.from_numpy(weights[:, group] == 0)
        logits[dead, expected.columns(group)] = math.nan
    logits.requires_grad_()
    parts = grouped_softmax_loss(
        logits,
        ids,
        layout,
        category_weights=category_weights,
        generator=seeded(seed),
        reduction="groups",
        impl="torch",
        **options,
    )
    exact = clean.double().numpy()
    assert_close(parts, group_losses(expected, exact, labels, weights))
    (slope,) = torch.autograd.grad(parts.sum(), logits)
    reference = gradient(expected, exact, labels, weights)
    assert_close(slope, reference)
    assert not slope[torch.from_numpy(reference == 0)].any()


@pytest.mark.usefixtures("_not_waiting")
@pytest.mark.parametrize("value", [math.nan, math.inf], ids=str)
def test_nan_propagates_without_waiting(value: float) -> None:
    logits = logits_of()
    logits[2, 3] = value
    labels = torch.where(LABELS == IGNORE, 0, LABELS)
    parts = grouped_softmax_loss(
        logits, labels, LAYOUT, others_ratio=math.inf, reduction="groups", impl="torch"
    )
    assert parts.isfinite().tolist() == [True, False, True, True, True]


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiled_loss_and_gradient(dynamic: bool) -> None:
    """Traced in one piece; the values of labels and weights are then not looked at."""
    torch.compiler.reset()
    compiled = torch.compile(
        lambda logits, labels, weights: grouped_softmax_loss(
            logits, labels, LAYOUT, weights=weights, reduction="groups"
        ),
        backend="aot_eager",
        fullgraph=True,
        dynamic=dynamic,
    )
    weights = torch.rand(ROWS, 5, generator=seeded(0))
    logits = logits_of().requires_grad_()
    parts = compiled(logits, LABELS, weights)
    used = weights_of(ORACLE, LABELS.tolist(), weights.double().numpy())
    exact = logits.detach().double().numpy()
    assert_close(parts, group_losses(ORACLE, exact, LABELS.tolist(), used))
    (slope,) = torch.autograd.grad(parts.sum(), logits)
    assert_close(slope, gradient(ORACLE, exact, LABELS.tolist(), used))
    for bad in (9, -1, 2**40):
        labels = LABELS.clone()
        labels[3] = bad
        assert compiled(logits, labels, weights).isnan().all(), bad
    torch.compiler.reset()


# Small facts --------------------------------------------------------------------------------


@every_impl
def test_sum_is_the_plain_sum_over_groups(impl: Any) -> None:
    logits = logits_of()
    total = grouped_softmax_loss(logits, LABELS, LAYOUT, generator=seeded(3), impl=impl)
    assert total.shape == ()
    torch.testing.assert_close(total, run(logits, impl).sum())


@every_impl
def test_group_without_foreground_has_loss_and_gradient_zero(impl: Any) -> None:
    logits = logits_of(6).requires_grad_()
    labels = torch.tensor([0, 3, 0, 0, 0, 0])  # Only the group 10_100 has foreground.
    parts = grouped_softmax_loss(
        logits, labels, LAYOUT, others_ratio=math.inf, reduction="groups", impl=impl
    )
    assert parts[[1, 3, 4]].tolist() == [0, 0, 0]
    assert (parts[[0, 2]] > 0).all()
    (slope,) = torch.autograd.grad(parts.sum(), logits)
    assert not slope[:, ORACLE.columns(1)].any()
    assert slope[:, ORACLE.columns(2)].all()


@every_impl
@pytest.mark.parametrize("value", [0, IGNORE], ids=["all-background", "all-ignored"])
def test_rows_of_one_kind(impl: Any, value: int) -> None:
    logits = logits_of(7).requires_grad_()
    labels = torch.full((7,), value)
    parts = grouped_softmax_loss(logits, labels, LAYOUT, reduction="groups", impl=impl)
    weights = np.zeros((7, 5))
    weights[:, 0] = value == 0
    exact = logits.detach().double().numpy()
    assert_close(parts, group_losses(ORACLE, exact, labels.tolist(), weights))
    (slope,) = torch.autograd.grad(parts.sum(), logits)
    assert_close(slope, gradient(ORACLE, exact, labels.tolist(), weights))


@every_impl
@pytest.mark.parametrize("reduction", ["sum", "groups"])
@pytest.mark.parametrize("grad", [True, False])
def test_zero_rows(impl: Any, reduction: Any, grad: bool) -> None:
    logits = torch.zeros(0, LAYOUT.num_logits, requires_grad=grad)
    labels = torch.zeros(0, dtype=torch.int64)
    loss = grouped_softmax_loss(logits, labels, LAYOUT, reduction=reduction, impl=impl)
    assert loss.tolist() == (0.0 if reduction == "sum" else [0.0] * 5)
    if grad:
        loss.sum().backward()
        assert logits.grad is not None
        assert logits.grad.shape == (0, LAYOUT.num_logits)
    assert grouped_softmax_scores(logits, LAYOUT, impl=impl).shape == (0, 9)


@every_impl
def test_ignored_rows_change_nothing(impl: Any) -> None:
    """Padding a batch with ignored rows of NaN must leave everything else as it was."""
    kept = LABELS != IGNORE
    logits = logits_of()
    poisoned = logits.clone()
    poisoned[~kept] = math.nan
    poisoned.requires_grad_()
    with_padding = run(poisoned, impl, others_ratio=math.inf)
    without = grouped_softmax_loss(
        logits[kept], LABELS[kept], LAYOUT, others_ratio=math.inf, reduction="groups", impl=impl
    )
    torch.testing.assert_close(with_padding, without, rtol=1e-6, atol=1e-6)
    (slope,) = torch.autograd.grad(with_padding.sum(), poisoned)
    assert not slope[~kept].any()
    assert slope.isfinite().all()


@every_impl
def test_weights_replace_the_draw(impl: Any) -> None:
    mask = sample_others(LABELS, LAYOUT, generator=seeded(3))
    logits = logits_of()
    drawn = run(logits, impl)
    given_rows = run(logits, impl, weights=mask.float(), seed=99)
    torch.testing.assert_close(given_rows, drawn, rtol=1e-6, atol=1e-6)


@every_impl
def test_normalizer_is_at_least_one(impl: Any) -> None:
    weights = torch.full((ROWS, 5), 1e-3)
    assert (normalizers(weights.numpy()) == 1).all()
    parts = run(logits_of(), impl, weights=weights)
    reference = group_losses(
        ORACLE,
        logits_of().double().numpy(),
        LABELS.tolist(),
        weights_of(ORACLE, LABELS.tolist(), weights.double().numpy()),
    )
    assert_close(parts, reference)


@every_impl
def test_category_weights_leave_group_zero_alone(impl: Any) -> None:
    plain = run(logits_of(), impl)
    weighted = run(logits_of(), impl, category_weights=torch.full((8,), 3.0))
    assert plain[0] == weighted[0]
    assert not torch.isclose(plain[1:], weighted[1:]).any()


@every_impl
@pytest.mark.parametrize("rows", [1, 2, 3])
def test_few_rows(impl: Any, rows: int) -> None:
    labels = torch.tensor([5, 0, 8])[:rows]
    logits = logits_of(rows).requires_grad_()
    parts = grouped_softmax_loss(logits, labels, LAYOUT, reduction="groups", impl=impl)
    weights = np.zeros((rows, 5))
    weights[:, 0] = 1
    weights[:, 3] = 1
    weights[:, 1] = rows == 3
    exact = logits.detach().double().numpy()
    assert_close(parts, group_losses(ORACLE, exact, labels.tolist(), weights))


@every_impl
def test_inputs_are_left_alone(impl: Any) -> None:
    logits, weights = logits_of(), torch.rand(ROWS, 5)
    category_weights = torch.rand(8)
    inputs = [logits, LABELS, weights, category_weights]
    before = [value.clone() for value in inputs]
    versions = [value._version for value in inputs]
    run(logits.requires_grad_(), impl, weights=weights, category_weights=category_weights).sum()
    grouped_softmax_scores(logits.detach(), LAYOUT, impl=impl)
    for value, old, version in zip(inputs, before, versions, strict=True):
        assert torch.equal(value, old)
        assert value._version == version


# Number formats -----------------------------------------------------------------------------

# How far a correctly rounded gradient is from the true one, relatively: half a unit.
ROUNDING = {torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}


@every_impl
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision_computes_in_float32(impl: Any, dtype: torch.dtype) -> None:
    logits = logits_of().to(dtype).requires_grad_()
    parts = run(logits, impl)
    assert parts.dtype == torch.float32
    weights, exact = expected_weights(), logits.detach().double().numpy()
    assert_close(parts, group_losses(ORACLE, exact, LABELS.tolist(), weights))
    (slope,) = torch.autograd.grad(parts.sum(), logits)
    assert slope.dtype == dtype
    np.testing.assert_allclose(
        slope.double().numpy(),
        gradient(ORACLE, exact, LABELS.tolist(), weights),
        rtol=1.02 * ROUNDING[dtype],
        atol=1e-7,
    )
    ours = grouped_softmax_scores(logits.detach(), LAYOUT, impl=impl)
    assert ours.dtype == torch.float32
    assert_close(ours, scores(ORACLE, exact))


@every_impl
def test_float64_stays_float64(impl: Any) -> None:
    logits = logits_of().double().requires_grad_()
    parts = run(logits, impl)
    assert parts.dtype == torch.float64
    weights, exact = expected_weights(), logits.detach().numpy()
    assert_close(parts, group_losses(ORACLE, exact, LABELS.tolist(), weights), 1e-13)
    (slope,) = torch.autograd.grad(parts.sum(), logits)
    assert_close(slope, gradient(ORACLE, exact, LABELS.tolist(), weights), 1e-13)
    ours = grouped_softmax_scores(logits.detach(), LAYOUT, impl=impl)
    assert ours.dtype == torch.float64
    assert_close(ours, scores(ORACLE, exact), 1e-13)


@every_impl
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("reduction", ["sum", "groups"])
def test_loss_scale_saves_small_gradients(impl: Any, dtype: torch.dtype, reduction: Any) -> None:
    """1/S and the scale of the loss must both be applied before the gradient is rounded.

    Unscaled, these entries are near 2e-7, where float16 has hardly a digit left; a loss scale is
    there to lift them.
    """
    rows, scale = 4096, 2.0**16
    labels = torch.full((rows,), 1)
    logits = torch.zeros(rows, LAYOUT.num_logits, dtype=dtype)
    logits[:, 1] = 7
    logits.requires_grad_()
    parts = grouped_softmax_loss(logits, labels, LAYOUT, reduction=reduction, impl=impl)
    (parts.sum() * scale).backward()
    assert logits.grad is not None
    small = scale / rows / (1 + math.exp(7))
    np.testing.assert_allclose(
        logits.grad[:, 0].double().numpy(), np.full(rows, small), rtol=2.1 * ROUNDING[dtype]
    )


@every_impl
@pytest.mark.parametrize("weight_dtype", [torch.float16, torch.float64], ids=str)
def test_weights_of_another_float_type(impl: Any, weight_dtype: torch.dtype) -> None:
    weights = torch.rand(ROWS, 5, generator=seeded(0)).to(weight_dtype)
    parts = run(logits_of(), impl, weights=weights)
    assert parts.dtype == torch.float32
    reference = group_losses(
        ORACLE,
        logits_of().double().numpy(),
        LABELS.tolist(),
        weights_of(ORACLE, LABELS.tolist(), weights.double().numpy()),
    )
    assert_close(parts, reference)


@every_impl
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast(impl: Any, dtype: torch.dtype) -> None:
    logits = logits_of()
    with torch.autocast("cpu", dtype=dtype):
        parts = run(logits, impl)
        ours = grouped_softmax_scores(logits, LAYOUT, impl=impl)
    assert parts.dtype == ours.dtype == torch.float32
    torch.testing.assert_close(parts, run(logits, impl))
    torch.testing.assert_close(ours, grouped_softmax_scores(logits, LAYOUT, impl=impl))


# Large and non-finite logits ----------------------------------------------------------------


@every_impl
@pytest.mark.parametrize("size", [1e2, 1e4, 1e30], ids=str)
def test_large_logits(impl: Any, size: float) -> None:
    logits = (logits_of().sign() * size).requires_grad_()
    parts = run(logits, impl)
    weights, exact = expected_weights(), logits.detach().double().numpy()
    assert_close(parts, group_losses(ORACLE, exact, LABELS.tolist(), weights))
    (slope,) = torch.autograd.grad(parts.sum(), logits)
    assert_close(slope, gradient(ORACLE, exact, LABELS.tolist(), weights))
    assert_close(grouped_softmax_scores(logits.detach(), LAYOUT, impl=impl), scores(ORACLE, exact))


@every_impl
def test_minus_infinity_is_probability_zero(impl: Any) -> None:
    """-inf away from the label is well defined: a category masked out."""
    logits = logits_of()
    logits[:, 3] = -math.inf  # category 0, which no row here has
    labels = torch.where(LABELS == 1, 2, LABELS)
    logits.requires_grad_()
    parts = grouped_softmax_loss(
        logits, labels, LAYOUT, others_ratio=math.inf, reduction="groups", impl=impl
    )
    mask = sample_others(labels, LAYOUT, others_ratio=math.inf)
    weights = weights_of(ORACLE, labels.tolist(), mask.numpy())
    exact = logits.detach().double().numpy()
    assert_close(parts, group_losses(ORACLE, exact, labels.tolist(), weights))
    (slope,) = torch.autograd.grad(parts.sum(), logits)
    assert_close(slope, gradient(ORACLE, exact, labels.tolist(), weights))
    ours = grouped_softmax_scores(logits.detach(), LAYOUT, impl=impl)
    assert_close(ours, scores(ORACLE, exact))
    assert not ours[:, 1].any()


@every_impl
def test_minus_infinity_at_the_label_is_an_infinite_loss(impl: Any) -> None:
    logits = logits_of(3)
    logits[1, ORACLE.starts[2] + 1] = -math.inf
    labels = torch.tensor([0, 3, 0])
    parts = grouped_softmax_loss(logits, labels, LAYOUT, reduction="groups", impl=impl)
    assert parts[2] == math.inf
    assert parts[[0, 1, 3, 4]].isfinite().all()


@every_impl
@pytest.mark.parametrize("value", [math.nan, math.inf], ids=str)
@pytest.mark.parametrize("group", range(5))
def test_nan_and_inf_of_rows_that_count_propagate(impl: Any, value: float, group: int) -> None:
    logits = logits_of()
    labels = torch.where(LABELS == IGNORE, 0, LABELS)
    logits[4, ORACLE.starts[group]] = value
    logits.requires_grad_()
    parts = grouped_softmax_loss(
        logits, labels, LAYOUT, others_ratio=math.inf, reduction="groups", impl=impl
    )
    assert not parts[group].isfinite()
    others = [g for g in range(5) if g != group]
    assert parts[others].isfinite().all()
    (slope,) = torch.autograd.grad(parts.sum(), logits)
    touched = slope.isnan().any(1).nonzero().flatten().tolist()
    assert touched == [4], "only the row with the value may have a NaN gradient"
    columns = torch.arange(LAYOUT.num_logits)[ORACLE.columns(group)]
    assert set(slope[4].isnan().nonzero().flatten().tolist()) <= set(columns.tolist())


@every_impl
def test_nan_weight_zero_rows_are_never_read(impl: Any) -> None:
    weights = torch.rand(ROWS, 5, generator=seeded(0))
    weights[::3] = 0
    logits = logits_of()
    poisoned = logits.clone()
    poisoned[::3] = math.nan
    poisoned.requires_grad_()
    parts = run(poisoned, impl, weights=weights)
    torch.testing.assert_close(parts, run(logits, impl, weights=weights))
    (slope,) = torch.autograd.grad(parts.sum(), poisoned)
    assert not slope[::3].any()


@every_impl
def test_category_weight_zero_rows_are_never_read(impl: Any) -> None:
    category_weights = torch.ones(8)
    category_weights[2] = 0
    logits = logits_of()
    logits[LABELS == 3, ORACLE.columns(2)] = math.nan
    logits.requires_grad_()
    parts = run(logits, impl, category_weights=category_weights, others_ratio=math.inf)
    assert parts.isfinite().all()
    (slope,) = torch.autograd.grad(parts.sum(), logits)
    assert not slope[LABELS == 3, ORACLE.columns(2)].any()


@every_impl
@pytest.mark.parametrize("background", ["first", "last", None])
def test_nan_scores_stay_in_their_row(impl: Any, background: Any) -> None:
    layout = GroupLayout.from_counts(COUNTS, background=background)
    logits = logits_of(5, layout)
    logits[2] = math.nan
    ours = grouped_softmax_scores(logits, layout, impl=impl)
    assert ours[2].isnan().all()
    assert ours[[0, 1, 3, 4]].isfinite().all()


# Memory layouts -----------------------------------------------------------------------------


def layouts_in_memory() -> dict[str, Callable[[Tensor], Tensor]]:
    def misaligned(values: Tensor) -> Tensor:
        buffer = torch.full((values.numel() + 1,), math.nan)
        buffer[1:] = values.flatten()
        return buffer[1:].view(values.shape)

    def sliced(values: Tensor) -> Tensor:
        wide = torch.full((values.shape[0] * 2, values.shape[1] + 3), math.nan)
        wide[::2, 2:-1] = values
        return wide[::2, 2:-1]

    def every_other_column(values: Tensor) -> Tensor:
        wide = torch.full((values.shape[0], values.shape[1] * 2), math.nan)
        wide[:, ::2] = values
        return wide[:, ::2]

    return {
        "transposed": lambda values: values.t().contiguous().t(),
        "sliced": sliced,
        "every-other-column": every_other_column,
        "misaligned": misaligned,
        "flipped": lambda values: values.flip(1).contiguous().flip(1),
    }


@every_impl
@pytest.mark.parametrize("kind", layouts_in_memory())
def test_strided_logits(impl: Any, kind: str) -> None:
    plain = logits_of().requires_grad_()
    strided = layouts_in_memory()[kind](plain.detach()).detach().requires_grad_()
    assert torch.equal(strided, plain)
    (expected,) = torch.autograd.grad(run(plain, impl).sum(), plain)
    (slope,) = torch.autograd.grad(run(strided, impl).sum(), strided)
    torch.testing.assert_close(slope, expected, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(
        grouped_softmax_scores(strided.detach(), LAYOUT, impl=impl),
        grouped_softmax_scores(plain.detach(), LAYOUT, impl=impl),
    )


@every_impl
def test_expanded_logits(impl: Any) -> None:
    """One row of logits for all: its gradient is the sum over the rows."""
    row = logits_of(1).requires_grad_()
    (slope,) = torch.autograd.grad(run(row.expand(ROWS, -1), impl).sum(), row)
    wide = row.detach().repeat(ROWS, 1).double().numpy()
    reference = gradient(ORACLE, wide, LABELS.tolist(), expected_weights())
    assert_close(slope, reference.sum(0, keepdims=True))


@every_impl
def test_strided_weights_and_labels(impl: Any) -> None:
    weights = torch.rand(5, ROWS, generator=seeded(0)).t()
    labels = torch.stack([LABELS, torch.full_like(LABELS, 77)], 1)[:, 0]
    one = grouped_softmax_loss(logits_of(), labels, LAYOUT, weights=weights, impl=impl)
    two = grouped_softmax_loss(logits_of(), LABELS, LAYOUT, weights=weights.contiguous(), impl=impl)
    torch.testing.assert_close(one, two)


@every_impl
@pytest.mark.parametrize("shape", [(ROWS, 1), (1, 5), (1, 1)], ids=str)
def test_expanded_weights(impl: Any, shape: tuple[int, int]) -> None:
    weights = torch.rand(shape, generator=seeded(0)).expand(ROWS, 5)
    one = run(logits_of(), impl, weights=weights)
    torch.testing.assert_close(one, run(logits_of(), impl, weights=weights.contiguous()))


@pytest.fixture
def _poisoned_memory() -> Iterator[None]:
    """Fresh tensors hold NaN (or the largest integer), as PyTorch offers for tests."""
    before = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    assert torch.empty(8).isnan().all(), "the poison does not work"
    yield
    torch.utils.deterministic.fill_uninitialized_memory = before
    torch.use_deterministic_algorithms(False)


@every_impl
@pytest.mark.usefixtures("_poisoned_memory")
def test_no_uninitialised_memory_is_read(impl: Any) -> None:
    logits = logits_of().requires_grad_()
    parts = run(logits, impl)
    weights, exact = expected_weights(), logits.detach().double().numpy()
    assert_close(parts, group_losses(ORACLE, exact, LABELS.tolist(), weights))
    (slope,) = torch.autograd.grad(parts.sum(), logits)
    assert_close(slope, gradient(ORACLE, exact, LABELS.tolist(), weights))
    for background in ("first", "last", None):
        layout = GroupLayout.from_counts(COUNTS, background=background)
        values = logits_of(4, layout)
        expected = scores(oracle_layout(COUNTS, background=background), values.double().numpy())
        assert_close(grouped_softmax_scores(values, layout, impl=impl), expected)


# Autograd -----------------------------------------------------------------------------------


def reference_gradient(logits: Tensor, upstream: np.ndarray | None = None) -> np.ndarray:
    exact = logits.detach().double().numpy()
    return gradient(ORACLE, exact, LABELS.tolist(), expected_weights(), upstream)


UPSTREAMS = {
    "ones": [1.0] * 5,
    "zeros": [0.0] * 5,
    "one-zero": [1.0, 1.0, 0.0, 1.0, 1.0],
    "negative": [-1.0, 2.0, -3.0, 0.5, 1.0],
    "tiny": [1e-6] * 5,
    "equal": [7.0] * 5,
}


@every_impl
@pytest.mark.parametrize("name", UPSTREAMS)
def test_any_upstream_gradient(impl: Any, name: str) -> None:
    upstream = torch.tensor(UPSTREAMS[name])
    logits = logits_of().requires_grad_()
    (slope,) = torch.autograd.grad(run(logits, impl), logits, upstream)
    assert_close(slope, reference_gradient(logits, upstream.double().numpy()))


@every_impl
@pytest.mark.parametrize("scale", [2.0**16, 2.0**-20, 0.0, -1.0], ids=str)
def test_scaled_loss(impl: Any, scale: float) -> None:
    logits = logits_of().requires_grad_()
    (run(logits, impl).sum() * scale).backward()
    assert logits.grad is not None
    reference = reference_gradient(logits) * scale
    values = logits.grad.double().numpy()
    np.testing.assert_allclose(values, reference, rtol=1e-4, atol=1e-7 * abs(scale))


@every_impl
def test_nan_upstream_reaches_only_the_rows_that_count(impl: Any) -> None:
    """An overflowing loss scale must be seen by the scaler, and rows left out stay out."""
    logits = logits_of().requires_grad_()
    (run(logits, impl).sum() * math.inf).backward()
    assert logits.grad is not None
    counted = torch.from_numpy(reference_gradient(logits) != 0)
    assert not logits.grad[counted].isfinite().any()
    assert not logits.grad[~counted].any()


@every_impl
def test_backward_twice_with_retain_graph(impl: Any) -> None:
    logits = logits_of().requires_grad_()
    loss = run(logits, impl).sum()
    reference = reference_gradient(logits)
    for times in (1, 2, 3):
        loss.backward(retain_graph=True)
        assert logits.grad is not None
        assert_close(logits.grad, times * reference)
        assert_close(torch.autograd.grad(loss, logits, retain_graph=True)[0], reference)
    loss.backward()
    assert_close(logits.grad, 4 * reference)
    with pytest.raises(RuntimeError, match="second time"):
        loss.backward()


@every_impl
def test_a_gradient_in_the_hands_of_the_caller_is_his(impl: Any) -> None:
    """Clipping in place must not reach what a retained graph gives next time."""
    logits = logits_of().requires_grad_()
    loss = run(logits, impl).sum()
    (first,) = torch.autograd.grad(loss, logits, retain_graph=True)
    first.zero_()
    (second,) = torch.autograd.grad(loss, logits, retain_graph=True)
    assert_close(second, reference_gradient(logits))
    logits.grad = None
    loss.backward(retain_graph=True)
    assert logits.grad is not None
    logits.grad.mul_(100)
    (third,) = torch.autograd.grad(loss, logits)
    assert_close(third, reference_gradient(logits))


@every_impl
def test_retained_graph_with_two_upstreams(impl: Any) -> None:
    logits = logits_of().requires_grad_()
    parts = run(logits, impl)
    for upstream in (torch.tensor([2.0, 0, 1, 0, -1]), torch.ones(5)):
        (slope,) = torch.autograd.grad(parts, logits, upstream, retain_graph=True)
        assert_close(slope, reference_gradient(logits, upstream.double().numpy()))


@every_impl
def test_gradients_accumulate_over_losses(impl: Any) -> None:
    logits = logits_of().requires_grad_()
    (run(logits, impl).sum() + run(logits, impl).sum()).backward()
    run(logits, impl).sum().backward()
    assert logits.grad is not None
    assert_close(logits.grad, 3 * reference_gradient(logits))


@every_impl
@pytest.mark.parametrize("changed", ["logits", "labels", "weights"])
def test_inputs_changed_before_backward(impl: Any, changed: str) -> None:
    """Either autograd notices, or the gradient is that of the values the loss was made of."""
    leaf = logits_of().requires_grad_()
    logits, labels = leaf * 1, LABELS.clone()
    weights = torch.rand(ROWS, 5, generator=seeded(0))
    loss = grouped_softmax_loss(logits, labels, LAYOUT, weights=weights, impl=impl)
    exact = logits.detach().double().numpy().copy()
    used = weights_of(ORACLE, LABELS.tolist(), weights.double().numpy().copy())
    with torch.no_grad():
        {"logits": logits, "labels": labels, "weights": weights}[changed].zero_()
    try:
        (slope,) = torch.autograd.grad(loss, leaf)
    except RuntimeError as error:
        if "inplace" in str(error):
            return
        raise
    assert_close(slope, gradient(ORACLE, exact, LABELS.tolist(), used))


@every_impl
def test_gradient_reaches_what_made_the_logits(impl: Any) -> None:
    linear = torch.nn.Linear(6, LAYOUT.num_logits)
    features = torch.randn(ROWS, 6, generator=seeded(2))
    logits = linear(features)
    run(logits, impl).sum().backward()
    reference = reference_gradient(logits).T @ features.double().numpy()
    assert linear.weight.grad is not None
    assert_close(linear.weight.grad, reference, 1e-5)


@every_impl
def test_no_gradient_asked_for(impl: Any) -> None:
    plain = logits_of()
    assert not run(plain, impl).requires_grad
    with torch.no_grad():
        assert not run(plain.clone().requires_grad_(), impl).requires_grad
    with torch.inference_mode():
        inside = run(plain, impl)
    torch.testing.assert_close(inside, run(plain, impl))


@every_impl
def test_tables_made_in_inference_mode_serve_training(impl: Any) -> None:
    layout = GroupLayout.from_counts(COUNTS)
    with torch.inference_mode():
        grouped_softmax_scores(logits_of(3), layout, impl=impl)
        grouped_softmax_loss(logits_of(3), LABELS[:3], layout, impl=impl)
    logits = logits_of(3).requires_grad_()
    grouped_softmax_loss(logits, LABELS[:3], layout, impl=impl).backward()
    assert logits.grad is not None


@given(recipes(max_categories=5), st.booleans(), st.integers(0, 1000), st.data())
def test_reference_passes_gradcheck(
    recipe: Recipe, weighted: bool, seed: int, data: st.DataObject
) -> None:
    labels = torch.tensor(data.draw(labelled(recipe, max_rows=3)), dtype=torch.int64)
    layout = make(recipe)
    logits = torch.randn(
        len(labels), layout.num_logits, generator=seeded(seed), dtype=torch.float64
    ).requires_grad_()
    weights = torch.rand(len(labels), layout.num_groups, generator=seeded(seed))

    def loss(values: Tensor) -> Tensor:
        return grouped_softmax_loss(
            values,
            labels,
            layout,
            weights=weights if weighted else None,
            generator=seeded(seed),
            reduction="groups",
            impl="reference",
        )

    assert torch.autograd.gradcheck(loss, (logits,))


def test_reference_has_second_derivatives() -> None:
    logits = logits_of().double()[:6].requires_grad_()

    def loss(values: Tensor) -> Tensor:
        return grouped_softmax_loss(
            values, LABELS[:6], LAYOUT, others_ratio=math.inf, impl="reference"
        )

    assert torch.autograd.gradgradcheck(loss, (logits,))


@pytest.mark.parametrize("impl", FAST)
@pytest.mark.parametrize("with_loss", [False, True], ids=["penalty-alone", "loss-and-penalty"])
def test_second_derivative_of_the_fast_path_is_refused(impl: Any, with_loss: bool) -> None:
    """A gradient penalty must raise: silently it would add nothing to the gradient."""
    logits = logits_of().requires_grad_()
    loss = run(logits, impl).sum()

    def penalise() -> None:
        (slope,) = torch.autograd.grad(loss, logits, create_graph=True)
        penalty = slope.square().sum()
        (loss + penalty if with_loss else penalty).backward()

    with pytest.raises(RuntimeError, match=r"reference"):
        penalise()


@every_impl
@pytest.mark.parametrize("background", ["first", "last", None])
def test_scores_are_differentiable(impl: Any, background: Any) -> None:
    layout = GroupLayout.from_counts([3, 50, 60], background=background)
    logits = logits_of(3, layout).double().requires_grad_()
    assert torch.autograd.gradcheck(
        lambda values: grouped_softmax_scores(values, layout, impl=impl), (logits,)
    )


# Reproducible -------------------------------------------------------------------------------


@every_impl
def test_bitwise_reproducible(impl: Any) -> None:
    results = []
    for _ in range(3):
        logits = logits_of().requires_grad_()
        parts = run(logits, impl)
        results.append((parts.detach(), *torch.autograd.grad(parts.sum(), logits)))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@every_impl
def test_scores_in_the_label_convention(impl: Any) -> None:
    logits = logits_of(6)
    by_convention = {
        background: grouped_softmax_scores(
            logits, GroupLayout.from_counts(COUNTS, background=background), impl=impl
        )
        for background in ("first", "last")
    }
    assert torch.equal(by_convention["first"][:, 0], by_convention["last"][:, -1])
    assert torch.equal(by_convention["first"][:, 1:], by_convention["last"][:, :-1])


@every_impl
def test_scores_without_background_sum_to_one(impl: Any) -> None:
    layout = GroupLayout.from_counts(COUNTS, background=None)
    ours = grouped_softmax_scores(logits_of(9, layout), layout, impl=impl)
    torch.testing.assert_close(ours.sum(1), torch.ones(9))


def test_scores_by_hand() -> None:
    """Two categories of two groups; all logits 0: 1/2 background, 1/2 x 1/2 each category."""
    layout = GroupLayout.from_counts([5, 50])
    ours = grouped_softmax_scores(torch.zeros(1, 6), layout)
    assert ours.tolist() == [[0.5, 0.25, 0.25]]


def test_loss_by_hand() -> None:
    """One background row, one of category 0; logits 0: every softmax is over two columns."""
    layout = GroupLayout.from_counts([5, 50])
    parts = grouped_softmax_loss(
        torch.zeros(2, 6), torch.tensor([0, 1]), layout, reduction="groups"
    )
    torch.testing.assert_close(parts, torch.tensor([math.log(2), math.log(2), 0.0]))


# What is refused ----------------------------------------------------------------------------


@every_impl
@pytest.mark.parametrize(
    "logits",
    [
        pytest.param(torch.zeros(3, LAYOUT.num_logits - 1), id="too-narrow"),
        pytest.param(torch.zeros(3, LAYOUT.num_logits + 1), id="too-wide"),
        pytest.param(torch.zeros(0, 1), id="empty-and-narrow"),
        pytest.param(torch.zeros(LAYOUT.num_logits), id="1-d"),
        pytest.param(torch.zeros(3, LAYOUT.num_logits, 1), id="3-d"),
        pytest.param(torch.zeros(3, LAYOUT.num_logits, dtype=torch.int64), id="integers"),
        pytest.param(torch.zeros(3, LAYOUT.num_logits, dtype=torch.complex64), id="complex"),
        pytest.param(torch.zeros(3, LAYOUT.num_logits, dtype=torch.bool), id="bools"),
        pytest.param([[0.0] * LAYOUT.num_logits] * 3, id="list"),
        pytest.param(np.zeros((3, LAYOUT.num_logits), dtype=np.float32), id="numpy"),
        pytest.param(None, id="none"),
    ],
)
def test_bad_logits(impl: Any, logits: Any) -> None:
    with pytest.raises(BAD, match="logits"):
        grouped_softmax_loss(logits, LABELS[:3], LAYOUT, impl=impl)
    with pytest.raises(BAD, match="logits"):
        grouped_softmax_scores(logits, LAYOUT, impl=impl)


def test_wrong_width_names_both() -> None:
    with pytest.raises(ValueError, match=r"14.*15|15.*14"):
        grouped_softmax_loss(torch.zeros(3, 15), LABELS[:3], LAYOUT)


@every_impl
@pytest.mark.parametrize(
    "labels",
    [
        pytest.param(torch.zeros(3), id="float"),
        pytest.param(torch.zeros(3, dtype=torch.bool), id="bool"),
        pytest.param(torch.zeros(2, dtype=torch.int64), id="too-few"),
        pytest.param(torch.zeros(4, dtype=torch.int64), id="too-many"),
        pytest.param(torch.zeros(3, 1, dtype=torch.int64), id="2-d"),
        pytest.param(torch.tensor(0), id="0-d"),
        pytest.param(torch.zeros(3, dtype=torch.int64, device="meta"), id="other-device"),
        pytest.param([0, 0, 0], id="list"),
        pytest.param(None, id="none"),
    ],
)
def test_bad_labels(impl: Any, labels: Any) -> None:
    with pytest.raises(BAD, match="labels"):
        grouped_softmax_loss(logits_of(3), labels, LAYOUT, impl=impl)


@every_impl
@pytest.mark.parametrize("value", [9, -1, 2**40, IGNORE + 1])
@pytest.mark.parametrize("weighted", [False, True])
def test_label_out_of_range_names_value_and_row(impl: Any, value: int, weighted: bool) -> None:
    labels = torch.tensor([0, IGNORE, 8, value, 1])
    weights = torch.ones(5, 5) if weighted else None
    with pytest.raises(ValueError, match=rf"labels.*{value}\b.*row 3"):
        grouped_softmax_loss(logits_of(5), labels, LAYOUT, weights=weights, impl=impl)


def with_value(shape: tuple[int, ...], value: float) -> Tensor:
    tensor = torch.ones(shape)
    tensor.view(-1)[1] = value
    return tensor


BAD_FACTORS: dict[str, Callable[[tuple[int, ...]], Any]] = {
    "too-short": lambda shape: torch.ones(shape[0] - 1, *shape[1:]),
    "extra-dimension": lambda shape: torch.ones(*shape, 1),
    "0-d": lambda shape: torch.tensor(1.0),
    "negative": lambda shape: with_value(shape, -0.5),
    "nan": lambda shape: with_value(shape, math.nan),
    "infinite": lambda shape: with_value(shape, math.inf),
    "complex": lambda shape: torch.ones(shape, dtype=torch.complex64),
    "needs-gradient": lambda shape: torch.ones(shape, requires_grad=True),
    "other-device": lambda shape: torch.ones(shape, device="meta"),
    "list": lambda shape: torch.ones(shape).tolist(),
}


@every_impl
@pytest.mark.parametrize("kind", BAD_FACTORS)
def test_bad_weights(impl: Any, kind: str) -> None:
    with pytest.raises(BAD, match=r"`weights`"):
        run(logits_of(), impl, weights=BAD_FACTORS[kind]((ROWS, 5)))


@every_impl
@pytest.mark.parametrize("kind", [*BAD_FACTORS, "with-background", "integers"])
def test_bad_category_weights(impl: Any, kind: str) -> None:
    extra: dict[str, Any] = {
        "with-background": torch.ones(9),
        "integers": torch.ones(8, dtype=torch.int64),
    }
    value = extra[kind] if kind in extra else BAD_FACTORS[kind]((8,))
    with pytest.raises(BAD, match=r"`category_weights`"):
        run(logits_of(), impl, category_weights=value)


@every_impl
@pytest.mark.parametrize("ratio", [-1.0, -1e-9, math.nan, "8", None], ids=repr)
def test_bad_ratio(impl: Any, ratio: Any) -> None:
    with pytest.raises(BAD, match="others_ratio"):
        run(logits_of(), impl, others_ratio=ratio)


@pytest.mark.parametrize("reduction", ["mean", "none", None, "SUM", 0])
def test_bad_reduction(reduction: Any) -> None:
    with pytest.raises(BAD, match=r"reduction.*sum.*groups"):
        grouped_softmax_loss(logits_of(), LABELS, LAYOUT, reduction=reduction)


@pytest.mark.parametrize("impl", ["cuda", "Torch", "", None, 0])
def test_bad_impl(impl: Any) -> None:
    with pytest.raises(BAD, match=r"impl.*auto"):
        run(logits_of(), impl)
    with pytest.raises(BAD, match=r"impl.*auto"):
        grouped_softmax_scores(logits_of(), LAYOUT, impl=impl)


@pytest.mark.parametrize("layout", [None, (2, 3), "layout"])
def test_bad_layout(layout: Any) -> None:
    with pytest.raises(BAD, match="layout"):
        grouped_softmax_loss(logits_of(), LABELS, layout)
    with pytest.raises(BAD, match="layout"):
        grouped_softmax_scores(logits_of(), layout)


@pytest.mark.parametrize("ignore_index", [1.0, None, "x", True, 2**70])
def test_bad_ignore_index(ignore_index: Any) -> None:
    with pytest.raises(BAD, match="ignore_index"):
        run(logits_of(), ignore_index=ignore_index)


def test_triton_on_cpu_says_why_not(monkeypatch: pytest.MonkeyPatch) -> None:
    """A forced implementation that cannot serve raises, and names every reason."""
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)  # it would serve
    with pytest.raises((ValueError, RuntimeError, NotImplementedError), match=r"triton") as caught:
        run(logits_of(), "triton")
    assert "cpu" in str(caught.value).lower()
    with pytest.raises((ValueError, RuntimeError, NotImplementedError), match=r"triton"):
        grouped_softmax_scores(logits_of(), LAYOUT, impl="triton")


def test_oracle_is_of_the_same_layout() -> None:
    assert isinstance(ORACLE, OracleLayout)
    assert ORACLE.sizes == LAYOUT.group_sizes


def test_logits_that_cannot_be_computed_with_are_refused() -> None:
    layout = GroupLayout.from_counts([3, 50])
    labels = torch.zeros(2, dtype=torch.int64)
    float8 = torch.zeros(2, layout.num_logits).to(torch.float8_e4m3fn)
    with pytest.raises(TypeError, match=r"float16, bfloat16, float32, float64, got .*float8"):
        grouped_softmax_loss(float8, labels, layout)
    with pytest.raises(TypeError, match=r"dense tensor, got torch\.sparse_coo"):
        grouped_softmax_scores(torch.zeros(2, layout.num_logits).to_sparse(), layout)


def test_a_generator_must_be_one() -> None:
    layout = GroupLayout.from_counts([3, 50])
    with pytest.raises(TypeError, match=r"torch\.Generator or None, got int"):
        sample_others(torch.zeros(2, dtype=torch.int64), layout, generator=3)  # type: ignore[arg-type]
