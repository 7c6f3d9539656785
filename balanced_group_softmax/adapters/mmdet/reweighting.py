"""Softmax cross-entropy with weights by counts."""

from collections.abc import Sequence
from typing import Literal

from mmdet.models.losses import CrossEntropyLoss
from mmdet.registry import MODELS

from balanced_group_softmax.adapters.mmdet.groups import read_counts
from balanced_group_softmax.rebalance.class_weights import (
    class_balanced_weights,
    inverse_frequency_weights,
)

__all__ = ["ReweightedCrossEntropyLoss"]


@MODELS.register_module()
class ReweightedCrossEntropyLoss(CrossEntropyLoss):
    """Softmax cross-entropy with weights by counts: the original's re-weighted baselines.

    The weighted sum is divided by the number of RoIs, as mmdet does with `class_weight`;
    background has weight 1.

    Args:
        annotations: path of the training annotations, LVIS or COCO.
        counts: training instances of each category, instead of `annotations`.
        scheme: `"inverse_frequency"` or `"class_balanced"`, see `rebalance.class_weights`.
        loss_weight: factor of the loss.

    Raises:
        OSError: the file cannot be read.
        TypeError: the counts are not integers.
        ValueError: the scheme is unknown, counts are not valid, or not given in exactly one way.
    """

    def __init__(
        self,
        annotations: str | None = None,
        counts: Sequence[int] | None = None,
        scheme: Literal["inverse_frequency", "class_balanced"] = "inverse_frequency",
        loss_weight: float = 1.0,
    ) -> None:
        schemes = {
            "inverse_frequency": inverse_frequency_weights,
            "class_balanced": class_balanced_weights,
        }
        if scheme not in schemes:
            raise ValueError(f"Expected `scheme` to be one of {list(schemes)}, got {scheme!r}")
        if (annotations is None) == (counts is None):
            raise ValueError("Expected exactly one of `annotations` and `counts`")
        weights = schemes[scheme](read_counts(annotations, counts)[1], background="last")
        super().__init__(class_weight=weights.tolist(), loss_weight=loss_weight)
