"""The training example from end to end: what it writes, on drawn and on real annotations."""

import io
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("torchvision")
pytest.importorskip("lvis")
pytest.importorskip("matplotlib")
sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))

import figures
import lvis_demo_data
import official_lvis
import run_folder
import stages
import summarise_runs
import torchvision_lvis_eval as evaluation
import torchvision_lvis_train as example
from checkpoints import Checkpoint
from detectors import CLASSIFIER, make_detector, with_same_postprocessing
from lvis_evaluation import FIXED
from PIL import Image
from pipeline_cases import FEW
from recipe import Recipe
from render_annotations import render
from run_folder import make_run_folder, write_text

from balanced_group_softmax import GroupLayout, category_counts

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")

SHORT = ["--steps", "2", "--batch-size", "2"]
FILES = {
    *("metrics.json", "run.json", "table.md", "layout.json", "recipe.toml"),
    *("softmax.pt", "softmax_continued.pt", "bags.pt"),
    *("ap_per_group.png", "weight_norms.png", "detections.png"),
}
KEYS = {
    *("AP", "AP50", "AP75", "APs", "APm", "APl", "APr", "APc", "APf"),
    *("AR", "ARs", "ARm", "ARl"),
}


def own_data(folder: Path, split: str = "train") -> list[str]:
    option = {"train": "", "val": "val-"}[split]
    paths = (folder / f"{split}.json", folder / split)
    names = (f"--{option}annotations", f"--{option}images")
    return [text for name, path in zip(names, paths, strict=True) for text in (name, str(path))]


def state_of(run: Path, name: str) -> dict[str, torch.Tensor]:
    """The weights in a finished checkpoint."""
    return Checkpoint.load(run / f"{name}.pt").model


@pytest.fixture(scope="module")
def finished(few, tmp_path_factory) -> Path:
    """The run folder of a run without data arguments, on fewer and smaller data."""
    folder = tmp_path_factory.mktemp("runs") / "first"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lvis_demo_data, "demo_categories", lambda: FEW)
        assert example.main([*SHORT, "--output", str(folder)]) == 0
    return folder


def test_run_folder_holds_all_results_and_nothing_else(finished):
    assert {path.name for path in finished.iterdir()} == FILES | {"data"}
    metrics = json.loads((finished / "metrics.json").read_text())
    assert list(metrics) == ["softmax", "softmax_continued", "bags"]
    for values in metrics.values():
        assert values.keys() == KEYS | {"AP_0_10", "AP_10_100", *FIXED}
        assert all(value is None or 0 <= value <= 100 for value in values.values())
    for name in ("ap_per_group.png", "weight_norms.png", "detections.png"):
        with Image.open(finished / name) as picture:
            assert min(picture.size) > 300
    lines = (finished / "table.md").read_text().splitlines()
    assert len({line.count("|") for line in lines}) == 1
    assert len(lines) == 5
    settings = json.loads((finished / "run.json").read_text())
    assert (settings["seed"], settings["stage"]) == (0, "compare")
    assert settings["versions"]["torch"] == torch.__version__


def test_layout_is_that_of_the_training_counts_and_of_the_checkpoint(finished):
    counts = category_counts(finished / "data" / "train.json")
    layout = GroupLayout.from_counts(counts, category_ids=[1, 2, 3])
    assert GroupLayout.load(finished / "layout.json") == layout
    assert GroupLayout.from_state_dict(state_of(finished, "bags"), prefix=CLASSIFIER) == layout


