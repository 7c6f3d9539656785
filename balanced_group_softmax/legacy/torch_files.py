"""Reads files of `torch.save` that others made: tensors and plain values, never code."""

import tarfile
from pathlib import Path
from typing import Any

import torch

__all__ = ["load_torch"]


def load_torch(path: Path) -> Any:
    """Read a file of `torch.save`, tensors on the CPU.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is not such a file, is truncated, or holds more than tensors, numbers, text
            and containers; nothing of it is run.
    """
    if path.is_dir():
        raise ValueError(f"{path}: expected a file of torch.save, got a folder")
    # torch before 2.6 could be made to run code from its oldest format, a tar archive, even so.
    # Nothing that this package reads was ever saved in it.
    with path.open("rb") as file:
        head = file.read(512)
    if head[257:262] == b"ustar" or (head and tarfile.is_tarfile(path)):
        raise ValueError(f"{path}: expected a file of torch.save, got a tar archive")
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except Exception as error:  # a corrupt file may fail in any way
        reason = _reason(error)
        raise ValueError(
            f"{path}: expected tensors and plain values saved by torch, got a file that is "
            f"truncated, of another kind, or holds code ({reason}); nothing of it was run"
        ) from None


def _reason(error: Exception) -> str:
    """What torch says, without its advice to load the file unsafely."""
    text = " ".join(str(error).split())
    at = text.find("WeightsUnpickler error:")
    if at >= 0:
        text = text[at + len("WeightsUnpickler error:") :].strip()
    text = text.split(". ")[0] or type(error).__name__
    return text if len(text) <= 160 else f"{text[:157]}..."
