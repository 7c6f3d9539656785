"""Reads pickles of nothing but lists, tuples, dicts, text, bytes, numbers and numeric arrays.

A pickle is a program that may call whatever it names. Here it finds, under the few names that
arrays are pickled with, functions of this file that check their arguments and make an array;
every other name is refused before anything is called. NumPy's own code for making arrays of a
pickle does not see it either.
"""

import io
import math
import pickle
import pickletools
import re
import reprlib
from collections.abc import Callable
from typing import Any, BinaryIO

import numpy as np

_MAX_DEPTH = 16
_MAX_REPEATS = 4  # values for each byte of a pickle; without repeats there is at most one
_NUMERIC = re.compile(r"([<>=|]?)([biuf])(1|2|4|8|16)|([?bBhHiIlLqQefd])")


class Refused(pickle.UnpicklingError):
    """The pickle holds more than data."""


class _Callable:
    """A function that a pickle may call, and do nothing else with."""

    __slots__ = ("_call",)

    def __init__(self, call: Callable[..., Any]) -> None:
        self._call = call

    def __call__(self, *args: Any) -> Any:
        return self._call(*args)

    def __setstate__(self, state: Any) -> None:
        raise Refused("Expected arrays, got a pickle that changes functions")


class _Type:
    """A numeric dtype in the making."""

    __slots__ = ("dtype",)

    def __init__(self, spec: Any) -> None:
        if isinstance(spec, bytes):  # of Python 2
            spec = spec.decode("ascii", "replace")
        if not isinstance(spec, str) or not _NUMERIC.fullmatch(spec):
            raise Refused(f"Expected arrays of numbers, got dtype {reprlib.repr(spec)}")
        try:
            self.dtype = np.dtype(spec)
        except TypeError:
            raise Refused(f"Expected arrays of numbers, got dtype {spec!r}") from None

    def __setstate__(self, state: Any) -> None:
        # (version, byte order, subarray, names, fields, item size, alignment, flags[, metadata])
        if not isinstance(state, tuple) or len(state) < 5 or state[2:5] != (None, None, None):
            raise Refused(f"Expected arrays of numbers, got dtype state {reprlib.repr(state)}")
        order = state[1]
        if order not in ("<", ">", "|", "="):
            raise Refused(f"Expected a byte order, got {reprlib.repr(order)}")
        if order in "<>":
            self.dtype = self.dtype.newbyteorder(order)


class Array:
    """An array in the making; `value` once it is made."""

    __slots__ = ("value",)

    value: np.ndarray | None

    def __init__(self) -> None:
        self.value = None

    def __setstate__(self, state: Any) -> None:
        if not isinstance(state, tuple) or len(state) != 5:
            raise Refused(f"Expected the state of an array, got {reprlib.repr(state)}")
        _, shape, dtype, is_fortran, raw = state
        self.value = _make_array(raw, dtype, shape, "F" if is_fortran else "C")


def _make_array(raw: Any, dtype: Any, shape: Any, order: Any) -> np.ndarray:
    if isinstance(raw, str):  # of Python 2
        raw = raw.encode("latin-1", "replace")
    if not isinstance(raw, bytes | bytearray) or not isinstance(dtype, _Type):
        raise Refused(f"Expected an array of numbers, got one of {reprlib.repr(raw)}")
    if not (
        isinstance(shape, tuple)
        and len(shape) <= 8
        and all(type(side) is int and 0 <= side < 2**48 for side in shape)
        and math.prod(shape) * dtype.dtype.itemsize == len(raw)
        and order in ("C", "F")
    ):
        raise Refused(f"Expected {len(raw)} bytes of an array, got shape {reprlib.repr(shape)}")
    if not raw:
        return np.zeros(shape, dtype.dtype)
    return np.frombuffer(raw, dtype.dtype).reshape(shape, order=order)


def _frombuffer(raw: Any, dtype: Any, shape: Any, order: Any) -> Array:
    made = Array()
    made.value = _make_array(raw, dtype, shape, order)
    return made


def _begin_array(kind: Any, shape: Any, code: Any) -> Array:
    if kind is not _NDARRAY:
        raise Refused("Expected plain arrays, got another kind")
    return Array()


def _make_scalar(dtype: Any, raw: Any) -> float | int | bool:
    array = _make_array(raw, dtype, (), "C")
    scalar: float | int | bool = array.item()
    return scalar


