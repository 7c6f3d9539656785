"""RoI features of a frozen detector, stored once, so that its classifier trains from the disk.

Stage two trains one linear layer, and yet each of its steps runs the whole detector to make what
that layer reads. Here the detector runs over the images once, or a few times with other flips. What
reaches the classifier is kept, for more RoIs of an image than a step takes: features in bfloat16
and labels, both memory-mapped. Then an epoch, which draws from them anew, is a matter of seconds to
minutes. Epoch `e` reads pass `e % passes`.

    folder/cache.json   what it was made of; another detector's cache is refused
    folder/features     bfloat16 [passes, images, RoIs, F]
    folder/labels       int32 [passes, images, RoIs]; -100 where an image has fewer RoIs
    folder/done         uint8 [passes, images]; 1 when an image is stored
    folder/broken-RANK  lines: what was wrong with images that others stand in for

Several processes of one machine may fill it together, and a run that is killed goes on.
"""

from __future__ import annotations

import copy
import json
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import distributed
import numpy as np
import torch
from checkpoints import fingerprint
from detection_data import LVISDetection, collate
from detectors import CLASSIFIER, PREDICTOR, place
from loading import BROKEN, Replacing, ignore_signals
from recipe import Recipe
from run_folder import write_json
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader
from torchvision.models.detection._utils import BalancedPositiveNegativeSampler
from tqdm import tqdm
from training import AUTOCAST, Batch, Place
from training_samplers import EpochBatches, SeededItems

IGNORED = -100


@dataclass(frozen=True)
class CacheOptions:
    """Where a run keeps features, and how many."""

    folder: Path
    passes: int = 1
    rois: int = 0
    """Of each image; 0 for twice as many as train."""


@dataclass(frozen=True)
class Contents:
    """What a cache holds, and what it was made of."""

    passes: int
    """How often the detector runs over the images; each time with other flips and sizes."""
    images: int
    rois: int
    """At most as many are kept of an image, and so many that train are drawn from them."""
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
        return self.passes * self.images * (self.rois * (2 * self.features + 4) + 1)


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
        self.features = self._map("features", np.int16, (c.passes, c.images, c.rois, c.features))
        self.labels = self._map("labels", np.int32, (c.passes, c.images, c.rois))
        self.done = self._map("done", np.uint8, (c.passes, c.images))

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
                f"{gigabytes(free)}; ask for fewer `--cache-rois`, or another folder"
            )
        write_json(about, asdict(self.contents))
        self._reserve()

    def _reserve(self) -> None:
        """Make the files in full, as far as they are not: memory that has no room is no error."""
        sizes = {self.folder / name: size for name, size in self._sizes().items()}
        if all(path.exists() and path.stat().st_size == size for path, size in sizes.items()):
            return
        (self.folder / "done").unlink(missing_ok=True)  # of features that were lost or cut short
        for path, size in sizes.items():
            if not path.exists() or path.stat().st_size != size:
                with path.open("wb") as file:
                    if size and hasattr(os, "posix_fallocate"):
                        os.posix_fallocate(file.fileno(), 0, size)
                    file.truncate(size)

    def _sizes(self) -> dict[str, int]:
        c = self.contents
        slots = c.passes * c.images
        return {
            "features": slots * c.rois * c.features * 2,
            "labels": slots * c.rois * 4,
            "done": slots,
        }

    def _map(self, name: str, dtype: Any, shape: tuple[int, ...]) -> np.memmap[Any, Any]:
        return np.memmap(self.folder / name, dtype, "r+", shape=shape)

    @property
    def broken(self) -> list[str]:
        """What was wrong with images that others stand in for, as all processes noticed."""
        paths = sorted(self.folder.glob("broken-*"))
        return [line for path in paths for line in path.read_text(encoding="utf-8").splitlines()]

    def note_broken(self, reason: str) -> None:
        """Remember what was wrong with an image; at once, for a kill may follow."""
        path = self.folder / f"broken-{distributed.rank()}"
        with path.open("a", encoding="utf-8") as file:
            file.write(reason + "\n")

    def put(self, number: int, image: int, features: Tensor, labels: Tensor) -> None:
        """Store an image's RoIs: float [n, F] and int64 [n], n at most `rois`."""
        rows = len(labels)
        bits = features.to(torch.bfloat16).cpu().contiguous().view(torch.int16).numpy()
        self.features[number, image, :rows] = bits
        self.labels[number, image, :rows] = labels.cpu().numpy()
        self.labels[number, image, rows:] = IGNORED
        self.done[number, image] = 1  # after the rest: a kill in between leaves it to do

    def get(self, number: int, image: int) -> tuple[Tensor, Tensor]:
        """Return what was stored: bfloat16 [n, F], int64 [n]."""
        labels = torch.from_numpy(self.labels[number, image].astype(np.int64))
        rows = int((labels != IGNORED).sum())
        bits = torch.from_numpy(np.array(self.features[number, image, :rows]))
        return bits.view(torch.bfloat16), labels[:rows]


