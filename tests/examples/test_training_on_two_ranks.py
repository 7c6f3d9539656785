"""Two processes with gloo: losses and gradients, training, evaluation."""

import json
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
from checkpoints import Checkpoint
from pipeline_cases import assert_same_state, data_arguments, environment, run

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
