"""Stage two from stored features: the same classifier as from the detector itself, and sooner."""

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("torchvision")
pytest.importorskip("lvis")
sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))

import feature_cache
import torchvision_lvis_train as example
from checkpoints import Checkpoint
from detection_data import LVISDetection, make_transforms
from detectors import CLASSIFIER, make_detector
from feature_cache import CachedBatches, CacheOptions, FeatureCache, contents_of, drawn, fill
from pipeline_cases import data_arguments
from recipe import Recipe
from training_samplers import EpochBatches

from balanced_group_softmax.adapters.torchvision import freeze

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")
CPU = torch.device("cpu")
RECIPE = Recipe(
    backbone="small",
    box_regression="shared",
    short_sides=(64,),
    long_side=128,
    rois_per_image=12,
    batch_size=2,
    train="classifier",
)


@pytest.fixture(scope="module")
def dataset(few: Path) -> LVISDetection:
    return LVISDetection(few / "train.json", few / "train", transforms=make_transforms(flip=0.5))


@pytest.fixture
def model() -> torch.nn.Module:
    torch.manual_seed(0)
    return make_detector(RECIPE, 3)


def filled(
    path: Path, model: Any, dataset: LVISDetection, passes: int = 1, rois: int = 12
) -> FeatureCache:
    options = CacheOptions(path, passes, rois)
    cache = FeatureCache(path, contents_of(model, dataset, RECIPE, options, seed=0))
    fill(cache, model, dataset, RECIPE, device=CPU)
    return cache


def test_features_are_those_that_the_classifier_reads(
    tmp_path: Path, model: Any, dataset: LVISDetection
) -> None:
    """Run the detector once more with the same seeds, and look at its classifier's input."""
    state = {name: value.clone() for name, value in model.state_dict().items()}
    cache = filled(tmp_path / "cache", model, dataset)
    assert cache.done.all()
    for name, value in model.state_dict().items():
        assert torch.equal(value, state[name]), name
    seen = []
    model.roi_heads.box_predictor.cls_score.register_forward_pre_hook(
        lambda module, args: seen.append(args[0].detach())
    )
    assert freeze(model, "classifier")
    states: list[Any] = []  # the losses of the RPN draw anchors, which storing does without
    model.rpn.register_forward_pre_hook(lambda *_: states.append(torch.get_rng_state()))
    model.rpn.register_forward_hook(lambda *_: torch.set_rng_state(states.pop()))
    model.train()
    items = feature_cache.SeededItems(dataset)
    for first in range(0, len(dataset), 2):
        images, targets = zip(
            *(
                items[i, feature_cache._seed(0, 0, i)]
                for i in range(first, min(first + 2, len(dataset)))
            ),
            strict=True,
        )
        torch.manual_seed(feature_cache._seed(0, 0, first))
        model(list(images), list(targets))
        stored = [cache.get(0, i) for i in range(first, first + len(images))]
        features = torch.cat([features for features, _ in stored])
        assert torch.equal(features, seen.pop().bfloat16())
        labels = torch.cat([labels for _, labels in stored])
        assert labels.min() >= 0
        assert labels.max() <= 3
        assert (labels > 0).any()


def test_mask_rcnn_stores_features_as_well(few: Path, tmp_path: Path) -> None:
    arguments = [*data_arguments(few), "--steps", "2", "--batch-size", "2"]
    arguments += ["--short-sides", "64", "--long-side", "128", "--detector", "mask_rcnn"]
    softmax = tmp_path / "softmax" / "softmax.pt"
    assert example.main([*arguments, "--method", "softmax", "--output", str(softmax.parent)]) == 0
    arguments += ["--checkpoint", str(softmax)]
    cache = ["--cache-features", str(tmp_path / "cache")]
    for name, options in (("bags", cache), ("bags_discriminant", [])):
        run = [*arguments, *options, "--method", name, "--output", str(tmp_path / name)]
        assert example.main(run) == 0
        metrics = json.loads((tmp_path / name / "metrics.json").read_text())[name]
        assert metrics["segm_AP"] is not None


