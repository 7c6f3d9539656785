"""The loss, the hooks and the checks of the adapter for mmdet."""

import json
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("mmdet.registry", reason="mmdet is not installed: docs/mmdet.md says how")

import torch
from mmdet.models.losses import CrossEntropyLoss
from mmdet.registry import MODELS
from mmdet_cases import batch, build, losses_of, read_config
from mmengine.runner.checkpoint import load_state_dict
from torch import Tensor

from balanced_group_softmax import BAGSHead, GroupLayout, grouped_softmax_loss
from balanced_group_softmax.adapters.mmdet import (
    FreezeHook,
    MMDetBAGSLoss,
    StartHook,
    check_categories,
    check_detector,
    freeze,
    start_from_softmax,
)

COUNTS = [3, 50, 600, 5000, 7]
LAYOUT = GroupLayout.from_counts(COUNTS, background="last")
R50 = "bags/bags_faster-rcnn_r50_fpn_1x_lvis-v0.5"


def make(**options: Any) -> MMDetBAGSLoss:
    return MODELS.build({"type": "BAGSLoss", **({"counts": COUNTS} if not options else options)})


def rows(number: int = 64) -> tuple[Tensor, Tensor]:
    return torch.randn(number, LAYOUT.num_logits), torch.randint(0, 6, (number,))


# --- the loss ------------------------------------------------------------------------------------


def test_it_is_the_loss_of_the_library() -> None:
    logits, labels = rows()
    torch.manual_seed(1)
    losses = make()(logits.requires_grad_(), labels, torch.ones(64), avg_factor=3.0)
    torch.manual_seed(1)
    expected = grouped_softmax_loss(logits, labels, LAYOUT, reduction="groups")
    assert list(losses) == [f"loss_cls_{name}" for name in LAYOUT.group_names]
    torch.testing.assert_close(torch.stack(list(losses.values())), expected)
    sum(losses.values()).backward()
    assert logits.grad is not None


def test_rows_of_weight_0_take_part_in_nothing() -> None:
    logits, labels = rows()
    loss = make(counts=COUNTS, others_ratio=1e9)
    weight = (torch.arange(64) % 3 > 0).float()
    kept = weight > 0
    some, same = loss(logits, labels, weight), loss(logits[kept], labels[kept])
    for name in same:
        torch.testing.assert_close(some[name], same[name])


def test_half_precision_logits_have_losses_in_single() -> None:
    logits, labels = rows()
    assert all(value.dtype == torch.float32 for value in make()(logits.half(), labels).values())


def test_accuracy_of_each_group() -> None:
    loss = make()
    labels = torch.tensor([0, 4, 1, 5, 5])  # two of 0_10, one of 10_100, two of background
    logits = torch.zeros(5, LAYOUT.num_logits)
    starts = dict(zip(LAYOUT.group_names, LAYOUT.group_starts, strict=True))
    logits[[0, 1, 2], 1] = 9  # foreground
    logits[3, 0] = logits[4, 1] = 9  # the last one is wrong
    logits[0, starts["0_10"] + 1] = 9
    logits[1, starts["0_10"] + 1] = 9  # wrong: category 0 instead of 4
    logits[2, starts["10_100"] + 1] = 9
    accuracy = {name: float(value) for name, value in loss.get_accuracy(logits, labels).items()}
    assert accuracy == {
        "acc": 60.0,
        "acc_bg_fg": 80.0,
        "acc_0_10": 50.0,
        "acc_10_100": 100.0,
        "acc_100_1000": 0.0,  # no row
        "acc_1000_inf": 0.0,
    }


def test_groups_come_from_a_file_annotations_or_the_config(tmp_path: Path) -> None:
    first = GroupLayout.from_counts(COUNTS, category_ids=[2, 4, 6, 8, 10])
    first.save(tmp_path / "layout.json")
    rows = [{"id": i, "instance_count": n} for i, n in zip((2, 4, 6, 8, 10), COUNTS, strict=True)]
    (tmp_path / "train.json").write_text(json.dumps({"categories": rows}))
    named = make(layout=str(tmp_path / "layout.json")).layout
    assert named.background == "last"
    assert named.groups == LAYOUT.groups
    assert make(annotations=str(tmp_path / "train.json")).layout == named
    assert make(layout=json.loads(first.to_json())).layout == named
    assert make(counts=COUNTS).layout == LAYOUT
    assert make(counts=COUNTS, thresholds=[100]).layout.names == ("0_100", "100_inf")


