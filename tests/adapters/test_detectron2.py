"""The detectron2 adapter against the core and against stock detectron2."""

import io
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip(
    "detectron2.modeling", reason="detectron2 is not installed: docs/detectron2.md says how"
)

from detectron2.config import LazyCall, instantiate
from detectron2.data import MetadataCatalog
from detectron2.layers import ShapeSpec
from detectron2.modeling import build_model
from detectron2.modeling.box_regression import Box2BoxTransform
from detectron2.modeling.roi_heads import FastRCNNOutputLayers
from detectron2.modeling.roi_heads.fast_rcnn import fast_rcnn_inference
from detectron2.structures import Boxes, Instances
from detectron2.utils.events import EventStorage
from detectron2_cases import (
    COUNTS,
    GROUP_LOSSES,
    IDS,
    KINDS,
    LAYOUT,
    NUM_CATEGORIES,
    images,
    predictors,
    small_config,
    small_model,
    step,
)

from balanced_group_softmax import (
    BAGSHead,
    GroupLayout,
    grouped_softmax_loss,
    grouped_softmax_scores,
)
from balanced_group_softmax.adapters.detectron2 import (
    BAGSCascadeROIHeads,
    BAGSFastRCNNOutputLayers,
    ClassifierOutputLayers,
    freeze,
    read_layout,
    select_instances,
)

FEATURES = 6


def make_predictor(**options: Any) -> Any:
    options = {"layout": LAYOUT, "num_classes": NUM_CATEGORIES} | options
    transform = Box2BoxTransform(weights=(10.0, 10.0, 5.0, 5.0))
    return BAGSFastRCNNOutputLayers(
        ShapeSpec(channels=FEATURES), box2box_transform=transform, **options
    )


def sampled(labels: Tensor) -> list[Instances]:
    """Labelled RoIs in two images."""
    found = []
    for part in labels.chunk(2):
        corners = torch.rand(len(part), 2) * 40
        boxes = torch.cat([corners, corners + 5 + torch.rand(len(part), 2) * 15], 1)
        found.append(
            Instances(
                (64, 64),
                proposal_boxes=Boxes(boxes),
                gt_boxes=Boxes(boxes + torch.rand(len(part), 4)),
                gt_classes=part,
            )
        )
    return found


@pytest.fixture
def storage() -> Iterator[EventStorage]:
    with EventStorage() as found:
        yield found


# --- losses and scores ---------------------------------------------------------------------------


@pytest.mark.parametrize("agnostic", [False, True], ids=["specific", "agnostic"])
def test_losses_are_those_of_the_core(storage: EventStorage, agnostic: bool) -> None:
    predictor = make_predictor(cls_agnostic_bbox_reg=agnostic, others_ratio=2.0)
    labels = torch.randint(NUM_CATEGORIES + 1, (40,))
    labels[20:] = NUM_CATEGORIES
    logits, deltas = predictor(torch.randn(40, FEATURES))
    torch.manual_seed(3)
    losses = predictor.losses((logits, deltas), sampled(labels))
    torch.manual_seed(3)
    _ = sampled(labels)  # draws boxes, as above
    expected = grouped_softmax_loss(logits, labels, LAYOUT, others_ratio=2.0, reduction="groups")
    assert list(losses) == [*GROUP_LOSSES, "loss_box_reg"]
    assert torch.equal(torch.stack([losses[name] for name in GROUP_LOSSES]), expected)
    assert expected.min() > 0


@pytest.mark.parametrize("agnostic", [False, True], ids=["specific", "agnostic"])
def test_box_regression_is_detectron2s(storage: EventStorage, agnostic: bool) -> None:
    predictor = make_predictor(cls_agnostic_bbox_reg=agnostic)
    stock = FastRCNNOutputLayers(
        ShapeSpec(channels=FEATURES),
        box2box_transform=predictor.box2box_transform,
        num_classes=NUM_CATEGORIES,
        cls_agnostic_bbox_reg=agnostic,
    )
    stock.bbox_pred.load_state_dict(predictor.bbox_pred.state_dict())
    features, proposals = torch.randn(20, FEATURES), sampled(torch.arange(20) % 9)
    theirs = stock.losses(stock(features), proposals)
    ours = predictor.losses(predictor(features), proposals)
    assert torch.equal(ours["loss_box_reg"], theirs["loss_box_reg"])
    assert ours["loss_box_reg"] > 0


