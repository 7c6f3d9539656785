"""Reads files of `torch.save` that others made: tensors and plain values, never code."""

import mmap
import tarfile
import threading
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

__all__ = ["is_plain", "load_torch"]

_MAGIC = b"\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19"
"""What the older of the two formats of torch.save begins with, after the pickle's protocol."""


def load_torch(path: Path, *, skip_records: bool = False) -> Any:
    """Read a file of `torch.save`, tensors on the CPU.

    Args:
        path: of the file.
        skip_records: read a checkpoint in spite of what training keeps in it beside weights: the
            log of mmengine (with it, of mmdet 3) and the arguments of torchvision's scripts. Empty
            objects stand in their place. Without it, and before torch 2.5, they are refused.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is not such a file, is truncated, holds more than tensors, numbers, text and
            containers, or would take far more memory than its own size; nothing of it is run.
    """
    if not path.exists():
        raise FileNotFoundError(f"{path}: expected a file of torch.save, found nothing there")
    if not path.is_file():
        kind = "folder" if path.is_dir() else "device or pipe"
        raise ValueError(f"{path}: expected a file of torch.save, got a {kind}")
    # torch before 2.6 could be made to run code from its oldest format, a tar archive, even so.
    # Nothing that this package reads was ever saved in it.
    with path.open("rb") as file:
        head = file.read(512)
    if head[257:262] == b"ustar" or (head and tarfile.is_tarfile(path)):
        raise ValueError(f"{path}: expected a file of torch.save, got a tar archive")
    is_zip = head[:4] == b"PK\x03\x04"
    if not is_zip and _MAGIC not in head[:32] and not (head[:1] == b"\x80" and len(head) < 32):
        raise ValueError(f"{path}: expected a file of torch.save, got {_kind(head)}")
    try:
        if is_zip:
            _check_archive(path)
        _check_names(path)
        with _admitted(_stand_ins() if skip_records else []):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, _Refused):
        raise
    except Exception as error:  # a corrupt file may fail in any way
        reason = _reason(error)
        raise ValueError(
            f"{path}: expected tensors and plain values saved by torch, got a file that is "
            f"truncated, of another kind, or holds code ({reason}); nothing of it was run"
        ) from None
    _check_tensors(content, path)
    return content


def is_plain(tensor: Tensor) -> bool:
    """Whether a tensor is an array of numbers in memory: not sparse, nested, quantised or meta."""
    return not (
        tensor.is_nested or tensor.is_quantized or tensor.is_meta or tensor.layout != torch.strided
    )


class _Skipped:
    """Stands for an object that is not read: takes what it is given and keeps nothing of it."""

    def __init__(self, *_: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        pass


_RECORDS = (
    ("argparse", "Namespace"),
    ("mmengine.logging.history_buffer", "HistoryBuffer"),
    # Of which a HistoryBuffer is made. Neither numpy nor getattr is called.
    ("numpy", "ndarray"),
    ("numpy", "dtype"),
    ("numpy.core.multiarray", "_reconstruct"),
    ("numpy.core.multiarray", "scalar"),
    ("numpy._core.multiarray", "_reconstruct"),
    ("numpy._core.multiarray", "scalar"),
    ("builtins", "getattr"),
    ("__builtin__", "getattr"),
)


def _stand_ins() -> list[Any]:
    # torch finds what a name in the file stands for by the name and module of what is admitted.
    if not hasattr(torch.serialization, "safe_globals"):
        return []
    return [type(name, (_Skipped,), {"__module__": module}) for module, name in _RECORDS]


_LOCK = threading.Lock()
"""What torch admits is the process's. Its own `torch.load` in another thread still sees ours."""


@contextmanager
def _admitted(classes: list[Any]) -> Iterator[None]:
    """Admit these alone: of two of one name, one the program's, torch would take either."""
    with _LOCK:
        theirs = torch.serialization.get_safe_globals()
        try:
            torch.serialization.clear_safe_globals()
            torch.serialization.add_safe_globals(classes)
            yield
        finally:
            torch.serialization.clear_safe_globals()
            torch.serialization.add_safe_globals(theirs)


class _Refused(ValueError):
    """What torch would read, and this module does not."""


def _kind(head: bytes) -> str:
    """What a file is that torch.save did not write, by its beginning."""
    if not head:
        return "an empty file, perhaps a truncated one"
    if head[:1] == b"\x80":
        return "a plain pickle"
    return f"one that starts {head[:16]!r}"


def _check_archive(path: Path) -> None:
    # torch.save compresses nothing, and a few compressed bytes may stand for gigabytes.
    with zipfile.ZipFile(path) as archive:
        entries = archive.infolist()
    if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
        raise _Refused(f"{path}: expected a file of torch.save, got a compressed archive")
    if not any(entry.filename.endswith("data.pkl") for entry in entries):
        raise _Refused(f"{path}: expected a file of torch.save, got an archive of something else")


def _check_names(path: Path) -> None:
    # The one call that torch permits and that fills as much memory as it is told to. Names stand
    # as lines in a pickle of torch.save.
    with path.open("rb") as file:
        if not file.read(1):
            return  # which cannot be mapped
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
            if content.find(b"\nbytearray\n") >= 0:
                raise _Refused(f"{path}: expected tensors and plain values, got a bytearray")


def _check_tensors(content: Any, path: Path) -> None:
    """Refuse tensors whose numbers are not in the file, before anything copies them.

    A tensor may repeat one number of the file a billion times, or come without any.
    """
    size, total = path.stat().st_size, 0
    left, seen = [content], set()
    while left:
        value = left.pop()
        if isinstance(value, Tensor):
            if not is_plain(value):
                raise ValueError(
                    f"{path}: expected tensors of plain numbers, got a sparse, nested, quantised "
                    "or meta tensor"
                )
            total += value.numel() * value.element_size()
            if total > 2 * size + 2**20:  # twice: tensors may share what they hold
                raise ValueError(
                    f"{path}: expected tensors that the {size} bytes of the file hold, got some "
                    f"of {total} bytes"
                )
        elif isinstance(value, Mapping | list | tuple | set) and id(value) not in seen:
            seen.add(id(value))
            left.extend(value.values() if isinstance(value, Mapping) else value)


def _reason(error: Exception) -> str:
    """What torch says, without its advice to load the file unsafely."""
    text = " ".join(str(error).split())
    at = text.find("WeightsUnpickler error:")
    if at >= 0:
        text = text[at + len("WeightsUnpickler error:") :].strip()
    text = text.split(". ")[0] or type(error).__name__
    return text if len(text) <= 160 else f"{text[:157]}..."
