"""The discriminant start: its rows are the normal model's, and it touches what it should."""

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from balanced_group_softmax import BAGSHead, GroupLayout, grouped_softmax_scores
from balanced_group_softmax.adapters.protocol import check_classifier
from balanced_group_softmax.discriminant import (
    DiscriminantHead,
    FeatureStatistics,
    add_discriminant,
    discriminant_rows,
)

COUNTS = [3, 2500, 40, 7, 600, 12, 0, 5000]
F = 5
BACKGROUNDS = ["first", "last", None]


def rows_of(layout: GroupLayout, number: int = 400, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Features around a mean for each label; category 6 is never seen."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, layout.num_labels, (number,), generator=generator)
    unseen = layout.foreground.start + 6
    labels[labels == unseen] = layout.foreground.start
    means = 3 * torch.randn(layout.num_labels, F, generator=generator)
    spread = torch.randn(F, F, generator=generator)
    return means[labels] + torch.randn(number, F, generator=generator) @ spread, labels


def gathered(layout: GroupLayout, features: Tensor, labels: Tensor) -> FeatureStatistics:
    statistics = FeatureStatistics(layout, F)
    statistics.update(features, labels)
    return statistics


@pytest.mark.parametrize("background", BACKGROUNDS)
@pytest.mark.parametrize("ratio", [8.0, 0.5, math.inf])
def test_rows_are_those_of_normal_distributions(background: Any, ratio: float) -> None:
    """Logits differ within a group as the logarithms of share times density do."""
    layout = GroupLayout.from_counts(COUNTS, background=background)
    features, labels = rows_of(layout)
    weight, bias = discriminant_rows(
        gathered(layout, features, labels), others_ratio=ratio, shrinkage=0.2
    )
    features = features.double()
    categories = labels - layout.foreground.start
    seen = [i for i in range(len(COUNTS)) if bool((categories == i).any())]
    assert len(seen) == len(COUNTS) - 1
    around = torch.cat(
        [features[categories == i] - features[categories == i].mean(dim=0) for i in seen]
    )
    covariance = around.T @ around / len(around)
    covariance += 0.2 * covariance.trace() / F * torch.eye(F, dtype=torch.float64)

    x = torch.randn(6, F, dtype=torch.float64)
    for start, group in zip(layout.group_starts[-len(layout.groups) :], layout.groups, strict=True):
        inside = torch.isin(categories, torch.tensor(group))
        others = features[~inside]
        shares = [min(ratio * int(inside.sum()), len(others))]
        means = [others.mean(dim=0)]
        for category in group:
            own = features[categories == category]
            shares.append(max(len(own), 1))
            means.append(own.mean(dim=0) if len(own) else means[0])
        expected = torch.stack(
            [
                math.log(share / sum(shares))
                + torch.distributions.MultivariateNormal(mean, covariance).log_prob(x)
                for share, mean in zip(shares, means, strict=True)
            ],
            dim=1,
        )
        columns = slice(start, start + 1 + len(group))
        logits = x @ weight[columns].T + bias[columns]
        assert torch.allclose(logits.log_softmax(dim=1), expected.log_softmax(dim=1), atol=1e-8)
    if background is not None:
        assert not weight[:2].any()
        assert not bias[:2].any()


def test_order_parts_and_ignored_rows_make_no_difference() -> None:
    layout = GroupLayout.from_counts(COUNTS)
    features, labels = rows_of(layout)
    whole = gathered(layout, features, labels)
    one, two = (
        gathered(layout, features[part], labels[part]) for part in (slice(90), slice(90, None))
    )
    two.update(torch.full((3, F), torch.nan), torch.full((3,), -100))
    two.update(features[:0], labels[:0])
    two.merge(one)
    assert torch.equal(two.counts, whole.counts)
    assert torch.equal(whole.counts, labels.bincount(minlength=layout.num_labels))
    assert torch.allclose(two.covariance(), whole.covariance())
    for index in labels.unique().tolist():
        assert torch.allclose(two.means()[index], features[labels == index].double().mean(dim=0))
    assert two.means()[7].isnan().all()


def test_a_head_gets_them_in_part_and_by_group() -> None:
    layout = GroupLayout.from_counts(COUNTS)
    head = BAGSHead.from_linear(nn.Linear(F, layout.num_labels), layout, others_ratio=2)
    before = {name: value.clone() for name, value in head.named_parameters()}
    statistics = gathered(layout, *rows_of(layout))
    add_discriminant(head, statistics, strength=[0.1, 0.0, 0.25, 0.0], shrinkage=0.3)
    weight, bias = discriminant_rows(statistics, others_ratio=2, shrinkage=0.3)
    factors = torch.zeros(layout.num_logits, dtype=torch.float64)
    starts = layout.group_starts
    factors[starts[1] : starts[2]], factors[starts[3] : starts[4]] = 0.1, 0.25
    assert torch.allclose(head.fc.weight, before["fc.weight"] + (factors[:, None] * weight).float())
    assert torch.allclose(head.fc.bias, before["fc.bias"] + (factors * bias).float())
    assert head.fc.weight.requires_grad
    assert torch.equal(
        head.fc.weight[starts[2] : starts[3]], before["fc.weight"][starts[2] : starts[3]]
    )


def test_it_tells_few_examples_from_much_else() -> None:
    """A head with nothing but these rows finds categories of three examples."""
    layout = GroupLayout.from_counts([3, 3, 4000])
    right = []
    for seed in range(5):
        generator = torch.Generator().manual_seed(seed)
        means = 4 * torch.randn(4, F, generator=generator)
        labels = torch.tensor([0] * 200 + [1] * 3 + [2] * 3 + [3] * 300)
        features = means[labels] + torch.randn(len(labels), F, generator=generator)
        head = BAGSHead(F, layout)
        nn.init.zeros_(head.fc.weight)
        add_discriminant(head, gathered(layout, features, labels), strength=1.0)
        test = torch.arange(3).repeat(100) + 1
        x = means[test] + torch.randn(300, F, generator=generator)
        found = head.scores(head(x))[:, 1:].argmax(dim=1) + 1
        right.append(float((found == test).float().mean()))
    assert sum(right) / len(right) > 0.85


@pytest.mark.parametrize("ratio", [0.0, 8.0, math.inf])
def test_a_group_without_rows(ratio: float) -> None:
    """All of it is alike, and the other groups are as ever."""
    layout = GroupLayout.from_counts([0, 0, 2500, 3000])
    features, labels = torch.randn(60, F), torch.tensor([0, 3, 4] * 20)
    weight, bias = discriminant_rows(gathered(layout, features, labels), others_ratio=ratio)
    assert weight.isfinite().all()
    assert bias.isfinite().all()
    start = layout.group_starts[1]
    assert torch.equal(bias[start : start + 3], bias[start].expand(3))


def test_a_layout_of_the_original_may_have_an_empty_group() -> None:
    layout = GroupLayout(((0, 1), (), (2,)), ("a", "b", "c"), "first", None)
    labels = torch.arange(40) % 4
    statistics = gathered(layout, torch.randn(40, F), labels)
    weight, _ = discriminant_rows(statistics)
    assert weight.isfinite().all()
    add_discriminant(BAGSHead(F, layout), statistics)


@pytest.mark.parametrize(
    ("change", "error", "said"),
    [
        ({"features": torch.zeros(4, F + 1)}, ValueError, r"\[R, 5\], got \[4, 6\]"),
        ({"features": torch.zeros(4, F, dtype=torch.int64)}, TypeError, "`features`"),
        ({"features": [[0.0] * F] * 4}, TypeError, "`features`"),
        ({"labels": torch.zeros(3, dtype=torch.int64)}, ValueError, "for 4 rows, got 3"),
        ({"labels": torch.full((4,), 9)}, ValueError, r"in \[0, 8\]"),
        ({"labels": torch.zeros(4)}, TypeError, "`labels`"),
    ],
)
def test_batches_that_do_not_fit(change: Any, error: type[Exception], said: str) -> None:
    statistics = FeatureStatistics(GroupLayout.from_counts(COUNTS), F)
    arguments = {"features": torch.zeros(4, F), "labels": torch.zeros(4, dtype=torch.int64)}
    with pytest.raises(error, match=said):
        statistics.update(**{**arguments, **change})
    assert not statistics.counts.any()


def test_statistics_that_do_not_serve() -> None:
    layout = GroupLayout.from_counts(COUNTS)
    head = BAGSHead(F, layout)
    statistics = FeatureStatistics(layout, F)
    with pytest.raises(ValueError, match="at least one category, got none"):
        add_discriminant(head, statistics)
    statistics.update(torch.ones(4, F), torch.ones(4, dtype=torch.int64))
    with pytest.raises(ValueError, match="that vary within a category"):
        add_discriminant(head, statistics)
    statistics.update(torch.full((1, F), torch.inf), torch.ones(1, dtype=torch.int64))
    with pytest.raises(ValueError, match="finite features"):
        add_discriminant(head, statistics)
    of_background = gathered(layout, *rows_of(layout))
    of_background.update(torch.full((1, F), torch.nan), torch.zeros(1, dtype=torch.int64))
    with pytest.raises(ValueError, match="finite features"):
        add_discriminant(head, of_background)
    for seed in range(4):  # a spread of nothing but rounding, of either sign
        generator = torch.Generator().manual_seed(seed)
        rounded = FeatureStatistics(layout, F)
        rows = torch.randn(7, F, generator=generator)
        rows *= (3 * torch.randn(7, F, generator=generator)).exp()
        for _ in range(100):
            rounded.update(rows, torch.arange(7))
        with pytest.raises(ValueError, match="more than rounding"):
            add_discriminant(head, rounded)
    other = gathered(GroupLayout.from_counts(COUNTS, thresholds=(100,)), *rows_of(layout))
    with pytest.raises(ValueError, match="of the head's layout"):
        add_discriminant(head, other)
    with pytest.raises(ValueError, match="of the same layout"):
        statistics.merge(other)
    with pytest.raises(TypeError, match="`other`"):
        statistics.merge(head)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("change", "error", "said"),
    [
        ({"strength": -0.1}, ValueError, "strength"),
        ({"strength": [0.1, 0.1]}, ValueError, "4 numbers"),
        ({"strength": "much"}, TypeError, "strength"),
        ({"strength": math.inf}, ValueError, "`strength` to be finite"),
        ({"shrinkage": 0.0}, ValueError, "shrinkage"),
        ({"shrinkage": math.inf}, ValueError, "`shrinkage` to be finite"),
        ({"head": nn.Linear(F, 9)}, TypeError, "`head`"),
        ({"head": BAGSHead(F, GroupLayout.from_counts(COUNTS), bias=False)}, ValueError, "a bias"),
        ({"head": BAGSHead(F + 1, GroupLayout.from_counts(COUNTS))}, ValueError, "6 features"),
        ({"statistics": None}, TypeError, "`statistics`"),
    ],
)
def test_bad_arguments_leave_the_head_alone(change: Any, error: type[Exception], said: str) -> None:
    layout = GroupLayout.from_counts(COUNTS)
    head = BAGSHead(F, layout)
    before = head.fc.weight.clone()
    arguments = {"head": head, "statistics": gathered(layout, *rows_of(layout)), **change}
    with pytest.raises(error, match=said):
        add_discriminant(arguments.pop("head"), arguments.pop("statistics"), **arguments)
    assert torch.equal(head.fc.weight, before)


