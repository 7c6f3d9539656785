"""A folder for the results of one run: never another run's, and no half-written files."""

import json
import os
import tempfile
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Any

import torch


def make_run_folder(output: str | os.PathLike[str] | None, name: str) -> Path:
    """Return a new or empty folder.

    Args:
        output: The folder, or None for `runs/<name>-<date>-<time>`.
        name: Of the run.

    Raises:
        FileExistsError: `output` holds something already.
        NotADirectoryError: `output` is a file.
    """
    now = datetime.now().strftime("%Y%m%d-%H%M%S")
    folder = Path(output) if output is not None else Path("runs") / f"{name}-{now}"
    if folder.exists() and not folder.is_dir():
        raise NotADirectoryError(f"{folder}: Expected `--output` to be a folder, got a file")
    if folder.is_dir() and any(folder.iterdir()):
        raise FileExistsError(
            f"{folder}: Expected `--output` to be new or empty, got a folder that holds "
            "another run or other files; nothing was changed"
        )
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def write(path: Path, save: Callable[[Path], object]) -> None:
    """Let `save` write a file under a temporary name, then move it to `path`."""
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.stem}-", suffix=path.suffix)
    os.close(handle)
    partial = Path(name)
    try:
        save(partial)
        partial.chmod(0o644)  # temporary files are private
        partial.replace(path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def write_text(path: Path, text: str) -> None:
    write(path, lambda partial: partial.write_text(text, encoding="utf-8"))


def write_json(path: Path, value: Any) -> None:
    write_text(path, json.dumps(value, indent=2) + "\n")


def write_checkpoint(path: Path, state_dict: dict[str, torch.Tensor]) -> None:
    write(path, lambda partial: torch.save(state_dict, partial))
