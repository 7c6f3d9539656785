"""The torchvision adapter against stock torchvision: equal bit by bit wherever BAGS has no part."""

import copy
import io
import pickle
from collections import OrderedDict
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

tv = pytest.importorskip("torchvision.models.detection")

from torchvision.models.detection.faster_rcnn import (  # noqa: E402
    FastRCNNConvFCHead,
    FastRCNNPredictor,
    TwoMLPHead,
)
from torchvision.models.detection.keypoint_rcnn import (  # noqa: E402
    KeypointRCNNHeads,
    KeypointRCNNPredictor,
)
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor  # noqa: E402
from torchvision.models.detection.roi_heads import RoIHeads  # noqa: E402
from torchvision.models.detection.rpn import AnchorGenerator  # noqa: E402
from torchvision.ops import MultiScaleRoIAlign  # noqa: E402

from balanced_group_softmax import BAGSHead, GroupLayout  # noqa: E402
from balanced_group_softmax.adapters.protocol import check_classifier  # noqa: E402
from balanced_group_softmax.adapters.torchvision import (  # noqa: E402
    ClassifierRoIHeads,
    convert_classifier,
    convert_to_bags,
    freeze,
)

COUNTS = [3, 50, 700, 9000, 4, 60, 800, 20000]
NUM_CATEGORIES = len(COUNTS)
LAYOUT = GroupLayout.from_counts(COUNTS)
GROUP_LOSSES = [f"loss_cls_{name}" for name in ("bg_fg", "0_10", "10_100", "100_1000", "1000_inf")]
PREFIX = "roi_heads.box_predictor.cls_score."


class SoftmaxClassifier(nn.Linear):
    """Plain softmax as a classifier: the adapter must then be torchvision itself."""

    background = "first"

    @classmethod
    def like(cls, linear: nn.Linear) -> "SoftmaxClassifier":
        classifier = cls(linear.in_features, linear.out_features)
        classifier.load_state_dict(linear.state_dict())
        return classifier

    @property
    def num_categories(self) -> int:
        return self.out_features - 1

    def losses(self, logits: Tensor, labels: Tensor) -> dict[str, Tensor]:
        return {"loss_cls": F.cross_entropy(logits, labels)}

    def scores(self, logits: Tensor) -> Tensor:
        return F.softmax(logits, -1)


class Backbone(nn.Sequential):
    """Small, with the two layers whose mode matters: batch norm and dropout."""

    out_channels = 8

    def __init__(self) -> None:
        super().__init__(
            nn.Conv2d(3, 8, 8, stride=8), nn.BatchNorm2d(8), nn.ReLU(), nn.Dropout(0.5)
        )


def _pool(size: int) -> MultiScaleRoIAlign:
    return MultiScaleRoIAlign(["0"], size, 2)


def make_model(kind: str = "faster", **options: Any) -> nn.Module:
    torch.manual_seed(1)
    made = {"mask": tv.MaskRCNN, "keypoint": tv.KeypointRCNN}.get(kind, tv.FasterRCNN)
    box_head: nn.Module = TwoMLPHead(8 * 9, 16)
    if kind == "conv head":  # as in fasterrcnn_resnet50_fpn_v2
        box_head = FastRCNNConvFCHead((8, 3, 3), [8], [16], norm_layer=nn.BatchNorm2d)
    if kind == "mask":
        options.update(
            mask_roi_pool=_pool(4),
            mask_head=MaskRCNNHeads(8, (8,), 1),
            mask_predictor=MaskRCNNPredictor(8, 8, NUM_CATEGORIES + 1),
        )
    if kind == "keypoint":
        options.update(
            keypoint_roi_pool=_pool(4),
            keypoint_head=KeypointRCNNHeads(8, (8,)),
            keypoint_predictor=KeypointRCNNPredictor(8, num_keypoints=3),
        )
    model = made(
        Backbone(),
        min_size=64,
        max_size=96,
        rpn_anchor_generator=AnchorGenerator(((16, 32, 48),), ((0.5, 1.0, 2.0),)),
        box_roi_pool=_pool(3),
        box_head=box_head,
        box_predictor=FastRCNNPredictor(16, NUM_CATEGORIES + 1),
        rpn_pre_nms_top_n_train=300,
        rpn_post_nms_top_n_train=200,
        **options,
    )
    with torch.no_grad():  # scores far enough apart that none are equal
        model.roi_heads.box_predictor.cls_score.weight.mul_(20)
    return model


