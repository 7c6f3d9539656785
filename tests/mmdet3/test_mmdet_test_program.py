"""The test program takes the groups from the checkpoint, and refuses what does not fit."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("mmdet.registry", reason="mmdet is not installed: docs/mmdet.md says how")

import torch
from mmdet.registry import MODELS
from mmdet_cases import CONFIGS, EXAMPLES
from mmengine.config import Config
from mmengine.registry import init_default_scope

from balanced_group_softmax import GroupLayout

sys.path.insert(0, str(EXAMPLES))
BAGS, SOFTMAX = (
    CONFIGS / "demo" / f"{name}_demo.py" for name in ("bags_faster-rcnn", "faster-rcnn")
)
COUNTS = [1 + 3 * i for i in range(72)]
THRESHOLDS = (20, 90, 150)  # not those of the config

pytestmark = pytest.mark.timeout(600)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with images to test on, untrained checkpoints, and no training annotations."""
    from lvis_demo_data import write_demo_data

    folder = tmp_path_factory.mktemp("mmdet")
    data = folder / "data" / "demo"
    write_demo_data(data, val_instances=1)
    (data / "train.json").unlink()
    init_default_scope("mmdet")
    for name, path in (("bags", BAGS), ("softmax", SOFTMAX)):
        config = Config.fromfile(path)
        if name == "bags":
            config.model.roi_head.bbox_head.loss_cls = {
                "type": "BAGSLoss", "counts": COUNTS, "thresholds": THRESHOLDS
            }  # fmt: skip
        torch.manual_seed(0)
        torch.save({"state_dict": MODELS.build(config.model).state_dict()}, folder / f"{name}.pth")
    (folder / "cut.pth").write_bytes((folder / "bags.pth").read_bytes()[:1000])
    return folder


def run(folder: Path, *arguments: Any) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-W", "ignore", str(EXAMPLES / "mmdet" / "test.py")]
    return subprocess.run(
        [*command, *map(str, arguments)], capture_output=True, text=True, cwd=folder
    )


def test_the_groups_are_those_of_the_checkpoint(folder: Path) -> None:
    result = run(folder, BAGS, "bags.pth", "--out", "x.json")
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-2000:]
    assert "| Type | IoU | Area | MaxDets | CatIds | Result |" in result.stdout
    found = json.loads((folder / "x.json").read_text())
    categories = {row["category_id"] for row in found}
    assert len(found) > 1000
    assert categories <= set(range(1, 73))
    state = torch.load(folder / "bags.pth", weights_only=True)["state_dict"]
    assert GroupLayout.from_state_dict(state).names == ("0_20", "20_90", "90_150", "150_inf")


def shuffled(data: dict[str, Any]) -> dict[str, Any]:
    return {**data, "categories": data["categories"][::-1]}


def fewer(data: dict[str, Any]) -> dict[str, Any]:
    kept = data["categories"][:60]
    ids = {row["id"] for row in kept}
    rows = [row for row in data["annotations"] if row["category_id"] in ids]
    return {**data, "categories": kept, "annotations": rows}


@pytest.mark.parametrize(
    ("config", "checkpoint", "change", "message"),
    [
        (BAGS, "bags.pth", shuffled, "ascending order of category ids"),
        (SOFTMAX, "softmax.pth", fewer, "got 60 categories"),
    ],
)
def test_images_of_another_data_set_are_refused(
    folder: Path, config: Path, checkpoint: str, change: Any, message: str
) -> None:
    data = json.loads((folder / "data" / "demo" / "val.json").read_text())
    (folder / "data" / "demo" / "other.json").write_text(json.dumps(change(data)))
    options = ("--cfg-options", "test_dataloader.dataset.ann_file=other.json")
    result = run(folder, config, checkpoint, *options)
    assert result.returncode == 2, result.stderr[-2000:]
    assert "Traceback" not in result.stderr
    assert message in result.stderr.splitlines()[-1]


@pytest.mark.parametrize(
    ("checkpoint", "message"),
    [
        ("softmax.pth", "softmax.pth: Expected a state dict with the layout of a BAGSHead"),
        ("cut.pth", "cut.pth: expected tensors and plain values saved by torch, got"),
    ],
)
def test_checkpoints_that_do_not_fit_are_refused(
    folder: Path, checkpoint: str, message: str
) -> None:
    result = run(folder, BAGS, checkpoint)
    assert result.returncode == 2, result.stderr[-2000:]
    assert "Traceback" not in result.stderr
    assert f"error: {message}" in result.stderr.splitlines()[-1]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--out", "data/demo/val.json"), "another file than the one that is read"),
        (("--metrics", "softmax.pth"), "another file than the one that is read"),
        (("--out", "x.json", "--metrics", "data/../x.json"), "different files for --out and"),
        (("--cfg-options", "model.backbone.type=Nothing"), "that mmdet can build, got"),
    ],
    ids=["annotations", "checkpoint", "one file for both", "no such backbone"],
)
def test_outputs_and_configs_that_cannot_be_are_refused(
    folder: Path, options: tuple[str, ...], message: str
) -> None:
    files = {path: path.read_bytes() for path in folder.rglob("*.json")}
    result = run(folder, SOFTMAX, "softmax.pth", *options)
    assert result.returncode == 2, result.stderr[-2000:]
    assert "Traceback" not in result.stderr
    assert message in result.stderr.splitlines()[-1]
    assert {path: path.read_bytes() for path in folder.rglob("*.json")} == files


def test_a_detector_of_one_stage_is_refused(folder: Path) -> None:
    config = folder / "one_stage.py"
    config.write_text(f"_base_ = {str(SOFTMAX)!r}\nmodel = dict(_delete_=True, type='RetinaNet')\n")
    result = run(folder, config, "softmax.pth")
    assert result.returncode == 2, result.stderr[-2000:]
    assert "Expected a two-stage detector" in result.stderr.splitlines()[-1]


def test_processes_that_draw_the_same_data_at_once(tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; sys.path.insert(0, sys.argv[1])\n"
        "import train; train.draw_demo_data(Path('data'))"
    )
    command = [sys.executable, "-W", "ignore", "-c", code, str(EXAMPLES / "mmdet")]
    both = [
        subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.PIPE, text=True) for _ in range(2)
    ]
    said = [process.communicate(timeout=500)[1] for process in both]
    assert [process.returncode for process in both] == [0, 0], said
    assert (tmp_path / "data" / "train.json").is_file()
    assert [path.name for path in tmp_path.iterdir()] == ["data"]
