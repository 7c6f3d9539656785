"""What the trained classifiers of this package share: a linear layer, checks, and a state dict.

A method is a subclass that says how many logits it has, what they mean in training (`losses`) and
at test (`scores`). Each meets `balanced_group_softmax.adapters.protocol.Classifier`, so that it can
take the place of a detector's last classification layer.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from balanced_group_softmax._arguments import as_int, shown
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
    widened,
)

__all__ = ["LinearClassifier"]

_Made = TypeVar("_Made", bound="LinearClassifier")


class Rows(NamedTuple):
    """Labels of a step, ready to be used on the device without asking it anything."""

    labels: Tensor  # int64 [R]; 0 where the row does not count
    counted: Tensor  # bool [R]: neither ignored nor out of range
    number: Tensor  # float scalar: rows that count, at least 1
    poison: Tensor  # float scalar: 0, or NaN if a label is out of range

    def mean(self, values: Tensor) -> Tensor:
        """Sum of values [R] or [R, K] over the rows that count, divided by their number."""
        counted = self.counted if values.ndim == 1 else self.counted[:, None]
        zero = values.new_zeros(())
        total: Tensor = torch.where(counted, values, zero).sum()
        return total / self.number + self.poison


class LinearClassifier(DescribedModule):
    """A linear layer with a loss and scores of its own: the base of the methods.

    The state dict holds `fc.weight`, `fc.bias`, what the method counts in training, and a
    description of the method (see `DescribedModule`), from which `from_state_dict` makes it anew.

    Args:
        in_features: width of the features.
        num_categories: C, without background.
        background: the label convention: "first" (background is label 0, categories 1..C), "last"
            (categories 0..C-1, background C) or None (categories 0..C-1).
        bias: whether the linear layer has a bias.
        ignore_index: the label of rows that take part in nothing.
        device: where the weights are made.
        dtype: of the weights.

    Raises:
        TypeError: if a number is of the wrong type.
        ValueError: if a size is below 1 or the convention is unknown.
    """

    def __init__(
        self,
        in_features: int,
        num_categories: int,
        *,
        background: Background = "first",
        bias: bool = True,
        ignore_index: int = -100,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        in_features = as_int(in_features, "in_features", lowest=1)
        self.num_categories = as_int(num_categories, "num_categories", lowest=1)
        self.background: Background = check_background(background)
        self.ignore_index = as_int(ignore_index, "ignore_index")
        if not -(2**63) <= self.ignore_index < 2**63:
            raise ValueError(f"Expected `ignore_index` to fit 64 bits, got {ignore_index}")
        self._tables: dict[tuple[str, torch.device, torch.dtype], Tensor] = {}
        self.fc = nn.Linear(in_features, self.num_logits, bias=bias, device=device, dtype=dtype)
        self.reset_parameters()

    @classmethod
    def from_linear(
        cls: type[_Made],
        linear: nn.Linear,
        *,
        background: Background = "first",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **settings: Any,
    ) -> _Made:
        """Start from a trained softmax classifier.

        What of it is kept exactly is said by each method. A bias that `linear` lacks is zero.

        Args:
            linear: maps features to one logit for each label, in the convention of `background`.
            background: the label convention.
            device: where the weights are made; by default where those of `linear` are.
            dtype: of the weights; by default that of `linear`.
            **settings: the method's own.

        Raises:
            TypeError: if `linear` is not an `nn.Linear`, or a setting is unknown.
            ValueError: if it has too few outputs, or a setting does not fit.
        """
        if not isinstance(linear, nn.Linear):
            raise TypeError(f"Expected `linear` to be an nn.Linear, got {type(linear).__name__}")
        num_categories = linear.out_features - (check_background(background) is not None)
        if num_categories < 1:
            raise ValueError(
                f"Expected `linear` with an output for each label (background {background!r}), "
                f"got {linear.out_features}"
            )
        made = cls(
            linear.in_features,
            num_categories,
            background=background,
            device="meta",  # fresh weights would only move the random state
            dtype=linear.weight.dtype if dtype is None else dtype,
            **settings,
        )
        made.to_empty(device=linear.weight.device if device is None else device)
        made.reset_state()
        biases = linear.bias
        if biases is None:
            biases = linear.weight.new_zeros(linear.out_features)
        with torch.no_grad():
            made.fc.weight.copy_(made._from_softmax(linear.weight, is_bias=False))
            if made.fc.bias is not None:
                made.fc.bias.copy_(made._from_softmax(biases, is_bias=True))
        return made

    @classmethod
    def from_state_dict(cls: type[_Made], state_dict: Mapping[str, Any], prefix: str = "") -> _Made:
        """Make the classifier that a checkpoint describes, and load it.

        Args:
            state_dict: of the classifier, or of a whole detector.
            prefix: what the classifier's keys begin with, e.g.
                `"roi_heads.box_predictor.cls_score."`.

        Raises:
            ValueError: if the entries are missing or of another method.
        """
        about = description_of(cls, state_dict, prefix)
        weight = matrix_of(state_dict, f"{prefix}fc.weight")
        made = cls(
            weight.shape[1],
            about["num_categories"],
            background=about["background"],
            bias=f"{prefix}fc.bias" in state_dict,
            device="meta",
            dtype=weight.dtype,
            **about["settings"],
        )
        made.to_empty(device=weight.device)
        made.reset_state()
        load_under(made, state_dict, prefix)
        return made

    # --- what a method says of itself ------------------------------------------------------------

    @property
    def num_logits(self) -> int:
        """L; one for each label unless the method says otherwise."""
        return self.num_labels

    def describe(self) -> dict[str, Any]:
        """What the extra state holds: the method's name, sizes and settings."""
        about = super().describe()
        return {**about, "settings": {**about["settings"], "ignore_index": self.ignore_index}}

    def losses(
        self, logits: Tensor, labels: Tensor, generator: torch.Generator | None = None
    ) -> dict[str, Tensor]:
        """Return scalar losses by name for logits [R, L] and labels [R].

        Rows labelled `ignore_index` take part in nothing and get no gradient, whatever is in them;
        without any row that counts the losses are 0. Labels out of range raise on the CPU;
        elsewhere, where looking would wait for the device, they make the losses NaN.

        Args:
            logits: floating point [R, L]; computed in float32 at least.
            labels: integers [R] in the label convention.
            generator: random state, for methods that draw.

        Raises:
            TypeError: for an argument of the wrong type or dtype.
            ValueError: for one of the wrong shape, device or value.
        """
        raise NotImplementedError

    def scores(self, logits: Tensor) -> Tensor:
        """Return scores [R, num_labels] in [0, 1], columns in the label convention."""
        raise NotImplementedError

    def reset_state(self) -> None:
        """Forget what was counted in training, for methods that count."""

    def reset_parameters(self) -> None:
        """Start afresh: weights normal with standard deviation 0.01, biases zero."""
        nn.init.normal_(self.fc.weight, std=0.01)
        if self.fc.bias is not None:
            nn.init.zeros_(self.fc.bias)

    def _from_softmax(self, rows: Tensor, *, is_bias: bool) -> Tensor:
        """Rows (or biases) of the linear layer, from those of a softmax classifier."""
        return rows

    # --- labels and shapes -----------------------------------------------------------------------

    @property
    def in_features(self) -> int:
        """Width of the features."""
        return self.fc.in_features

    @property
    def num_labels(self) -> int:
        """C + 1, or C without background."""
        return self.num_categories + (self.background is not None)

    @property
    def foreground(self) -> slice:
        """Labels, and columns of the scores, that are categories."""
        return foreground_of(self.background, self.num_categories)

    @property
    def background_label(self) -> int | None:
        """The label of background, if there is one."""
        return {"first": 0, "last": self.num_categories, None: None}[self.background]

    if TYPE_CHECKING:  # to torch it is Any

        def __call__(self, features: Tensor) -> Tensor: ...  # noqa: D102

    def forward(self, features: Tensor) -> Tensor:
        """Logits [R, L] of `features` [R, in_features]."""
        logits: Tensor = self.fc(features)
        return logits

    def loss(
        self, logits: Tensor, labels: Tensor, generator: torch.Generator | None = None
    ) -> Tensor:
        """The sum of `losses`, a scalar."""
        return torch.stack(list(self.losses(logits, labels, generator).values())).sum()

    def extra_repr(self) -> str:
        """The settings, for printing."""
        values = {"background": self.background, **self.settings()}
        return ", ".join(f"{name}={shown(value)}" for name, value in values.items())

    def _rows(self, logits: Tensor, labels: Tensor) -> tuple[Tensor, Rows]:
        """Checked logits, wide enough and with 0 in rows that do not count; and the rows."""
        logits = self._checked(logits)
        labels = check_labels(labels, self.num_labels, self.ignore_index)
        if labels.device != logits.device:
            raise ValueError(
                f"Expected `labels` on the device of the logits, {logits.device}, got "
                f"{labels.device}"
            )
        if labels.shape[0] != logits.shape[0]:
            raise ValueError(
                f"Expected `labels` for {logits.shape[0]} rows of logits, got {labels.shape[0]}"
            )
        rows = self._count(labels, logits.dtype)
        return logits.masked_fill(~rows.counted[:, None], 0), rows

    def _count(self, labels: Tensor, dtype: torch.dtype = torch.float32) -> Rows:
        """Which of checked labels count."""
        in_range = (labels >= 0) & (labels < self.num_labels)
        ignored = labels == self.ignore_index
        counted = in_range & ~ignored
        bad = (~in_range & ~ignored).any()
        zero = torch.zeros((), dtype=dtype, device=labels.device)
        return Rows(
            labels=torch.where(counted, labels, 0),
            counted=counted,
            number=counted.sum().clamp(min=1).to(dtype),
            poison=torch.where(bad, zero + math.nan, zero),
        )

    def _checked(self, logits: Tensor) -> Tensor:
        """Logits in float32 at least."""
        if not isinstance(logits, Tensor):
            raise TypeError(f"Expected `logits` to be a Tensor, got {type(logits).__name__}")
        if not logits.dtype.is_floating_point:
            raise TypeError(f"Expected `logits` of a floating-point dtype, got {logits.dtype}")
        if logits.ndim != 2 or logits.shape[1] != self.num_logits:
            raise ValueError(
                f"Expected `logits` of shape [R, {self.num_logits}], got {list(logits.shape)}"
            )
        return widened(logits)

    def _table(self, name: str, values: Sequence[float], like: Tensor) -> Tensor:
        """Constants as a tensor like another; made at their first use on a device."""
        key = (name, like.device, like.dtype)
        if key not in self._tables:
            with torch.inference_mode(False):  # an inference tensor could not enter autograd
                self._tables[key] = torch.tensor(values, dtype=like.dtype, device=like.device)
        return self._tables[key]

    def _category_targets(self, rows: Rows) -> Tensor:
        """Category of each row, int64 [R]: 0..C-1, or -1 for background and rows that do not count.

        Rows with a category are those with a target of 0 or more.
        """
        categories = rows.labels - self.foreground.start
        has_one = (categories >= 0) & (categories < self.num_categories) & rows.counted
        return torch.where(has_one, categories, -1)