@pytest.fixture
def model() -> nn.Module:
    return make_model()


def make_images() -> list[Tensor]:
    generator = torch.Generator().manual_seed(2)
    return [torch.rand(3, *size, generator=generator) for size in ((64, 80), (72, 64))]


def make_targets(kind: str = "faster") -> list[dict[str, Tensor]]:
    """One image with three objects, one with none."""
    boxes = torch.tensor([[4.0, 4, 40, 50], [20, 10, 70, 60], [30, 30, 50, 60]])
    targets = [
        {"boxes": boxes, "labels": torch.tensor([1, 4, 8])},
        {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.int64)},
    ]
    if kind == "mask":
        for target, size in zip(targets, ((64, 80), (72, 64)), strict=True):
            target["masks"] = torch.ones(len(target["boxes"]), *size, dtype=torch.uint8)
    if kind == "keypoint":
        for target in targets:
            centres = (target["boxes"][:, None, :2] + target["boxes"][:, None, 2:]) / 2
            visible = torch.ones(len(centres), 3, 1)
            target["keypoints"] = torch.cat((centres.expand(-1, 3, -1), visible), dim=2)
    return targets


def train_step(model: nn.Module, kind: str = "faster", seed: int = 3) -> dict[str, Tensor]:
    model.train()
    model.zero_grad()
    torch.manual_seed(seed)
    losses = model(make_images(), make_targets(kind))
    sum(losses.values()).backward()
    return losses


def to_softmax(model: nn.Module) -> nn.Module:
    classifier = SoftmaxClassifier.like(model.roi_heads.box_predictor.cls_score)
    return convert_classifier(model, classifier, inplace=False)


def assert_same(actual: Any, expected: Any) -> None:
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)


KINDS = ["faster", "mask", "keypoint", "conv head"]


# Training


@pytest.mark.parametrize("kind", KINDS)
def test_softmax_trains_as_torchvision_does(kind: str) -> None:
    stock = make_model(kind)
    converted = to_softmax(stock)

    expected, actual = train_step(stock, kind), train_step(converted, kind)

    expected["loss_cls"] = expected.pop("loss_classifier")
    assert_same(dict(actual), dict(expected))
    gradients = {name: parameter.grad for name, parameter in stock.named_parameters()}
    assert_same({name: p.grad for name, p in converted.named_parameters()}, gradients)
    assert gradients["roi_heads.box_predictor.bbox_pred.weight"].abs().sum() > 0


@pytest.mark.parametrize("kind", KINDS)
def test_bags_replaces_the_classification_loss_and_no_other(kind: str) -> None:
    stock = make_model(kind)
    converted = convert_to_bags(stock, LAYOUT, inplace=False)

    expected, actual = train_step(stock, kind), train_step(converted, kind)

    del expected["loss_classifier"]
    assert list(actual)[: len(GROUP_LOSSES)] == GROUP_LOSSES
    assert_same({k: v for k, v in actual.items() if k not in GROUP_LOSSES}, dict(expected))
    assert all(loss.ndim == 0 for loss in actual.values())
    assert_same(
        converted.roi_heads.box_predictor.bbox_pred.weight.grad,
        stock.roi_heads.box_predictor.bbox_pred.weight.grad,
    )


def test_group_losses_are_those_of_the_head(model: nn.Module) -> None:
    converted = convert_to_bags(model, LAYOUT, others_ratio=float("inf"))
    head, seen = converted.roi_heads.box_predictor.cls_score, {}
    head.register_forward_hook(lambda module, args, logits: seen.update(logits=logits.detach()))

    losses = train_step(converted)

    assert sum(losses[name] for name in GROUP_LOSSES) > 0
    # With an infinite ratio nothing is drawn, so the labels say all: here those of torchvision's
    # own sampler under the same seed.
    labels = _labels_of_step(make_model())
    assert_same({k: losses[k] for k in GROUP_LOSSES}, head.losses(seen["logits"], labels))


