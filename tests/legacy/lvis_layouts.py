"""Layouts of real size, by formula, and the tables that the original's head reads."""

from functools import cache

import torch
from torch import Tensor

from balanced_group_softmax import GroupLayout
from balanced_group_softmax.legacy.layout_files import (
    group_columns,
    original_layout,
    splits_of_layout,
)


@cache
def large_layout(num_categories: int = 1230) -> GroupLayout:
    """Groups as large as those of LVIS v0.5, with members scattered over all labels."""
    counts = [(5, 50, 500, 5000)[(7 * i * i + 3 * i) % 11 % 4] for i in range(num_categories)]
    return original_layout(counts)


def tables(layout: GroupLayout) -> tuple[Tensor, list[Tensor]]:
    """`pred_slice` and the labels of each group."""
    splits = list(splits_of_layout(layout).values())[: len(layout.groups)]
    return group_columns(layout), [torch.from_numpy(labels) for labels in splits]
