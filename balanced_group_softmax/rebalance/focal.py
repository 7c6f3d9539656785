"""Focal loss on a box classifier: one sigmoid for each label, easy rows weighted down."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from balanced_group_softmax._arguments import as_float
from balanced_group_softmax.layout import Background
from balanced_group_softmax.rebalance._shared import check_weights
from balanced_group_softmax.rebalance.linear_classifier import (
    LinearClassifier,
    log_odds_of_softmax,
)

__all__ = ["FocalClassifier"]

Activation = Literal["softmax", "sigmoid"]
Normalizer = Literal["elements", "rows", "foreground"]
ACTIVATIONS: tuple[str, ...] = get_args(Activation)
NORMALIZERS: tuple[str, ...] = get_args(Normalizer)


class FocalClassifier(LinearClassifier):
    r"""Sigmoid focal loss over all labels, background among them.

    With :math:`t_{rc} = 1` where `c` is the label of row `r` and 0 elsewhere, :math:`p` the
    sigmoid of a logit, :math:`p^t = p` where t is 1 and :math:`1 - p` elsewhere:

    .. math:: \ell = \frac{1}{S} \sum_{r, c} w_{y_r}\, \alpha^t_{rc} (1 - p^t_{rc})^\gamma
        \big(-\log p^t_{rc}\big), \qquad
        \alpha^t = \alpha \text{ where } t = 1, \text{ else } 1 - \alpha

    The original applied RetinaNet's loss in this way: `gamma` 2, `alpha` 0.25, background one
    more sigmoid, :math:`S` the number of **elements** (rows times labels), and softmax over the
    logits at test. All four are the defaults. The division by elements makes the loss about a
    thousand times smaller than usual on LVIS, so that a classifier hardly moves in a short
    training; `normalizer="rows"` divides by the rows that count, `"foreground"` by those with a
    category, at least 1, as RetinaNet does.

    The published code hands one-hot targets to a kernel that expects label numbers and reads one
    number for each row, so nearly every element is trained as a negative. That is not reproduced:
    this is the loss that its readable version states, and the paper's figures for focal loss
    (AP 11.12 and 19.29) need not be met.

    `from_linear` keeps everything if `activation` is "softmax", as the original did: the first
    scores are those of the softmax classifier. With "sigmoid" each category starts at its odds
    against background, exactly, and background at its odds against categories of equal logits.

    Args:
        in_features: width of the features.
        num_categories: C, without background.
        gamma: at least 0; 0 weights all elements alike.
        alpha: in [0, 1], the weight of positive elements; None weights both kinds 1.
        activation: what makes scores of logits, "softmax" or "sigmoid".
        normalizer: "elements", "rows" or "foreground".
        class_weights: one for each label, multiplies all elements of a row, as for
            `SoftmaxClassifier`.

    `background`, `bias`, `ignore_index`, `device` and `dtype` are those of `LinearClassifier`.

    Raises:
        TypeError: if an argument is of the wrong type.
        ValueError: if a number is out of range or a name is unknown.

    Source: Lin et al., *Focal Loss for Dense Object Detection*, ICCV 2017, equation 5; Li et al.,
    CVPR 2020, section 5 and its released configurations.

    Example:
        >>> head = FocalClassifier(4, 3, normalizer="rows")
        >>> head.losses(torch.zeros(2, 4), torch.tensor([0, 3]))
        {'loss_cls': tensor(0.4332)}
    """

    def __init__(
        self,
        in_features: int,
        num_categories: int,
        *,
        gamma: float = 2.0,
        alpha: float | None = 0.25,
        activation: Activation = "softmax",
        normalizer: Normalizer = "elements",
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
        self.gamma = as_float(gamma, "gamma", lowest=0, highest=1e3)
        self.alpha = None if alpha is None else as_float(alpha, "alpha", lowest=0, highest=1)
        if activation not in ACTIVATIONS:
            raise ValueError(
                f"Expected `activation` to be one of {ACTIVATIONS}, got {activation!r}"
            )
        if normalizer not in NORMALIZERS:
            raise ValueError(
                f"Expected `normalizer` to be one of {NORMALIZERS}, got {normalizer!r}"
            )
        self.activation, self.normalizer = activation, normalizer
        self.class_weights = check_weights(
            class_weights, "class_weights", self.num_labels, "labels"
        )

    def settings(self) -> dict[str, Any]:
        """What loss and scores depend on."""
        return {
            "gamma": self.gamma,
            "alpha": self.alpha,
            "activation": self.activation,
            "normalizer": self.normalizer,
            "class_weights": self.class_weights,
        }

    def score_settings(self) -> tuple[str, ...]:
        """The activation."""
        return ("activation",)

    def losses(
        self, logits: Tensor, labels: Tensor, generator: torch.Generator | None = None
    ) -> dict[str, Tensor]:
        """Return `loss_cls`; see `LinearClassifier.losses`."""
        logits, rows = self._rows(logits, labels)
        targets = F.one_hot(rows.labels, self.num_labels).to(logits.dtype)
        signed = logits * (2 * targets - 1)
        # As an exponential, so that no power of 0 enters the gradient.
        values = -F.logsigmoid(signed) * (self.gamma * F.logsigmoid(-signed)).exp()
        if self.alpha is not None:
            values = values * (self.alpha * targets + (1 - self.alpha) * (1 - targets))
        values = values.sum(dim=1)
        if self.class_weights is not None:
            weights = self._table("class_weights", self.class_weights, logits)
            values = values * weights[rows.labels]
        loss = rows.mean(values)
        if self.normalizer == "elements":
            loss = loss / self.num_labels
        elif self.normalizer == "foreground":
            foreground = (self._category_targets(rows) >= 0).sum().clamp(min=1)
            loss = loss * (rows.number / foreground)
        return {"loss_cls": loss}

    def scores(self, logits: Tensor) -> Tensor:
        """Return the activation of the logits, [R, num_labels]."""
        logits = self._checked(logits)
        return logits.softmax(dim=1) if self.activation == "softmax" else logits.sigmoid()

    def _from_softmax(self, rows: Tensor, *, is_bias: bool) -> Tensor:
        if self.activation == "softmax":
            return rows
        return log_odds_of_softmax(rows, self.foreground, self.background_label, is_bias=is_bias)
