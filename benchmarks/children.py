"""Programs that are run as processes of their own, with a limit of time."""

import subprocess
import tempfile
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO


@dataclass(frozen=True)
class Ended:
    """How a process ended."""

    status: int
    stopped: bool
    """Whether its time was over."""
    errors: str


def run_child(
    command: Sequence[str],
    seconds: float,
    show: Callable[[IO[str]], None],
    folder: Path | None = None,
) -> Ended:
    """Run a program to its end.

    Args:
        command: program and arguments.
        seconds: after which it is stopped; may be infinite.
        show: what reads its output, as it comes.
        folder: where it runs; here, if that does not matter.
    """
    over = threading.Event()
    with tempfile.TemporaryFile("w+") as errors:
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=errors, text=True, cwd=folder
        )

        def stop() -> None:
            over.set()
            process.kill()

        clock = threading.Timer(min(seconds, threading.TIMEOUT_MAX), stop)
        clock.start()
        try:
            assert process.stdout is not None
            show(process.stdout)
            status = process.wait()
        finally:
            clock.cancel()
            process.kill()
            process.wait()
        errors.seek(0)
        return Ended(status, over.is_set() and status != 0, errors.read().strip())
