"""What users may get wrong: a line marked `E` is an error of that kind to mypy, and no other is.

`tests/test_release.py` checks it against an installed wheel. Nothing here is run.
"""

from pathlib import Path

import torch
from torch import Tensor, nn

from balanced_group_softmax import (
    BAGSHead,
    BAGSLoss,
    GroupLayout,
    category_counts,
    select_detections,
)
from balanced_group_softmax.adapters.torchvision import convert_classifier, freeze
from balanced_group_softmax.discriminant import DiscriminantHead
from balanced_group_softmax.legacy.checkpoints import convert_checkpoint
from balanced_group_softmax.rebalance.focal import FocalClassifier
from balanced_group_softmax.rebalance.nearest_class_mean import NearestClassMean
from balanced_group_softmax.rebalance.repeat_factors import RepeatFactorSampler
from balanced_group_softmax.rebalance.seesaw import SeesawClassifier


def layouts(file: Path) -> None:
    category_counts(7)  # E: arg-type
    layout = GroupLayout.from_counts("train.json")  # E: arg-type
    GroupLayout.from_counts([3, 2500], background="middle")  # E: arg-type
    GroupLayout.from_counts([3, 2500], threshold=[10])  # E: call-arg
    layout.groups[0].append(3)  # E: attr-defined
    counts: Tensor = category_counts(file)  # E: assignment
    counts.sum()


def heads(layout: GroupLayout, features: Tensor, labels: Tensor) -> None:
    head = BAGSHead(16, layout, impl="fast")  # E: arg-type
    BAGSHead(layout, 16)  # E: arg-type
    BAGSHead(16, layout, category_weights="inverse")  # E: arg-type
    BAGSLoss(layout, reduction="mean")  # E: arg-type
    logits: int = head(features)  # E: assignment
    head(features, labels)  # E: call-arg
    head.loss(features)  # E: call-arg
    head.losses(features, labels).backward()  # E: attr-defined
    BAGSLoss(layout)(features)  # E: call-arg
    softmax: DiscriminantHead = BAGSHead.from_linear(nn.Linear(16, 4), layout)  # E: assignment
    print(logits, softmax)


def around(model: nn.Module, layout: GroupLayout, boxes: Tensor, scores: Tensor) -> None:
    select_detections(boxes, scores, score_threshold=0.5)  # E: call-arg
    found = select_detections(
        boxes, scores, score_threshold=0.0, nms_threshold=0.5, max_detections=300
    )
    torch.stack(found.labels)  # E: attr-defined
    convert_classifier(model, layout)  # E: arg-type
    freeze(model, train="head")  # E: arg-type
    FocalClassifier(16, 3, activation="relu")  # E: arg-type
    SeesawClassifier(16, 3, background="none")  # E: arg-type
    NearestClassMean(boxes, scores)("features")  # E: arg-type
    RepeatFactorSampler(2.0)  # E: arg-type
    convert_checkpoint("a.pth", "b.pth", target="onnx", layout=layout)  # E: arg-type
