"""Tau-normalisation: weights of a trained classifier divided by a power of their norms."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from balanced_group_softmax._arguments import as_float, as_int_array, as_tuple, shown
from balanced_group_softmax.layout import Background
from balanced_group_softmax.rebalance._shared import (
    as_category_mask,
    check_background,
    check_labels,
    foreground_of,
    widened,
)

__all__ = ["TauSearch", "balanced_accuracy", "search_tau", "tau_normalize"]

_Weights = TypeVar("_Weights", Tensor, nn.Linear)

TAUS = tuple(step / 10 for step in range(11))


def tau_normalize(
    classifier: _Weights,
    tau: float,
    *,
    select: Sequence[int] | np.ndarray | Tensor | None = None,
    background: Background = "first",
) -> _Weights:
    r"""Return a classifier whose rows are divided by a power of their norm.

    .. math:: \tilde w_c = \frac{w_c}{\|w_c\|_2^\tau}

    `tau` 0 changes nothing, 1 makes all norms 1. The row of background and those of categories that
    are not selected stay as they are, and so do biases and rows of zeros, as in the original.

    Args:
        classifier: an `nn.Linear` with an output for each label, or its weight [num_labels, F].
            It is not changed.
        tau: the power.
        select: categories (0..C-1) to normalise: indices, or bool [C]; None for all. With a
            selection see also `tau_norm_select`, which is how the original selects.
        background: where background stands among the rows: "first", "last" or None.

    Returns:
        The same kind, without gradient history.

    Raises:
        TypeError: if the classifier is neither a linear layer nor a matrix, or `tau` no number.
        ValueError: if `tau` is not finite, or a selected category does not exist.

    Source: Kang et al., *Decoupling Representation and Classifier for Long-Tailed Recognition*,
    ICLR 2020, section 4; Li et al., CVPR 2020, section 5 and its released code.

    Example:
        >>> weight = torch.tensor([[3.0, 4.0], [3.0, 4.0], [0.0, 2.0]])
        >>> tau_normalize(weight, 1.0)
        tensor([[3.0000, 4.0000],
                [0.6000, 0.8000],
                [0.0000, 1.0000]])
    """
    tau = as_float(tau, "tau", lowest=-1e3, highest=1e3)
    is_layer = isinstance(classifier, nn.Linear)
    weight = classifier.weight if isinstance(classifier, nn.Linear) else classifier
    if not isinstance(weight, Tensor) or weight.ndim != 2 or not weight.dtype.is_floating_point:
        raise TypeError(
            "Expected `classifier` to be an nn.Linear or a floating-point matrix [num_labels, F], "
            f"got {shown(classifier)}"
        )
    weight = weight.detach()
    num_categories = len(weight) - (check_background(background) is not None)
    if num_categories < 1:
        raise ValueError(
            f"Expected `classifier` with a row for each label (background {background!r}), got "
            f"{len(weight)}"
        )
    selected = as_category_mask(select, num_categories).to(weight.device)
    normalised = torch.zeros(len(weight), dtype=torch.bool, device=weight.device)
    normalised[foreground_of(background, num_categories)] = selected
    norms = torch.linalg.vector_norm(widened(weight), dim=1)
    normalised &= norms > 0
    divisors = torch.where(normalised, norms, 1).pow(tau)
    scaled = (widened(weight) / divisors[:, None]).to(weight.dtype)
    if not is_layer:
        return scaled  # type: ignore[return-value]
    layer: Any = classifier
    made = nn.Linear(
        layer.in_features, layer.out_features, bias=layer.bias is not None, device="meta"
    )
    made.weight = nn.Parameter(scaled)
    if layer.bias is not None:
        made.bias = nn.Parameter(layer.bias.detach().clone())
    return made  # type: ignore[return-value]


class TauSearch(NamedTuple):
    """What a search found."""

    tau: float
    """The best; the smallest of several that are equally good."""
    values: dict[float, float]
    """What the metric said of each."""


def search_tau(
    linear: nn.Linear,
    features: Tensor,
    labels: Tensor,
    *,
    taus: Sequence[float] = TAUS,
    metric: Callable[[Tensor, Tensor], float] | None = None,
    select: Sequence[int] | np.ndarray | Tensor | None = None,
    background: Background = "first",
) -> TauSearch:
    """Try powers on held-out data and return the best.

    Args:
        linear: the trained softmax classifier, an output for each label. It is not changed.
        features: [N, F] of held-out data: choosing on training data rewards what it remembers.
        labels: integers [N] in the label convention.
        taus: what to try.
        metric: called with softmax scores [N, num_labels] and the labels; the higher the better.
            By default :func:`balanced_accuracy` of all labels.
        select: as for :func:`tau_normalize`.
        background: as for :func:`tau_normalize`.

    Raises:
        TypeError: if an argument is of the wrong type.
        ValueError: if there is nothing to try or to judge by, shapes do not fit, or the metric
            gives NaN.

    Example:
        >>> linear = torch.nn.Linear(2, 2, bias=False)
        >>> _ = linear.weight.data.copy_(torch.tensor([[4.0, 0.0], [0.0, 1.0]]))
        >>> features, labels = torch.tensor([[1.0, 0.2], [1.0, 2.0]]), torch.tensor([0, 1])
        >>> search_tau(linear, features, labels, taus=(0, 0.5, 1), background=None)
        TauSearch(tau=1.0, values={0.0: 0.5, 0.5: 0.5, 1.0: 1.0})
    """
    if not isinstance(linear, nn.Linear):
        raise TypeError(f"Expected `linear` to be an nn.Linear, got {type(linear).__name__}")
    if not isinstance(features, Tensor) or features.ndim != 2:
        raise TypeError(f"Expected `features` to be a Tensor [N, F], got {shown(features)}")
    labels = check_labels(labels, linear.out_features, ignore_index=-100)
    if len(labels) != len(features):
        raise ValueError(f"Expected `labels` for {len(features)} rows, got {len(labels)}")
    values: dict[float, float] = {}
    for tau in as_tuple(taus, "taus"):
        with torch.no_grad():
            scores = tau_normalize(linear, tau, select=select, background=background)(features)
            scores = widened(scores).softmax(dim=1)
        value = float((metric or balanced_accuracy)(scores, labels))
        if value != value:
            raise ValueError(f"Expected a number from `metric`, got NaN for tau {tau}")
        values[float(tau)] = value
    if not values:
        raise ValueError("Expected `taus` with at least one power, got none")
    best = max(values.values())
    return TauSearch(min(tau for tau, value in values.items() if value == best), values)


def balanced_accuracy(
    scores: Tensor,
    labels: Tensor,
    groups: Sequence[Sequence[int] | np.ndarray | Tensor] | None = None,
) -> float:
    """Return the mean recall of labels, or the mean over groups of the mean recall in each.

    A row is right if its highest score is that of its label. Labels without any row are left out,
    and so are groups without any such label. Rows labelled -100 do not count.

    Args:
        scores: [N, num_labels].
        labels: integers [N].
        groups: labels of each group (background may be one of its own or left out); None for one
            group of all labels.

    Raises:
        TypeError: if an argument is of the wrong type.
        ValueError: if shapes do not fit, a label is out of range, or no label has a row.

    Example:
        >>> scores = torch.tensor([[0.9, 0.1], [0.8, 0.2], [0.7, 0.3], [0.2, 0.8]])
        >>> balanced_accuracy(scores, torch.tensor([0, 0, 1, 1]))
        0.75
    """
    if not isinstance(scores, Tensor) or scores.ndim != 2:
        raise TypeError(f"Expected `scores` to be a Tensor [N, num_labels], got {shown(scores)}")
    num_labels = scores.shape[1]
    labels = check_labels(labels, num_labels, ignore_index=-100)
    if len(labels) != len(scores):
        raise ValueError(f"Expected `labels` for {len(scores)} rows, got {len(labels)}")
    counted = labels != -100
    labels, found = labels[counted].cpu(), scores[counted].argmax(dim=1).cpu()
    rows = torch.bincount(labels, minlength=num_labels).double()
    right = torch.bincount(labels[found == labels], minlength=num_labels).double()
    recall, seen = right / rows.clamp(min=1), rows > 0
    parts = [range(num_labels)] if groups is None else as_tuple(groups, "groups")
    means = []
    for i, part in enumerate(parts):
        members = torch.from_numpy(as_int_array(part, f"groups[{i}]"))
        if ((members < 0) | (members >= num_labels)).any():
            raise ValueError(f"Expected `groups[{i}]` in [0, {num_labels - 1}], got {shown(part)}")
        members = members[seen[members]]
        if len(members):
            means.append(recall[members].mean())
    if not means:
        raise ValueError("Expected rows of at least one label of `groups`, got none")
    return float(torch.stack(means).mean())
