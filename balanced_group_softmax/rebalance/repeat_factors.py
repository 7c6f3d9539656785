"""Repeat-factor sampling (RFS): images with rare categories come more often in an epoch.

From the counts to a sampler:

    annotations = read_annotations("train.json")
    r_c = category_repeat_factors(image_counts(annotations), len(annotations["images"]))
    r_i = image_repeat_factors(labels_of_images, r_c)
    sampler = RepeatFactorSampler(r_i, seed=0)

Everything random depends on a seed and the epoch alone; no global random state is read or changed.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Sampler

from balanced_group_softmax._arguments import as_float, as_int, as_int_array, shown

__all__ = [
    "RepeatFactorSampler",
    "category_repeat_factors",
    "image_repeat_factors",
    "repeat_indices",
]

_BACKGROUNDS = ("first", "last", None)
_FACTOR_LIMIT = 2**31


def category_repeat_factors(
    image_counts: Sequence[int] | np.ndarray | Tensor, num_images: int, *, threshold: float = 1e-3
) -> Tensor:
    r"""Return how often images with a category should come in an epoch.

    .. math:: r_c = \max(1, \sqrt{t / f_c}), \qquad f_c = n_c / N

    where :math:`n_c` of :math:`N` images hold the category. A category in no image has factor 1.

    Args:
        image_counts: images that hold each category, C integers (a list, an array or a tensor),
            e.g. from :func:`balanced_group_softmax.counts.image_counts`.
        num_images: all images that are trained on, N. Those without any category count, if they
            are in the data set.
        threshold: t, the fraction of images below which a category is repeated.

    Returns:
        float64 [C], each at least 1.

    Raises:
        TypeError: if the counts are not integers, or the threshold is not a number.
        ValueError: if a count is not in [0, N], N is below 1, or t is not in [0, 1].

    Source: Gupta, Dollar and Girshick, *LVIS*, CVPR 2019, appendix B.2; t = 1e-3 as there and in
    Li et al., CVPR 2020.

    Example:
        >>> category_repeat_factors([1, 4, 100, 0], num_images=16_000)
        tensor([4., 2., 1., 1.], dtype=torch.float64)
    """
    counts = as_int_array(image_counts, "image_counts")
    num_images = as_int(num_images, "num_images", lowest=1)
    threshold = as_float(threshold, "threshold", lowest=0, highest=1)
    _check_range(counts, 0, num_images, "image_counts")
    # A factor of 1 for count 0 follows from a fraction of 1, since t is at most 1.
    fractions = np.where(counts == 0, num_images, counts) / num_images
    return torch.from_numpy(np.maximum(1.0, np.sqrt(threshold / fractions)))


def image_repeat_factors(
    labels: Sequence[Sequence[int] | np.ndarray | Tensor],
    category_factors: Sequence[float] | np.ndarray | Tensor,
    *,
    background: Literal["first", "last"] | None = "first",
) -> Tensor:
    r"""Return how often each image should come in an epoch.

    .. math:: r_i = \max_{c \in i} r_c

    and 1 for an image without categories.

    Args:
        labels: for each of N images the labels in it: integers in any of the usual ways, in any
            order, repeated or not.
        category_factors: float [C], from :func:`category_repeat_factors`.
        background: the label convention, as in :class:`~balanced_group_softmax.GroupLayout`:
            "first" (categories are labels 1..C), "last" or None (0..C-1).

    Returns:
        float64 [N], each at least 1.

    Raises:
        TypeError: if the labels are not integers.
        ValueError: if a label is not that of a category, a factor is below 1 or not finite, or the
            convention is unknown.

    Source: Gupta, Dollar and Girshick, *LVIS*, CVPR 2019, appendix B.2.

    Example:
        >>> image_repeat_factors([[1, 2, 2], [], [3]], [4.0, 2.0, 1.0])
        tensor([4., 1., 1.], dtype=torch.float64)
    """
    if background not in _BACKGROUNDS:
        raise ValueError(f"Expected `background` to be one of {_BACKGROUNDS}, got {background!r}")
    if isinstance(labels, (str, bytes, Mapping)) or not hasattr(labels, "__len__"):
        raise TypeError(f"Expected `labels` to be a sequence, got {shown(labels)}")
    factors = _as_factors(category_factors, "category_factors")
    rows = [as_int_array(row, f"labels[{i}]") for i, row in enumerate(labels)]
    lengths = np.array([len(row) for row in rows], dtype=np.int64)
    image_of = np.repeat(np.arange(len(rows)), lengths)
    values = np.concatenate([np.zeros(0, np.int64), *rows])
    first = 1 if background == "first" else 0
    bad = (values < first) | (values >= first + len(factors))
    if bad.any():
        at = int(bad.argmax())
        raise ValueError(
            f"Expected `labels` in [{first}, {first + len(factors) - 1}], "
            f"got {values[at]} in image {image_of[at]}"
        )
    result = np.ones(len(rows))
    np.maximum.at(result, image_of, factors[values - first])
    return torch.from_numpy(result)


def repeat_indices(
    factors: Sequence[float] | np.ndarray | Tensor, *, seed: int, epoch: int
) -> Tensor:
    r"""Return the images of one epoch, shuffled.

    Image :math:`i` comes :math:`\lfloor r_i \rfloor + b_i` times, with
    :math:`b_i \sim \mathrm{Bernoulli}(r_i - \lfloor r_i \rfloor)` drawn independently, so that it
    comes :math:`r_i` times on average. All orders are equally likely. The number of indices
    differs from epoch to epoch unless all factors are integers.

    Args:
        factors: float [N], each at least 1, e.g. from :func:`image_repeat_factors`.
        seed: an integer >= 0.
        epoch: an integer >= 0. The same seed and epoch give the same indices everywhere.

    Returns:
        int64 [M] in [0, N), with M >= N.

    Raises:
        TypeError: if seed or epoch are not integers.
        ValueError: if they are negative, or a factor is below 1 or not finite.

    Source: Gupta, Dollar and Girshick, *LVIS*, CVPR 2019, appendix B.2; the stochastic rounding
    is that of detectron2's `RepeatFactorTrainingSampler`.

    Example:
        >>> indices = repeat_indices([1.0, 2.0, 1.5], seed=0, epoch=0)
        >>> indices.bincount().tolist() in ([1, 2, 1], [1, 2, 2])
        True
    """
    array = _as_factors(factors, "factors")
    seed = as_int(seed, "seed", lowest=0)
    epoch = as_int(epoch, "epoch", lowest=0)
    rng = np.random.Generator(np.random.PCG64(np.random.SeedSequence(seed, spawn_key=(epoch,))))
    whole = np.floor(array)
    repeats = whole.astype(np.int64) + (rng.random(len(array)) < array - whole)
    indices = np.repeat(np.arange(len(array)), repeats)
    # Sorting by random keys needs nothing of NumPy but its plain stream of numbers, so an epoch
    # does not change with the way in which a version of it happens to shuffle.
    return torch.from_numpy(indices[np.argsort(rng.random(len(indices)), kind="stable")])


class RepeatFactorSampler(Sampler[int]):
    """A sampler of the images of :func:`repeat_indices`, for one or several processes.

    Process `rank` takes every `num_replicas`-th image of the epoch's list, from the `rank`-th on.
    The lists of all processes are **cut** to the same length, so that up to `num_replicas - 1`
    images at the end of an epoch's list are left out (others each time) and no image comes more
    often than was drawn.

    The length of an epoch is drawn too. `len` is that of the current epoch, and known before
    iteration; :meth:`set_epoch` changes it. Call that before each epoch, as for torch's
    `DistributedSampler`; without, every epoch is the same.

    Args:
        factors: float [N], each at least 1, e.g. from :func:`image_repeat_factors`.
        seed: an integer >= 0, the same in every process.
        num_replicas: number of processes that train together.
        rank: which of them this is. Nothing is asked of `torch.distributed`.

    Raises:
        TypeError: if seed, `num_replicas` or rank are not integers.
        ValueError: if a factor is below 1 or not finite, there are fewer images than processes,
            the rank is not in [0, num_replicas), or the seed is negative.

    Example:
        >>> sampler = RepeatFactorSampler([1.0, 2.0, 1.5], seed=0)
        >>> for epoch in range(2):
        ...     sampler.set_epoch(epoch)
        ...     assert len(list(sampler)) == len(sampler)
    """

    def __init__(
        self,
        factors: Sequence[float] | np.ndarray | Tensor,
        *,
        seed: int = 0,
        num_replicas: int = 1,
        rank: int = 0,
    ) -> None:
        self._factors = _as_factors(factors, "factors")
        self.seed = as_int(seed, "seed", lowest=0)
        self.num_replicas = as_int(num_replicas, "num_replicas", lowest=1)
        self.rank = as_int(rank, "rank")
        if not 0 <= self.rank < self.num_replicas:
            raise ValueError(f"Expected `rank` in [0, {self.num_replicas}), got {self.rank}")
        if len(self._factors) < self.num_replicas:
            raise ValueError(
                f"Expected `factors` of at least {self.num_replicas} images, one for each process, "
                f"got {len(self._factors)}"
            )
        self.set_epoch(0)

    def set_epoch(self, epoch: int) -> None:
        """Draw the list of an epoch. An iterator that has been made already keeps its own.

        Raises:
            TypeError: if the epoch is not an integer.
            ValueError: if it is negative.
        """
        indices = repeat_indices(self._factors, seed=self.seed, epoch=epoch)
        length = len(indices) // self.num_replicas
        self._indices = indices[self.rank :: self.num_replicas][:length].clone()
        self.epoch = int(epoch)

    def __iter__(self) -> Iterator[int]:
        return iter(self._indices.tolist())

    def __len__(self) -> int:
        return len(self._indices)


def _as_factors(values: Any, name: str) -> np.ndarray:
    """Repeat factors given in any of the usual ways, as a fresh float64 array."""
    expected = f"Expected `{name}` to be a sequence of numbers, got {shown(values)}"
    if isinstance(values, (str, bytes, Mapping)) or not hasattr(values, "__len__"):
        raise TypeError(expected)
    if isinstance(values, Tensor):
        if values.is_meta:
            raise ValueError(f"Expected `{name}` with values, got a tensor on the meta device")
        values = values.detach().cpu()
        if values.dtype.is_floating_point:  # NumPy does not know all of these types
            values = values.double()
    try:
        array = np.asarray(values)
    except ValueError:  # ragged
        raise TypeError(expected) from None
    if array.ndim != 1:
        raise ValueError(f"Expected `{name}` to be one-dimensional, got shape {list(array.shape)}")
    if array.dtype.kind not in "iuf":
        raise TypeError(expected)
    array = array.astype(np.float64)
    bad = ~((array >= 1) & (array < _FACTOR_LIMIT))  # a NaN is bad as well
    if bad.any():
        at = int(bad.argmax())
        raise ValueError(
            f"Expected `{name}` in [1, {_FACTOR_LIMIT}), got {array[at]} at position {at}"
        )
    return array


def _check_range(values: np.ndarray, lowest: int, highest: int, name: str) -> None:
    bad = (values < lowest) | (values > highest)
    if bad.any():
        at = int(bad.argmax())
        raise ValueError(
            f"Expected `{name}` in [{lowest}, {highest}], got {values[at]} at position {at}"
        )
