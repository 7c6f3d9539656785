"""A user's program, for `mypy --strict`: every public area, no cast, no ignored error.

`tests/test_release.py` checks it against an installed wheel. Nothing here is run.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim.sgd import SGD
from torch.utils.data import DataLoader, TensorDataset
from torchvision.models.detection import fasterrcnn_resnet50_fpn
from typing_extensions import assert_type

import balanced_group_softmax as bgs
from balanced_group_softmax import (
    BAGSHead,
    BAGSLoss,
    Detections,
    GroupLayout,
    category_counts,
    grouped_softmax_loss,
    grouped_softmax_scores,
    sample_others,
    select_detections,
)
from balanced_group_softmax.adapters.protocol import Classifier, check_classifier
from balanced_group_softmax.adapters.torchvision import convert_classifier, convert_to_bags, freeze
from balanced_group_softmax.counts import (
    CountedCategory,
    category_ids,
    counted_categories,
    image_counts,
    read_annotations,
)
from balanced_group_softmax.discriminant import (
    DiscriminantHead,
    FeatureStatistics,
    add_discriminant,
    discriminant_rows,
)
from balanced_group_softmax.legacy.checkpoints import convert_checkpoint, convert_to_torchvision
from balanced_group_softmax.legacy.files import read_original_files, write_original_files
from balanced_group_softmax.legacy.layout_files import original_layout
from balanced_group_softmax.rebalance.class_weights import inverse_frequency_weights
from balanced_group_softmax.rebalance.eql_v2 import EQLv2Classifier
from balanced_group_softmax.rebalance.federated import FederatedClassifier
from balanced_group_softmax.rebalance.focal import FocalClassifier
from balanced_group_softmax.rebalance.linear_classifier import LinearClassifier
from balanced_group_softmax.rebalance.logit_adjustment import LogitAdjustedClassifier
from balanced_group_softmax.rebalance.nearest_class_mean import ClassMeans, NearestClassMean
from balanced_group_softmax.rebalance.repeat_factors import (
    RepeatFactorSampler,
    category_repeat_factors,
    image_repeat_factors,
)
from balanced_group_softmax.rebalance.seesaw import SeesawClassifier
from balanced_group_softmax.rebalance.softmax import SoftmaxClassifier
from balanced_group_softmax.rebalance.tail_subset import tail_categories, tail_subset
from balanced_group_softmax.rebalance.tau_norm import balanced_accuracy, search_tau, tau_normalize
from balanced_group_softmax.rebalance.tau_norm_select import TauSelectClassifier, select_scores


def counts_and_layouts(file: Path) -> GroupLayout:
    assert_type(bgs.__version__, str)
    counts = category_counts(file)
    assert_type(counts, list[int])
    assert_type(category_counts({"categories": [{"id": 1, "instance_count": 3}]}), list[int])
    assert_type(image_counts("train.json"), list[int])
    assert_type(counted_categories(file), list[CountedCategory])
    read_annotations(file)["images"]
    layout = GroupLayout.from_counts(counts, category_ids=category_ids(file))
    GroupLayout.from_counts(np.array(counts), thresholds=(10, 100), background=None)
    GroupLayout.from_counts(torch.tensor(counts), background="last")
    assert_type(layout.groups, tuple[tuple[int, ...], ...])
    assert_type(layout.background, Literal["first", "last"] | None)
    assert_type(layout.foreground, slice)
    layout.save("layout.json")
    assert_type(GroupLayout.load(file), GroupLayout)
    return GroupLayout.from_json(layout.to_json())


class Network(nn.Module):
    def __init__(self, layout: GroupLayout) -> None:
        super().__init__()
        self.body = nn.Linear(8, 16)
        self.head = BAGSHead(16, layout, category_weights=[1.0, 2.0, 0.5], impl="torch")
        self.loss = BAGSLoss(layout, reduction="groups")

    def forward(self, inputs: Tensor) -> Tensor:
        return self.head(self.body(inputs))

    def training_loss(self, inputs: Tensor, labels: Tensor) -> Tensor:
        return self.loss(self(inputs), labels, torch.Generator().manual_seed(0)).sum()


class OwnHead(BAGSHead):
    pass


def heads(layout: GroupLayout, features: Tensor, labels: Tensor) -> Tensor:
    head = BAGSHead.from_linear(nn.Linear(16, 4), layout, category_weights=np.ones(3))
    assert_type(head, BAGSHead)
    assert_type(OwnHead.from_linear(nn.Linear(16, 4), layout), OwnHead)
    logits = head(features)
    assert_type(logits, Tensor)
    head.loss(logits, labels).backward()
    assert_type(head.losses(logits, labels), dict[str, Tensor])
    assert_type(head.fc, nn.Linear)
    assert_type(GroupLayout.from_state_dict(head.state_dict()), GroupLayout)
    assert_type(grouped_softmax_loss(logits, labels, layout, reduction="groups"), Tensor)
    assert_type(grouped_softmax_scores(logits, layout, impl="reference"), Tensor)
    assert_type(sample_others(labels, layout, others_ratio=float("inf")), Tensor)
    SGD(head.parameters(), lr=0.01)
    return head.scores(logits)


def detections(boxes: Tensor, scores: Tensor) -> Tensor:
    found = select_detections(
        boxes, scores, score_threshold=0.0, nms_threshold=0.5, max_detections=300
    )
    assert_type(found, Detections)
    kept, _, categories, rows = found
    assert_type(kept, Tensor)
    return torch.stack([categories, rows])


class OwnClassifier(nn.Linear):
    background: Literal["first"] = "first"

    @property
    def num_categories(self) -> int:
        return self.out_features - 1

    def losses(self, logits: Tensor, labels: Tensor) -> dict[str, Tensor]:
        return {"loss_cls": nn.functional.cross_entropy(logits, labels)}

    def scores(self, logits: Tensor) -> Tensor:
        return logits.softmax(dim=-1)


def classifiers(layout: GroupLayout, features: Tensor, labels: Tensor) -> Iterator[Tensor]:
    counts, linear = [3, 2500, 40], nn.Linear(16, 4)
    weights = inverse_frequency_weights(counts, within=layout.groups, background=None)
    assert_type(weights, Tensor)
    trained: list[LinearClassifier] = [
        SoftmaxClassifier(16, 3, class_weights=weights),
        FocalClassifier(16, 3, activation="sigmoid", normalizer="rows"),
        LogitAdjustedClassifier(16, 3, counts=counts, adjust="test"),
        SeesawClassifier(16, 3, background="last"),
        EQLv2Classifier(16, 3),
        FederatedClassifier(16, 3, counts=torch.tensor(counts)),
    ]
    for classifier in trained:
        logits = classifier(features)
        assert_type(logits, Tensor)
        classifier.loss(logits, labels).backward()
        yield classifier.scores(logits)
    assert_type(SeesawClassifier.from_linear(linear, p=0.8), SeesawClassifier)
    assert_type(EQLv2Classifier.from_state_dict(trained[4].state_dict()), EQLv2Classifier)

    means = ClassMeans(3, 16)
    means.update(features, labels)
    nearest = NearestClassMean.from_means(means, softmax=linear, metric="euclidean")
    yield nearest(features, background_features=features)
    assert_type(tau_normalize(linear, 0.5), nn.Linear)
    assert_type(search_tau(linear, features, labels, select=[0, 1]).tau, float)
    selecting = TauSelectClassifier(linear, 0.5, tail_categories(counts))
    yield selecting(features)
    scores = linear(features).softmax(dim=1)
    assert_type(select_scores(scores, scores, [0]), Tensor)
    assert_type(balanced_accuracy(scores, labels, groups=[[0], range(1, 4)]), float)

    any_of_them: list[Classifier] = [*trained, nearest, selecting, BAGSHead(16, layout)]
    any_of_them.append(OwnClassifier(16, 4))
    for one in any_of_them:
        check_classifier(one, background="first")
        assert_type(one(features), Tensor)


def sampling(images: Tensor, counts: list[int]) -> None:
    labels = [[1], [1, 2], [1], []]
    by_category = category_repeat_factors(counts, num_images=4, threshold=0.75)
    by_image = image_repeat_factors(labels, by_category)
    sampler = RepeatFactorSampler(by_image, seed=0)
    sampler.set_epoch(1)
    assert_type(next(iter(sampler)), int)
    DataLoader(TensorDataset(images), sampler=sampler)
    assert_type(tail_subset(labels, counts).keep, list[Tensor])


def discriminant(layout: GroupLayout, features: Tensor, labels: Tensor) -> Tensor:
    statistics = FeatureStatistics(layout, 16)
    statistics.update(features, labels)
    add_discriminant(BAGSHead(16, layout), statistics, strength=[0.1, 0.1, 0.2, 0.2])
    assert_type(discriminant_rows(statistics), tuple[Tensor, Tensor])
    head = DiscriminantHead.from_linear(nn.Linear(16, 4), layout)
    assert_type(head, DiscriminantHead)
    head.fit(statistics)
    return head.scores(head(features))


def detectors(layout: GroupLayout, own: nn.Module) -> SGD:
    model = fasterrcnn_resnet50_fpn(weights=None, num_classes=4)
    convert_to_bags(model, layout, category_weights=torch.ones(3))
    assert_type(convert_to_bags(own, layout, inplace=False), nn.Module)
    convert_classifier(own, SeesawClassifier(1024, 3))
    convert_classifier(own, OwnClassifier(1024, 4))
    parameters = freeze(model, train="box_head")
    assert_type(parameters, list[nn.Parameter])
    return SGD(parameters, lr=0.01, momentum=0.9)


def legacy(folder: Path) -> GroupLayout:
    files = read_original_files(folder)
    assert_type(files.group_weights, tuple[Tensor, ...] | None)
    write_original_files("train.json", folder, thresholds=[10, 100])
    state = torch.load(folder / "epoch_12.pth", weights_only=True)
    assert_type(convert_to_torchvision(state, layout=files.layout), dict[str, Tensor])
    convert_checkpoint(folder / "epoch_12.pth", "bags.pth", target="mmdet", layout=files.layout)
    return original_layout([3, 2500, 40])
