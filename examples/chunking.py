"""Work in portions, so that memory does not grow with the whole of it."""

from collections.abc import Iterator

import numpy as np


def chunks(sizes: np.ndarray, limit: int) -> Iterator[range]:
    """Yield ranges that together cover all entries, each as long as its sum stays at the limit.

    Args:
        sizes: int64 [N].
        limit: A larger entry gets a range of its own.

    Example:
        >>> list(chunks(np.array([2, 2, 9, 1, 1]), 4))
        [range(0, 2), range(2, 3), range(3, 5)]
    """
    start, total = 0, 0
    for i, size in enumerate(sizes.tolist()):
        if i > start and total + size > limit:
            yield range(start, i)
            start, total = i, 0
        total += size
    if start < len(sizes):
        yield range(start, len(sizes))
