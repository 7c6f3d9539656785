"""Tau-normalisation for some rows only: each RoI is judged by one of two classifiers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from balanced_group_softmax._arguments import as_float
from balanced_group_softmax.layout import Background
from balanced_group_softmax.rebalance._described import (
    DescribedModule,
    description_of,
    load_under,
    matrix_of,
)
from balanced_group_softmax.rebalance._shared import (
    as_category_mask,
    check_background,
    foreground_of,
    frozen_copy,
    widened,
)
from balanced_group_softmax.rebalance.tau_norm import tau_normalize

__all__ = ["TauSelectClassifier", "select_scores"]


def select_scores(
    scores: Tensor,
    normalized: Tensor,
    select: Sequence[int] | np.ndarray | Tensor,
    *,
    background: Background = "first",
) -> Tensor:
    """Take the scores of the normalised classifier for rows that it gives to selected categories.

    "tau-norm-select" of the original: a row's scores are those of the normalised classifier (all
    of them) if the plain one does not call it background and the normalised one's best label is a
    selected category; else they stay. So a RoI is judged by one of the two classifiers, and heads
    are spared what normalisation does to them.

    Args:
        scores: [R, num_labels] of the plain classifier.
        normalized: [R, num_labels] of the one that :func:`tau_normalize` made.
        select: categories (0..C-1): indices, or bool [C]; the original's are those with fewer than
            100 instances (:func:`~balanced_group_softmax.rebalance.tail_subset.tail_categories`).
        background: the label convention.

    Returns:
        [R, num_labels].

    Raises:
        TypeError: if scores are not tensors.
        ValueError: if shapes differ, or a selected category does not exist.

    Source: released code of Li et al., CVPR 2020.

    Example:
        >>> plain = torch.tensor([[0.1, 0.8, 0.1], [0.8, 0.1, 0.1]])
        >>> other = torch.tensor([[0.1, 0.3, 0.6], [0.1, 0.3, 0.6]])
        >>> select_scores(plain, other, [1])
        tensor([[0.1000, 0.3000, 0.6000],
                [0.8000, 0.1000, 0.1000]])
    """
    for name, values in (("scores", scores), ("normalized", normalized)):
        if not isinstance(values, Tensor):
            raise TypeError(f"Expected `{name}` to be a Tensor, got {type(values).__name__}")
    if scores.ndim != 2 or scores.shape != normalized.shape:
        raise ValueError(
            f"Expected `scores` and `normalized` of one shape [R, num_labels], got "
            f"{list(scores.shape)} and {list(normalized.shape)}"
        )
    num_categories = scores.shape[1] - (check_background(background) is not None)
    selected = as_category_mask(select, num_categories).to(scores.device)
    return _select(scores, normalized, selected, background)


class TauSelectClassifier(DescribedModule):
    """A softmax classifier and its tau-normalised twin, chosen between by :func:`select_scores`.

    All categories of the twin are normalised. Logits are those of both, [R, 2 num_labels], so that
    it meets the protocol of the adapters at test. There is nothing to train: `losses` raises. For
    tau-normalisation of all rows, `SoftmaxClassifier.from_linear(tau_normalize(linear, tau))` does.

    Args:
        linear: the trained softmax classifier, an output for each label. It is copied.
        tau: the power.
        select: categories (0..C-1) whose rows the twin may judge: indices, or bool [C].
        background: the label convention, "first", "last" or None.

    Raises:
        TypeError: if an argument is of the wrong type.
        ValueError: if a number is out of range, or a selected category does not exist.

    Source: released code of Li et al., CVPR 2020.

    Example:
        >>> classifier = TauSelectClassifier(nn.Linear(4, 3), 1.0, [1])
        >>> classifier.scores(classifier(torch.randn(5, 4))).shape
        torch.Size([5, 3])
    """

    selected: Tensor

    def __init__(
        self,
        linear: nn.Linear,
        tau: float,
        select: Sequence[int] | np.ndarray | Tensor,
        *,
        background: Background = "first",
    ) -> None:
        super().__init__()
        if not isinstance(linear, nn.Linear):
            raise TypeError(f"Expected `linear` to be an nn.Linear, got {type(linear).__name__}")
        self.background: Background = check_background(background)
        self.tau = as_float(tau, "tau")
        self.plain = frozen_copy(linear)
        self.normalized = frozen_copy(tau_normalize(linear, tau, background=background))
        self.num_categories = linear.out_features - (background is not None)
        self.in_features = linear.in_features
        mask = as_category_mask(select, self.num_categories)
        self.register_buffer("selected", mask.to(linear.weight.device).clone())

    @classmethod
    def from_state_dict(
        cls, state_dict: Mapping[str, Any], prefix: str = ""
    ) -> TauSelectClassifier:
        """Make the classifier that a checkpoint describes.

        Args:
            state_dict: of the classifier, or of a whole detector.
            prefix: what the classifier's keys begin with.

        Raises:
            ValueError: if the entries are missing or of another method.
        """
        about = description_of(cls, state_dict, prefix)
        weight = matrix_of(state_dict, f"{prefix}plain.weight")
        bias = f"{prefix}plain.bias" in state_dict
        linear = nn.Linear(weight.shape[1], len(weight), bias, weight.device, weight.dtype)
        made = cls(linear, about["settings"]["tau"], [], background=about["background"])
        load_under(made, state_dict, prefix)
        return made

    def settings(self) -> dict[str, Any]:
        """The power; the weights that it led to are what scores depend on."""
        return {"tau": self.tau}

    if TYPE_CHECKING:  # to torch it is Any

        def __call__(self, features: Tensor) -> Tensor: ...  # noqa: D102

    def forward(self, features: Tensor) -> Tensor:
        """Logits of both, [R, 2 num_labels]."""
        return torch.cat([self.plain(features), self.normalized(features)], dim=1)

    def losses(self, logits: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """Raise RuntimeError: there is nothing to train."""
        raise RuntimeError(
            "Expected no training of a tau-normalised classifier: train the softmax classifier"
        )

    def scores(self, logits: Tensor) -> Tensor:
        """Return scores [R, num_labels] of logits of `forward`."""
        if not isinstance(logits, Tensor):
            raise TypeError(f"Expected `logits` to be a Tensor, got {type(logits).__name__}")
        width = self.plain.out_features
        if logits.ndim != 2 or logits.shape[1] != 2 * width:
            raise ValueError(
                f"Expected `logits` of shape [R, {2 * width}], got {list(logits.shape)}"
            )
        plain, normalized = widened(logits).split(width, dim=1)
        return _select(
            plain.softmax(dim=1), normalized.softmax(dim=1), self.selected, self.background
        )

    def extra_repr(self) -> str:
        """The settings, for printing."""
        return f"tau={self.tau:g}, background={self.background!r}"


def _select(scores: Tensor, normalized: Tensor, selected: Tensor, background: Background) -> Tensor:
    """`select_scores` for arguments that have been checked, without a wait for the device."""
    foreground = foreground_of(background, len(selected))
    chosen = torch.zeros(scores.shape[1], dtype=torch.bool, device=scores.device)
    is_category = chosen.clone()
    is_category[foreground] = True
    chosen[foreground] = selected
    taken = is_category[scores.argmax(dim=1)] & chosen[normalized.argmax(dim=1)]
    return torch.where(taken[:, None], normalized, scores)
