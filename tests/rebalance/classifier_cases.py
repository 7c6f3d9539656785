"""The classifiers of `rebalance`, small, each in the form that most tests want."""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from balanced_group_softmax.rebalance.eql_v2 import EQLv2Classifier
from balanced_group_softmax.rebalance.federated import FederatedClassifier
from balanced_group_softmax.rebalance.focal import FocalClassifier
from balanced_group_softmax.rebalance.linear_classifier import LinearClassifier
from balanced_group_softmax.rebalance.logit_adjustment import LogitAdjustedClassifier
from balanced_group_softmax.rebalance.seesaw import SeesawClassifier
from balanced_group_softmax.rebalance.softmax import SoftmaxClassifier

COUNTS = [3, 2500, 40, 0, 600]
NUM_CATEGORIES = len(COUNTS)
BACKGROUNDS = ("first", "last", None)
FEATURES = 4


class Case(NamedTuple):
    method: type[LinearClassifier]
    settings: dict[str, Any]


CASES = {
    "softmax": Case(SoftmaxClassifier, {}),
    "focal": Case(FocalClassifier, {}),
    "focal-sigmoid": Case(
        FocalClassifier, {"activation": "sigmoid", "normalizer": "foreground", "alpha": None}
    ),
    "balanced-softmax": Case(LogitAdjustedClassifier, {"counts": COUNTS}),
    "logit-adjustment": Case(
        LogitAdjustedClassifier, {"counts": COUNTS, "tau": 0.5, "adjust": "test"}
    ),
    "seesaw": Case(SeesawClassifier, {}),
    "eql-v2": Case(EQLv2Classifier, {}),
    "federated": Case(FederatedClassifier, {"counts": COUNTS, "num_sampled": 3}),
}


def num_labels(background: str | None) -> int:
    return NUM_CATEGORIES + (background is not None)


def trained_linear(background: str | None, dtype: torch.dtype = torch.float64) -> nn.Linear:
    """A softmax classifier; the same function of features in every convention."""
    generator = torch.Generator().manual_seed(5)
    weight = torch.randn(NUM_CATEGORIES + 1, FEATURES, generator=generator, dtype=dtype)
    bias = torch.randn(NUM_CATEGORIES + 1, generator=generator, dtype=dtype)
    linear = nn.Linear(FEATURES, num_labels(background), dtype=dtype)
    with torch.no_grad():  # made with background first
        linear.weight.copy_(to_convention(weight, background))
        linear.bias.copy_(to_convention(bias, background))
    return linear


def to_convention(rows: Tensor, background: str | None) -> Tensor:
    """Rows of labels with background first, in another convention."""
    if background == "first":
        return rows
    return rows[1:] if background is None else torch.cat([rows[1:], rows[:1]])


def make(
    name: str, background: str | None = "first", dtype: torch.dtype = torch.float64, **more: Any
) -> LinearClassifier:
    method, settings = CASES[name]
    return method.from_linear(
        trained_linear(background, dtype), background=background, **{**settings, **more}
    )


def features_of(number: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(number, FEATURES, generator=torch.Generator().manual_seed(6), dtype=dtype)


def labels_in(background: str | None, categories: list[int | None]) -> Tensor:
    """Labels of categories 0..C-1; None is background, and 0 where there is none."""
    first = int(background == "first")
    of_background = {"first": 0, "last": NUM_CATEGORIES, None: 0}[background]
    return torch.tensor([of_background if c is None else c + first for c in categories])


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)