def _labels_of_step(stock: nn.Module) -> Tensor:
    class Recording(RoIHeads):
        labels: Tensor

        def select_training_samples(self, *args: Any) -> Any:
            samples = super().select_training_samples(*args)
            self.labels = torch.cat(samples[2])
            return samples

    stock.roi_heads.__class__ = Recording
    train_step(stock)
    return stock.roi_heads.labels


def test_images_without_objects_train_background_alone(model: nn.Module) -> None:
    convert_to_bags(model, LAYOUT).train()
    targets = [make_targets()[1]] * 2
    losses = model(make_images(), targets)
    assert losses["loss_cls_bg_fg"] > 0
    assert all(losses[name] == 0 for name in GROUP_LOSSES[1:])
    assert losses["loss_box_reg"] == 0


@pytest.mark.parametrize("label", [NUM_CATEGORIES + 1, 0, -1])
def test_labels_out_of_range(model: nn.Module, label: int) -> None:
    convert_to_bags(model, LAYOUT).train()
    targets = make_targets()[::-1]
    targets[1]["labels"][2] = label
    said = rf"targets\[1\]\['labels'\]` in \[1, {NUM_CATEGORIES}\], got {label}$"
    with pytest.raises(ValueError, match=said):
        model(make_images(), targets)


def test_a_step_leaves_nothing_on_the_module(model: nn.Module) -> None:
    convert_to_bags(model, LAYOUT)
    before = dict(vars(model.roi_heads)), dict(model.roi_heads._modules)
    train_step(model)
    with pytest.raises(KeyError, match="labels"):
        model(make_images(), [{"boxes": target["boxes"]} for target in make_targets()])
    after = dict(vars(model.roi_heads)), dict(model.roi_heads._modules)
    assert after == before
    assert isinstance(model.roi_heads.box_predictor, FastRCNNPredictor)


def make_agnostic(model: nn.Module) -> tuple[nn.Module, nn.Module]:
    """A class-agnostic model and the class-specific one that says the same for every label."""
    agnostic, specific = copy.deepcopy(model), copy.deepcopy(model)
    predictor = agnostic.roi_heads.box_predictor
    predictor.bbox_pred = nn.Linear(16, 4)
    repeated = specific.roi_heads.box_predictor.bbox_pred
    with torch.no_grad():
        repeated.weight.copy_(predictor.bbox_pred.weight.repeat(NUM_CATEGORIES + 1, 1))
        repeated.bias.copy_(predictor.bbox_pred.bias.repeat(NUM_CATEGORIES + 1))
    return agnostic, specific


def test_class_agnostic_boxes(model: nn.Module) -> None:
    agnostic, specific = make_agnostic(model)
    converted = to_softmax(agnostic)
    specific.roi_heads.score_thresh = converted.roi_heads.score_thresh = 0.0

    expected, actual = train_step(specific), train_step(converted)
    torch.testing.assert_close(actual["loss_box_reg"], expected["loss_box_reg"])
    assert converted.roi_heads.box_predictor.bbox_pred.weight.grad.abs().sum() > 0

    specific.eval(), converted.eval()
    for found, wanted in zip(converted(make_images()), specific(make_images()), strict=True):
        assert len(found["boxes"]) == 100
        torch.testing.assert_close(found, wanted)


# Inference


@pytest.mark.parametrize("kind", KINDS)
def test_softmax_detects_as_torchvision_does(kind: str) -> None:
    stock = make_model(kind).eval()
    converted = to_softmax(stock)
    for score_thresh, nms_thresh, detections_per_img in [(0.0, 0.5, 300), (0.0, 0.3, 5)]:
        for each in (stock, converted):  # after conversion: they are read at each call
            each.roi_heads.score_thresh = score_thresh
            each.roi_heads.nms_thresh = nms_thresh
            each.roi_heads.detections_per_img = detections_per_img
        with torch.no_grad():
            expected, actual = stock(make_images()), converted(make_images())
        assert all(len(image["boxes"]) > 0 for image in expected)
        assert_same(actual, expected)


