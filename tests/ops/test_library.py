"""The operators of `torch.library`: how they are registered, and what they compute."""

from typing import Any

import pytest
import torch
from library_cases import IGNORE, LAYOUT, LAYOUTS, ROWS, every_device, labels_for, logits_for

from balanced_group_softmax import (
    GroupLayout,
    grouped_softmax_loss,
    grouped_softmax_scores,
)
from balanced_group_softmax.ops import library

OPERATORS = torch.ops.balanced_group_softmax


# Registration ------------------------------------------------------------------------------


def check_draw(layout: GroupLayout, rows: int, ratio: float, device: str) -> None:
    tables, labels = layout.tables(device), labels_for(layout, rows, device)
    keys = torch.randint(9, (len(layout.groups), rows), dtype=torch.int32, device=device)
    torch.library.opcheck(OPERATORS.sample_others, (labels, keys, *tables, ratio, IGNORE))


@every_device
@pytest.mark.parametrize("rows", [0, 1, ROWS])
@pytest.mark.parametrize("kind", ["first", "none", "one-column"])
def test_draw_is_registered_well(kind: str, rows: int, device: str) -> None:
    check_draw(LAYOUTS[kind], rows, ratio=1.0, device=device)


def loss_arguments(
    layout: GroupLayout,
    rows: int = ROWS,
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
    weights: str = "drawn",
    by_category: bool = False,
    reduction: str = "groups",
) -> tuple[Any, ...]:
    logits, labels = logits_for(layout, rows, device, dtype), labels_for(layout, rows, device)
    row_weights = torch.rand(rows, layout.num_groups, device=device)
    normalizers = None
    if weights == "drawn":  # with counts, and stored by group
        row_weights = (row_weights.T.contiguous() < 0.7).T
        normalizers = row_weights.sum(dim=0).clamp(min=1).float()
    category_weights = torch.rand(layout.num_categories, device=device) if by_category else None
    return (
        logits.requires_grad_(),
        labels,
        row_weights,
        category_weights,
        normalizers,
        *layout.tables(device),
        IGNORE,
        reduction,
    )


# Each option on its own: together they would say no more.
LOSSES: dict[str, dict[str, Any]] = {
    "no-rows": {"rows": 0},
    "one-row": {"rows": 1},
    "drawn": {},
    "given": {"weights": "given"},
    "by-category": {"weights": "given", "by_category": True},
    "sum": {"reduction": "sum"},
    "sum-of-none": {"rows": 0, "reduction": "sum"},
    "float16": {"dtype": torch.float16},
    "bfloat16": {"dtype": torch.bfloat16},
    "float64": {"dtype": torch.float64},
    "last": {"layout": LAYOUTS["last"], "by_category": True},
    "none": {"layout": LAYOUTS["none"], "by_category": True},
    "one-softmax": {"layout": LAYOUTS["one-softmax"]},
    "one-column": {"layout": LAYOUTS["one-column"]},
}


@every_device
@pytest.mark.parametrize("kind", LOSSES)
def test_loss_is_registered_well(kind: str, device: str) -> None:
    arguments = loss_arguments(**{"layout": LAYOUT, "device": device, **LOSSES[kind]})
    torch.library.opcheck(OPERATORS.group_losses, arguments)


@every_device
@pytest.mark.parametrize("kind", LOSSES)
def test_gradient_is_registered_well(kind: str, device: str) -> None:
    arguments = loss_arguments(**{"layout": LAYOUT, "device": device, **LOSSES[kind]})
    losses = OPERATORS.group_losses(*arguments).detach()
    logits = arguments[0].detach()
    check = torch.library.opcheck
    check(OPERATORS.group_losses_backward, (torch.rand_like(losses), logits, *arguments[1:]))


