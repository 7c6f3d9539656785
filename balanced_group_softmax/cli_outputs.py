"""Checks of the files that a command is to write, before the work that may take minutes."""

import os
from collections.abc import Sequence
from pathlib import Path

from balanced_group_softmax import cli_figures
from balanced_group_softmax._files import check_replaceable

__all__ = ["check_folder", "check_output", "check_outputs"]


def check_outputs(inputs: Sequence[Path], out: Path | None, plot: Path | None) -> None:
    """Check what `--out` and `--plot` name.

    Raises:
        ImportError: there is a picture to draw, and no matplotlib.
        OSError: a folder cannot be written in.
        ValueError: a file cannot be written, would take the place of an input or of the other
            output, or the picture is of no format that matplotlib writes.
    """
    for path in (out, plot):
        if path is not None:
            check_output(path, inputs)
    if plot is not None:
        if out is not None and out.absolute() == plot.absolute():
            raise ValueError(f"{plot}: expected different files for --out and --plot")
        cli_figures.check_picture(plot)


def check_output(path: Path, inputs: Sequence[Path] = ()) -> None:
    """Check that a file can be written, and is none of those that are read.

    Raises:
        OSError: its folder cannot be written in.
        ValueError: it is a folder or a device, has no folder, or is an input.
    """
    check_replaceable(path)
    if not path.parent.is_dir():
        raise ValueError(f"{path}: expected a folder to write in, found none at {path.parent}")
    if not os.access(path.parent, os.W_OK):
        raise PermissionError(f"{path}: expected a folder to write in, got one that is read-only")
    if path.exists() and any(other.exists() and path.samefile(other) for other in inputs):
        raise ValueError(f"{path}: expected another file than the one that is read")


def check_folder(path: Path) -> None:
    """Check that a folder can be made, if it is not there, and written in.

    Raises:
        OSError: it cannot be written in.
        ValueError: it, or what it would be in, is no folder.
    """
    there = next(
        parent for parent in (path.absolute(), *path.absolute().parents) if parent.exists()
    )
    if not there.is_dir():
        raise ValueError(f"{path}: expected a folder to write in, got a file {there}")
    if not os.access(there, os.W_OK):
        raise PermissionError(f"{path}: expected a folder to write in, got one that is read-only")
