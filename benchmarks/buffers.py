"""Buffers that take turns, and what is done with them: a loss, scores, a copy."""

from collections.abc import Callable

import torch
from cuda_measures import buffers_that_exceed_the_cache
from records import Case
from torch import Tensor

BUFFERS = 4
LARGE = 128 << 20
"""Bytes of logits from which two buffers do."""


def bytes_of_logits(case: Case) -> int:
    return case.rows * case.logits * getattr(torch, case.dtype).itemsize


def number_of_buffers(case: Case, device: torch.device) -> int:
    """So many that on a GPU none is still in the cache when its turn comes."""
    if device.type == "cuda":
        return buffers_that_exceed_the_cache(bytes_of_logits(case), device)
    return BUFFERS if bytes_of_logits(case) < LARGE else 2


def make_logits(case: Case, number: int, device: torch.device) -> list[Tensor]:
    draw = torch.Generator(device).manual_seed(case.rows)
    dtype = getattr(torch, case.dtype)
    return [
        torch.randn(case.rows, case.logits, generator=draw, device=device).to(dtype)
        for _ in range(number)
    ]


class LossSteps:
    """One loss: forward, backward, both. The logits become leaves that want a gradient.

    With a scale the loss is multiplied by it, as in training in float16.
    """

    def __init__(
        self,
        loss: Callable[[Tensor, Tensor], Tensor],
        logits: list[Tensor],
        labels: list[Tensor],
        scale: float = 1.0,
    ) -> None:
        self.loss, self.labels, self.scale = loss, labels, scale
        self.logits = [value.requires_grad_() for value in logits]
        self.pending: Tensor | None = None

    def forward(self, turn: int) -> Tensor:
        turn %= len(self.logits)
        loss = self.loss(self.logits[turn], self.labels[turn])
        return loss if self.scale == 1 else loss * self.scale

    def prepare(self, turn: int) -> None:
        self.pending = self.forward(turn)

    def backward(self, turn: int) -> None:
        if self.pending is None:
            raise RuntimeError("backward() needs prepare() before it")
        self.pending.backward()

    def both(self, turn: int) -> None:
        self.forward(turn).backward()

    def gradient(self, turn: int) -> Tensor:
        """Both, with the gradient as the result and not left in the logits."""
        loss = self.forward(turn)
        return torch.autograd.grad(loss, self.logits[turn % len(self.logits)])[0]

    def forget(self) -> None:
        self.pending = None
        for logits in self.logits:
            logits.grad = None


class Copies:
    """`copy_` into buffers that are there already."""

    def __init__(self, logits: list[Tensor]) -> None:
        self.sources = [value.detach() for value in logits]
        self.targets = [torch.empty_like(value) for value in self.sources]

    def step(self, turn: int) -> Tensor:
        turn %= len(self.sources)
        return self.targets[turn].copy_(self.sources[turn])
