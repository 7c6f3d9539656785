"""Balanced Softmax and logit adjustment: the counts enter as a prior that training discounts."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from balanced_group_softmax._arguments import as_float
from balanced_group_softmax.layout import Background
from balanced_group_softmax.rebalance._shared import check_counts
from balanced_group_softmax.rebalance.linear_classifier import LinearClassifier

__all__ = ["LogitAdjustedClassifier"]

Moment = Literal["training", "test"]
MOMENTS: tuple[str, ...] = get_args(Moment)


class LogitAdjustedClassifier(LinearClassifier):
    r"""Softmax with the category counts as a prior (Balanced Softmax for `tau` 1).

    With the counts :math:`n_c` (0 counts as 1) and their mean :math:`\bar n`:

    .. math:: a_c = \tau \log \frac{n_c}{\bar n}

    `adjust="training"`: the loss is cross-entropy of :math:`z + a`, scores are the softmax of
    :math:`z`. `adjust="test"`: plain cross-entropy, scores are the softmax of :math:`z - a`, which
    needs no training at all if it starts from a trained softmax classifier.

    **Background.** The papers speak of classification without one, where dividing by the mean
    changes nothing. Here background is adjusted by :math:`a = 0`, which is this library's
    definition: since the mean of :math:`\bar n / n_c` over the instances is 1, the odds of
    foreground against background stay what they were on average over training instances (`tau`
    1), and what is rebalanced are categories among themselves. With `background_count` background
    is adjusted like a category of that count.

    `from_linear` keeps all rows: with "training" the first scores are those of the softmax
    classifier, with "test" they are its adjusted scores.

    Args:
        in_features: width of the features.
        num_categories: C, without background.
        counts: training instances of each category, C integers.
        tau: strength; 1 is Balanced Softmax, 0 plain softmax.
        adjust: "training" or "test".
        background_count: rows of background for the instances in `counts`, above 0; None leaves
            background as it is.

    `background`, `bias`, `ignore_index`, `device` and `dtype` are those of `LinearClassifier`.

    Raises:
        TypeError: if an argument is of the wrong type.
        ValueError: if a number is out of range, a name unknown, or the counts do not fit.

    Source: Ren et al., *Balanced Meta-Softmax for Long-Tailed Visual Recognition*, NeurIPS 2020,
    section 3; Menon et al., *Long-tail learning via logit adjustment*, ICLR 2021, section 4, both
    forms.

    Example:
        >>> head = LogitAdjustedClassifier(4, 3, counts=[1, 10, 100])
        >>> head.losses(torch.zeros(1, 4), torch.tensor([1]))  # the rarest
        {'loss_cls': tensor(4.9972)}
    """

    def __init__(
        self,
        in_features: int,
        num_categories: int,
        *,
        counts: Sequence[int] | np.ndarray | Tensor,
        tau: float = 1.0,
        adjust: Moment = "training",
        background_count: float | None = None,
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
        self.counts = check_counts(counts, self.num_categories)
        self.tau = as_float(tau, "tau", lowest=-100, highest=100)
        if adjust not in MOMENTS:
            raise ValueError(f"Expected `adjust` to be one of {MOMENTS}, got {adjust!r}")
        self.adjust = adjust
        if background_count is not None:
            if background is None:
                raise ValueError(
                    "Expected no `background_count`, since there is no background, got "
                    f"{background_count}"
                )
            background_count = as_float(background_count, "background_count", lowest=0)
            if not 0 < background_count < math.inf:
                raise ValueError(
                    f"Expected `background_count` above 0 and finite, got {background_count}"
                )
        self.background_count = background_count
        self._adjustments = self._of_labels()

    def settings(self) -> dict[str, Any]:
        """What loss and scores depend on."""
        return {
            "counts": self.counts,
            "tau": self.tau,
            "adjust": self.adjust,
            "background_count": self.background_count,
        }

    def score_settings(self) -> tuple[str, ...]:
        """All of them if the adjustment is left to the test."""
        return tuple(self.settings()) if self.adjust == "test" else ("adjust",)

    def losses(
        self, logits: Tensor, labels: Tensor, generator: torch.Generator | None = None
    ) -> dict[str, Tensor]:
        """Return `loss_cls`; see `LinearClassifier.losses`."""
        logits, rows = self._rows(logits, labels)
        if self.adjust == "training":
            logits = logits + self._table("adjustments", self._adjustments, logits)
        return {"loss_cls": rows.mean(F.cross_entropy(logits, rows.labels, reduction="none"))}

    def scores(self, logits: Tensor) -> Tensor:
        """Return the softmax of the logits, adjusted if that is left to the test."""
        logits = self._checked(logits)
        if self.adjust == "test":
            logits = logits - self._table("adjustments", self._adjustments, logits)
        return logits.softmax(dim=1)

    def _of_labels(self) -> list[float]:
        """What is added to each label's logit."""
        counts = [max(count, 1) for count in self.counts]
        mean = math.fsum(counts) / len(counts)
        adjustments = [self.tau * math.log(count / mean) for count in counts]
        count = self.background_count
        of_background = 0.0 if count is None else self.tau * math.log(count / mean)
        if self.background == "first":
            adjustments.insert(0, of_background)
        elif self.background == "last":
            adjustments.append(of_background)
        return adjustments
