"""Plain softmax, with class weights or without: the baseline, re-weight and re-weight-cls."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from balanced_group_softmax.layout import Background
from balanced_group_softmax.rebalance._shared import check_weights
from balanced_group_softmax.rebalance.linear_classifier import LinearClassifier

__all__ = ["SoftmaxClassifier"]


class SoftmaxClassifier(LinearClassifier):
    r"""Cross-entropy and softmax over all labels, each row weighted by its label.

    .. math:: \ell = \frac{1}{R} \sum_r w_{y_r} \mathrm{CE}(z_r, y_r)

    over the R rows that count. As in the original, and unlike `torch.nn.functional.cross_entropy`
    with weights, the sum is divided by the number of rows and not by the sum of their weights.
    Scores are the softmax.

    `from_linear` keeps everything: the first scores are those of the softmax classifier.

    Args:
        in_features: width of the features.
        num_categories: C, without background.
        class_weights: one for each label, finite and at least 0, in the label convention: from
            `class_weights.inverse_frequency_weights` (re-weight) or
            `class_weights.class_balanced_weights` (re-weight-cls). None weights all alike.

    `background`, `bias`, `ignore_index`, `device` and `dtype` are those of `LinearClassifier`.

    Raises:
        TypeError: if an argument is of the wrong type.
        ValueError: if a size is below 1, the convention is unknown, or the weights do not fit.

    Source: Li et al., CVPR 2020, section 5 and its released configurations.

    Example:
        >>> from balanced_group_softmax.rebalance.class_weights import inverse_frequency_weights
        >>> weights = inverse_frequency_weights([1, 9, 90])
        >>> head = SoftmaxClassifier(4, 3, class_weights=weights)
        >>> logits = head(torch.randn(5, 4))
        >>> list(head.losses(logits, torch.tensor([0, 0, 1, 2, 3])))
        ['loss_cls']
        >>> head.scores(logits).shape
        torch.Size([5, 4])
    """

    def __init__(
        self,
        in_features: int,
        num_categories: int,
        *,
        class_weights: Sequence[float] | np.ndarray | Tensor | None = None,
        background: Background = "first",
        bias: bool = True,
        ignore_index: int = -100,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(
            in_features,
            num_categories,
            background=background,
            bias=bias,
            ignore_index=ignore_index,
            device=device,
            dtype=dtype,
        )
        self.class_weights = check_weights(
            class_weights, "class_weights", self.num_labels, "labels"
        )

    def settings(self) -> dict[str, Any]:
        """The class weights."""
        return {"class_weights": self.class_weights}

    def losses(
        self, logits: Tensor, labels: Tensor, generator: torch.Generator | None = None
    ) -> dict[str, Tensor]:
        """Return `loss_cls`; see `LinearClassifier.losses`."""
        logits, rows = self._rows(logits, labels)
        values = F.cross_entropy(logits, rows.labels, reduction="none")
        if self.class_weights is not None:
            weights = self._table("class_weights", self.class_weights, logits)
            values = values * weights[rows.labels]
        return {"loss_cls": rows.mean(values)}

    def scores(self, logits: Tensor) -> Tensor:
        """Return the softmax, [R, num_labels]."""
        return self._checked(logits).softmax(dim=1)
