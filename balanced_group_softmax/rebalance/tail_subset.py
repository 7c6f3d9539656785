"""Which images, and which of their boxes, the tail is fine-tuned on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from balanced_group_softmax._arguments import as_int, as_int_array
from balanced_group_softmax.layout import Background
from balanced_group_softmax.rebalance._shared import as_label_rows, check_background, check_counts

__all__ = ["TailSubset", "tail_categories", "tail_subset"]


class TailSubset(NamedTuple):
    """Images with a category of the tail, and which of their labels are of one."""

    images: Tensor
    """int64 [M], ascending: places in the list of labels."""
    keep: list[Tensor]
    """For each of these images bool [n]: which of its labels belong to the tail."""


def tail_categories(counts: Sequence[int] | np.ndarray | Tensor, *, below: int = 100) -> Tensor:
    """Return the categories with fewer than `below` training instances.

    Args:
        counts: training instances of each category, C integers.
        below: the least count that is not of the tail; 100 in the original.

    Returns:
        int64 [T], ascending, in 0..C-1 whatever the label convention is.

    Raises:
        TypeError: if the counts or `below` are not integers.
        ValueError: if a count is negative or `below` is below 1.

    Example:
        >>> tail_categories([3, 100, 99])
        tensor([0, 2])
    """
    array = as_int_array(counts, "counts")
    check_counts(array, len(array))
    return torch.from_numpy(np.flatnonzero(array < as_int(below, "below", lowest=1)))


def tail_subset(
    labels: Sequence[Sequence[int] | np.ndarray | Tensor],
    counts: Sequence[int] | np.ndarray | Tensor,
    *,
    below: int = 100,
    background: Background = "first",
) -> TailSubset:
    """Return the images to fine-tune the tail on, and the boxes to keep in them.

    The original keeps the images with at least one box of a category below the count, and of
    their boxes only those; what else is in such an image becomes background. `keep` says which;
    training on all boxes of `images` is the milder variant. (It fine-tunes everything for 10
    epochs at a hundredth of the learning rate, 1e-4.)

    Args:
        labels: for each of N images the labels in it: integers in any of the usual ways.
        counts: training instances of each category, C integers.
        below: the least count that is not of the tail.
        background: the label convention: "first" (categories are labels 1..C), "last" or None
            (0..C-1).

    Returns:
        The images, ascending, and for each a mask over its labels.

    Raises:
        TypeError: if labels or counts are not integers.
        ValueError: if a label is not that of a category, a count is negative, `below` is below 1,
            or the convention is unknown.

    Source: Li et al., CVPR 2020, section 5 ("finetune tail") and its released code.

    Example:
        >>> found = tail_subset([[1, 2, 1], [2], [], [3]], [5, 400, 50])
        >>> found.images.tolist(), [mask.tolist() for mask in found.keep]
        ([0, 3], [[True, False, True], [True]])
    """
    background = check_background(background)
    tail = tail_categories(counts, below=below).numpy()
    array = as_int_array(counts, "counts")
    is_tail = np.zeros(len(array), dtype=bool)
    is_tail[tail] = True
    first = int(background == "first")
    masks = [is_tail[row - first] for row in as_label_rows(labels, len(array), first)]
    images = [image for image, mask in enumerate(masks) if mask.any()]
    return TailSubset(
        images=torch.tensor(images, dtype=torch.int64),
        keep=[torch.from_numpy(masks[image]) for image in images],
    )
