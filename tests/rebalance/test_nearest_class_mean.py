"""Class means against plain loops, and what stands for background and for unseen categories."""

import copy
import math
import re
from itertools import pairwise
from typing import Any

import pytest
import torch
from classifier_cases import BACKGROUNDS, NUM_CATEGORIES, labels_in, num_labels, seeded
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from balanced_group_softmax import category_counts
from balanced_group_softmax.adapters.protocol import check_classifier
from balanced_group_softmax.rebalance.nearest_class_mean import ClassMeans, NearestClassMean

ROWS: list[int | None] = [None, 0, 4, None, 1, 1, 2, None, 4, 4]  # category 3 is never seen
FEATURES = 6


def examples(background: str | None) -> tuple[Tensor, Tensor]:
    rows = [row for row in ROWS if background is not None or row is not None]
    features = torch.randn(len(rows), FEATURES, generator=seeded(1), dtype=torch.float64)
    return features, labels_in(background, rows)


def gathered(background: str | None) -> ClassMeans:
    means = ClassMeans(NUM_CATEGORIES, FEATURES, background=background)
    means.update(*examples(background))
    return means


def softmax_of(background: str | None, in_features: int = FEATURES) -> nn.Linear | None:
    if background is None:
        return None
    torch.manual_seed(2)
    return nn.Linear(in_features, num_labels(background)).double()


def make(background: str | None, **more: Any) -> NearestClassMean:
    return NearestClassMean.from_means(
        gathered(background), softmax=softmax_of(background), dtype=torch.float64, **more
    )


# --- means ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("background", BACKGROUNDS)
def test_means_are_those_of_a_loop(background: Any) -> None:
    means = gathered(background)
    features, labels = examples(background)
    first = int(background == "first")
    for category in range(NUM_CATEGORIES):
        rows = [f for f, label in zip(features, labels.tolist(), strict=True)
                if label == category + first]  # fmt: skip
        assert means.counts[category] == len(rows)
        if rows:
            torch.testing.assert_close(means.means()[category], sum(rows) / len(rows))
    assert means.means()[3].isnan().all()
    assert means.counts.tolist() == [1, 2, 1, 0, 3]


def test_means_on_the_real_counts_of_lvis(lvis_data: Any) -> None:
    """As many rows as each category has instances, up to 50, whose features say where they are."""
    for file in ("lvis_v0.5", "lvis_v1"):
        counts = category_counts(lvis_data / f"{file}_train_categories.json")
        labels = torch.tensor(
            [c + 1 for c, count in enumerate(counts) for _ in range(min(count, 50))]
        )
        labels = labels[torch.randperm(len(labels), generator=seeded(0))]
        position = torch.arange(len(labels), dtype=torch.float64)
        features = torch.stack([position, labels.double()], dim=1)
        means = ClassMeans(len(counts), 2)
        for rows, of_rows in zip(features.split(997), labels.split(997), strict=True):
            means.update(rows, of_rows)
        places: dict[int, list[int]] = {}
        for place, label in enumerate(labels.tolist()):
            places.setdefault(label, []).append(place)
        for category, (first, second) in enumerate(means.means().tolist()):
            mine = places[category + 1]
            assert first == pytest.approx(sum(mine) / len(mine), rel=1e-12)
            assert second == category + 1


@given(cuts=st.lists(st.integers(0, len(ROWS)), max_size=3), data=st.data())
def test_batches_and_merging_make_no_difference(cuts: list[int], data: st.DataObject) -> None:
    features, labels = examples("first")
    edges = [0, *sorted(cuts), len(labels)]
    parts = [ClassMeans(NUM_CATEGORIES, FEATURES) for _ in range(2)]
    for start, stop in pairwise(edges):
        part = data.draw(st.sampled_from(parts))
        part.update(features[start:stop], labels[start:stop])
    parts[0].merge(parts[1])
    whole = gathered("first")
    torch.testing.assert_close(parts[0].sums, whole.sums)
    assert torch.equal(parts[0].counts, whole.counts)


def test_ignored_rows_and_background_have_no_part() -> None:
    features, labels = examples("first")
    whole = gathered("first")
    more = torch.full((2, FEATURES), math.nan, dtype=torch.float64)
    whole.update(more, torch.tensor([-100, 0]))
    assert torch.equal(whole.sums, gathered("first").sums)
    assert features.isfinite().all()
    assert len(labels) > int(whole.counts.sum())


def test_maps_are_flattened() -> None:
    maps = torch.randn(3, 2, 3, 1, generator=seeded())
    means, flat = (ClassMeans(2, 6, background=None) for _ in range(2))
    means.update(maps, torch.tensor([0, 1, 1]))
    flat.update(maps.flatten(1), torch.tensor([0, 1, 1]))
    assert torch.equal(means.sums, flat.sums)
    classifier = NearestClassMean.from_means(means)
    assert torch.equal(classifier(maps), classifier(maps.flatten(1)))


