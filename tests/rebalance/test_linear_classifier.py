"""What every classifier of `rebalance` promises: rows, conventions, gradients, checkpoints."""

import copy
import io
import math
import pickle
import re
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from classifier_cases import (
    BACKGROUNDS,
    CASES,
    COUNTS,
    FEATURES,
    NUM_CATEGORIES,
    features_of,
    labels_in,
    make,
    num_labels,
    seeded,
    to_convention,
    trained_linear,
)
from torch import Tensor, nn

from balanced_group_softmax.adapters.protocol import check_classifier
from balanced_group_softmax.rebalance.nearest_class_mean import ClassMeans

NAMES = list(CASES)
ROWS: list[int | None] = [None, 0, 4, None, 1, 1, 2, None, 3]
STATES = ("cumulative_counts", "positive_gradients", "negative_gradients")


def assert_same(actual: Any, expected: Any) -> None:
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)


def state_of(classifier: nn.Module) -> list[Tensor]:
    return [getattr(classifier, name).clone() for name in STATES if hasattr(classifier, name)]


# --- shapes and conventions ----------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("background", BACKGROUNDS)
def test_meets_the_protocol(name: str, background: Any) -> None:
    classifier = make(name, background)
    if background is not None:
        check_classifier(classifier, background=background)
    assert classifier.num_categories == NUM_CATEGORIES
    assert classifier.in_features == FEATURES
    logits = classifier(features_of(len(ROWS)))
    assert logits.shape == (len(ROWS), classifier.num_logits)
    losses = classifier.losses(logits, labels_in(background, ROWS))
    assert all(key.startswith("loss_cls") for key in losses)
    assert all(loss.ndim == 0 and loss.dtype == torch.float64 for loss in losses.values())
    scores = classifier.scores(logits)
    assert scores.shape == (len(ROWS), num_labels(background))
    assert ((scores >= 0) & (scores <= 1)).all()


@pytest.mark.parametrize("name", NAMES)
def test_label_conventions_differ_in_order_only(name: str) -> None:
    features = features_of(len(ROWS))
    found = []
    for background in ("first", "last"):
        classifier = make(name, background)
        for _ in range(2):  # the second step depends on what the first counted
            logits = classifier(features)
            losses = classifier.losses(logits, labels_in(background, ROWS), seeded())
        found.append((losses, classifier.scores(logits)))
    (losses, scores), (other_losses, other_scores) = found
    torch.testing.assert_close(losses, other_losses)
    torch.testing.assert_close(to_convention(scores.T, "last").T, other_scores)


@pytest.mark.parametrize("name", NAMES)
def test_a_step_on_its_own_loss_lowers_it(name: str) -> None:
    torch.manual_seed(0)
    method, settings = CASES[name]
    classifier = method(FEATURES, NUM_CATEGORIES, **settings).double().eval()
    features, labels = features_of(len(ROWS)), labels_in("first", ROWS)
    before = classifier.loss(classifier(features), labels, seeded())
    before.backward()
    with torch.no_grad():
        for parameter in classifier.parameters():
            parameter -= 0.01 * parameter.grad
    assert classifier.loss(classifier(features), labels, seeded()) < before


# --- gradients -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [name for name in NAMES if name != "seesaw"])
@pytest.mark.parametrize("background", BACKGROUNDS)
def test_gradients(name: str, background: Any) -> None:
    """Seesaw's factors are constants to autograd and not to differences: see test_losses.py."""
    classifier = make(name, background).eval()
    logits = classifier(features_of(len(ROWS))).detach().requires_grad_()
    labels = labels_in(background, ROWS)
    assert torch.autograd.gradcheck(lambda z: classifier.loss(z, labels, seeded()), logits)


def test_seesaw_gradients_where_its_factors_are_constant() -> None:
    classifier = make("seesaw", q=0.0).eval()
    logits = classifier(features_of(len(ROWS))).detach().requires_grad_()
    labels = labels_in("first", ROWS)
    assert torch.autograd.gradcheck(lambda z: classifier.loss(z, labels), logits)


