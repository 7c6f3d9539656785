"""Options of the training example, each in a short run on a small data set."""

import argparse
import copy
import dataclasses
import json
import shutil
import sys
from pathlib import Path
from typing import Any
from urllib.error import URLError

import pytest
import torch

pytest.importorskip("torchvision")
pytest.importorskip("lvis")
sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))

import torchvision_lvis_train as example
from checkpoints import Checkpoint, read_state
from detectors import CLASSIFIER, make_detector, trained_without_eps
from pipeline_cases import assert_same_state, data_arguments
from recipe import Recipe, read_options, recipes_of
from torch import nn
from torchvision.models.detection._utils import overwrite_eps
from torchvision.ops.misc import FrozenBatchNorm2d
from training_arguments import STAGES

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")
SHORT = ["--steps", "2", "--batch-size", "2", "--short-sides", "64", "--long-side", "128"]


def run(few: Path, output: Path, *options: str, stage: str = "softmax") -> dict[str, Any]:
    """Run a stage; the figures of its detector."""
    arguments = [*data_arguments(few), *SHORT, "--stage", stage, "--output", str(output)]
    assert example.main([*arguments, *options]) == 0
    metrics: dict[str, dict[str, Any]] = json.loads((output / "metrics.json").read_text())
    return metrics[STAGES[stage][-1]]


@pytest.mark.parametrize(
    "options",
    [
        ["--amp", "bfloat16"],
        ["--amp", "float16"],
        ["--channels-last"],
        ["--sampler", "repeat_factor", "--repeat-threshold", "0.5", "--aspect-groups"],
        ["--optimizer", "adamw", "--schedule", "cosine", "--max-gradient-norm", "0"],
        ["--short-sides", "48", "64"],
        ["--num-workers", "1"],
        ["--evaluate-every", "1", "--steps", "9", "--batch-size", "4"],
    ],
    ids=" ".join,
)
def test_an_option_trains_and_evaluates(few: Path, tmp_path: Path, options: list[str]) -> None:
    assert run(few, tmp_path / "run", *options)["AP"] is not None
    checkpoint = Checkpoint.load(tmp_path / "run" / "softmax.pt")
    assert all(value.isfinite().all() for value in checkpoint.model.values())


