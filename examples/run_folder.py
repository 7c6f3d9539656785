"""A folder for the results of one run: never another run's, and no half-written files."""

import contextlib
import json
import os
import secrets
from collections.abc import Callable
from datetime import datetime
from itertools import count
from pathlib import Path
from typing import Any


def make_run_folder(output: str | os.PathLike[str] | None, name: str) -> Path:
    """Return a new or empty folder.

    Args:
        output: The folder, or None for `runs/<name>-<date>-<time>`, with a number at the end where
            another run has that.
        name: Of the run.

    Raises:
        FileExistsError: `output` holds something already.
        NotADirectoryError: `output` is a file.
    """
    if output is None:
        return make_numbered_folder(Path("runs"), f"{name}-{datetime.now():%Y%m%d-%H%M%S}")
    folder = Path(output)
    if folder.exists() and not folder.is_dir():
        raise NotADirectoryError(f"{folder}: Expected `--output` to be a folder, got a file")
    if folder.is_dir() and any(folder.iterdir()):
        raise FileExistsError(
            f"{folder}: Expected `--output` to be new or empty, got a folder that holds "
            "another run or other files; nothing was changed"
        )
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def make_numbered_folder(parent: Path, name: str) -> Path:
    """Return a new folder `name`, or `name-2`, `name-3`, ...: never one that is there already."""
    parent.mkdir(exist_ok=True)
    for number in count(1):
        folder = parent / (name if number == 1 else f"{name}-{number}")
        try:
            folder.mkdir()
        except FileExistsError:
            continue
        return folder
    raise AssertionError  # count does not end


def partial_path(path: Path) -> Path:
    """Return a hidden name beside `path` for what is not complete yet."""
    return path.with_name(f".partial-{secrets.token_hex(8)}{path.suffix}")


def write(path: Path, save: Callable[[Path], object]) -> None:
    """Let `save` write a file under a temporary name, then move it to `path`."""
    if path.exists() and not path.is_file():
        kind = "folder" if path.is_dir() else "device or pipe"
        raise OSError(f"{path}: Expected a file to write, got a {kind}")
    partial = partial_path(path)
    try:
        save(partial)
        partial.replace(path)
    except BaseException as error:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.filename == str(partial):
            raise OSError(error.errno, error.strerror, str(path)) from None
        raise


def write_text(path: Path, text: str) -> None:
    write(path, lambda partial: partial.write_text(text, encoding="utf-8"))


def write_json(path: Path, value: Any) -> None:
    write_text(path, json.dumps(value, indent=2) + "\n")
