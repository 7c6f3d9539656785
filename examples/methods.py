"""The methods that can be trained: Balanced Group Softmax, and what it is compared with.

A method is a classifier, and how it comes about: from scratch, by training from a detector with
plain softmax, or from that without training. Rows are those of the paper's table for Faster R-CNN,
R50-FPN (Li et al., CVPR 2020); docs/methods.md has what each of them is.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from detection_data import LVISDetection
from detectors import PREDICTOR
from pooled_class_mean import PooledClassMean, use_class_means
from recipe import Recipe
from torch import nn

from balanced_group_softmax import BAGSHead, GroupLayout
from balanced_group_softmax.adapters.torchvision import convert_classifier
from balanced_group_softmax.discriminant import DiscriminantHead
from balanced_group_softmax.rebalance import class_weights
from balanced_group_softmax.rebalance.eql_v2 import EQLv2Classifier
from balanced_group_softmax.rebalance.federated import FederatedClassifier
from balanced_group_softmax.rebalance.focal import FocalClassifier
from balanced_group_softmax.rebalance.logit_adjustment import LogitAdjustedClassifier
from balanced_group_softmax.rebalance.nearest_class_mean import NearestClassMean
from balanced_group_softmax.rebalance.seesaw import SeesawClassifier
from balanced_group_softmax.rebalance.softmax import SoftmaxClassifier
from balanced_group_softmax.rebalance.tail_subset import tail_categories, tail_subset
from balanced_group_softmax.rebalance.tau_norm import tau_normalize
from balanced_group_softmax.rebalance.tau_norm_select import TauSelectClassifier

Counts = tuple[int, ...]
State = Mapping[str, Any]
FromSoftmax = Callable[[nn.Linear, Counts, Recipe, LVISDetection], Any]
"""Makes a classifier of the softmax classifier, training instances, options, and the data."""


@dataclass(frozen=True)
class Method:
    """How a classifier comes about."""

    title: str
    row: int = 0
    """Of the paper's table; 0 for none."""
    start: Literal["scratch", "softmax"] = "softmax"
    trains: bool = True
    options: Callable[[Recipe], dict[str, Any]] = lambda recipe: {}
    """What it changes in the recipe of its stage."""
    tail: bool = False
    """Whether it sees images with rare categories alone, and in them only those."""
    make: FromSoftmax | None = None
    """None keeps the plain linear layer."""
    discriminant: bool = False
    """Whether its head is given the discriminant of the features."""
    newer: bool = False
    """Whether it is of after the paper."""
    kind: type[Any] | None = None
    """The class of its classifier, if a checkpoint says all about it."""

    @property
    def stage(self) -> str:
        """The table of options that its recipe is of."""
        return "softmax" if self.start == "scratch" else "bags"

    @property
    def has_own_classifier(self) -> bool:
        """Whether something else than a linear layer with softmax comes of it."""
        return self.kind is not None


def _all_layers(recipe: Recipe) -> dict[str, Any]:
    return {"train": "all"}


def _classifier(recipe: Recipe) -> dict[str, Any]:
    return {"train": "classifier"}


def _tail_options(recipe: Recipe) -> dict[str, Any]:
    """Ten epochs where others have twelve, at a hundredth of the learning rate."""
    length: dict[str, Any] = {"epochs": recipe.epochs * 10 / 12}
    if recipe.steps:
        length = {"steps": max(1, round(recipe.steps * 10 / 12))}
    return {"train": "all", "learning_rate": recipe.learning_rate / 100, **length}


def _weighted(weights: Callable[..., Any]) -> FromSoftmax:
    return lambda linear, counts, recipe, data: SoftmaxClassifier.from_linear(
        linear, class_weights=weights(counts).tolist()
    )


def _with_counts(kind: Any) -> FromSoftmax:
    return lambda linear, counts, recipe, data: kind.from_linear(linear, counts=counts)


def _plain(kind: Any) -> FromSoftmax:
    return lambda linear, counts, recipe, data: kind.from_linear(linear)


def _federated(
    linear: nn.Linear, counts: Counts, recipe: Recipe, data: LVISDetection
) -> FederatedClassifier:
    return FederatedClassifier.from_linear(linear, counts=image_counts(data))


