"""What a version saved, every later one reads. Add to this file; change nothing in it."""

import torch
from torch import Tensor

from balanced_group_softmax import BAGSHead, GroupLayout
from balanced_group_softmax.rebalance.seesaw import SeesawClassifier

# Of 0.1.0, as written.
LAYOUT = (
    '{"format": "balanced_group_softmax.GroupLayout", "format_version": 1, "background": "first", '
    '"num_categories": 5, "groups": [{"name": "0_10", "categories": [0, 3]}, '
    '{"name": "10_100", "categories": [2]}, {"name": "100_1000", "categories": [4]}, '
    '{"name": "1000_inf", "categories": [1]}], "category_ids": [1, 2, 4, 7, 9]}'
)
SEESAW = (
    '{"format": "balanced_group_softmax.rebalance", "format_version": 1, '
    '"method": "SeesawClassifier", "num_categories": 2, "background": "first", '
    '"settings": {"p": 0.8, "q": 2.0, "eps": 0.01, "ignore_index": -100}}'
)


def as_bytes(text: str) -> Tensor:
    return torch.tensor(list(text.encode()), dtype=torch.uint8)


def expected() -> GroupLayout:
    return GroupLayout.from_counts([3, 2500, 40, 7, 600], category_ids=[1, 2, 4, 7, 9])


def test_a_layout() -> None:
    assert GroupLayout.from_json(LAYOUT) == expected()


def test_a_head() -> None:
    weight, bias = torch.randn(11, 4), torch.randn(11)
    state = {"fc.weight": weight, "fc.bias": bias, "_extra_state": as_bytes(LAYOUT)}
    head = BAGSHead(4, GroupLayout.from_state_dict(state))
    head.load_state_dict(state)
    assert head.layout == expected()
    assert torch.equal(head.fc.weight, weight)
    assert torch.equal(head.fc.bias, bias)


def test_a_classifier_of_rebalance() -> None:
    state = {
        "fc.weight": torch.randn(4, 4),
        "fc.bias": torch.randn(4),
        "cumulative_counts": torch.tensor([3, 5]),
        "_extra_state": as_bytes(SEESAW),
    }
    classifier = SeesawClassifier.from_state_dict(state)
    assert torch.equal(classifier.fc.weight, state["fc.weight"])
    assert classifier.cumulative_counts.tolist() == [3, 5]
