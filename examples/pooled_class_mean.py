"""Nearest class mean of RoI features (NCM-conv): a classifier that sees what the box head sees."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn

from balanced_group_softmax.adapters.torchvision import convert_classifier
from balanced_group_softmax.rebalance.nearest_class_mean import NearestClassMean


class WithPooled(nn.Module):
    """A box head that hands on its features, and behind them what was pooled, in one row."""

    def __init__(self, box_head: nn.Module) -> None:
        super().__init__()
        self.box_head = box_head

    def forward(self, pooled: Tensor) -> Tensor:
        return torch.cat([self.box_head(pooled), pooled.flatten(1)], dim=1)


class OfFeatures(nn.Module):
    """A layer that reads the box head's features of such a row."""

    def __init__(self, layer: nn.Module, number: int) -> None:
        super().__init__()
        self.layer, self.number = layer, number

    def forward(self, rows: Tensor) -> Tensor:
        output: Tensor = self.layer(rows[:, : self.number])
        return output


class PooledClassMean(nn.Module):
    """Nearest class mean of what was pooled; background is told from the box head's features.

    Args:
        pooled: By class means of what was pooled.
    """

    background: Literal["first"] = "first"

    def __init__(self, pooled: NearestClassMean) -> None:
        super().__init__()
        self.pooled = pooled
        self.num_categories = pooled.num_categories
        self.in_features = _features_of(pooled)

    @classmethod
    def from_state_dict(cls, state_dict: Mapping[str, Any], prefix: str = "") -> PooledClassMean:
        """Make the classifier that a checkpoint describes."""
        return cls(NearestClassMean.from_state_dict(state_dict, f"{prefix}pooled."))

    def forward(self, rows: Tensor) -> Tensor:
        """Logits of rows of `WithPooled`."""
        number = self.in_features
        logits: Tensor = self.pooled(rows[:, number:], rows[:, :number])
        return logits

    def losses(self, logits: Tensor, labels: Tensor) -> dict[str, Tensor]:
        return self.pooled.losses(logits, labels)

    def scores(self, logits: Tensor) -> Tensor:
        return self.pooled.scores(logits)


def _features_of(classifier: NearestClassMean) -> int:
    assert classifier.softmax is not None
    return classifier.softmax.in_features


def use_class_means(model: Any, classifier: NearestClassMean | PooledClassMean) -> nn.Module:
    """Give a softmax detector, in place, a classifier by class means."""
    converted: nn.Module = convert_classifier(model, classifier)
    if isinstance(classifier, PooledClassMean):
        heads = model.roi_heads
        predictor = heads.box_predictor
        heads.box_head = WithPooled(heads.box_head)
        predictor.bbox_pred = OfFeatures(predictor.bbox_pred, classifier.in_features)
    return converted