@every_device
@pytest.mark.parametrize("kind", ["transposed", "columns"])
def test_strided_logits_are_registered_well(kind: str, device: str) -> None:
    """The gradient is contiguous whatever the logits are."""
    logits, *rest = loss_arguments(LAYOUT, device=device)
    strided = torch.cat([logits, logits], dim=1)[:, : LAYOUT.num_logits]
    if kind == "transposed":
        strided = logits.T.contiguous().T
    strided = strided.detach().requires_grad_()
    assert not strided.is_contiguous()
    torch.library.opcheck(OPERATORS.group_losses, (strided, *rest))
    torch.library.opcheck(OPERATORS.group_scores, (strided.detach(), *LAYOUT.tables(device)))


@every_device
@pytest.mark.parametrize("rows", [0, 1, ROWS])
@pytest.mark.parametrize("kind", ["first", "last", "none"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_scores_are_registered_well(kind: str, rows: int, dtype: torch.dtype, device: str) -> None:
    layout = LAYOUTS[kind]
    logits = logits_for(layout, rows, device, dtype)
    torch.library.opcheck(OPERATORS.group_scores, (logits, *layout.tables(device)))


@pytest.mark.usefixtures("triton_instead")
@pytest.mark.parametrize("kind", ["first", "none"])
def test_triton_behind_the_operators(kind: str) -> None:
    layout = LAYOUTS[kind]
    check_draw(layout, 5, ratio=1.0, device="cpu")
    arguments = loss_arguments(layout, 5, weights="given", by_category=True)
    torch.library.opcheck(OPERATORS.group_losses, arguments)
    gradient_arguments = (torch.rand(layout.num_groups), arguments[0].detach(), *arguments[1:])
    torch.library.opcheck(OPERATORS.group_losses_backward, gradient_arguments)
    scores_arguments = (logits_for(layout, 2), *layout.tables("cpu"))
    torch.library.opcheck(OPERATORS.group_scores, scores_arguments)


# Values -------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["first", "last", "none"])
def test_operators_compute_what_the_functions_do(kind: str) -> None:
    layout = LAYOUTS[kind]
    logits, labels = logits_for(layout).requires_grad_(), labels_for(layout)
    tables = layout.tables("cpu")
    weights = torch.rand(ROWS, layout.num_groups)
    factors = torch.rand(layout.num_groups)
    ours = library.group_losses(
        logits,
        labels,
        weights,
        tables,
        category_weights=None,
        normalizers=None,
        ignore_index=IGNORE,
        reduction="groups",
    )
    expected = grouped_softmax_loss(logits, labels, layout, weights=weights, reduction="groups")
    assert torch.equal(ours, expected)
    torch.testing.assert_close(
        torch.autograd.grad(ours, logits, factors), torch.autograd.grad(expected, logits, factors)
    )
    scores = library.group_scores(logits.detach(), tables)
    assert torch.equal(scores, grouped_softmax_scores(logits.detach(), layout))


@pytest.mark.parametrize("bad", [-1, "num_labels", 2**40, -(2**40)], ids=str)
@pytest.mark.parametrize("reduction", ["groups", "sum"])
@pytest.mark.parametrize("kind", ["first", "none"])
def test_operators_take_a_bad_label(kind: str, reduction: str, bad: Any) -> None:
    """Every loss is NaN, and the gradient that of a batch in which the row is ignored."""
    arguments = list(loss_arguments(LAYOUTS[kind], weights="given", reduction=reduction))
    arguments[1][5] = IGNORE
    good = OPERATORS.group_losses(*arguments)
    (expected,) = torch.autograd.grad(good.sum(), arguments[0])
    arguments[1] = arguments[1].clone()
    arguments[1][5] = LAYOUTS[kind].num_labels if bad == "num_labels" else bad
    losses = OPERATORS.group_losses(*arguments)
    assert losses.isnan().all()
    (slope,) = torch.autograd.grad(losses.sum(), arguments[0])
    assert torch.equal(slope, expected)


def test_a_second_derivative_is_refused() -> None:
    arguments = loss_arguments(LAYOUT)
    (slope,) = torch.autograd.grad(
        OPERATORS.group_losses(*arguments).sum(), arguments[0], create_graph=True
    )
    with pytest.raises(RuntimeError, match="group_losses_backward"):
        slope.square().sum().backward()
