"""Every configuration builds its detector, takes a step of each stage, and is evaluated."""

import dataclasses
import json
import math
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import nn

pytest.importorskip("torchvision")
pytest.importorskip("lvis")
sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))

import recipe as recipe_module
from checkpoints import Checkpoint
from detecting import detect
from detectors import CLASSIFIER, load_what_fits, make_detector, with_same_postprocessing
from lvis_demo_data import Category, write_demo_data
from recipe import ARCHITECTURE, Recipe, images_a_step, read_options, recipes_of
from run_data import Files, load_data
from run_results import figures_of
from stages import BAGS, SOFTMAX, Setting, run_stage
from training import AUTOCAST

from balanced_group_softmax import GroupLayout
from balanced_group_softmax.adapters.torchvision import convert_to_bags

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")

CONFIGS = sorted((Path(recipe_module.__file__).parent / "configs").glob("*.toml"))
OF_THE_PAPER = [path for path in CONFIGS if not path.stem.startswith("demo")]
LAYOUT = GroupLayout.from_counts([3, 2500, 40, 7, 600])
CPU = torch.device("cpu")
SIDE = 96  # of the resized images
FEW = [Category("star", "red", 4), Category("disc", "blue", 3), Category("bar", "cyan", 2)]
COUNTS = (3, 2500, 40)  # told in place of those above, so that there are three groups
WHOLE_DETECTOR = {"loss_box_reg", "loss_objectness", "loss_rpn_box_reg"}


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Files:
    """Two images to train on, and two to evaluate on."""
    folder = tmp_path_factory.mktemp("two") / "data"
    write_demo_data(folder, 0, categories=FEW, val_instances=3)
    return Files(*(folder / part for part in ("train.json", "train", "val.json", "val")))


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    """A run folder. Checkpoints of a large backbone are not left to pile up."""
    (tmp_path / "run").mkdir()
    yield tmp_path / "run"
    shutil.rmtree(tmp_path / "run")