# --- rows that do not count ----------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("ignore_index", [-100, 2])
def test_ignored_rows_take_part_in_nothing(name: str, ignore_index: int) -> None:
    labels = labels_in("first", ROWS)
    kept = labels != ignore_index
    kept[3] = False
    labels[~kept] = ignore_index
    with_them, without = (make(name, ignore_index=ignore_index) for _ in range(2))
    logits = with_them(features_of(len(ROWS))).detach()
    logits[~kept] = math.nan
    logits.requires_grad_()
    losses = with_them.losses(logits, labels, seeded())
    torch.testing.assert_close(losses, without.losses(logits[kept], labels[kept], seeded()))
    sum(losses.values()).backward()
    assert logits.grad is not None
    assert (logits.grad[~kept] == 0).all()
    assert (logits.grad[kept] != 0).any()
    torch.testing.assert_close(state_of(with_them), state_of(without))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("number", [0, 3])
def test_without_a_row_that_counts_losses_are_zero(name: str, number: int) -> None:
    classifier = make(name)
    before = state_of(classifier)
    logits = classifier(features_of(number))
    losses = classifier.losses(logits, torch.full((number,), -100))
    assert all(loss.item() == 0 for loss in losses.values())
    sum(losses.values()).backward()
    assert (classifier.fc.weight.grad == 0).all()
    assert_same(state_of(classifier), before)


@pytest.mark.parametrize("name", NAMES)
def test_a_nan_in_a_row_that_counts_is_in_the_loss(name: str) -> None:
    classifier = make(name)
    logits = classifier(features_of(2)).detach()
    logits[0] = math.nan
    assert classifier.loss(logits, labels_in("first", [None, 1])).isnan()


