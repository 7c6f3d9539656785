"""Arguments in the forms that users have them, checked, with errors that name them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from numbers import Integral, Real
from typing import Any

import numpy as np
import torch
from torch import Tensor


def as_int(value: Any, name: str, *, lowest: int | None = None) -> int:
    """An integer.

    Raises:
        TypeError: if it is not one (a bool is not).
        ValueError: if it is below `lowest`.
    """
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise TypeError(f"Expected `{name}` to be an integer, got {type(value).__name__}")
    if lowest is not None and value < lowest:
        raise ValueError(f"Expected `{name}` of at least {lowest}, got {value}")
    return int(value)


def as_float(
    value: Any, name: str, *, lowest: float = -math.inf, highest: float = math.inf
) -> float:
    """A number, which is not NaN.

    Raises:
        TypeError: if it is not a number (a bool is not).
        ValueError: if it is NaN or out of range.
    """
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"Expected `{name}` to be a number, got {type(value).__name__}")
    value = float(value)
    if not lowest <= value <= highest:  # a NaN fails this as well
        expected = f"in [{lowest:g}, {highest:g}]" if lowest > -math.inf else "a number"
        raise ValueError(f"Expected `{name}` to be {expected}, got {value}")
    return value


def as_int_array(values: Any, name: str) -> np.ndarray:
    """Integers given in any of the usual ways, as a one-dimensional int64 array."""
    if isinstance(values, (str, bytes, Mapping)) or not hasattr(values, "__len__"):
        raise TypeError(f"Expected `{name}` to be a sequence of ints, got {shown(values)}")
    if isinstance(values, Tensor):
        if values.is_meta or values.layout != torch.strided:
            kind = "on the meta device" if values.is_meta else f"of layout {values.layout}"
            raise ValueError(f"Expected `{name}` as a plain tensor with values, got one {kind}")
        floating = values.dtype.is_floating_point  # NumPy does not know all of these types
        array = (values.double() if floating else values).detach().cpu().numpy()
    else:
        try:
            array = np.asarray(values)
        except (ValueError, OverflowError):  # ragged
            raise ValueError(
                f"Expected `{name}` to be a flat sequence of integers, got {shown(values)}"
            ) from None
    if array.ndim != 1:
        raise ValueError(f"Expected `{name}` to be one-dimensional, got shape {list(array.shape)}")
    if array.size == 0:
        return np.zeros(0, dtype=np.int64)
    if np.issubdtype(array.dtype, np.floating) and np.isnan(array).any():
        at = int(np.argmax(np.isnan(array)))
        raise ValueError(f"Expected `{name}` to be integers, got NaN at position {at}")
    # NumPy makes floats or objects of integers that are too large for it.
    listed = array if array.dtype == object else values
    if (
        array.dtype.kind in "fO"
        and isinstance(listed, (list, tuple, np.ndarray))
        and all(type(value) is int for value in listed)
    ):
        largest = max(listed, key=abs)
        raise ValueError(f"Expected `{name}` to fit 64-bit integers, got {shown(largest)}")
    mixed_bools = isinstance(values, (list, tuple)) and any(isinstance(v, bool) for v in values)
    if not np.issubdtype(array.dtype, np.integer) or mixed_bools:
        got = "bool" if mixed_bools else str(array.dtype)
        raise TypeError(f"Expected `{name}` to be integers, got {got}: {shown(values)}")
    if array.dtype == np.uint64 and (array > np.iinfo(np.int64).max).any():
        raise ValueError(f"Expected `{name}` to fit 64-bit signed integers, got {array.max()}")
    return array.astype(np.int64)


def as_tuple(values: Any, name: str) -> tuple[Any, ...]:
    """A sequence as a tuple; TypeError if it is none."""
    if isinstance(values, (str, bytes, Mapping)) or not isinstance(values, Sequence):
        raise TypeError(f"Expected `{name}` to be a sequence, got {shown(values)}")
    return tuple(values)


def as_int_tuple(values: Any, name: str) -> tuple[int, ...]:
    """Integers given in any of the usual ways, as a tuple of ints."""
    return tuple(as_int_array(values, name).tolist())


def shown(value: object) -> str:
    """A value as a message shows it: at most 80 characters."""
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