def gigabytes(number: int) -> str:
    return f"{number / 2**30:.2f} GB"


# --- filling it ---------------------------------------------------------------------------------


def contents_of(
    model: nn.Module,
    dataset: LVISDetection,
    recipe: Recipe,
    options: CacheOptions,
    *,
    seed: int,
) -> Contents:
    """Return what the cache of a softmax detector would hold.

    Raises:
        ValueError: It would hold fewer RoIs than train.
    """
    rois = options.rois or 2 * recipe.rois_per_image
    if rois < recipe.rois_per_image:
        raise ValueError(
            f"Expected `--cache-rois` of at least {recipe.rois_per_image}, the RoIs of an image "
            f"that train, got {rois}"
        )
    classifier: Any = model.get_submodule(PREDICTOR)
    decisive = ("short_sides", "long_side", "foreground_share", "batch_size", "amp")
    return Contents(
        passes=options.passes,
        images=len(dataset),
        rois=rois,
        features=classifier.in_features,
        seed=seed,
        flip=recipe.flip,
        recipe=", ".join(f"{name} {getattr(recipe, name)}" for name in decisive),
        detector=fingerprint(model.state_dict(), without=CLASSIFIER),
        data=dataset.fingerprint,
    )


def fill(
    cache: FeatureCache,
    model: nn.Module,
    dataset: LVISDetection,
    recipe: Recipe,
    *,
    device: torch.device,
    num_workers: int = 0,
    skip_broken: bool = False,
) -> None:
    """Run a softmax detector over the training images, as often as there are passes.

    Args:
        cache: Where features go. What it has already is left.
        model: The detector; it is left as it is.
        dataset: The training images, with the flips that training has.
        recipe: Of stage two.
        device: Where to compute.
        num_workers: Processes that load images.
        skip_broken: Take the next image in place of one that cannot be read.

    Raises:
        ImageError: An image cannot be read.
        ValueError: An earlier run went past images that cannot be read, and this one does not.
    """
    if cache.broken and not skip_broken:
        raise ValueError(
            f"{cache.folder}: Expected a cache of all images without `--skip-broken`, got one that "
            f"others stand in for: {cache.broken[0]}; repair the images and fill another folder"
        )
    contents = cache.contents
    mine = [
        (number, batch)
        for number, batch in shared_batches(contents.passes, len(dataset), recipe.batch_size)
        if not cache.done[number, batch].all()
    ]
    stored = rois_of(
        model,
        dataset,
        recipe,
        mine,
        rois=contents.rois,
        seed=contents.seed,
        device=device,
        num_workers=num_workers,
        skip_broken=skip_broken,
        note_broken=cache.note_broken,
        title="Storing features",
    )
    for number, image, features, labels in stored:
        cache.put(number, image, features, labels)
    distributed.barrier()


def shared_batches(passes: int, images: int, size: int) -> list[tuple[int, list[int]]]:
    """Return this process's part of all batches: the pass, and the images that go together."""
    batches = [
        (number, list(range(first, min(first + size, images))))
        for number in range(passes)
        for first in range(0, images, size)
    ]
    return batches[distributed.rank() :: distributed.world_size()]


def rois_of(
    model: nn.Module,
    dataset: LVISDetection,
    recipe: Recipe,
    batches: Sequence[tuple[int, Sequence[int]]],
    *,
    rois: int,
    seed: int,
    device: torch.device,
    num_workers: int = 0,
    skip_broken: bool = False,
    note_broken: Callable[[str], None] = lambda reason: None,
    title: str = "Features",
) -> Iterator[tuple[int, int, Tensor, Tensor]]:
    """Yield what reaches a softmax detector's classifier in training, image by image.

    Args:
        model: The detector; it is left as it is.
        dataset: The training images, with the flips that training has.
        recipe: Of stage two.
        batches: Passes and the images that go together.
        rois: Of each image at most.
        seed: Of flips, sizes and RoIs.
        device: Where to compute.
        num_workers: Processes that load images.
        skip_broken: Take the next image in place of one that cannot be read.
        note_broken: Is told what was wrong with it.
        title: Of the bar.

    Yields:
        Pass, image, features [m, F] and labels [m].
    """
    detector = _proposing_as_in_training(model, rois, recipe.foreground_share)
    place(detector, recipe, device)
    source: Any = Replacing(dataset) if skip_broken else dataset
    loader = DataLoader(
        SeededItems(source),
        batch_sampler=[
            [(image, _seed(seed, number, image)) for image in batch] for number, batch in batches
        ],
        collate_fn=collate,
        num_workers=num_workers,
        worker_init_fn=ignore_signals,
        pin_memory=torch.cuda.is_available(),
    )
    bar = tqdm(
        zip(batches, loader, strict=True),
        title,
        len(batches),
        unit="batch",
        disable=not distributed.is_first(),
    )
    for (number, batch), (images, targets) in bar:
        for target in targets:
            for reason in target.get(BROKEN, ()):
                note_broken(reason)
        images = [image.to(device, non_blocking=True) for image in images]
        targets = [
            {key: target[key].to(device, non_blocking=True) for key in ("boxes", "labels")}
            for target in targets
        ]
        torch.manual_seed(_seed(seed, number, batch[0]))
        with torch.autocast(device.type, AUTOCAST.get(recipe.amp), enabled=recipe.amp != "off"):
            found = roi_features(detector, images, targets)
        for image, (features, labels) in zip(batch, found, strict=True):
            yield number, image, features, labels


