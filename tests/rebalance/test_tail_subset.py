"""The images that the tail is fine-tuned on, by plain loops and on LVIS v0.5."""

import pickle
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from balanced_group_softmax import category_counts
from balanced_group_softmax.rebalance.tail_subset import tail_categories, tail_subset


@given(data=st.data(), background=st.sampled_from(["first", "last", None]))
def test_equals_a_plain_loop(data: st.DataObject, background: Any) -> None:
    counts = data.draw(st.lists(st.integers(0, 30), min_size=1, max_size=6))
    below = data.draw(st.integers(1, 30))
    first = int(background == "first")
    label = st.integers(first, first + len(counts) - 1)
    labels = data.draw(st.lists(st.lists(label, max_size=4), max_size=8))
    found = tail_subset(labels, counts, below=below, background=background)
    masks = [[counts[k - first] < below for k in row] for row in labels]
    assert found.images.tolist() == [i for i, mask in enumerate(masks) if any(mask)]
    assert [mask.tolist() for mask in found.keep] == [mask for mask in masks if any(mask)]
    assert tail_categories(counts, below=below).tolist() == [
        c for c, count in enumerate(counts) if count < below
    ]


def test_the_bound_itself_is_not_of_the_tail() -> None:
    assert tail_categories([99, 100, 0]).tolist() == [0, 2]


class Builtins(pickle.Unpickler):
    """Reads containers, numbers and text; anything that would have to be imported is refused."""

    def find_class(self, module: str, name: str) -> Any:
        raise pickle.UnpicklingError(f"{module}.{name} is not expected in this file")


def test_real_images(lvis_data: Path) -> None:
    with (lvis_data / "class_to_imageid_and_inscount.pt").open("rb") as file:
        rows = Builtins(file).load()
    labels: dict[int, list[int]] = {}
    for category, row in rows.items():
        if category > 0:
            for image in row["img_id"]:
                labels.setdefault(image, []).append(category)
    counts = category_counts(lvis_data / "lvis_v0.5_train_categories.json")
    ids = sorted(labels)
    found = tail_subset([labels[image] for image in ids], counts)
    tail = {c + 1 for c, count in enumerate(counts) if count < 100}
    assert len(tail) == 294 + 453  # the two lowest groups of the original
    expected = set().union(*(rows[category]["img_id"] for category in tail))
    assert {ids[i] for i in found.images.tolist()} == expected
    kept = sum(int(mask.sum()) for mask in found.keep)
    assert kept == sum(len(rows[category]["img_id"]) for category in tail)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"labels": [[0]]}, ValueError, "Expected `labels` in [1, 2], got 0 in image 0"),
        ({"labels": [[1], [3]]}, ValueError, "Expected `labels` in [1, 2], got 3 in image 1"),
        ({"labels": [[0.5]]}, TypeError, "Expected `labels[0]` to be integers"),
        ({"labels": 3}, TypeError, "Expected `labels` to be a sequence, got 3"),
        ({"counts": [1, -1]}, ValueError, "Expected `counts` of at least 0, got -1"),
        ({"below": 0}, ValueError, "Expected `below` of at least 1, got 0"),
        ({"background": "none"}, ValueError, "Expected `background` to be"),
    ],
)
def test_bad_input_is_named(arguments: dict[str, Any], error: Any, message: str) -> None:
    usual: dict[str, Any] = {"labels": [[1]], "counts": [1, 2]}
    with pytest.raises(error, match=re.escape(message)):
        tail_subset(**{**usual, **arguments})