@pytest.mark.parametrize("name", ["softmax", "bags"])
@pytest.mark.parametrize("suffix", [".json", ".pkl"])
def test_a_checkpoint_is_evaluated_without_its_run(finished, tmp_path, name, suffix):
    data = finished / "data"
    results, figures_of = tmp_path / f"results{suffix}", tmp_path / "metrics.json"
    arguments = ["--annotations", str(data / "val.json"), "--no-progress"]
    images = [*arguments, "--images", str(data / "val")] if suffix == ".pkl" else ["--no-progress"]
    path = str(finished / f"{name}.pt")
    out = ["--out", str(results), "--metrics", str(figures_of)]
    assert evaluation.main([path, *images, *out]) == 0
    found = json.loads(figures_of.read_text())["bbox"]
    expected = json.loads((finished / "metrics.json").read_text())[name]
    assert found == expected
    # The file of detections gives the same again, with the counts and frequencies of training.
    train = ["--train-annotations", str(data / "train.json"), "--metrics", str(figures_of)]
    assert evaluation.main([str(results), *arguments, *train]) == 0
    again = json.loads(figures_of.read_text())["bbox"]
    assert again == pytest.approx(expected, abs=1e-4 if suffix == ".pkl" else 0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["x.pt", "--images", "."], "Expected `--annotations` and `--images` together"),
        (["x.pt"], "found nothing there"),
        (["x.json"], "Expected `--annotations` with the detections x.json"),
        (["x.pt", "--out", "a.txt"], "results to end in .json or .pkl"),
        (["x.json", "--annotations", "a", "--images", "."], "Expected `--images` with a checkp"),
        (["x.json", "--annotations", "a", "--out", "y.json"], "Expected `--out` with a checkp"),
    ],
)
def test_evaluation_tells_what_does_not_go_together(
    tmp_path, monkeypatch, capsys, arguments, message
):
    monkeypatch.chdir(tmp_path)
    assert evaluation.main(arguments) == 2
    printed = capsys.readouterr().err
    assert message in printed
    assert printed.count("\n") == 1


def test_boxes_alone_have_no_masks_to_evaluate(finished, capsys):
    assert evaluation.main([str(finished / "bags.pt"), "--eval", "segm"]) == 2
    assert "Expected a Mask R-CNN for segm, got a Faster R-CNN" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["softmax_continued", "bags"])
def test_stage_two_changes_the_classifier_alone(finished, name):
    before, after = state_of(finished, "softmax"), state_of(finished, name)
    rest = {key for key in before if not key.startswith(CLASSIFIER)}
    assert rest == {key for key in after if not key.startswith(CLASSIFIER)}
    assert any("running_mean" in key for key in rest)
    for key in rest:
        assert before[key].equal(after[key]), key


def test_stage_two_changes_the_classifier(finished):
    before, after = (
        state_of(finished, name)[f"{CLASSIFIER}weight"] for name in ("softmax", "softmax_continued")
    )
    assert not before.equal(after)


def test_frozen_entries_that_change_are_an_error():
    before, after = (torch.nn.BatchNorm1d(2) for _ in range(2))
    stages.check_frozen(before.state_dict(), after.state_dict())
    after(torch.randn(3, 2))
    with pytest.raises(RuntimeError, match="running_mean"):
        stages.check_frozen(before.state_dict(), after.state_dict())


def test_same_seed_same_weights(few, tmp_path):
    states = []
    for name in ("a", "b"):
        arguments = [*SHORT, *own_data(few), "--output", str(tmp_path / name)]
        assert example.main(arguments) == 0
        states.append(state_of(tmp_path / name, "bags"))
    for key, value in states[0].items():
        assert value.equal(states[1][key]), key


def test_real_annotations_with_rendered_images(lvis_data, tmp_path, capsys):
    path = lvis_data / "lvis_val_100.json"
    render(path, tmp_path / "images")
    arguments = ["--annotations", str(path), "--images", str(tmp_path / "images")]
    run = tmp_path / "run"
    assert example.main([*SHORT, *arguments, "--short-sides", "96", "--output", str(run)]) == 0
    assert {entry.name for entry in run.iterdir()} == FILES
    printed = capsys.readouterr().out
    assert "No --val-annotations: evaluating on the training images." in printed
    assert "1230 categories" in printed
    metrics = json.loads((run / "metrics.json").read_text())
    assert metrics["bags"]["AP"] is not None
    layout = GroupLayout.load(run / "layout.json")
    assert state_of(run, "bags")[f"{CLASSIFIER}fc.weight"].shape[0] == layout.num_logits