@settings(max_examples=25)
@given(
    seed=st.integers(0, 2**32),
    sizes=st.lists(st.sampled_from([0, 1, 150, 400]), min_size=1, max_size=3),
    score_thresh=st.sampled_from([0.0, 0.01]),
    max_detections=st.sampled_from([1, 100, 10000]),
)
def test_postprocessing_equals_torchvisions(
    seed: int, sizes: list[int], score_thresh: float, max_detections: int
) -> None:
    """Boxes that leave the image, degenerate ones, images with few and without proposals."""
    stock = _postprocessor()
    stock.score_thresh, stock.detections_per_img = score_thresh, max_detections
    converted = _postprocessor()
    converted.box_predictor.cls_score = SoftmaxClassifier(4, NUM_CATEGORIES + 1)
    converted.score_thresh, converted.detections_per_img = score_thresh, max_detections
    converted.__class__ = ClassifierRoIHeads

    generator = torch.Generator().manual_seed(seed)
    number = sum(sizes)
    logits = torch.randn(number, NUM_CATEGORIES + 1, generator=generator, dtype=torch.float64)
    deltas = torch.randn(number, 4 * (NUM_CATEGORIES + 1), generator=generator).double() * 3
    corners = torch.rand(number, 2, generator=generator).double() * 90
    sides = torch.rand(number, 2, generator=generator).double() * 30
    sides[::7] *= 1e-4
    proposals = list(torch.cat((corners, corners + sides), dim=1).split(sizes))
    shapes = [(80, 100)] * len(sizes)

    actual = converted.postprocess_detections(logits, deltas, proposals, shapes)
    for image, size in enumerate(sizes):
        if size * NUM_CATEGORIES < 1000 or number == 0:
            # Fewer boxes: torchvision shifts categories apart, which rounds; or fails on none.
            assert len(actual[0][image]) <= max_detections
            continue
        rows = slice(sum(sizes[:image]), sum(sizes[: image + 1]))
        expected = stock.postprocess_detections(
            logits[rows], deltas[rows], [proposals[image]], [shapes[image]]
        )
        for found, wanted in zip(actual, expected, strict=True):
            if len(expected[0][0]) > 0:
                assert_same(found[image], wanted[0])


def _postprocessor() -> RoIHeads:
    predictor = FastRCNNPredictor(4, NUM_CATEGORIES + 1)
    thresholds = (0.5, 0.5, 512, 0.25, None, 0.0, 0.5, 100)
    return RoIHeads(None, None, predictor, *thresholds)


def test_bags_detections_come_from_bags_scores(model: nn.Module) -> None:
    convert_to_bags(model, LAYOUT).eval()
    model.roi_heads.score_thresh = 0.0
    seen: dict[str, Tensor] = {}
    head = model.roi_heads.box_predictor.cls_score
    head.register_forward_hook(lambda module, args, logits: seen.update(logits=logits))
    with torch.no_grad():
        detections = model(make_images()[:1])[0]
    scores = head.scores(seen["logits"])
    assert detections["labels"].min() >= 1
    assert detections["labels"].max() <= NUM_CATEGORIES
    for score, label in zip(detections["scores"], detections["labels"], strict=True):
        assert (scores[:, label] == score).any()


@pytest.mark.parametrize("kind", ["faster", "mask", "keypoint"])
def test_no_detections(kind: str) -> None:
    model = convert_to_bags(make_model(kind), LAYOUT).eval()
    model.roi_heads.score_thresh = 1.0
    for found in model(make_images()):
        assert found["boxes"].shape == (0, 4)
        assert found["scores"].shape == found["labels"].shape == (0,)


@pytest.mark.parametrize("agnostic", [False, True], ids=["class-specific", "class-agnostic"])
def test_no_proposals(model: nn.Module, agnostic: bool) -> None:
    model = make_agnostic(model)[0] if agnostic else model
    convert_to_bags(model, LAYOUT).eval()
    model.rpn.score_thresh = 1.0
    for found in model(make_images()):
        assert found["boxes"].shape == (0, 4)
        assert found["labels"].dtype == torch.int64


@pytest.mark.parametrize("kind", ["faster", "mask"])
def test_autocast(kind: str) -> None:
    model = convert_to_bags(make_model(kind), LAYOUT)
    model.roi_heads.score_thresh = 0.0
    with torch.autocast("cpu", torch.bfloat16):
        losses = train_step(model, kind)
        assert all(loss.isfinite() for loss in losses.values())
        assert all(losses[name].dtype == torch.float32 for name in GROUP_LOSSES)
        model.eval()
        for found in model(make_images()):
            assert len(found["boxes"]) == 100
            assert found["boxes"].dtype == found["scores"].dtype == torch.float32
            # Coordinates are not rounded to the 8 bits of bfloat16.
            assert not torch.equal(found["boxes"], found["boxes"].bfloat16().float())