class TestHead:
    @pytest.fixture(params=BACKGROUNDS, ids=str)
    def layout(self, request: pytest.FixtureRequest) -> GroupLayout:
        return GroupLayout.from_counts(COUNTS, background=request.param)

    @pytest.fixture
    def head(self, layout: GroupLayout) -> DiscriminantHead:
        head = DiscriminantHead.from_linear(nn.Linear(F, layout.num_labels), layout)
        head.fit(gathered(layout, *rows_of(layout)), strength=0.05)
        return head

    def test_scores_are_the_mean_in_each_group(
        self, layout: GroupLayout, head: DiscriminantHead
    ) -> None:
        x = torch.randn(7, F)
        scores = head.scores(head(x))
        weight, bias = discriminant_rows(gathered(layout, *rows_of(layout)))
        trained = head.fc(x).double()
        fixed = x.double() @ weight.T + bias
        if layout.background is not None:
            fixed[:, :2] = trained[:, :2]
        one, two = (grouped_softmax_scores(logits, layout) for logits in (trained, fixed))
        expected = (one + two) / 2
        assert torch.allclose(scores.double(), expected, rtol=1e-3, atol=1e-6)
        assert not torch.allclose(scores.double(), one, atol=1e-2)
        if layout.background is not None:
            background = layout.background_label
            assert torch.allclose(scores[:, background].double(), one[:, background])

    def test_only_the_linear_layer_trains(
        self, layout: GroupLayout, head: DiscriminantHead
    ) -> None:
        features, labels = rows_of(layout, 40)
        plain = BAGSHead(F, layout)
        plain.fc.load_state_dict(head.fc.state_dict())
        generators = (torch.Generator().manual_seed(0) for _ in range(2))
        losses = [
            h.group_losses(h(features), labels, g)
            for h, g in zip((head, plain), generators, strict=True)
        ]
        assert torch.equal(*losses)
        for loss in losses:
            loss.sum().backward()
        assert torch.equal(head.fc.weight.grad, plain.fc.weight.grad)
        assert [name for name, _ in head.named_parameters()] == ["fc.weight", "fc.bias"]
        assert list(head.losses(head(features), labels))[-1].startswith("loss_cls_")

    def test_its_state_dict_says_all(
        self, layout: GroupLayout, head: DiscriminantHead, tmp_path: Path
    ) -> None:
        torch.save(head.state_dict(), tmp_path / "head.pt")
        state = torch.load(tmp_path / "head.pt", weights_only=True)
        assert GroupLayout.from_state_dict(state) == layout
        other = DiscriminantHead(F, layout)
        other.load_state_dict(state)
        x = torch.randn(3, F)
        assert torch.equal(other.scores(other(x)), head.scores(head(x)))
        with pytest.raises(RuntimeError, match="discriminant_weight"):
            BAGSHead(F, layout).load_state_dict(state)

    def test_a_start_of_its_own_or_none(self, layout: GroupLayout) -> None:
        linear = nn.Linear(F, layout.num_labels)
        heads = [DiscriminantHead.from_linear(linear, layout) for _ in range(2)]
        assert not heads[0].discriminant_weight.any()
        statistics = gathered(layout, *rows_of(layout))
        for head, strength in zip(heads, (0.0, 0.2), strict=True):
            head.fit(statistics, strength=strength)
        plain = BAGSHead.from_linear(linear, layout)
        assert torch.equal(heads[0].fc.weight, plain.fc.weight)
        assert torch.equal(heads[0].discriminant_weight, heads[1].discriminant_weight)
        add_discriminant(plain, statistics, strength=0.2)
        assert torch.equal(heads[1].fc.weight, plain.fc.weight)
        before = heads[1].discriminant_bias.clone()
        heads[1].fit(statistics, strength=0.0)
        assert torch.equal(heads[1].discriminant_bias, before)

    def test_it_is_a_classifier_for_adapters(self, head: DiscriminantHead) -> None:
        check_classifier(head, background=head.background)
        assert head.in_features == F

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_autocast_leaves_the_analysis_in_float32(
        self, layout: GroupLayout, head: DiscriminantHead, dtype: torch.dtype
    ) -> None:
        x = torch.randn(3, F)
        with torch.autocast("cpu", dtype):
            logits = head(x)
        assert torch.equal(logits[:, layout.num_logits :], head(x)[:, layout.num_logits :])
        assert logits.dtype == torch.float32

    def test_copies_move_and_compile(self, head: DiscriminantHead) -> None:
        x = torch.randn(3, F)
        twin = copy.deepcopy(head).double()
        expected = head.scores(head(x))
        assert torch.allclose(twin.scores(twin(x.double())).float(), expected, atol=1e-5)
        compiled = torch.compile(
            lambda rows: head.scores(head(rows)), fullgraph=True, backend="aot_eager"
        )
        assert torch.allclose(compiled(x), expected, atol=1e-6)

    def test_logits_of_one_head_alone_are_refused(
        self, layout: GroupLayout, head: DiscriminantHead
    ) -> None:
        with pytest.raises(ValueError, match=rf"\[R, {2 * layout.num_logits}\]"):
            head.scores(head.fc(torch.randn(3, F)))
        with pytest.raises(TypeError, match="`logits`"):
            head.loss(None, torch.zeros(3, dtype=torch.int64))  # type: ignore[arg-type]
