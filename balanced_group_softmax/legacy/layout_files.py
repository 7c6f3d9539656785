"""The original's three files of a layout, as tensors and arrays, and back to a `GroupLayout`.

Labels of the original have background first: label 0 is background, label c is category c, and in
LVIS that is the category's id.
"""

import re
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor

from balanced_group_softmax._arguments import as_int_array, shown
from balanced_group_softmax.layout import GroupLayout

__all__ = [
    "group_columns",
    "layout_of_bin_labels",
    "original_layout",
    "range_keys",
    "splits_of_layout",
]

_RANGE = re.compile(r"[(\[](\d+), (\d+|~)\)")


def original_layout(
    counts: Sequence[int] | np.ndarray | Tensor, thresholds: Sequence[int] = (10, 100, 1000)
) -> GroupLayout:
    """Return the layout of the original, which keeps groups without categories.

    Args:
        counts: training instances of each category, C integers.
        thresholds: boundaries between groups, in instances.

    Raises:
        TypeError: counts or thresholds are not integers.
        ValueError: as for `GroupLayout.from_counts`.

    Example:
        >>> original_layout([3, 5000]).group_sizes
        (2, 2, 1, 1, 2)
    """
    layout = GroupLayout.from_counts(counts, thresholds)  # which checks the arguments
    edges = ["0", *map(str, thresholds), "inf"]
    members = dict(zip(layout.names, layout.groups, strict=True))
    names = tuple(f"{low}_{high}" for low, high in pairwise(edges))
    groups = tuple(members.get(name, ()) for name in names)
    ids = tuple(range(1, layout.num_categories + 1))
    return GroupLayout(groups, names, "first", ids)


def layout_of_bin_labels(
    bin_labels: Any,
    columns: Any = None,
    splits: Mapping[Any, Any] | None = None,
    *,
    where: str = "label2binlabel",
) -> GroupLayout:
    """Return the layout that the original's tables stand for.

    Args:
        bin_labels: int64 [G, C + 1], the label within each group of each label.
        columns: int64 [G, 2], the first logit column and the number of columns of each group, if
            known; checked.
        splits: for each count range, such as `"[10, 100)"`, the labels of its categories, if
            known; gives the groups their names, and is checked.
        where: what the tables came from, for messages.

    Raises:
        ValueError: the tables are of the wrong type or shape, stand for no layout, or for
            different ones.
    """
    table = _int_table(bin_labels, f"{where}: label2binlabel")
    num_groups, num_labels = table.shape
    if num_groups < 2 or num_labels < 2:
        raise ValueError(
            f"{where}: expected label2binlabel of shape [G >= 2, C + 1 >= 2], got "
            f"{list(table.shape)}"
        )
    if table[0, 0] != 0 or (table[0, 1:] != 1).any():
        raise ValueError(
            f"{where}: expected row 0 of label2binlabel to be 0 for background and 1 for every "
            f"category, got {shown(table[0].tolist())}"
        )
    if table[1:, 0].any():
        raise ValueError(f"{where}: expected background in `others` of every group of categories")
    members = table[1:, 1:] > 0
    homes = members.sum(0)
    if (homes != 1).any():
        at = int(np.argmax(homes != 1))
        raise ValueError(
            f"{where}: expected each label in one group of label2binlabel, got label {at + 1} in "
            f"{homes[at]}"
        )
    groups = []
    for index, row in enumerate(members, start=1):
        group = np.flatnonzero(row)
        if not np.array_equal(table[index, 1 + group], np.arange(1, group.size + 1)):
            raise ValueError(
                f"{where}: expected row {index} of label2binlabel to count its categories from 1 "
                f"in ascending order, got {shown(table[index, 1 + group].tolist())}"
            )
        groups.append(tuple(group.tolist()))
    names = [f"bin{index}" for index in range(1, num_groups)]
    if splits is not None:
        names = _names_of_splits(splits, groups, where)
    ids = tuple(range(1, num_labels))
    layout = GroupLayout(tuple(groups), tuple(names), "first", ids)
    if columns is not None:
        found = _int_table(columns, f"{where}: pred_slice")
        expected = group_columns(layout).numpy()
        if not np.array_equal(found, expected):
            raise ValueError(
                f"{where}: expected pred_slice {shown(expected.tolist())} as label2binlabel has "
                f"it, got {shown(found.tolist())}"
            )
    return layout


def group_columns(layout: GroupLayout) -> Tensor:
    """Return the original's `pred_slice`: int64 [G, 2], first column and number of columns."""
    return torch.tensor([layout.group_starts, layout.group_sizes], dtype=torch.int64).T.contiguous()


def range_keys(layout: GroupLayout) -> list[str]:
    """Return the original's names of the groups' count ranges.

    Example:
        >>> range_keys(original_layout([3, 5000]))
        ['(0, 10)', '[10, 100)', '[100, 1000)', '[1000, ~)']
    """
    keys = []
    for name in layout.names:
        low, _, high = name.partition("_")
        if not low.isdigit() or not (high.isdigit() or high == "inf"):
            raise ValueError(f"Expected groups named by count ranges such as '10_100', got {name}")
        keys.append(f"{'(' if low == '0' else '['}{low}, {'~' if high == 'inf' else high})")
    return keys


def splits_of_layout(layout: GroupLayout) -> dict[str, np.ndarray]:
    """Return the content of the original's `valsplit.pkl`: labels of each count range, and sums."""
    labels = [np.array(group, dtype=np.int64) + 1 for group in layout.groups]
    return {
        **dict(zip(range_keys(layout), labels, strict=True)),
        "normal": np.arange(1, layout.num_categories + 1),
        "background": np.zeros(1, dtype=np.int64),
        "all": np.arange(layout.num_categories + 1),
    }


def _int_table(value: Any, name: str) -> np.ndarray:
    if isinstance(value, Tensor):
        if value.layout != torch.strided or value.dtype.is_floating_point or value.is_complex():
            raise ValueError(f"{name}: expected integers, got {value.dtype}")
        value = value.numpy()
    if not isinstance(value, np.ndarray) or not np.issubdtype(value.dtype, np.integer):
        got = value.dtype if isinstance(value, np.ndarray) else type(value).__name__
        raise ValueError(f"{name}: expected a table of integers, got {got}")
    if value.ndim != 2:
        raise ValueError(f"{name}: expected two dimensions, got shape {list(value.shape)}")
    return value.astype(np.int64)


def _names_of_splits(
    splits: Mapping[Any, Any], groups: list[tuple[int, ...]], where: str
) -> list[str]:
    ranges: dict[str, tuple[int, ...]] = {}
    for key, labels in splits.items():
        match = _RANGE.fullmatch(key) if isinstance(key, str) else None
        if match is not None:
            try:
                members = as_int_array(labels, f"valsplit[{key!r}]") - 1
            except (TypeError, ValueError) as error:
                raise ValueError(f"{where}: {error}") from None
            ranges[match[1] + "_" + match[2].replace("~", "inf")] = tuple(sorted(members.tolist()))
    if list(ranges.values()) != groups:
        raise ValueError(
            f"{where}: expected valsplit to have the labels of the {len(groups)} groups of "
            f"label2binlabel in its count ranges, in the same order, got {shown(list(ranges))} "
            f"with {[len(members) for members in ranges.values()]} labels, and "
            f"{[len(group) for group in groups]} in label2binlabel"
        )
    return list(ranges)
