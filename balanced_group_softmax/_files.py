"""Files that are written: checked before the work that may take minutes, and written whole.

Whole: under another name first, and moved when they are complete.
"""

import contextlib
import os
import secrets
import stat
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path


def check_replaceable(path: Path) -> None:
    """Check that a file may take the place of what is there.

    Raises:
        ValueError: `path` is a folder, or a device, such as /dev/null.
    """
    if path.exists() and not path.is_file():
        kind = "folder" if path.is_dir() else "device or pipe"
        raise ValueError(f"{path}: expected a file to write, got a {kind}")


@contextmanager
def written_whole(path: Path) -> Iterator[Path]:
    """Yield a path beside `path` to write to; it takes the place of `path` when the block ends.

    A link stays, and what it leads to is replaced; permissions stay. If the block fails, or is
    interrupted, nothing is left of it, and `path` is as it was.

    Raises:
        OSError: it cannot be written; `filename` is `path`.
        ValueError: as for `check_replaceable`.
    """
    check_replaceable(path)
    target = path.resolve()
    partial = target.with_name(f".{target.name}.{secrets.token_hex(8)}")
    try:
        yield partial
        if target.exists():
            partial.chmod(stat.S_IMODE(target.stat().st_mode))
        os.replace(partial, target)
    except BaseException as error:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.filename == str(partial):
            raise OSError(error.errno, error.strerror, str(path)) from None
        raise


def check_output(path: Path, inputs: Sequence[Path] = ()) -> None:
    """Check that a file can be written, and is none of those that are read.

    Raises:
        OSError: its folder cannot be written in.
        ValueError: it is a folder or a device, has no folder, or is an input.
    """
    check_replaceable(path)
    folder = path.resolve().parent if path.is_symlink() else path.parent
    if not folder.is_dir():
        raise ValueError(f"{path}: expected a folder to write in, found none at {folder}")
    if not os.access(folder, os.W_OK):
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
