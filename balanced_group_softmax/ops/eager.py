"""Which implementation serves a call that is not being traced."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
from types import ModuleType

import torch

from balanced_group_softmax.ops import cpu_ops, reference, torch_ops

FIRST_CAPABILITY = (7, 0)
"""The oldest CUDA compute capability that Triton compiles for."""


def choose(impl: str, device: torch.device) -> ModuleType:
    """The module of operations for tensors on a device.

    Each has `sample_others`, `group_losses` and `group_scores` as `reference` has them.

    Raises:
        RuntimeError: if `impl` was asked for and cannot serve, with every reason.
    """
    if impl == "reference":
        return reference
    if impl == "triton":
        require_triton(device)
        return _triton_ops()
    if impl == "auto" and device.type == "cuda" and triton_serves(device):
        return _triton_ops()
    return cpu_ops if device.type == "cpu" else torch_ops


def require_triton(device: torch.device) -> None:
    """Raise RuntimeError, with every reason, if the Triton kernels cannot serve a device."""
    reasons = _reasons(device)
    if reasons:
        raise RuntimeError(
            f"impl='triton' cannot serve: {reasons}. impl='auto' takes the fastest that can"
        )


def _reasons(device: torch.device) -> str:
    return "; ".join(why_not_triton(device))


def triton_serves(device: torch.device) -> bool:
    """Whether `impl="auto"` takes the Triton kernels for a device; decided once."""
    return _triton_serves(device)


# Whoever traces a graph takes their answers for constants and does not look into them. This is
# what `torch.compiler.assume_constant_result` does, which would import TorchDynamo, and Triton.
for _constant in (_reasons, triton_serves):
    _constant.__dict__["_dynamo_marked_constant"] = True


@functools.lru_cache
def _triton_serves(device: torch.device) -> bool:
    return device.type == "cuda" and not _is_interpreting() and not why_not_triton(device)


def why_not_triton(device: torch.device) -> list[str]:
    """Every reason why the Triton kernels cannot serve a device; empty if they can."""
    reasons = []
    installed = importlib.util.find_spec("triton") is not None
    if not installed:
        reasons.append("triton is not installed")
    if device.type == "cuda":
        capability = torch.cuda.get_device_capability(device)
        if torch.version.hip is None and capability < FIRST_CAPABILITY:
            needed, found = (".".join(map(str, pair)) for pair in (FIRST_CAPABILITY, capability))
            reasons.append(f"the GPU has compute capability {found} and Triton needs {needed}")
        if installed and not _is_interpreting():
            reasons += _why_no_driver()
    elif device.type != "cpu" or not _is_interpreting():
        reasons.append(f"the tensors are on {device.type!r} and Triton needs a CUDA or ROCm device")
    return reasons


@functools.lru_cache
def _why_no_driver() -> tuple[str, ...]:
    """Why Triton cannot reach GPUs, which takes a C compiler and Python's headers; empty if not."""
    try:
        importlib.import_module("triton.runtime").driver.active.get_current_target()
    except Exception as error:  # of the compiler, the linker, the system
        reason = " ".join(str(error).split())[:200]
        return (f"Triton cannot use its driver ({type(error).__name__}: {reason})",)
    return ()


def _is_interpreting() -> bool:
    """Whether Triton runs kernels in Python, tensors on the CPU included; slow, for tests."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def _triton_ops() -> ModuleType:
    # Not before it is needed: importing torch does not import Triton.
    return importlib.import_module("balanced_group_softmax.ops.triton_ops")