def test_narrow_features_are_summed_widely() -> None:
    means = ClassMeans(1, 1, background=None)
    for _ in range(40):
        means.update(torch.full((100, 1), 1.0, dtype=torch.bfloat16), torch.zeros(100).long())
    assert means.means().item() == 1
    assert means.counts.item() == 4000  # beyond what bfloat16 can count


# --- scores --------------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [1.0, 0.2])
@pytest.mark.parametrize("metric", ["cosine", "euclidean"])
@pytest.mark.parametrize("background", BACKGROUNDS)
def test_scores_are_those_of_the_definition(
    background: Any, metric: str, temperature: float
) -> None:
    classifier = make(background, metric=metric, temperature=temperature)
    means = gathered(background).means()
    features = torch.randn(7, FEATURES, generator=seeded(4), dtype=torch.float64)
    found = classifier.scores(classifier(features))
    softmax = softmax_of(background)
    for row, x in enumerate(features):
        nearness = {}
        for category in (0, 1, 2, 4):
            m = means[category]
            value = (
                x.dot(m) / (x.norm() * m.norm())
                if metric == "cosine"
                else -((x - m) ** 2).sum() / 2
            )
            nearness[category] = math.exp(value.item() / temperature)
        of_background = 0.0
        if softmax is not None:
            plain = softmax(x).softmax(dim=0)
            of_background = plain[0 if background == "first" else -1].item()
        total = sum(nearness.values())
        expected = [
            nearness.get(c, 0.0) / total * (1 - of_background) for c in range(NUM_CATEGORIES)
        ]
        if background is not None:
            expected.insert(0 if background == "first" else NUM_CATEGORIES, of_background)
        assert found[row].tolist() == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("metric", ["cosine", "euclidean"])
def test_the_nearest_mean_wins(metric: str) -> None:
    classifier = make(None, metric=metric)
    seen = [0, 1, 2, 4]
    means = gathered(None).means()[seen]
    features = torch.randn(50, FEATURES, generator=seeded(4), dtype=torch.float64)
    if metric == "cosine":
        nearest = torch.cosine_similarity(features[:, None], means[None], dim=2).argmax(dim=1)
    else:
        nearest = torch.cdist(features, means).argmin(dim=1)
    found = classifier.scores(classifier(features)).argmax(dim=1)
    assert found.tolist() == [seen[i] for i in nearest.tolist()]


def test_length_of_features_does_not_matter_to_the_cosine() -> None:
    classifier = make(None)
    features = torch.randn(5, FEATURES, generator=seeded(4), dtype=torch.float64)
    torch.testing.assert_close(classifier(features), classifier(7 * features))
    assert classifier.scores(classifier(0 * features)).isfinite().all()


@pytest.mark.parametrize("background", BACKGROUNDS)
def test_a_category_that_was_never_seen_has_score_zero(background: Any) -> None:
    classifier = make(background)
    features = torch.randn(5, FEATURES, generator=seeded(4), dtype=torch.float64)
    scores = classifier.scores(classifier(features))
    column = 3 + (background == "first")
    assert (scores[:, column] == 0).all()
    torch.testing.assert_close(scores.sum(dim=1), torch.ones(5, dtype=torch.float64))


def test_conv_features_with_background_from_others() -> None:
    maps = torch.randn(4, 2, 3, 1, generator=seeded(), dtype=torch.float64)
    box_features = torch.randn(4, 9, generator=seeded(1), dtype=torch.float64)
    linear = softmax_of("first", 9)
    assert linear is not None
    classifier = NearestClassMean.from_means(gathered("first"), softmax=linear, dtype=torch.float64)
    scores = classifier.scores(classifier(maps, box_features))
    torch.testing.assert_close(scores[:, 0], linear(box_features).softmax(dim=1)[:, 0])


# --- as a module ---------------------------------------------------------------------------------


def test_meets_the_protocol_at_test_and_refuses_training() -> None:
    for background in ("first", "last"):
        classifier = make(background)
        check_classifier(classifier, background=background)
        assert (classifier.in_features, classifier.num_categories) == (FEATURES, NUM_CATEGORIES)
        assert not any(parameter.requires_grad for parameter in classifier.parameters())
        logits = classifier(torch.ones(2, FEATURES, dtype=torch.float64))
        with pytest.raises(RuntimeError, match="Expected no training"):
            classifier.losses(logits, torch.tensor([0, 1]))