def coco(few: Path, folder: Path) -> Path:
    """The same data as COCO has it: no counts, no frequencies, no lists of absence."""
    data = json.loads((few / "train.json").read_text())
    for row in data["categories"]:
        for key in ("image_count", "instance_count", "frequency"):
            del row[key]
    for row in data["images"]:
        del row["neg_category_ids"], row["not_exhaustive_category_ids"]
    data["annotations"][0]["iscrowd"] = 1
    path = folder / "coco.json"
    path.write_text(json.dumps(data))
    return path


def test_coco_annotations_and_a_validation_set(few, tmp_path):
    path = coco(few, tmp_path)
    arguments = ["--annotations", str(path), "--images", str(few / "train"), *own_data(few, "val")]
    assert example.main([*SHORT, *arguments, "--output", str(tmp_path / "run")]) == 0
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert metrics["bags"]["AP_0_10"] is not None


def test_default_run_folder_is_new_each_time(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = make_run_folder(None, "name")
    assert folder.parent == Path("runs")
    assert folder.name.startswith("name-")
    assert (tmp_path / folder).is_dir()


def test_runs_of_the_same_second_do_not_share_a_folder(tmp_path, monkeypatch):
    class Noon(run_folder.datetime):
        @classmethod
        def now(cls, tz=None):
            return cls(2024, 1, 1, 12)

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(run_folder, "datetime", Noon)
    names = [make_run_folder(None, "name").name for _ in range(3)]
    first = "name-20240101-120000"
    assert names == [first, f"{first}-2", f"{first}-3"]


@pytest.mark.skipif(os.name != "posix", reason="file modes are those of POSIX")
def test_files_and_data_have_the_mode_of_the_umask(tmp_path):
    before = os.umask(0o027)
    try:
        write_text(tmp_path / "a.txt", "text")
        lvis_demo_data.write_demo_data(tmp_path / "data", 0, categories=FEW, val_instances=1)
    finally:
        os.umask(before)
    assert (tmp_path / "a.txt").stat().st_mode & 0o777 == 0o640
    assert (tmp_path / "data").stat().st_mode & 0o777 == 0o750
    assert (tmp_path / "data" / "train.json").stat().st_mode & 0o777 == 0o640


def test_a_file_is_whole_or_not_there(tmp_path, monkeypatch):
    write_text(tmp_path / "a.txt", "whole")

    def break_off(partial: Path) -> None:
        partial.write_text("ha")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        figures.write(tmp_path / "a.txt", break_off)
    assert [path.name for path in tmp_path.iterdir()] == ["a.txt"]
    assert (tmp_path / "a.txt").read_text() == "whole"


# --- what a user can get wrong: one line, exit code 2, nothing lost -----------------------------


def fails(arguments: list[str], capsys) -> str:
    assert example.main([*SHORT, *arguments]) == 2
    printed = capsys.readouterr().err.splitlines()
    return next(line for line in printed if line.startswith("error: "))


def test_a_folder_that_holds_another_run_is_left_alone(finished, few, capsys):
    before = {path: path.read_bytes() for path in finished.rglob("*") if path.is_file()}
    line = fails([*own_data(few), "--output", str(finished)], capsys)
    assert str(finished) in line
    assert "new or empty" in line
    assert before == {path: path.read_bytes() for path in finished.rglob("*") if path.is_file()}


def truncate(path: Path) -> bytes:
    """Cut the pixels of an image, not its header."""
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) * 3 // 4])
    return whole


def test_after_a_failed_run_the_same_output_can_be_used(few, tmp_path, capsys):
    shutil.copytree(few, tmp_path / "data")
    images = sorted((tmp_path / "data" / "train").iterdir())
    whole = [truncate(path) for path in images]
    arguments = [*own_data(tmp_path / "data"), "--output", str(tmp_path / "run")]
    assert "truncated" in fails(arguments, capsys)
    assert not (tmp_path / "run").exists()
    for path, content in zip(images, whole, strict=True):
        path.write_bytes(content)
    assert example.main([*SHORT, *arguments]) == 0


