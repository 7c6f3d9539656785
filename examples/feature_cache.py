"""RoI features of a frozen detector, stored once, so that its classifier trains from the disk.

Stage two trains one linear layer, and yet each of its steps runs the whole detector to make what
that layer reads. Here the detector runs over the data once for each draw (other flips, other RoIs),
and what reaches the classifier is kept: features in bfloat16 and labels, both memory-mapped. Then
an epoch is a matter of seconds to minutes. Epoch `e` reads draw `e % draws`.

    folder/cache.json   what it was made of; another detector's cache is refused
    folder/features     bfloat16 [draws, images, RoIs, F]
    folder/labels       int32 [draws, images, RoIs]; -100 where an image has fewer RoIs
    folder/done         uint8 [draws, images]; 1 when an image is stored

Several processes of one machine may fill it together, and a run that is killed goes on.
"""

from __future__ import annotations

import copy
import json
import os
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import distributed
import numpy as np
import torch
from checkpoints import fingerprint
from detection_data import LVISDetection, collate
from detectors import CLASSIFIER, place
from loading import BROKEN, Replacing, ignore_sigterm
from recipe import Recipe
from run_folder import write_json
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader
from tqdm import tqdm
from training import AUTOCAST, Batch, Place
from training_samplers import EpochBatches, SeededItems

from balanced_group_softmax.adapters.torchvision import convert_classifier, freeze

IGNORED = -100
PREDICTOR = CLASSIFIER.rstrip(".")


@dataclass(frozen=True)
class Contents:
    """What a cache holds, and what it was made of."""

    draws: int
    images: int
    rois: int
    features: int
    seed: int
    flip: float
    recipe: str
    """Options that decide what the detector makes of an image."""
    detector: str
    """Hash of the weights."""
    data: str
    """Hash of the images, their boxes and labels."""

    @property
    def num_bytes(self) -> int:
        """How large the files get at most."""
        return self.draws * self.images * (self.rois * (2 * self.features + 4) + 1)


class FeatureCache:
    """The files of a folder, opened for reading or writing.

    Raises:
        OSError: There is no room, or a file cannot be written.
        ValueError: The folder holds the cache of something else.
    """

    def __init__(self, folder: Path, contents: Contents) -> None:
        self.folder, self.contents = folder, contents
        distributed.first_does(self._prepare)
        c = contents
        self.features = self._map("features", np.int16, (c.draws, c.images, c.rois, c.features))
        self.labels = self._map("labels", np.int32, (c.draws, c.images, c.rois))
        self.done = self._map("done", np.uint8, (c.draws, c.images))

    def _prepare(self) -> None:
        about = self.folder / "cache.json"
        if about.exists():
            found = json.loads(about.read_text(encoding="utf-8"))
            wanted = asdict(self.contents)
            changed = [key for key, value in wanted.items() if found.get(key) != value]
            if changed:
                text = ", ".join(f"{key} {found.get(key)} and not {wanted[key]}" for key in changed)
                raise ValueError(f"{self.folder}: Expected the cache of this run, got {text}")
            self._reserve()
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        if any(self.folder.iterdir()):
            raise ValueError(f"{self.folder}: Expected a cache or an empty folder, got other files")
        needed, free = self.contents.num_bytes, shutil.disk_usage(self.folder).free
        print(
            f"Features take up to {gigabytes(needed)} in {self.folder}; {gigabytes(free)} are free"
        )
        if needed > free:
            raise OSError(
                f"{self.folder}: Expected room for {gigabytes(needed)} of features, found "
                f"{gigabytes(free)}; ask for fewer --cache-draws, or another folder"
            )
        write_json(about, asdict(self.contents))
        self._reserve()

    def _reserve(self) -> None:
        """Make the files in full, as far as they are not: memory that has no room is no error."""
        for name, size in self._sizes().items():
            path = self.folder / name
            if not path.exists() or path.stat().st_size != size:
                with path.open("wb") as file:
                    if size and hasattr(os, "posix_fallocate"):
                        os.posix_fallocate(file.fileno(), 0, size)
                    file.truncate(size)

    def _sizes(self) -> dict[str, int]:
        c = self.contents
        slots = c.draws * c.images
        return {
            "features": slots * c.rois * c.features * 2,
            "labels": slots * c.rois * 4,
            "done": slots,
        }

    def _map(self, name: str, dtype: Any, shape: tuple[int, ...]) -> np.memmap[Any, Any]:
        return np.memmap(self.folder / name, dtype, "r+", shape=shape)

    def put(self, draw: int, image: int, features: Tensor, labels: Tensor) -> None:
        """Store an image's RoIs: float [n, F] and int64 [n], n at most `rois`."""
        number = len(labels)
        bits = features.to(torch.bfloat16).cpu().contiguous().view(torch.int16).numpy()
        self.features[draw, image, :number] = bits
        self.labels[draw, image, :number] = labels.cpu().numpy()
        self.labels[draw, image, number:] = IGNORED
        self.done[draw, image] = 1  # after the rest: a kill in between leaves it to do

    def get(self, draw: int, image: int) -> tuple[Tensor, Tensor]:
        """Return what was stored: bfloat16 [n, F], int64 [n]."""
        labels = torch.from_numpy(self.labels[draw, image].astype(np.int64))
        number = int((labels != IGNORED).sum())
        bits = torch.from_numpy(np.array(self.features[draw, image, :number]))
        return bits.view(torch.bfloat16), labels[:number]


