"""A better start for the head on frozen features: discriminant analysis, group by group.

Stage two trains a linear layer on features that do not change. What a linear layer makes of a
category with five examples depends much on where it starts: its softmax row, which had as few
examples, or the place that the means of the categories and the spread around them give it. One pass
over the features gathers these, and `add_discriminant` adds them to a head before it trains.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from balanced_group_softmax._arguments import as_float, as_int, shown
from balanced_group_softmax.head import BAGSHead
from balanced_group_softmax.layout import GroupLayout
from balanced_group_softmax.sampling import check_labels, check_layout

__all__ = ["FeatureStatistics", "add_discriminant", "discriminant_rows"]


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
        number = int(counts.sum())
        if number == 0:
            raise ValueError("Expected features of at least one category, got none")
        if not bool(self.products.isfinite().all()):
            raise ValueError("Expected finite features, got some that are not")
        between = (sums / counts.clamp(min=1)[:, None]).T @ sums
        return (self.products - between) / number


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
    shrinkage = as_float(shrinkage, "shrinkage", lowest=1e-9)
    layout, covariance = statistics.layout, statistics.covariance()
    size = float(covariance.diagonal().mean())
    if not size > 0:
        raise ValueError("Expected features that vary within a category, got none")
    identity = torch.eye(len(covariance), dtype=covariance.dtype, device=covariance.device)
    factor = torch.linalg.cholesky(covariance + shrinkage * size * identity)

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
        counted = torch.minimum(others_ratio * own.sum(), others)
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
    weight, bias = discriminant_rows(
        statistics, others_ratio=head.others_ratio, shrinkage=shrinkage
    )
    layout = statistics.layout
    differences = head.layout.differences(layout)
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
    if isinstance(strength, Sequence):
        strengths = [as_float(value, "strength", lowest=0) for value in strength]
        if len(strengths) != len(layout.groups):
            raise ValueError(
                f"Expected `strength` with {len(layout.groups)} numbers, one for each group of "
                f"categories, got {len(strengths)}"
            )
    else:
        strengths = [as_float(strength, "strength", lowest=0)] * len(layout.groups)
    starts = layout.group_starts[layout.num_groups - len(layout.groups) :]
    for start, group, factor in zip(starts, layout.groups, strengths, strict=True):
        columns = slice(start, start + 1 + len(group))
        head.fc.weight[columns] += (factor * weight[columns]).to(head.fc.weight)
        head.fc.bias[columns] += (factor * bias[columns]).to(head.fc.bias)
