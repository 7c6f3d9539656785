"""What the tests of the Triton kernels share: layouts, launches, and the oracle's verdict.

The kernels run natively where there is a GPU, and in Triton's interpreter elsewhere.
"""

import math
from collections.abc import Callable
from itertools import accumulate, count
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from bags_oracle import (
    IGNORE,
    OracleLayout,
    gradient,
    group_losses,
    normalizers,
    weights_of,
)
from torch import Tensor

from balanced_group_softmax import GroupLayout
from balanced_group_softmax.ops import eager

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
for _reason in eager.why_not_triton(torch.device(DEVICE)):
    pytest.skip(_reason, allow_module_level=True)
interpreting = pytest.importorskip("interpreting")
if eager._is_interpreting():
    interpreting.make_fit()
_reason = interpreting.why_not(DEVICE)
if _reason:
    pytest.skip(_reason, allow_module_level=True)
triton_ops: ModuleType = pytest.importorskip("balanced_group_softmax.ops.triton_ops")

MARKS = [
    pytest.mark.usefixtures("watched_memory"),
    # The interpreter computes with NumPy, which speaks up at an infinity less an infinity.
    pytest.mark.filterwarnings("ignore::RuntimeWarning:triton"),
    *([pytest.mark.gpu] if DEVICE == "cuda" else []),
]
TOLERANCE = {torch.float32: 1e-6, torch.float64: 1e-12}
"""Error of a loss, of max(|reference|, 1)."""
ROUNDING = {torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8 if DEVICE == "cuda" else 2.0**-7}
"""How far a rounded value is from the true one, relatively: half a unit.

A whole one for bfloat16 in the interpreter, which cuts the other half of the bits off.
"""


# Layouts ------------------------------------------------------------------------------------


def layout_of(*group_sizes: int, background: Any = "first") -> GroupLayout:
    """Groups of so many categories, which are dealt to them out of order."""
    deal = np.random.default_rng(0).permutation(sum(group_sizes)).tolist()
    ends = list(accumulate(group_sizes))
    groups = [tuple(sorted(deal[e - s : e])) for s, e in zip(group_sizes, ends, strict=True)]
    names = tuple(f"group_{index}" for index in range(len(groups)))
    return GroupLayout(tuple(groups), names, background)


LAYOUTS = {
    # The least there is: two columns in each group, and of groups one or two.
    "one-category": layout_of(1),
    "one-softmax": layout_of(1, background=None),
    # 11 columns: no row but the first is aligned, so nothing is loaded as a vector.
    "odd": layout_of(3, 1, 2),
    # 12 columns: float32 rows load as vectors of 4, in which groups start at 2, 1 and 2.
    "twelve": layout_of(2, 4, 1),
    # 16 columns: 16-bit rows load as vectors of 8, in which groups start at 2, 7 and 2.
    "sixteen": layout_of(4, 2, 5),
    # Groups without categories, as the original's files have them: one column, always `others`.
    "one-column": layout_of(3, 0, 3, 0),
    # Background is the last label and not the first: a shift in the look-up of categories.
    "last": layout_of(2, 4, 1, background="last"),
    # No group 0, so the first group draws too.
    "none": layout_of(3, 4, 2, background=None),
}
FORTY_GROUPS = layout_of(*[1, 2, 0, 3] * 10)
"""Many times more groups than are usual; each is a branch of the kernels."""
LAYOUT = layout_of(2, 4, 1, 0)
"""Where the layout does not matter; 13 columns."""
ROWS = 23
"""Where the rows do not matter: a prime, so that tiles and programs are left with a part."""


def layout_around_block(
    block: int, offset: int, vector: int, background: Any = None
) -> GroupLayout:
    """Groups that fill a block but for a column, to the column, by one too much and over twice.

    Each starts `offset` columns into a vector, which take a part of the block.
    """
    sizes: list[int] = [2] if background else []
    for wanted in (block - 1, block, block + 1, 2 * block + 3):
        gap = next(g for g in count(2) if (sum(sizes) + g) % vector == offset)
        sizes += [gap, wanted - offset]
    sizes.append(next(g for g in count(2) if (sum(sizes) + g) % vector == 0))
    del sizes[: background is not None]
    return layout_of(*(size - 1 for size in sizes), background=background)