def gigabytes(number: int) -> str:
    return f"{number / 2**30:.2f} GB"


# --- filling it ---------------------------------------------------------------------------------


class Recorder(nn.Module):
    """A classifier that only looks at what it is given."""

    background: Literal["first"] = "first"

    def __init__(self, in_features: int, num_categories: int) -> None:
        super().__init__()
        self.in_features, self.num_categories = in_features, num_categories
        self.features = torch.empty(0)
        self.labels = torch.empty(0)

    def forward(self, features: Tensor) -> Tensor:
        self.features = features
        return features.new_zeros(len(features), self.num_categories + 1)

    def losses(self, logits: Tensor, labels: Tensor) -> dict[str, Tensor]:
        self.labels = labels
        return {}

    def scores(self, logits: Tensor) -> Tensor:
        return logits


def contents_of(
    model: nn.Module, dataset: LVISDetection, recipe: Recipe, *, draws: int, seed: int
) -> Contents:
    """Return what the cache of a softmax detector would hold."""
    classifier: Any = model.get_submodule(PREDICTOR)
    options = ("short_sides", "long_side", "foreground_share", "batch_size", "amp")
    return Contents(
        draws=draws,
        images=len(dataset),
        rois=recipe.rois_per_image,
        features=classifier.in_features,
        seed=seed,
        flip=recipe.flip,
        recipe=", ".join(f"{name} {getattr(recipe, name)}" for name in options),
        detector=fingerprint(model.state_dict(), without=CLASSIFIER),
        data=dataset.fingerprint(),
    )


