"""Balanced group softmax written a second time, row by row, in float64 NumPy.

Nothing here imports the library: tests compare the library with this. Slow on purpose; each
function is one paragraph of the method, and the gradient is derived by hand:
d loss_g / d z[r, j] = w[r, g] / S_g * (softmax(z[r, group g])[j] - [j is the row's bin label]).

The hypothesis strategies at the end draw the layouts and labels that the tests share.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from hypothesis import strategies as st
from numpy.typing import NDArray

Array = NDArray[np.float64]
IGNORE = -100


@dataclass(frozen=True)
class OracleLayout:
    """Groups of 0-based categories, lowest counts first; group 0 is apart, see `has_binary`."""

    members: tuple[tuple[int, ...], ...]
    member_names: tuple[str, ...]
    num_categories: int
    background: str | None

    @property
    def has_binary(self) -> bool:
        """Whether group 0 is background against foreground."""
        return self.background is not None

    @property
    def num_groups(self) -> int:
        return len(self.members) + self.has_binary

    @property
    def sizes(self) -> tuple[int, ...]:
        binary = (2,) if self.has_binary else ()
        return binary + tuple(1 + len(group) for group in self.members)

    @property
    def starts(self) -> tuple[int, ...]:
        return tuple(sum(self.sizes[:group]) for group in range(self.num_groups))

    @property
    def names(self) -> tuple[str, ...]:
        return (("bg_fg",) if self.has_binary else ()) + self.member_names

    @property
    def num_logits(self) -> int:
        return sum(self.sizes)

    @property
    def num_labels(self) -> int:
        return self.num_categories + self.has_binary

    @property
    def background_label(self) -> int | None:
        return {"first": 0, "last": self.num_categories, None: None}[self.background]

    def label_of(self, category: int) -> int:
        return category + 1 if self.background == "first" else category

    def category_of(self, label: int) -> int | None:
        """0-based category of a label; None for background."""
        if label == self.background_label:
            return None
        return label - 1 if self.background == "first" else label

    def members_of(self, group: int) -> tuple[int, ...]:
        return self.members[group - self.has_binary]

    def is_binary(self, group: int) -> bool:
        return self.has_binary and group == 0

    def bin_label(self, group: int, label: int) -> int:
        """Place of a label among the columns of a group."""
        category = self.category_of(label)
        if self.is_binary(group):
            return 0 if category is None else 1
        members = self.members_of(group)
        return 1 + members.index(category) if category in members else 0

    def columns(self, group: int) -> slice:
        return slice(self.starts[group], self.starts[group] + self.sizes[group])


def oracle_layout(
    counts: Sequence[int],
    thresholds: Sequence[int] = (10, 100, 1000),
    background: str | None = "first",
) -> OracleLayout:
    """Groups of categories by instance count, groups without categories left out."""
    edges = [0, *thresholds, math.inf]
    members, names = [], []
    for low, high in pairwise(edges):
        inside = tuple(c for c, count in enumerate(counts) if low <= count < high)
        if inside:
            members.append(inside)
            names.append(f"{low}_{'inf' if high == math.inf else high}")
    return OracleLayout(tuple(members), tuple(names), len(counts), background)


def rows_in_group(
    layout: OracleLayout, labels: Sequence[int], group: int, ignore_index: int = IGNORE
) -> tuple[list[int], list[int]]:
    """Rows whose category is in the group, and the other rows; ignored rows are in neither."""
    inside, others = [], []
    for row, label in enumerate(labels):
        if label != ignore_index:
            (inside if layout.bin_label(group, label) > 0 else others).append(row)
    return inside, others


def number_of_others(ratio: float, n_inside: int, n_others: int) -> int:
    """How many of the other rows count: the truncated float64 product, at most all of them."""
    if n_inside == 0:
        return 0
    product = float(ratio) * n_inside
    return n_others if product >= n_others else int(product)


def check_rows_that_count(
    layout: OracleLayout,
    labels: Sequence[int],
    ratio: float,
    mask: NDArray[np.bool_],
    ignore_index: int = IGNORE,
) -> None:
    """Asserts that a mask [R, G] is one that the method may draw."""
    assert mask.shape == (len(labels), layout.num_groups)
    for group in range(layout.num_groups):
        counted = set(np.flatnonzero(mask[:, group]).tolist())
        inside, others = rows_in_group(layout, labels, group, ignore_index)
        if layout.is_binary(group):
            assert counted == {*inside, *others}, "group 0 counts every row that is not ignored"
            continue
        if not inside:
            assert not counted, f"group {group} has no foreground row, so no row may count"
            continue
        assert counted >= set(inside), f"group {group} misses a foreground row"
        drawn = counted - set(inside)
        assert drawn <= set(others), f"group {group} counts an ignored row"
        assert len(drawn) == number_of_others(ratio, len(inside), len(others))


def weights_of(
    layout: OracleLayout,
    labels: Sequence[int],
    mask: NDArray[np.bool_] | Array,
    category_weights: Array | None = None,
    ignore_index: int = IGNORE,
) -> Array:
    """Weights [R, G] from the rows that count (or given weights) and category weights."""
    weights = np.zeros((len(labels), layout.num_groups))
    for row, label in enumerate(labels):
        if label == ignore_index:
            continue
        for group in range(layout.num_groups):
            weight = float(mask[row, group])
            category = layout.category_of(label)
            foreign = layout.is_binary(group) or layout.bin_label(group, label) == 0
            if category_weights is not None and category is not None and not foreign:
                weight *= float(category_weights[category])
            weights[row, group] = weight
    return weights


def normalizers(weights: Array) -> Array:
    """S [G]."""
    return np.asarray([max(weights[:, g].sum(), 1.0) for g in range(weights.shape[1])])


def log_softmax(logits: Array) -> Array:
    """Of one row of one group; -inf logits have probability 0."""
    with np.errstate(all="ignore"):
        shifted = logits - logits.max()
        return shifted - np.log(np.exp(shifted).sum())


def group_losses(
    layout: OracleLayout, logits: Array, labels: Sequence[int], weights: Array
) -> Array:
    """Loss of each group [G]; rows of weight 0 are never read."""
    losses = np.zeros(layout.num_groups)
    scale = normalizers(weights)
    for row, label in enumerate(labels):
        for group in range(layout.num_groups):
            if weights[row, group] > 0:
                logs = log_softmax(logits[row, layout.columns(group)].astype(np.float64))
                cross_entropy = -logs[layout.bin_label(group, label)]
                losses[group] += weights[row, group] * cross_entropy / scale[group]
    return losses


def gradient(
    layout: OracleLayout,
    logits: Array,
    labels: Sequence[int],
    weights: Array,
    upstream: Array | None = None,
) -> Array:
    """Gradient [R, L] of sum_g upstream[g] * loss_g."""
    result = np.zeros(logits.shape)
    scale = normalizers(weights)
    factor = np.ones(layout.num_groups) if upstream is None else upstream
    for row, label in enumerate(labels):
        for group in range(layout.num_groups):
            if weights[row, group] > 0:
                columns = layout.columns(group)
                step = np.exp(log_softmax(logits[row, columns].astype(np.float64)))
                step[layout.bin_label(group, label)] -= 1
                result[row, columns] = factor[group] * weights[row, group] / scale[group] * step
    return result


def scores(layout: OracleLayout, logits: Array) -> Array:
    """Scores [R, num_labels], columns in the label convention."""
    result = np.zeros((len(logits), layout.num_labels))
    for row in range(len(logits)):
        if layout.has_binary:
            background, foreground = np.exp(log_softmax(logits[row, :2].astype(np.float64)))
            result[row, layout.background_label] = background
        joint = np.zeros(layout.num_categories)
        for group in range(int(layout.has_binary), layout.num_groups):
            own = logits[row, layout.columns(group)].astype(np.float64)
            chances = np.exp(log_softmax(own))
            for place, category in enumerate(layout.members_of(group), start=1):
                if layout.has_binary:
                    result[row, layout.label_of(category)] = chances[place] * foreground
                else:
                    joint[category] = log_softmax(own)[place]
        if not layout.has_binary:
            result[row] = _joint_scores(layout, logits[row].astype(np.float64), joint)
    return result


def _joint_scores(layout: OracleLayout, logits: Array, own: Array) -> Array:
    """p_g(c) times p_h(others) of every other group h, normalised over categories.

    Kept as the product of its definition, not in the short form that follows from it.
    """
    others = [log_softmax(logits[layout.columns(g)])[0] for g in range(layout.num_groups)]
    for group in range(layout.num_groups):
        for category in layout.members_of(group):
            own[category] += sum(others) - others[group]
    return np.exp(log_softmax(own))


# Strategies ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Recipe:
    """Arguments from which the library and the oracle make the same layout."""

    counts: tuple[int, ...]
    thresholds: tuple[int, ...]
    background: str | None

    @property
    def oracle(self) -> OracleLayout:
        return oracle_layout(self.counts, self.thresholds, self.background)


def recipes(max_categories: int = 12) -> st.SearchStrategy[Recipe]:
    """Layouts with empty groups, single categories and counts on the very thresholds."""
    thresholds = st.lists(st.sampled_from([1, 2, 5, 10, 100, 1000]), min_size=1, max_size=4)
    count = st.sampled_from([0, 1, 2, 4, 5, 9, 10, 11, 99, 100, 999, 1000, 10**6])
    return st.builds(
        Recipe,
        counts=st.lists(count, min_size=1, max_size=max_categories).map(tuple),
        thresholds=thresholds.map(lambda edges: tuple(sorted(set(edges)))),
        background=st.sampled_from(["first", "last", None]),
    )


def ratios() -> st.SearchStrategy[float]:
    """Ratios at which truncation, all rows and no rows are all likely."""
    return st.one_of(
        st.sampled_from([0.0, 0.29, 0.5, 1.0, 1.1, 2.5, 8.0, 1e300, math.inf]),
        st.floats(0, 20, allow_nan=False),
    )


@st.composite
def labelled(
    draw: st.DrawFn, recipe: Recipe, max_rows: int = 14, ignore_index: int = IGNORE
) -> list[int]:
    """Labels of any row: background, every category, ignored."""
    kinds = [st.integers(0, recipe.oracle.num_labels - 1), st.just(ignore_index)]
    if recipe.oracle.background_label is not None:
        kinds.append(st.just(recipe.oracle.background_label))
    return draw(st.lists(st.one_of(kinds), max_size=max_rows))
