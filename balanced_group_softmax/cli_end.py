"""How programs end: with a status, and with a line on standard error if something was wrong."""

import os
import sys
from collections.abc import Callable

__all__ = ["BROKEN_PIPE", "FAILED", "INTERRUPTED", "ended", "line_of"]

FAILED = 2
INTERRUPTED = 130
"""How a shell says that SIGINT, which is Ctrl-C, ended a command."""
BROKEN_PIPE = 141
"""How a shell says that SIGPIPE ended a command."""


def ended(main: Callable[[], int | None]) -> int:
    """Run a program and return its status; that of `main`, or one of these.

    `INTERRUPTED` after Ctrl-C; `BROKEN_PIPE` where nobody reads any more what is printed, as in
    `program | head -1`, of which nothing needs to be said; `FAILED` where it cannot be written.
    """
    try:
        try:
            return main() or 0
        finally:
            _flush()
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:
        _print_nowhere()
        return BROKEN_PIPE
    except _OutputLostError as error:
        _print_nowhere()
        print(f"error: standard output: {error}", file=sys.stderr)
        return FAILED


def line_of(error: BaseException) -> str:
    """Return what an error says, in one line; of the system's errors file and reason alone."""
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    return " ".join(str(error).split()) or type(error).__name__


class _OutputLostError(Exception):
    """What was printed could not be written, such as to a full disk."""


def _flush() -> None:
    if sys.stdout is None:  # closed before the start
        return
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        raise
    except OSError as error:
        raise _OutputLostError(error.strerror) from None


def _print_nowhere() -> None:
    # Python flushes once more at its end, and would complain.
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