def test_weights_within_groups() -> None:
    loss = make(counts=COUNTS, category_weights="inverse_frequency")
    inverse = torch.tensor([1 / 3, 1 / 7]) / ((1 / 3 + 1 / 7) / 2)
    torch.testing.assert_close(loss.category_weights[[0, 4]], inverse)
    assert loss.category_weights[1:4].tolist() == [1, 1, 1]
    assert make(counts=COUNTS, category_weights=[1.0, 2, 3, 4, 5]).category_weights[4] == 5
    assert "category_weights" not in loss.state_dict()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"counts": COUNTS, "layout": LAYOUT}, "exactly one of .* got layout and counts"),
        ({"others_ratio": 8.0}, "exactly one of .* got none"),
        ({"layout": GroupLayout.from_counts(COUNTS, background=None)}, "with background"),
        ({"counts": [-1]}, "non-negative"),
        ({"counts": COUNTS, "category_weights": "x"}, "inverse_frequency"),
        ({"layout": LAYOUT, "category_weights": "inverse_frequency"}, "inverse_frequency"),
        ({"counts": COUNTS, "category_weights": [1.0]}, "for 5 categories, got 1"),
        ({"counts": COUNTS, "others_ratio": -1.0}, "others_ratio"),
        ({"counts": COUNTS, "impl": "x"}, "impl"),
    ],
)
def test_bad_options_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MMDetBAGSLoss(**options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layout": 3}, "path, a dict or a GroupLayout, got int"),
        ({"annotations": 3}, "`annotations` to be a path, got int"),
        ({"counts": COUNTS, "thresholds": 5}, "`thresholds` to be a sequence of ints, got 5"),
        ({"counts": COUNTS, "category_weights": 3}, "`category_weights` to be a sequence, got 3"),
    ],
)
def test_options_of_the_wrong_type_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(TypeError, match=message):
        MMDetBAGSLoss(**options)


def test_another_number_of_classes_is_refused_when_the_head_is_built() -> None:
    config = read_config(R50)
    config.model.roi_head.bbox_head.num_classes = 80
    with pytest.raises(ValueError, match=r"`num_classes` 1230, .* got 80"):
        build(config)


# --- checkpoints ---------------------------------------------------------------------------------


def test_a_checkpoint_describes_itself() -> None:
    loss = make()
    state = loss.state_dict()
    assert list(state) == ["_extra_state"]
    assert GroupLayout.from_state_dict(state) == LAYOUT
    other = make(counts=[50, 3, 600, 5000, 7])
    with pytest.raises(ValueError, match="2 categories in other groups"):
        other.load_state_dict(state)
    with pytest.raises(ValueError, match="another layout"):
        load_state_dict(other, state)  # mmengine's own
    load_state_dict(make(), state, strict=True)


def test_bags_starts_from_the_softmax_classifier() -> None:
    model = build(read_config(R50))
    plain = torch.nn.Linear(1024, 1231)
    name = "roi_head.bbox_head.fc_cls"
    state: dict[str, Any] = {f"{name}.weight": plain.weight.data, f"{name}.bias": plain.bias.data}
    runner = type("Runner", (), {"model": model, "logger": _Silent()})()
    StartHook().after_load_checkpoint(runner, {"state_dict": state})
    expected = BAGSHead.from_linear(plain, model.roi_head.bbox_head.loss_cls.layout)
    assert torch.equal(state[f"{name}.weight"], expected.fc.weight)
    assert start_from_softmax(state, model) == 0  # as wide as logits now
    load_state_dict(model, state)
    assert torch.equal(model.roi_head.bbox_head.fc_cls.bias, expected.fc.bias)
    with pytest.raises(ValueError, match="1231 rows"):
        start_from_softmax({f"{name}.weight": torch.zeros(3, 4)}, model)
    with pytest.raises(ValueError, match=r"bias \[1231\], got \[1231, 1024\] and None"):
        start_from_softmax({f"{name}.weight": plain.weight}, model)
    with pytest.raises(ValueError, match=r"weight \[1231, 1024\] .* got \[1231, 9\]"):
        start_from_softmax({f"{name}.weight": torch.zeros(1231, 9)}, model)


class _Silent:
    def info(self, text: str) -> None:
        """Say nothing."""


# --- what trains ---------------------------------------------------------------------------------

MASK = "bags/bags_mask-rcnn_r50_fpn_1x_lvis-v0.5"


@pytest.mark.parametrize(
    ("train", "parts"),
    [
        (0, ("backbone", "neck", "rpn_head", "roi_head")),
        (1, ("roi_head.bbox_head.fc_cls",)),
        ("classifier", ("roi_head.bbox_head.fc_cls",)),
        (2, ("roi_head.bbox_head",)),
        (4, ("roi_head.bbox_head", "roi_head.mask_head")),
        ("box_and_mask_heads", ("roi_head.bbox_head", "roi_head.mask_head")),
    ],
)
def test_the_four_modes_of_the_original(train: Any, parts: tuple[str, ...]) -> None:
    model = build(read_config(MASK))
    could = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    freeze(model, train)
    trains = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trains == {name for name in could if name.startswith(tuple(f"{p}." for p in parts))}
    assert trains
    model.train()
    assert model.backbone.training == (train == 0)
    assert model.roi_head.bbox_head.fc_cls.training


def test_modes_that_do_not_fit_are_refused() -> None:
    model = build(read_config(R50))
    for train, message in ((3, "3 for a cascade"), (5, "0 to 4"), ("x", "one of"), (4, "masks?")):
        with pytest.raises(ValueError, match=message):
            freeze(model, train)
    with pytest.raises(TypeError, match="two-stage detector"):
        freeze(torch.nn.Linear(2, 2))
    model.roi_head.bbox_head = torch.nn.Linear(2, 2)
    with pytest.raises(ValueError, match="classifier `fc_cls` for 'classifier', got Linear"):
        freeze(model)