def test_passes_differ_and_a_broken_run_goes_on(
    tmp_path: Path, model: Any, dataset: LVISDetection, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = filled(tmp_path / "whole", model, dataset, passes=2)
    assert not np.array_equal(whole.features[0], whole.features[1])

    put, stored = FeatureCache.put, 0

    def stop(self: FeatureCache, *args: Any) -> None:
        nonlocal stored
        if stored == 5:
            raise KeyboardInterrupt
        stored += 1
        put(self, *args)

    with monkeypatch.context() as patch:
        patch.setattr(FeatureCache, "put", stop)
        with pytest.raises(KeyboardInterrupt):
            filled(tmp_path / "broken", model, dataset, passes=2)
    again = filled(tmp_path / "broken", model, dataset, passes=2)
    assert np.array_equal(again.features, whole.features)
    assert np.array_equal(again.labels, whole.labels)


def test_passes_see_other_flips(
    tmp_path: Path, model: Any, dataset: LVISDetection, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[float] = []

    def look(detector: Any, images: Any, targets: Any) -> Any:
        seen.extend(float(image[:, :, : image.shape[2] // 2].mean()) for image in images)
        return whole(detector, images, targets)

    whole = feature_cache.roi_features
    monkeypatch.setattr(feature_cache, "roi_features", look)
    assert filled(tmp_path, model, dataset, passes=2).done.all()
    assert len(seen) == 2 * len(dataset)
    assert seen[: len(dataset)] != seen[len(dataset) :]


def test_more_rois_are_stored_than_train(
    tmp_path: Path, model: Any, dataset: LVISDetection
) -> None:
    """With as many positives in proportion, and the same features for the same RoIs."""
    few, many = (filled(tmp_path / f"{n}", model, dataset, rois=n) for n in (12, 48))
    for image in range(len(dataset)):
        features, labels = many.get(0, image)
        assert 12 < len(labels) <= 48
        assert (labels > 0).sum() <= 12
        rows = {tuple(row.tolist()) for row in features.float()}
        shared = [tuple(row.tolist()) in rows for row in few.get(0, image)[0].float()]
        assert any(shared)
    with pytest.raises(ValueError, match="Expected `--cache-rois` of at least 12"):
        filled(tmp_path / "less", model, dataset, rois=11)


def test_rois_are_drawn_by_the_rule_of_training() -> None:
    labels = torch.tensor([0, 3, 0, 0, 1, 0, 0, 2, 0, 0, 0, 5])
    seen = torch.zeros(len(labels), dtype=torch.int64)
    for seed in range(300):
        rows = drawn(labels, 6, 0.34, seed)
        assert len(rows.unique()) == 6
        assert (labels[rows] > 0).sum() == 2
        seen[rows] += 1
    # Each of four positives 150 times on average, each of eight negatives as well.
    assert ((seen - 150).abs() < 45).all()
    assert torch.equal(drawn(labels, 6, 0.34, 1), drawn(labels, 6, 0.34, 1))
    assert (labels[drawn(labels, 8, 1.0, 0)] > 0).sum() == 4  # the rest is background
    assert len(drawn(labels, 99, 0.5, 0)) == len(labels)
    assert len(drawn(labels[:0], 8, 0.5, 0)) == 0


def test_the_cache_of_another_detector_is_refused(
    tmp_path: Path, model: Any, dataset: LVISDetection
) -> None:
    filled(tmp_path / "cache", model, dataset)
    with torch.no_grad():
        model.roi_heads.box_predictor.cls_score.weight.add_(1)  # which it does not depend on
    filled(tmp_path / "cache", model, dataset)
    with torch.no_grad():
        model.roi_heads.box_head.fc6.weight.add_(1)
    with pytest.raises(ValueError, match="Expected the cache of this run, got detector"):
        filled(tmp_path / "cache", model, dataset)


def test_a_folder_with_other_files_is_left_alone(
    tmp_path: Path, model: Any, dataset: LVISDetection
) -> None:
    (tmp_path / "mine.txt").write_text("kept")
    with pytest.raises(ValueError, match="a cache or an empty folder"):
        filled(tmp_path, model, dataset)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_too_little_room_is_told_before(
    tmp_path: Path, model: Any, dataset: LVISDetection, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        feature_cache.shutil, "disk_usage", lambda path: type("Usage", (), {"free": 1000})
    )
    with pytest.raises(OSError, match=r"Expected room for .* GB of features, found 0\.00 GB"):
        filled(tmp_path / "cache", model, dataset)
    assert not list((tmp_path / "cache").iterdir())


def test_a_file_that_was_cut_short_is_filled_again(
    tmp_path: Path, model: Any, dataset: LVISDetection
) -> None:
    whole = np.array(filled(tmp_path / "cache", model, dataset).features)
    for name in ("features", "labels"):
        path = tmp_path / "cache" / name
        path.write_bytes(path.read_bytes()[:100])
        again = filled(tmp_path / "cache", model, dataset)
        assert np.array_equal(again.features, whole)
        assert again.done.all()


def test_size_is_that_of_the_files(tmp_path: Path, model: Any, dataset: LVISDetection) -> None:
    cache = filled(tmp_path / "cache", model, dataset, passes=2)
    sizes = [(tmp_path / "cache" / name).stat().st_size for name in ("features", "labels", "done")]
    assert cache.contents.num_bytes == sum(sizes)


def test_both_classifiers_train_from_it(few: Path, tmp_path: Path) -> None:
    """And nothing but the classifier changes; a finished run is the same when it is repeated."""
    arguments = [*data_arguments(few), "--steps", "4", "--batch-size", "2"]
    arguments += ["--short-sides", "64", "--long-side", "128"]  # float16 takes its time on a CPU
    states = []
    for name in ("a", "b"):
        cache = ["--cache-features", str(tmp_path / f"cache-{name}"), "--cache-passes", "2"]
        cache += ["--bags.amp", "float16"]
        assert example.main([*arguments, *cache, "--output", str(tmp_path / name)]) == 0
        states.append(
            {n: Checkpoint.load(tmp_path / name / f"{n}.pt").model for n in ("softmax", "bags")}
        )
    for name, before in states[0]["softmax"].items():
        if not name.startswith(CLASSIFIER):
            assert torch.equal(before, states[0]["bags"][name]), name
    weight = f"{CLASSIFIER}fc.weight"
    assert torch.equal(states[0]["bags"][weight], states[1]["bags"][weight])
    assert json.loads((tmp_path / "a" / "metrics.json").read_text())["bags"]["AP"] is not None


def test_an_epoch_reads_its_pass(tmp_path: Path, model: Any, dataset: LVISDetection) -> None:
    cache = filled(tmp_path / "cache", model, dataset, passes=2)
    order = EpochBatches(len(dataset), 2, factors=None, sizes=None, seed=0)
    read = iter(CachedBatches(cache, order, RECIPE)((0, 0)))
    for epoch in range(3):
        order.set_epoch(epoch)
        for items in list(order):
            _, (features, targets) = next(read)
            for (image, seed), ours, target in zip(items, features, targets, strict=True):
                wanted, labels = cache.get(epoch % 2, image)
                rows = drawn(labels, RECIPE.rois_per_image, RECIPE.foreground_share, seed)
                assert torch.equal(ours, wanted[rows])
                assert torch.equal(target["labels"], labels[rows])


def test_images_that_others_stand_in_for_are_remembered(
    few: Path, tmp_path: Path, capsys: Any
) -> None:
    shutil.copytree(few, tmp_path / "data")
    bad = sorted((tmp_path / "data" / "train").iterdir())[1]
    arguments = [*data_arguments(tmp_path / "data"), "--steps", "4", "--batch-size", "2"]
    arguments += ["--skip-broken"]
    bad.write_bytes(bad.read_bytes()[: bad.stat().st_size // 2])
    one = [*arguments, "--stage", "softmax", "--output", str(tmp_path / "one")]
    assert example.main(one) == 0
    arguments += ["--stage", "bags", "--checkpoint", str(tmp_path / "one" / "softmax.pt")]
    arguments += ["--cache-features", str(tmp_path / "cache")]
    for name in ("filled", "again"):
        assert example.main([*arguments, "--output", str(tmp_path / name)]) == 0
        text = (tmp_path / name / "broken_images.txt").read_text()
        assert text.startswith(f"{bad}: ")
    arguments.remove("--skip-broken")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LVISDetection, "check_images", lambda self, progress: None)
        assert example.main([*arguments, "--output", str(tmp_path / "strict")]) == 2
    assert "Expected a cache of all images without `--skip-broken`" in capsys.readouterr().err


def test_only_the_classifier_can_train_from_it(few: Path, tmp_path: Path, capsys: Any) -> None:
    arguments = [*data_arguments(few), "--steps", "1", "--batch-size", "2"]
    arguments += ["--bags.train", "box_head", "--cache-features", str(tmp_path / "cache")]
    assert example.main([*arguments, "--output", str(tmp_path / "run")]) == 2
    assert "`train` classifier with `--cache-features`" in capsys.readouterr().err
