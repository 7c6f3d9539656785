"""The draw by the Triton kernel: the rows of the rule, those of the CPU path, and their number."""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from bags_oracle import IGNORE, number_of_others, rows_in_group
from kernel_cases import (
    DEVICE,
    FORTY_GROUPS,
    LAYOUTS,
    MARKS,
    draw,
    keys_for,
    labels_for,
    layout_of,
    oracle_of,
    seeded,
)
from torch import Tensor

from balanced_group_softmax import GroupLayout
from balanced_group_softmax.ops import cpu_ops

pytestmark = MARKS
Cut = Callable[..., None]
LOWEST, HIGHEST = -(2**31), 2**31 - 1  # of an int32
BLOCK = 16 if DEVICE == "cpu" else 128  # a GPU's threads shall have a key each
TWO = layout_of(1, 1)  # label 1 or 2, each of a group of its own; background is 0


def rule(
    layout: GroupLayout, labels: Tensor, keys: Tensor, ratio: float, ignore_index: int = IGNORE
) -> np.ndarray:
    """The smallest keys among the others, row by row; the lower row among equal keys."""
    expected, rows = oracle_of(layout), labels.tolist()
    mask = np.zeros((len(rows), layout.num_groups), dtype=bool)
    for group in range(layout.num_groups):
        inside, others = rows_in_group(expected, rows, group, ignore_index)
        if expected.is_binary(group):
            mask[inside + others, group] = True
            continue
        own = keys[group - expected.has_binary].tolist()
        kept = number_of_others(ratio, len(inside), len(others))
        order = sorted(others, key=lambda row: (own[row], row))
        mask[inside + order[:kept], group] = len(inside) > 0
    return mask


def check(
    layout: GroupLayout, labels: Tensor, keys: Tensor, ratio: float, ignore_index: int = IGNORE
) -> Tensor:
    active, counts = draw(labels, layout, ratio, keys, ignore_index)
    expected = rule(layout, labels, keys, ratio, ignore_index)
    np.testing.assert_array_equal(active.cpu().numpy(), expected)
    assert counts.tolist() == expected.sum(axis=0).clip(min=1).tolist()
    return active


# Two blocks, and two and a few rows, so that the last one is not full.
@pytest.mark.parametrize("rows", [0, 1, 2, 2 * BLOCK, 2 * BLOCK + 5])
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_rows_are_those_of_the_rule(layout: GroupLayout, rows: int, cut: Cut) -> None:
    cut(KEYS_PER_WARP=BLOCK, WIDEST_BLOCK=BLOCK)
    check(layout, labels_for(layout, rows), keys_for(layout, rows), ratio=1.5)


def test_forty_groups() -> None:
    check(FORTY_GROUPS, labels_for(FORTY_GROUPS, 11), keys_for(FORTY_GROUPS, 11), ratio=2.0)


@pytest.mark.parametrize("ratio", [0.0, 0.5, 1.0, 3.0, 1e300, math.inf])
@pytest.mark.parametrize("layout", [LAYOUTS["twelve"], LAYOUTS["none"]], ids=["twelve", "none"])
def test_ratios_from_none_to_all(layout: GroupLayout, ratio: float) -> None:
    check(layout, labels_for(layout, 23), keys_for(layout, 23), ratio)


@pytest.mark.parametrize("kept", [0, 1, 9, 10, 11])
def test_none_one_all_but_one_and_all_of_ten_others(kept: int) -> None:
    labels = torch.tensor([1, *[0] * 10], device=DEVICE)
    active = check(TWO, labels, keys_for(TWO, 11), ratio=float(kept))
    assert int(active[:, 1].sum()) == 1 + min(kept, 10)
    assert not active[:, 2].any(), "a group without foreground"


@pytest.mark.parametrize(("own", "ratio"), [(100, 0.29), (49, 1 / 49), (50, 1.18)])
def test_number_is_the_float64_product_truncated(own: int, ratio: float) -> None:
    """In float32 each of these products is on the other side of a whole number."""
    assert int(np.float32(ratio) * np.float32(own)) != int(ratio * own)
    labels = torch.tensor([1] * own + [0] * 90, device=DEVICE)
    active = check(TWO, labels, keys_for(TWO, own + 90), ratio)
    assert int(active[:, 1].sum()) == own + int(ratio * own)


KEYS = {
    "all-equal": lambda size: torch.zeros(size, dtype=torch.int32),
    "all-the-largest": lambda size: torch.full(size, HIGHEST, dtype=torch.int32),
    "all-the-smallest": lambda size: torch.full(size, LOWEST, dtype=torch.int32),
    "extremes": lambda size: torch.tensor([LOWEST, HIGHEST], dtype=torch.int32)[
        torch.randint(0, 2, size, generator=seeded(1))
    ],
    "around-zero": lambda size: torch.randint(-2, 3, size, dtype=torch.int32, generator=seeded(1)),
    "all-of-int32": lambda size: torch.randint(LOWEST, HIGHEST, size, generator=seeded(1)).int(),
    # Keys that differ in one of the four bytes alone, which a radix select looks at in turn.
    "first-byte": lambda size: torch.randint(-128, 128, size, generator=seeded(1)).int() << 24,
    "second-byte": lambda size: torch.randint(0, 256, size, generator=seeded(1)).int() << 16,
    "third-byte": lambda size: torch.randint(0, 256, size, generator=seeded(1)).int() << 8,
    "last-byte": lambda size: torch.randint(0, 256, size, generator=seeded(1)).int() - 256,
}


