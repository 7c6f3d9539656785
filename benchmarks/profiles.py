"""Layouts and labels to measure with: how many categories, how often each, how many rows.

The counts are made up to have the published group sizes and totals, so that nothing needs to be
downloaded; a file of real ones can take their place. Labels are drawn by instance counts, as the
proposals of a detector have them.
"""

import json
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from balanced_group_softmax import GroupLayout

THRESHOLDS = (10, 100, 1000)
OTHERS_RATIO = 8.0

PUBLISHED = {
    "lvis_v0.5": ((294, 453, 302, 181), 693_958),
    "lvis_v1": ((200, 412, 334, 257), 1_270_141),
    # As many categories as V3Det; how they spread over the groups, and the total, are made up.
    "v3det": ((4000, 6400, 2600, 204), 1_750_000),
}
"""Categories with fewer than 10, 100, 1000 and more training instances; instances in total."""


@dataclass(frozen=True)
class Profile:
    """Instance counts, the layout they give, and what loops over its groups read."""

    name: str
    counts: tuple[int, ...]
    layout: GroupLayout
    bin_labels: Tensor
    """int64 [G, num_labels]: each label's place in the group, 0 for `others`; on the CPU."""

    @property
    def num_logits(self) -> int:
        return self.layout.num_logits


def make_profile(name: str, counts: list[int]) -> Profile:
    layout = GroupLayout.from_counts(counts, thresholds=THRESHOLDS, background="first")
    return Profile(name, tuple(counts), layout, layout.bin_labels)


def named_profile(name: str) -> Profile:
    """One of `PUBLISHED`."""
    return make_profile(name, synthetic_counts(*PUBLISHED[name]))


def read_profile(path: Path) -> Profile:
    """Instance counts by ascending category id, from a JSON list of LVIS categories."""
    with path.open(encoding="utf-8") as stream:
        categories = json.load(stream)
    ordered = sorted(categories, key=lambda category: int(category["id"]))
    return make_profile(path.stem, [int(category["instance_count"]) for category in ordered])


def synthetic_counts(group_sizes: tuple[int, ...], total: int) -> list[int]:
    """Instance counts with these group sizes and this total.

    Counts fall geometrically through the lower three groups; through the highest they follow a
    power law of the rank whose exponent makes the total right.
    """
    low: list[int] = []
    for size, start, end in zip(group_sizes[:3], (1, 10, 100), THRESHOLDS, strict=True):
        low += np.geomspace(start, end - 1, size).astype(int).tolist()
    ranks = np.arange(1, group_sizes[3] + 1)
    wanted = total - sum(low)
    below, above = 0.0, 2.0
    for _ in range(60):
        exponent = (below + above) / 2
        head = np.floor(THRESHOLDS[-1] * (ranks[-1] / ranks) ** exponent)
        below, above = (exponent, above) if head.sum() < wanted else (below, exponent)
    head[0] += wanted - head.sum()
    return [*low, *(int(count) for count in head[::-1])]


def draw_labels(
    rows: int, foreground: float, profile: Profile, seed: int, *, every_group: bool = False
) -> Tensor:
    """Labels, background 0: an exact share of foreground rows, drawn by instance counts.

    Args:
        rows: R.
        foreground: share of the rows that are not background, rounded to whole rows.
        profile: whose categories.
        seed: of the draw.
        every_group: let the first foreground rows be one category of each group, without which a
            group that no row belongs to has no live row whatever the ratio of others.
    """
    draw = np.random.default_rng(seed)
    shares = np.asarray(profile.counts, dtype=np.float64)
    number = round(rows * foreground)
    drawn = 1 + draw.choice(len(shares), number, p=shares / shares.sum())
    if every_group:
        one_of_each = (profile.bin_labels[1:] > 0).int().argmax(dim=1).numpy()
        if number < len(one_of_each):
            raise ValueError(
                f"Expected a foreground row for each of {len(one_of_each)} groups, got {number}: "
                f"ask for more rows or foreground"
            )
        drawn[: len(one_of_each)] = one_of_each
    labels = np.zeros(rows, dtype=np.int64)
    labels[:number] = drawn
    return torch.from_numpy(draw.permutation(labels))


def live_fraction(labels: Tensor, profile: Profile, ratio: float) -> float:
    """Share of the logits matrix in (row, group) pairs that count in the loss."""
    live, rows = 0, len(labels)
    for group, size in enumerate(profile.layout.group_sizes):
        found = int((profile.bin_labels[group][labels] > 0).sum())
        if group == 0 or (found and math.isinf(ratio)):
            live += rows * size
        elif found:
            live += min(found + int(ratio * found), rows) * size
    return live / (rows * profile.num_logits)