@torch.no_grad()
def fill(
    cache: FeatureCache,
    model: nn.Module,
    dataset: LVISDetection,
    recipe: Recipe,
    *,
    device: torch.device,
    num_workers: int = 0,
    skip_broken: bool = False,
) -> list[str]:
    """Run a softmax detector over the training images, as often as there are draws.

    Args:
        cache: Where features go. What it has already is left.
        model: The detector; it is left as it is.
        dataset: The training images, with the flips that training has.
        recipe: Of stage two.
        device: Where to compute.
        num_workers: Processes that load images.
        skip_broken: Take the next image in place of one that cannot be read.

    Returns:
        What was wrong with images, as this process noticed.

    Raises:
        ImageError: An image cannot be read.
    """
    broken: list[str] = []
    detector, recorder = _recording(model)
    place(detector, recipe, device).train()
    counts: list[int] = []
    hook = detector.get_submodule("roi_heads.box_roi_pool").register_forward_pre_hook(
        lambda module, args: counts.extend(len(boxes) for boxes in args[1])
    )
    batches = list(_batches(cache.contents, recipe.batch_size))
    mine = [
        batch
        for batch in batches[distributed.rank() :: distributed.world_size()]
        if not all(cache.done[draw, image] for draw, image in batch)
    ]
    source: Any = Replacing(dataset) if skip_broken else dataset
    loader = DataLoader(
        SeededItems(source),
        batch_sampler=[
            [(image, _seed(cache.contents.seed, draw, image)) for draw, image in batch]
            for batch in mine
        ],
        collate_fn=collate,
        num_workers=num_workers,
        worker_init_fn=ignore_sigterm,
        pin_memory=torch.cuda.is_available(),
    )
    bar = tqdm(
        zip(mine, loader, strict=True),
        "Storing features",
        len(mine),
        unit="batch",
        disable=not distributed.is_first(),
    )
    for batch, (images, targets) in bar:
        counts.clear()
        broken += [reason for target in targets for reason in target.get(BROKEN, ())]
        torch.manual_seed(_seed(cache.contents.seed, *batch[0]))
        with torch.autocast(device.type, AUTOCAST.get(recipe.amp), enabled=recipe.amp != "off"):
            detector(
                [image.to(device, non_blocking=True) for image in images],
                [
                    {key: target[key].to(device, non_blocking=True) for key in ("boxes", "labels")}
                    for target in targets
                ],
            )
        rows = zip(recorder.features.split(counts), recorder.labels.split(counts), strict=True)
        for (draw, image), (features, labels) in zip(batch, rows, strict=True):
            cache.put(draw, image, features, labels)
    hook.remove()
    distributed.barrier()
    return broken


def _recording(model: nn.Module) -> tuple[nn.Module, Recorder]:
    """Return a detector that trains as stage two does, but for its classifier, and the recorder."""
    detector: Any = copy.deepcopy(model)
    freeze(detector, "classifier")
    plain: Any = detector.get_submodule(PREDICTOR)
    recorder = Recorder(plain.in_features, plain.out_features - 1)
    convert_classifier(detector, recorder)
    detector.roi_heads.mask_roi_pool = None  # masks are of no use here
    return detector, recorder


def _batches(contents: Contents, size: int) -> Iterator[list[tuple[int, int]]]:
    for draw in range(contents.draws):
        for first in range(0, contents.images, size):
            yield [(draw, i) for i in range(first, min(first + size, contents.images))]


def _seed(seed: int, draw: int, image: int) -> int:
    state = np.random.SeedSequence([seed, draw, image]).generate_state(1, np.uint64)
    return int(state[0] >> np.uint64(1))


# --- training from it -----------------------------------------------------------------------------


class CachedClassifier(nn.Module):
    """A detector's classifier that trains from features."""

    def __init__(self, classifier: Any) -> None:
        super().__init__()
        self.classifier = classifier

    def forward(
        self, features: list[Tensor], targets: list[dict[str, Tensor]]
    ) -> dict[str, Tensor]:
        """Return the classifier's losses.

        Args:
            features: Of each image, [n, F].
            targets: Of each image `labels`, [n].
        """
        logits = self.classifier(torch.cat([part.float() for part in features]))
        labels = torch.cat([target["labels"] for target in targets])
        if type(self.classifier) is nn.Linear:
            return {"loss_classifier": F.cross_entropy(logits, labels)}
        losses: dict[str, Tensor] = self.classifier.losses(logits, labels)
        return losses


class CachedBatches:
    """The batches of training, from a cache in place of images; call it with the place."""

    def __init__(self, cache: FeatureCache, batches: EpochBatches) -> None:
        self.cache, self.batches = cache, batches
        self.broken: dict[str, None] = {}

    def __call__(self, place: Place) -> Iterator[tuple[Place, Batch]]:
        """Yield each batch with the place that follows it."""
        epoch, batch = place
        while True:
            self.batches.set_epoch(epoch, batch)
            draw, last = epoch % self.cache.contents.draws, self.batches.num_batches
            for items in self.batches:
                batch += 1
                yield (epoch, batch) if batch < last else (epoch + 1, 0), self._read(draw, items)
            epoch, batch = epoch + 1, 0

    def _read(self, draw: int, items: Sequence[tuple[int, int]]) -> Batch:
        found = [self.cache.get(draw, image) for image, _ in items]
        return [features for features, _ in found], [{"labels": labels} for _, labels in found]