def sure_logits(labels: Tensor) -> Tensor:
    """Logits that are sure of these labels, background last, written down without the library."""
    low, high = -20.0, 20.0
    groups = [[0, 4], [1, 5], [2, 6], [3, 7]]  # of COUNTS: below 10, 100, 1000, and the rest
    rows = []
    for label in labels.tolist():
        row = [high, low] if label == 8 else [low, high]
        for group in groups:
            row += [low if label in group else high]
            row += [high if label == one else low for one in group]
        rows.append(row)
    return torch.tensor(rows)


def test_background_is_the_last_label_and_the_last_column(storage: EventStorage) -> None:
    labels = torch.tensor([0, 7, 8, 3, 8, 4, 1, 2, 5, 6])
    predictor = make_predictor(others_ratio=math.inf)
    logits = sure_logits(labels)
    proposals = sampled(labels)
    deltas = torch.zeros(len(labels), 4 * NUM_CATEGORIES)
    losses = predictor.losses((logits, deltas), proposals)
    assert all(0 <= losses[name] < 1e-6 for name in GROUP_LOSSES)
    scores = torch.cat(predictor.predict_probs((logits, deltas), proposals))
    assert scores.shape == (len(labels), NUM_CATEGORIES + 1)
    assert torch.equal(scores.argmax(1), labels)
    # What detectron2 logs is of the scores as well.
    assert storage.latest()["fast_rcnn/cls_accuracy"][0] == 1
    assert storage.latest()["fast_rcnn/false_negative"][0] == 0


def test_labels_that_are_off_by_one_cost(storage: EventStorage) -> None:
    labels = torch.tensor([0, 7, 8, 3, 8, 4, 1, 2])
    predictor = make_predictor(others_ratio=math.inf)
    deltas = torch.zeros(len(labels), 4 * NUM_CATEGORIES)
    shifted = sampled((labels + 1) % (NUM_CATEGORIES + 1))
    losses = predictor.losses((sure_logits(labels), deltas), shifted)
    assert losses["loss_cls_bg_fg"] > 1


def test_a_layout_with_background_first_gives_the_same(storage: EventStorage) -> None:
    first = GroupLayout.from_counts(COUNTS, background="first", category_ids=IDS)
    assert make_predictor(layout=first).layout == LAYOUT


def test_scores_are_those_of_the_core() -> None:
    predictor = make_predictor()
    logits = torch.randn(7, LAYOUT.num_logits)
    parts = predictor.predict_probs((logits, None), sampled(torch.zeros(7).long()))
    assert [len(part) for part in parts] == [4, 3]
    assert torch.equal(torch.cat(parts), grouped_softmax_scores(logits, LAYOUT))


def test_loss_weight_multiplies(storage: EventStorage) -> None:
    weighted = make_predictor(loss_weight={"loss_cls": 0.25, "loss_box_reg": 3.0})
    plain = make_predictor()
    plain.load_state_dict(weighted.state_dict())
    features, proposals = torch.randn(10, FEATURES), sampled(torch.arange(10) % 9)
    torch.manual_seed(1)
    ours = weighted.losses(weighted(features), proposals)
    torch.manual_seed(1)
    theirs = plain.losses(plain(features), proposals)
    for name in theirs:
        factor = 3.0 if name == "loss_box_reg" else 0.25
        torch.testing.assert_close(ours[name], factor * theirs[name])


def test_no_rois_give_a_loss_of_zero(storage: EventStorage) -> None:
    predictor = make_predictor()
    proposals = sampled(torch.zeros(0).long())
    assert len(proposals) > 0
    losses = predictor.losses(predictor(torch.zeros(0, FEATURES)), proposals)
    assert sum(losses.values()) == 0
    sum(losses.values()).backward()


