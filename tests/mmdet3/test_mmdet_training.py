"""A short training by mmdet's own runner: plain softmax, then BAGS, then the test program."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("mmdet.registry", reason="mmdet is not installed: docs/mmdet.md says how")

import torch
from mmdet_cases import CONFIGS, EXAMPLES

from balanced_group_softmax import GroupLayout

sys.path[:0] = [str(EXAMPLES), str(EXAMPLES / "mmdet")]
import runs  # noqa: E402

DEMO = CONFIGS / "demo"
SOFTMAX_STEPS, BAGS_STEPS = 200, 120
VAL_INSTANCES = 10  # of each category

pytestmark = pytest.mark.timeout(3600)  # some four minutes on two cores that do nothing else


def run(folder: Path, program: str, *arguments: object, processes: int = 1) -> str:
    """Run a program of the examples in a folder; return what it printed."""
    start = [sys.executable, "-W", "ignore"]
    if processes > 1:
        start += ["-m", "torch.distributed.run", "--nproc-per-node", str(processes)]
        start += ["--master-port", str(29500 + os.getpid() % 500)]
    command = [*start, str(EXAMPLES / "mmdet" / program), *map(str, arguments)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MPLBACKEND": "Agg"}
    result = subprocess.run(command, capture_output=True, text=True, cwd=folder, env=environment)
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-4000:]
    return result.stdout + result.stderr


def steps(number: int, *, val: bool = True) -> list[str]:
    return [
        "--cfg-options",
        f"train_cfg.max_iters={number}",
        f"train_cfg.val_interval={number if val else 10**6}",
        f"param_scheduler.1.end={number}",
        "default_hooks.logger.interval=20",
    ]


def figures(printed: str) -> dict[str, float]:
    """What LVISMetric logs after the last evaluation."""
    found = re.findall(r"lvis/bbox_(\w+): (-?[\d.]+)", printed)
    assert found, printed[-2000:]
    return {name: float(value) for name, value in found}


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str, str]:
    """A folder with data and checkpoints, and what both trainings printed."""
    from lvis_demo_data import write_demo_data

    folder = tmp_path_factory.mktemp("mmdet")
    write_demo_data(folder / "data" / "demo", val_instances=VAL_INSTANCES)
    softmax = run(
        folder, "train.py", DEMO / "faster-rcnn_demo.py", "--seed", 0, *steps(SOFTMAX_STEPS)
    )
    start = folder / "work_dirs" / "faster-rcnn_demo" / f"iter_{SOFTMAX_STEPS}.pth"
    bags = run(
        folder, "train.py", DEMO / "bags_faster-rcnn_demo.py", "--seed", 0,
        "--load-from", start, *steps(BAGS_STEPS),
    )  # fmt: skip
    return folder, softmax, bags


def test_rare_categories_gain(trained: tuple[Path, str, str]) -> None:
    _, softmax, bags = trained
    assert "Average Precision  (AP) @[ IoU=0.50:0.95 | area=   all | maxDets=300" in softmax
    before, after = figures(softmax), figures(bags)
    print(f"APr {before['APr']} -> {after['APr']}, AP {before['AP']} -> {after['AP']}")
    assert after["APr"] > before["APr"]
    assert after["AP"] > before["AP"]
    assert "BAGSStartHook: 1 classifiers start from plain softmax" in bags
    assert "BAGSFreezeHook: 'classifier' trains" in bags
    assert re.search(r"loss_cls_0_10: [\d.]+ .*acc_0_10: [\d.]+", bags)


def test_only_the_classifier_changed_and_the_checkpoint_says_its_layout(
    trained: tuple[Path, str, str],
) -> None:
    folder, _, _ = trained
    states = [
        torch.load(path, map_location="cpu", weights_only=False)["state_dict"]  # our own files
        for path in (
            folder / "work_dirs" / "faster-rcnn_demo" / f"iter_{SOFTMAX_STEPS}.pth",
            folder / "work_dirs" / "bags_faster-rcnn_demo" / f"iter_{BAGS_STEPS}.pth",
        )
    ]
    softmax, bags = states
    changed = {name for name in softmax if not torch.equal(softmax[name], bags[name])}
    assert changed == {f"roi_head.bbox_head.fc_cls.{kind}" for kind in ("weight", "bias")}
    layout = GroupLayout.from_state_dict(bags)
    assert layout.num_categories == 72
    assert [len(group) for group in layout.groups] == [33, 28, 9, 2]


def test_the_test_program_gives_the_figures_of_lvis_metric(
    trained: tuple[Path, str, str],
) -> None:
    folder, _, bags = trained
    checkpoint = folder / "work_dirs" / "bags_faster-rcnn_demo" / f"iter_{BAGS_STEPS}.pth"
    printed = run(
        folder, "test.py", DEMO / "bags_faster-rcnn_demo.py", checkpoint,
        "--out", "x.pkl", "--eval", "bbox", "--metrics", "metrics.json",
        "--train-annotations", "data/demo/train.json",
    )  # fmt: skip
    assert "| Type | IoU | Area | MaxDets | CatIds | Result |" in printed
    assert re.search(r"\|\s*0_10 \|", printed)
    ours = json.loads((folder / "metrics.json").read_text())["bbox"]
    for name, value in figures(bags).items():
        if value >= 0:
            assert ours[name] / 100 == pytest.approx(value, abs=6e-4), name
    assert (folder / "x.pkl").stat().st_size > 100_000


def test_two_processes_train_the_classifier_alone(trained: tuple[Path, str, str]) -> None:
    folder, _, _ = trained
    start = folder / "work_dirs" / "faster-rcnn_demo" / f"iter_{SOFTMAX_STEPS}.pth"
    printed = run(
        folder, "train.py", DEMO / "bags_faster-rcnn_demo.py", "--seed", 0,
        "--load-from", start, "--work-dir", "two", "--launcher", "pytorch", *steps(22, val=False),
        processes=2,
    )  # fmt: skip
    assert "BAGSFreezeHook: 'classifier' trains" in printed
    before = torch.load(start, map_location="cpu", weights_only=False)["state_dict"]
    after = torch.load(folder / "two" / "iter_22.pth", map_location="cpu", weights_only=False)
    changed = {n for n in before if not torch.equal(before[n], after["state_dict"][n])}
    assert changed == {f"roi_head.bbox_head.fc_cls.{kind}" for kind in ("weight", "bias")}


def test_a_stopped_training_goes_on(trained: tuple[Path, str, str]) -> None:
    folder, _, _ = trained
    config = DEMO / "bags_faster-rcnn_demo.py"
    start = folder / "work_dirs" / "faster-rcnn_demo" / f"iter_{SOFTMAX_STEPS}.pth"
    common = [config, "--seed", 0, "--work-dir", "again"]
    run(folder, "train.py", *common, "--load-from", start, *steps(22, val=False))
    printed = run(folder, "train.py", *common, "--resume", *steps(24, val=False))
    assert "resumed epoch: 0, iter: 22" in printed
    assert (folder / "again" / "iter_24.pth").exists()


@pytest.mark.parametrize(
    ("program", "arguments", "message"),
    [
        ("train.py", ["none.py"], "Expected a config file, found none"),
        (
            "test.py",
            [DEMO / "faster-rcnn_demo.py", "none.pth"],
            "Expected a checkpoint, found none",
        ),
        (
            "train.py",
            [DEMO / "faster-rcnn_demo.py", "--load-from", "picture.pth"],
            "expected a file of torch.save, got one that starts",
        ),
        ("test.py", [DEMO / "faster-rcnn_demo.py", "picture.pth"], "expected a file of torch.save"),
        (
            "test.py",
            [DEMO / "faster-rcnn_demo.py", "picture.pth", "--metrics", "picture.pth"],
            "expected another file than the one that is read",
        ),
    ],
)
def test_bad_arguments_end_with_one_line(
    tmp_path: Path, program: str, arguments: list[object], message: str
) -> None:
    (tmp_path / "picture.pth").write_bytes(b"\xff\xd8\xff\xe0")
    files = sorted(tmp_path.iterdir())
    command = [sys.executable, str(EXAMPLES / "mmdet" / program), *map(str, arguments)]
    result = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert result.returncode == 2
    assert f"error: {arguments[-1]}: {message}" in result.stderr
    assert "Traceback" not in result.stderr
    assert sorted(tmp_path.iterdir()) == files


def test_what_is_no_config_of_mmdet(tmp_path: Path) -> None:
    (tmp_path / "other.json").write_text('{"categories": []}')
    (tmp_path / "cut.json").write_text('{"model": ')
    for name, message in (("other", "with `model`, got categories"), ("cut", "mmdet, got")):
        args = runs.parser("").parse_args([str(tmp_path / f"{name}.json")])
        with pytest.raises(ValueError, match=f"{name}.json: Expected a config of .*{message}"):
            runs.read_config(args)


def test_a_change_without_a_value(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        runs.parser("").parse_args(["a.py", "--cfg-options", "a=1", "load_from"])
    assert left.value.code == 2
    assert "argument --cfg-options: expected KEY=VALUE, got 'load_from'" in capsys.readouterr().err
