"""Checkpoints of the detectron2 adapter, written and read by detectron2's own checkpointer."""

import pickle
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip(
    "detectron2.modeling", reason="detectron2 is not installed: docs/detectron2.md says how"
)

from detectron2.checkpoint import DetectionCheckpointer
from detectron2.modeling import build_model
from detectron2.solver import build_lr_scheduler, build_optimizer
from detectron2_cases import (
    COUNTS,
    IDS,
    LAYOUT,
    NUM_CATEGORIES,
    predictors,
    small_config,
    small_model,
)

from balanced_group_softmax import BAGSHead, GroupLayout
from balanced_group_softmax.adapters.detectron2 import ClassifierOutputLayers, freeze, read_layout
from balanced_group_softmax.rebalance.focal import FocalClassifier
from balanced_group_softmax.rebalance.seesaw import SeesawClassifier

PREFIX = "roi_heads.box_predictor."


def save(model: nn.Module, folder: Path, **more: Any) -> Path:
    folder.mkdir(exist_ok=True)
    DetectionCheckpointer(model, str(folder), **more).save("model_final", iteration=7)
    return folder / "model_final.pth"


def save_state(state: dict[str, Tensor], path: Path) -> Path:
    torch.save({"model": state}, path)
    return path


def load(model: nn.Module, path: Path) -> None:
    DetectionCheckpointer(model).load(str(path))


def with_layout(folder: Path, layout: GroupLayout, kind: str = "faster", **keys: Any) -> nn.Module:
    path = folder / "other_layout.json"
    layout.save(path)
    cfg = small_config(folder, kind, LAYOUT=str(path))
    for name, value in keys.items():
        setattr(cfg.MODEL.ROI_BOX_HEAD, name, value)
    cfg.MODEL.ROI_HEADS.NUM_CLASSES = layout.num_categories
    return build_model(cfg)


@pytest.mark.parametrize("kind", ["faster", "cascade_mask"])
def test_a_checkpoint_reloads_in_a_fresh_process(tmp_path: Path, kind: str) -> None:
    cfg = small_config(tmp_path, kind)
    model = build_model(cfg)
    freeze(model)
    optimizer = build_optimizer(cfg, model)
    scheduler = build_lr_scheduler(cfg, optimizer)
    path = save(model, tmp_path / "run", optimizer=optimizer, scheduler=scheduler)
    script = f"""
import sys, torch
from balanced_group_softmax import BAGSHead, GroupLayout
state = torch.load({str(path)!r}, weights_only=True)["model"]
layout = GroupLayout.from_state_dict(state)
print(layout.to_json())
prefix = {PREFIX + ("0." if "cascade" in kind else "") + "cls_score."!r}
head = BAGSHead(state[prefix + "fc.weight"].shape[1], layout)
own = [key for key in state if key.startswith(prefix)]
head.load_state_dict({{key.removeprefix(prefix): state[key] for key in own}})
assert "detectron2" not in sys.modules
"""
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert GroupLayout.from_json(result.stdout) == LAYOUT
    # The file alone is enough to build the detector, too.
    path.with_name("layout.json").unlink(missing_ok=True)
    assert read_layout(path) == LAYOUT
    again = build_model(small_config(tmp_path, kind, LAYOUT=str(path)))
    load(again, path)
    for name, value in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], value), name


def test_resuming_loads_optimiser_and_scheduler(tmp_path: Path) -> None:
    cfg = small_config(tmp_path)
    model = build_model(cfg)
    optimizer = build_optimizer(cfg, model)
    scheduler = build_lr_scheduler(cfg, optimizer)
    save(model, tmp_path / "run", optimizer=optimizer, scheduler=scheduler)
    checkpointer = DetectionCheckpointer(
        model, str(tmp_path / "run"), optimizer=optimizer, scheduler=scheduler
    )
    assert checkpointer.resume_or_load("", resume=True)["iteration"] == 7


@pytest.mark.parametrize("kind", ["faster", "cascade"])
def test_a_softmax_classifier_is_converted(tmp_path: Path, kind: str) -> None:
    softmax = small_model(tmp_path, kind, bags=False)
    path = save(softmax, tmp_path / "softmax")
    model = small_model(tmp_path, kind)
    load(model, path)
    for ours, theirs in zip(predictors(model), predictors(softmax), strict=True):
        expected = BAGSHead.from_linear(theirs.cls_score, LAYOUT).state_dict()
        for name, value in ours.cls_score.state_dict().items():
            assert torch.equal(value, expected[name]), name
        # Background is detectron2's last row: it becomes the first column, and the others.
        weight = ours.cls_score.fc.weight
        assert torch.equal(weight[0], theirs.cls_score.weight[NUM_CATEGORIES])
        assert torch.equal(weight[LAYOUT.group_starts[1] + 1], theirs.cls_score.weight[0])
    rest = {k: v for k, v in model.state_dict().items() if "box_predictor" not in k}
    assert all(torch.equal(softmax.state_dict()[name], value) for name, value in rest.items())