# --- sigmoids ------------------------------------------------------------------------------------


def log_odds_of_softmax(
    rows: Tensor, foreground: slice, background_label: int | None, *, is_bias: bool
) -> Tensor:
    """Rows of a softmax classifier as rows of log-odds, one for each label.

    A category's are its odds against background, `z_c - z_bg`, exactly. Those of background
    against all categories would need their logsumexp, which is no linear function of features: it
    is taken as that of equal logits, their mean plus log C. The same goes for a category against
    the C - 1 others where there is no background.
    """
    categories = rows[foreground]
    number = len(categories)
    if background_label is None:
        if number == 1:  # there is nothing to be against
            return categories
        others = (categories.sum(dim=0, keepdim=True) - categories) / (number - 1)
        return categories - others - (math.log(number - 1) if is_bias else 0.0)
    mean = categories.mean(dim=0, keepdim=True)
    background = rows[background_label][None]
    against = background - mean - (math.log(number) if is_bias else 0.0)
    odds = categories - background
    return torch.cat([against, odds] if background_label == 0 else [odds, against])


def set_prior(fc: nn.Linear, prior: float) -> None:
    """Biases with which each sigmoid begins at `prior`."""
    if fc.bias is not None:
        nn.init.constant_(fc.bias, math.log(prior / (1 - prior)))
