"""Nearest class mean: a classifier without training, from the mean features of each category."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from balanced_group_softmax._arguments import as_float, as_int
from balanced_group_softmax.layout import Background
from balanced_group_softmax.rebalance._described import (
    DescribedModule,
    description_of,
    load_under,
    matrix_of,
)
from balanced_group_softmax.rebalance._shared import (
    check_background,
    check_labels,
    foreground_of,
    frozen_copy,
    summed_over_processes,
    widened,
)

__all__ = ["ClassMeans", "NearestClassMean"]

Metric = Literal["cosine", "euclidean"]
METRICS: tuple[str, ...] = get_args(Metric)


class ClassMeans:
    """Means of the features of each category, gathered batch by batch.

    Sums are kept in float64 ([C, F]; 118 MB for LVIS v1 and RoI features of 256 x 7 x 7), so that
    the order of the batches hardly matters. Rows of background and rows labelled -100 are left
    out: what the mean of everything else is says nothing of a single row.

    The original takes the features of the annotated boxes, not of proposals.

    Args:
        num_categories: C.
        num_features: F, after flattening.
        background: the label convention, "first", "last" or None.
        device: where the sums are kept. Features may come from elsewhere.

    Raises:
        TypeError: if a number is of the wrong type.
        ValueError: if a size is below 1 or the convention unknown.

    Example:
        >>> means = ClassMeans(2, 3)
        >>> means.update(torch.eye(3), torch.tensor([1, 1, 0]))
        >>> means.means()
        tensor([[0.5000, 0.5000, 0.0000],
                [   nan,    nan,    nan]], dtype=torch.float64)
        >>> means.counts
        tensor([2, 0])
    """

    def __init__(
        self,
        num_categories: int,
        num_features: int,
        *,
        background: Background = "first",
        device: torch.device | str | None = None,
    ) -> None:
        self.num_categories = as_int(num_categories, "num_categories", lowest=1)
        self.num_features = as_int(num_features, "num_features", lowest=1)
        self.background: Background = check_background(background)
        shape = (self.num_categories, self.num_features)
        self.sums = torch.zeros(shape, dtype=torch.float64, device=device)
        self.counts = torch.zeros(self.num_categories, dtype=torch.int64, device=device)

    @torch.no_grad()
    def update(self, features: Tensor, labels: Tensor) -> None:
        """Add a batch.

        Args:
            features: [R, F], or [R, F', h, w] with F = F' h w, which is flattened as in the
                original; pool before for a mean over places.
            labels: integers [R] in the label convention.

        Raises:
            TypeError: if an argument is of the wrong type.
            ValueError: if a shape does not fit, or a label is out of range (on the CPU).
        """
        rows = _flattened(features, self.num_features)
        num_labels = self.num_categories + (self.background is not None)
        labels = check_labels(labels, num_labels, ignore_index=-100)
        if len(labels) != len(rows):
            raise ValueError(f"Expected `labels` for {len(rows)} rows, got {len(labels)}")
        device = self.sums.device
        categories = labels.to(device) - foreground_of(self.background, self.num_categories).start
        counted = (categories >= 0) & (categories < self.num_categories)
        at = categories[counted]
        self.sums.index_add_(0, at, rows.to(device)[counted].double())
        self.counts.index_add_(0, at, torch.ones_like(at))

    def merge(self, other: ClassMeans) -> None:
        """Add what another has gathered.

        Raises:
            TypeError: if it is no `ClassMeans`.
            ValueError: if its sizes or label convention differ.
        """
        if not isinstance(other, ClassMeans):
            raise TypeError(f"Expected `other` to be a ClassMeans, got {type(other).__name__}")
        mine, theirs = (
            (means.num_categories, means.num_features, means.background) for means in (self, other)
        )
        if mine != theirs:
            raise ValueError(
                f"Expected `other` with categories, features, background {mine}, got {theirs}"
            )
        self.sums += other.sums.to(self.sums.device)
        self.counts += other.counts.to(self.counts.device)

    def all_reduce(self) -> None:
        """Add what the other processes of `torch.distributed` have gathered; each calls it once."""
        summed_over_processes(self.sums)
        summed_over_processes(self.counts)

    def means(self) -> Tensor:
        """The means, float64 [C, F]; NaN for categories without any row."""
        return self.sums / self.counts[:, None]


class NearestClassMean(DescribedModule):
    r"""A box classifier that scores categories by their nearness to class means.

    With the mean :math:`m_c` of a category and a temperature T:

    .. math:: \text{cosine: } z_c = \frac{x \cdot m_c}{\|x\| \|m_c\| T}, \qquad
        \text{euclidean: } z_c = \frac{x \cdot m_c - \frac12 \|m_c\|^2}{T}

    the latter being :math:`-\frac{1}{2T} \|x - m_c\|^2` up to what all categories share. Scores are

    .. math:: s_c = \mathrm{softmax}_c(z) \cdot (1 - s_{bg})

    with :math:`s_{bg}` the background probability of a trained softmax classifier, since background
    has no mean of its own; this is how the original does it, with the cosine and T = 1, at
    which its scores are nearly flat. A category that was never seen has no mean and score 0.

    Logits are :math:`z` and the log-odds of background, in the columns of the label convention, so
    that it meets the protocol of the adapters at test. There is nothing to train: `losses` raises.

    Box-head features come as [R, F] (NCM-fc; the original reads them before the last ReLU).
    For RoI features (NCM-conv) means and rows are flattened, and `background_features` are the
    box-head features that the softmax classifier reads; a detector's adapter hands on box-head
    features only.

    Means, counts, the softmax classifier and a description of all are in the state dict
    (`from_state_dict`).

    Args:
        means: float [C, F]; rows of categories without examples may hold anything.
        counts: integers [C], rows behind each mean; 0 for a category without examples.
        softmax: the trained softmax classifier, an output for each label; needed where there is
            background. It is copied and does not train.
        metric: "cosine" or "euclidean".
        temperature: above 0.
        background: the label convention, "first", "last" or None.

    Raises:
        TypeError: if an argument is of the wrong type.
        ValueError: if shapes do not fit, no category has examples, a mean is not finite, or a
            softmax classifier is missing or superfluous.

    Source: Mensink et al., *Distance-Based Image Classification*, TPAMI 2013, section 3; Li et al.,
    CVPR 2020, section 5 and its released code.

    Example:
        >>> means = ClassMeans(3, 4, background=None)
        >>> means.update(torch.eye(4)[:2], torch.tensor([0, 1]))
        >>> classifier = NearestClassMean.from_means(means)
        >>> classifier.scores(classifier(torch.eye(4)[:2])).argmax(dim=1)
        tensor([0, 1])
    """

    class_means: Tensor
    class_counts: Tensor

    def __init__(
        self,
        means: Tensor,
        counts: Tensor,
        *,
        softmax: nn.Linear | None = None,
        metric: Metric = "cosine",
        temperature: float = 1.0,
        background: Background = "first",
    ) -> None:
        super().__init__()
        if not isinstance(means, Tensor) or means.ndim != 2 or not means.dtype.is_floating_point:
            raise TypeError("Expected `means` to be a floating-point Tensor [C, F]")
        if not isinstance(counts, Tensor) or counts.dtype.is_floating_point:
            raise TypeError("Expected `counts` to be an integer Tensor [C]")
        if counts.shape != means.shape[:1]:
            raise ValueError(
                f"Expected `counts` of {len(means)} categories, got shape {list(counts.shape)}"
            )
        seen = (counts > 0).to(means.device)
        if not bool(seen.any()):
            raise ValueError("Expected at least one category with examples, got none")
        if not bool(means[seen].isfinite().all()):
            raise ValueError("Expected finite `means` of categories with examples")
        if metric not in METRICS:
            raise ValueError(f"Expected `metric` to be one of {METRICS}, got {metric!r}")
        self.metric = metric
        self.temperature = as_float(temperature, "temperature", lowest=1e-12, highest=1e12)
        self.background: Background = check_background(background)
        self.num_categories, self.in_features = means.shape
        if (softmax is None) != (background is None):
            raise ValueError(
                "Expected `softmax`, a trained classifier, exactly where there is background, got "
                f"{type(softmax).__name__} and background {background!r}"
            )
        if softmax is not None:
            if not isinstance(softmax, nn.Linear):
                raise TypeError(
                    f"Expected `softmax` to be an nn.Linear, got {type(softmax).__name__}"
                )
            if softmax.out_features != self.num_categories + 1:
                raise ValueError(
                    f"Expected `softmax` with {self.num_categories + 1} outputs, got "
                    f"{softmax.out_features}"
                )
        self.softmax = None if softmax is None else frozen_copy(softmax)
        # Zeros in place of whatever stands for a mean that is none.
        values = torch.where(seen[:, None], means.detach(), means.new_zeros(()))
        dtype = torch.float64 if means.dtype == torch.float64 else torch.float32
        self.register_buffer("class_means", values.to(dtype))
        self.register_buffer("class_counts", counts.detach().to(torch.int64).clone())

    @classmethod
    def from_means(
        cls,
        means: ClassMeans,
        *,
        softmax: nn.Linear | None = None,
        metric: Metric = "cosine",
        temperature: float = 1.0,
        dtype: torch.dtype = torch.float32,
    ) -> NearestClassMean:
        """Make a classifier of gathered means; the arguments are those of the class."""
        if not isinstance(means, ClassMeans):
            raise TypeError(f"Expected `means` to be ClassMeans, got {type(means).__name__}")
        return cls(
            means.means().to(dtype),
            means.counts,
            softmax=softmax,
            metric=metric,
            temperature=temperature,
            background=means.background,
        )

    @classmethod
    def from_state_dict(cls, state_dict: Mapping[str, Any], prefix: str = "") -> NearestClassMean:
        """Make the classifier that a checkpoint describes.

        Args:
            state_dict: of the classifier, or of a whole detector.
            prefix: what the classifier's keys begin with.

        Raises:
            ValueError: if the entries are missing or of another method.
        """
        about = description_of(cls, state_dict, prefix)
        means = matrix_of(state_dict, f"{prefix}class_means")
        softmax = None
        if about["background"] is not None:
            weight = matrix_of(state_dict, f"{prefix}softmax.weight")
            bias = f"{prefix}softmax.bias" in state_dict
            softmax = nn.Linear(weight.shape[1], len(weight), bias, weight.device, weight.dtype)
        made = cls(
            means,
            torch.ones(len(means), dtype=torch.int64, device=means.device),
            softmax=softmax,
            background=about["background"],
            **about["settings"],
        )
        load_under(made, state_dict, prefix)
        return made

    def settings(self) -> dict[str, Any]:
        """Metric and temperature."""
        return {"metric": self.metric, "temperature": self.temperature}

    def score_settings(self) -> tuple[str, ...]:
        """All of them."""
        return tuple(self.settings())

    if TYPE_CHECKING:  # to torch it is Any

        def __call__(  # noqa: D102
            self, features: Tensor, background_features: Tensor | None = None
        ) -> Tensor: ...

    def forward(self, features: Tensor, background_features: Tensor | None = None) -> Tensor:
        """Logits of features.

        Args:
            features: [R, F], or [R, F', h, w] with F = F' h w.
            background_features: what the softmax classifier reads; `features` unless told.

        Returns:
            [R, C + 1] in the label convention, or [R, C] without background; minus infinity for
            categories without examples.
        """
        rows = widened(_flattened(features, self.in_features))
        means = self.class_means.to(rows.dtype)
        if self.metric == "cosine":
            nearness = F.normalize(rows, dim=1) @ F.normalize(means, dim=1).T
        else:
            nearness = rows @ means.T - means.square().sum(dim=1) / 2
        logits = (nearness / self.temperature).masked_fill(self.class_counts == 0, -torch.inf)
        if self.softmax is None:
            return logits
        plain = self.softmax(features if background_features is None else background_features)
        plain = widened(plain).to(logits.dtype)
        at = 0 if self.background == "first" else self.num_categories
        categories = plain[:, foreground_of(self.background, self.num_categories)]
        log_odds = plain[:, at, None] - categories.logsumexp(dim=1, keepdim=True)
        parts = [log_odds, logits]
        return torch.cat(parts if self.background == "first" else parts[::-1], dim=1)

    def losses(self, logits: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """Raise RuntimeError: means are gathered, not trained."""
        raise RuntimeError(
            "Expected no training of a nearest-class-mean classifier: gather ClassMeans instead"
        )

    def scores(self, logits: Tensor) -> Tensor:
        """Return scores [R, num_labels] of logits of `forward`."""
        if not isinstance(logits, Tensor):
            raise TypeError(f"Expected `logits` to be a Tensor, got {type(logits).__name__}")
        width = self.num_categories + (self.background is not None)
        if logits.ndim != 2 or logits.shape[1] != width:
            raise ValueError(f"Expected `logits` of shape [R, {width}], got {list(logits.shape)}")
        logits = widened(logits)
        foreground = foreground_of(self.background, self.num_categories)
        categories = logits[:, foreground].softmax(dim=1)
        if self.background is None:
            return categories
        at = 0 if self.background == "first" else self.num_categories
        log_odds = logits[:, at, None]
        parts = [log_odds.sigmoid(), categories * (-log_odds).sigmoid()]
        return torch.cat(parts if self.background == "first" else parts[::-1], dim=1)

    def extra_repr(self) -> str:
        """The settings, for printing."""
        return (
            f"num_categories={self.num_categories}, in_features={self.in_features}, "
            f"metric={self.metric!r}, temperature={self.temperature:g}, "
            f"background={self.background!r}"
        )


def _flattened(features: Tensor, num_features: int) -> Tensor:
    if not isinstance(features, Tensor) or not features.dtype.is_floating_point:
        raise TypeError("Expected `features` to be a floating-point Tensor")
    if features.ndim < 2 or features[:1].numel() not in (0, num_features):
        raise ValueError(
            f"Expected `features` of shape [R, {num_features}], or [R, ...] with as many numbers "
            f"in a row, got {list(features.shape)}"
        )
    return features.reshape(len(features), num_features)
