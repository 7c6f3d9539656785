"""Files that are written whole: under another name first, and moved when they are complete."""

import contextlib
import os
import secrets
from collections.abc import Iterator
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

    If the block fails, or is interrupted, nothing is left of it, and `path` is as it was.

    Raises:
        OSError: it cannot be written; `filename` is `path`.
        ValueError: as for `check_replaceable`.
    """
    check_replaceable(path)
    partial = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    try:
        yield partial
        os.replace(partial, path)
    except BaseException as error:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.filename == str(partial):
            raise OSError(error.errno, error.strerror, str(path)) from None
        raise
