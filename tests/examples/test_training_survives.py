"""Runs that are asked to end or run out of disk: what they leave, and how they go on."""

import contextlib
import errno
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("torchvision")
pytest.importorskip("lvis")
sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))

import checkpoints
import torchvision_lvis_train as example
from checkpoints import Checkpoint
from pipeline_cases import assert_same_state, data_arguments, kill, run, start
from training import Stepper, asked_to_end

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")

STEPS = 40
# All that a checkpoint has to hold: momentum, a running mean, steps of two batches, and a place in
# the middle of an epoch of four batches.
RECIPE = [
    *("--steps", str(STEPS), "--batch-size", "2", "--accumulate", "2", "--ema", "0.5"),
    *("--short-sides", "64", "--long-side", "128", "--save-every", "2", "--stage", "softmax"),
]


@pytest.fixture(scope="module")
def arguments(few: Path) -> list[str]:
    return [*RECIPE, *data_arguments(few)]


@pytest.fixture(scope="module")
def whole(arguments: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run that nobody disturbed."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    run([*arguments, "--output", str(folder)])
    return folder


def weights(folder: Path) -> dict[str, Any]:
    return Checkpoint.load(folder / "softmax.pt").model


def wait_for(process: Any, *paths: Path, seconds: float = 120) -> None:
    """Until one of the files is there."""
    until = time.monotonic() + seconds
    while not any(path.exists() for path in paths):
        assert process.poll() is None, process.communicate()[0][-3000:]
        assert time.monotonic() < until
        time.sleep(0.01)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=["sigterm", "ctrl-c"])