# --- what cannot serve ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    "head",
    [
        {"type": "DoubleConvFCBBoxHead", "num_convs": 1, "num_fcs": 1, "in_channels": 256,
         "conv_out_channels": 1024, "fc_out_channels": 1024, "roi_feat_size": 7},
        {"type": "SABLHead", "num_classes": 1230, "cls_in_channels": 256},
        {"type": "DIIHead", "num_classes": 1230},
    ],
    ids=lambda head: head["type"],
)  # fmt: skip
def test_heads_with_a_classifier_of_their_own_are_refused(head: dict[str, Any]) -> None:
    config = read_config(R50)
    old = config.model.roi_head.bbox_head
    config.model.roi_head.bbox_head = {**head, "loss_cls": old.loss_cls}
    if head["type"] == "DoubleConvFCBBoxHead":
        config.model.roi_head.bbox_head["num_classes"] = 1230
        config.model.roi_head.update(type="DoubleHeadRoIHead", reg_roi_scale_factor=1.3)

    def use() -> None:
        check_detector(build(config))

    with pytest.raises((TypeError, ValueError), match="DoubleHead, SABL, Sparse R-CNN"):
        use()


def test_logits_of_another_width_are_refused() -> None:
    with pytest.raises(ValueError, match=r"\[R, 11\] .* got \[4, 6\]: DoubleHead"):
        make()(torch.zeros(4, 6), torch.zeros(4, dtype=torch.int64))


@pytest.mark.parametrize("kind", ["OHEMSampler", "ScoreHLRSampler"])
def test_samplers_that_want_single_losses_are_refused(kind: str) -> None:
    config = read_config(R50)
    config.model.train_cfg.rcnn.sampler.type = kind
    model = build(config)
    with pytest.raises(ValueError, match=f"RandomSampler, got {kind}"):
        check_detector(model)
    data = model.data_preprocessor(batch(1230), True)
    with pytest.raises(ValueError, match="OHEM, score-HLR, PISA"):
        model(**data, mode="loss")


def test_labels_in_another_order_are_refused() -> None:
    dataset = type("Data", (), {"cat2label": {1: 0, 3: 1, 2: 2, 4: 3, 5: 4}, "ann_file": "a.json"})
    with pytest.raises(ValueError, match=r"ascending order .* a\.json"):
        check_categories(dataset, LAYOUT)
    dataset.cat2label = {1: 0, 2: 1, 3: 2, 4: 3, 5: 4}
    check_categories(type("Wrapper", (), {"dataset": dataset}), LAYOUT)
    with_ids = GroupLayout.from_counts(COUNTS, background="last", category_ids=[1, 2, 3, 4, 6])
    with pytest.raises(ValueError, match=r"\[5, 6\]"):
        check_categories(dataset, with_ids)


def test_the_hook_checks_and_freezes() -> None:
    model = build(read_config(R50))
    loader = type("Loader", (), {"dataset": object()})()
    runner = type("R", (), {"model": model, "train_dataloader": loader, "logger": _Silent()})()
    FreezeHook(train=1).before_train(runner)
    trains = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert trains == ["roi_head.bbox_head.fc_cls.weight", "roi_head.bbox_head.fc_cls.bias"]


# --- the re-weighted baseline --------------------------------------------------------------------


def test_reweighted_cross_entropy_is_the_original_formula() -> None:
    options = {"type": "ReweightedCrossEntropyLoss", "counts": COUNTS}
    loss = MODELS.build({**options, "scheme": "class_balanced"})
    assert isinstance(loss, CrossEntropyLoss)
    logits, labels = torch.randn(40, 6), torch.randint(0, 6, (40,))
    n = torch.tensor(COUNTS, dtype=torch.float64)
    weights = 0.001 / (1 - 0.999**n)
    weights = torch.cat([(weights / weights.mean()).clamp(0.1, 5), torch.ones(1)])
    each = torch.nn.functional.cross_entropy(logits, labels, reduction="none")
    expected = (each * weights[labels]).sum() / 40
    result = loss(logits, labels, torch.ones(40), avg_factor=40)
    torch.testing.assert_close(result.double(), expected.double())
    with pytest.raises(ValueError, match="one of"):
        MODELS.build({**options, "scheme": "x"})
    with pytest.raises(ValueError, match="exactly one"):
        MODELS.build({"type": "ReweightedCrossEntropyLoss"})


def test_configs_without_bags_have_other_losses() -> None:
    kinds = {
        losses_of(read_config(f"transferred/faster-rcnn_r50_fpn_{name}_lvis-v0.5"))[0].type
        for name in ("2x", "reweight", "focal")
    }
    assert kinds == {"CrossEntropyLoss", "ReweightedCrossEntropyLoss", "FocalLoss"}
