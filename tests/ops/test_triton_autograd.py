"""The Triton loss as autograd sees it: factors, retained graphs, and what it leaves alone."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from bags_oracle import IGNORE, gradient
from kernel_cases import (
    DEVICE,
    LAYOUT,
    LAYOUTS,
    MARKS,
    ROWS,
    assert_close,
    draw,
    exactly,
    given_weights,
    labels_for,
    logits_for,
    loss_of,
    oracle_of,
    seeded,
    triton_ops,
    weights_that_count,
    with_dead_slices,
)
from torch import Tensor

from balanced_group_softmax import (
    BAGSHead,
    GroupLayout,
    grouped_softmax_loss,
    grouped_softmax_scores,
    sample_others,
)

# Whatever is run here is run with several rows to a tile and several tiles to a program.
pytestmark = [*MARKS, pytest.mark.usefixtures("few_programs")]
Cut = Callable[..., None]
every_dtype = pytest.mark.parametrize(
    "dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str
)


def drawn_loss(logits: Tensor, layout: GroupLayout = LAYOUT, **options: Any) -> Tensor:
    """Of labels that are always the same; a third or so of the matrix counts."""
    labels = labels_for(layout, len(logits))
    active, counts = draw(labels, layout)
    return loss_of(logits, labels, active, layout, normalizers=counts, **options)


def expected_gradient(logits: Tensor, layout: GroupLayout = LAYOUT) -> Any:
    labels = labels_for(layout, len(logits))
    weights = weights_that_count(layout, labels, draw(labels, layout)[0])
    return gradient(oracle_of(layout), exactly(logits), labels.tolist(), weights)


# Factors ------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", [LAYOUT, LAYOUTS["twelve"]], ids=["odd", "twelve"])
def test_sum_is_that_of_the_groups(layout: GroupLayout) -> None:
    logits = logits_for(layout, ROWS).requires_grad_()
    losses = drawn_loss(logits, layout)
    total = drawn_loss(logits, layout, reduction="sum")
    assert total.shape == ()
    assert_close(total, exactly(losses).sum())
    (of_groups,) = torch.autograd.grad(losses.sum(), logits)
    (of_total,) = torch.autograd.grad(total, logits)
    assert torch.equal(of_groups, of_total)


@every_dtype
def test_a_factor_reaches_its_group_alone(dtype: torch.dtype) -> None:
    logits = logits_for(LAYOUT, ROWS, dtype=dtype).requires_grad_()
    losses = drawn_loss(logits)
    (once,) = torch.autograd.grad(losses.sum(), logits, retain_graph=True)
    factors = torch.ones(LAYOUT.num_groups, device=DEVICE, dtype=losses.dtype)
    factors[2], factors[1] = 4, 0
    (slope,) = torch.autograd.grad(losses, logits, factors)
    own, other = (oracle_of(LAYOUT).columns(group) for group in (2, 1))
    expected = once.clone()
    expected[:, own] *= 4
    expected[:, other] = 0
    # A power of two: nothing is rounded, but where a float16 is subnormal.
    smallest = 0 if dtype != torch.float16 else 4 * 2.0**-24
    torch.testing.assert_close(slope, expected, rtol=0, atol=smallest)
    assert once[:, other].any()


# float32 scales the gradient that forward wrote, float16 computes it when the factor is known.
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan], ids=str)
def test_a_factor_that_is_not_finite_stays_where_rows_count(
    value: float, dtype: torch.dtype
) -> None:
    """So does the scale of a loss that has just overflowed."""
    labels = labels_for(LAYOUT, ROWS)
    given = given_weights(LAYOUT, torch.float32)
    category_weights = torch.ones(LAYOUT.num_categories, device=DEVICE)
    category_weights[list(LAYOUT.groups[1])[:2]] = 0  # rows of a weight that do not count
    weights = weights_that_count(LAYOUT, labels, given, category_weights)
    logits = with_dead_slices(logits_for(LAYOUT, ROWS, dtype=dtype), LAYOUT, weights)
    logits.requires_grad_()
    losses = loss_of(logits, labels, given, LAYOUT, category_weights=category_weights)
    (finite,) = torch.autograd.grad(losses.sum(), logits, retain_graph=True)
    factors = torch.ones(LAYOUT.num_groups, device=DEVICE)
    factors[2] = value
    losses = loss_of(logits, labels, given, LAYOUT, category_weights=category_weights)
    (slope,) = torch.autograd.grad(losses, logits, factors)
    own = oracle_of(LAYOUT).columns(2)
    counts = torch.from_numpy(weights[:, 2] > 0).to(DEVICE)
    assert not slope[~counts, own].any()
    assert not slope[counts, own].isfinite().any()
    finite[:, own] = slope[:, own] = 0
    assert torch.equal(slope, finite)


# Graphs -------------------------------------------------------------------------------------


@every_dtype
@pytest.mark.parametrize("factor", [1.0, 3.0])
def test_a_retained_graph_gives_the_same_again(dtype: torch.dtype, factor: float) -> None:
    """And the first gradient is the caller's: what is done to it is not seen by the second."""
    logits = logits_for(LAYOUT, ROWS, dtype=dtype).requires_grad_()
    loss = drawn_loss(logits, reduction="sum") * factor
    (first,) = torch.autograd.grad(loss, logits, retain_graph=True)
    kept = first.clone()
    first.fill_(math.nan)
    (second,) = torch.autograd.grad(loss, logits, retain_graph=True)
    if factor == 1:
        assert torch.equal(second, kept)
    else:  # the first was rounded before it was scaled
        tolerance = {torch.bfloat16: 2.0**-6, torch.float16: 2.0**-10}.get(dtype, 1e-6)
        torch.testing.assert_close(second, kept, rtol=tolerance, atol=1e-7)
    (third,) = torch.autograd.grad(loss, logits)
    assert torch.equal(third, second)
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(loss, logits)


