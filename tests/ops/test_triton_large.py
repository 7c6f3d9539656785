"""Matrices of more than 2^31 elements, which need a GPU and some 30 GB of its memory."""

from typing import Any

import pytest
import torch
from kernel_cases import DEVICE, loss_of, triton_ops
from torch import Tensor

from balanced_group_softmax import GroupLayout

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(DEVICE != "cuda", reason="needs a GPU"),
]
LAYOUT = GroupLayout.from_counts([5] * 294 + [50] * 453 + [500] * 302 + [5000] * 181)
ROWS = 2**31 // LAYOUT.num_logits + 4096
LAST = 1000  # whose first element lies beyond 2^31


@pytest.fixture(autouse=True)
def _memory() -> None:
    needed = 40 * 2**30
    free, _ = torch.cuda.mem_get_info()
    if free < needed:
        pytest.skip(f"{free >> 30} GiB of GPU memory are free, {needed >> 30} GiB needed")


def inputs(dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Logits, labels, and weights of which a third is 0."""
    logits = torch.empty(ROWS, LAYOUT.num_logits, dtype=dtype, device=DEVICE).normal_()
    assert (ROWS - LAST) * LAYOUT.num_logits > 2**31
    labels = torch.randint(0, LAYOUT.num_labels, (ROWS,), device=DEVICE)
    weights = torch.rand(ROWS, LAYOUT.num_groups, device=DEVICE) < 0.67
    return logits, labels, weights


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("transposed", [False, True], ids=["rows", "columns"])
def test_loss_and_gradient(dtype: torch.dtype, transposed: bool) -> None:
    """The last rows have the gradient that they have in a small matrix of their own."""
    logits, labels, weights = inputs(dtype)
    if transposed:
        logits = logits.T.contiguous().T
    counts = weights.sum(dim=0).float()
    own = torch.rand(LAYOUT.num_groups, device=DEVICE) * counts  # of the size of the sums
    last: dict[str, Any] = {"layout": LAYOUT, "normalizers": counts}
    leaf = logits.requires_grad_()
    losses = loss_of(leaf, labels, weights, **last)
    (slope,) = torch.autograd.grad(losses, leaf, own)
    small = logits[-LAST:].detach().contiguous().requires_grad_()
    (expected,) = torch.autograd.grad(
        loss_of(small, labels[-LAST:], weights[-LAST:], **last), small, own
    )
    assert expected.any()
    # Rows are cut into other tiles there, whose sums may be rounded in another order.
    unit = torch.finfo(dtype).eps
    torch.testing.assert_close(slope[-LAST:], expected, rtol=2 * unit, atol=unit**3)
    # The loss of all rows but the last is what is left when the last ones are taken away.
    without = weights.clone()
    without[-LAST:] = False
    rest = loss_of(logits.detach(), labels, without, **last)
    of_last = loss_of(small.detach(), labels[-LAST:], weights[-LAST:], **last)
    torch.testing.assert_close(losses - rest, of_last, rtol=0.01, atol=1e-6)


@pytest.mark.parametrize("transposed", [False, True], ids=["rows", "columns"])
def test_scores(transposed: bool) -> None:
    logits, _, _ = inputs(torch.float16)
    if transposed:
        logits = logits.T.contiguous().T
    tables = LAYOUT.tables(DEVICE)
    scores = triton_ops.group_scores(logits, tables)
    expected = triton_ops.group_scores(logits[-LAST:].contiguous(), tables)
    torch.testing.assert_close(scores[-LAST:], expected, rtol=1e-5, atol=1e-9)
