"""Batches for training that can be repeated, resumed, and spread over processes.

What an epoch reads depends on seed, epoch, batch size and number of processes alone, and how an
image is augmented on seed, epoch and the image's place in the epoch: not on workers, ranks or
anything else that draws random numbers.

    batches = EpochBatches(len(data), 2, factors=factors, sizes=data.sizes, seed=0,
                           num_replicas=8, rank=rank)
    loader = DataLoader(SeededItems(data), batch_sampler=batches, collate_fn=collate, num_workers=4)
    for epoch in range(first_epoch, 12):
        batches.set_epoch(epoch, start_batch if epoch == first_epoch else 0)
        for images, targets in loader:
            ...
"""

import operator
from collections.abc import Iterator, Sequence
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, Sampler

from balanced_group_softmax.rebalance.repeat_factors import repeat_indices

Item = tuple[int, int]
"""Index of an image, and the seed of its augmentation, in [0, 2**63)."""

T_co = TypeVar("T_co", covariant=True)

_ITEM_SEEDS = 1  # sets their stream of random numbers apart from that of the epoch's list


class EpochBatches(Sampler[list[Item]]):
    """Batch sampler of `(index, seed)` pairs, for a loader of :class:`SeededItems`.

    An epoch is one shuffled list of images for all processes, each image once or, with `factors`,
    as often as :func:`repeat_indices` draws. The n-th of the list has the n-th seed, however the
    list is cut into batches.

    With `sizes`, a batch holds either images that are at least as wide as high or images that are
    higher than wide, which keeps the padding of a batch small. Batches follow each other as they
    become full along the list. Where one kind is too few for a batch of its own and would never be
    trained on, or the two have too few batches for all processes, they are mixed.

    Batch k goes to process `k % num_replicas`, so the images of a step are the same batches
    whichever process reads them, and of mixed shapes. All processes have the same number of
    batches, and every batch is full: **dropped** are the last `batch_size - 1` images at most of
    each kind (one kind without `sizes`, else two), and the last `num_replicas - 1` batches at most.
    They are others in each epoch.

    Args:
        num_images: Images in the data set.
        batch_size: Images in a batch of one process.
        factors: Repeat factors [num_images], each at least 1, e.g. from `image_repeat_factors`;
            None for every image once.
        sizes: Integers [num_images, 2], width and height, e.g. `LVISDetection.sizes`; None to mix.
        seed: An integer >= 0, the same in every process.
        num_replicas: Number of processes.
        rank: Which of them this is.

    Raises:
        TypeError: A number is not an integer.
        ValueError: An argument is out of range or of another length than `num_images`, or there
            are too few images for one batch in every process.
    """

    def __init__(
        self,
        num_images: int,
        batch_size: int,
        *,
        factors: Any = None,
        sizes: Any = None,
        seed: int = 0,
        num_replicas: int = 1,
        rank: int = 0,
    ) -> None:
        num_images = whole_number(num_images, "num_images", lowest=1)
        self.batch_size = whole_number(batch_size, "batch_size", lowest=1)
        self.seed = whole_number(seed, "seed")
        self.num_replicas = whole_number(num_replicas, "num_replicas", lowest=1)
        self.rank = whole_number(rank, "rank")
        if self.rank >= self.num_replicas:
            raise ValueError(f"Expected `rank` in [0, {self.num_replicas}), got {rank}")
        self._factors = torch.ones(num_images, dtype=torch.float64)
        if factors is not None:
            self._factors = torch.as_tensor(factors, dtype=torch.float64).detach().cpu().clone()
            check_shape(self._factors, (num_images,), "factors")
        self._upright = np.zeros(num_images, bool)
        if sizes is not None:
            width_height = np.asarray(sizes)
            check_shape(width_height, (num_images, 2), "sizes")
            self._upright = width_height[:, 1] > width_height[:, 0]
        self.set_epoch(0)
        fewest = self._fewest_batches()
        if min(fewest) == 0 or sum(fewest) < self.num_replicas:
            self._upright[:] = False
            self.set_epoch(0)
            self._check_enough()

    def _fewest_batches(self) -> list[int]:
        """How many batches an epoch has at least, of each kind of image that there is."""
        images = np.bincount(self._upright, self._factors.floor().numpy())
        return [int(number) // self.batch_size for number in images if number]

    def _check_enough(self) -> None:
        """Refuse what could leave a process without a batch in some epoch."""
        if sum(self._fewest_batches()) < self.num_replicas:
            raise ValueError(
                f"Expected images for at least {self.num_replicas} full batches of "
                f"{self.batch_size}, one for each process, got {int(self._factors.floor().sum())} "
                "images; a smaller batch size needs fewer"
            )

    def set_epoch(self, epoch: int, start_batch: int = 0) -> None:
        """Choose the epoch, and the batch to start with.

        Args:
            epoch: An integer >= 0.
            start_batch: How many batches of the epoch each process has trained on already; they
                are skipped without reading an image. A loader asks for batches ahead of their use,
                so count the steps of training.

        Raises:
            TypeError: An argument is not an integer.
            ValueError: An argument is negative, or the epoch has fewer batches.
        """
        start_batch = whole_number(start_batch, "start_batch")
        images = repeat_indices(self._factors, seed=self.seed, epoch=epoch).numpy()
        places = full_batches(self._upright[images], self.batch_size)
        num_batches = len(places) // self.num_replicas
        if start_batch > num_batches:
            raise ValueError(
                f"Expected `start_batch` in [0, {num_batches}] in epoch {epoch}, got {start_batch}"
            )
        places = places[self.rank :: self.num_replicas][:num_batches]
        self.epoch = int(epoch)
        self.start_batch = start_batch
        self._images = images[places]
        self._seeds = item_seeds(len(images), self.seed, self.epoch)[places]

    @property
    def num_batches(self) -> int:
        """Batches of the whole epoch in one process, those before `start_batch` included."""
        return len(self._images)

    def __len__(self) -> int:
        """Batches that an iteration yields: those from `start_batch` on."""
        return self.num_batches - self.start_batch

    def __iter__(self) -> Iterator[list[Item]]:
        # Taken now: an iteration keeps to its epoch even if the next one is chosen meanwhile.
        batches = self._images[self.start_batch :], self._seeds[self.start_batch :]
        return (
            list(zip(images.tolist(), seeds.tolist(), strict=True))
            for images, seeds in zip(*batches, strict=True)
        )


class SeededItems(Dataset[T_co]):
    """A data set whose item `(index, seed)` is `dataset[index]`, drawn with that seed.

    While an item is made, torch's CPU generator, from which torchvision's transforms draw, starts
    from the seed; then it is put back, also after an error. The generators of GPUs, of NumPy and
    of the module `random` are left alone, so a transform that draws from those is not repeatable.
    """

    def __init__(self, dataset: Dataset[T_co]) -> None:
        self.dataset = dataset

    def __getitem__(self, item: Item) -> T_co:
        if not (isinstance(item, Sequence) and len(item) == 2):
            raise TypeError(f"Expected `item` to be a pair (index, seed), got {item!r}")
        index, seed = item
        with torch.random.fork_rng(devices=[]):
            # Not torch.manual_seed, which seeds the GPUs as well.
            torch.default_generator.manual_seed(seed)
            return self.dataset[index]

    def __len__(self) -> int:
        return len(self.dataset)  # type: ignore[arg-type]


def full_batches(kinds: np.ndarray, batch_size: int) -> np.ndarray:
    """Return places [K, batch_size] in a list of items; the items of a batch are of one kind.

    The k-th batch is the k-th to become full when the list is dealt from its beginning.
    """
    batches = []
    for kind in np.unique(kinds):
        places = np.flatnonzero(kinds == kind)
        number = len(places) // batch_size
        batches.append(places[: number * batch_size].reshape(number, batch_size))
    together = np.concatenate(batches)
    return together[np.argsort(together[:, -1])]


def item_seeds(number: int, seed: int, epoch: int) -> np.ndarray:
    """Return the seeds of an epoch's places, int64 [number] in [0, 2**63)."""
    stream = np.random.PCG64(np.random.SeedSequence(seed, spawn_key=(epoch, _ITEM_SEEDS)))
    return (stream.random_raw(number) >> np.uint64(1)).astype(np.int64)


def whole_number(value: Any, name: str, *, lowest: int = 0) -> int:
    try:
        number = operator.index(value)
    except TypeError:
        raise TypeError(f"Expected `{name}` to be an integer, got {type(value).__name__}") from None
    if isinstance(value, bool):
        raise TypeError(f"Expected `{name}` to be an integer, got bool")
    if number < lowest:
        raise ValueError(f"Expected `{name}` of at least {lowest}, got {number}")
    return number


def check_shape(array: np.ndarray | Tensor, shape: tuple[int, ...], name: str) -> None:
    if tuple(array.shape) != shape:
        raise ValueError(f"Expected `{name}` of shape {list(shape)}, got {list(array.shape)}")