@torch.no_grad()
def roi_features(
    detector: Any, images: list[Tensor], targets: list[dict[str, Tensor]]
) -> list[tuple[Tensor, Tensor]]:
    """Return what reaches the classifier of a training step: of each image features and labels.

    Args:
        detector: Its proposals are those of training.
        images: Float [3, H, W], in [0, 1].
        targets: Of each image `boxes`, [n, 4], and `labels`, [n].

    Returns:
        Of each image [m, F] and [m].
    """
    resized, targets = detector.transform(images, targets)
    pyramid = detector.backbone(resized.tensors)
    proposals, _ = detector.rpn(resized, pyramid)
    heads = detector.roi_heads
    boxes, _, labels, _ = heads.select_training_samples(proposals, targets)
    features = heads.box_head(heads.box_roi_pool(pyramid, boxes, resized.image_sizes))
    return list(zip(features.split([len(part) for part in labels]), labels, strict=True))


def _proposing_as_in_training(model: nn.Module, rois: int, foreground_share: float) -> nn.Module:
    """Return a frozen copy that resizes, proposes and samples as in training, without losses."""
    detector: Any = copy.deepcopy(model).eval()
    detector.transform.train()
    rpn = detector.rpn
    for limits in (rpn._pre_nms_top_n, rpn._post_nms_top_n):
        limits["testing"] = limits["training"]
    detector.roi_heads.fg_bg_sampler = BalancedPositiveNegativeSampler(rois, foreground_share)
    detector.roi_heads.mask_head = None  # else targets would need masks, which nothing reads here
    return detector


def _seed(seed: int, number: int, image: int) -> int:
    state = np.random.SeedSequence([seed, number, image]).generate_state(1, np.uint64)
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

    def __init__(self, cache: FeatureCache, batches: EpochBatches, recipe: Recipe) -> None:
        self.cache, self.batches, self.recipe = cache, batches, recipe
        self.broken: dict[str, None] = {}

    def __call__(self, place: Place) -> Iterator[tuple[Place, Batch]]:
        """Yield each batch with the place that follows it."""
        epoch, batch = place
        while True:
            self.batches.set_epoch(epoch, batch)
            number, last = epoch % self.cache.contents.passes, self.batches.num_batches
            for items in self.batches:
                batch += 1
                yield (epoch, batch) if batch < last else (epoch + 1, 0), self._read(number, items)
            epoch, batch = epoch + 1, 0

    def _read(self, number: int, items: Sequence[tuple[int, int]]) -> Batch:
        found = []
        for image, seed in items:
            features, labels = self.cache.get(number, image)
            rows = drawn(labels, self.recipe.rois_per_image, self.recipe.foreground_share, seed)
            found.append((features[rows], labels[rows]))
        return [features for features, _ in found], [{"labels": labels} for _, labels in found]


def drawn(labels: Tensor, number: int, foreground_share: float, seed: int) -> Tensor:
    """Return which RoIs of an image a step takes, by the rule that torchvision has for it.

    Args:
        labels: [n]; 0 is background.
        number: Of RoIs that are taken, if there are as many.
        foreground_share: Of these at most.
        seed: Of the draw.

    Returns:
        Their rows, int64.
    """
    generator = torch.Generator().manual_seed(seed)
    foreground, background = ((labels > 0) == which for which in (True, False))
    most = int(number * foreground_share)
    parts = []
    for rows in (foreground.nonzero()[:, 0], background.nonzero()[:, 0]):
        chosen = torch.randperm(len(rows), generator=generator)[:most]
        parts.append(rows[chosen])
        most = number - len(parts[0])
    return torch.cat(parts)
