"""Triton's interpreter as the tests need it: quicker, and at home with the NumPy that there is."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

triton = pytest.importorskip("triton")
tl = pytest.importorskip("triton.language")
interpreter = pytest.importorskip("triton.runtime.interpreter")


def make_fit() -> None:
    """Prepare Triton's language once a launch, and not at every call of every function.

    That takes the interpreter nearly half of its time. Before Triton 3.7 it also asks NumPy for
    the int of an array of one element, which NumPy 2.4 refuses.
    """
    prepare = interpreter._patch_lang
    nothing_to_undo = getattr(interpreter, "_LangPatchScope", lambda: None)

    def prepare_once(function: Any) -> Any:
        seen = [value for value in function.__globals__.values() if value is tl or value is tl.core]
        if not any(tl.core.is_builtin(module.load) for module in seen):
            return nothing_to_undo()
        undo = prepare(function)
        tl.tensor.__index__ = lambda self: int(np.squeeze(self.handle.data))
        return undo

    interpreter._patch_lang = prepare_once


@triton.jit
def _count(number, times):
    for _ in range(0, times):
        tl.store(number, tl.load(number) + 1)


def why_not(device: str) -> str | None:
    """Why kernels cannot be run, although Triton is there; None if they can."""
    number = torch.zeros(1, device=device)
    try:
        _count[(1,)](number, 2)
        error = f"it counts to {number.item():g} and not to 2"
    except Exception as failure:
        error = repr(failure)
    if number.item() == 2:
        return None
    return f"Triton {triton.__version__} does not work with NumPy {np.__version__}: {error}"
