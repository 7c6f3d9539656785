"""Batches for training and evaluation: repeatable, resumable, and past images that are broken."""

from __future__ import annotations

import signal
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from detection_data import ImageError, LVISDetection, Target, collate
from recipe import Recipe
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from training import Batch, Place
from training_samplers import EpochBatches, SeededItems

from balanced_group_softmax.rebalance.repeat_factors import (
    category_repeat_factors,
    image_repeat_factors,
)

BROKEN = "broken"
"""In a target: what was wrong with the image that this one stands in for."""


class Replacing(Dataset[tuple[Tensor, Target]]):
    """A data set in which the next image stands in for one that cannot be read.

    Raises:
        ImageError: No image can be read.
    """

    def __init__(self, dataset: LVISDetection) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> tuple[Tensor, Target]:
        reasons = []
        for offset in range(len(self)):
            try:
                image, target = self.dataset[(index + offset) % len(self)]
            except ImageError as error:
                reasons.append(str(error))
                continue
            return image, {**target, BROKEN: reasons} if reasons else target
        raise ImageError(reasons[0])


class Skipping(Dataset[tuple[Tensor | None, Target]]):
    """A data set for evaluation, with no image and the reason where one cannot be read."""

    def __init__(self, dataset: LVISDetection) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> tuple[Tensor | None, Target]:
        try:
            return self.dataset[index]
        except ImageError as error:
            return None, {"image_id": self.dataset.image_ids[index], BROKEN: [str(error)]}


def epoch_batches(
    dataset: LVISDetection, recipe: Recipe, seed: int, *, num_replicas: int, rank: int
) -> EpochBatches:
    """Return which images each batch of each epoch has."""
    factors = None
    if recipe.sampler == "repeat_factor":
        factors = repeat_factors(dataset, recipe.repeat_threshold)
        if bool((factors == 1).all()) and rank == 0:
            print(
                f"No image repeats: each category is in more than {recipe.repeat_threshold:g} of "
                "the images, `--repeat-threshold`"
            )
    return EpochBatches(
        len(dataset),
        recipe.batch_size,
        factors=factors,
        sizes=dataset.sizes if recipe.aspect_groups else None,
        seed=seed,
        num_replicas=num_replicas,
        rank=rank,
    )


def repeat_factors(dataset: LVISDetection, threshold: float) -> Tensor:
    """Return how often each image comes in an epoch, by the images that there are."""
    labels = [dataset.labels(index).numpy() for index in range(len(dataset))]
    counts = torch.zeros(dataset.num_categories + 1, dtype=torch.int64)
    for row in labels:
        counts[torch.from_numpy(row).unique()] += 1
    factors = category_repeat_factors(counts[1:], len(dataset), threshold=threshold)
    return image_repeat_factors(labels, factors)


def ignore_signals(worker: int) -> None:
    """Leave it to the main process, which saves, when all processes are asked to end."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)


class TrainingBatches:
    """Batches from any place on, for ever; call it with the place."""

    def __init__(
        self,
        dataset: LVISDetection,
        batches: EpochBatches,
        *,
        num_workers: int = 0,
        skip_broken: bool = False,
    ) -> None:
        self.batches = batches
        self.broken: dict[str, None] = {}
        """What was wrong with images, in the order in which it was noticed."""
        source: Any = Replacing(dataset) if skip_broken else dataset
        self.loader = DataLoader(
            SeededItems(source),
            batch_sampler=batches,
            collate_fn=collate,
            num_workers=num_workers,
            worker_init_fn=ignore_signals,
            persistent_workers=num_workers > 0,
            pin_memory=torch.cuda.is_available(),
            generator=torch.Generator(),
        )

    def __call__(self, place: Place) -> Iterator[tuple[Place, Batch]]:
        """Yield each batch with the place that follows it."""
        epoch, batch = place
        while True:
            self.batches.set_epoch(epoch, batch)
            last = self.batches.num_batches
            for images, targets in self.loader:
                batch += 1
                for target in targets:
                    self.broken.update(dict.fromkeys(target.pop(BROKEN, ())))
                yield (epoch, batch) if batch < last else (epoch + 1, 0), (images, targets)
            epoch, batch = epoch + 1, 0


def steps_of(recipe: Recipe, batches: EpochBatches) -> int:
    """Return how many steps a recipe trains for; with repeat factors, by the first epoch."""
    batches.set_epoch(0)
    return recipe.steps or max(1, round(recipe.epochs * batches.num_batches / recipe.accumulate))


def evaluation_loader(
    dataset: LVISDetection, batches: Sequence[Sequence[int]], *, num_workers: int, skip_broken: bool
) -> DataLoader[Any]:
    """Return a loader of some batches of images for evaluation."""
    source: Any = Skipping(dataset) if skip_broken else dataset
    return DataLoader(
        source,
        batch_sampler=[list(batch) for batch in batches],
        collate_fn=collate,
        num_workers=num_workers,
        worker_init_fn=ignore_signals,
    )