# --- detections ----------------------------------------------------------------------------------


@pytest.mark.parametrize("agnostic", [False, True], ids=["specific", "agnostic"])
@pytest.mark.parametrize("topk", [5, -1])
@pytest.mark.parametrize("threshold", [0.0, 0.3])
def test_detections_are_detectron2s(agnostic: bool, topk: int, threshold: float) -> None:
    boxes, scores, shapes = [], [], []
    for number in (30, 0, 12):
        corners = torch.rand(number, 1 if agnostic else 3, 2) * 80
        sizes = torch.rand(*corners.shape) * 40
        boxes.append(torch.cat([corners, corners + sizes], 2).flatten(1))
        scores.append(torch.rand(number, 4))
        shapes.append((70, 90))
    theirs, their_rows = fast_rcnn_inference(boxes, scores, shapes, threshold, 0.5, topk)
    ours, our_rows = select_instances(boxes, scores, shapes, threshold, 0.5, topk)
    assert [len(one) for one in ours] == [len(one) for one in theirs]
    assert len(ours[0]) > 3
    for mine, other in zip(ours, theirs, strict=True):
        assert mine.image_size == other.image_size
        assert torch.equal(mine.pred_boxes.tensor, other.pred_boxes.tensor)
        assert torch.equal(mine.scores, other.scores)
        assert torch.equal(mine.pred_classes, other.pred_classes)
    assert all(torch.equal(*pair) for pair in zip(our_rows, their_rows, strict=True))


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("where", ["boxes", "scores"])
def test_rois_that_are_not_finite_are_left_out(bad: float, where: str) -> None:
    corners = torch.rand(9, 2) * 40
    tensors = {"boxes": torch.cat([corners, corners + 10], 1), "scores": torch.rand(9, 4)}
    tensors[where][2, 1] = bad
    arguments = ([tensors["boxes"]], [tensors["scores"]], [(64, 64)], 0.0, 0.5, 100)
    (theirs,), _ = fast_rcnn_inference(*arguments)
    (ours,), (rows,) = select_instances(*arguments)
    assert torch.equal(ours.pred_boxes.tensor, theirs.pred_boxes.tensor)
    assert torch.equal(ours.scores, tensors["scores"][rows, ours.pred_classes])
    assert 2 not in rows.tolist()


@pytest.mark.parametrize("kind", KINDS)
def test_predicts(tmp_path: Path, kind: str) -> None:
    model = small_model(tmp_path, kind).eval()
    with torch.no_grad():
        outputs = model(images(labelled=False))
    for output in outputs:
        found = output["instances"]
        assert 0 < len(found) <= 100
        assert found.has("pred_masks") == ("mask" in kind)
        assert 0 <= found.pred_classes.min()
        assert found.pred_classes.max() < NUM_CATEGORIES
        assert (found.scores.diff() <= 0).all()


@pytest.mark.parametrize("agnostic", [False, True], ids=["specific", "agnostic"])
def test_training_on_predicted_boxes(tmp_path: Path, agnostic: bool) -> None:
    cfg = small_config(tmp_path, "mask")
    cfg.MODEL.ROI_BOX_HEAD.TRAIN_ON_PRED_BOXES = True
    cfg.MODEL.ROI_BOX_HEAD.CLS_AGNOSTIC_BBOX_REG = agnostic
    losses = step(build_model(cfg))
    assert {*GROUP_LOSSES, "loss_mask"} <= set(losses)


@pytest.mark.parametrize("kind", KINDS)
def test_images_without_ground_truth(tmp_path: Path, kind: str) -> None:
    model, batch = small_model(tmp_path, kind), images()
    freeze(model)
    for item in batch:
        item["instances"] = item["instances"][torch.zeros(2, dtype=torch.bool)]
    losses = step(model, batch)
    sum(losses.values()).backward()
    ranges = [value for name, value in losses.items() if "loss_cls" in name and "bg_fg" not in name]
    assert len(ranges) == 4 * len(predictors(model))
    assert sum(ranges) == 0