def test_asked_to_end_it_saves_and_ends(
    number: signal.Signals, arguments: list[str], whole: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    again = [*arguments, "--output", str(folder), "--save-every", "1000"]
    process = start(again)
    wait_for(process, folder / "recipe.toml")
    time.sleep(0.5)
    status = kill(process, number)
    partial = folder / "softmax.training.pt"
    if status == 0:
        pytest.skip("it had ended before the signal came")
    if status == 128 + signal.SIGTERM:
        training = Checkpoint.load(partial).training
        assert training is not None
        assert 0 < training["step"] <= STEPS
    else:  # before training began there is nothing to save
        assert status == (130 if number == signal.SIGINT else -number)
    run([*again, "--resume"])
    assert_same_state(weights(folder), weights(whole))


@contextlib.contextmanager
def handler_of_ctrl_c(handler: Any) -> Iterator[None]:
    """In the background of a shell it is ignored, wherever the tests themselves run."""
    before = signal.signal(signal.SIGINT, handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def test_where_ctrl_c_is_ignored_it_stays_so() -> None:
    with handler_of_ctrl_c(signal.SIG_IGN), asked_to_end() as asked:
        signal.raise_signal(signal.SIGINT)
        assert asked == []
        signal.raise_signal(signal.SIGTERM)
        assert asked == [signal.SIGTERM]


@pytest.mark.parametrize("presses", [1, 2])
def test_ctrl_c_saves_and_twice_it_ends_at_once(
    arguments: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: Any,
    presses: int,
) -> None:
    take_step = Stepper.__call__

    def interrupted(self: Any, step: int, batches: Any) -> Any:
        for _ in range(presses if step == 2 else 0):
            signal.raise_signal(signal.SIGINT)
        return take_step(self, step, batches)

    monkeypatch.setattr(Stepper, "__call__", interrupted)
    folder = tmp_path / "run"
    again = [*arguments, "--output", str(folder), "--save-every", "1000"]
    with handler_of_ctrl_c(signal.default_int_handler):
        assert example.main(again) == 128 + signal.SIGINT
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    said = capfd.readouterr().err
    assert "Traceback" not in said
    assert said.endswith(f"Asked to end; go on with --resume --output {folder}\n")
    names = {"recipe.toml", *(["softmax.training.pt"] if presses == 1 else [])}
    assert {path.name for path in folder.iterdir()} == names
    if presses == 1:
        state = Checkpoint.load(folder / "softmax.training.pt").training
        assert state is not None
        assert state["step"] == 3


def test_a_full_disk_leaves_the_last_checkpoint(
    arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    saved = 0
    save = torch.save

    class Full:
        """A file on a disk with room for a little more."""

        def __init__(self, file: Any) -> None:
            self.file, self.room = file, 100_000

        def write(self, content: Any) -> int:
            self.room -= len(content)
            if self.room < 0:
                raise OSError(errno.ENOSPC, "No space left on device")
            return int(self.file.write(content))

        def __getattr__(self, name: str) -> Any:
            return getattr(self.file, name)

    def full(content: Any, file: Any) -> None:
        nonlocal saved
        saved += 1
        save(content, file if saved <= 2 else Full(file))

    monkeypatch.setattr(checkpoints.torch, "save", full)
    folder = tmp_path / "run"
    assert example.main([*arguments, "--output", str(folder)]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: ")
    assert "No space left on device" in error
    assert "--resume" in error
    training = Checkpoint.load(folder / "softmax.training.pt").training
    assert training is not None
    assert training["step"] == 4
    assert {path.name for path in folder.iterdir()} == {"recipe.toml", "softmax.training.pt"}


def test_a_loss_that_is_not_finite_leaves_the_last_checkpoint(
    arguments: list[str], tmp_path: Path, capsys: Any
) -> None:
    folder = tmp_path / "run"
    bad = ["--learning-rate", "1e30", "--warmup-start", "1e-38", "--warmup-steps", "5"]
    bad += ["--max-gradient-norm", "0", "--optimizer", "sgd"]
    assert example.main([*arguments, *bad, "--output", str(folder)]) == 2
    assert "diverged at step" in capsys.readouterr().err
    checkpoint = Checkpoint.load(folder / "softmax.training.pt")
    assert all(value.isfinite().all() for value in checkpoint.model.values())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["--flip", "0.1"], "flip of softmax was 0.5 and is 0.1"),
        (["--seed", "3"], "seed was 0 and is 3"),
    ],
)
def test_another_run_is_not_resumed(
    arguments: list[str], tmp_path: Path, capsys: Any, changes: list[str], message: str
) -> None:
    folder = tmp_path / "run"
    bad = ["--learning-rate", "1e30", "--warmup-start", "1e-38", "--warmup-steps", "5"]
    bad += ["--max-gradient-norm", "0", "--optimizer", "sgd"]
    assert example.main([*arguments, *bad, "--output", str(folder)]) == 2
    names = ("softmax.training.pt", "recipe.toml")
    before = [(folder / name).read_bytes() for name in names]
    again = [*arguments, *bad, *changes, "--output", str(folder), "--resume"]
    assert example.main(again) == 2
    assert message in capsys.readouterr().err
    assert [(folder / name).read_bytes() for name in names] == before


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "expected a file of torch.save, got an empty file"),
        (b"PK\x03\x04 cut off", "saved by torch, got a file that is truncated"),
        (
            {"a": torch.zeros(1)},
            "Expected a checkpoint of torchvision_lvis_train.py, got a file with a",
        ),
        ([1], "Expected a dict, got list"),
    ],
    ids=["empty", "cut", "state", "list"],
)
def test_what_is_no_checkpoint_is_told(tmp_path: Path, content: Any, message: str) -> None:
    path = tmp_path / "x.pt"
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        torch.save(content, path)
    with pytest.raises(ValueError, match=message) as caught:
        Checkpoint.load(path)
    assert str(path) in str(caught.value)


class Evil:
    def __reduce__(self) -> Any:
        return (Path.touch, (Path("executed"),))


def test_a_checkpoint_runs_no_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"format": checkpoints.FORMAT, "model": Evil()}, "evil.pt")
    with pytest.raises(ValueError, match=r"evil\.pt: .* holds code"):
        Checkpoint.load("evil.pt")
    assert not Path("executed").exists()