@pytest.mark.parametrize("with_loss", [False, True], ids=["penalty-alone", "loss-and-penalty"])
def test_a_second_derivative_is_refused(with_loss: bool) -> None:
    logits = logits_for(LAYOUT, ROWS).requires_grad_()
    loss = drawn_loss(logits, reduction="sum")
    (slope,) = torch.autograd.grad(loss, logits, create_graph=True)
    penalty = slope.square().sum()
    with pytest.raises(RuntimeError, match="impl='reference' can"):
        (loss + penalty if with_loss else penalty).backward()


def test_gradients_accumulate() -> None:
    logits = logits_for(LAYOUT, ROWS).requires_grad_()
    (drawn_loss(logits).sum() + drawn_loss(logits).sum()).backward()
    drawn_loss(logits).sum().backward()
    assert logits.grad is not None
    assert_close(logits.grad, 3 * expected_gradient(logits))


def test_no_gradient_where_none_is_wanted(watched_memory: Any) -> None:
    plain = logits_for(LAYOUT, ROWS)
    losses = drawn_loss(plain)
    assert not losses.requires_grad
    with torch.inference_mode():
        assert torch.equal(drawn_loss(plain), losses)
    assert watched_memory.sizes
    assert max(watched_memory.sizes) < plain.numel(), "a gradient was allocated"
    with torch.no_grad():
        assert torch.equal(drawn_loss(plain.clone().requires_grad_()), losses)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
def test_arguments_are_left_alone(dtype: torch.dtype) -> None:
    labels, given = labels_for(LAYOUT, ROWS), given_weights(LAYOUT, torch.float32)
    category_weights = torch.rand(LAYOUT.num_categories, generator=seeded(7)).to(DEVICE)
    logits = logits_for(LAYOUT, ROWS, dtype=dtype)
    arguments = [logits, labels, given, category_weights]
    before = [argument.clone() for argument in arguments]
    versions = [argument._version for argument in arguments]
    leaf = logits.requires_grad_()
    losses = loss_of(leaf, labels, given, LAYOUT, category_weights=category_weights)
    (losses.sum() * 3).backward()
    triton_ops.group_scores(logits.detach(), LAYOUT.tables(DEVICE))
    for argument, old, version in zip(arguments, before, versions, strict=True):
        assert torch.equal(argument, old)
        assert argument._version == version


def test_bitwise_reproducible() -> None:
    logits = logits_for(LAYOUT, ROWS).requires_grad_()
    results = []
    for _ in range(3):
        losses = drawn_loss(logits)
        results.append((losses.detach(), *torch.autograd.grad(losses.sum(), logits)))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


# Through the public functions ---------------------------------------------------------------


@pytest.mark.parametrize("background", ["first", "last", None])
def test_public_functions(background: Any) -> None:
    """The same draw and the same values, whoever computes."""
    layout = GroupLayout.from_counts([3, 50, 700, 8, 20, 9000], background=background)
    labels = labels_for(layout, ROWS)
    results = []
    for impl in ("triton", "reference"):
        logits = logits_for(layout, ROWS).requires_grad_()
        generator = torch.Generator(DEVICE).manual_seed(3)
        losses = grouped_softmax_loss(
            logits,
            labels,
            layout,
            others_ratio=1.5,
            generator=generator,
            impl=impl,
            reduction="groups",
        )
        (slope,) = torch.autograd.grad(losses.sum(), logits)
        scores = grouped_softmax_scores(logits[:2].detach(), layout, impl=impl)
        results.append((losses.detach(), slope, scores))
        generator.manual_seed(3)
        active = sample_others(labels, layout, others_ratio=1.5, generator=generator)
        starts = list(layout.group_starts)
        assert torch.equal(slope[:, starts] != 0, active), "not the rows of the public draw"
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)


def test_head() -> None:
    layout = GroupLayout.from_counts([3, 50, 700, 8])
    head = BAGSHead(6, layout, impl="triton", device=DEVICE)
    labels = labels_for(layout, ROWS)
    logits = head(torch.randn(ROWS, 6, device=DEVICE))
    losses = head.losses(logits, labels)
    assert list(losses) == [f"loss_cls_{name}" for name in layout.group_names]
    sum(losses.values(), torch.zeros((), device=DEVICE)).backward()
    assert head.fc.weight.grad is not None
    assert head.fc.weight.grad.isfinite().all()
    assert head.fc.weight.grad.any()


def test_ignored_rows_alone() -> None:
    logits = logits_for(LAYOUT, ROWS).requires_grad_()
    labels = torch.full((ROWS,), IGNORE, device=DEVICE)
    loss = grouped_softmax_loss(logits, labels, LAYOUT, impl="triton")
    assert loss.item() == 0
    loss.backward()
    assert logits.grad is not None
    assert not logits.grad.any()