# Conversion


def test_in_place_and_copy(model: nn.Module) -> None:
    before = {name: value.clone() for name, value in model.state_dict().items()}
    converted = convert_to_bags(model, LAYOUT, inplace=False)
    assert converted is not model
    assert type(model.roi_heads) is RoIHeads
    assert_same(model.state_dict(), OrderedDict(before))
    assert convert_to_bags(model, LAYOUT) is model
    assert isinstance(model.roi_heads, ClassifierRoIHeads)


def test_state_dict_keys(model: nn.Module) -> None:
    before = model.state_dict()
    after = convert_to_bags(model, LAYOUT, inplace=False).state_dict()
    assert set(before) - set(after) == {PREFIX + "weight", PREFIX + "bias"}
    assert set(after) - set(before) == {
        PREFIX + "fc.weight",
        PREFIX + "fc.bias",
        PREFIX + "_extra_state",
    }
    common = set(before) & set(after)
    assert_same({name: after[name] for name in common}, {name: before[name] for name in common})


def test_everything_set_on_the_heads_stays(model: nn.Module) -> None:
    heads = model.roi_heads
    heads.score_thresh, heads.my_note = 0.123, "kept"
    calls = []
    heads.register_forward_hook(lambda *args: calls.append(1))
    model.double().eval()
    before = {**vars(heads), **heads._modules}
    convert_to_bags(model, LAYOUT, others_ratio=3)
    assert model.roi_heads is heads
    assert {**vars(heads), **heads._modules} == before
    head = heads.box_predictor.cls_score
    assert head.others_ratio == 3
    assert not head.training
    assert head.fc.weight.dtype == torch.float64
    model.float()(make_images())
    assert calls == [1]


def test_mobilenet_with_default_predictor() -> None:
    model = tv.fasterrcnn_mobilenet_v3_large_320_fpn(
        weights=None,
        weights_backbone=None,
        num_classes=NUM_CATEGORIES + 1,
        min_size=64,
        max_size=96,
    )
    assert set(GROUP_LOSSES) < set(train_step(convert_to_bags(model, LAYOUT)))


class _Retina(nn.Module):
    """Stands for a model without RoIs."""


def _scripted_heads(model: nn.Module) -> nn.Module:
    class Scripted(torch.jit.ScriptModule):
        pass

    model.roi_heads = Scripted()
    return model


def _with_subclass(model: nn.Module) -> nn.Module:
    model.roi_heads.__class__ = type("MyRoIHeads", (RoIHeads,), {})
    return model


def _with_method(model: nn.Module) -> nn.Module:
    model.roi_heads.postprocess_detections = lambda *args: ([], [], [])
    return model


def _with_predictor(model: nn.Module, **layers: nn.Module | None) -> nn.Module:
    for name, layer in layers.items():
        setattr(model.roi_heads.box_predictor, name, layer)
    return model


def _one_stage(name: str, **options: Any) -> nn.Module:
    return getattr(tv, name)(weights=None, weights_backbone=None, num_classes=4, **options)


