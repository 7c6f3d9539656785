"""Which implementation computes: the one that was asked for, or the fastest that can."""

from __future__ import annotations

import importlib.util
from types import ModuleType

import torch

from balanced_group_softmax.ops import reference, torch_ops

IMPLEMENTATIONS = ("auto", "triton", "torch", "reference")


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
    if impl == "triton":
        reasons = why_not_triton(device)
        if reasons:
            raise RuntimeError(
                f"impl='triton' cannot serve: {'; '.join(reasons)}. "
                f"impl='auto' takes the fastest that can"
            )
    return torch_ops


def check_impl(impl: str) -> None:
    """Raise ValueError unless `impl` is one of `IMPLEMENTATIONS`."""
    if impl not in IMPLEMENTATIONS:
        raise ValueError(f"Expected `impl` to be one of {IMPLEMENTATIONS}, got {impl!r}")


def why_not_triton(device: torch.device) -> list[str]:
    """Every reason why the Triton kernels cannot serve this device; empty if they can."""
    reasons = ["this version of balanced-group-softmax has no Triton kernels yet"]
    if importlib.util.find_spec("triton") is None:
        reasons.append("triton is not installed")
    if device.type != "cuda":
        reasons.append(f"the tensors are on {device.type!r} and Triton needs a CUDA or ROCm device")
    return reasons