METHODS: dict[str, Method] = {
    "softmax": Method("softmax", 1, start="scratch"),
    "x2": Method("softmax, continued, all layers (x2)", 2, options=_all_layers),
    "finetune_tail": Method("finetune tail", 3, options=_tail_options, tail=True),
    "rfs": Method("RFS", 4, start="scratch", options=lambda recipe: {"sampler": "repeat_factor"}),
    "rfs_finetune": Method(
        "RFS-finetune",
        5,
        options=lambda recipe: {"train": "all", "sampler": "repeat_factor"},
    ),
    "reweight": Method(
        "re-weight",
        6,
        options=_all_layers,
        make=_weighted(class_weights.inverse_frequency_weights),
        kind=SoftmaxClassifier,
    ),
    "reweight_cls": Method(
        "re-weight-cls",
        7,
        options=_classifier,
        make=_weighted(class_weights.class_balanced_weights),
        kind=SoftmaxClassifier,
    ),
    "focal": Method(
        "focal", 8, options=_all_layers, make=_plain(FocalClassifier), kind=FocalClassifier
    ),
    "focal_cls": Method(
        "focal-cls", 9, options=_classifier, make=_plain(FocalClassifier), kind=FocalClassifier
    ),
    "ncm_fc": Method("NCM-fc", 10, trains=False, kind=NearestClassMean),
    "ncm_conv": Method("NCM-conv", 11, trains=False, kind=PooledClassMean),
    "tau_norm": Method(
        "tau-norm",
        12,
        trains=False,
        make=lambda linear, counts, recipe, data: SoftmaxClassifier.from_linear(
            tau_normalize(linear, recipe.tau)
        ),
        kind=SoftmaxClassifier,
    ),
    "tau_norm_select": Method(
        "tau-norm-select",
        13,
        trains=False,
        make=lambda linear, counts, recipe, data: TauSelectClassifier(
            linear, recipe.tau, tail_categories(counts)
        ),
        kind=TauSelectClassifier,
    ),
    "bags": Method("balanced group softmax", 14, kind=BAGSHead),
    "bags_discriminant_start": Method(
        "BAGS, discriminant start", options=_classifier, kind=BAGSHead, discriminant=True
    ),
    "bags_discriminant": Method(
        "BAGS with discriminant", options=_classifier, kind=DiscriminantHead, discriminant=True
    ),
    "softmax_continued": Method("softmax, continued", options=_classifier),
    "balanced_softmax": Method(
        "Balanced Softmax",
        options=_classifier,
        make=_with_counts(LogitAdjustedClassifier),
        kind=LogitAdjustedClassifier,
        newer=True,
    ),
    "logit_adjustment": Method(
        "logit adjustment at test",
        trains=False,
        make=lambda linear, counts, recipe, data: LogitAdjustedClassifier.from_linear(
            linear, counts=counts, adjust="test"
        ),
        kind=LogitAdjustedClassifier,
        newer=True,
    ),
    "seesaw": Method(
        "Seesaw loss",
        options=_classifier,
        make=_plain(SeesawClassifier),
        kind=SeesawClassifier,
        newer=True,
    ),
    "eql_v2": Method(
        "EQL v2",
        options=_classifier,
        make=_plain(EQLv2Classifier),
        kind=EQLv2Classifier,
        newer=True,
    ),
    "federated": Method(
        "federated loss",
        options=_classifier,
        make=_federated,
        kind=FederatedClassifier,
        newer=True,
    ),
}


GROUPED: dict[Any, type[BAGSHead]] = {kind: kind for kind in (BAGSHead, DiscriminantHead)}
"""Heads of groups; what else they are made of is in the recipe and the counts."""


def options_of(name: str, recipes: Mapping[str, Recipe]) -> dict[str, dict[str, Any]]:
    """Return the options that a method sets, as `read_options` does, given those of a file."""
    method = METHODS[name]
    return {method.stage: method.options(recipes[method.stage])}


def begin(
    model: nn.Module,
    name: str,
    layout: GroupLayout,
    counts: Counts,
    recipe: Recipe,
    data: LVISDetection,
) -> nn.Module:
    """Give a softmax detector, in place, the classifier that a method's training begins with.

    Args:
        model: The detector.
        name: Of the method.
        layout: The groups.
        counts: Training instances of each category.
        recipe: The method's.
        data: What it trains on.
    """
    if METHODS[name].kind in GROUPED:
        return _to_bags(model, name, layout, counts, recipe)
    make = METHODS[name].make
    if make is None:
        return model
    linear: Any = model.get_submodule(PREDICTOR)
    return convert_classifier(model, make(linear, counts, recipe, data))


def weights_within_groups(kind: str, layout: GroupLayout, counts: Counts) -> Any:
    """Return the weights of categories [C] in their groups; None for none."""
    if kind == "none":
        return None
    make: Any = {
        "inverse_frequency": class_weights.inverse_frequency_weights,
        "class_balanced": class_weights.class_balanced_weights,
    }[kind]
    return make(counts, within=layout.groups, background=None).float()


def restore(
    model: nn.Module, name: str, layout: GroupLayout, counts: Counts, recipe: Recipe, state: State
) -> nn.Module:
    """Give a softmax detector, in place, the classifier of a method's checkpoint.

    Args:
        model: The detector; its weights are still to be loaded.
        name: Of the method.
        layout: The groups.
        counts: Training instances of each category.
        recipe: The method's.
        state: The detector's state dict.
    """
    kind = METHODS[name].kind
    if kind in GROUPED:
        return _to_bags(model, name, layout, counts, recipe)
    if kind is None:
        return model
    classifier = kind.from_state_dict(state, f"{PREDICTOR}.")
    if isinstance(classifier, NearestClassMean | PooledClassMean):
        return use_class_means(model, classifier)
    return convert_classifier(model, classifier)


def _to_bags(
    model: nn.Module, name: str, layout: GroupLayout, counts: Counts, recipe: Recipe
) -> nn.Module:
    linear: Any = model.get_submodule(PREDICTOR)
    head = GROUPED[METHODS[name].kind].from_linear(
        linear,
        layout,
        others_ratio=recipe.others_ratio,
        category_weights=weights_within_groups(recipe.category_weights, layout, counts),
    )
    return convert_classifier(model, head)


def image_counts(data: LVISDetection) -> list[int]:
    """Return how many images have each category."""
    counts = np.zeros(data.num_categories + 1, np.int64)
    for index in range(len(data)):
        counts[np.unique(data.labels(index).numpy())] += 1
    return [int(count) for count in counts[1:]]


def training_data(name: str, data: LVISDetection, counts: Counts) -> LVISDetection:
    """Return what a method trains on.

    Raises:
        ValueError: It is to train on rare categories, and there are none.
    """
    if not METHODS[name].tail:
        return data
    found = tail_subset([data.labels(index) for index in range(len(data))], counts)
    if len(found.images) == 0:
        raise ValueError(
            f"Expected images with a category of fewer than 100 training instances for `{name}`, "
            "got none"
        )
    return data.subset(found.images.tolist(), found.keep)
