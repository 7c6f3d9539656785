"""For `--method bags_discriminant`: what a pass over the data tells of its categories."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import distributed
from feature_cache import FeatureCache
from recipe import Recipe
from torch import Tensor

from balanced_group_softmax import BAGSHead, GroupLayout
from balanced_group_softmax.discriminant import (
    DiscriminantHead,
    FeatureStatistics,
    add_discriminant,
)

BELOW = 100
"""Groups of categories with fewer training instances start with it."""


def start_with_discriminant(
    head: BAGSHead, counts: tuple[int, ...], recipe: Recipe, rows: Iterable[tuple[Tensor, Tensor]]
) -> None:
    """Give a head, in place, the discriminant of the features: as its start, and to keep if it can.

    Args:
        head: As it starts from the softmax classifier.
        counts: Training instances of each category.
        recipe: Of stage two.
        rows: Features [m, F] and labels [m] of this process, batch by batch.
    """
    statistics = FeatureStatistics(head.layout, head.in_features, device=head.fc.weight.device)
    for features, labels in rows:
        statistics.update(features, labels)
    statistics.all_reduce()
    strength = strengths(head.layout, counts, recipe.discriminant)
    if isinstance(head, DiscriminantHead):
        head.fit(statistics, strength=strength)
    else:
        add_discriminant(head, statistics, strength=strength)


def strengths(layout: GroupLayout, counts: tuple[int, ...], strength: float) -> list[float]:
    """Return the strength in each group: rare ones have the given, others none."""
    return [
        strength if max((counts[i] for i in group), default=0) < BELOW else 0.0
        for group in layout.groups
    ]


def stored_rows(cache: FeatureCache) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield this process's part of the first pass of a cache."""
    images: Any = range(cache.contents.images)[distributed.rank() :: distributed.world_size()]
    for image in images:
        yield cache.get(0, image)