# --- cascades ------------------------------------------------------------------------------------


def cascade_inference(model: Any) -> tuple[list[Instances], list[Tensor]]:
    """Detections before the masks, and the logits of each stage."""
    heads, logits = model.roi_heads, []
    handles = [
        one.register_forward_hook(lambda _module, _inputs, out: logits.append(out[0]))
        for one in heads.box_predictor
    ]
    with torch.no_grad():
        batch = model.preprocess_image(images(labelled=False))
        features = model.backbone(batch.tensor)
        proposals, _ = model.proposal_generator(batch, features)
        torch.manual_seed(0)
        found = heads._forward_box(features, proposals)
    for handle in handles:
        handle.remove()
    return found, logits


def make_cascade(folder: Path, fusion: str) -> Any:
    torch.manual_seed(0)
    cfg = small_config(folder, "cascade")
    cfg.MODEL.BAGS.CASCADE_FUSION = fusion
    model = build_model(cfg).eval()
    for stage in predictors(model):
        nn.init.normal_(stage.cls_score.fc.weight, std=0.3)  # stages that differ
        nn.init.normal_(stage.bbox_pred.weight, std=0.05)
    return model


def test_fusion_of_probabilities_is_detectron2s(tmp_path: Path) -> None:
    model = make_cascade(tmp_path, "probabilities")
    torch.manual_seed(1)
    ours, _ = cascade_inference(model)
    model.roi_heads.__class__ = BAGSCascadeROIHeads.__mro__[1]
    torch.manual_seed(1)
    theirs, _ = cascade_inference(model)
    for mine, other in zip(ours, theirs, strict=True):
        assert len(mine) > 10
        torch.testing.assert_close(mine.scores, other.scores)
        torch.testing.assert_close(mine.pred_boxes.tensor, other.pred_boxes.tensor)
        assert torch.equal(mine.pred_classes, other.pred_classes)


