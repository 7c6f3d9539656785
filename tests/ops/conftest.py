"""Fixtures of the tests of the kernels: watched memory, small blocks, and kernels on the CPU."""

import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from balanced_group_softmax.ops import eager

MARGIN = 64  # elements; enough to keep whatever alignment fresh memory has
POISON = 255  # of each byte: a NaN of every floating-point type, and no bool


class WatchedMemory:
    """Fresh tensors full of NaN, with margins at both ends that nobody may write to."""

    def __init__(self) -> None:
        self.margins: list[Tensor] = []
        self.sizes: list[int] = []  # elements

    def allocate(self, shape: tuple[int, ...], dtype: torch.dtype, device: Any) -> Tensor:
        self.sizes.append(math.prod(shape))
        size, margin = self.sizes[-1] * dtype.itemsize, MARGIN * dtype.itemsize
        memory = torch.full((size + 2 * margin,), POISON, dtype=torch.uint8, device=device)
        self.margins += [memory[:margin], memory[-margin:]]
        return memory[margin:-margin].view(dtype).view(shape)

    def check(self) -> None:
        for margin in self.margins:
            assert (margin == POISON).all(), "something wrote beside a fresh tensor"


@pytest.fixture
def watched_memory() -> Iterator[WatchedMemory]:
    """What a launcher allocates without filling it holds NaN, and is not written beside."""
    memory = WatchedMemory()
    empty, new_empty = torch.empty, torch.Tensor.new_empty

    def watched(fresh: Tensor) -> Tensor:
        if fresh.is_meta or fresh.numel() == 0:
            return fresh
        return memory.allocate(fresh.shape, fresh.dtype, fresh.device)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "empty", lambda *args, **kwargs: watched(empty(*args, **kwargs)))
        patch.setattr(
            torch.Tensor,
            "new_empty",
            lambda self, *args, **kwargs: watched(new_empty(self, *args, **kwargs)),
        )
        assert torch.empty(3).isnan().all()
        assert torch.zeros(()).new_empty(()).isnan()
        yield memory
    memory.check()


@pytest.fixture
def cut() -> Iterator[Callable[..., None]]:
    """Sets the sizes by which the launchers cut rows and columns, as in `cut(TILE_SIZE=32)`."""
    from kernel_cases import triton_ops

    with pytest.MonkeyPatch.context() as patch:

        def sizes(**values: int) -> None:
            for name, value in values.items():
                patch.setattr(triton_ops, name, value)
            triton_ops._plan.cache_clear()

        yield sizes
    triton_ops._plan.cache_clear()


@pytest.fixture
def few_programs(cut: Callable[..., None]) -> None:
    """Several rows to a tile and several tiles to a program, as with many thousand rows."""
    cut(MOST_PROGRAMS=2, TILE_SIZE=64)


@pytest.fixture
def triton_instead(monkeypatch: pytest.MonkeyPatch) -> None:
    """The operators launch the Triton kernels on the CPU too, in the interpreter."""
    for reason in eager.why_not_triton(torch.device("cpu")):
        pytest.skip(reason)
    from kernel_cases import triton_ops

    monkeypatch.setattr(eager, "cpu_ops", triton_ops)
