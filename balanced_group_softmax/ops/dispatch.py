"""Which implementation computes: the one that was asked for, or the fastest that can."""

from __future__ import annotations

from types import ModuleType
from typing import Literal, get_args

import torch

from balanced_group_softmax.ops import eager, library, reference, torch_ops

Impl = Literal["auto", "triton", "torch", "reference"]
IMPLEMENTATIONS: tuple[str, ...] = get_args(Impl)


def choose(impl: str, device: torch.device) -> ModuleType:
    """The module of operations for tensors on a device.

    Each has `sample_others`, `group_losses` and `group_scores` with the signatures of
    `reference`.

    Raises:
        ValueError: if `impl` is unknown.
        RuntimeError: if it was asked for and cannot serve, with every reason.
    """
    check_impl(impl)
    if impl == "reference":
        return reference
    if not torch.compiler.is_compiling():
        return eager.choose(impl, device)
    if impl == "triton":
        eager.require_triton(device)
    if device.type == "cpu" or (impl != "torch" and eager.triton_serves(device)):
        return library
    return torch_ops


def choose_for_scores(impl: str, device: torch.device) -> ModuleType:
    """As `choose`: where a graph of plain PyTorch is as fast, or is to be exported, that."""
    if torch.compiler.is_compiling() and (device.type == "cpu" or _is_exporting()):
        return reference if impl == "reference" else torch_ops
    return choose(impl, device)


def check_impl(impl: str) -> None:
    """Raise ValueError unless `impl` is one of `IMPLEMENTATIONS`."""
    if impl not in IMPLEMENTATIONS:
        raise ValueError(f"Expected `impl` to be one of {IMPLEMENTATIONS}, got {impl!r}")


def _is_exporting() -> bool:
    is_exporting = getattr(torch.compiler, "is_exporting", None)  # from torch 2.7
    return is_exporting is not None and bool(is_exporting())
