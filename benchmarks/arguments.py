"""What the programs' options may be; the error of one that may not says what was expected."""

import math
import tempfile
from argparse import ArgumentTypeError
from pathlib import Path

import torch
from profiles import read_profile
from records import ALL, brief

from balanced_group_softmax.cli_program import line_of


def whole(text: str) -> int:
    """A number of rows, rounds, threads."""
    if not (text.isascii() and text.isdigit() and int(text)):
        raise ArgumentTypeError(f"expected a whole number above 0, got {text!r}")
    return int(text)


def seed(text: str) -> int:
    if not (text.isascii() and text.isdigit()):
        raise ArgumentTypeError(f"expected a whole number from 0, got {text!r}")
    return int(text)


def limit(text: str) -> float:
    """Seconds or minutes, `inf` for no limit."""
    value = _number(text)
    if not value >= 0:
        raise ArgumentTypeError(f"expected a number from 0 to inf, got {text!r}")
    return value


def factor(text: str) -> float:
    value = _number(text)
    if not 0 < value < math.inf:
        raise ArgumentTypeError(f"expected a finite number above 0, got {text!r}")
    return value


def share(text: str) -> float:
    value = _number(text)
    if not 0 <= value <= 1:
        raise ArgumentTypeError(f"expected a share from 0 to 1, got {text!r}")
    return value


def share_of_rows(text: str) -> str:
    """A share of the rows, or `all`."""
    if text != ALL and not 0 <= _number(text) <= 1:
        raise ArgumentTypeError(f"expected a share from 0 to 1 or `{ALL}`, got {text!r}")
    return text


def device_name(text: str) -> str:
    """A device that can be measured and that is there."""
    try:
        found = torch.device(text)
    except RuntimeError:
        found = torch.device("meta")
    if found.type not in ("cpu", "cuda"):
        raise ArgumentTypeError(f"expected cpu, cuda or cuda:N, got {text!r}")
    if found.type == "cuda":
        number = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if (found.index or 0) >= number:
            there = f"{number} of them" if number else "no GPU"
            raise ArgumentTypeError(f"{text}: PyTorch {torch.__version__} finds {there}")
    return text


def counts_file(text: str) -> Path:
    path = Path(text)
    try:
        read_profile(path)
    except (OSError, ValueError, LookupError, TypeError) as error:
        reason = line_of(error) if isinstance(error, OSError) else f"{text!r}: {brief(error)}"
        raise ArgumentTypeError(
            f"expected a JSON list of LVIS categories with `id` and `instance_count`, got {reason}"
        ) from error
    return path


def output_folder(text: str) -> Path:
    """A folder that is there from now on and takes files."""
    path = Path(text)
    try:
        path.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=path).close()
    except OSError as error:
        reason = error.strerror or brief(error)
        raise ArgumentTypeError(f"expected a folder to write to, got {text!r}: {reason}") from error
    return path


def output_file(text: str) -> Path:
    """A file that can be written."""
    path = Path(text)
    if path.exists() and not path.is_file():
        kind = "folder" if path.is_dir() else "device or pipe"
        raise ArgumentTypeError(f"expected a file to write, got the {kind} {text!r}")
    output_folder(str(path.parent))
    return path


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return math.nan