@pytest.mark.parametrize("background", BACKGROUNDS)
def test_a_checkpoint_describes_itself(background: Any) -> None:
    classifier = make(background, metric="euclidean", temperature=0.3)
    state = {f"head.{key}": value for key, value in classifier.state_dict().items()}
    other = NearestClassMean.from_state_dict(state, "head.")
    assert other.describe() == classifier.describe()
    features = torch.randn(5, FEATURES, generator=seeded(4), dtype=torch.float64)
    assert torch.equal(other(features), classifier(features))
    assert torch.equal(copy.deepcopy(classifier)(features), classifier(features))
    assert not any(parameter.requires_grad for parameter in other.parameters())


def test_a_checkpoint_of_another_metric_is_refused() -> None:
    with pytest.raises(ValueError, match="metric 'euclidean' instead of 'cosine'"):
        make("first").load_state_dict(make("first", metric="euclidean").state_dict())
    state = make("first").state_dict()
    del state["class_means"]
    with pytest.raises(ValueError, match="Expected a matrix class_means in the checkpoint"):
        NearestClassMean.from_state_dict(state)


def test_nothing_is_shared_with_the_arguments() -> None:
    linear, means = softmax_of("first"), torch.ones(NUM_CATEGORIES, FEATURES)
    counts = torch.ones(NUM_CATEGORIES, dtype=torch.int64)
    assert linear is not None
    classifier = NearestClassMean(means, counts, softmax=linear)
    with torch.no_grad():
        linear.weight.zero_()
    means.zero_()
    counts.zero_()
    assert classifier.softmax is not None
    assert classifier.softmax.weight.abs().sum() > 0
    assert classifier.class_means.sum() > 0
    assert classifier.class_counts.sum() > 0


# --- bad input -----------------------------------------------------------------------------------

MEANS, ONES = torch.ones(2, 3), torch.ones(2, dtype=torch.int64)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"means": torch.ones(2)}, TypeError, "Expected `means` to be a floating-point Tensor"),
        ({"counts": torch.ones(2)}, TypeError, "Expected `counts` to be an integer Tensor"),
        ({"counts": ONES[:1]}, ValueError, "Expected `counts` of 2 categories, got shape [1]"),
        ({"counts": 0 * ONES}, ValueError, "Expected at least one category with examples"),
        ({"means": MEANS * math.nan}, ValueError, "Expected finite `means`"),
        ({"metric": "manhattan"}, ValueError, "Expected `metric` to be one of"),
        ({"temperature": 0}, ValueError, "Expected `temperature` to be in"),
        ({"background": "first"}, ValueError, "Expected `softmax`, a trained classifier, exactly"),
        ({"softmax": nn.Linear(3, 2)}, ValueError, "Expected `softmax`, a trained classifier"),
        (
            {"background": "last", "softmax": nn.Linear(3, 2)},
            ValueError,
            "Expected `softmax` with 3 outputs, got 2",
        ),
        ({"background": "last", "softmax": nn.ReLU()}, TypeError, "Expected `softmax` to be an"),
    ],
)
def test_bad_arguments_are_named(arguments: dict[str, Any], error: Any, message: str) -> None:
    usual: dict[str, Any] = {"means": MEANS, "counts": ONES, "background": None}
    with pytest.raises(error, match=re.escape(message)):
        NearestClassMean(**{**usual, **arguments})


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (
            lambda means: means.update(torch.ones(1, 5), torch.tensor([0])),
            ValueError,
            "Expected `features` of shape [R, 3], or [R, ...] with as many numbers in a row, got",
        ),
        (
            lambda means: means.update(torch.ones(1, 3), torch.tensor([0, 1])),
            ValueError,
            "Expected `labels` for 1 rows, got 2",
        ),
        (
            lambda means: means.update(torch.ones(1, 3), torch.tensor([3])),
            ValueError,
            "Expected `labels` in [0, 2] or -100, got 3 at row 0",
        ),
        (lambda means: means.update([[1.0]], torch.tensor([0])), TypeError, "`features`"),
        (lambda means: means.merge(3), TypeError, "Expected `other` to be a ClassMeans, got int"),
        (
            lambda means: means.merge(ClassMeans(2, 4)),
            ValueError,
            "Expected `other` with categories, features, background (2, 3, 'first'), got",
        ),
        (lambda means: ClassMeans(0, 1), ValueError, "Expected `num_categories` of at least 1"),
        (lambda means: NearestClassMean.from_means(3), TypeError, "Expected `means` to be Class"),
    ],
)
def test_bad_calls_are_named(call: Any, error: Any, message: str) -> None:
    with pytest.raises(error, match=re.escape(message)):
        call(ClassMeans(2, 3))