def _encode(text: Any, encoding: Any) -> bytes:
    if not isinstance(text, str) or encoding not in ("latin1", "latin-1"):
        raise Refused(f"Expected bytes as latin1 text, got encoding {reprlib.repr(encoding)}")
    return text.encode("latin-1")


def _no_bytes() -> bytes:
    return b""


def _make_type(spec: Any, *_: Any) -> _Type:
    return _Type(spec)


def _not_to_be_called(*_: Any) -> None:
    raise Refused("Expected arrays that NumPy pickled, got another way to make one")


_NDARRAY = _Callable(_not_to_be_called)
_KNOWN: dict[tuple[str, str], _Callable] = {
    ("numpy", "ndarray"): _NDARRAY,
    ("numpy", "dtype"): _Callable(_make_type),
    ("_codecs", "encode"): _Callable(_encode),  # bytes in protocol 2
    ("builtins", "bytes"): _Callable(_no_bytes),
    ("__builtin__", "bytes"): _Callable(_no_bytes),
}
for _core in ("numpy.core", "numpy._core"):  # NumPy 1 and 2
    _KNOWN[f"{_core}.multiarray", "_reconstruct"] = _Callable(_begin_array)
    _KNOWN[f"{_core}.multiarray", "scalar"] = _Callable(_make_scalar)
    _KNOWN[f"{_core}.numeric", "_frombuffer"] = _Callable(_frombuffer)  # protocol 5


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        found = _KNOWN.get((module, name))
        if found is None:
            raise Refused(
                "Expected lists, tuples, dicts, text, numbers and numeric arrays only, "
                f"got {module}.{name}; nothing of it was run"
            )
        return found

    def persistent_load(self, pid: Any) -> Any:
        raise Refused("Expected a pickle by itself, got one that refers to another file")


def load(file: BinaryIO) -> Any:
    """Read one pickle; arrays are returned as :class:`Array`.

    What it returns may be far larger than the file when it is walked, since a pickle may name one
    list many times; and Python's reader may be told to reserve gigabytes. `load_plain` refuses
    both, at the price of a look at every operation.

    Raises:
        ValueError: It is not a pickle, is truncated, or holds something else.
    """
    try:
        return _Unpickler(file, encoding="latin-1").load()
    except Refused as error:
        raise ValueError(str(error)) from None
    except MemoryError:
        raise ValueError("Expected a pickle that fits in memory, got a larger one") from None
    except Exception as error:  # a corrupt pickle may fail in any way
        reason = str(error) or type(error).__name__
        raise ValueError(
            f"Expected a pickle, got {reason}; the file may be truncated or something else"
        ) from None


def load_plain(file: BinaryIO) -> Any:
    """Read one pickle, arrays as NumPy arrays.

    Raises:
        ValueError: It is not a pickle, is truncated, holds something else, holds itself, or asks
            for far more memory than it has bytes.
    """
    content = file.read()
    _check_places(content)
    return _Plain(_MAX_REPEATS * len(content)).of(load(io.BytesIO(content)), 0)


def _check_places(content: bytes) -> None:
    """Refuse a pickle that remembers a value under a number larger than it can have values.

    Python's reader reserves a place for every smaller number, 64 GB at the most.
    """
    try:
        for operation, argument, _ in pickletools.genops(content):
            if operation.name in ("PUT", "LONG_BINPUT") and int(argument or 0) > len(content):
                raise Refused(
                    f"Expected at most {len(content)} values, got one of number {argument}"
                )
    except Refused as error:
        raise ValueError(str(error)) from None
    except Exception as error:  # a corrupt pickle may fail in any way
        raise ValueError(
            f"Expected a pickle, got {str(error) or type(error).__name__}; the file may be "
            "truncated or something else"
        ) from None


class _Plain:
    """Makes plain values of what was read; stops after a number of them."""

    def __init__(self, limit: int) -> None:
        self.left = limit

    def of(self, value: Any, depth: int) -> Any:
        self.left -= 1
        if self.left < 0:
            raise ValueError("Expected each list once, got some over and over")
        if depth > _MAX_DEPTH:
            raise ValueError(f"Expected values nested at most {_MAX_DEPTH} deep, got deeper ones")
        if isinstance(value, Array):
            if value.value is None:
                raise ValueError("Expected arrays with content, got one without")
            return value.value
        if isinstance(value, list | tuple):
            return type(value)(self.of(part, depth + 1) for part in value)
        if isinstance(value, dict):
            return {key: self.of(part, depth + 1) for key, part in value.items()}
        if isinstance(value, _Callable | _Type):
            raise ValueError("Expected values, got a function or a type")
        return value