def test_a_package_that_is_missing_is_told_before_training(few, tmp_path, monkeypatch, capsys):
    official_lvis.official_classes.cache_clear()
    monkeypatch.setattr(official_lvis.importlib.util, "find_spec", lambda name: None)
    line = fails([*own_data(few), "--output", str(tmp_path / "run")], capsys)
    assert line == "error: Evaluation needs the package lvis: pip install lvis pycocotools"
    assert not (tmp_path / "run").exists()


def test_what_a_failed_run_keeps_is_told(few, tmp_path, monkeypatch, capsys):
    def stop(*_, **__):
        raise FloatingPointError("stopped")

    monkeypatch.setattr(lvis_demo_data, "demo_categories", lambda: FEW)
    monkeypatch.setattr(stages, "train", stop)
    run = tmp_path / "run"
    line = fails(["--output", str(run)], capsys)
    assert line == (
        f"error: stopped ({run} keeps data, recipe.toml; go on with `--resume`, or remove it or "
        "give another `--output` to start again)"
    )
    assert {path.name for path in run.iterdir()} == {"data", "recipe.toml"}


def test_an_output_that_is_a_file(few, tmp_path, capsys):
    path = tmp_path / "file"
    path.write_text("kept")
    assert "got a file" in fails([*own_data(few), "--output", str(path)], capsys)
    assert path.read_text() == "kept"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--annotations", "a.json"], "`--images` together"),
        (["--val-annotations", "a.json"], "`--val-images` together"),
        (["--val-annotations", "a.json", "--val-images", "b"], "with `--val-annotations`"),
        (["--annotations", "absent.json", "--images", "."], "absent.json"),
        (["--annotations", "cut.json", "--images", "."], "cut.json"),
        (["--annotations", "none.json", "--images", "."], "none.json"),
        (["--annotations", "train.json", "--images", "absent"], "absent"),
        (["--annotations", "train.json", "--images", "."], "9 of 9 images are not there"),
        (["--annotations", "train.json", "--images", "broken"], "000001.jpg"),
        (["--device", "nonsense"], "`--device` to be usable"),
    ],
    ids=[
        *("no images", "no val images", "val alone", "no file", "cut", "no categories"),
        *("no folder", "no images there", "corrupt image", "device"),
    ],
)
def test_bad_input(few, tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    text = (few / "train.json").read_text()
    Path("train.json").write_text(text)
    Path("cut.json").write_text(text[: len(text) // 2])
    Path("none.json").write_text(json.dumps({**json.loads(text), "categories": []}))
    Path("broken").mkdir()
    for image in (few / "train").iterdir():
        (Path("broken") / image.name).write_bytes(image.read_bytes()[:200])
    if "--device" in arguments:
        arguments = [*arguments, *own_data(few)]
    before = {path.name for path in tmp_path.iterdir()}
    assert message in fails([*arguments, "--output", "run"], capsys)
    assert {path.name for path in tmp_path.iterdir()} - before <= {"run"}


def test_validation_annotations_of_other_categories(few, tmp_path, capsys):
    data = json.loads((few / "val.json").read_text())
    data["categories"].append({"id": 99, "name": "more", "frequency": "r"})
    path = tmp_path / "val.json"
    path.write_text(json.dumps(data))
    val = ["--val-annotations", str(path), "--val-images", str(few / "val")]
    line = fails([*own_data(few), *val, "--output", str(tmp_path / "run")], capsys)
    assert "ids only in the former: [], only in the latter: [99]" in line
    assert not (tmp_path / "run").exists()


BAD_FIELDS: dict[str, tuple[str, dict[str, Any], str]] = {
    "polygon": ("annotations", {"segmentation": [[1, 2]]}, "`segmentation` of annotation 1: "),
    "run lengths": (
        "annotations",
        {"segmentation": {"size": [128, 128], "counts": [5]}},
        "`segmentation` of annotation 1: ",
    ),
    "box": ("annotations", {"bbox": [1, 2, 3]}, "`bbox` of annotation 1 "),
    "category name": ("categories", {"name": 3}, "`name` of category 1 "),
    "absence": ("images", {"neg_category_ids": [99]}, "`neg_category_ids` of image 1 "),
}


@pytest.mark.parametrize("split", ["train", "val"])
@pytest.mark.parametrize("bad", BAD_FIELDS)
def test_bad_fields_are_told_before_training(few, tmp_path, capsys, bad, split):
    section, changes, message = BAD_FIELDS[bad]
    shutil.copytree(few, tmp_path / "data")
    path = tmp_path / "data" / f"{split}.json"
    data = json.loads(path.read_text())
    data[section][0].update(changes)
    path.write_text(json.dumps(data))
    arguments = [*own_data(tmp_path / "data"), *own_data(tmp_path / "data", "val")]
    line = fails([*arguments, "--output", str(tmp_path / "run")], capsys)
    assert line.startswith(f"error: {path}: ")
    assert message in line
    assert not (tmp_path / "run").exists()


def test_a_bad_mask_ends_the_script_with_one_line(few, tmp_path):
    data = json.loads((few / "train.json").read_text())
    data["annotations"][4]["segmentation"] = {"size": [1, 1], "counts": "x"}
    (tmp_path / "bad.json").write_text(json.dumps(data))
    script = Path(example.__file__)
    arguments = ["--annotations", str(tmp_path / "bad.json"), "--images", str(few / "train")]
    done = subprocess.run(
        [sys.executable, str(script), *arguments], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert "`segmentation` of annotation 5: Expected `size`" in done.stderr


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("how", ["corrupt", "bomb"])
def test_bad_validation_images_are_told_before_training(few, tmp_path, monkeypatch, capsys, how):
    monkeypatch.setattr(stages, "train", None)
    shutil.copytree(few, tmp_path / "data")
    path = sorted((tmp_path / "data" / "val").iterdir())[-1]
    if how == "corrupt":
        path.write_bytes(b"<html>404</html>")
    else:
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 128 * 128)
        Image.new("1", (256, 128)).save(path)
    arguments = [*own_data(tmp_path / "data"), *own_data(tmp_path / "data", "val")]
    line = fails([*arguments, "--output", str(tmp_path / "run")], capsys)
    assert line.startswith(f"error: {path}: ")
    assert {"corrupt": "cannot identify", "bomb": "256 x 128 pixels are more"}[how] in line
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "option",
    [
        ["--steps", "-1"],
        ["--learning-rate", "nan"],
        ["--learning-rate", "-1"],
        ["--others-ratio", "nan"],
        ["--bags.others-ratio", "-1"],
        ["--thresholds", "10", "10"],
        ["--short-sides", "8"],
        ["--backbone", "resnet1", "--weights", "imagenet"],
    ],
    ids=str,
)
def test_bad_options(few, tmp_path, option, capsys):
    line = fails([*own_data(few), *option, "--output", str(tmp_path / "run")], capsys)
    name = option[0].removeprefix("--").rpartition(".")[2].replace("-", "_")
    assert f"`{name}`" in line
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "option", [["--seed", "9" * 30], ["--batch-size", "two"], ["--optimizer", "lion"]], ids=str
)
def test_options_that_the_parser_refuses(option, capsys):
    with pytest.raises(SystemExit) as stop:
        example.main(option)
    assert stop.value.code == 2
    assert option[0] in capsys.readouterr().err


@pytest.mark.parametrize("text", ["0", "inf"])
def test_others_ratio_may_be_zero_or_infinite(few, tmp_path, text):
    run = tmp_path / "run"
    arguments = [*own_data(few), "--others-ratio", text, "--output", str(run)]
    assert example.main([*SHORT, *arguments]) == 0
    assert Checkpoint.load(run / "bags.pt").recipe.others_ratio == float(text)


def test_boxes_that_are_left_out_are_printed(few, tmp_path, monkeypatch, capsys):
    data = json.loads((few / "train.json").read_text())
    data["annotations"][0]["iscrowd"] = 1
    for row in data["annotations"][1:3]:
        row["bbox"][2] = 0.5
    for row in data["categories"]:
        del row["instance_count"]
    path = tmp_path / "thin.json"
    path.write_text(json.dumps(data))
    monkeypatch.setattr(stages, "train", None)  # fails after the description
    arguments = ["--annotations", str(path), "--images", str(few / "train")]
    with pytest.raises(TypeError):
        example.main([*arguments, "--output", str(tmp_path / "run")])
    printed = capsys.readouterr().out
    assert "Left out of training: 1 crowd annotations, 2 boxes thinner than a pixel" in printed


def test_corners_for_sizes_are_noticed(few, tmp_path, monkeypatch, capsys):
    data = json.loads((few / "train.json").read_text())
    for row in data["annotations"]:
        x, y, width, height = row["bbox"]
        row["bbox"] = [x, y, x + width, y + height]
    path = tmp_path / "corners.json"
    path.write_text(json.dumps(data))
    monkeypatch.setattr(stages, "train", None)  # fails after the description
    for annotations, noticed in ((path, True), (few / "train.json", False)):
        arguments = ["--annotations", str(annotations), "--images", str(few / "train")]
        with pytest.raises(TypeError):
            example.main([*arguments, "--output", str(tmp_path / f"run {noticed}")])
        printed = capsys.readouterr().out
        assert ("boxes that reach out of it by more than a pixel" in printed) == noticed


@pytest.mark.parametrize("kind", ["none", "relative"])
def test_no_box_to_train_on_is_an_error(few, tmp_path, capsys, kind):
    data = json.loads((few / "train.json").read_text())
    for row in data["annotations"]:
        row["bbox"] = [value / 1000 for value in row["bbox"]]
    if kind == "none":
        data["annotations"] = []
    number = len(data["annotations"])
    path = tmp_path / "boxes.json"
    path.write_text(json.dumps(data))
    arguments = ["--annotations", str(path), "--images", str(few / "train")]
    line = fails([*arguments, "--output", str(tmp_path / "run")], capsys)
    assert f"{path}: Expected boxes in pixels to train on, got none; left out: " in line
    assert f"{number} boxes thinner than a pixel" in line
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(("warmup", "told"), [(2, True), (1, False)])
def test_a_warm_up_that_never_ends_is_told(few, tmp_path, monkeypatch, capsys, warmup, told):
    monkeypatch.setattr(stages, "train", lambda job, training: None)
    arguments = [*own_data(few), "--stage", "softmax", "--steps", "3"]
    arguments += ["--warmup-steps", str(warmup), "--output", str(tmp_path / "run")]
    assert example.main(arguments) == 0
    printed = capsys.readouterr().out
    assert ("softmax: warm-up takes 2 steps, and training 3; give less" in printed) == told


def test_divergence_is_told_in_a_line(few, tmp_path, capsys):
    arguments = [
        *own_data(few),
        "--steps",
        "20",
        "--learning-rate",
        "1e30",
        "--output",
        str(tmp_path / "run"),
    ]
    assert "diverged at step" in fails(arguments, capsys)


# --- small parts --------------------------------------------------------------------------------


def test_softmax_is_evaluated_on_the_detections_of_torchvision():
    torch.manual_seed(0)
    model = make_detector(Recipe(backbone="small", short_sides=(64,), long_side=128), 5).eval()
    torch.nn.init.normal_(model.roi_heads.box_predictor.cls_score.weight, std=0.5)
    model.roi_heads.score_thresh = 0.05
    images = [torch.rand(3, 64, 80), torch.rand(3, 70, 64)]
    with torch.inference_mode():
        plain, converted = model(images), with_same_postprocessing(model)(images)
    for wanted, got in zip(plain, converted, strict=True):
        assert len(wanted["boxes"]) > 10
        for key, value in wanted.items():
            torch.testing.assert_close(got[key], value)


@pytest.mark.parametrize(
    ("name", "text"),
    [("0_10", "0 to 9"), ("100_1000", "100 to 999"), ("1000_inf", "1000 and more"), ("x", "x")],
)
def test_count_range(name, text):
    assert figures.count_range(name) == text


# --- several runs -------------------------------------------------------------------------------


def test_summary_of_runs_averages_and_subtracts(finished, tmp_path, capsys):
    for name, ap in (("a", 10.0), ("b", 20.0)):
        (tmp_path / name).mkdir()
        layout = (finished / "layout.json").read_text()
        (tmp_path / name / "layout.json").write_text(layout)
        keys = [*figures.TABLE, "AP_0_10", "AP_10_100"]
        softmax = dict.fromkeys(keys, ap) | {"APl": None}
        metrics = {
            "softmax": softmax,
            "softmax_continued": softmax,
            "bags": dict.fromkeys(keys, ap + 3),
        }
        (tmp_path / name / "metrics.json").write_text(json.dumps(metrics))
    picture = tmp_path / "picture.png"
    runs = [str(tmp_path / name) for name in ("a", "b")]
    assert summarise_runs.main([*runs, "--picture", str(picture)]) == 0
    printed = capsys.readouterr().out
    assert "| softmax | 15.0 | 15.0 | 15.0 | 15.0 | 15.0 | - | 15.0 |" in printed
    assert "| APr over softmax, continued | +3.0 | +3.0, +3.0 |" in printed
    assert picture.stat().st_size > 1000


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m.pop("bags"), "Expected metrics of 'bags'"),
        (lambda m: m["bags"].pop("APr"), "Expected 'APr' of 'bags' to be a number or null"),
        (lambda m: m["softmax"].pop("AP_0_10"), "Expected 'AP_0_10' of 'softmax'"),
        (lambda m: m["softmax"].update(AP="high"), "got high"),
        (None, "Expected JSON"),
    ],
    ids=["method", "metric", "group", "text", "cut"],
)
def test_summary_of_a_run_that_lacks_metrics(finished, tmp_path, capsys, change, message):
    shutil.copy(finished / "layout.json", tmp_path)
    metrics = json.loads((finished / "metrics.json").read_text())
    if change is not None:
        change(metrics)
    path = tmp_path / "metrics.json"
    path.write_text(json.dumps(metrics)[: None if change else 40])
    assert summarise_runs.main([str(finished), str(tmp_path)]) == 2
    printed = capsys.readouterr().err
    assert printed.startswith(f"error: {path}: ")
    assert message in printed
    assert printed.count("\n") == 1


