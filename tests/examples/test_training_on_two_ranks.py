"""Two processes with gloo: losses and gradients, training, evaluation."""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

pytest.importorskip("torchvision")
pytest.importorskip("lvis")
sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))

import lvis_demo_data
import torchvision_lvis_eval as evaluation
import two_ranks
import two_ranks_training
from checkpoints import Checkpoint
from pipeline_cases import assert_same_state, data_arguments, environment, run, start

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="no gloo"),
]
CATEGORIES = [
    lvis_demo_data.Category("star", "red", 40),
    lvis_demo_data.Category("disc", "blue", 30),
    lvis_demo_data.Category("bar", "cyan", 4),
]
SMALL = ["--short-sides", "64", "--long-side", "128"]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data") / "data"
    lvis_demo_data.write_demo_data(folder, 0, categories=CATEGORIES, val_instances=9)
    return folder


@pytest.fixture(scope="module")
def of_ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("ranks")
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    launcher += ["--nproc-per-node", "2", two_ranks.__file__, str(folder)]
    done = subprocess.run(launcher, env=environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(2)]


def test_mean_of_the_ranks_is_the_loss_of_one_process(of_ranks: list[dict[str, Any]]) -> None:
    """With every row counting, and every group on both ranks: the normalisers are equal there."""
    features, labels = two_ranks.rows()
    head = two_ranks.head(float("inf"))
    loss = head.loss(head(features), labels)
    loss.backward()
    mean = torch.stack([found["inf"]["loss"] for found in of_ranks]).mean()
    torch.testing.assert_close(mean, loss.detach(), rtol=1e-6, atol=0)
    for found in of_ranks:
        torch.testing.assert_close(
            found["inf"]["gradient"], head.fc.weight.grad, rtol=1e-5, atol=1e-7
        )


def test_ranks_normalise_and_draw_for_themselves(of_ranks: list[dict[str, Any]]) -> None:
    """As in the original: a rank's loss is that of its own rows alone, with its own draw."""
    features, labels = two_ranks.rows()
    head = two_ranks.head(1.0)
    for rank, found in enumerate(of_ranks):
        own = slice(rank * 12, rank * 12 + 12)
        torch.manual_seed(100 + rank)
        logits = head(features[own])
        loss = head.loss(logits, labels[own])
        torch.testing.assert_close(found["1.0"]["loss"], loss.detach())
    assert torch.equal(of_ranks[0]["1.0"]["gradient"], of_ranks[1]["1.0"]["gradient"])


def test_each_process_has_images_and_draws_of_its_own(data: Path, tmp_path: Path) -> None:
    """What is evaluated in between is the same detector in both, with its running statistics."""
    options = [*data_arguments(data), *SMALL, "--stage", "softmax", "--batch-size", "2"]
    options += ["--epochs", "3", "--ema", "0.9", "--evaluate-every", "1"]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    launcher += ["--nproc-per-node", "2", two_ranks_training.__file__, str(tmp_path)]
    command = [*launcher, *options, "--output", str(tmp_path / "run")]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    ranks = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2)]
    one, two = (rank["batches"] for rank in ranks)
    assert len(one) == len(two) > 3
    number = len(one) // 3
    for epoch in range(3):
        seen = [
            [
                image
                for images, _ in batches[epoch * number : (epoch + 1) * number]
                for image in images
            ]
            for batches in (one, two)
        ]
        assert len({*seen[0], *seen[1]}) == len(seen[0]) + len(seen[1]) == 4 * number
    seeds = [seed for batches in (one, two) for _, seed in batches]
    assert len(set(seeds)) == len(seeds)
    assert len(ranks[0]["buffers"]) == 2
    assert ranks[0]["buffers"] == ranks[1]["buffers"]


def test_when_one_process_fails_both_end_with_a_line(data: Path, tmp_path: Path) -> None:
    shutil.copytree(data, tmp_path / "data")
    for path in sorted((tmp_path / "data" / "train").iterdir())[::2]:
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    options = [*data_arguments(tmp_path / "data"), *SMALL, "--stage", "softmax", "--steps", "50"]
    options += ["--batch-size", "1", "--output", str(tmp_path / "run")]
    process = start(options, processes=2)
    printed, _ = process.communicate(timeout=200)
    assert process.returncode != 0
    told = [line for line in printed.splitlines() if line.startswith("process ")]
    assert any("truncated" in line for line in told), printed[-3000:]
    assert "another process has ended" in printed or len(told) == 2, printed[-3000:]
    assert "pair.cc" not in printed


def test_evaluation_on_two_ranks_is_that_of_one(data: Path, tmp_path: Path) -> None:
    """Stage two of no steps to speak of: what is compared is the evaluation."""
    stage_one = [*data_arguments(data), *SMALL, "--batch-size", "2", "--steps", "8"]
    run([*stage_one, "--stage", "softmax", "--output", str(tmp_path / "one")])
    text = (tmp_path / "one" / "metrics.json").read_text()
    assert json.loads(text)["softmax"]["AR"] > 0
    (tmp_path / "one" / "metrics.json").unlink()
    again = [*stage_one, "--stage", "softmax", "--output", str(tmp_path / "one"), "--resume"]
    run(again, processes=2)
    assert (tmp_path / "one" / "metrics.json").read_text() == text


def test_all_stages_on_two_ranks(data: Path, tmp_path: Path) -> None:
    """Both ranks end with the same running statistics; the figures are those of the checkpoint."""
    arguments = [*data_arguments(data), *SMALL, "--steps", "4", "--batch-size", "2"]
    states = []
    for name in ("a", "b"):
        run([*arguments, "--output", str(tmp_path / name)], processes=2)
        states.append(Checkpoint.load(tmp_path / name / "bags.pt").model)
    assert_same_state(*states)
    metrics = json.loads((tmp_path / "a" / "metrics.json").read_text())
    for name in ("softmax", "bags"):
        out = tmp_path / f"{name}.json"
        arguments = [str(tmp_path / "a" / f"{name}.pt"), "--metrics", str(out), "--no-progress"]
        assert evaluation.main(arguments) == 0
        assert json.loads(out.read_text())["bbox"] == metrics[name]
