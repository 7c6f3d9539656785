"""Equalization loss v2: sigmoids whose two kinds of gradient are kept in balance."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from balanced_group_softmax._arguments import as_float
from balanced_group_softmax.layout import Background
from balanced_group_softmax.rebalance._shared import check_prior, summed_over_processes
from balanced_group_softmax.rebalance.linear_classifier import (
    LinearClassifier,
    log_odds_of_softmax,
    set_prior,
)

__all__ = ["EQLv2Classifier"]

# The weights of a category that has had no gradient yet are as good as 1, as at this ratio.
_RATIO_AT_START = 100.0
_LEAST_DIVISOR = 1e-10


class EQLv2Classifier(LinearClassifier):
    r"""One sigmoid for each label, weighted by the gradients that each category has had.

    With :math:`g_c` the positive over the negative gradients of category `c` so far:

    .. math:: w^-_c = \frac{1}{1 + e^{-\gamma (g_c - \mu)}}, \quad
        w^+_c = 1 + \alpha (1 - w^-_c), \quad
        \ell = \frac{1}{R} \sum_{r, c} \big(t_{rc} w^+_c + (1 - t_{rc}) w^-_c\big)\,
        \mathrm{BCE}(z_{rc}, t_{rc})

    over the R rows that count, with :math:`t` the one-hot labels. A gradient is the absolute one
    of an element's weighted term to its logit. Without any yet the ratio is 100, so that both
    weights begin at 1.

    Background is one more sigmoid, always of weight 1, which learns whether there is no object:
    scores are :math:`\sigma(z_c)\,(1 - \sigma(z_{bg}))`. `objectness=False` leaves out the
    factor. Without background there are the categories alone.

    The gradients are gathered in training mode only. They are the buffers `positive_gradients` and
    `negative_gradients` ([C], float32 at least), saved and loaded, and summed over the processes of
    `torch.distributed` where that is initialised, as the authors' code does: every process then has
    to take the same steps.

    `from_linear` starts each category at its odds against background, exactly, and background at
    its odds against categories of equal logits; without background each category at its odds
    against others of equal logits.

    Args:
        in_features: width of the features.
        num_categories: C, without background.
        gamma: slope of the weight of negatives.
        mu: ratio at which it is a half.
        alpha: how much more positives weigh, at least 0.
        objectness: whether scores are multiplied by one minus that of background.
        prior: probability at which fresh sigmoids begin, in (0, 1); the authors' 0.001.

    `background`, `bias`, `ignore_index`, `device` and `dtype` are those of `LinearClassifier`.

    Raises:
        TypeError: if an argument is of the wrong type.
        ValueError: if a number is out of range or the convention unknown.

    Source: Tan et al., *Equalization Loss v2*, CVPR 2021, section 3; gamma = 12, mu = 0.8,
    alpha = 4 as there.

    Example:
        >>> head = EQLv2Classifier(4, 3)
        >>> head.losses(torch.zeros(2, 4), torch.tensor([0, 3]))
        {'loss_cls': tensor(2.7726)}
        >>> head.positive_gradients, head.negative_gradients
        (tensor([0.0000, 0.0000, 0.5000]), tensor([1.0000, 1.0000, 0.5000]))
    """

    positive_gradients: Tensor
    negative_gradients: Tensor

    def __init__(
        self,
        in_features: int,
        num_categories: int,
        *,
        gamma: float = 12.0,
        mu: float = 0.8,
        alpha: float = 4.0,
        objectness: bool = True,
        prior: float = 1e-3,
        background: Background = "first",
        bias: bool = True,
        ignore_index: int = -100,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        self.prior = check_prior(prior)
        super().__init__(
            in_features,
            num_categories,
            background=background,
            bias=bias,
            ignore_index=ignore_index,
            device=device,
            dtype=dtype,
        )
        self.gamma = as_float(gamma, "gamma", lowest=0, highest=1e6)
        self.mu = as_float(mu, "mu", lowest=-1e6, highest=1e6)
        self.alpha = as_float(alpha, "alpha", lowest=0, highest=1e6)
        if not isinstance(objectness, bool):
            raise TypeError(f"Expected `objectness` to be a bool, got {type(objectness).__name__}")
        self.objectness = objectness
        device = self.fc.weight.device
        kind = torch.float64 if self.fc.weight.dtype == torch.float64 else torch.float32
        zeros = torch.zeros(self.num_categories, dtype=kind, device=device)
        self.register_buffer("positive_gradients", zeros)
        self.register_buffer("negative_gradients", zeros.clone())

    def settings(self) -> dict[str, Any]:
        """What loss and scores depend on."""
        return {
            "gamma": self.gamma,
            "mu": self.mu,
            "alpha": self.alpha,
            "objectness": self.objectness,
            "prior": self.prior,
        }

    def score_settings(self) -> tuple[str, ...]:
        """Whether background has a say."""
        return ("objectness",)

    def reset_parameters(self) -> None:
        """Start afresh: weights normal with standard deviation 0.01, sigmoids at the prior."""
        super().reset_parameters()
        set_prior(self.fc, self.prior)

    def reset_state(self) -> None:
        """Forget the gradients."""
        self.positive_gradients.zero_()
        self.negative_gradients.zero_()

    def category_weights(self) -> tuple[Tensor, Tensor]:
        """The weights of positives and of negatives, [C] each."""
        positive, negative = self.positive_gradients, self.negative_gradients
        ratio = torch.where(
            (positive == 0) & (negative == 0),
            _RATIO_AT_START,
            positive / (negative + _LEAST_DIVISOR),
        )
        of_negatives = torch.sigmoid(self.gamma * (ratio - self.mu))
        return 1 + self.alpha * (1 - of_negatives), of_negatives

    def losses(
        self, logits: Tensor, labels: Tensor, generator: torch.Generator | None = None
    ) -> dict[str, Tensor]:
        """Return `loss_cls`; see `LinearClassifier.losses`.

        In training mode the step's gradients are added afterwards, for later steps.
        """
        logits, rows = self._rows(logits, labels)
        targets = F.one_hot(rows.labels, self.num_labels).to(logits.dtype)
        positive, negative = (self._of_labels(part, logits) for part in self.category_weights())
        weights = targets * positive + (1 - targets) * negative
        values = F.binary_cross_entropy_with_logits(logits, targets, reduction="none") * weights
        if self.training:
            self._gather(logits.detach(), targets, weights * rows.counted[:, None])
        return {"loss_cls": rows.mean(values)}

    def scores(self, logits: Tensor) -> Tensor:
        """Return the sigmoids, those of categories times one minus background's."""
        scores = self._checked(logits).sigmoid()
        if self.background_label is None or not self.objectness:
            return scores
        background = scores[:, self.background_label, None]
        parts = [background, scores[:, self.foreground] * (1 - background)]
        return torch.cat(parts if self.background == "first" else parts[::-1], dim=1)

    def _of_labels(self, values: Tensor, like: Tensor) -> Tensor:
        """Weights of categories as those of labels, background's being 1."""
        values = values.to(like.dtype)
        parts = [values.new_ones(1), values]
        if self.background is None:
            return values
        return torch.cat(parts if self.background == "first" else parts[::-1])

    @torch.no_grad()
    def _gather(self, logits: Tensor, targets: Tensor, weights: Tensor) -> None:
        gradients = (logits.sigmoid() - targets).abs() * weights
        both = torch.stack([gradients * targets, gradients * (1 - targets)]).sum(dim=1)
        positive, negative = summed_over_processes(both[:, self.foreground].contiguous())
        self.positive_gradients += positive.to(self.positive_gradients.dtype)
        self.negative_gradients += negative.to(self.negative_gradients.dtype)

    def _from_softmax(self, rows: Tensor, *, is_bias: bool) -> Tensor:
        return log_odds_of_softmax(rows, self.foreground, self.background_label, is_bias=is_bias)

    def _apply(self, fn: Callable[..., Any], *args: Any, **kwargs: Any) -> EQLv2Classifier:
        before = {
            name: getattr(self, name) for name in ("positive_gradients", "negative_gradients")
        }
        super()._apply(fn, *args, **kwargs)
        for name, values in before.items():
            now = getattr(self, name)
            if now.dtype in (torch.float16, torch.bfloat16):  # a sum would stop growing
                wide = torch.zeros_like(now, dtype=torch.float32) if values.is_meta else values
                setattr(self, name, wide.to(now.device))
        return self
