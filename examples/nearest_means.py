"""Class means of a detector: features of annotated boxes, gathered in one pass."""

from __future__ import annotations

from typing import Any, Literal

import distributed
import torch
from detection_data import LVISDetection
from loading import BROKEN, evaluation_loader
from pooled_class_mean import PooledClassMean
from recipe import Recipe
from torch import Tensor, nn
from tqdm import tqdm
from training import AUTOCAST

from balanced_group_softmax.rebalance.nearest_class_mean import ClassMeans, NearestClassMean

Features = Literal["fc", "conv"]
"""What the box head makes of a box, or what is pooled for it."""


@torch.inference_mode()
def gather_means(
    model: Any,
    dataset: LVISDetection,
    recipe: Recipe,
    kind: Features,
    *,
    device: torch.device,
    num_workers: int = 0,
    skip_broken: bool = False,
) -> tuple[NearestClassMean | PooledClassMean, list[str]]:
    """Return a classifier by the mean features of the training boxes, as the original makes it.

    With it, what was wrong with images, as this process noticed.

    Args:
        model: A softmax detector; it is moved to the device, and else left as it is.
        dataset: The training images.
        recipe: How large batches are, and what they are computed in.
        kind: Which features.
        device: Where to compute.
        num_workers: Processes that load images.
        skip_broken: Go past images that cannot be read.

    Raises:
        ImageError: An image cannot be read, without `skip_broken`.
    """
    linear: nn.Linear = model.roi_heads.box_predictor.cls_score
    broken: list[str] = []
    means, was_training = None, model.training
    model.to(device).eval()
    size = recipe.batch_size
    batches = [
        range(first, min(first + size, len(dataset))) for first in range(0, len(dataset), size)
    ][distributed.rank() :: distributed.world_size()]
    loader = evaluation_loader(dataset, batches, num_workers=num_workers, skip_broken=skip_broken)
    for images, targets in tqdm(
        loader, "Class means", unit="batch", disable=not distributed.is_first()
    ):
        broken += [reason for target in targets for reason in target.get(BROKEN, ())]
        found = [
            (image.to(device), {key: target[key].to(device) for key in ("boxes", "labels")})
            for image, target in zip(images, targets, strict=True)
            if image is not None and len(target["labels"]) > 0
        ]
        if not found:
            continue
        with torch.autocast(device.type, AUTOCAST.get(recipe.amp), enabled=recipe.amp != "off"):
            features = box_features(model, found, kind)
        if means is None:
            means = ClassMeans(linear.out_features - 1, features.shape[1], device=device)
        means.update(features, torch.cat([target["labels"] for _, target in found]))
    means = _of_all_processes(means, linear.out_features - 1, device)
    model.train(was_training)
    made = NearestClassMean.from_means(means, softmax=linear)
    return (PooledClassMean(made) if kind == "conv" else made), broken


def box_features(
    model: Any, found: list[tuple[Tensor, dict[str, Tensor]]], kind: Features
) -> Tensor:
    """Return the features of annotated boxes, [n, F], over all images."""
    images, targets = zip(*found, strict=True)
    resized, targets = model.transform(list(images), list(targets))
    pooled = model.roi_heads.box_roi_pool(
        model.backbone(resized.tensors), [t["boxes"] for t in targets], resized.image_sizes
    )
    rows: Tensor = model.roi_heads.box_head(pooled) if kind == "fc" else pooled.flatten(1)
    return rows


def _of_all_processes(
    means: ClassMeans | None, num_categories: int, device: torch.device
) -> ClassMeans:
    """Return what all processes have gathered; some may have seen no box."""
    sizes = distributed.gathered(0 if means is None else means.num_features)
    if not any(sizes):
        raise ValueError("Expected training boxes to take means of, got none")
    if means is None:
        means = ClassMeans(num_categories, max(sizes), device=device)
    means.all_reduce()
    return means