MODEL_ERRORS = {
    "retinanet": (
        TypeError,
        "RetinaNet, a one-stage",
        lambda m: _one_stage("retinanet_resnet50_fpn"),
    ),
    "fcos": (TypeError, "FCOS, a one-stage", lambda m: _one_stage("fcos_resnet50_fpn")),
    "ssd": (TypeError, "SSD, a one-stage", lambda m: _one_stage("ssdlite320_mobilenet_v3_large")),
    "no detector": (TypeError, "two-stage detector.*got Linear", lambda m: nn.Linear(2, 2)),
    "no module": (TypeError, "two-stage detector.*got str", lambda m: "faster_rcnn"),
    "scripted heads": (TypeError, "scripted roi_heads; convert it before", _scripted_heads),
    "wrapped": (TypeError, "wrapped in DataParallel; pass its `module`", nn.DataParallel),
    "compiled": (TypeError, "OptimizedModule; pass its `_orig_mod`", torch.compile),
    "converted": (ValueError, "not to be converted yet", lambda m: convert_to_bags(m, LAYOUT)),
    "subclass": (TypeError, "subclass MyRoIHeads", _with_subclass),
    "own method": (TypeError, "postprocess_detections set on the object", _with_method),
    "no cls_score": (TypeError, "without cls_score", lambda m: _with_predictor(m, cls_score=None)),
    "no bbox_pred": (TypeError, "without bbox_pred", lambda m: _with_predictor(m, bbox_pred=None)),
    "categories": (
        ValueError,
        "of 5 categories.*6 outputs.*got 8",
        lambda m: _with_predictor(m, cls_score=nn.Linear(16, 6)),
    ),
    "deltas": (
        ValueError,
        "4 outputs.*or 36.*got 24",
        lambda m: _with_predictor(m, bbox_pred=nn.Linear(16, 24)),
    ),
    "not linear": (
        TypeError,
        "nn.Linear to start from, got Sequential",
        lambda m: _with_predictor(m, cls_score=nn.Sequential(nn.Linear(16, 9))),
    ),
}


@pytest.mark.parametrize("case", MODEL_ERRORS)
def test_models_that_cannot_be_converted(model: nn.Module, case: str) -> None:
    kind, message, change = MODEL_ERRORS[case]
    changed = change(model)
    with pytest.raises(kind, match=message):
        convert_to_bags(changed, LAYOUT)


@pytest.mark.filterwarnings("ignore")
def test_scripted_models_are_refused() -> None:
    scripted = torch.jit.script(nn.Linear(2, 2))
    with pytest.raises(TypeError, match="got a scripted one; convert the model that was"):
        convert_to_bags(scripted, LAYOUT)


@pytest.mark.parametrize(
    ("layout", "kind", "message"),
    [
        (COUNTS, TypeError, "`layout` to be a GroupLayout, got list"),
        (GroupLayout.from_counts(COUNTS, background="last"), ValueError, "background='last'"),
        (GroupLayout.from_counts(COUNTS, background=None), ValueError, "background=None"),
        (GroupLayout.from_counts(COUNTS[:5]), ValueError, "of 8 categories.*got 5"),
    ],
    ids=["list", "background last", "no background", "categories"],
)
def test_layouts_that_do_not_fit(model: nn.Module, layout: Any, kind: Any, message: str) -> None:
    with pytest.raises(kind, match=message):
        convert_to_bags(model, layout)
    assert type(model.roi_heads) is RoIHeads


class _NoModule:
    in_features, num_categories, background = 16, NUM_CATEGORIES, "first"
    __call__ = losses = scores = lambda self, *args: {}


@pytest.mark.parametrize(
    ("classifier", "kind", "message"),
    [
        (nn.Linear(16, 9), TypeError, "Linear without num_categories, background, losses.*scores"),
        (SoftmaxClassifier, TypeError, "got the class SoftmaxClassifier"),
        (_NoModule(), TypeError, "nn.Module, got _NoModule"),
        (SoftmaxClassifier(12, 9), ValueError, "in_features=16.*got 12"),
        (SoftmaxClassifier(16, 10), ValueError, "of 8 categories.*got 9"),
        (
            BAGSHead(16, GroupLayout.from_counts(COUNTS, background="last")),
            ValueError,
            "background='first'.*got background='last'",
        ),
    ],
    ids=["members", "class", "no module", "in_features", "categories", "background"],
)
def test_classifiers_that_do_not_fit(
    model: nn.Module, classifier: Any, kind: Any, message: str
) -> None:
    with pytest.raises(kind, match=message):
        convert_classifier(model, classifier)
    assert type(model.roi_heads) is RoIHeads


def test_bags_head_meets_the_protocol() -> None:
    check_classifier(BAGSHead(4, LAYOUT), background="first")
    check_classifier(
        BAGSHead(4, GroupLayout.from_counts([1], background="last")), background="last"
    )


# Checkpoints


def _reloaded(model: nn.Module) -> nn.Module:
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


COPIES = {
    "itself": lambda model: model,
    "deepcopy": copy.deepcopy,
    "pickle": lambda model: pickle.loads(pickle.dumps(model)),
    "torch.save": _reloaded,
    "averaged": lambda model: torch.optim.swa_utils.AveragedModel(model, use_buffers=True).module,
}


