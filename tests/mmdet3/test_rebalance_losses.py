"""Seesaw loss and EQL v2 of `rebalance` are those of mmdet, step after step."""

import pytest

pytest.importorskip("mmdet.registry", reason="mmdet is not installed: docs/mmdet.md says how")

import torch
from mmdet.models.losses import EQLV2Loss, SeesawLoss
from torch import Tensor

from balanced_group_softmax.rebalance.eql_v2 import EQLv2Classifier
from balanced_group_softmax.rebalance.seesaw import SeesawClassifier

ROWS, STEPS = 300, 6


def batch(num_categories: int, num_logits: int, shift: float) -> tuple[Tensor, Tensor]:
    """Logits, and long-tailed labels with background last in a third of the rows."""
    logits = 3 * torch.randn(ROWS, num_logits) + shift
    labels = (torch.rand(ROWS) ** 2 * num_categories).long()
    labels[torch.rand(ROWS) < 1 / 3] = num_categories
    return logits.requires_grad_(), labels


def gradient(loss: Tensor, logits: Tensor) -> Tensor:
    """Of the sum over rows: the loss is a mean, whose gradients are smaller than the tolerance."""
    return ROWS * torch.autograd.grad(loss, logits, retain_graph=True)[0]


@pytest.mark.parametrize("num_categories", [1, 7, 40, 1203])
@pytest.mark.parametrize(("p", "q"), [(0.8, 2.0), (0.0, 2.0), (0.5, 0.0)])
def test_seesaw(num_categories: int, p: float, q: float) -> None:
    torch.manual_seed(num_categories)
    theirs = SeesawLoss(num_classes=num_categories, p=p, q=q)
    ours = SeesawClassifier(8, num_categories, p=p, q=q, background="last")
    for _ in range(STEPS):  # the counts grow
        logits, labels = batch(num_categories, num_categories + 2, 0.0)
        expected = theirs(logits, labels, torch.ones(ROWS), avg_factor=ROWS)
        found = ours.losses(logits, labels)
        assert found.keys() == expected.keys()
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
        for name in expected:
            one, other = gradient(found[name], logits), gradient(expected[name], logits)
            torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)
        scores = theirs.get_activation(logits.detach())
        torch.testing.assert_close(ours.scores(logits.detach()), scores, atol=1e-5, rtol=1e-5)
    counted = theirs.cum_samples[:num_categories].long()
    assert ours.cumulative_counts.tolist() == counted.tolist()


@pytest.mark.parametrize("num_categories", [1, 7, 40, 1203])
@pytest.mark.parametrize(("gamma", "mu", "alpha"), [(12.0, 0.8, 4.0), (2.0, 0.1, 0.0)])
def test_eql_v2(num_categories: int, gamma: float, mu: float, alpha: float) -> None:
    torch.manual_seed(num_categories)
    theirs = EQLV2Loss(num_classes=num_categories, gamma=gamma, mu=mu, alpha=alpha)
    ours = EQLv2Classifier(8, num_categories, gamma=gamma, mu=mu, alpha=alpha, background="last")
    for _ in range(STEPS):  # the gradients gather
        logits, labels = batch(num_categories, num_categories + 1, -2.0)
        # Theirs changes the logits that it is given: those of a copy.
        given = logits.detach().clone().requires_grad_()
        expected = theirs(given, labels)
        found = ours.losses(logits, labels)["loss_cls"]
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
        one, other = gradient(found, logits), gradient(expected, given)
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)
        scores = theirs.get_activation(logits.detach().clone())
        torch.testing.assert_close(ours.scores(logits.detach()), scores, atol=1e-5, rtol=1e-5)
    weights = ours.category_weights()
    assert (weights[0] != weights[0][0]).any() or num_categories == 1 or alpha == 0