def test_labels_of_detections_stay_in_the_picture():
    target = {"boxes": torch.tensor([[80.0, 10, 99, 30]]), "labels": torch.tensor([1])}
    found = {**target, "scores": torch.tensor([0.9])}
    items = [(torch.zeros(3, 100, 100), target)]
    figure = figures.plot_detections(items, {"bags": [found]}, ["a name of some length"], [True])
    figure.savefig(io.BytesIO())  # which puts everything in its place
    for axes in figure.axes:
        (text,) = axes.texts
        assert text.get_window_extent().x1 < axes.get_window_extent().x1 + 5


@pytest.mark.parametrize("name", ["missing/a.png", "a.xyz", "."])
def test_summary_with_a_picture_that_cannot_be(finished, tmp_path, capsys, name):
    assert summarise_runs.main([str(finished), "--picture", str(tmp_path / name)]) == 2
    said = capsys.readouterr()
    assert said.err.startswith(f"error: {tmp_path / name}: expected")
    assert said.err.count("\n") == 1
    assert said.out == ""
    assert list(tmp_path.iterdir()) == []


def test_summary_of_what_is_no_run(tmp_path, capsys):
    assert summarise_runs.main([str(tmp_path)]) == 2
    assert capsys.readouterr().err.startswith("error: ")
