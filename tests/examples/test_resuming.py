"""What a run may go on from: its own folder, and no other run's checkpoints."""

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

pytest.importorskip("torchvision")
pytest.importorskip("lvis")
sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))

import checkpoints
import lvis_demo_data
import torchvision_lvis_train as example
from checkpoints import Checkpoint
from pipeline_cases import data_arguments
from resuming import note_broken, noted_broken

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")
SHORT = ["--steps", "2", "--batch-size", "2", "--short-sides", "64", "--long-side", "128"]


@pytest.fixture(scope="module")
def softmax(few: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A detector to start from."""
    folder = tmp_path_factory.mktemp("softmax") / "run"
    arguments = [*data_arguments(few), *SHORT, "--stage", "softmax", "--output", str(folder)]
    assert example.main(arguments) == 0
    return folder / "softmax.pt"


@pytest.fixture(scope="module")
def finished(few: Path, softmax: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run of stage two."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    assert example.main(bags(few, softmax, folder)) == 0
    return folder


def bags(data: Path, start: Path, folder: Path) -> list[str]:
    return [
        *(*data_arguments(data), *SHORT, "--stage", "bags"),
        *("--checkpoint", str(start), "--output", str(folder)),
    ]


def test_a_finished_run_is_evaluated_again(few: Path, softmax: Path, finished: Path) -> None:
    before = (finished / "bags.pt").read_bytes()
    assert example.main([*bags(few, softmax, finished), "--resume"]) == 0
    assert (finished / "bags.pt").read_bytes() == before


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["--seed", "3"], "seed was 0 and is 3"),
        (["--bags.learning-rate", "0.5"], "learning_rate of bags was "),
        (["--cache-features", "{tmp}/cache"], "cache_passes was 0 and is 1"),
    ],
)
def test_other_options_are_another_run(
    few: Path,
    softmax: Path,
    finished: Path,
    tmp_path: Path,
    capsys: Any,
    changes: list[str],
    message: str,
) -> None:
    before = {path: path.read_bytes() for path in finished.iterdir() if path.is_file()}
    changes = [change.format(tmp=tmp_path) for change in changes]
    assert example.main([*bags(few, softmax, finished), *changes, "--resume"]) == 2
    assert message in capsys.readouterr().err
    assert {path: path.read_bytes() for path in finished.iterdir() if path.is_file()} == before
    assert not (tmp_path / "cache").exists()


def test_another_start_is_another_run(
    few: Path, softmax: Path, finished: Path, tmp_path: Path, capsys: Any
) -> None:
    other = Checkpoint.load(softmax)
    other.model = {
        name: value + 0.5 * value.is_floating_point() for name, value in other.model.items()
    }
    other.save(tmp_path / "other.pt")
    assert example.main([*bags(few, tmp_path / "other.pt", finished), "--resume"]) == 2
    assert "start was " in capsys.readouterr().err


def test_moved_boxes_are_another_run(
    few: Path, softmax: Path, finished: Path, tmp_path: Path, capsys: Any
) -> None:
    """As many instances as before, at other places."""
    data = tmp_path / "data"
    shutil.copytree(few, data)
    content = json.loads((data / "train.json").read_text())
    content["annotations"][0]["bbox"][2] -= 3
    (data / "train.json").write_text(json.dumps(content))
    assert example.main([*bags(data, softmax, finished), "--resume"]) == 2
    assert "data was " in capsys.readouterr().err


def test_other_pixels_are_another_run(
    few: Path, softmax: Path, finished: Path, tmp_path: Path, capsys: Any
) -> None:
    data = tmp_path / "data"
    shutil.copytree(few, data)
    path = sorted((data / "train").iterdir())[0]
    with Image.open(path) as image:
        black = Image.new("RGB", image.size)
    black.save(path)
    assert example.main([*bags(data, softmax, finished), "--resume"]) == 2
    assert "data was " in capsys.readouterr().err


@pytest.mark.parametrize("stage", ["compare", "softmax", "continued"])
def test_another_stage_does_not_take_the_folder(
    few: Path, softmax: Path, finished: Path, capsys: Any, stage: str
) -> None:
    before = (finished / "metrics.json").read_bytes()
    arguments = [*data_arguments(few), *SHORT, "--stage", stage, "--output", str(finished)]
    if stage == "continued":
        arguments += ["--checkpoint", str(softmax)]
    assert example.main([*arguments, "--resume"]) == 2
    assert f"stage was bags and is {stage}" in capsys.readouterr().err
    assert (finished / "metrics.json").read_bytes() == before


def test_other_validation_data_are_another_run(
    few: Path, softmax: Path, finished: Path, capsys: Any
) -> None:
    arguments = bags(few, softmax, finished)
    for option, value in (("annotations", "train.json"), ("images", "train")):
        arguments[arguments.index(f"--val-{option}") + 1] = str(few / value)
    assert example.main([*arguments, "--resume"]) == 2
    assert "val_data was " in capsys.readouterr().err


def test_a_run_without_a_checkpoint_is_compared_too(
    few: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    """What was begun is written down before it trains."""

    def stop(*args: Any) -> None:
        raise OSError("stopped")

    folder = tmp_path / "run"
    arguments = [*data_arguments(few), *SHORT, "--stage", "softmax", "--output", str(folder)]
    with monkeypatch.context() as patch:
        patch.setattr(example, "run_stage", stop)
        patch.setattr(example, "fail", lambda error, folder, begun: 2)
        assert example.main(arguments) == 2
    assert [path.name for path in folder.iterdir()] == ["recipe.toml"]
    for changes, message in (
        (["--seed", "3"], "seed was 0 and is 3"),
        (["--bags.learning-rate", "0.5"], "learning_rate of bags was "),
    ):
        assert example.main([*arguments, *changes, "--resume"]) == 2
        assert message in capsys.readouterr().err
        assert (folder / "recipe.toml").exists()
    assert example.main([*arguments, "--resume"]) == 0


def test_drawn_data_of_another_seed_are_not_taken(tmp_path: Path, capsys: Any) -> None:
    """As a run leaves them that is killed before it trains."""
    few = [lvis_demo_data.Category("star", "red", 2)]
    folder = tmp_path / "run" / "data"
    lvis_demo_data.write_demo_data(folder, 4, categories=few, val_instances=1)
    assert lvis_demo_data.seed_of(folder) == 4
    assert example.main([*SHORT, "--resume", "--output", str(tmp_path / "run")]) == 2
    assert "Expected data drawn with `--seed` 0, got those of 4" in capsys.readouterr().err


def test_training_that_is_not_over_is_no_start(
    few: Path, softmax: Path, tmp_path: Path, capsys: Any
) -> None:
    checkpoint = Checkpoint.load(softmax)
    checkpoint.training = {"step": 1}
    checkpoint.save(tmp_path / "softmax.training.pt")
    arguments = bags(few, tmp_path / "softmax.training.pt", tmp_path / "run")
    assert example.main(arguments) == 2
    assert "Expected the checkpoint of a training that is over" in capsys.readouterr().err


def test_data_may_move(few: Path, softmax: Path, finished: Path, tmp_path: Path) -> None:
    shutil.copytree(few, tmp_path / "data")
    assert example.main([*bags(tmp_path / "data", softmax, finished), "--resume"]) == 0


def test_a_folder_of_something_else_is_left_alone(
    few: Path, softmax: Path, tmp_path: Path, capsys: Any
) -> None:
    for name in ("notes.txt", ".partial-mine"):
        (tmp_path / name).write_text("kept")
    assert example.main([*bags(few, softmax, tmp_path), "--resume"]) == 2
    assert "Expected a run folder with recipe.toml" in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == [".partial-mine", "notes.txt"]


def test_images_noticed_before_are_listed_after(tmp_path: Path) -> None:
    known: dict[str, None] = {}
    note_broken(tmp_path, known, [])
    assert not list(tmp_path.iterdir())
    note_broken(tmp_path, known, ["b.png: cut", "a.png: missing"])
    assert noted_broken(tmp_path) == known
    again = noted_broken(tmp_path)
    note_broken(tmp_path, again, ["a.png: missing", "c.png: cut"])
    lines = (tmp_path / "broken_images.txt").read_text().splitlines()
    assert lines == ["b.png: cut", "a.png: missing", "c.png: cut"]


@pytest.mark.parametrize("change", ["origin", "categories", "recipe"])
def test_a_checkpoint_of_another_version_is_told(
    softmax: Path, tmp_path: Path, change: str
) -> None:
    content = checkpoints.read_state(softmax)
    if change == "origin":
        del content["origin"]
    elif change == "categories":
        content["categories"]["colours"] = ()
    else:
        content["recipe"] += "zoom = 3\n"
    torch.save(content, tmp_path / "x.pt")
    with pytest.raises(ValueError, match=r"x\.pt: Expected a checkpoint of this version"):
        Checkpoint.load(tmp_path / "x.pt")
