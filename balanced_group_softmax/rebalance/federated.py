"""Federated loss: each step learns from the categories in it and from a few others, drawn."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from balanced_group_softmax._arguments import as_float, as_int
from balanced_group_softmax.layout import Background
from balanced_group_softmax.rebalance._shared import check_counts, check_labels, check_prior
from balanced_group_softmax.rebalance.linear_classifier import (
    LinearClassifier,
    log_odds_of_softmax,
    set_prior,
)

__all__ = ["FederatedClassifier"]


class FederatedClassifier(LinearClassifier):
    r"""One sigmoid for each category; only some categories count in a step.

    .. math:: \ell = \frac{1}{R} \sum_r \sum_{c \in S} \mathrm{BCE}(z_{rc}, [y_r = c])

    over the R rows that count. `S` holds every category among the labels, and others until there
    are `num_sampled`: drawn without replacement, each time in proportion to
    :math:`n_c^{\text{power}}` (a count of 0 is taken as 1). Where the labels alone have more,
    S is those.

    A category that is not in S gets no gradient. So frequent categories, which are drawn often,
    learn from most images that lack them, and rare ones are rarely pushed down by images that were
    never searched for them.

    Background has no logit: it is the row of which no category is true, and its score is
    :math:`\prod_c (1 - \sigma(z_c))`, which no detection depends on.

    detectron2 counts background as one of the `num_sampled` and so draws one category less; here S
    has exactly that many categories. It takes image counts for `counts`.

    `from_linear` starts each category at its odds against background, exactly; without background,
    at its odds against others of equal logits.

    Args:
        in_features: width of the features.
        num_categories: C, without background.
        counts: how frequent each category is, C integers: images that hold it, e.g. from
            :func:`balanced_group_softmax.counts.image_counts`.
        num_sampled: least number of categories in S, at least 1.
        power: of the counts.
        prior: probability at which fresh sigmoids begin, in (0, 1); CenterNet2's 0.01.

    `background`, `bias`, `ignore_index`, `device` and `dtype` are those of `LinearClassifier`.

    Raises:
        TypeError: if an argument is of the wrong type.
        ValueError: if a number is out of range, the convention unknown, or the counts do not fit.

    Source: Zhou et al., *Probabilistic two-stage detection*, arXiv:2103.07461, on LVIS;
    50 categories and the power 0.5 as there.

    Example:
        >>> head = FederatedClassifier(4, 3, counts=[1, 10, 100], num_sampled=2)
        >>> labels = torch.tensor([0, 0, 1])
        >>> head.draw(labels, torch.Generator().manual_seed(0))
        tensor([ True, False,  True])
        >>> head.losses(torch.zeros(3, 3), labels)
        {'loss_cls': tensor(1.3863)}
    """

    def __init__(
        self,
        in_features: int,
        num_categories: int,
        *,
        counts: Sequence[int] | np.ndarray | Tensor,
        num_sampled: int = 50,
        power: float = 0.5,
        prior: float = 1e-2,
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
        self.counts = check_counts(counts, self.num_categories)
        self.num_sampled = as_int(num_sampled, "num_sampled", lowest=1)
        self.power = as_float(power, "power", lowest=-10, highest=10)
        self._rates = [max(count, 1) ** self.power for count in self.counts]

    @property
    def num_logits(self) -> int:
        """C."""
        return self.num_categories

    def settings(self) -> dict[str, Any]:
        """What the loss depends on."""
        return {
            "counts": self.counts,
            "num_sampled": self.num_sampled,
            "power": self.power,
            "prior": self.prior,
        }

    def reset_parameters(self) -> None:
        """Start afresh: weights normal with standard deviation 0.01, sigmoids at the prior."""
        super().reset_parameters()
        set_prior(self.fc, self.prior)

    def draw(self, labels: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Draw the categories that count in a step with these labels.

        `losses` draws the same from the same state of the generator.

        Args:
            labels: integers [R] in the label convention.
            generator: random state on the device of the labels.

        Returns:
            bool [C].

        Raises:
            TypeError: if the labels are not integers.
            ValueError: if one is out of range (on the CPU), or they are not one-dimensional.
        """
        rows = self._count(check_labels(labels, self.num_labels, self.ignore_index))
        return self._draw(self._category_targets(rows), generator)

    def losses(
        self, logits: Tensor, labels: Tensor, generator: torch.Generator | None = None
    ) -> dict[str, Tensor]:
        """Return `loss_cls`; see `LinearClassifier.losses`."""
        logits, rows = self._rows(logits, labels)
        categories = self._category_targets(rows)
        chosen = self._draw(categories, generator)
        targets = categories[:, None] == torch.arange(self.num_categories, device=logits.device)
        logits = logits.masked_fill(~chosen, 0)  # nothing of the others is read
        values = F.binary_cross_entropy_with_logits(
            logits, targets.to(logits.dtype), reduction="none"
        )
        return {"loss_cls": rows.mean(values * chosen)}

    def scores(self, logits: Tensor) -> Tensor:
        """Return the sigmoids, and for background the product of one minus each."""
        logits = self._checked(logits)
        categories = logits.sigmoid()
        if self.background is None:
            return categories
        parts = [F.logsigmoid(-logits).sum(dim=1, keepdim=True).exp(), categories]
        return torch.cat(parts if self.background == "first" else parts[::-1], dim=1)

    def _draw(self, categories: Tensor, generator: torch.Generator | None) -> Tensor:
        if generator is not None and not isinstance(generator, torch.Generator):
            raise TypeError(
                f"Expected `generator` to be a torch.Generator or None, got "
                f"{type(generator).__name__}"
            )
        device = categories.device
        kind = torch.float32 if device.type == "mps" else torch.float64
        # One place more than there are categories, for the rows that have none.
        present = torch.zeros(self.num_categories + 1, dtype=torch.bool, device=device)
        present = present.index_fill(0, categories % (self.num_categories + 1), True)[:-1]
        source: dict[str, Any] = {} if generator is None else {"generator": generator}
        uniform = torch.rand(self.num_categories, dtype=kind, device=device, **source)
        # The smallest of exponential times with these rates are a draw without replacement in
        # proportion to the rates; categories that are present come before all.
        times = -torch.log1p(-uniform) / self._table("rates", self._rates, uniform)
        first = times.masked_fill(present, -1).argsort()[: self.num_sampled]
        return present.index_fill(0, first, True)

    def _from_softmax(self, rows: Tensor, *, is_bias: bool) -> Tensor:
        odds = log_odds_of_softmax(rows, self.foreground, self.background_label, is_bias=is_bias)
        return odds[self.foreground]