def test_a_compiled_backbone_is_the_same_detector(
    few: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Traced, and then run as it is: generating code takes minutes."""
    compile_ = nn.Module.compile
    traced = []

    def traced_only(self: nn.Module, **options: Any) -> None:
        traced.append(type(self).__name__)
        compile_(self, backend="eager", **options)

    monkeypatch.setattr(nn.Module, "compile", traced_only)
    run(few, tmp_path / "compiled", "--compile")
    assert traced == ["SmallBackbone"]
    run(few, tmp_path / "plain")
    states = [
        Checkpoint.load(tmp_path / name / "softmax.pt").model for name in ("compiled", "plain")
    ]
    assert states[0].keys() == states[1].keys()
    for name, value in states[1].items():
        torch.testing.assert_close(states[0][name], value, rtol=1e-3, atol=1e-4)


def test_losses_are_logged_for_tensorboard(few: Path, tmp_path: Path) -> None:
    reader = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    run(few, tmp_path / "run", "--tensorboard")
    events = reader.EventAccumulator(str(tmp_path / "run" / "tensorboard" / "softmax"))
    events.Reload()
    assert {"loss", "loss_classifier", "loss_box_reg"} <= set(events.Tags()["scalars"])
    assert [event.step for event in events.Scalars("loss")] == [1, 2]


def test_tensorboard_that_is_missing_is_told_before_training(
    few: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    find = example.importlib.util.find_spec
    monkeypatch.setattr(
        example.importlib.util,
        "find_spec",
        lambda name, *rest: None if name == "tensorboard" else find(name, *rest),
    )
    arguments = [*data_arguments(few), *SHORT, "--tensorboard", "--output", str(tmp_path / "run")]
    assert example.main(arguments) == 2
    assert "Expected the package tensorboard" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("cached", [False, True])
def test_evaluation_in_between_is_of_the_detector_that_would_be_saved(
    few: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cached: bool
) -> None:
    """With a running mean that stays at the first step's weights. And it leaves no trace."""
    run(few, tmp_path / "one")
    seen = []
    monkeypatch.setattr(
        example,
        "report_epoch",
        lambda setting, name, model, epoch: seen.append((epoch, copy.deepcopy(model.state_dict()))),
    )
    start = ["--checkpoint", str(tmp_path / "one" / "softmax.pt")]
    start += ["--steps", "6", "--batch-size", "4"]
    if cached:
        start += ["--cache-features", str(tmp_path / "cache")]
    every = ["--evaluate-every", "1"]
    states = []
    for name, options in (
        ("still", ["--ema", "1", *every]),
        ("with", ["--ema", "0.5", *every]),
        ("without", ["--ema", "0.5"]),
    ):
        run(few, tmp_path / name, *start, *options, stage="continued")
        states.append(Checkpoint.load(tmp_path / name / "softmax_continued.pt").model)
    assert [epoch for epoch, _ in seen] == [1, 2, 1, 2]
    for _, state in seen[:2]:
        assert_same_state(state, states[0])
    assert_same_state(states[1], states[2])
    assert not torch.equal(states[0][f"{CLASSIFIER}weight"], states[1][f"{CLASSIFIER}weight"])


def test_masks_are_trained_and_evaluated(few: Path, tmp_path: Path) -> None:
    config = str(example.DEMO.with_name("demo_mask.toml"))
    metrics = run(few, tmp_path / "run", "--config", config, stage="compare")
    assert metrics["AP"] is not None
    assert metrics["segm_AP"] is not None
    table = (tmp_path / "run" / "table.md").read_text()
    assert table.index("bbox:") < table.index("segm:")
    assert table.count("| balanced group softmax |") == 2


def test_stages_one_by_one_and_a_checkpoint_from_elsewhere(few: Path, tmp_path: Path) -> None:
    torch.manual_seed(3)
    elsewhere = make_detector(
        Recipe(backbone="small", box_regression="shared", short_sides=(64,), long_side=128), 9
    )
    torch.save({"state_dict": elsewhere.state_dict()}, tmp_path / "elsewhere.pth")
    start = ["--checkpoint", str(tmp_path / "elsewhere.pth"), "--learning-rate", "1e-30"]
    run(few, tmp_path / "one", *start)
    state = Checkpoint.load(tmp_path / "one" / "softmax.pt").model
    for name, value in elsewhere.state_dict().items():
        if not name.startswith(CLASSIFIER) and "running" not in name and "num_batches" not in name:
            torch.testing.assert_close(state[name], value, atol=1e-20, rtol=1e-6, msg=name)

    start = ["--checkpoint", str(tmp_path / "one" / "softmax.pt")]
    run(few, tmp_path / "two", *start, stage="bags")
    run(few, tmp_path / "control", *start, stage="continued")
    bags = Checkpoint.load(tmp_path / "two" / "bags.pt").model
    control = Checkpoint.load(tmp_path / "control" / "softmax_continued.pt").model
    for name, value in state.items():
        if not name.startswith(CLASSIFIER):
            assert torch.equal(bags[name], value), name
            assert torch.equal(control[name], value), name
    assert not torch.equal(control[f"{CLASSIFIER}weight"], state[f"{CLASSIFIER}weight"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "Expected `--checkpoint` with `--stage bags`"),
        (["--checkpoint", "absent.pt"], "absent.pt"),
        (["--checkpoint", "{bags}"], "Expected a detector with plain softmax to start from"),
        (["--checkpoint", "{softmax}", "--backbone", "resnet50"], "with `backbone` resnet50"),
        (["--resume", "auto"], "Expected `--output` with `--resume`"),
    ],
)
def test_what_stage_two_cannot_start_from(
    few: Path, tmp_path: Path, capsys: Any, options: list[str], message: str
) -> None:
    if "{" in "".join(options):
        run(few, tmp_path / "one", stage="compare")
        places = {name: str(tmp_path / "one" / f"{name}.pt") for name in ("softmax", "bags")}
        options = [option.format(**places) for option in options]
    output = [] if "--resume" in options else ["--output", str(tmp_path / "run")]
    arguments = [*data_arguments(few), *SHORT, "--stage", "bags", *output]
    assert example.main([*arguments, *options]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_images_that_cannot_be_read_are_passed_and_listed(few: Path, tmp_path: Path) -> None:
    shutil.copytree(few, tmp_path / "data")
    bad = [sorted((tmp_path / "data" / part).iterdir())[1] for part in ("train", "val")]
    for path in bad:
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    arguments = [*data_arguments(tmp_path / "data"), *SHORT, "--stage", "softmax"]
    arguments += ["--steps", "5"]  # an epoch
    assert example.main([*arguments, "--output", str(tmp_path / "run")]) == 2
    again = [*arguments, "--skip-broken", "--output", str(tmp_path / "again")]
    assert example.main(again) == 0
    lines = (tmp_path / "again" / "broken_images.txt").read_text().splitlines()
    assert [line.partition(": ")[0] for line in lines] == [str(path) for path in bad]


def test_the_checkpoint_says_the_kind_of_detector(few: Path, tmp_path: Path) -> None:
    """The demo's recipe, which nobody named, says Faster R-CNN."""
    run(few, tmp_path / "one", "--detector", "mask_rcnn")
    start = ["--checkpoint", str(tmp_path / "one" / "softmax.pt")]
    assert run(few, tmp_path / "two", *start, stage="bags")["segm_AP"] is not None


def test_a_large_detector_is_not_trained_by_the_recipe_of_the_demo(
    few: Path, tmp_path: Path, capsys: Any
) -> None:
    run(few, tmp_path / "one")
    found = Checkpoint.load(tmp_path / "one" / "softmax.pt")
    found.recipe = dataclasses.replace(found.recipe, backbone="resnet50")
    found.save(tmp_path / "large.pt")
    arguments = [*data_arguments(few), *SHORT, "--stage", "bags"]
    arguments += ["--checkpoint", str(tmp_path / "large.pt"), "--output", str(tmp_path / "two")]
    assert example.main(arguments) == 2
    assert "Expected `--config` with a detector of backbone resnet50" in capsys.readouterr().err
    assert not (tmp_path / "two").exists()


def test_stage_two_follows_its_own_recipe(few: Path, tmp_path: Path) -> None:
    run(few, tmp_path / "one")
    start = ["--checkpoint", str(tmp_path / "one" / "softmax.pt")]
    heads = []
    changes: list[list[str]] = [
        *([], ["--rois-per-image", "4"], ["--foreground-share", "0.03"]),
        *(["--bags.flip", "0"], ["--short-sides", "96"]),
    ]
    for number, change in enumerate(changes):
        run(few, tmp_path / str(number), *start, *change, stage="bags")
        state = Checkpoint.load(tmp_path / str(number) / "bags.pt").model
        heads.append(state[f"{CLASSIFIER}fc.weight"])
    for change, head in zip(changes[1:], heads[1:], strict=True):
        assert not torch.equal(head, heads[0]), change


def test_both_stages_have_the_same_architecture(few: Path, tmp_path: Path, capsys: Any) -> None:
    arguments = [*data_arguments(few), *SHORT, "--bags.box-regression", "category"]
    assert example.main([*arguments, "--output", str(tmp_path / "run")]) == 2
    assert "Expected the same `box_regression` in both stages" in capsys.readouterr().err


def test_nothing_stays_random_and_frozen(few: Path, tmp_path: Path, capsys: Any) -> None:
    arguments = [*data_arguments(few), *SHORT, "--backbone", "resnet50", "--stage", "softmax"]
    assert example.main([*arguments, "--output", str(tmp_path / "run")]) == 2
    assert "to start from nothing, got `weights` none" in capsys.readouterr().err


def test_detectors_for_coco_were_trained_without_an_epsilon() -> None:
    """torchvision sets the epsilon to 0 after loading them; a checkpoint could not keep that."""
    recipe = Recipe(backbone="resnet18", trainable_layers=0, short_sides=(64,), long_side=128)
    model = make_detector(recipe, 3).eval()
    for module in model.modules():
        if isinstance(module, FrozenBatchNorm2d):
            module.running_var.uniform_(1e-6, 1e-4)
            module.weight.copy_(module.running_var.sqrt())
    theirs = copy.deepcopy(model)
    overwrite_eps(theirs, 0.0)
    image = torch.rand(1, 3, 64, 64)
    wanted = theirs.backbone(image)
    before = model.backbone(image)
    trained_without_eps(model)
    again = make_detector(recipe, 3).eval()
    again.load_state_dict(model.state_dict())
    for name, value in again.backbone(image).items():
        scale = wanted[name].norm()
        assert (value - wanted[name]).norm() < 1e-4 * scale
        assert (before[name] - wanted[name]).norm() > 1e-2 * scale


def test_what_a_checkpoint_lacks_does_not_stay_random_and_frozen(
    few: Path, tmp_path: Path, capsys: Any
) -> None:
    options = ["--backbone", "resnet18", "--stage", "softmax", "--steps", "1"]
    recipe = Recipe(backbone="resnet18", short_sides=(64,), long_side=128)
    state = make_detector(recipe, 3).state_dict()
    head = {name: value for name, value in state.items() if name.startswith("roi_heads.")}
    arguments = [*data_arguments(few), *SHORT, *options]
    for name, content, status in (("head", head, 2), ("whole", state, 0)):
        torch.save(content, tmp_path / f"{name}.pt")
        start = ["--checkpoint", str(tmp_path / f"{name}.pt")]
        assert example.main([*arguments, *start, "--output", str(tmp_path / name)]) == status
    assert "Expected weights of what does not train, got none for " in capsys.readouterr().err


def test_validation_masks_are_looked_at_before_training(
    few: Path, tmp_path: Path, capsys: Any
) -> None:
    shutil.copytree(few, tmp_path / "data")
    path = tmp_path / "data" / "val.json"
    content = json.loads(path.read_text())
    del content["annotations"][0]["segmentation"]
    path.write_text(json.dumps(content))
    arguments = [*data_arguments(tmp_path / "data"), *SHORT, "--output", str(tmp_path / "run")]
    assert example.main([*arguments, "--detector", "mask_rcnn"]) == 2
    assert "segmentation" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_weights_that_cannot_be_downloaded_are_told(
    few: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    def offline(*args: Any, **kwargs: Any) -> None:
        raise URLError("no network")

    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", offline)
    arguments = [*data_arguments(few), *SHORT, "--backbone", "resnet18", "--stage", "softmax"]
    arguments += ["--weights", "imagenet", "--output", str(tmp_path / "run")]
    assert example.main(arguments) == 2
    assert "Expected `weights` imagenet in torch's cache or on" in capsys.readouterr().err


def test_arguments_beside_weights_are_read_and_nothing_is_run(tmp_path: Path) -> None:
    """As torchvision's own training scripts keep them."""
    content = {"model": {"a": torch.ones(1)}, "args": argparse.Namespace(lr=0.1), "epoch": 3}
    torch.save(content, tmp_path / "theirs.pth")
    if hasattr(torch.serialization, "safe_globals"):
        assert torch.equal(read_state(tmp_path / "theirs.pth")["model"]["a"], torch.ones(1))
    torch.save({"path": Path("a")}, tmp_path / "other.pth")
    with pytest.raises(ValueError, match=r"other\.pth: expected tensors and") as caught:
        read_state(tmp_path / "other.pth")
    assert str(caught.value).isprintable()


def test_boxes_keep_their_digits_under_autocast() -> None:
    model = make_detector(Recipe(backbone="small", short_sides=(64,), long_side=128), 3).train()
    seen = []
    model.roi_heads.box_roi_pool.register_forward_pre_hook(
        lambda module, args: seen.extend(boxes.dtype for boxes in args[1])
    )
    target = {"boxes": torch.tensor([[1.0, 1.0, 30.0, 30.0]]), "labels": torch.tensor([1])}
    with torch.autocast("cpu", torch.bfloat16):
        model([torch.rand(3, 64, 64)], [target])
    assert set(seen) == {torch.float32}


def test_a_later_word_on_epochs_replaces_steps() -> None:
    made = recipes_of(read_options(example.DEMO), {"": {"epochs": 2.0}})
    assert [one.steps for one in made.values()] == [0, 0]
    made = recipes_of(read_options(example.DEMO), {"": {"epochs": 2.0, "steps": 5}})
    assert [one.steps for one in made.values()] == [5, 5]