@pytest.mark.parametrize("made", COPIES)
def test_copies_work_and_know_their_layout(made: str) -> None:
    original = convert_to_bags(make_model(), LAYOUT)
    copied = COPIES[made](original)
    assert_same(copied.state_dict(), original.state_dict())
    assert_same(dict(train_step(copied)), dict(train_step(copy.deepcopy(original))))

    other = convert_to_bags(make_model(), GroupLayout.from_counts(COUNTS[::-1]))
    state_dict = {name: torch.full_like(v, 7) for name, v in other.state_dict().items()}
    state_dict[PREFIX + "_extra_state"] = other.state_dict()[PREFIX + "_extra_state"]
    before = {name: value.clone() for name, value in copied.state_dict().items()}
    with pytest.raises(ValueError, match="layout"):
        copied.load_state_dict(state_dict)
    with pytest.raises(ValueError, match="layout"):
        nn.ModuleDict({"detector": copied}).load_state_dict(
            {f"detector.{name}": value for name, value in state_dict.items()}
        )
    assert_same(dict(copied.state_dict()), before)


def test_state_dict_through_a_file(model: nn.Module, tmp_path: Any) -> None:
    convert_to_bags(model, LAYOUT)
    train_step(model)
    torch.save(model.state_dict(), tmp_path / "model.pth")
    other = convert_to_bags(make_model(), LAYOUT)
    nn.init.zeros_(other.roi_heads.box_predictor.cls_score.fc.weight)
    other.load_state_dict(torch.load(tmp_path / "model.pth", weights_only=True))
    assert_same(other.state_dict(), model.state_dict())


def test_weights_of_a_plain_detector_are_not_mistaken(model: nn.Module) -> None:
    state_dict = make_model().state_dict()
    convert_to_bags(model, LAYOUT)
    with pytest.raises(RuntimeError, match=r"Unexpected key.*cls_score.weight"):
        model.load_state_dict(state_dict)
    result = model.load_state_dict(state_dict, strict=False)
    assert set(result.unexpected_keys) == {PREFIX + "weight", PREFIX + "bias"}


# Freezing

TRAINS = {
    "classifier": ("roi_heads.box_predictor.cls_score.",),
    "box_head": ("roi_heads.box_head.", "roi_heads.box_predictor."),
    "box_and_mask_heads": ("roi_heads.",),
    "all": ("",),
}


@pytest.mark.parametrize("train", TRAINS)
@pytest.mark.parametrize("kind", ["faster", "mask", "keypoint"])
def test_freeze_trains_what_it_says(kind: str, train: Any) -> None:
    model = convert_to_bags(make_model(kind), LAYOUT)
    keys = list(model.state_dict())
    parameters = freeze(model, train)
    expected = {name for name, _ in model.named_parameters() if name.startswith(TRAINS[train])}
    assert {name for name, p in model.named_parameters() if p.requires_grad} == expected
    assert {id(p) for p in parameters} == {id(p) for p in model.parameters() if p.requires_grad}
    assert list(model.state_dict()) == keys

    train_step(model, kind)
    trained = {name for name, p in model.named_parameters() if p.grad is not None}
    assert trained == expected


def _layers_in_training(model: nn.Module) -> set[str]:
    return {
        name
        for name, module in model.named_modules()
        if module.training and isinstance(module, nn.BatchNorm2d | nn.Dropout | nn.Linear)
    }


@pytest.mark.parametrize("made", COPIES)
def test_frozen_modules_stay_in_eval_mode(made: str) -> None:
    model = convert_to_bags(make_model(), LAYOUT)
    freeze(model)
    copied = COPIES[made](model)
    for mode in (True, False, True):
        copied.train(mode)
        assert copied.training is copied.rpn.training is copied.roi_heads.training is mode
        assert not copied.backbone.training
        assert _layers_in_training(copied) == ({PREFIX + "fc"} if mode else set())
    # A copy guards its own modules, not those of the original.
    if copied is not model:
        model.backbone.train()
        copied.train()
        assert model.backbone.training
        assert not copied.backbone.training