def test_fusion_of_logits_activates_once(tmp_path: Path) -> None:
    model = make_cascade(tmp_path, "logits")
    assert model.roi_heads.fusion == "logits"
    torch.manual_seed(1)
    found, logits = cascade_inference(model)
    assert len(logits) == 3
    fused = grouped_softmax_scores(sum(logits) / 3, LAYOUT)
    averaged = sum(grouped_softmax_scores(one, LAYOUT) for one in logits) / 3
    first = fused[: len(fused) // 2, :-1]
    torch.testing.assert_close(found[0].scores[0], first.max())
    assert (fused - averaged).abs().max() > 0.05  # else the two could not be told apart


def test_logits_are_the_default(tmp_path: Path) -> None:
    cfg = small_config(tmp_path, "cascade")
    assert build_model(cfg).roi_heads.fusion == "logits"


def test_cascade_losses_have_their_stage(tmp_path: Path) -> None:
    losses = step(small_model(tmp_path, "cascade"))
    for stage in range(3):
        assert {f"{name}_stage{stage}" for name in GROUP_LOSSES} <= set(losses)
        assert f"loss_cls_stage{stage}" not in losses


def test_an_unknown_fusion_is_refused(tmp_path: Path) -> None:
    cfg = small_config(tmp_path, "cascade")
    cfg.MODEL.BAGS.CASCADE_FUSION = "product"
    with pytest.raises(ValueError, match=r"logits.*probabilities.*'product'"):
        build_model(cfg)


# --- freezing ------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_only_in_the_classifier(tmp_path: Path, kind: str) -> None:
    model = small_model(tmp_path, kind)
    trained = freeze(model)
    expected = [p for one in predictors(model) for p in one.cls_score.parameters()]
    assert {id(p) for p in trained} == {id(p) for p in expected}
    before = {name: value.clone() for name, value in model.state_dict().items()}
    optimizer = torch.optim.SGD(trained, lr=0.1)
    losses = step(model)
    assert any("mask" in name for name in losses) == ("mask" in kind)
    sum(losses.values()).backward()
    with_gradient = {name for name, p in model.named_parameters() if p.grad is not None}
    assert with_gradient == {name for name in with_gradient if ".cls_score.fc." in name}
    assert len(with_gradient) == 2 * len(predictors(model))
    optimizer.step()
    changed = {k for k, v in model.state_dict().items() if not torch.equal(v, before[k])}
    assert changed == with_gradient


@pytest.mark.parametrize(
    ("train", "trains", "rests"),
    [
        ("box_head", ["roi_heads.box_head", "roi_heads.box_predictor"], ["roi_heads.mask_head"]),
        ("box_and_mask_heads", ["roi_heads.box_head", "roi_heads.mask_head"], ["backbone"]),
        ("all", ["backbone", "proposal_generator", "roi_heads.mask_head"], []),
    ],
)
def test_other_choices_of_what_trains(
    tmp_path: Path, train: Any, trains: list[str], rests: list[str]
) -> None:
    model = small_model(tmp_path, "mask")
    freeze(model)
    freeze(model, train)
    sum(step(model).values()).backward()
    having = [name for name, p in model.named_parameters() if p.grad is not None]
    assert all(any(name.startswith(part) for name in having) for part in trains)
    assert not any(name.startswith(part) for name in having for part in rests)


def test_freezing_keeps_to_eval_mode_what_is_frozen(tmp_path: Path) -> None:
    model = small_model(tmp_path, "mask")
    freeze(model)
    model.train()
    assert model.training
    assert model.roi_heads.training
    assert model.roi_heads.mask_head.training  # its mode chooses losses or predictions
    assert model.roi_heads.box_predictor.cls_score.training
    assert not model.backbone.training
    assert not model.roi_heads.box_head.training


def test_freezing_refuses_what_it_cannot_serve(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match=r"StandardROIHeads.*got Linear"):
        freeze(nn.Linear(2, 2))
    with pytest.raises(ValueError, match="'everything'"):
        freeze(small_model(tmp_path), "everything")  # type: ignore[arg-type]


# --- arguments and configs -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"num_classes": 9}, ValueError, "`num_classes` 8.*got 9"),
        ({"layout": None}, ValueError, "exactly one.*got none"),
        ({"annotations": "a.json"}, ValueError, "exactly one.*got both"),
        ({"layout": 3}, TypeError, "GroupLayout or a path, got int"),
        ({"layout": GroupLayout.from_counts(COUNTS, background=None)}, ValueError, "background"),
        ({"use_sigmoid_ce": True}, ValueError, "use_sigmoid_ce"),
        ({"layout": "nowhere.json"}, OSError, "nowhere"),
        ({"others_ratio": -1.0}, ValueError, "others_ratio"),
    ],
)
def test_bad_arguments(options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        make_predictor(**options)


def test_rotated_boxes_are_refused() -> None:
    from detectron2.modeling.box_regression import Box2BoxTransformRotated

    transform = Box2BoxTransformRotated(weights=(10.0, 10.0, 5.0, 5.0, 1.0))
    with pytest.raises(ValueError, match="rotated"):
        BAGSFastRCNNOutputLayers(FEATURES, box2box_transform=transform, layout=LAYOUT)


def test_a_classifier_that_does_not_fit_the_features() -> None:
    transform = Box2BoxTransform(weights=(10.0, 10.0, 5.0, 5.0))
    with pytest.raises(ValueError, match=r"in_features=6.*got 5"):
        ClassifierOutputLayers(6, classifier=BAGSHead(5, LAYOUT), box2box_transform=transform)


def annotations_file(folder: Path) -> Path:
    categories = [
        {"id": id_, "name": str(id_), "instance_count": count}
        for id_, count in zip(IDS, COUNTS, strict=True)
    ]
    path = folder / "train.json"
    path.write_text(json.dumps({"categories": categories[::-1]}))
    return path


def test_groups_of_annotations(tmp_path: Path) -> None:
    assert read_layout(annotations=annotations_file(tmp_path)) == LAYOUT
    coarse = read_layout(annotations=annotations_file(tmp_path), thresholds=[100])
    assert coarse.group_names == ("bg_fg", "0_100", "100_inf")


def test_groups_in_a_lazy_config(tmp_path: Path) -> None:
    """Its own way to say objects; a `GroupLayout` itself is none of what OmegaConf can hold."""
    node = LazyCall(BAGSFastRCNNOutputLayers)(
        input_shape=ShapeSpec(channels=FEATURES),
        box2box_transform=LazyCall(Box2BoxTransform)(weights=(10, 10, 5, 5)),
        layout=LazyCall(GroupLayout.from_counts)(counts=COUNTS, category_ids=list(IDS)),
    )
    assert instantiate(node).layout == LAYOUT
    del node.layout
    node.update(annotations=str(annotations_file(tmp_path)), thresholds=[100])
    assert instantiate(node).layout.group_names == ("bg_fg", "0_100", "100_inf")


@pytest.mark.parametrize("kind", ["faster", "cascade_mask"])
def test_bfloat16_autocast(tmp_path: Path, kind: str) -> None:
    model = small_model(tmp_path, kind)
    freeze(model)
    with torch.autocast("cpu", torch.bfloat16):
        losses = step(model)
    own = [value for name, value in losses.items() if "loss_cls" in name]
    assert all(value.dtype == torch.float32 and value.isfinite() for value in own)
    sum(losses.values()).backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        found = model.eval()(images(labelled=False))[0]["instances"]
    assert len(found) > 0
    assert found.scores.dtype == torch.float32


@pytest.mark.parametrize("kind", KINDS)
def test_one_category_that_was_seen_a_few_times(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "one.json"
    GroupLayout.from_counts([5], background="last").save(path)
    cfg = small_config(tmp_path, kind, LAYOUT=str(path))
    cfg.MODEL.ROI_HEADS.NUM_CLASSES = 1
    model, batch = build_model(cfg), images()
    for item in batch:
        item["instances"].gt_classes.zero_()
    names = {name.split("_stage")[0] for name in step(model, batch) if "loss_cls" in name}
    assert names == {"loss_cls_bg_fg", "loss_cls_0_10"}
    with torch.no_grad():
        found = model.eval()(images(labelled=False))[0]["instances"]
    assert found.pred_classes.unique().tolist() == [0]


def test_a_config_counts_in_its_training_set_by_default(tmp_path: Path) -> None:
    path = annotations_file(tmp_path)
    name = f"train_of_{path}"
    MetadataCatalog.get(name).set(json_file=str(path))
    cfg = small_config(tmp_path, LAYOUT="")
    cfg.DATASETS.TRAIN = (name,)
    assert build_model(cfg).roi_heads.box_predictor.layout == LAYOUT


def test_a_config_with_several_training_sets_must_say_more(tmp_path: Path) -> None:
    cfg = small_config(tmp_path, LAYOUT="")
    cfg.DATASETS.TRAIN = ("coco_2017_train", "coco_2017_val")
    with pytest.raises(ValueError, match=r"MODEL\.BAGS\.LAYOUT.*coco_2017_val"):
        build_model(cfg)


def test_config_keys_arrive(tmp_path: Path) -> None:
    path = str(annotations_file(tmp_path))
    cfg = small_config(
        tmp_path, ANNOTATIONS=path, THRESHOLDS=(100,), OTHERS_RATIO=3.0, IMPL="reference"
    )
    head = build_model(cfg).roi_heads.box_predictor.cls_score
    assert head.layout.group_names == ("bg_fg", "0_100", "100_inf")
    assert head.others_ratio == 3.0
    assert head.impl == "reference"


def test_copies_and_pickles(tmp_path: Path) -> None:
    model = small_model(tmp_path)
    freeze(model)
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    again = torch.load(buffer, weights_only=False)
    assert again.roi_heads.box_predictor.layout == LAYOUT
    assert [p.requires_grad for p in again.parameters()] == [
        p.requires_grad for p in model.parameters()
    ]