def on_two_images(recipe: Recipe) -> Recipe:
    """The same on two small images, with few RoIs, for a step, and without downloaded weights.

    Fixed statistics are mean 0 and variance 1 then. In a fresh ResNet-50 activations grow 50-fold
    over its blocks, and losses stay finite.
    """
    whole = recipe.short_sides[-1]
    return dataclasses.replace(
        recipe,
        weights="none",
        short_sides=tuple(side * SIDE // whole for side in recipe.short_sides),
        long_side=recipe.long_side * SIDE // whole,
        rois_per_image=64,
        detections_per_image=30,
        batch_size=2 // recipe.accumulate,
        steps=1,
    )


def entries_that_train(model: nn.Module, stage: str) -> set[str]:
    """The keys of the state dict that a step of a stage has to change."""
    if stage == BAGS:
        return {f"{CLASSIFIER}fc.weight", f"{CLASSIFIER}fc.bias"}
    # A ResNet's first two stages are never trained, and its norms have no parameters if frozen.
    fixed = ("backbone.body.conv1.", "backbone.body.layer1.")
    trained = {name for name, _ in model.named_parameters() if not name.startswith(fixed)}
    moving = (
        {f"{name}.{key}" for key, _ in module.named_buffers()}
        for name, module in model.named_modules()
        if isinstance(module, nn.BatchNorm2d)
    )
    return trained.union(*moving)


@pytest.mark.parametrize(
    ("path", "amp"),
    [
        *(pytest.param(path, None, id=path.stem) for path in CONFIGS),
        *(
            pytest.param(path, "bfloat16", id=f"{path.stem}-bfloat16")
            for path in CONFIGS
            if path.stem == "mask_rcnn_r50"
        ),
    ],
)
def test_a_step_of_each_stage_and_an_evaluation(
    path: Path, amp: str | None, two: Files, folder: Path
) -> None:
    sources = [read_options(path), {"": {"amp": amp} if amp else {}}]
    recipes = {stage: on_two_images(one) for stage, one in recipes_of(*sources).items()}
    masks = recipes["softmax"].detector == "mask_rcnn"
    data = load_data(two, masks=masks, skip_broken=False, progress=False)
    data.categories = dataclasses.replace(data.categories, counts=COUNTS)
    assert (len(data.train), len(data.val)) == (2, 2)
    layout = data.categories.layout(recipes["bags"].thresholds)
    logged: dict[str, list[dict[str, float]]] = {SOFTMAX: [], BAGS: []}
    setting = Setting(
        folder,
        data,
        recipes,
        CPU,
        seed=0,
        logger=lambda name, step: lambda step, losses: logged[name].append(losses),
    )
    classification = {
        SOFTMAX: {"loss_classifier"},
        BAGS: {f"loss_cls_{name}" for name in ("bg_fg", *layout.names)},
    }
    start = None
    for stage in (SOFTMAX, BAGS):
        recipe = setting.recipe(stage)
        if start is None:
            torch.manual_seed(setting.seed)
            initial = make_detector(recipe, len(FEW))
        else:
            initial = convert_to_bags(start.make_model(), layout, recipe.others_ratio)
        checkpoint = run_stage(setting, stage, start)

        (losses,) = logged[stage]
        expected = {"loss", *WHOLE_DETECTOR, *classification[stage]}
        assert losses.keys() == (expected | {"loss_mask"} if masks else expected)
        assert all(math.isfinite(loss) for loss in losses.values())

        before, after = initial.state_dict(), checkpoint.model
        assert after.keys() == before.keys()
        changed = {name for name in after if not torch.equal(after[name], before[name])}
        assert changed == entries_that_train(initial, stage)
        assert all(value.isfinite().all() for value in after.values())

        results = folder / "results.json"
        detect(
            Checkpoint.load(folder / f"{stage}.pt").make_model(),
            data.val,
            results,
            batch_size=recipe.batch_size,
            device=CPU,
            autocast=AUTOCAST.get(recipe.amp),
            progress=False,
        )
        detections = json.loads(results.read_text())
        for image_id in data.val.image_ids:
            rows = [row for row in detections if row["image_id"] == image_id]
            assert 0 < len(rows) <= recipe.detections_per_image
            assert all(recipe.score_threshold < row["score"] <= 1 for row in rows)
            assert all(("segmentation" in row) == masks for row in rows)
        figures = figures_of(results, setting, recipe)
        for key in ("AP", "segm_AP") if masks else ("AP",):
            found = figures[key]
            assert found is not None
            assert 0 <= found <= 100
        assert ("segm_AP" in figures) == masks
        start = checkpoint


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_option_of_a_file_is_in_its_recipes(path: Path) -> None:
    content = recipe_module.tomllib.loads(path.read_text(encoding="utf-8"))
    for stage, recipe in recipes_of(read_options(path)).items():
        said = {key: value for key, value in content.items() if not isinstance(value, dict)}
        said |= content[stage]
        read = json.loads(json.dumps(dataclasses.asdict(recipe)))  # lists for tuples
        assert {key: read[key] for key in said} == said


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_both_stages_fit_together_and_stage_two_trains_the_classifier(path: Path) -> None:
    recipes = recipes_of(read_options(path))
    recipes["softmax"].check_start(from_checkpoint=False)
    for name in ARCHITECTURE:
        assert getattr(recipes["softmax"], name) == getattr(recipes["bags"], name)
    assert recipes["bags"].train == "classifier"


@pytest.mark.parametrize("path", OF_THE_PAPER, ids=lambda path: path.stem)
def test_steps_are_those_of_the_original(path: Path) -> None:
    """16 images over 8 processes; stage two at half the rate, without repeat factors."""
    recipes = recipes_of(read_options(path))
    assert {images_a_step(one, 8) for one in recipes.values()} == {16}
    assert [recipes[stage].learning_rate for stage in ("softmax", "bags")] == [0.02, 0.01]
    assert recipes["bags"].epochs == 12
    assert recipes["bags"].sampler == "shuffle"
    assert recipes["softmax"].epochs == (24 if "2x" in path.stem else 12)
    assert (recipes["softmax"].sampler == "repeat_factor") == ("rfs" in path.stem)


def test_stage_two_trains_the_classifier_if_nothing_is_said() -> None:
    assert Recipe().train == "classifier"


def test_a_local_checkpoint_lends_what_fits() -> None:
    recipe = Recipe(backbone="small", short_sides=(64,), long_side=128)
    old, new = make_detector(recipe, 7), make_detector(recipe, 5)
    fresh = load_what_fits(new, old.state_dict())
    assert {name.split(".")[2] for name in fresh} == {"cls_score", "bbox_pred"}
    for name, value in new.state_dict().items():
        if name not in fresh:
            assert torch.equal(value, old.state_dict()[name]), name
    with pytest.raises(ValueError, match=r"Expected weights of this detector.*got a, \.\.\."):
        load_what_fits(new, {"a": torch.zeros(1)})
    wrong = {"roi_heads.box_head.fc6.weight": torch.zeros(1, 1)}
    with pytest.raises(ValueError, match=r"fc6.weight of shape \[256, 2304\].*got \[1, 1\]"):
        load_what_fits(new, wrong)


def test_a_backbone_that_is_unknown() -> None:
    with pytest.raises(ValueError, match=r"`backbone` to be small or one of .*resnet50.*got vgg16"):
        make_detector(Recipe(backbone="vgg16"), 5)


def test_converted_detectors_are_left_alone() -> None:
    model = make_detector(Recipe(backbone="small", short_sides=(64,), long_side=128), 5)
    assert with_same_postprocessing(model) is not model
    converted = convert_to_bags(model, LAYOUT)
    assert with_same_postprocessing(converted) is converted
