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
from feature_cache import CachedBatches, CacheOptions, FeatureCache, contents_of, fill
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
    path: Path, model: Any, dataset: LVISDetection, passes: int = 1, draws: int = 1
) -> FeatureCache:
    options = CacheOptions(path, passes, draws)
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


def test_draws_differ_and_a_broken_run_goes_on(
    tmp_path: Path, model: Any, dataset: LVISDetection, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = filled(tmp_path / "whole", model, dataset, passes=2, draws=4)
    for one in range(4):
        for two in range(one):
            assert not np.array_equal(whole.features[one], whole.features[two])

    put, stored = FeatureCache.put, 0

    def stop(self: FeatureCache, *args: Any) -> None:
        nonlocal stored
        if stored == 13:
            raise KeyboardInterrupt
        stored += 1
        put(self, *args)

    with monkeypatch.context() as patch:
        patch.setattr(FeatureCache, "put", stop)
        with pytest.raises(KeyboardInterrupt):
            filled(tmp_path / "broken", model, dataset, passes=2, draws=4)
    again = filled(tmp_path / "broken", model, dataset, passes=2, draws=4)
    assert np.array_equal(again.features, whole.features)
    assert np.array_equal(again.labels, whole.labels)


def test_draws_of_a_pass_see_one_flip(
    tmp_path: Path, model: Any, dataset: LVISDetection, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[float] = []

    def look(detector: Any, images: Any, targets: Any, draws: int) -> Any:
        seen.extend(float(image[:, :, : image.shape[2] // 2].mean()) for image in images)
        assert draws == [2, 1][len(seen) > len(dataset)]  # three draws of two passes
        return whole(detector, images, targets, draws)

    whole = feature_cache.roi_features
    monkeypatch.setattr(feature_cache, "roi_features", look)
    cache = filled(tmp_path, model, dataset, passes=2, draws=3)
    assert cache.done.all()
    assert len(seen) == 2 * len(dataset)
    assert seen[: len(dataset)] != seen[len(dataset) :]
    with pytest.raises(ValueError, match="at least as many `--cache-draws` as `--cache-passes`"):
        CacheOptions(tmp_path, passes=3, draws=2)


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


def test_size_is_that_of_the_files(tmp_path: Path, model: Any, dataset: LVISDetection) -> None:
    cache = filled(tmp_path / "cache", model, dataset, draws=2)
    sizes = [(tmp_path / "cache" / name).stat().st_size for name in ("features", "labels", "done")]
    assert cache.contents.num_bytes == sum(sizes)


def test_both_classifiers_train_from_it(few: Path, tmp_path: Path) -> None:
    """And nothing but the classifier changes; a finished run is the same when it is repeated."""
    arguments = [*data_arguments(few), "--steps", "4", "--batch-size", "2"]
    states = []
    for name in ("a", "b"):
        cache = ["--cache-features", str(tmp_path / f"cache-{name}"), "--cache-draws", "2"]
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


def test_an_epoch_reads_its_draw(tmp_path: Path, model: Any, dataset: LVISDetection) -> None:
    cache = filled(tmp_path / "cache", model, dataset, draws=2)
    order = EpochBatches(len(dataset), 2, factors=None, sizes=None, seed=0)
    read = iter(CachedBatches(cache, order)((0, 0)))
    for epoch in range(3):
        order.set_epoch(epoch)
        for items in list(order):
            _, (features, targets) = next(read)
            for (image, _), ours, target in zip(items, features, targets, strict=True):
                wanted, labels = cache.get(epoch % 2, image)
                assert torch.equal(ours, wanted)
                assert torch.equal(target["labels"], labels)


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
