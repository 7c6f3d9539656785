"""Each method against its formula, written out row by row in float64, and its limits.

Where mmdet can be installed, its own tests compare Seesaw and EQL v2 with `SeesawLoss` and
`EQLV2Loss`; here the papers' formulas are the reference.
"""

import math

import pytest
import torch
from classifier_cases import (
    BACKGROUNDS,
    COUNTS,
    NUM_CATEGORIES,
    features_of,
    labels_in,
    make,
    num_labels,
    seeded,
)
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from balanced_group_softmax.rebalance.linear_classifier import LinearClassifier

ROWS: list[int | None] = [None, 0, 4, None, 1, 1, 2, None, 3, 4, 1]


def logits_of(classifier: LinearClassifier, scale: float = 1.0) -> Tensor:
    shape = (len(ROWS), classifier.num_logits)
    return scale * torch.randn(shape, generator=seeded(8), dtype=torch.float64)


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def total(classifier: LinearClassifier, logits: Tensor, labels: Tensor) -> float:
    return float(sum(classifier.losses(logits, labels, seeded()).values()))


# --- softmax -------------------------------------------------------------------------------------


@pytest.mark.parametrize("background", BACKGROUNDS)
def test_softmax_is_cross_entropy(background: str | None) -> None:
    classifier = make("softmax", background)
    logits, labels = logits_of(classifier), labels_in(background, ROWS)
    expected = F.cross_entropy(logits, labels)
    torch.testing.assert_close(classifier.losses(logits, labels), {"loss_cls": expected})
    torch.testing.assert_close(classifier.scores(logits), logits.softmax(dim=1))


@pytest.mark.parametrize("background", BACKGROUNDS)
def test_class_weights_are_divided_by_rows_and_not_by_weights(background: str | None) -> None:
    weights = [0.1 + i for i in range(num_labels(background))]
    classifier = make("softmax", background, class_weights=weights)
    logits, labels = logits_of(classifier), labels_in(background, ROWS)
    expected = 0.0
    for row, label in zip(logits.tolist(), labels.tolist(), strict=True):
        log_sum = math.log(sum(math.exp(z) for z in row))
        expected += weights[label] * (log_sum - row[label]) / len(ROWS)
    assert total(classifier, logits, labels) == pytest.approx(expected, rel=1e-12)


# --- focal ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("normalizer", ["elements", "rows", "foreground"])
@pytest.mark.parametrize("alpha", [0.25, 1.0, None])
@pytest.mark.parametrize("gamma", [0.0, 0.5, 2.0])
@pytest.mark.parametrize("background", ["first", "last"])
def test_focal(background: str, gamma: float, alpha: float | None, normalizer: str) -> None:
    classifier = make("focal", background, gamma=gamma, alpha=alpha, normalizer=normalizer)
    logits, labels = logits_of(classifier), labels_in(background, ROWS)
    value = 0.0
    for row, label in zip(logits.tolist(), labels.tolist(), strict=True):
        for column, z in enumerate(row):
            is_target = column == label
            p = sigmoid(z) if is_target else 1 - sigmoid(z)
            weight = 1.0 if alpha is None else alpha if is_target else 1 - alpha
            value += weight * (1 - p) ** gamma * -math.log(p)
    divisor = {
        "elements": logits.numel(),
        "rows": len(ROWS),
        "foreground": sum(row is not None for row in ROWS),
    }[normalizer]
    assert total(classifier, logits, labels) == pytest.approx(value / divisor, rel=1e-12)


def test_focal_without_focus_is_plain_sigmoid_cross_entropy() -> None:
    classifier = make("focal", gamma=0, alpha=None)
    logits, labels = logits_of(classifier), labels_in("first", ROWS)
    targets = F.one_hot(labels, NUM_CATEGORIES + 1).double()
    expected = F.binary_cross_entropy_with_logits(logits, targets)
    torch.testing.assert_close(classifier.loss(logits, labels), expected)


def test_focal_class_weights_multiply_rows() -> None:
    weights = [1.0, 2.0, 0.5, 3.0, 1.0, 0.0]
    plain, weighted = make("focal"), make("focal", class_weights=weights)
    logits = logits_of(plain)
    for row, category in enumerate(ROWS):
        one, label = logits[row : row + 1], labels_in("first", [category])
        ratio = total(weighted, one, label) / total(plain, one, label)
        assert ratio == pytest.approx(weights[int(label)])