@pytest.mark.parametrize("kind", KEYS)
def test_any_keys(kind: str, cut: Cut) -> None:
    cut(KEYS_PER_WARP=BLOCK, WIDEST_BLOCK=BLOCK)
    layout, rows = layout_of(3, 2, background=None), 3 * BLOCK + 1
    labels = labels_for(layout, rows)
    check(layout, labels, KEYS[kind]((2, rows)).to(DEVICE), ratio=0.4)


@pytest.mark.parametrize("ignore_index", [-1, 0, 255, -(2**40)], ids=str)
def test_ignored_rows_are_nowhere(ignore_index: int) -> None:
    layout = LAYOUTS["twelve"]
    labels = labels_for(layout, 19)
    labels[labels == IGNORE] = ignore_index
    active = check(layout, labels, keys_for(layout, 19), 1.0, ignore_index)
    assert not active[labels == ignore_index].any()


@pytest.mark.parametrize("background", ["first", "last", None])
def test_a_bad_label_is_as_good_as_ignored(background: Any) -> None:
    layout = layout_of(2, 4, 1, background=background)
    labels = labels_for(layout, 24)
    ignored = labels.clone()
    for row, bad in enumerate((-1, layout.num_labels, 2**40, -(2**40), 2**63 - 1, -(2**63))):
        labels[4 * row], ignored[4 * row] = bad, IGNORE
    keys = keys_for(layout, 24)
    active, counts = draw(labels, layout, 1.0, keys)
    expected, expected_counts = draw(ignored, layout, 1.0, keys)
    assert torch.equal(active, expected)
    assert torch.equal(counts, expected_counts)


def test_arguments_may_be_strided_and_are_left_alone() -> None:
    layout = LAYOUTS["twelve"]
    labels, keys = labels_for(layout, 17), keys_for(layout, 17)
    wide = torch.stack([labels, torch.full_like(labels, 99)], dim=1)
    tall = keys.T.contiguous()
    active = check(layout, wide[:, 0], tall.T, ratio=1.0)
    assert torch.equal(active, check(layout, labels, keys, ratio=1.0))
    assert torch.equal(wide[:, 0], labels)
    assert torch.equal(tall.T, keys)


# A thousand random cases --------------------------------------------------------------------


def random_case(seed: int) -> tuple[GroupLayout, Tensor, Tensor, float]:
    random = np.random.default_rng(seed)
    background: Any = ("first", "last", None)[seed % 3]
    # One group that draws or two: each is a program, and they are told apart by the larger
    # layouts above.
    sizes = random.integers(0, 4, size=random.integers(1, 3))
    sizes[0] += sizes.sum() == 0
    layout = layout_of(*sizes.tolist(), background=background)
    rows = int(random.choice([random.integers(0, 16), random.integers(16, 200)], p=[0.8, 0.2]))
    labels = random.integers(0, layout.num_labels, rows)
    if layout.background_label is not None:
        labels[random.random(rows) < random.random()] = layout.background_label
    labels[random.random(rows) < 0.1] = IGNORE
    ratio = float(random.choice([0.0, 0.29, 0.57, 1.1, math.inf, random.random(), random.random()]))
    lowest, highest = [(0, HIGHEST), (LOWEST, HIGHEST), (-2, 2), (0, 0)][random.integers(0, 4)]
    keys = random.integers(lowest, highest, (len(sizes), rows), dtype=np.int32, endpoint=True)
    return layout, torch.from_numpy(labels), torch.from_numpy(keys), ratio


def test_same_rows_as_on_the_cpu_in_a_thousand_random_cases(cut: Cut) -> None:
    """In small blocks, so that many cases go through the loops over several."""
    cut(KEYS_PER_WARP=4 * BLOCK, WIDEST_BLOCK=4 * BLOCK)
    choices = over_blocks = 0
    for seed in range(1000):
        layout, labels, keys, ratio = random_case(seed)
        expected, _ = cpu_ops.sample_others(
            labels, keys, layout.tables("cpu"), others_ratio=ratio, ignore_index=IGNORE
        )
        active, counts = draw(labels.to(DEVICE), layout, ratio, keys.to(DEVICE))
        assert torch.equal(active.cpu(), expected), f"case {seed}"
        assert counts.tolist() == expected.sum(dim=0).clamp(min=1).tolist(), f"case {seed}"
        some = expected.any(dim=0) & (expected.sum(dim=0) < (labels != IGNORE).sum())
        choices += bool(some.any())
        over_blocks += bool(some.any()) and len(labels) > 4 * BLOCK
    assert choices > 400
    assert over_blocks > 70 or DEVICE != "cpu"


def test_normalizers_are_float32_counts_beyond_what_an_int8_holds() -> None:
    labels = torch.tensor([0] * 700 + [1] * 300, device=DEVICE)
    _, counts = draw(labels, TWO, ratio=1.5)
    assert counts.tolist() == [1000.0, 750.0, 1.0]
