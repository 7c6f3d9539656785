"""The training entries of examples/detectron2, run as users run them, and their evaluation."""

import json
import os
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip(
    "detectron2.modeling", reason="detectron2 is not installed: docs/detectron2.md says how"
)
pytest.importorskip("lvis")

from detectron2.structures import BitMasks, Boxes, BoxMode, Instances

EXAMPLES = Path(__file__).parents[2] / "examples"
FOLDER = EXAMPLES / "detectron2"
sys.path.append(str(EXAMPLES))
sys.path.insert(0, str(FOLDER))

import detectron2_checkpoints  # noqa: E402
import detectron2_evaluation  # noqa: E402
import detectron2_setup  # noqa: E402

from balanced_group_softmax import GroupLayout  # noqa: E402


def run(script: str, *arguments: str, cwd: Path) -> str:
    """Run an entry; returns what it printed."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    result = subprocess.run(
        [sys.executable, str(FOLDER / script), *arguments],
        capture_output=True,
        text=True,
        cwd=cwd,
        env=environment,
    )
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-4000:]
    return result.stdout + result.stderr


@pytest.mark.parametrize("script", ["train_net.py", "lazyconfig_train_net.py"])
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "Expected `--config-file FILE`, got none"),
        (["--config-file", "none.yaml"], "Expected `--config-file none.yaml`, found nothing there"),
        (["--config-file", "other.yaml", "NOBODY", "3"], "other.yaml: "),
    ],
    ids=["none", "missing", "other"],
)
def test_bad_arguments_end_with_one_line(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    script: str,
    arguments: list[str],
    message: str,
) -> None:
    (tmp_path / "other.yaml").write_text("categories: []\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [script, *arguments])
    with pytest.raises(SystemExit) as left:
        runpy.run_path(str(FOLDER / script), run_name="__main__")
    assert left.value.code == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith(f"error: {message}")
    assert [path.name for path in tmp_path.iterdir()] == ["other.yaml"]


def data_arguments(few: Path) -> list[str]:
    return [
        *("--dataset", "demo_train", str(few / "train.json"), str(few / "train")),
        *("--dataset", "demo_val", str(few / "val.json"), str(few / "val")),
    ]


def logged(folder: Path) -> set[str]:
    """The names in the event storage, as its writer has them."""
    lines = (folder / "metrics.json").read_text().splitlines()
    return {name for line in lines for name in json.loads(line)}


def checkpoint(folder: Path) -> Any:
    return torch.load(folder / "model_final.pth", weights_only=True)


# --- training ------------------------------------------------------------------------------------


def test_yaml_from_softmax_to_bags_resumed_and_evaluated(few: Path, tmp_path: Path) -> None:
    small = [
        *("MODEL.DEVICE", "cpu", "DATALOADER.NUM_WORKERS", "0", "SOLVER.REFERENCE_WORLD_SIZE", "0"),
        *("INPUT.MIN_SIZE_TRAIN", "(96,)", "INPUT.MIN_SIZE_TEST", "96"),
        *("SOLVER.IMS_PER_BATCH", "2", "MODEL.ROI_HEADS.NUM_CLASSES", "3"),
        *("MODEL.RESNETS.DEPTH", "18", "MODEL.RESNETS.RES2_OUT_CHANNELS", "64"),
        *("DATASETS.TRAIN", "('demo_train',)", "DATASETS.TEST", "('demo_val',)"),
        *("MODEL.RPN.POST_NMS_TOPK_TEST", "20", "SOLVER.STEPS", "()"),
    ]

    def train(config: str, *options: str, flags: tuple[str, ...] = ()) -> str:
        path = str(FOLDER / "configs" / config)
        arguments = [*flags, *data_arguments(few), "--config-file", path, *small, *options]
        return run("train_net.py", *arguments, cwd=tmp_path)

    softmax, bags = tmp_path / "softmax", tmp_path / "bags"
    plain = ("SOLVER.MAX_ITER", "1", "MODEL.WEIGHTS", "", "OUTPUT_DIR", str(softmax))
    train("faster_rcnn_r50_lvis_v1.yaml", *plain)
    start = ("MODEL.WEIGHTS", str(softmax / "model_final.pth"), "OUTPUT_DIR", str(bags))
    name = "faster_rcnn_r50_lvis_v1_bags.yaml"
    text = train(name, *start, "SOLVER.MAX_ITER", "2")
    assert "cls_score.* starts from the checkpoint's softmax classifier" in text
    before = checkpoint(softmax)["model"]
    after = checkpoint(bags)["model"]
    kept = [key for key in before if "cls_score" not in key]
    assert kept
    assert all(torch.equal(before[key], after[key]) for key in kept)
    assert checkpoint(bags)["iteration"] == 1

    text = train(name, *start, "SOLVER.MAX_ITER", "4", flags=("--resume",))
    assert "Starting training from iteration 2" in text
    assert checkpoint(bags)["iteration"] == 3
    assert {"loss_cls_bg_fg", "loss_cls_10_100"} <= logged(bags)
    figures = bags / "inference" / "demo_val" / "metrics.json"
    written = json.loads(figures.read_text())
    assert "AP_0_10" in written["bbox"]  # count groups are those of training

    # The checkpoint says what its groups are.
    figures.unlink()
    alone = ("MODEL.BAGS.LAYOUT", str(bags / "model_final.pth"), "OUTPUT_DIR", str(bags))
    train(name, *alone, "MODEL.WEIGHTS", str(bags / "model_final.pth"), flags=("--eval-only",))
    assert json.loads(figures.read_text()) == written


@pytest.mark.parametrize("processes", [1, 2])
def test_lazyconfig_from_softmax_to_bags(few: Path, tmp_path: Path, processes: int) -> None:
    small = ["model.roi_heads.num_classes=3", "dataloader.train.total_batch_size=2"]
    more = ["--num-gpus", str(processes), "--dist-url", "auto"]
    if processes > 1:
        small += ["train.ddp.device_ids=null"]  # which DDP wants on a CPU

    def train(config: str, *options: str, flags: tuple[str, ...] = ()) -> str:
        path = str(FOLDER / "configs/lazy" / config)
        arguments = [*flags, *more, *data_arguments(few), "--config-file", path, *small, *options]
        return run("lazyconfig_train_net.py", *arguments, cwd=tmp_path)

    softmax, bags = tmp_path / "softmax", tmp_path / "bags"
    train("demo.py", "train.max_iter=1", f"train.output_dir={softmax}")
    start = (f"train.init_checkpoint={softmax / 'model_final.pth'}", f"train.output_dir={bags}")
    train("demo_bags.py", *start, "train.max_iter=2")
    state = checkpoint(bags)
    assert state["iteration"] == 1
    assert GroupLayout.from_state_dict(state["model"]).num_categories == 3
    assert "AP_0_10" in json.loads((bags / "inference/metrics.json").read_text())["bbox"]
    if processes == 1:
        text = train("demo_bags.py", *start, "train.max_iter=3", flags=("--resume",))
        assert "Starting training from iteration 2" in text
        assert checkpoint(bags)["iteration"] == 2


def test_a_run_that_is_killed_can_be_resumed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(*_: Any) -> None:
        raise KeyboardInterrupt

    checkpointer = detectron2_checkpoints.Checkpointer(torch.nn.Linear(1, 1), str(tmp_path))
    checkpointer.save("first")
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", killed)
        with pytest.raises(KeyboardInterrupt):
            checkpointer.save("second")
    assert checkpointer.get_checkpoint_file() == str(tmp_path / "first.pth")
    checkpointer.save("third")
    assert checkpointer.get_checkpoint_file() == str(tmp_path / "third.pth")


# --- evaluation ----------------------------------------------------------------------------------


def truth_as_outputs(path: Path) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    """What a perfect detector would say, image by image."""
    data = json.loads(path.read_text())
    pairs = []
    for image in data["images"]:
        rows = [row for row in data["annotations"] if row["image_id"] == image["id"]]
        size = (image["height"], image["width"])
        boxes = torch.tensor([row["bbox"] for row in rows], dtype=torch.float64).reshape(-1, 4)
        masks = BitMasks.from_polygon_masks([row["segmentation"] for row in rows], *size)
        found = Instances(
            size,
            pred_boxes=Boxes(BoxMode.convert(boxes, BoxMode.XYWH_ABS, BoxMode.XYXY_ABS)),
            scores=torch.linspace(1, 0.5, len(rows)),
            pred_classes=torch.tensor([row["category_id"] - 1 for row in rows]).long(),
            pred_masks=masks.tensor,
        )
        pairs.append(({"image_id": image["id"]}, {"instances": found}))
    return pairs


@pytest.fixture
def registered(few: Path) -> Path:
    datasets = [(f"{s}_{few}", str(few / f"{s}.json"), str(few / s)) for s in ("train", "val")]
    detectron2_setup.register_datasets(datasets)
    return few


def test_a_perfect_detector_gets_everything(registered: Path, tmp_path: Path) -> None:
    evaluator = detectron2_evaluation.LVISReport(
        f"val_{registered}", f"train_{registered}", ("bbox", "segm"), str(tmp_path)
    )
    evaluator.reset()
    for image, output in truth_as_outputs(registered / "val.json"):
        evaluator.process([image], [output])
    figures = evaluator.evaluate()
    assert figures["bbox"]["AP"] == pytest.approx(100)
    assert figures["segm"]["AP"] > 99
    assert figures["bbox"]["AP_0_10"] == pytest.approx(100)
    assert (tmp_path / "results.json").is_file()


def test_labels_that_are_off_by_one_get_nothing(registered: Path) -> None:
    evaluator = detectron2_evaluation.LVISReport(f"val_{registered}")
    evaluator.reset()
    for image, output in truth_as_outputs(registered / "val.json"):
        found = output["instances"]
        found.pred_classes = (found.pred_classes + 1) % 3
        evaluator.process([image], [output])
    assert evaluator.evaluate()["bbox"]["AP"] < 1


def test_masks_are_asked_for_where_there_are_none(registered: Path) -> None:
    evaluator = detectron2_evaluation.LVISReport(f"val_{registered}", kinds=("segm",))
    evaluator.reset()
    image, output = truth_as_outputs(registered / "val.json")[0]
    output["instances"].remove("pred_masks")
    with pytest.raises(ValueError, match="masks to evaluate segm"):
        evaluator.process([image], [output])


def test_a_data_set_that_is_not_registered() -> None:
    with pytest.raises(ValueError, match=r"'nobody'.*--dataset"):
        detectron2_evaluation.LVISReport("nobody")
