"""Every method that BAGS is compared with, as one command from one trained detector."""

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("torchvision")
pytest.importorskip("lvis")
sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))

import nearest_means
import stages
import torchvision_lvis_train as example
from checkpoints import Checkpoint
from detection_data import LVISDetection
from detectors import CLASSIFIER, PREDICTOR
from discriminant_start import strengths
from methods import METHODS, image_counts, options_of, training_data
from pipeline_cases import assert_same_state, data_arguments
from recipe import Recipe, read_options, recipes_of

from balanced_group_softmax import GroupLayout
from balanced_group_softmax.discriminant import (
    DiscriminantHead,
    FeatureStatistics,
    discriminant_rows,
)
from balanced_group_softmax.rebalance.class_weights import (
    class_balanced_weights,
    inverse_frequency_weights,
)

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")
SHORT = ["--steps", "2", "--batch-size", "2", "--short-sides", "64", "--long-side", "128"]
FROM_SOFTMAX = [name for name, method in METHODS.items() if method.start == "softmax"]
CONFIGS = Path(example.__file__).parent / "configs"


@pytest.fixture(scope="module")
def softmax(few: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkpoint of a softmax detector."""
    folder = tmp_path_factory.mktemp("runs") / "softmax"
    assert run(few, folder, "--method", "softmax") == 0
    return folder / "softmax.pt"


def run(few: Path, output: Path, *options: str) -> int:
    return example.main([*data_arguments(few), *SHORT, "--output", str(output), *options])


def trained(few: Path, output: Path, name: str, softmax: Path, *options: str) -> Checkpoint:
    assert run(few, output, "--method", name, "--checkpoint", str(softmax), *options) == 0
    return Checkpoint.load(output / f"{name}.pt")


def test_each_row_of_the_papers_table_is_a_method() -> None:
    rows = [method.row for method in METHODS.values() if method.row]
    assert sorted(rows) == list(range(1, 15))


@pytest.mark.parametrize("name", FROM_SOFTMAX)
def test_a_method_is_one_command(few: Path, tmp_path: Path, softmax: Path, name: str) -> None:
    before = Checkpoint.load(softmax).model
    checkpoint = trained(few, tmp_path / "run", name, softmax)
    method = METHODS[name]
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert metrics[name]["AP"] is not None
    assert checkpoint.stage == name

    model = checkpoint.make_model().eval()
    classifier: Any = model.get_submodule(PREDICTOR)
    assert (method.kind or torch.nn.Linear) is type(classifier)
    image = torch.rand(3, 96, 96)
    assert model([image])[0]["scores"].isfinite().all()
    assert_same_state(model.state_dict(), checkpoint.model)

    others = {
        key.replace("box_head.box_head.", "box_head.").replace("bbox_pred.layer.", "bbox_pred.")
        for key in checkpoint.model
        if not key.startswith(CLASSIFIER)
    }
    assert others == {key for key in before if not key.startswith(CLASSIFIER)}
    moved = any(
        key in checkpoint.model and not torch.equal(value, checkpoint.model[key])
        for key, value in before.items()
        if not key.startswith(CLASSIFIER) and "running" not in key
    )
    assert moved == (method.trains and checkpoint.recipe.train == "all")


def test_the_detector_is_the_one_that_was_evaluated(
    few: Path, tmp_path: Path, softmax: Path
) -> None:
    """Once more from the checkpoint alone, by the other program."""
    import torchvision_lvis_eval

    for name in ("tau_norm_select", "ncm_conv", "seesaw"):
        trained(few, tmp_path / name, name, softmax)
        path = tmp_path / name / f"{name}.pt"
        out = tmp_path / f"{name}.json"
        assert torchvision_lvis_eval.main([str(path), "--metrics", str(out)]) == 0
        told = json.loads((tmp_path / name / "metrics.json").read_text())[name]
        again = json.loads(out.read_text())
        assert again.get("bbox", again)["AP"] == told["AP"]


def test_rfs_is_one_command(few: Path, tmp_path: Path) -> None:
    assert run(few, tmp_path / "run", "--method", "rfs") == 0
    assert Checkpoint.load(tmp_path / "run" / "rfs.pt").recipe.sampler == "repeat_factor"


def test_a_method_trains_from_stored_features(few: Path, tmp_path: Path, softmax: Path) -> None:
    cache = ["--cache-features", str(tmp_path / "cache")]
    before = Checkpoint.load(softmax).model
    for name in ("reweight_cls", "balanced_softmax", "tau_norm"):
        checkpoint = trained(few, tmp_path / name, name, softmax, *cache)
        weight = checkpoint.model[f"{CLASSIFIER}fc.weight"]
        assert not torch.equal(weight, before[f"{CLASSIFIER}weight"])
    assert run(few, tmp_path / "x2", "--method", "x2", "--checkpoint", str(softmax), *cache) == 2


def test_an_interrupted_method_goes_on(few: Path, tmp_path: Path, softmax: Path) -> None:
    """With what its classifier has counted so far."""
    options = ["--method", "seesaw", "--checkpoint", str(softmax), "--steps", "6"]
    assert run(few, tmp_path / "whole", *options) == 0
    with pytest.MonkeyPatch.context() as patch:
        save = Checkpoint.save

        def once(self: Checkpoint, path: Any) -> None:
            save(self, path)
            raise OSError("no more")

        patch.setattr(Checkpoint, "save", once)
        assert run(few, tmp_path / "broken", *options, "--save-every", "3") == 2
    assert run(few, tmp_path / "broken", *options, "--resume") == 0
    states = [Checkpoint.load(tmp_path / n / "seesaw.pt").model for n in ("whole", "broken")]
    assert_same_state(*states)


def test_presets_are_those_of_the_paper() -> None:
    recipes = recipes_of(read_options(CONFIGS / "faster_rcnn_r50.toml"))
    for name in ("x2", "rfs_finetune", "reweight", "focal"):
        assert options_of(name, recipes)["bags"]["train"] == "all"
    assert options_of("finetune_tail", recipes)["bags"] == {
        "train": "all",
        "epochs": 10,
        "learning_rate": pytest.approx(1e-4),
    }
    demo = recipes_of(read_options(CONFIGS / "demo.toml"))
    assert options_of("finetune_tail", demo)["bags"]["steps"] == 333


def test_the_command_line_has_the_last_word(few: Path, tmp_path: Path, softmax: Path) -> None:
    checkpoint = trained(few, tmp_path / "run", "x2", softmax, "--train", "box_head")
    assert checkpoint.recipe.train == "box_head"


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--method", "focal"], "Expected `--checkpoint` with `--method focal`"),
        (["--method", "bags", "--checkpoint", "{bags}"], "plain softmax to start from, got bags"),
    ],
)
def test_what_is_missing_is_told(
    few: Path, tmp_path: Path, softmax: Path, capsys: Any, options: list[str], said: str
) -> None:
    trained(few, tmp_path / "bags", "bags", softmax)
    options = [option.format(bags=tmp_path / "bags" / "bags.pt") for option in options]
    assert run(few, tmp_path / "run", *options) == 2
    assert said in capsys.readouterr().err


def test_stage_and_method_exclude_each_other(few: Path, tmp_path: Path) -> None:
    with pytest.raises(SystemExit):
        run(few, tmp_path / "run", "--method", "softmax", "--stage", "softmax")


def test_weights_are_those_of_the_counts(few: Path, tmp_path: Path, softmax: Path) -> None:
    counts = Checkpoint.load(softmax).categories.counts
    for name, weights in (
        ("reweight", inverse_frequency_weights(counts)),
        ("reweight_cls", class_balanced_weights(counts)),
    ):
        model = trained(few, tmp_path / name, name, softmax).make_model()
        classifier: Any = model.get_submodule(PREDICTOR)
        assert classifier.class_weights == pytest.approx(weights.tolist())


def test_bags_takes_weights_within_groups(few: Path, tmp_path: Path, softmax: Path) -> None:
    weighted = ["--category-weights", "inverse_frequency", "--thresholds", "20", "1000"]
    model = trained(few, tmp_path / "run", "bags", softmax, *weighted).make_model()
    classifier: Any = model.get_submodule(PREDICTOR)
    counts = np.array(Checkpoint.load(softmax).categories.counts)
    assert sorted(counts) == [2, 12, 30]
    rare = counts < 20  # two of one group
    expected = np.ones(3)
    expected[rare] = (1 / counts[rare]) / (1 / counts[rare]).mean()
    assert classifier.category_weights.tolist() == pytest.approx(expected.tolist())


def test_tau_normalisation(few: Path, tmp_path: Path, softmax: Path) -> None:
    before = Checkpoint.load(softmax).model[f"{CLASSIFIER}weight"]
    for tau in (0.0, 1.0):
        options = ["--tau", str(tau)]
        state = trained(few, tmp_path / f"{tau}", "tau_norm", softmax, *options).model
        norms = state[f"{CLASSIFIER}fc.weight"].norm(dim=1)
        expected = before.norm(dim=1) ** (1 - tau)
        assert torch.allclose(norms[1:], expected[1:])
        assert torch.equal(norms[:1], before.norm(dim=1)[:1])


def test_image_counts_and_the_tail(few: Path) -> None:
    data = LVISDetection(few / "train.json", few / "train")
    content = json.loads((few / "train.json").read_text())
    ids = [row["id"] for row in sorted(content["categories"], key=lambda row: row["id"])]
    pairs = {(row["image_id"], row["category_id"]) for row in content["annotations"]}
    assert image_counts(data) == [sum(pair[1] == i for pair in pairs) for i in ids]

    assert training_data("bags", data, (30, 12, 2)) is data
    tail = training_data("finetune_tail", data, (300, 120, 2))
    rows = [row for row in content["annotations"] if row["category_id"] == ids[2]]
    assert tail.image_ids == sorted({row["image_id"] for row in rows}, key=data.image_ids.index)
    for index, image_id in enumerate(tail.image_ids):
        image, target = tail[index]
        whole_image, whole = data[data.image_ids.index(image_id)]
        mask = whole["labels"] == 3
        assert mask.any()
        assert torch.equal(image, whole_image)
        assert torch.equal(target["boxes"], whole["boxes"][mask])
        assert torch.equal(tail.labels(index), whole["labels"][mask])
    assert tail.fingerprint != data.fingerprint
    with pytest.raises(ValueError, match="fewer than 100 training instances"):
        training_data("finetune_tail", data, (300, 120, 200))
    with pytest.raises(ValueError, match="Expected a mask over the"):
        data.subset([0], [torch.ones(99, dtype=torch.bool)])


@pytest.mark.parametrize("kind", ["fc", "conv"])
def test_means_are_those_of_the_annotated_boxes(few: Path, softmax: Path, kind: Any) -> None:
    data = LVISDetection(few / "train.json", few / "train")
    start = Checkpoint.load(softmax)
    model: Any = start.make_model().eval()
    recipe = Recipe(**{**vars(start.recipe), "batch_size": 4})
    made, broken = nearest_means.gather_means(model, data, recipe, kind, device=torch.device("cpu"))
    assert not broken
    found: dict[int, list[torch.Tensor]] = {1: [], 2: [], 3: []}
    seen: list[torch.Tensor] = []
    at = model.roi_heads.box_head if kind == "fc" else model.roi_heads.box_roi_pool
    hook = at.register_forward_hook(lambda module, args, output: seen.append(output.flatten(1)))
    with torch.no_grad():
        for image, target in (data[i] for i in range(len(data))):
            resized, targets = model.transform(
                [image], [{"boxes": target["boxes"], "labels": target["labels"]}]
            )
            pooled = model.roi_heads.box_roi_pool(
                model.backbone(resized.tensors), [targets[0]["boxes"]], resized.image_sizes
            )
            if kind == "fc":
                model.roi_heads.box_head(pooled)
            for label, row in zip(target["labels"].tolist(), seen.pop(), strict=True):
                found[label].append(row)
    hook.remove()
    expected = torch.stack([torch.stack(rows).mean(dim=0) for rows in found.values()])
    means = made.class_means if kind == "fc" else made.pooled.class_means
    assert torch.allclose(means, expected, atol=1e-4)
    assert [len(rows) for rows in found.values()] == list(start.categories.counts)


def test_the_discriminant_start_is_made_once(
    few: Path, tmp_path: Path, softmax: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From a cache and without one it is the same; a run that goes on has it already."""
    starts: list[torch.Tensor] = []
    rows: list[list[Any]] = []
    begin = stages.start_with_discriminant

    def look(head: Any, counts: Any, recipe: Recipe, seen: Any) -> None:
        rows.append(list(seen))
        begin(head, counts, recipe, iter(rows[-1]))
        starts.append(head.fc.weight.detach().clone())

    monkeypatch.setattr(stages, "start_with_discriminant", look)
    options = ["--thresholds", "5", "100", "--others-ratio", "2"]
    cache = ["--cache-features", str(tmp_path / "cache")]
    name = "bags_discriminant_start"
    checkpoint = trained(few, tmp_path / "a", name, softmax, *options, *cache)
    trained(few, tmp_path / "b", name, softmax, *options)
    for (one, labels), (two, others) in zip(*rows, strict=True):
        assert torch.equal(labels, others)
        assert torch.equal(one, two.bfloat16())

    plain = trained(few, tmp_path / "c", "bags", softmax, *options, "--learning-rate", "1e-12")
    layout = checkpoint.categories.layout((5, 100))
    statistics = FeatureStatistics(layout, starts[0].shape[1])
    for features, labels in rows[1]:
        statistics.update(features, labels)
    weight, _ = discriminant_rows(statistics, others_ratio=2)
    added = starts[1] - plain.model[f"{CLASSIFIER}fc.weight"]
    assert torch.allclose(added, 0.1 * weight.float(), rtol=1e-3, atol=1e-3)
    assert added.abs().max() > 1e-3

    interrupted = ["--method", name, "--checkpoint", str(softmax), *options, "--steps", "6"]
    with pytest.MonkeyPatch.context() as patch:
        save = Checkpoint.save

        def once(self: Checkpoint, path: Any) -> None:
            save(self, path)
            raise OSError("no more")

        patch.setattr(Checkpoint, "save", once)
        assert run(few, tmp_path / "d", *interrupted, "--save-every", "3") == 2
    assert len(starts) == 3
    assert run(few, tmp_path / "d", *interrupted, "--resume") == 0
    assert len(starts) == 3


def test_only_rare_groups_get_the_discriminant() -> None:
    counts = (3, 2500, 40, 7, 600, 99)
    layout = GroupLayout.from_counts(counts)
    assert strengths(layout, counts, 0.3) == [0.3, 0.3, 0.0, 0.0]
    wide = GroupLayout.from_counts(counts, thresholds=(50, 700))
    assert strengths(wide, counts, 0.3) == [0.3, 0.0, 0.0]


def test_the_discriminant_is_kept_by_the_head_that_asks_it(
    few: Path, tmp_path: Path, softmax: Path
) -> None:
    """And it is in the checkpoint, beside the same start."""
    states = {
        name: trained(few, tmp_path / name, name, softmax, "--learning-rate", "1e-12").model
        for name in ("bags_discriminant_start", "bags_discriminant")
    }
    start, both = states.values()
    weight = f"{CLASSIFIER}fc.weight"
    assert torch.allclose(start[weight], both[weight], rtol=1e-4, atol=1e-4)
    assert both[f"{CLASSIFIER}discriminant_weight"].abs().sum() > 0
    model = Checkpoint.load(tmp_path / "bags_discriminant" / "bags_discriminant.pt").make_model()
    head: Any = model.get_submodule(PREDICTOR)
    assert isinstance(head, DiscriminantHead)
    assert torch.equal(head.discriminant_bias, both[f"{CLASSIFIER}discriminant_bias"])


def test_the_analysis_is_of_frozen_features(
    few: Path, tmp_path: Path, softmax: Path, capsys: Any
) -> None:
    options = ["--method", "bags_discriminant", "--checkpoint", str(softmax), "--train", "all"]
    assert run(few, tmp_path / "run", *options) == 2
    assert "features that do not change, got all" in capsys.readouterr().err
