"""Weights of categories from their counts: the rarer, the heavier.

For `SoftmaxClassifier(class_weights=...)` in a label convention; for `category_weights` of
`grouped_softmax_loss` with `background=None` and `within=layout.groups`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from balanced_group_softmax._arguments import as_float, as_int_array, as_tuple, shown
from balanced_group_softmax.layout import Background
from balanced_group_softmax.rebalance._shared import check_background, check_counts

__all__ = ["class_balanced_weights", "inverse_frequency_weights"]

CLIP = (0.1, 5.0)
"""The range to which the original clips its weights."""


def inverse_frequency_weights(
    counts: Sequence[int] | np.ndarray | Tensor,
    *,
    clip: tuple[float, float] | None = CLIP,
    within: Sequence[Sequence[int] | np.ndarray | Tensor] | None = None,
    background: Background = "first",
) -> Tensor:
    r"""Return weights in proportion to one over the count ("re-weight").

    .. math:: v_c = \frac{1}{n_c}, \qquad
        w_c = \mathrm{clip}\Big(\frac{v_c}{\mathrm{mean}_{c'} v_{c'}}\Big)

    The mean is over categories, or over those of the category's own group with `within`. Clipping
    comes last, so that the mean of what is returned is not 1. Background has weight 1.

    Args:
        counts: training instances of each category, C integers; 0 is taken as 1.
        clip: lowest and highest weight, the original's [0.1, 5] unless told; None for no clipping.
        within: categories (0..C-1) of each group, each category in exactly one, e.g.
            `layout.groups`: the weights within groups of the original's ablation.
        background: where background stands among the labels: "first", "last", or None for weights
            of the categories alone.

    Returns:
        float64 [C + 1] in the label convention, or [C] for `background=None`.

    Raises:
        TypeError: if an argument is of the wrong type.
        ValueError: if a count is negative, there is none, the clip is no range of positive
            numbers, or the groups do not hold each category once.

    Source: Li et al., CVPR 2020, section 5 and its released code.

    Example:
        >>> inverse_frequency_weights([1, 2, 100])
        tensor([1.0000, 1.9868, 0.9934, 0.1000], dtype=torch.float64)
    """
    numbers = _checked(counts)
    return _finished(1.0 / numbers, clip, within, background)


def class_balanced_weights(
    counts: Sequence[int] | np.ndarray | Tensor,
    *,
    beta: float = 0.999,
    clip: tuple[float, float] | None = CLIP,
    within: Sequence[Sequence[int] | np.ndarray | Tensor] | None = None,
    background: Background = "first",
) -> Tensor:
    r"""Return weights in proportion to one over the effective number ("re-weight-cls").

    .. math:: v_c = \frac{1 - \beta}{1 - \beta^{n_c}}

    and the rest as for :func:`inverse_frequency_weights`. `beta` 0 weights all alike; towards 1
    the weights become those of the inverse frequency.

    Args:
        counts: training instances of each category, C integers; 0 is taken as 1.
        beta: in [0, 1); 0.999 in the original.
        clip: as for :func:`inverse_frequency_weights`.
        within: as for :func:`inverse_frequency_weights`.
        background: as for :func:`inverse_frequency_weights`.

    Returns:
        float64 [C + 1] in the label convention, or [C] for `background=None`.

    Raises:
        TypeError: if an argument is of the wrong type.
        ValueError: as for :func:`inverse_frequency_weights`, or if `beta` is not in [0, 1).

    Source: Cui et al., *Class-Balanced Loss Based on Effective Number of Samples*, CVPR 2019,
    section 4; Li et al., CVPR 2020, section 5 and its released code.

    Example:
        >>> class_balanced_weights([1, 2, 100], background=None)
        tensor([1.9858, 0.9934, 0.1000], dtype=torch.float64)
    """
    numbers = _checked(counts)
    beta = as_float(beta, "beta", lowest=0, highest=1)
    if beta == 1:
        raise ValueError("Expected `beta` to be in [0, 1), got 1.0")
    if beta == 0:
        return _finished(np.ones_like(numbers), clip, within, background)
    # beta ** n - 1 without the cancellation that a beta close to 1 brings.
    return _finished((beta - 1) / np.expm1(numbers * np.log(beta)), clip, within, background)


def _checked(counts: Any) -> np.ndarray:
    array = as_int_array(counts, "counts")
    if len(array) == 0:
        raise ValueError("Expected `counts` of at least one category, got none")
    check_counts(array, len(array))
    return np.maximum(array, 1).astype(np.float64)


def _finished(values: np.ndarray, clip: Any, within: Any, background: Background) -> Tensor:
    """Divide by means, clip, and put background where it belongs."""
    background = check_background(background)
    groups = [np.arange(len(values))] if within is None else _groups(within, len(values))
    weights = np.empty_like(values)
    for group in groups:
        weights[group] = values[group] / values[group].mean()
    if clip is not None:
        pair = as_tuple(clip, "clip")
        if len(pair) != 2:
            raise ValueError(f"Expected `clip` to be (lowest, highest) or None, got {shown(clip)}")
        lowest, highest = (as_float(bound, "clip") for bound in pair)
        if not 0 < lowest <= highest:
            raise ValueError(f"Expected `clip` with 0 < lowest <= highest, got {shown(clip)}")
        weights = weights.clip(lowest, highest)
    if background == "first":
        weights = np.concatenate([[1.0], weights])
    elif background == "last":
        weights = np.concatenate([weights, [1.0]])
    return torch.from_numpy(weights)


def _groups(within: Any, num_categories: int) -> list[np.ndarray]:
    groups = [
        as_int_array(group, f"within[{i}]") for i, group in enumerate(as_tuple(within, "within"))
    ]
    groups = [group for group in groups if len(group)]
    held = np.sort(np.concatenate([np.zeros(0, np.int64), *groups]))
    if not np.array_equal(held, np.arange(num_categories)):
        raise ValueError(
            f"Expected `within` to hold each of 0..{num_categories - 1} in exactly one group, got "
            f"{shown(within)}"
        )
    return groups
