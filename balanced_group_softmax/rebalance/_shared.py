"""Arguments that several methods have, checked, and arithmetic that they share."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from balanced_group_softmax._arguments import as_float, as_int_array, shown
from balanced_group_softmax.layout import Background


def check_background(background: Any) -> Background:
    """A label convention; ValueError if it is none."""
    if background is not None and background not in ("first", "last"):
        raise ValueError(
            f"Expected `background` to be 'first', 'last' or None, got {shown(background)}"
        )
    checked: Background = background
    return checked


def foreground_of(background: Background, num_categories: int) -> slice:
    """The labels that are categories."""
    start = int(background == "first")
    return slice(start, start + num_categories)


def check_labels(labels: Any, num_labels: int, ignore_index: int) -> Tensor:
    """Labels as int64; values are checked where that costs no wait for a device.

    Raises:
        TypeError: if they are not a tensor of integers.
        ValueError: if they are not one-dimensional or, on the CPU, one is out of range.
    """
    if not isinstance(labels, Tensor):
        raise TypeError(f"Expected `labels` to be a Tensor, got {type(labels).__name__}")
    if labels.dtype.is_floating_point or labels.dtype.is_complex or labels.dtype == torch.bool:
        raise TypeError(f"Expected `labels` of an integer dtype, got {labels.dtype}")
    if labels.ndim != 1:
        raise ValueError(f"Expected `labels` of shape [R], got {list(labels.shape)}")
    labels = labels.long()
    if labels.device.type == "cpu" and not torch.compiler.is_compiling():
        bad = ((labels < 0) | (labels >= num_labels)) & (labels != ignore_index)
        if bool(bad.any()):
            row = int(bad.int().argmax())
            raise ValueError(
                f"Expected `labels` in [0, {num_labels - 1}] or {ignore_index}, "
                f"got {int(labels[row])} at row {row}"
            )
    return labels


def check_counts(counts: Any, num_categories: int) -> tuple[int, ...]:
    """Counts of the categories, each at least 0."""
    array = as_int_array(counts, "counts")
    if len(array) != num_categories:
        raise ValueError(
            f"Expected `counts` of {num_categories} categories, got those of {len(array)}"
        )
    if (array < 0).any():
        at = int((array < 0).argmax())
        raise ValueError(f"Expected `counts` of at least 0, got {array[at]} at position {at}")
    return tuple(array.tolist())


def check_weights(weights: Any, name: str, number: int, meaning: str) -> tuple[float, ...] | None:
    """Weights as floats, each finite and at least 0; None stays None."""
    if weights is None:
        return None
    if isinstance(weights, (str, bytes, Mapping)) or not hasattr(weights, "__len__"):
        raise TypeError(f"Expected `{name}` to be a sequence of numbers, got {shown(weights)}")
    values = weights.tolist() if hasattr(weights, "tolist") else list(weights)
    if len(values) != number:
        raise ValueError(f"Expected `{name}` for {number} {meaning}, got {len(values)}")
    return tuple(
        as_float(value, f"{name}[{i}]", lowest=0, highest=torch.finfo(torch.float32).max)
        for i, value in enumerate(values)
    )


def widened(values: Tensor) -> Tensor:
    """Floating point of at least 32 bits."""
    return values if values.dtype in (torch.float32, torch.float64) else values.float()


def summed_over_processes(values: Tensor) -> Tensor:
    """The sum over the processes that train together; in place, without a wait for the device."""
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        dist.all_reduce(values)
    return values


def check_prior(prior: Any) -> float:
    """A probability strictly between 0 and 1."""
    value = as_float(prior, "prior")
    if not 0 < value < 1:
        raise ValueError(f"Expected `prior` in (0, 1), got {value}")
    return value


def as_label_rows(labels: Any, num_categories: int, first: int) -> list[np.ndarray]:
    """The labels in each image, each of them that of a category: first..first + C - 1."""
    if isinstance(labels, (str, bytes, Mapping)) or not hasattr(labels, "__len__"):
        raise TypeError(f"Expected `labels` to be a sequence, got {shown(labels)}")
    rows = [as_int_array(row, f"labels[{i}]") for i, row in enumerate(labels)]
    for image, row in enumerate(rows):
        bad = (row < first) | (row >= first + num_categories)
        if bad.any():
            raise ValueError(
                f"Expected `labels` in [{first}, {first + num_categories - 1}], "
                f"got {row[bad.argmax()]} in image {image}"
            )
    return rows


def frozen_copy(linear: nn.Linear) -> nn.Linear:
    """A layer of its own that does not train."""
    made = nn.Linear(
        linear.in_features, linear.out_features, bias=linear.bias is not None, device="meta"
    )
    made.weight = nn.Parameter(linear.weight.detach().clone(), requires_grad=False)
    if linear.bias is not None:
        made.bias = nn.Parameter(linear.bias.detach().clone(), requires_grad=False)
    return made


def as_category_mask(select: Any, num_categories: int) -> Tensor:
    """Categories given as indices, as bool [C] or as None for all, as bool [C]."""
    if select is None:
        return torch.ones(num_categories, dtype=torch.bool)
    if getattr(select, "dtype", None) in (torch.bool, bool):
        mask = torch.as_tensor(select).cpu()
        if mask.shape != (num_categories,):
            raise ValueError(
                f"Expected `select` as bool [{num_categories}], got shape {list(mask.shape)}"
            )
        return mask
    indices = torch.from_numpy(as_int_array(select, "select"))
    bad = (indices < 0) | (indices >= num_categories)
    if bad.any():
        raise ValueError(
            f"Expected `select` in [0, {num_categories - 1}], got {int(indices[bad][0])}"
        )
    return torch.zeros(num_categories, dtype=torch.bool).index_fill_(0, indices, True)