def test_focal_gradients_stay_finite_far_out() -> None:
    for gamma in (0.0, 0.5, 2.0):
        classifier = make("focal", dtype=torch.float32, gamma=gamma)
        logits = torch.tensor([[-1e4, 1e4, -200.0, 200.0, 0.0, 5.0]], requires_grad=True)
        classifier.loss(logits, torch.tensor([1])).backward()
        assert logits.grad is not None
        assert logits.grad.isfinite().all()


def test_focal_scores() -> None:
    logits = logits_of(make("focal"))
    torch.testing.assert_close(make("focal").scores(logits), logits.softmax(dim=1))
    torch.testing.assert_close(make("focal-sigmoid").scores(logits), logits.sigmoid())


# --- logit adjustment ----------------------------------------------------------------------------


@pytest.mark.parametrize("tau", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("background_count", [None, 900.0])
@pytest.mark.parametrize("background", ["first", "last"])
def test_balanced_softmax(background: str, background_count: float | None, tau: float) -> None:
    classifier = make("balanced-softmax", background, tau=tau, background_count=background_count)
    logits, labels = logits_of(classifier), labels_in(background, ROWS)
    counts = [float(max(count, 1)) for count in COUNTS]
    mean = sum(counts) / len(counts)
    of_background = [mean if background_count is None else background_count]
    priors = of_background + counts if background == "first" else counts + of_background
    expected = 0.0
    for row, label in zip(logits.tolist(), labels.tolist(), strict=True):
        masses = [prior**tau * math.exp(z) for prior, z in zip(priors, row, strict=True)]
        expected -= math.log(masses[label] / sum(masses)) / len(ROWS)
    assert total(classifier, logits, labels) == pytest.approx(expected, rel=1e-12)
    torch.testing.assert_close(classifier.scores(logits), logits.softmax(dim=1))


def test_balanced_softmax_of_equal_counts_is_softmax() -> None:
    for background in BACKGROUNDS:
        adjusted = make("balanced-softmax", background, counts=[7] * NUM_CATEGORIES)
        logits, labels = logits_of(adjusted), labels_in(background, ROWS)
        torch.testing.assert_close(adjusted.loss(logits, labels), F.cross_entropy(logits, labels))


@given(factor=st.integers(1, 1000))
def test_only_ratios_of_counts_matter(factor: int) -> None:
    counts = [3, 2500, 40, 1, 600]
    one, other = (make("balanced-softmax", counts=[n * k for n in counts]) for k in (1, factor))
    logits, labels = logits_of(one), labels_in("first", ROWS)
    assert total(one, logits, labels) == pytest.approx(total(other, logits, labels), rel=1e-9)


@pytest.mark.parametrize("background", BACKGROUNDS)
def test_adjusting_at_test_undoes_the_prior(background: str | None) -> None:
    """Scores that hold the prior as a factor lose it; categories alone show that."""
    after = make("logit-adjustment", background, tau=1.0)
    logits = logits_of(after)
    scores = after.scores(logits)[:, after.foreground]
    expected = logits[:, after.foreground].exp() / torch.tensor(
        [max(count, 1) for count in COUNTS], dtype=torch.float64
    )
    torch.testing.assert_close(
        scores / scores.sum(dim=1, keepdim=True), expected / expected.sum(dim=1, keepdim=True)
    )
    labels = labels_in(background, ROWS)
    torch.testing.assert_close(after.loss(logits, labels), F.cross_entropy(logits, labels))


def test_the_odds_of_background_stay_on_average_over_instances() -> None:
    """What the definition of background promises for tau 1, on a model that knows the truth."""
    counts = torch.tensor([max(count, 1) for count in COUNTS], dtype=torch.float64)
    priors = counts / counts.sum()  # of categories among foreground
    classifier = make("logit-adjustment", "first", tau=1.0)
    # A feature that says "foreground" alone: categories by their priors, background as likely.
    logits = torch.cat([torch.zeros(1, dtype=torch.float64), priors.log()])[None]
    assert classifier.scores(logits)[0, 0].item() == pytest.approx(0.5)


# --- seesaw --------------------------------------------------------------------------------------


def seesaw_of_row(
    row: list[float], own: int, counts: list[int], p: float, q: float, eps: float
) -> float:
    exponentials = [math.exp(z) for z in row]
    probabilities = [value / sum(exponentials) for value in exponentials]
    denominator = exponentials[own]
    for j, exponential in enumerate(exponentials):
        if j == own:
            continue
        n_own, n_j = max(counts[own], 1), max(counts[j], 1)
        mitigation = (n_j / n_own) ** p if n_j < n_own else 1.0
        ratio = probabilities[j] / max(probabilities[own], eps)
        compensation = ratio**q if ratio > 1 else 1.0
        denominator += mitigation * compensation * exponential
    return -math.log(exponentials[own] / denominator)


@pytest.mark.parametrize("background", BACKGROUNDS)
@pytest.mark.parametrize(("p", "q", "eps"), [(0.8, 2.0, 1e-2), (0.0, 2.0, 0.3), (0.8, 0.0, 1e-2)])
def test_seesaw_over_three_steps(background: str | None, p: float, q: float, eps: float) -> None:
    classifier = make("seesaw", background, p=p, q=q, eps=eps)
    counts = [0] * NUM_CATEGORIES
    for step in range(3):
        rows = ROWS[step:] + [1] * (4 * step)
        if background is None:
            rows = [row for row in rows if row is not None]
        shape = (len(rows), classifier.num_logits)
        logits = 2 * torch.randn(shape, generator=seeded(step), dtype=torch.float64)
        for category in rows:
            if category is not None:
                counts[category] += 1
        expected = {"loss_cls_classes": 0.0, "loss_cls_objectness": 0.0}
        for row, category in zip(logits.tolist(), rows, strict=True):
            if category is not None:
                of_row = seesaw_of_row(row[:NUM_CATEGORIES], category, counts, p, q, eps)
                expected["loss_cls_classes"] += of_row / len(rows)
            if background is not None:
                foreground, no_object = row[NUM_CATEGORIES:]
                own, other = (foreground, no_object)[:: 1 if category is not None else -1]
                expected["loss_cls_objectness"] += math.log1p(math.exp(other - own)) / len(rows)
        if background is None:
            del expected["loss_cls_objectness"]
        losses = classifier.losses(logits, labels_in(background, rows))
        assert {name: loss.item() for name, loss in losses.items()} == pytest.approx(expected)
        assert classifier.cumulative_counts.tolist() == counts


def test_seesaw_without_exponents_is_cross_entropy() -> None:
    classifier = make("seesaw", None, p=0, q=0)
    logits, labels = logits_of(classifier, 3), labels_in(None, ROWS)
    torch.testing.assert_close(classifier.loss(logits, labels), F.cross_entropy(logits, labels))


def test_no_gradient_flows_through_the_factors_of_seesaw() -> None:
    classifier = make("seesaw", None).eval()
    classifier.cumulative_counts.copy_(torch.tensor([5, 100, 7, 0, 2]))
    logits, labels = logits_of(classifier).requires_grad_(), labels_in(None, ROWS)
    (gradient,) = torch.autograd.grad(classifier.loss(logits, labels), logits)
    # With constant factors the gradient is a softmax of adjusted logits less the target.
    adjusted = torch.zeros_like(gradient)
    for r, row in enumerate(logits.tolist()):
        own = int(labels[r])
        counts = [max(n, 1) for n in (5, 100, 7, 0, 2)]
        exponentials = [math.exp(z) for z in row]
        for j in range(NUM_CATEGORIES):
            ratio = exponentials[j] / sum(exponentials)
            ratio /= max(exponentials[own] / sum(exponentials), 1e-2)
            factor = min(1, counts[j] / counts[own]) ** 0.8 * max(1, ratio) ** 2
            adjusted[r, j] = exponentials[j] * (1 if j == own else factor)
    expected = adjusted / adjusted.sum(dim=1, keepdim=True) - F.one_hot(labels, NUM_CATEGORIES)
    torch.testing.assert_close(gradient, expected / len(ROWS))


def test_seesaw_scores_are_a_distribution() -> None:
    for background in BACKGROUNDS:
        classifier = make("seesaw", background)
        logits = logits_of(classifier)
        scores = classifier.scores(logits)
        torch.testing.assert_close(scores.sum(dim=1), torch.ones(len(ROWS), dtype=torch.float64))
        if background is not None:
            objectness = logits[:, NUM_CATEGORIES:].softmax(dim=1)
            assert classifier.background_label is not None
            torch.testing.assert_close(scores[:, classifier.background_label], objectness[:, 1])


# --- EQL v2 --------------------------------------------------------------------------------------


@pytest.mark.parametrize("background", BACKGROUNDS)
def test_eql_v2_over_steps(background: str | None) -> None:
    gamma, mu, alpha = 9.0, 0.3, 4.0
    classifier = make("eql-v2", background, gamma=gamma, mu=mu, alpha=alpha)
    positive, negative = [0.0] * NUM_CATEGORIES, [0.0] * NUM_CATEGORIES
    first = int(background == "first")
    for step in range(4):
        labels = labels_in(background, ROWS)
        shape = (len(ROWS), classifier.num_logits)
        logits = 2 * torch.randn(shape, generator=seeded(step), dtype=torch.float64)
        ratios = [
            100 if a == b == 0 else a / (b + 1e-10) for a, b in zip(positive, negative, strict=True)
        ]
        negatives = [1 / (1 + math.exp(-gamma * (ratio - mu))) for ratio in ratios]
        expected = 0.0
        for row, label in zip(logits.tolist(), labels.tolist(), strict=True):
            for column, z in enumerate(row):
                category = column - first
                is_category = 0 <= category < NUM_CATEGORIES
                w_negative = negatives[category] if is_category else 1.0
                w_positive = 1 + alpha * (1 - w_negative)
                p = sigmoid(z)
                if column == label:
                    expected -= w_positive * math.log(p) / len(ROWS)
                    if is_category:
                        positive[category] += w_positive * (1 - p)
                else:
                    expected -= w_negative * math.log(1 - p) / len(ROWS)
                    if is_category:
                        negative[category] += w_negative * p
        assert total(classifier, logits, labels) == pytest.approx(expected, rel=1e-9)
        assert classifier.positive_gradients.tolist() == pytest.approx(positive, rel=1e-6)
        assert classifier.negative_gradients.tolist() == pytest.approx(negative, rel=1e-6)
    assert max(negatives) - min(negatives) > 0.1  # the weights had something to do


def test_eql_v2_begins_as_plain_sigmoid_cross_entropy() -> None:
    classifier = make("eql-v2")
    logits, labels = logits_of(classifier), labels_in("first", ROWS)
    targets = F.one_hot(labels, NUM_CATEGORIES + 1).double()
    expected = F.binary_cross_entropy_with_logits(logits, targets, reduction="sum") / len(ROWS)
    torch.testing.assert_close(classifier.loss(logits, labels), expected)


def test_eql_v2_scores() -> None:
    for background, at in (("first", 0), ("last", NUM_CATEGORIES)):
        classifier = make("eql-v2", background)
        logits = logits_of(classifier)
        p = logits.sigmoid()
        expected = p * (1 - p[:, at, None])
        expected[:, at] = p[:, at]
        torch.testing.assert_close(classifier.scores(logits), expected)
        plain = make("eql-v2", background, objectness=False)
        torch.testing.assert_close(plain.scores(logits), p)


# --- federated -----------------------------------------------------------------------------------


@pytest.mark.parametrize("background", BACKGROUNDS)
def test_federated(background: str | None) -> None:
    classifier = make("federated", background)
    rows = [row for row in ROWS if row in (None, 1, 4)]
    labels = labels_in(background, rows)
    shape = (len(rows), NUM_CATEGORIES)
    logits = torch.randn(shape, generator=seeded(3), dtype=torch.float64)
    chosen = classifier.draw(labels, seeded(4))
    present = {1, 4} | ({0} if background is None else set())  # None stands for 0 there
    assert int(chosen.sum()) == 3
    assert present <= set(chosen.nonzero().flatten().tolist())
    expected = 0.0
    first = int(background == "first")
    for row, label in zip(logits.tolist(), labels.tolist(), strict=True):
        for category, z in enumerate(row):
            if chosen[category]:
                p = sigmoid(z)
                expected -= math.log(p if category == label - first else 1 - p) / len(rows)
    found = classifier.losses(logits, labels, seeded(4))["loss_cls"].item()
    assert found == pytest.approx(expected, rel=1e-12)


def test_federated_with_all_categories_is_plain_sigmoid_cross_entropy() -> None:
    classifier = make("federated", "last", num_sampled=NUM_CATEGORIES)
    logits, labels = logits_of(classifier), labels_in("last", ROWS)
    targets = F.one_hot(labels, NUM_CATEGORIES + 1)[:, :NUM_CATEGORIES].double()
    expected = F.binary_cross_entropy_with_logits(logits, targets, reduction="sum") / len(ROWS)
    torch.testing.assert_close(classifier.loss(logits, labels), expected)


def test_categories_beyond_the_number_are_all_kept() -> None:
    classifier = make("federated", num_sampled=1)
    chosen = classifier.draw(labels_in("first", [0, 3, None, 4]))
    assert chosen.tolist() == [True, False, False, True, True]


def test_categories_that_were_not_drawn_are_not_read() -> None:
    classifier = make("federated")
    labels = labels_in("first", [None, 1])
    logits = torch.zeros(2, NUM_CATEGORIES, dtype=torch.float64)
    chosen = classifier.draw(labels, seeded())
    logits[:, ~chosen] = math.nan
    logits.requires_grad_()
    loss = classifier.loss(logits, labels, seeded())
    loss.backward()
    assert loss.item() == pytest.approx(3 * math.log(2))
    assert logits.grad is not None
    assert (logits.grad[:, ~chosen] == 0).all()
    assert (logits.grad[:, chosen] != 0).all()


def test_the_draw_follows_the_counts() -> None:
    """The share of each first category, and of each pair, against drawing one after the other."""
    counts = [1, 4, 16, 0, 25]
    rates = [1.0, 2.0, 4.0, 1.0, 5.0]  # square roots; 0 is taken as 1
    classifier = make("federated", counts=counts, num_sampled=2)
    labels = labels_in("first", [None])
    generator = seeded(1)
    number = 6_000
    hits = sum(classifier.draw(labels, generator).double() for _ in range(number))
    expected = [rate / sum(rates) for rate in rates]
    for first, rate in enumerate(rates):
        for second, other in enumerate(rates):
            if second != first:
                expected[second] += rate / sum(rates) * other / (sum(rates) - rate)
    for hit, probability in zip(hits.tolist(), expected, strict=True):
        spread = math.sqrt(probability * (1 - probability) / number)
        assert abs(hit / number - probability) < 4.5 * spread


def test_federated_scores() -> None:
    for background in BACKGROUNDS:
        classifier = make("federated", background)
        logits = logits_of(classifier)
        scores = classifier.scores(logits)
        torch.testing.assert_close(scores[:, classifier.foreground], logits.sigmoid())
        if classifier.background_label is not None:
            none = (1 - logits.sigmoid()).prod(dim=1)
            torch.testing.assert_close(scores[:, classifier.background_label], none)


# --- where training starts -----------------------------------------------------------------------


@pytest.mark.parametrize("background", BACKGROUNDS)
def test_starts_that_keep_the_scores_of_the_softmax_classifier(background: str | None) -> None:
    features = features_of(9)
    expected = make("softmax", background).fc(features).softmax(dim=1)
    for name in ("softmax", "focal", "balanced-softmax"):
        classifier = make(name, background)
        torch.testing.assert_close(classifier.scores(classifier(features)), expected)


@pytest.mark.parametrize("background", ["first", "last"])
def test_sigmoids_start_at_the_odds_against_background(background: str) -> None:
    features = features_of(9)
    plain = make("softmax", background)
    p = plain.scores(plain(features))
    assert plain.background_label is not None
    of_background = p[:, plain.background_label, None]
    expected = p[:, plain.foreground] / (p[:, plain.foreground] + of_background)
    for name in ("focal-sigmoid", "federated", "eql-v2"):
        classifier = make(name, background)
        logits = classifier(features)
        columns = slice(None) if name == "federated" else plain.foreground
        torch.testing.assert_close(logits.sigmoid()[:, columns], expected)
        if name != "federated":
            # Background against C categories of equal logits, their mean.
            z = plain(features)
            mean = z[:, plain.foreground].mean(dim=1)
            odds = z[:, plain.background_label] - mean - math.log(NUM_CATEGORIES)
            torch.testing.assert_close(logits[:, plain.background_label], odds)


def test_sigmoids_without_background_start_at_the_odds_of_equal_others() -> None:
    features = features_of(9)
    z = make("softmax", None)(features)
    others = (z.sum(dim=1, keepdim=True) - z) / (NUM_CATEGORIES - 1)
    expected = z - others - math.log(NUM_CATEGORIES - 1)
    for name in ("federated", "eql-v2", "focal-sigmoid"):
        torch.testing.assert_close(make(name, None)(features), expected)


@pytest.mark.parametrize("background", BACKGROUNDS)
def test_seesaw_starts_with_the_categories_as_they_were(background: str | None) -> None:
    features = features_of(9)
    plain, classifier = make("softmax", background), make("seesaw", background)
    p = plain.scores(plain(features))[:, plain.foreground]
    scores = classifier.scores(classifier(features))[:, plain.foreground]
    shares = [values / values.sum(dim=1, keepdim=True) for values in (scores, p)]
    torch.testing.assert_close(*shares)


def test_fresh_sigmoids_start_at_the_prior() -> None:
    for name, prior in (("eql-v2", 1e-3), ("federated", 1e-2)):
        method, settings = type(make(name)), {"counts": COUNTS} if name == "federated" else {}
        fresh = method(3, NUM_CATEGORIES, **settings)
        torch.testing.assert_close(fresh.fc.bias.sigmoid(), torch.full((fresh.num_logits,), prior))
