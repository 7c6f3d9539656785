"""Runs killed at random moments, which end as if nobody had disturbed them.

`BGS_KILLS=20 python -m pytest tests/examples/test_killed_runs.py` kills oftener than three times.
"""

import os
import random
import shutil
import sys
import time
from pathlib import Path

import pytest

pytest.importorskip("torchvision")
pytest.importorskip("lvis")
sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))

from checkpoints import Checkpoint
from pipeline_cases import assert_same_state, data_arguments, kill, run, start

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")

KILLS = int(os.environ.get("BGS_KILLS", "3"))
# All that a checkpoint has to hold: momentum, a running mean, steps of two batches, and a place in
# the middle of an epoch of four batches.
RECIPE = [
    *("--steps", "20", "--batch-size", "2", "--accumulate", "2", "--ema", "0.5"),
    *("--short-sides", "64", "--long-side", "128", "--save-every", "2"),
]


def kill_at_random(
    arguments: list[str],
    folder: Path,
    whole: Path,
    names: tuple[str, ...],
    seconds: float,
    processes: int = 1,
) -> None:
    """Start a run again and again, and kill it, so often that some kills are in each part of it.

    However it ends, by itself between two kills or after the last, it has to end as if nobody had
    disturbed it.

    Args:
        arguments: Of the run; `--resume` and `--output` are added.
        folder: Of the run, in a folder of its own that is emptied when the run has ended by itself.
        whole: The folder of an undisturbed run.
        names: Of the trainings.
        seconds: How long the whole run takes.
        processes: How many train.
    """
    again = [*arguments, "--output", str(folder), "--resume"]
    moments, kills = random.Random(0), 0
    while kills < KILLS:
        process, begin = start(again, processes), time.monotonic()
        end = time.monotonic() + moments.uniform(0.3, 1) * seconds
        while process.poll() is None and time.monotonic() < end:
            time.sleep(0.01)
        if process.poll() is None:
            kill(process)
            kills += 1
        else:
            assert process.returncode == 0, process.communicate()[0][-3000:]
            seconds = min(seconds, time.monotonic() - begin)  # the machine may have less to do now
            assert_same_run(folder, whole, names)
            shutil.rmtree(folder.parent)
    run(again, processes)
    assert_same_run(folder, whole, names)


def assert_same_run(folder: Path, whole: Path, names: tuple[str, ...]) -> None:
    for name in names:
        ours, expected = (Checkpoint.load(path / f"{name}.pt").model for path in (folder, whole))
        assert_same_state(ours, expected)
    assert {path.name for path in folder.iterdir()} == {path.name for path in whole.iterdir()}
    assert (folder / "metrics.json").read_text() == (whole / "metrics.json").read_text()


@pytest.fixture(scope="module")
def whole(few: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, float]:
    """The folder of a run that nobody disturbed, and how long it took."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    begin = time.monotonic()
    run([*RECIPE, *data_arguments(few), "--output", str(folder)])
    return folder, time.monotonic() - begin


def test_all_stages(few: Path, whole: tuple[Path, float], tmp_path: Path) -> None:
    folder = tmp_path / "killed" / "run"
    undisturbed, seconds = whole
    names = ("softmax", "softmax_continued", "bags")
    kill_at_random([*RECIPE, *data_arguments(few)], folder, undisturbed, names, seconds)


def test_stage_two_from_stored_features(
    few: Path, whole: tuple[Path, float], tmp_path: Path
) -> None:
    """The cache is filled again as far as it was not."""
    arguments = [*RECIPE, *data_arguments(few), "--stage", "bags", "--cache-passes", "2"]
    arguments += ["--checkpoint", str(whole[0] / "softmax.pt"), "--cache-features"]
    begin = time.monotonic()
    run([*arguments, str(tmp_path / "cache"), "--output", str(tmp_path / "run")])
    seconds = time.monotonic() - begin
    folder = tmp_path / "killed" / "run"
    arguments += [str(folder.parent / "cache")]
    kill_at_random(arguments, folder, tmp_path / "run", ("bags",), seconds)


def test_two_processes(few: Path, tmp_path: Path) -> None:
    arguments = [*RECIPE, *data_arguments(few), "--stage", "softmax"]
    begin = time.monotonic()
    run([*arguments, "--output", str(tmp_path / "run")], processes=2)
    seconds = time.monotonic() - begin
    folder = tmp_path / "killed" / "run"
    kill_at_random(arguments, folder, tmp_path / "run", ("softmax",), seconds, processes=2)
