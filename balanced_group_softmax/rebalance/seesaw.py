"""Seesaw loss: what a row does to other categories depends on counts so far and on scores."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from balanced_group_softmax._arguments import as_float
from balanced_group_softmax.layout import Background
from balanced_group_softmax.rebalance._shared import summed_over_processes
from balanced_group_softmax.rebalance.linear_classifier import LinearClassifier

__all__ = ["SeesawClassifier"]


class SeesawClassifier(LinearClassifier):
    r"""Softmax over categories with seesaw weights, and an objectness branch.

    For a row of category `i`, with :math:`N_j` the rows of category `j` seen so far, those of this
    step included, and :math:`\sigma` the softmax over categories:

    .. math:: \ell_i = -\log \frac{e^{z_i}}{e^{z_i} + \sum_{j \ne i} M_{ij} C_{ij} e^{z_j}},
        \quad M_{ij} = \min\Big(1, \frac{N_j}{N_i}\Big)^p,
        \quad C_{ij} = \max\Big(1, \frac{\sigma_j}{\max(\sigma_i, \epsilon)}\Big)^q

    Counts of 0 are taken as 1, and no gradient flows through the factors.

    With background there are C + 2 logits: the categories, then foreground and background, whose
    cross-entropy over all rows is the second loss. Scores are :math:`p(\text{foreground})\,
    \sigma_c`, which add up to 1 with that of background. Both losses are divided by the number of
    all rows that count, as mmdet's box head does. Without background the C logits and the first
    loss are all.

    The counts grow in training mode only. They are the buffer `cumulative_counts` (int64 [C]),
    saved and loaded, and summed over the processes of `torch.distributed` where that is
    initialised: every process then has to take the same steps. (mmdet counts in each process
    for itself.)

    `from_linear` keeps the rows of categories and of background. Foreground starts as the mean of
    the category rows plus log C, the logsumexp of C equal logits. So scores of categories relative
    to each other are those of the softmax classifier exactly, those of background nearly.

    Args:
        in_features: width of the features.
        num_categories: C, without background.
        p: exponent of the mitigation factor M, at least 0.
        q: exponent of the compensation factor C, at least 0.
        eps: least probability of a row's own category in the compensation factor, in (0, 1]; the
            paper has none, mmdet 0.01.

    `background`, `bias`, `ignore_index`, `device` and `dtype` are those of `LinearClassifier`.

    Raises:
        TypeError: if an argument is of the wrong type.
        ValueError: if a number is out of range or the convention unknown.

    Source: Wang et al., *Seesaw Loss for Long-Tailed Instance Segmentation*, CVPR 2021, section 3;
    p = 0.8 and q = 2 as there.

    Example:
        >>> head = SeesawClassifier(4, 3)
        >>> logits = head(torch.randn(6, 4))
        >>> list(head.losses(logits, torch.tensor([0, 0, 0, 1, 2, 3])))
        ['loss_cls_classes', 'loss_cls_objectness']
        >>> head.cumulative_counts
        tensor([1, 1, 1])
        >>> head.scores(logits).shape
        torch.Size([6, 4])
    """

    cumulative_counts: Tensor

    def __init__(
        self,
        in_features: int,
        num_categories: int,
        *,
        p: float = 0.8,
        q: float = 2.0,
        eps: float = 1e-2,
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
        self.p = as_float(p, "p", lowest=0, highest=100)
        self.q = as_float(q, "q", lowest=0, highest=100)
        self.eps = as_float(eps, "eps", lowest=1e-12, highest=1)
        # Integers: another floating-point type of the model leaves them alone.
        self.register_buffer(
            "cumulative_counts",
            torch.zeros(self.num_categories, dtype=torch.int64, device=self.fc.weight.device),
        )

    @property
    def num_logits(self) -> int:
        """C + 2, or C without background."""
        return self.num_categories + 2 * (self.background is not None)

    def settings(self) -> dict[str, Any]:
        """What the loss depends on."""
        return {"p": self.p, "q": self.q, "eps": self.eps}

    def reset_state(self) -> None:
        """Begin to count anew."""
        self.cumulative_counts.zero_()

    def losses(
        self, logits: Tensor, labels: Tensor, generator: torch.Generator | None = None
    ) -> dict[str, Tensor]:
        """Return `loss_cls_classes` and, with background, `loss_cls_objectness`.

        In training mode the rows are counted first; see `LinearClassifier.losses` for the rest.
        """
        logits, rows = self._rows(logits, labels)
        targets = self._category_targets(rows)
        foreground = targets >= 0
        categories = targets.clamp(min=0)
        if self.training:
            self._add_to_counts(categories, foreground)
        # Rows of background have no place in this softmax: nothing of theirs is read.
        classes = logits[:, : self.num_categories].masked_fill(~foreground[:, None], 0)
        adjusted = classes + self._log_factors(classes.detach(), categories)
        values = F.cross_entropy(adjusted, categories, reduction="none")
        losses = {"loss_cls_classes": rows.mean(values * foreground)}
        if self.background is not None:
            values = F.cross_entropy(
                logits[:, self.num_categories :], (~foreground).long(), reduction="none"
            )
            losses["loss_cls_objectness"] = rows.mean(values)
        return losses

    def scores(self, logits: Tensor) -> Tensor:
        """Return softmax over categories times p(foreground), and p(background)."""
        logits = self._checked(logits)
        categories = logits[:, : self.num_categories].softmax(dim=1)
        if self.background is None:
            return categories
        foreground, background = logits[:, self.num_categories :].softmax(dim=1).split(1, dim=1)
        categories = categories * foreground
        parts = [background, categories]
        return torch.cat(parts if self.background == "first" else parts[::-1], dim=1)

    @torch.no_grad()
    def _add_to_counts(self, categories: Tensor, foreground: Tensor) -> None:
        seen = torch.zeros_like(self.cumulative_counts)
        seen.index_add_(0, categories, foreground.long())
        self.cumulative_counts += summed_over_processes(seen)

    def _log_factors(self, classes: Tensor, categories: Tensor) -> Tensor:
        """Log of M times C, [R, C]; 0 in the column of a row's own category."""
        log_counts = self.cumulative_counts.clamp(min=1).to(classes.dtype).log()
        mitigation = (log_counts - log_counts[categories][:, None]).clamp(max=0)
        log_probabilities = classes.log_softmax(dim=1)
        own = log_probabilities.gather(1, categories[:, None])
        compensation = (log_probabilities - own.clamp(min=math.log(self.eps))).clamp(min=0)
        return self.p * mitigation + self.q * compensation

    def _from_softmax(self, rows: Tensor, *, is_bias: bool) -> Tensor:
        categories = rows[self.foreground]
        if self.background_label is None:
            return categories
        foreground = categories.mean(dim=0, keepdim=True)
        if is_bias:
            foreground = foreground + math.log(self.num_categories)
        return torch.cat([categories, foreground, rows[self.background_label][None]])