def test_nothing_is_reported_missing_after_a_conversion(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = save(small_model(tmp_path, bags=False), tmp_path / "softmax")
    state = torch.load(path, weights_only=True)["model"]
    found = small_model(tmp_path).load_state_dict(state, strict=True)
    assert found.missing_keys == found.unexpected_keys == []


def test_a_classifier_of_other_categories_fails(tmp_path: Path) -> None:
    cfg = small_config(tmp_path, bags=False)
    cfg.MODEL.ROI_HEADS.NUM_CLASSES = 80
    path = save(build_model(cfg), tmp_path / "softmax")
    with pytest.raises(ValueError, match=r"\[9, 24\] \(8 categories.*got \[81, 24\]"):
        load(small_model(tmp_path), path)


@pytest.mark.parametrize("bags", [False, True], ids=["softmax", "bags"])
@pytest.mark.parametrize("kind", ["faster", "cascade"])
def test_a_fresh_classifier_in_place_of_one_that_does_not_fit(
    tmp_path: Path, kind: str, bags: bool
) -> None:
    """As docs/detectron2.md says it, for stock detectors and for those of another layout."""
    cfg = small_config(
        tmp_path, kind, bags=bags, **({"LAYOUT": str(tmp_path / "a")} if bags else {})
    )
    GroupLayout.from_counts(range(80), background="last").save(tmp_path / "a")
    cfg.MODEL.ROI_HEADS.NUM_CLASSES = 80
    theirs = build_model(cfg).state_dict()
    model = small_model(tmp_path, kind)
    with pytest.raises(ValueError, match="fresh classifier"):
        load(model, save_state(theirs, tmp_path / "theirs.pth"))
    state = {name: value for name, value in theirs.items() if ".cls_score." not in name}
    own = model.state_dict()
    state |= {k: v for k, v in own.items() if ".cls_score." in k or k.endswith("_extra_state")}
    load(model, save_state(state, tmp_path / "start.pth"))
    name = (
        "roi_heads.box_head.0.fc1.weight" if kind == "cascade" else "roi_heads.box_head.fc1.weight"
    )
    assert torch.equal(model.state_dict()[name], theirs[name])


def test_a_classifier_that_is_lost_by_its_name_fails(tmp_path: Path) -> None:
    """detectron2 can match names by their ends, and finds no `cls_score.weight` in the model."""
    softmax = small_model(tmp_path, bags=False)
    state = {k.removeprefix("roi_heads."): v for k, v in softmax.state_dict().items()}
    path = save_state(state, tmp_path / "short_names.pth")
    model = small_model(tmp_path)
    with pytest.raises(ValueError, match=r"cls_score\.fc\.weight.*of another name"):
        DetectionCheckpointer(model).load(f"{path}?matching_heuristics=True")


def with_classifier(folder: Path, classifier: nn.Module, *, agnostic: bool) -> nn.Module:
    model = small_model(folder, bags=False)
    stock = model.roi_heads.box_predictor
    model.roi_heads.box_predictor = ClassifierOutputLayers(
        stock.cls_score.in_features,
        classifier=classifier,
        box2box_transform=stock.box2box_transform,
        cls_agnostic_bbox_reg=agnostic,
    )
    return model


@pytest.mark.parametrize("agnostic", [False, True], ids=["specific", "agnostic"])
def test_other_classifiers_reload_and_fail_as_well(tmp_path: Path, agnostic: bool) -> None:
    def make(number: int, kind: Any = SeesawClassifier) -> nn.Module:
        classifier = kind(24, number, background="last")
        return with_classifier(tmp_path, classifier, agnostic=agnostic)

    model = make(NUM_CATEGORIES)
    path = save(model, tmp_path / "run")
    again = make(NUM_CATEGORIES)
    load(again, path)
    weight = again.roi_heads.box_predictor.cls_score.fc.weight
    assert torch.equal(weight, model.roi_heads.box_predictor.cls_score.fc.weight)
    with pytest.raises(ValueError, match=r"another kind or shape than a Seesaw.* of 80 categories"):
        load(make(80), path)
    with pytest.raises(ValueError, match="another kind or shape than a FocalClassifier"):
        load(make(NUM_CATEGORIES, FocalClassifier), path)
    with pytest.raises(ValueError, match="has other groups"):
        load(small_model(tmp_path), path)


@pytest.mark.parametrize("agnostic", [False, True], ids=["specific", "agnostic"])
def test_a_softmax_classifier_for_another_method(
    tmp_path: Path, agnostic: bool, caplog: pytest.LogCaptureFixture
) -> None:
    def make(number: int) -> nn.Module:
        classifier = SeesawClassifier(24, number, background="last")
        return with_classifier(tmp_path, classifier, agnostic=agnostic)

    path = save(small_model(tmp_path, bags=False), tmp_path / "softmax")
    load(make(NUM_CATEGORIES), path)
    assert "SeesawClassifier.from_linear" in caplog.text
    with pytest.raises(ValueError, match=r"\[10, 24\] \(9 categories.*got \[9, 24\]"):
        load(make(9), path)


def test_a_bags_head_is_the_same_in_both_box_predictors(tmp_path: Path) -> None:
    model = with_classifier(tmp_path, BAGSHead(24, LAYOUT), agnostic=False)
    path = save(model, tmp_path / "run")
    again = small_model(tmp_path)
    load(again, path)
    for name, value in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], value), name


