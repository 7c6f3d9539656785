"""Detectors by their recipe: torchvision's, or a small one that trains in a minute."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torchvision
from recipe import Recipe
from small_detector import SharedBoxRegression, small_detector
from torch import Tensor, nn
from torch.utils._pytree import tree_map
from torchvision.models import get_model_weights, list_models
from torchvision.models.detection import FasterRCNN, MaskRCNN
from torchvision.models.detection.backbone_utils import resnet_fpn_backbone
from torchvision.models.detection.faster_rcnn import FasterRCNN_ResNet50_FPN_Weights
from torchvision.models.detection.mask_rcnn import MaskRCNN_ResNet50_FPN_Weights
from torchvision.ops.misc import FrozenBatchNorm2d

from balanced_group_softmax.adapters.torchvision import convert_classifier
from balanced_group_softmax.rebalance.softmax import SoftmaxClassifier

PREDICTOR = "roi_heads.box_predictor.cls_score"
CLASSIFIER = f"{PREDICTOR}."
BY_CATEGORY = (
    CLASSIFIER,
    "roi_heads.box_predictor.bbox_pred.",
    "roi_heads.mask_predictor.mask_fcn_logits.",
)
"""Layers whose sizes depend on how many categories there are."""
KINDS: dict[str, type[FasterRCNN]] = {"faster_rcnn": FasterRCNN, "mask_rcnn": MaskRCNN}
COCO_WEIGHTS = {
    "faster_rcnn": FasterRCNN_ResNet50_FPN_Weights.COCO_V1,
    "mask_rcnn": MaskRCNN_ResNet50_FPN_Weights.COCO_V1,
}


def make_detector(recipe: Recipe, num_categories: int) -> FasterRCNN:
    """Build a detector with a plain softmax classifier of C + 1 outputs; label 0 is background.

    Raises:
        ValueError: The backbone is unknown.
        OSError: Weights are to be downloaded and cannot be.
    """
    limits: dict[str, Any] = {
        "min_size": recipe.short_sides,
        "max_size": recipe.long_side,
        "box_batch_size_per_image": recipe.rois_per_image,
        "box_positive_fraction": recipe.foreground_share,
        "box_score_thresh": recipe.score_threshold,
        "box_nms_thresh": recipe.nms_threshold,
        "box_detections_per_img": recipe.detections_per_image,
    }
    kind = KINDS[recipe.detector]
    if recipe.backbone == "small":
        model = small_detector(kind, num_categories, **limits)
    else:
        with _downloads(recipe):
            backbone = _resnet_fpn(recipe)
        model = kind(backbone, num_classes=num_categories + 1, **limits)
    predictor = model.roi_heads.box_predictor
    # Small weights as in the original, so that their norms tell what was learned.
    nn.init.normal_(predictor.cls_score.weight, std=0.01)
    nn.init.zeros_(predictor.cls_score.bias)
    if recipe.box_regression == "shared":
        predictor.bbox_pred = SharedBoxRegression(
            predictor.cls_score.in_features, num_categories + 1
        )
    if recipe.weights == "coco":
        with _downloads(recipe):
            state = COCO_WEIGHTS[recipe.detector].get_state_dict(progress=True, check_hash=True)
        load_what_fits(model, state)
        trained_without_eps(model)
    # Under autocast anchors and deltas would have the 8 or 11 bits of what they come from, which
    # do not hold a pixel.
    model.backbone.register_forward_hook(_in_float32)
    model.rpn.head.register_forward_hook(_in_float32)
    return model


def _in_float32(module: nn.Module, args: Any, output: Any) -> Any:
    return tree_map(lambda value: value.float() if value.is_floating_point() else value, output)


def _resnet_fpn(recipe: Recipe) -> nn.Module:
    known = list_models(torchvision.models, include=["resnet*", "resnext*", "wide_resnet*"])
    if recipe.backbone not in known:
        raise ValueError(
            f"Expected `backbone` to be small or one of {', '.join(known)}, got {recipe.backbone}"
        )
    imagenet = recipe.weights == "imagenet"
    return resnet_fpn_backbone(
        backbone_name=recipe.backbone,
        weights=get_model_weights(recipe.backbone)["IMAGENET1K_V1"] if imagenet else None,
        norm_layer=FrozenBatchNorm2d if recipe.norm == "frozen" else nn.BatchNorm2d,
        trainable_layers=recipe.trainable_layers,
    )


@contextmanager
def _downloads(recipe: Recipe) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise OSError(
            f"Expected `weights` {recipe.weights} in torch's cache or on the network, got an "
            f"error: {error}"
        ) from None


def trained_without_eps(model: nn.Module) -> None:
    """Let frozen normalisation compute what it computes with an epsilon of 0.

    torchvision's first detectors for COCO were trained that way. The epsilon is taken off the
    variances, which a checkpoint keeps.
    """
    for module in model.modules():
        if isinstance(module, FrozenBatchNorm2d):
            module.running_var -= module.eps


def place(model: nn.Module, recipe: Recipe, device: torch.device) -> nn.Module:
    """Move a detector, in place, to where and how it is to compute."""
    model.to(device)
    if recipe.channels_last:
        anything: Any = model  # which torch 2.4 does not say it takes
        anything.to(memory_format=torch.channels_last)
    if recipe.compile:
        model.get_submodule("backbone").compile(dynamic=True)
    return model


def load_what_fits(model: nn.Module, state: Mapping[str, Any]) -> list[str]:
    """Load a foreign state dict; return what stays as it was made, and say why it does.

    Layers whose size depends on the categories may be of another size, or be absent, as they are
    in a backbone's weights; whole parts may be absent, such as a mask head or all but the backbone.

    Raises:
        ValueError: An entry of any other layer is of another size, or nothing fits.
    """
    own = model.state_dict()
    if not own.keys() & state.keys():  # a backbone's own weights
        state = {f"backbone.body.{name}": value for name, value in state.items()}
    fits: dict[str, Tensor] = {}
    for name, value in state.items():
        if name not in own or not isinstance(value, Tensor):
            continue
        if own[name].shape == value.shape:
            fits[name] = value
        elif not name.startswith(BY_CATEGORY):
            raise ValueError(
                f"Expected {name} of shape {list(own[name].shape)} as in this detector, got "
                f"{list(value.shape)}"
            )
    if not fits:
        raise ValueError(
            f"Expected weights of this detector, such as {next(iter(own))}, got "
            f"{', '.join(name.removeprefix('backbone.body.') for name in list(state)[:3])}, ..."
        )
    model.load_state_dict(fits, strict=False)
    return sorted(own.keys() - fits.keys())


def with_same_postprocessing(model: nn.Module) -> nn.Module:
    """Return a plain detector with the post-processing that a converted one has.

    Its detections are those of torchvision, in a small part of the time: torchvision takes seconds
    for an image at LVIS's 1203 categories and a score threshold of 0.
    """
    classifier = model.get_submodule(PREDICTOR)
    if type(classifier) is not nn.Linear:
        return model
    return convert_classifier(model, SoftmaxClassifier.from_linear(classifier), inplace=False)


def category_norms(state: Mapping[str, Tensor], rows: Sequence[int]) -> Any:
    """Return the norms of some rows of a state dict's classifier, float [C]."""
    weight = state.get(f"{CLASSIFIER}weight")
    if weight is None:
        weight = state[f"{CLASSIFIER}fc.weight"]
    return weight[list(rows)].norm(dim=1).cpu().numpy()
