"""Each classifier in a small torchvision detector: a training step, a prediction, a checkpoint."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from classifier_cases import CASES, COUNTS, NUM_CATEGORIES
from torch import Tensor, nn

tv = pytest.importorskip("torchvision.models.detection")

from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead  # noqa: E402
from torchvision.models.detection.rpn import AnchorGenerator  # noqa: E402
from torchvision.ops import MultiScaleRoIAlign  # noqa: E402

from balanced_group_softmax import GroupLayout, grouped_softmax_loss  # noqa: E402
from balanced_group_softmax.adapters.torchvision import convert_classifier, freeze  # noqa: E402
from balanced_group_softmax.rebalance.nearest_class_mean import (  # noqa: E402
    ClassMeans,
    NearestClassMean,
)

WIDTH = 16
PREFIX = "roi_heads.box_predictor.cls_score."


class Backbone(nn.Sequential):
    out_channels = 8

    def __init__(self) -> None:
        super().__init__(nn.Conv2d(3, 8, 8, stride=8), nn.ReLU())


def detector() -> nn.Module:
    torch.manual_seed(1)
    return tv.FasterRCNN(
        Backbone(),
        min_size=64,
        max_size=96,
        rpn_anchor_generator=AnchorGenerator(((16, 32, 48),), ((0.5, 1.0, 2.0),)),
        box_roi_pool=MultiScaleRoIAlign(["0"], 3, 2),
        box_head=TwoMLPHead(8 * 9, WIDTH),
        box_predictor=FastRCNNPredictor(WIDTH, NUM_CATEGORIES + 1),
        box_score_thresh=0.0,
        rpn_pre_nms_top_n_train=300,
        rpn_post_nms_top_n_train=200,
    )


def images() -> list[Tensor]:
    return [torch.rand(3, 64, 80, generator=torch.Generator().manual_seed(2))]


def targets() -> list[dict[str, Tensor]]:
    boxes = torch.tensor([[4.0, 4, 40, 50], [20, 10, 70, 60]])
    return [{"boxes": boxes, "labels": torch.tensor([1, NUM_CATEGORIES])}]


def converted(name: str) -> tuple[nn.Module, Any]:
    model: Any = detector()
    method, settings = CASES[name]
    classifier = method.from_linear(model.roi_heads.box_predictor.cls_score, **settings)
    return convert_classifier(model, classifier), classifier


def predict(model: nn.Module) -> list[dict[str, Tensor]]:
    with torch.no_grad():
        found: list[dict[str, Tensor]] = model.eval()(images())
    return found


@pytest.mark.parametrize("name", list(CASES))
def test_a_step_and_a_prediction(name: str) -> None:
    model, classifier = converted(name)
    parameters = freeze(model, "classifier")
    optimizer = torch.optim.SGD(parameters, lr=0.1)
    before = classifier.fc.weight.detach().clone()
    losses = model.train()(images(), targets())
    assert {key for key in losses if key.startswith("loss_cls")} == set(
        classifier.losses(torch.zeros(1, classifier.num_logits), torch.zeros(1).long())
    )
    assert all(loss.isfinite() for loss in losses.values())
    sum(losses.values()).backward()
    optimizer.step()
    assert (classifier.fc.weight != before).any()
    assert classifier.fc.weight.isfinite().all()
    (found,) = predict(model)
    assert len(found["boxes"]) > 0
    assert ((found["labels"] >= 1) & (found["labels"] <= NUM_CATEGORIES)).all()
    assert ((found["scores"] >= 0) & (found["scores"] <= 1)).all()


@pytest.mark.parametrize("name", list(CASES))
def test_a_checkpoint_of_the_detector(name: str) -> None:
    model, classifier = converted(name)
    model.train()(images(), targets())  # moves what is counted
    state = {key: value.clone() for key, value in model.state_dict().items()}
    other, _ = converted(name)
    for parameter in other.parameters():
        nn.init.zeros_(parameter)
    other.load_state_dict(state)
    torch.testing.assert_close(predict(other), predict(model), rtol=0, atol=0)
    alone = type(classifier).from_state_dict(state, PREFIX)
    assert alone.describe() == classifier.describe()
    wrong, _ = converted("seesaw" if name != "seesaw" else "softmax")
    kept = {key: value.clone() for key, value in wrong.state_dict().items()}
    with pytest.raises(ValueError, match="method"):
        wrong.load_state_dict(state)
    torch.testing.assert_close(wrong.state_dict(), kept, rtol=0, atol=0)


def test_softmax_is_the_detector_that_it_was() -> None:
    expected = predict(detector())
    model, _ = converted("softmax")
    torch.testing.assert_close(predict(model), expected, rtol=0, atol=0)


def test_nearest_class_means_predict() -> None:
    model: Any = detector()
    linear = model.roi_heads.box_predictor.cls_score
    means = ClassMeans(NUM_CATEGORIES, WIDTH)
    features = torch.rand(40, WIDTH, generator=torch.Generator().manual_seed(4))
    means.update(features, 1 + torch.arange(40) % (NUM_CATEGORIES - 1))  # the last is never seen
    convert_classifier(model, NearestClassMean.from_means(means, softmax=linear))
    (found,) = predict(model)
    assert set(found["labels"].tolist()) <= set(range(1, NUM_CATEGORIES + 1))
    assert (found["scores"][found["labels"] == NUM_CATEGORIES] == 0).all()
    assert (found["scores"][found["labels"] != NUM_CATEGORIES] > 0).all()


def test_the_code_of_the_documentation_runs() -> None:
    text = (Path(__file__).parents[2] / "docs" / "methods.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    assert len(blocks) == 2
    layout = GroupLayout.from_counts(COUNTS)
    scope: dict[str, Any] = {
        "model": detector(),
        "counts": COUNTS,
        "layout": layout,
    }
    for block in blocks:
        exec(block, scope)
    head = scope["head"]
    logits, labels = head(torch.zeros(3, head.in_features)), torch.tensor([0, 1, 2])
    plain = grouped_softmax_loss(logits, labels, layout, others_ratio=torch.inf)
    head.others_ratio = torch.inf
    assert head.loss(logits, labels).isfinite()
    assert not torch.equal(head.loss(logits, labels), plain)  # the weights count
    assert len(scope["parameters"]) == 2


def test_cases_have_the_counts_of_the_detector() -> None:
    assert len(COUNTS) == NUM_CATEGORIES
