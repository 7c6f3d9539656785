"""What the tests of the training pipeline share: a small data set, and runs as users start them."""

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

EXAMPLES = Path(__file__).parents[2] / "examples"
SCRIPT = EXAMPLES / "torchvision_lvis_train.py"
sys.path.insert(0, str(EXAMPLES))

import lvis_demo_data  # noqa: E402

FEW = [
    lvis_demo_data.Category("star", "red", 30),
    lvis_demo_data.Category("disc", "blue", 12),
    lvis_demo_data.Category("bar", "cyan", 2),
]


def data_arguments(folder: Path) -> list[str]:
    """The options that name a drawn data set."""
    return [
        *("--annotations", str(folder / "train.json"), "--images", str(folder / "train")),
        *("--val-annotations", str(folder / "val.json"), "--val-images", str(folder / "val")),
    ]


def command(arguments: Sequence[str], processes: int = 1) -> list[str]:
    """How a user would start the script."""
    if processes == 1:
        return [sys.executable, str(SCRIPT), *arguments]
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    return [sys.executable, *launcher, str(SCRIPT), *arguments]


def environment() -> dict[str, str]:
    """One thread a process, so that sums are taken in one order."""
    package = str(EXAMPLES.parent)
    path = os.pathsep.join([package, *filter(None, [os.environ.get("PYTHONPATH")])])
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path}


def start(arguments: Sequence[str], processes: int = 1) -> subprocess.Popen[str]:
    return subprocess.Popen(
        command(arguments, processes),
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def run(arguments: Sequence[str], processes: int = 1) -> str:
    """Run to the end; what was printed."""
    process = start(arguments, processes)
    printed, _ = process.communicate(timeout=600)
    assert process.returncode == 0, printed[-3000:]
    return printed


def kill(process: subprocess.Popen[str], number: int = signal.SIGKILL) -> int:
    """Send a signal to a script and what it started; its exit status."""
    for pid in [process.pid, *descendants(process.pid)]:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)
    process.communicate(timeout=120)
    return process.returncode


def descendants(pid: int) -> list[int]:
    """What a process has started, and these in turn; torchrun's are in sessions of their own."""
    parents = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            parents[int(path.parent.name)] = int(path.read_text().rpartition(")")[2].split()[1])
    found = [pid]
    for one in found:
        found += [child for child, parent in parents.items() if parent == one]
    return found[1:]


def assert_same_state(ours: dict[str, Any], expected: dict[str, Any]) -> None:
    """Bit by bit."""
    assert ours.keys() == expected.keys()
    different = [name for name, value in expected.items() if not torch.equal(ours[name], value)]
    assert not different