OTHERS = {
    "as many logits, other members": ([50, 3, 700, 9000, 4, 60, 800, 20000], IDS),
    "fewer groups": ([3, 5, 700, 9000, 4, 6, 800, 20000], IDS),
    "more categories": ([*COUNTS, 7], (*IDS, 30)),
    "other category ids": (COUNTS, (*IDS[:-1], 18)),
    "other category ids, longer": (COUNTS, (*IDS[:-1], 1234)),
}


@pytest.mark.parametrize("case", OTHERS)
@pytest.mark.parametrize("kind", ["faster", "cascade"])
def test_a_classifier_of_another_layout_fails(tmp_path: Path, case: str, kind: str) -> None:
    counts, ids = OTHERS[case]
    other = GroupLayout.from_counts(counts, background="last", category_ids=ids)
    path = save(with_layout(tmp_path, other, kind), tmp_path / "other")
    with pytest.raises(ValueError, match=r"other (groups|category ids) than the layout of 8 cat"):
        load(small_model(tmp_path, kind), path)


def test_a_classifier_of_other_features_fails(tmp_path: Path) -> None:
    path = save(with_layout(tmp_path, LAYOUT, FC_DIM=32), tmp_path / "wide")
    with pytest.raises(ValueError, match=r"cls_score\.fc\.weight.*14 logits and 24 features"):
        load(small_model(tmp_path), path)


def test_category_ids_that_one_side_does_not_know_are_no_difference(tmp_path: Path) -> None:
    unknown = replace(LAYOUT, category_ids=None)
    model = with_layout(tmp_path, unknown)
    path = save(model, tmp_path / "unknown")
    again = small_model(tmp_path)
    load(again, path)
    name = f"{PREFIX}cls_score.fc.weight"
    assert torch.equal(again.state_dict()[name], model.state_dict()[name])
    assert again.roi_heads.box_predictor.layout == LAYOUT


def test_a_backbone_alone_loads(tmp_path: Path) -> None:
    model = small_model(tmp_path)
    state = {k: v + 1 for k, v in model.state_dict().items() if k.startswith("backbone.")}
    load(model, save_state(state, tmp_path / "backbone.pth"))
    assert all(torch.equal(model.state_dict()[name], value) for name, value in state.items())


def test_a_layout_cannot_be_read_from_a_softmax_checkpoint(tmp_path: Path) -> None:
    path = save(small_model(tmp_path, bags=False), tmp_path / "softmax")
    with pytest.raises(ValueError, match=r"model_final\.pth: .*found none"):
        read_layout(path)


def test_a_softmax_classifier_of_the_model_zoo_is_converted(tmp_path: Path) -> None:
    softmax = small_model(tmp_path, bags=False)
    arrays = {name: value.numpy() for name, value in softmax.state_dict().items()}
    path = tmp_path / "model_final.pkl"
    path.write_bytes(pickle.dumps({"model": arrays, "__author__": "somebody"}))
    model = small_model(tmp_path)
    load(model, path)
    expected = BAGSHead.from_linear(softmax.roi_heads.box_predictor.cls_score, LAYOUT).fc.weight
    assert torch.equal(model.roi_heads.box_predictor.cls_score.fc.weight, expected)


@pytest.mark.parametrize("name", ["damaged.pth", "code.pth", "model.pkl"])
def test_a_layout_cannot_be_read_from_such_a_file(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    torch.save({"model": {}, "code": Path()}, path)
    if name == "damaged.pth":
        path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(ValueError, match=rf"{name}: expected a .*, got"):
        read_layout(path)