@pytest.mark.parametrize("name", NAMES)
def test_a_bad_label_that_is_not_looked_at_makes_the_losses_nan(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a GPU, where looking would wait for it."""
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    classifier = make(name)
    logits = classifier(features_of(3))
    for bad in (NUM_CATEGORIES + 1, 10**12, -1):
        losses = classifier.losses(logits, torch.tensor([0, bad, 1]))
        assert all(loss.isnan() for loss in losses.values())


# --- state and modes -----------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["seesaw", "eql-v2"])
def test_only_training_counts(name: str) -> None:
    classifier = make(name).eval()
    logits, labels = classifier(features_of(len(ROWS))), labels_in("first", ROWS)
    before = state_of(classifier)
    classifier.losses(logits, labels)
    assert_same(state_of(classifier), before)
    classifier.train().losses(logits, labels)
    assert all((now != then).any() for now, then in zip(state_of(classifier), before, strict=True))
    classifier.reset_state()
    assert_same(state_of(classifier), before)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_float32(name: str, dtype: torch.dtype) -> None:
    """A narrow model has narrow logits; losses, scores and what is counted are wide."""
    narrow, wide = make(name, dtype=torch.float32).to(dtype), make(name, dtype=torch.float32)
    logits, labels = features_of(len(ROWS), torch.float32), labels_in("first", ROWS)
    logits = wide(logits).detach().to(dtype)
    losses = narrow.losses(logits, labels, seeded())
    assert_same(losses, wide.losses(logits.float(), labels, seeded()))
    assert_same(narrow.scores(logits), wide.scores(logits.float()))
    assert all(value.dtype == torch.float32 for value in losses.values())
    assert_same(state_of(narrow), state_of(wide))
    assert all(value.dtype in (torch.int64, torch.float32) for value in state_of(narrow))


@pytest.mark.parametrize("name", NAMES)
def test_a_step_never_waits_for_the_device(name: str) -> None:
    """Tensors without values: reading one, or a shape that depends on one, raises."""
    method, settings = CASES[name]
    classifier = method(FEATURES, NUM_CATEGORIES, device="meta", **settings)
    features = torch.empty(len(ROWS), FEATURES, device="meta")
    labels = torch.empty(len(ROWS), dtype=torch.int64, device="meta")
    logits = classifier(features)
    sum(classifier.losses(logits, labels).values()).backward()
    assert classifier.fc.weight.grad is not None
    assert classifier.scores(logits).shape == (len(ROWS), NUM_CATEGORIES + 1)


@pytest.mark.parametrize(
    "look", [lambda x: bool(x.any()), lambda x: x.nonzero(), lambda x: x[x > 0], torch.unique]
)
def test_looking_at_a_value_there_would_be_noticed(look: Any) -> None:
    with pytest.raises((RuntimeError, NotImplementedError)):
        look(torch.empty(3, device="meta"))


@pytest.mark.parametrize("name", NAMES)
def test_copies_and_pickles(name: str) -> None:
    classifier = make(name)
    features, labels = features_of(len(ROWS)), labels_in("first", ROWS)
    classifier.losses(classifier(features), labels)
    copies = [copy.deepcopy(classifier), pickle.loads(pickle.dumps(classifier))]
    expected = classifier.losses(classifier(features), labels, seeded())
    for other in copies:
        assert_same(other.losses(other(features), labels, seeded()), expected)


@pytest.mark.parametrize("name", NAMES)
def test_nothing_made_in_inference_mode_is_in_the_way_of_training(name: str) -> None:
    classifier = make(name)
    logits, labels = classifier(features_of(len(ROWS))), labels_in("first", ROWS)
    with torch.inference_mode():
        classifier.eval().losses(logits, labels)
        classifier.scores(logits)
    classifier.train().loss(logits, labels).backward()


@pytest.mark.parametrize("name", NAMES)
def test_from_linear_leaves_the_random_state_and_the_layer_alone(name: str) -> None:
    torch.manual_seed(3)
    before = torch.get_rng_state()
    linear = trained_linear("first", torch.float32)
    torch.set_rng_state(before)
    weight = linear.weight.detach().clone()
    method, settings = CASES[name]
    classifier = method.from_linear(linear, **settings)
    assert_same(torch.get_rng_state(), before)
    with torch.no_grad():
        classifier.fc.weight.add_(1)
    assert_same(linear.weight.detach(), weight)
    assert classifier.fc.weight.dtype == torch.float32
    no_bias = nn.Linear(FEATURES, NUM_CATEGORIES + 1, bias=False)
    assert method.from_linear(no_bias, **settings).fc.bias is not None
    assert method.from_linear(no_bias, bias=False, **settings).fc.bias is None


@pytest.mark.parametrize("name", NAMES)
def test_a_step_is_one_graph(name: str) -> None:
    eager, compiled = (make(name, dtype=torch.float32) for _ in range(2))
    logits, labels = eager(features_of(9, torch.float32)).detach(), labels_in("first", ROWS)
    step = torch.compile(compiled.losses, backend="eager", fullgraph=True)
    torch.manual_seed(4)
    expected = eager.losses(logits, labels)
    torch.manual_seed(4)
    assert_same(step(logits, labels), expected)
    assert_same(state_of(compiled), state_of(eager))


# --- checkpoints ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("background", BACKGROUNDS)
@pytest.mark.parametrize("prefix", ["", "roi_heads.box_predictor.cls_score."])
def test_a_checkpoint_describes_itself(name: str, background: Any, prefix: str) -> None:
    classifier = make(name, background)
    features, labels = features_of(len(ROWS)), labels_in(background, ROWS)
    classifier.losses(classifier(features), labels)
    file = io.BytesIO()
    torch.save({prefix + key: value for key, value in classifier.state_dict().items()}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    other = type(classifier).from_state_dict({**saved, "something.else": torch.ones(1)}, prefix)
    assert other.describe() == classifier.describe()
    expected = classifier.losses(classifier(features), labels, seeded())
    assert_same(other.losses(other(features), labels, seeded()), expected)
    assert_same(state_of(other), state_of(classifier))
    assert_same(other.scores(other(features)), classifier.scores(classifier(features)))


def test_settings_survive_a_checkpoint() -> None:
    weights = [0.1, 1 / 3, 5.0, 1.0, 2.0, 0.0]
    for classifier in (
        make("softmax", class_weights=torch.tensor(weights, dtype=torch.float64)),
        make("focal", gamma=0.5, alpha=1, class_weights=weights, ignore_index=-1),
        make("seesaw", p=0.1, q=0.2, eps=0.3),
        make("eql-v2", gamma=1, mu=2, alpha=3, objectness=False, prior=0.5),
        make("federated", power=0.3, num_sampled=2, prior=0.2, bias=False),
        make("logit-adjustment", background_count=7.5),
    ):
        other = type(classifier).from_state_dict(classifier.state_dict())
        assert other.settings() == classifier.settings()
        assert other.ignore_index == classifier.ignore_index
        assert (other.fc.bias is None) == (classifier.fc.bias is None)


@pytest.mark.parametrize(
    ("mine", "theirs", "message"),
    [
        (make("softmax"), make("focal"), "method 'FocalClassifier' instead of 'SoftmaxClassifier'"),
        (make("softmax"), make("softmax", "last"), "background 'last' instead of 'first'"),
        (make("focal"), make("focal-sigmoid"), "activation 'sigmoid' instead of 'softmax'"),
        (make("logit-adjustment"), make("logit-adjustment", tau=1.0), "tau 1.0 instead of 0.5"),
        (make("balanced-softmax"), make("logit-adjustment"), "adjust 'test' instead of 'training'"),
        (make("eql-v2"), make("eql-v2", objectness=False), "objectness False instead of True"),
    ],
    ids=lambda value: "" if isinstance(value, str) else type(value).__name__,
)
def test_another_classifier_is_refused_before_a_weight_is_copied(
    mine: Any, theirs: Any, message: str
) -> None:
    before = {key: value.clone() for key, value in mine.state_dict().items()}
    state = {key: value + 1 if "fc" in key else value for key, value in theirs.state_dict().items()}
    with pytest.raises(ValueError, match=re.escape(message)):
        mine.load_state_dict(state)
    assert_same(mine.state_dict(), before)


def test_settings_of_training_alone_are_no_reason_to_refuse() -> None:
    for name, settings in (
        ("softmax", {"class_weights": [1.0] * 6}),
        ("focal", {"gamma": 3.0}),
        ("balanced-softmax", {"tau": 0.1}),
        ("seesaw", {"p": 0.1}),
        ("federated", {"num_sampled": 1}),
    ):
        mine = make(name, **settings)
        mine.load_state_dict(make(name).state_dict())
        (key, value), *_ = settings.items()
        assert mine.settings()[key] == (tuple(value) if isinstance(value, list) else value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda state: state.pop("_extra_state"), "Expected _extra_state of the checkpoint"),
        (
            lambda state: state.update(_extra_state=torch.zeros(9, dtype=torch.uint8)),
            "Expected _extra_state to describe a classifier",
        ),
        (lambda state: state.pop("fc.weight"), "Expected a matrix fc.weight"),
    ],
)
def test_a_checkpoint_that_lacks_something(change: Any, message: str) -> None:
    state = dict(make("seesaw").state_dict())
    change(state)
    with pytest.raises(ValueError, match=re.escape(message)):
        type(make("seesaw")).from_state_dict(state)


def test_a_checkpoint_of_another_version() -> None:
    classifier = make("softmax")
    text = bytes(classifier.get_extra_state().tolist()).replace(b'_version": 1', b'_version": 2')
    state = {**classifier.state_dict(), "_extra_state": torch.tensor(list(text)).byte()}
    with pytest.raises(ValueError, match="another version of the library"):
        classifier.load_state_dict(state)


def test_a_checkpoint_of_another_width() -> None:
    mine = make("softmax")
    state = {**mine.state_dict(), "fc.weight": torch.ones(6, 9)}
    with pytest.raises(ValueError, match=r"Expected fc.weight of shape \[6, 4\], got \[6, 9\]"):
        mine.load_state_dict(state)


# --- bad input -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    ("logits", "labels", "error", "message"),
    [
        ([[1.0]], torch.zeros(1).long(), TypeError, "Expected `logits` to be a Tensor, got list"),
        (torch.zeros(2, 99), torch.zeros(2).long(), ValueError, "Expected `logits` of shape [R, "),
        (torch.zeros(2), torch.zeros(2).long(), ValueError, "Expected `logits` of shape [R, "),
        ("int", torch.zeros(2).long(), TypeError, "floating-point dtype, got torch.int64"),
        ("good", torch.zeros(2), TypeError, "Expected `labels` of an integer dtype"),
        ("good", [0, 1], TypeError, "Expected `labels` to be a Tensor, got list"),
        ("good", torch.zeros(2, 1).long(), ValueError, "Expected `labels` of shape [R]"),
        ("good", torch.zeros(3).long(), ValueError, "Expected `labels` for 2 rows of logits"),
        ("good", torch.tensor([0, 6]), ValueError, "in [0, 5] or -100, got 6 at row 1"),
        ("good", torch.tensor([-1, 6]), ValueError, "in [0, 5] or -100, got -1 at row 0"),
    ],
)
def test_bad_rows_are_named(name: str, logits: Any, labels: Any, error: Any, message: str) -> None:
    classifier = make(name)
    if isinstance(logits, str):
        kind = torch.int64 if logits == "int" else torch.float32
        logits = torch.zeros(2, classifier.num_logits, dtype=kind)
    with pytest.raises(error, match=re.escape(message)):
        classifier.losses(logits, labels)


@pytest.mark.parametrize(
    ("name", "settings", "error", "message"),
    [
        ("softmax", {"background": "middle"}, ValueError, "Expected `background` to be 'first'"),
        ("softmax", {"ignore_index": 1.5}, TypeError, "Expected `ignore_index` to be an integer"),
        ("softmax", {"ignore_index": 2**63}, ValueError, "Expected `ignore_index` to fit 64 bits"),
        ("softmax", {"class_weights": [1.0]}, ValueError, "`class_weights` for 6 labels, got 1"),
        ("softmax", {"class_weights": [-1.0] * 6}, ValueError, "Expected `class_weights[0]`"),
        ("softmax", {"class_weights": [math.inf] * 6}, ValueError, "Expected `class_weights[0]`"),
        ("softmax", {"class_weights": "light"}, TypeError, "Expected `class_weights` to be"),
        ("focal", {"gamma": -1}, ValueError, "Expected `gamma` to be in [0, 1000], got -1.0"),
        ("focal", {"alpha": 2}, ValueError, "Expected `alpha` to be in [0, 1], got 2.0"),
        ("focal", {"activation": "relu"}, ValueError, "Expected `activation` to be one of"),
        ("focal", {"normalizer": "mean"}, ValueError, "Expected `normalizer` to be one of"),
        ("balanced-softmax", {"counts": [1]}, ValueError, "`counts` of 5 categories, got those"),
        ("balanced-softmax", {"counts": [-1] * 5}, ValueError, "`counts` of at least 0, got -1"),
        ("balanced-softmax", {"tau": math.nan}, ValueError, "Expected `tau` to be in"),
        ("balanced-softmax", {"adjust": "later"}, ValueError, "Expected `adjust` to be one of"),
        ("balanced-softmax", {"background_count": 0}, ValueError, "`background_count` above 0"),
        ("seesaw", {"p": -0.1}, ValueError, "Expected `p` to be in [0, 100], got -0.1"),
        ("seesaw", {"eps": 0}, ValueError, "Expected `eps` to be in"),
        ("eql-v2", {"alpha": "4"}, TypeError, "Expected `alpha` to be a number, got str"),
        ("eql-v2", {"objectness": 1}, TypeError, "Expected `objectness` to be a bool, got int"),
        ("eql-v2", {"prior": 1.0}, ValueError, "Expected `prior` in (0, 1), got 1.0"),
        ("federated", {"num_sampled": 0}, ValueError, "Expected `num_sampled` of at least 1"),
        ("federated", {"power": math.inf}, ValueError, "Expected `power` to be in [-10, 10]"),
        ("federated", {"what": 1}, TypeError, "what"),
    ],
)
def test_bad_settings_are_named(
    name: str, settings: dict[str, Any], error: Any, message: str
) -> None:
    method, usual = CASES[name]
    with pytest.raises(error, match=re.escape(message)):
        method(FEATURES, NUM_CATEGORIES, **{**usual, **settings})


def test_background_count_needs_background() -> None:
    with pytest.raises(ValueError, match="there is no background"):
        make("balanced-softmax", None, background_count=3.0)


@pytest.mark.parametrize("name", NAMES)
def test_a_layer_that_does_not_fit_is_named(name: str) -> None:
    method, settings = CASES[name]
    with pytest.raises(TypeError, match=r"Expected `linear` to be an nn.Linear, got Conv2d"):
        method.from_linear(nn.Conv2d(1, 1, 1), **settings)
    with pytest.raises(ValueError, match="Expected `linear` with an output for each label"):
        method.from_linear(nn.Linear(3, 1), **settings)


def test_a_draw_needs_a_generator() -> None:
    classifier = make("federated")
    with pytest.raises(TypeError, match=r"Expected `generator` to be a torch.Generator or None"):
        classifier.losses(torch.zeros(1, 5), torch.zeros(1).long(), 3)


# --- several processes ---------------------------------------------------------------------------


def rows_of(rank: int) -> tuple[Tensor, Tensor]:
    features = features_of(8)[4 * rank : 4 * rank + 4]
    return features, labels_in("first", [[None, 0, 0, 4], [1, 1, 1, None]][rank])


def _on_a_rank(rank: int, meeting: str, folder: str) -> None:
    dist.init_process_group("gloo", f"file://{meeting}", rank=rank, world_size=2)
    try:
        found: dict[str, Any] = {}
        features, labels = rows_of(rank)
        for name in ("seesaw", "eql-v2"):
            classifier = make(name)
            for _ in range(2):
                classifier.losses(classifier(features), labels)
            found[name] = state_of(classifier)
        means = ClassMeans(NUM_CATEGORIES, FEATURES)
        means.update(features, labels)
        means.all_reduce()
        found["means"] = [means.sums, means.counts]
        torch.save(found, f"{folder}/{rank}.pt")
    finally:
        dist.destroy_process_group()


def test_processes_count_together(tmp_path: Any) -> None:
    mp.spawn(_on_a_rank, args=(str(tmp_path / "meeting"), str(tmp_path)), nprocs=2)
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    assert_same(first, second)
    features, labels = (torch.cat(parts) for parts in zip(rows_of(0), rows_of(1), strict=True))
    for name in ("seesaw", "eql-v2"):
        classifier = make(name)
        for _ in range(2):
            classifier.losses(classifier(features), labels)
        torch.testing.assert_close(first[name], state_of(classifier))
    means = ClassMeans(NUM_CATEGORIES, FEATURES)
    means.update(features, labels)
    torch.testing.assert_close(first["means"], [means.sums, means.counts])


def test_counts_are_those_of_the_test() -> None:
    """A guard for the file itself: a category without instances is among the cases."""
    assert min(COUNTS) == 0