def oracle_of(layout: GroupLayout) -> OracleLayout:
    return OracleLayout(layout.groups, layout.names, layout.num_categories, layout.background)


# Inputs -------------------------------------------------------------------------------------


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def labels_for(layout: GroupLayout, rows: int, seed: int = 0) -> Tensor:
    """Labels of every kind: categories, as often background, and rows that are ignored."""
    labels = torch.randint(0, layout.num_labels, (rows,), generator=seeded(seed))
    kind = torch.rand(rows, generator=seeded(seed + 1))
    if layout.background_label is not None:
        labels[kind < 0.4] = layout.background_label
    labels[kind > 0.9] = IGNORE
    return labels.to(DEVICE)


def logits_for(
    layout: GroupLayout, rows: int, seed: int = 2, dtype: torch.dtype = torch.float32
) -> Tensor:
    normal = torch.randn(rows, layout.num_logits, generator=seeded(seed), dtype=torch.float64)
    return (normal * 2).to(DEVICE, dtype)


def keys_for(layout: GroupLayout, rows: int, seed: int = 3, bound: int = 2**31 - 1) -> Tensor:
    size = (len(layout.groups), rows)
    return torch.randint(0, bound, size, dtype=torch.int32, generator=seeded(seed)).to(DEVICE)


def given_weights(layout: GroupLayout, dtype: torch.dtype, rows: int = ROWS) -> Tensor:
    """A third of them 0; the others around 1, or True."""
    shape = (rows, layout.num_groups)
    counts = torch.rand(shape, generator=seeded(5)) < 0.67
    if dtype != torch.bool:
        return (counts * torch.rand(shape, generator=seeded(6)) * 2).to(DEVICE, dtype)
    return counts.to(DEVICE)


def with_dead_slices(logits: Tensor, layout: GroupLayout, weights: np.ndarray) -> Tensor:
    """The logits, NaN wherever a row does not count in a group."""
    result = logits.detach().clone()
    for group in range(layout.num_groups):
        dead = torch.from_numpy(~(weights[:, group] > 0)).to(result.device)
        result[dead, oracle_of(layout).columns(group)] = math.nan
    return result


# Memory ------------------------------------------------------------------------------------


