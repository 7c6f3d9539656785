"""More from frozen features: discriminant analysis, group by group, beside the trained head.

Stage two trains a linear layer on features that do not change. A row that five examples have
trained is poor, while the mean of five examples, and the spread around means that all categories
share, are known better. One pass over the features gathers these (`FeatureStatistics`). They serve
twice: `add_discriminant` gives a head a better start; `DiscriminantHead` also asks them at test.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from balanced_group_softmax._arguments import as_float, as_int, shown
from balanced_group_softmax.head import BAGSHead
from balanced_group_softmax.layout import GroupLayout
from balanced_group_softmax.sampling import check_labels, check_layout

__all__ = ["DiscriminantHead", "FeatureStatistics", "add_discriminant", "discriminant_rows"]

ROUNDING = 1e-13
"""Of the mean square: a variance below it is what float64 leaves of the difference of two sums."""


class FeatureStatistics:
    """Means of the features of each label, and how features of a category spread around theirs.

    Sums are kept in float64 ([num_labels, F] and [F, F]; 18 MB for LVIS v1 and 1024 features), so
    that the order of the batches hardly matters.

    Args:
        layout: the groups, for their label convention.
        num_features: F.
        ignore_index: the label of rows that take part in nothing.
        device: where the sums are kept. Features may come from elsewhere.

    Raises:
        TypeError: if an argument is of the wrong type.
        ValueError: if `num_features` is below 1.

    Example:
        >>> layout = GroupLayout.from_counts([3, 2500])
        >>> statistics = FeatureStatistics(layout, 2)
        >>> features = torch.tensor([[0.0, 0.0], [1.0, 2.0], [3.0, 2.0], [5.0, 5.0]])
        >>> statistics.update(features, torch.tensor([0, 1, 1, 2]))
        >>> statistics.means()[1]
        tensor([2., 2.], dtype=torch.float64)
        >>> statistics.counts
        tensor([1, 2, 1])
    """

    def __init__(
        self,
        layout: GroupLayout,
        num_features: int,
        *,
        ignore_index: int = -100,
        device: torch.device | str | None = None,
    ) -> None:
        check_layout(layout)
        self.layout = layout
        self.num_features = as_int(num_features, "num_features", lowest=1)
        self.ignore_index = as_int(ignore_index, "ignore_index")
        number = layout.num_labels
        self.counts = torch.zeros(number, dtype=torch.int64, device=device)
        self.sums = torch.zeros(number, self.num_features, dtype=torch.float64, device=device)
        """Of the features of each label."""
        self.products = torch.zeros(
            self.num_features, self.num_features, dtype=torch.float64, device=device
        )
        """Of the features of categories with each other."""

    @torch.no_grad()
    def update(self, features: Tensor, labels: Tensor) -> None:
        """Add a batch.

        Args:
            features: floating point [R, F].
            labels: integers [R] in the layout's label convention.

        Raises:
            TypeError: if an argument is of the wrong type.
            ValueError: if a shape does not fit, or a label is out of range (on the CPU).
        """
        if not isinstance(features, Tensor) or not features.dtype.is_floating_point:
            raise TypeError(
                f"Expected `features` to be a floating-point Tensor, got {shown(features)}"
            )
        if features.ndim != 2 or features.shape[1] != self.num_features:
            raise ValueError(
                f"Expected `features` of shape [R, {self.num_features}], got {list(features.shape)}"
            )
        labels = check_labels(labels, self.layout, self.ignore_index)
        if len(labels) != len(features):
            raise ValueError(f"Expected `labels` for {len(features)} rows, got {len(labels)}")
        device = self.sums.device
        labels = labels.to(device)
        counted = labels != self.ignore_index
        rows, labels = features.to(device)[counted].double(), labels[counted]
        self.counts.index_add_(0, labels, torch.ones_like(labels))
        self.sums.index_add_(0, labels, rows)
        if self.layout.background_label is not None:
            rows = rows[labels != self.layout.background_label]
        self.products.addmm_(rows.T, rows)

    def merge(self, other: FeatureStatistics) -> None:
        """Add what another has gathered.

        Raises:
            TypeError: if it is no `FeatureStatistics`.
            ValueError: if its layout or width differs.
        """
        if not isinstance(other, FeatureStatistics):
            raise TypeError(f"Expected `other` to be FeatureStatistics, got {type(other).__name__}")
        if other.layout != self.layout or other.num_features != self.num_features:
            raise ValueError(
                f"Expected `other` of the same layout and {self.num_features} features, got "
                f"{other.layout} and {other.num_features}"
            )
        for mine, theirs in zip(self._sums(), other._sums(), strict=True):
            mine += theirs.to(mine.device)

    def all_reduce(self) -> None:
        """Add what the other processes of `torch.distributed` have gathered; each calls it once."""
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            for values in self._sums():
                torch.distributed.all_reduce(values)

    def _sums(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.counts, self.sums, self.products

    def means(self) -> Tensor:
        """The mean of each label, float64 [num_labels, F]; NaN for labels without any row."""
        return self.sums / self.counts[:, None]

    def covariance(self) -> Tensor:
        """The covariance of features around the mean of their category, float64 [F, F].

        Background is left out: it spreads far wider than any category.

        Raises:
            ValueError: if no category has a row, or features are not finite.
        """
        counts, sums = self.counts[self.layout.foreground], self.sums[self.layout.foreground]
        number = _num_foreground(self)
        if number == 0:
            raise ValueError("Expected features of at least one category, got none")
        if not all(bool(values.isfinite().all()) for values in (self.sums, self.products)):
            raise ValueError("Expected finite features, got some that are not")
        between = (sums / counts.clamp(min=1)[:, None]).T @ sums
        return (self.products - between) / number


def _num_foreground(statistics: FeatureStatistics) -> int:
    """How many rows of categories were gathered."""
    return int(statistics.counts[statistics.layout.foreground].sum())


def discriminant_rows(
    statistics: FeatureStatistics, *, others_ratio: float = 8.0, shrinkage: float = 0.1
) -> tuple[Tensor, Tensor]:
    r"""Return linear discriminant analysis of each group as rows of a head.

    If the features of every column of a group were normally distributed around a mean of its own,
    with one covariance :math:`\Sigma` for all, the group's softmax would be exactly that of

    .. math:: z_j = m_j^\top P x - \tfrac12 m_j^\top P m_j + \log \pi_j, \qquad
        P = \big(\Sigma + \lambda \tfrac{\mathrm{tr} \Sigma}{F} I\big)^{-1}

    with the mean :math:`m_j` of a category or of all its group's others, the covariance around the
    means of the categories, and shares :math:`\pi_j` as the loss counts rows: others are
    `others_ratio` times the foreground of the group, if there are as many. The rows of group 0 are
    zero: neither background nor foreground is anything like normal. A category without rows is
    taken as others that were seen once.

    Args:
        statistics: of the features that the head reads in training.
        others_ratio: that of the head.
        shrinkage: lambda, above 0.

    Returns:
        float64 weight [L, F] and bias [L], on the device of the statistics.

    Raises:
        TypeError: if an argument is of the wrong type.
        ValueError: if a number is out of range, no category has a row, features are not finite, or
            do not vary.

    Source: Fisher, *The use of multiple measurements in taxonomic problems*, 1936, in its form for
    several classes with a shrunken covariance; for the groups, this library.
    """
    if not isinstance(statistics, FeatureStatistics):
        raise TypeError(
            f"Expected `statistics` to be FeatureStatistics, got {type(statistics).__name__}"
        )
    others_ratio = as_float(others_ratio, "others_ratio", lowest=0)
    shrinkage = _finite(shrinkage, "shrinkage", lowest=1e-9)
    layout, covariance = statistics.layout, statistics.covariance()
    size = float(covariance.diagonal().mean())
    power = float(statistics.products.diagonal().mean()) / _num_foreground(statistics)
    identity = torch.eye(len(covariance), dtype=covariance.dtype, device=covariance.device)
    factor, failed = torch.linalg.cholesky_ex(covariance + shrinkage * size * identity)
    if not size > ROUNDING * power or int(failed):
        raise ValueError(
            "Expected features that vary within a category by more than rounding, got a variance "
            f"of {size:g} where their mean square is {power:g}"
        )

    weight = torch.zeros(
        layout.num_logits, statistics.num_features, dtype=torch.float64, device=covariance.device
    )
    bias = torch.zeros_like(weight[:, 0])
    counts, sums = statistics.counts.double(), statistics.sums
    starts = layout.group_starts[layout.num_groups - len(layout.groups) :]
    for start, group in zip(starts, layout.groups, strict=True):
        at = torch.tensor(group, dtype=torch.int64, device=counts.device) + layout.foreground.start
        own = counts[at]
        others = counts.sum() - own.sum()
        mean = (sums.sum(dim=0) - sums[at].sum(dim=0)) / others.clamp(min=1)
        means = torch.where(
            own[:, None] > 0, sums[at] / own.clamp(min=1)[:, None], mean[None].expand(len(at), -1)
        )
        means = torch.cat([mean[None], means])
        # A group that was never seen counts no others, whatever the ratio: inf * 0 is NaN.
        counted = torch.minimum((others_ratio * own.sum()).nan_to_num(nan=0.0), others)
        shares = torch.cat([counted[None], own]).clamp(min=1)
        rows = torch.cholesky_solve(means.T, factor).T
        columns = slice(start, start + len(means))
        weight[columns] = rows
        bias[columns] = (shares / shares.sum()).log() - (rows * means).sum(dim=1) / 2
    return weight, bias


@torch.no_grad()
def add_discriminant(
    head: BAGSHead,
    statistics: FeatureStatistics,
    *,
    strength: float | Sequence[float] = 0.1,
    shrinkage: float = 0.1,
) -> None:
    """Add linear discriminant analysis to a head, in place, before it trains.

    Features are far from normal, and by itself the analysis is a poor detector. In a small part it
    tells a head that starts from a softmax classifier (`BAGSHead.from_linear`) where rare
    categories are. docs/study.md has what that gives.

    Args:
        head: on frozen features; its layout is that of the statistics.
        statistics: of the features that it reads in training.
        strength: what the rows are multiplied by: one number, or one for each group of categories,
            in the order of `layout.groups`. 0 leaves a group as it is.
        shrinkage: as for `discriminant_rows`.

    Raises:
        TypeError: if an argument is of the wrong type.
        ValueError: if the layouts differ, a number is out of range, or the head has no bias.

    Example:
        >>> layout = GroupLayout.from_counts([3, 2500])
        >>> head, statistics = BAGSHead(4, layout), FeatureStatistics(layout, 4)
        >>> statistics.update(torch.randn(30, 4), torch.arange(30) % 3)
        >>> add_discriminant(head, statistics, strength=[0.1, 0.0])
    """
    if not isinstance(head, BAGSHead):
        raise TypeError(f"Expected `head` to be a BAGSHead, got {type(head).__name__}")
    weight, bias = _rows_for(head, statistics, shrinkage)
    layout = head.layout
    if isinstance(strength, Sequence):
        strengths = [_finite(value, "strength", lowest=0) for value in strength]
        if len(strengths) != len(layout.groups):
            raise ValueError(
                f"Expected `strength` with {len(layout.groups)} numbers, one for each group of "
                f"categories, got {len(strengths)}"
            )
    else:
        strengths = [_finite(strength, "strength", lowest=0)] * len(layout.groups)
    starts = layout.group_starts[layout.num_groups - len(layout.groups) :]
    for start, group, factor in zip(starts, layout.groups, strengths, strict=True):
        columns = slice(start, start + 1 + len(group))
        head.fc.weight[columns] += (factor * weight[columns]).to(head.fc.weight)
        head.fc.bias[columns] += (factor * bias[columns]).to(head.fc.bias)


def _finite(value: float, name: str, *, lowest: float) -> float:
    number = as_float(value, name, lowest=lowest)
    if not math.isfinite(number):
        raise ValueError(f"Expected `{name}` to be finite, got {number}")
    return number


def _rows_for(
    head: BAGSHead, statistics: FeatureStatistics, shrinkage: float
) -> tuple[Tensor, Tensor]:
    """`discriminant_rows` for a head, if the statistics are of what it reads."""
    weight, bias = discriminant_rows(
        statistics, others_ratio=head.others_ratio, shrinkage=shrinkage
    )
    differences = head.layout.differences(statistics.layout)
    if differences:
        raise ValueError(
            f"Expected `statistics` of the head's layout, got another: {'; '.join(differences)}"
        )
    if statistics.num_features != head.in_features:
        raise ValueError(
            f"Expected `statistics` of {head.in_features} features, which the head reads, got "
            f"{statistics.num_features}"
        )
    if head.fc.bias is None:
        raise ValueError("Expected `head` with a bias, got one without")
    return weight, bias


class DiscriminantHead(BAGSHead):
    r"""A `BAGSHead` whose scores are the mean with discriminant analysis in each group.

    .. math:: s_c = \tfrac12 \big(p_g(c) + q_g(c)\big) \, p_0(fg)

    with :math:`p` of the trained linear layer and :math:`q` of the analysis, which is fixed
    (`discriminant_rows`). Background against foreground is the trained layer's alone. Without
    background it is the mean of both joint scores.

    `forward` returns the logits of both, [R, 2 L]; loss and scores take these. Make it with
    `from_linear`, `fit` it once to statistics of the features, and train: until it is fitted its
    analysis knows nothing, all of a group alike. The state dict is that of `BAGSHead` with
    `discriminant_weight` and `discriminant_bias`.

    Args:
        in_features: width of the features.
        layout: the groups.
        **settings: as for `BAGSHead`.

    Source: this library; docs/study.md has how it was chosen and what it gives.

    Example:
        >>> layout = GroupLayout.from_counts([3, 2500])
        >>> head, statistics = DiscriminantHead(4, layout), FeatureStatistics(layout, 4)
        >>> features, labels = torch.randn(30, 4), torch.arange(30) % 3
        >>> statistics.update(features, labels)
        >>> head.fit(statistics)
        >>> logits = head(features)
        >>> head.loss(logits, labels).backward()
        >>> logits.shape, head.scores(logits).shape
        (torch.Size([30, 12]), torch.Size([30, 3]))
    """

    discriminant_weight: Tensor
    discriminant_bias: Tensor

    def __init__(self, in_features: int, layout: GroupLayout, **settings: Any) -> None:
        super().__init__(in_features, layout, **settings)
        weight = self.fc.weight.detach()
        self.register_buffer("discriminant_weight", torch.zeros_like(weight))
        self.register_buffer("discriminant_bias", torch.zeros_like(weight[:, 0]))

    @classmethod
    def from_linear(
        cls, linear: torch.nn.Linear, layout: GroupLayout, **settings: Any
    ) -> DiscriminantHead:
        """Start the linear layer from a trained softmax classifier; see `BAGSHead.from_linear`."""
        head = super().from_linear(linear, layout, **settings)
        head.discriminant_weight.zero_()
        head.discriminant_bias.zero_()
        return head

    @torch.no_grad()
    def fit(
        self,
        statistics: FeatureStatistics,
        *,
        strength: float | Sequence[float] = 0.1,
        shrinkage: float = 0.1,
    ) -> None:
        """Take the analysis from statistics of the features, and let the linear layer start there.

        Args:
            statistics: of the features that the head reads in training.
            strength: of the start, as for `add_discriminant`; 0 for none.
            shrinkage: as for `discriminant_rows`.

        Raises:
            TypeError: if an argument is of the wrong type.
            ValueError: as for `add_discriminant`.
        """
        add_discriminant(self, statistics, strength=strength, shrinkage=shrinkage)
        weight, bias = _rows_for(self, statistics, shrinkage)
        self.discriminant_weight.copy_(weight)
        self.discriminant_bias.copy_(bias)

    def forward(self, features: Tensor) -> Tensor:
        """Group logits [R, 2 L] of `features` [R, in_features]: trained, then of the analysis."""
        # Sums of large terms that nearly cancel: not in 8 or 11 bits, whatever autocast says.
        with torch.autocast(features.device.type, enabled=False):
            wide = torch.promote_types(features.dtype, torch.float32)
            fixed = features.to(wide) @ self.discriminant_weight.to(wide).T
            fixed = fixed + self.discriminant_bias.to(wide)
        trained = super().forward(features)
        return torch.cat([trained.to(fixed.dtype), fixed.detach()], dim=1)

    def _loss(
        self,
        logits: Tensor,
        labels: Tensor,
        generator: torch.Generator | None,
        reduction: Literal["sum", "groups"],
    ) -> Tensor:
        return super()._loss(self._halves(logits)[0], labels, generator, reduction)

    def scores(self, logits: Tensor) -> Tensor:
        """Scores [R, num_labels] of `logits` [R, 2 L], columns in the label convention."""
        trained, fixed = self._halves(logits)
        own = self.layout.num_logits - sum(1 + len(group) for group in self.layout.groups)
        fixed = torch.cat([trained[:, :own], fixed[:, own:]], dim=1)
        return (super().scores(trained) + super().scores(fixed)) / 2

    def _halves(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        width = self.layout.num_logits
        if not isinstance(logits, Tensor):
            raise TypeError(f"Expected `logits` to be a Tensor, got {type(logits).__name__}")
        if logits.ndim != 2 or logits.shape[1] != 2 * width:
            raise ValueError(
                f"Expected `logits` of shape [R, {2 * width}], of `forward`, got "
                f"{list(logits.shape)}"
            )
        return logits[:, :width], logits[:, width:]
