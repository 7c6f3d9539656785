"""What the tests of operators and graphs share: layouts, inputs, and the devices there are."""

import pytest
import torch
from torch import Tensor

from balanced_group_softmax import GroupLayout

IGNORE = -100
ROWS = 13
COUNTS = (3, 2500, 40, 7, 600, 12, 0)
LAYOUTS = {
    "first": GroupLayout.from_counts(COUNTS),
    "last": GroupLayout.from_counts(COUNTS, background="last"),
    "none": GroupLayout.from_counts(COUNTS, background=None),
    "one-softmax": GroupLayout.from_counts([3], background=None),
    "one-column": GroupLayout(((0, 2), (), (1,)), ("few", "no", "many")),
}
LAYOUT = LAYOUTS["first"]
_gpu = [pytest.param("cuda", marks=pytest.mark.gpu)] if torch.cuda.is_available() else []
every_device = pytest.mark.parametrize("device", ["cpu", *_gpu])


def labels_for(layout: GroupLayout, rows: int = ROWS, device: str = "cpu") -> Tensor:
    labels = torch.arange(rows, device=device) % layout.num_labels
    labels[3::5] = IGNORE
    return labels


def logits_for(
    layout: GroupLayout, rows: int = ROWS, device: str = "cpu", dtype: torch.dtype = torch.float32
) -> Tensor:
    return torch.randn(rows, layout.num_logits, device=device).to(dtype)