def within(values: Tensor, rows: int, columns: int, left: int, step: int = 1) -> Tensor:
    """The values in a larger matrix of NaN, from the column `left` on."""
    wide = values.new_full((rows, columns), math.nan)
    region = wide[:: rows // len(values), left::step][:, : values.shape[1]]
    region.copy_(values)
    return region


def shifted(values: Tensor) -> Tensor:
    buffer = values.new_full((values.numel() + 1,), math.nan)
    buffer[1:] = values.flatten()
    return buffer[1:].view(values.shape)


MEMORY: dict[str, Callable[[Tensor], Tensor]] = {
    "transposed": lambda values: values.T.contiguous().T,
    # Slices of columns: in rows of 14 nothing is aligned, in rows of 32 all of it.
    "columns-of-14": lambda values: within(values, len(values), 14, 1),
    "columns-of-32": lambda values: within(values, len(values), 32, 16),
    "columns-of-32-misaligned": lambda values: within(values, len(values), 32, 3),
    "every-other-row": lambda values: within(values, 2 * len(values), 12, 0),
    "every-third-column": lambda values: within(values, len(values), 40, 2, 3),
    "shifted-by-one": shifted,
    # Memory that holds the negatives, with a note that they are to be negated.
    "negative-bit": lambda values: torch.complex(torch.zeros_like(values), -values).conj().imag,
}


# Launches -----------------------------------------------------------------------------------


def draw(
    labels: Tensor,
    layout: GroupLayout,
    ratio: float = 1.0,
    keys: Tensor | None = None,
    ignore_index: int = IGNORE,
) -> tuple[Tensor, Tensor]:
    """Which rows count, and how many, after a look at whether all of both was written."""
    keys = keys_for(layout, labels.shape[0]) if keys is None else keys
    active, counts = triton_ops.sample_others(
        labels, keys, layout.tables(DEVICE), others_ratio=ratio, ignore_index=ignore_index
    )
    assert active.dtype == torch.bool
    assert active.shape == (labels.shape[0], layout.num_groups)
    assert (active.T.contiguous().view(torch.uint8) <= 1).all(), "not all of it was written"
    assert counts.dtype == torch.float32
    assert counts.shape == (layout.num_groups,)
    return active, counts


def loss_of(
    logits: Tensor,
    labels: Tensor,
    weights: Tensor,
    layout: GroupLayout,
    *,
    operations: ModuleType = triton_ops,
    **options: Any,
) -> Tensor:
    """The loss of each group, as the operation is called once arguments have been checked."""
    settings: dict[str, Any] = {
        "category_weights": None,
        "normalizers": None,
        "ignore_index": IGNORE,
        "reduction": "groups",
        "tables": layout.tables(DEVICE),
    }
    losses: Tensor = operations.group_losses(logits, labels, weights, **{**settings, **options})
    return losses


def weights_that_count(
    layout: GroupLayout,
    labels: Tensor,
    given: Tensor,
    category_weights: Tensor | None = None,
    ignore_index: int = IGNORE,
) -> np.ndarray:
    """The method's weights, [R, G]: neither a negative weight nor a NaN counts."""
    clean = exactly(given)
    clean[~(clean > 0)] = 0
    factors = None if category_weights is None else exactly(category_weights)
    return weights_of(oracle_of(layout), labels.tolist(), clean, factors, ignore_index)


# The verdict --------------------------------------------------------------------------------


def exactly(values: Tensor) -> np.ndarray:
    return values.detach().cpu().double().numpy()


def assert_close(ours: Tensor, reference: np.ndarray, tolerance: float | None = None) -> None:
    """Within `tolerance` of max(|reference|, 1)."""
    tolerance = TOLERANCE[ours.dtype] if tolerance is None else tolerance
    assert tuple(ours.shape) == reference.shape
    assert ours.isfinite().all()
    error = np.abs(exactly(ours) - reference) / np.maximum(np.abs(reference), 1)
    assert error.size == 0 or error.max() <= tolerance, f"off by {error.max():.2e}"


def assert_gradient_close(
    slope: Tensor,
    reference: np.ndarray,
    layout: GroupLayout,
    shares: np.ndarray,
    tolerance: float | None = None,
) -> None:
    """Within `tolerance` of what the row's probabilities are multiplied with, [R, G].

    Which is below 1, so this is stricter than `assert_close`; and where a row does not count its
    gradient must be 0.
    """
    tolerance = TOLERANCE[slope.dtype] if tolerance is None else tolerance
    assert tuple(slope.shape) == reference.shape
    assert slope.isfinite().all()
    unit = np.repeat(np.abs(shares), layout.group_sizes, axis=1)
    error = np.abs(exactly(slope) - reference)
    assert not error[unit == 0].any(), "a row that does not count has a gradient"
    relative = error[unit > 0] / unit[unit > 0]
    assert relative.size == 0 or relative.max() <= tolerance, f"off by {relative.max():.2e}"


def check_loss(
    logits: Tensor,
    labels: Tensor,
    given: Tensor,
    layout: GroupLayout,
    weights: np.ndarray,
    *,
    gradient_tolerance: float | None = None,
    place: Callable[[Tensor], Tensor] = torch.clone,
    **options: Any,
) -> None:
    """Losses and gradient against the oracle, the latter for random factors of the groups.

    `given` are the weights as the operation takes them, `weights` those of the method. `place`
    puts the logits into memory in another way.
    """
    expected, exact, rows = oracle_of(layout), exactly(logits), labels.tolist()
    logits = place(with_dead_slices(logits, layout, weights)).detach().requires_grad_()
    losses = loss_of(logits, labels, given, layout, **options)
    assert losses.dtype == torch.promote_types(logits.dtype, torch.float32)
    assert_close(losses, group_losses(expected, exact, rows, weights))
    factors = torch.randn(layout.num_groups, generator=seeded(9)).to(losses)
    (slope,) = torch.autograd.grad(losses, logits, factors)
    assert slope.dtype == logits.dtype
    reference = gradient(expected, exact, rows, weights, exactly(factors))
    shares = weights / normalizers(weights) * exactly(factors)
    assert_gradient_close(slope, reference, layout, shares, gradient_tolerance)
