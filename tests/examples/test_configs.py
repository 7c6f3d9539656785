"""Every configuration builds its detector, takes a step of each stage, and detects."""

import dataclasses
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("torchvision")
sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))

import recipe as recipe_module
from detectors import load_what_fits, make_detector, with_same_postprocessing
from recipe import Recipe, read_options, recipes_of

from balanced_group_softmax import GroupLayout
from balanced_group_softmax.adapters.torchvision import convert_to_bags, freeze

CONFIGS = sorted((Path(recipe_module.__file__).parent / "configs").glob("*.toml"))
LAYOUT = GroupLayout.from_counts([3, 2500, 40, 7, 600])


def images_and_targets() -> tuple[list[torch.Tensor], list[dict[str, torch.Tensor]]]:
    images = [torch.rand(3, 96, 80), torch.rand(3, 64, 96)]
    targets = []
    for image in images:
        masks = torch.zeros(2, *image.shape[1:], dtype=torch.uint8)
        masks[0, 8:40, 8:40] = masks[1, 20:60, 30:70] = 1
        boxes = torch.tensor([[8.0, 8.0, 40.0, 40.0], [30.0, 20.0, 70.0, 60.0]])
        targets.append({"boxes": boxes, "labels": torch.tensor([1, 4]), "masks": masks})
    return images, targets


def small(recipe: Recipe) -> Recipe:
    """The same on small images, and without weights from elsewhere."""
    return dataclasses.replace(
        recipe, weights="none", norm="batch", short_sides=(64,), long_side=128, rois_per_image=16
    )


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_a_step_of_each_stage_and_detections(path: Path) -> None:
    recipes = {stage: small(one) for stage, one in recipes_of(read_options(path)).items()}
    torch.manual_seed(0)
    model = make_detector(recipes["softmax"], LAYOUT.num_categories)
    images, targets = images_and_targets()
    losses = model.train()(images, targets)
    expected = {"loss_classifier", "loss_box_reg", "loss_objectness", "loss_rpn_box_reg"}
    masks = recipes["softmax"].detector == "mask_rcnn"
    assert losses.keys() == (expected | {"loss_mask"} if masks else expected)
    sum(losses.values()).backward()
    gradients = [p.grad for p in model.parameters() if p.requires_grad]
    assert all(gradient is not None and gradient.isfinite().all() for gradient in gradients)

    model.zero_grad(set_to_none=True)
    convert_to_bags(model, LAYOUT, recipes["bags"].others_ratio)
    parameters = freeze(model, recipes["bags"].train)
    losses = model.train()(images, targets)
    assert all(loss.isfinite() for loss in losses.values())
    sum(losses.values()).backward()
    with_gradient = {p for p in model.parameters() if p.grad is not None}
    assert with_gradient == set(parameters)

    model.roi_heads.detections_per_img = 5  # masks are large
    with torch.inference_mode():
        for output in model.eval()(images):
            assert {"boxes", "labels", "scores"} <= output.keys()
            assert ("masks" in output) == masks
            assert output["scores"].isfinite().all()


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