@pytest.mark.parametrize("converted", [True, False], ids=["bags", "stock"])
def test_only_the_classifier_changes_in_training(converted: bool) -> None:
    model = make_model("conv head")
    if converted:
        convert_to_bags(model, LAYOUT)
    optimizer = torch.optim.SGD(freeze(model, "classifier"), lr=0.1, momentum=0.9, weight_decay=0.1)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    for seed in range(2):
        train_step(model, seed=seed)
        optimizer.step()
    after = model.state_dict()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    fc = "fc." if converted else ""
    assert changed == {f"{PREFIX}{fc}weight", f"{PREFIX}{fc}bias"}


def test_freezing_again_undoes_the_last_time(model: nn.Module) -> None:
    convert_to_bags(model, LAYOUT)
    model.backbone[0].requires_grad_(False)  # as torchvision freezes the stem of a backbone
    freeze(model, "classifier")
    freeze(model, "box_head")
    assert sum(isinstance(child, type(model.frozen)) for child in model.modules()) == 1
    assert {n for n, p in model.named_parameters() if p.requires_grad} == {
        n for n, p in model.named_parameters() if n.startswith(TRAINS["box_head"])
    }
    freeze(model, "all")
    assert not hasattr(model, "frozen")
    assert [n for n, p in model.named_parameters() if not p.requires_grad] == [
        "backbone.0.weight",
        "backbone.0.bias",
    ]
    assert all(module.training for module in model.train().modules())


def test_freeze_before_or_after_conversion_is_the_same(model: nn.Module) -> None:
    freeze(model)
    convert_to_bags(model, LAYOUT).train()
    assert [n for n, p in model.named_parameters() if p.requires_grad] == [
        PREFIX + "fc.weight",
        PREFIX + "fc.bias",
    ]
    assert _layers_in_training(model) == {PREFIX + "fc"}


def test_frozen_proposals_are_those_of_training(model: nn.Module) -> None:
    """The mode of the RPN says how many proposals there are and whether losses are reported."""
    freeze(convert_to_bags(model, LAYOUT))
    model.train()
    assert model.rpn.post_nms_top_n() == 200
    losses = train_step(model)
    assert {"loss_objectness", "loss_rpn_box_reg", "loss_box_reg"} < set(losses)
    assert not losses["loss_objectness"].requires_grad


def test_freeze_errors(model: nn.Module) -> None:
    with pytest.raises(ValueError, match=r"one of \('classifier', .*got 'head'"):
        freeze(model, "head")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="two-stage detector"):
        freeze(nn.Linear(2, 2))
    model.requires_grad_(False)
    with pytest.raises(ValueError, match="got none"):
        freeze(model)
    assert not hasattr(model, "frozen")
    model.frozen = True
    with pytest.raises(ValueError, match="attribute of its own named `frozen`"):
        freeze(model)


# Wrappers


@pytest.fixture
def process_group(tmp_path: Any) -> Iterator[None]:
    if not dist.is_available():
        pytest.skip("torch.distributed is not built in")
    dist.init_process_group("gloo", f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_distributed_data_parallel(model: nn.Module, process_group: None) -> None:
    plain = convert_to_bags(model, LAYOUT)
    freeze(plain)
    wrapped = nn.parallel.DistributedDataParallel(copy.deepcopy(plain))
    expected, actual = train_step(plain), train_step(wrapped)
    assert_same(dict(actual), dict(expected))
    head = plain.roi_heads.box_predictor.cls_score
    assert_same(wrapped.module.get_submodule(PREFIX[:-1]).fc.weight.grad, head.fc.weight.grad)
    assert not wrapped.module.backbone.training


def test_torch_compile_of_the_roi_heads(model: nn.Module) -> None:
    """Not of the whole model, which compiles as well but takes half a minute elsewhere."""
    freeze(convert_to_bags(model, LAYOUT, others_ratio=float("inf")))
    expected = {name: loss.detach() for name, loss in train_step(model).items()}
    torch._dynamo.reset()
    compiled = copy.deepcopy(model)
    compiled.roi_heads.compile(backend="eager")
    actual = {name: loss.detach() for name, loss in train_step(compiled).items()}
    torch.testing.assert_close(actual, expected)
    with torch.no_grad():
        torch.testing.assert_close(compiled.eval()(make_images()), model.eval()(make_images()))
