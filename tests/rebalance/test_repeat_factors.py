"""Repeat-factor sampling: the formulas on real LVIS facts, the draw, and the parts of processes."""

import math
import pickle
import random
import re
from collections import Counter
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from balanced_group_softmax.counts import image_counts
from balanced_group_softmax.rebalance.repeat_factors import (
    RepeatFactorSampler,
    category_repeat_factors,
    image_repeat_factors,
    repeat_indices,
)

# --- an independent re-expression ----------------------------------------------------------------


def squared_factor(images: int, of: int, threshold: Fraction) -> Fraction:
    """The exact square of a category's factor, from the definition, without a root or a float."""
    if images == 0:
        return Fraction(1)
    return max(Fraction(1), threshold / Fraction(images, of))


class Builtins(pickle.Unpickler):
    """Reads containers, numbers and text; anything that would have to be imported is refused."""

    def find_class(self, module: str, name: str) -> Any:
        raise pickle.UnpicklingError(f"{module}.{name} is not expected in this file")


@pytest.fixture(scope="module")
def images_of_category(lvis_data: Path) -> dict[int, list[int]]:
    """LVIS v0.5, training: category id -> ids of the images that hold it."""
    with (lvis_data / "class_to_imageid_and_inscount.pt").open("rb") as file:
        rows = Builtins(file).load()
    return {category: row["img_id"] for category, row in rows.items() if category > 0}


@pytest.fixture(scope="module")
def labels_of_images(images_of_category: dict[int, list[int]]) -> list[list[int]]:
    """The same by image, as labels 1..1230 (v0.5 has the category ids 1..1230)."""
    labels: dict[int, list[int]] = {}
    for category, images in images_of_category.items():
        for image in images:
            labels.setdefault(image, []).append(category)
    return [labels[image] for image in sorted(labels)]


# --- factors of categories -----------------------------------------------------------------------


def test_factors_of_real_categories(
    images_of_category: dict[int, list[int]], lvis_data: Path
) -> None:
    images = set().union(*images_of_category.values())
    assert (len(images_of_category), len(images)) == (1230, 56_740)
    counts = [len(set(images_of_category[category])) for category in range(1, 1231)]
    assert counts == image_counts(lvis_data / "lvis_v0.5_train_categories.json")
    factors = category_repeat_factors(counts, len(images))
    assert factors.dtype == torch.float64
    for factor, count in zip(factors.tolist(), counts, strict=True):
        exact = squared_factor(count, len(images), Fraction(1, 1000))
        assert math.isclose(factor, math.sqrt(exact), rel_tol=1e-15)
    assert int((factors > 1).sum()) == sum(count * 1000 < 56_740 for count in counts) == 829
    assert factors.max() == pytest.approx(math.sqrt(56.74))  # one image


def test_factors_of_lvis_v1_fall_with_the_count(lvis_data: Path) -> None:
    counts = image_counts(lvis_data / "lvis_v1_train_categories.json")
    num_images = 100_000  # of that order; the file does not say
    factors = category_repeat_factors(counts, num_images)
    order = np.argsort(counts, kind="stable")
    assert (np.diff(factors.numpy()[order]) <= 0).all()
    repeated = [count for count, factor in zip(counts, factors.tolist(), strict=True) if factor > 1]
    assert sorted(repeated) == sorted(count for count in counts if count < 100)


@given(
    counts=st.lists(st.integers(0, 500), max_size=20),
    num_images=st.integers(500, 10**9),
    threshold=st.fractions(0, 1, max_denominator=10**6),
)
def test_category_factors_equal_the_definition(
    counts: list[int], num_images: int, threshold: Fraction
) -> None:
    factors = category_repeat_factors(counts, num_images, threshold=float(threshold))
    exact = [squared_factor(count, num_images, Fraction(float(threshold))) for count in counts]
    assert factors.tolist() == pytest.approx([math.sqrt(value) for value in exact], rel=1e-14)
    assert factors.shape == (len(counts),)
    assert (factors >= 1).all()


@pytest.mark.parametrize("kind", [list, tuple, np.array, torch.tensor], ids=lambda k: k.__name__)
def test_counts_may_be_given_in_any_of_the_usual_ways(kind: Callable[[list[int]], Any]) -> None:
    factors = category_repeat_factors(kind([1, 4, 0]), 16, threshold=1.0)
    assert factors.tolist() == [4.0, 2.0, 1.0]
    assert category_repeat_factors(kind([]), 16).tolist() == []


def test_threshold_zero_repeats_nothing() -> None:
    assert category_repeat_factors([0, 1, 5], 5, threshold=0).tolist() == [1.0, 1.0, 1.0]


# --- factors of images ---------------------------------------------------------------------------


def test_factors_of_real_images(labels_of_images: list[list[int]]) -> None:
    counts = Counter(label for labels in labels_of_images for label in labels)
    by_category = category_repeat_factors([counts[c] for c in range(1, 1231)], 56_740)
    factors = image_repeat_factors(labels_of_images, by_category)
    # The rarest category decides.
    for factor, labels in zip(factors.tolist(), labels_of_images, strict=True):
        rarest = min(counts[label] for label in labels)
        exact = squared_factor(rarest, 56_740, Fraction(1, 1000))
        assert math.isclose(factor, math.sqrt(exact), rel_tol=1e-15)
    assert factors.sum().item() == pytest.approx(64_858.19, abs=0.01)
    assert int((factors > 1).sum()) == 9_668


@given(data=st.data(), background=st.sampled_from(["first", "last", None]))
def test_image_factors_equal_a_plain_loop(data: st.DataObject, background: str | None) -> None:
    factors = data.draw(st.lists(st.floats(1, 50), min_size=1, max_size=6))
    first = 1 if background == "first" else 0
    label = st.integers(first, first + len(factors) - 1)
    labels = data.draw(st.lists(st.lists(label, max_size=5), max_size=8))
    expected = [max((factors[k - first] for k in row), default=1.0) for row in labels]
    assert image_repeat_factors(labels, factors, background=background).tolist() == expected


def test_labels_may_be_tensors_and_images_empty() -> None:
    labels = [torch.tensor([2, 2, 1]), np.array([3]), [], torch.tensor([])]
    before = [row.clone() if isinstance(row, torch.Tensor) else row for row in labels]
    factors = image_repeat_factors(labels, torch.tensor([3.0, 2.0, 1.5], dtype=torch.float32))
    assert factors.tolist() == [3.0, 1.5, 1.0, 1.0]
    assert torch.equal(before[0], labels[0])  # type: ignore[arg-type]
    assert image_repeat_factors([], [2.0]).tolist() == []


# --- the draw of an epoch ------------------------------------------------------------------------

factor_lists = st.lists(st.floats(1, 6), max_size=40)
seeds = st.integers(0, 2**64)


@given(factors=factor_lists, seed=seeds, epoch=st.integers(0, 1000))
def test_every_image_comes_floor_or_ceil_times(factors: list[float], seed: int, epoch: int) -> None:
    indices = repeat_indices(factors, seed=seed, epoch=epoch)
    assert indices.dtype == torch.int64
    repeats = torch.bincount(indices, minlength=len(factors)).tolist()
    assert len(repeats) == len(factors)
    for times, factor in zip(repeats, factors, strict=True):
        assert times in (math.floor(factor), math.ceil(factor))
    again = repeat_indices(torch.tensor(factors).double(), seed=seed, epoch=epoch)
    assert torch.equal(indices, again)


EPOCHS = 4000
FACTORS = [1.0, 1.001, 1.25, 1.5, 1.9, 2.0, 3.75, 7.53]


@pytest.fixture(scope="module")
def drawn() -> list[torch.Tensor]:
    return [repeat_indices(FACTORS, seed=11, epoch=epoch) for epoch in range(EPOCHS)]


def test_the_mean_of_repeats_is_the_factor(drawn: list[torch.Tensor]) -> None:
    # A mean of Bernoulli draws leaves 5 standard deviations once in 1.7 million; there are eight,
    # and the seed is fixed.
    mean = sum(torch.bincount(indices).double() for indices in drawn) / EPOCHS
    for found, factor in zip(mean.tolist(), FACTORS, strict=True):
        part = factor - math.floor(factor)
        assert abs(found - factor) <= 5 * math.sqrt(part * (1 - part) / EPOCHS)


def test_images_are_rounded_independently(drawn: list[torch.Tensor]) -> None:
    lengths = np.array([len(indices) for indices in drawn], np.float64)
    parts = [factor - math.floor(factor) for factor in FACTORS]
    variance = sum(part * (1 - part) for part in parts)
    # The relative error of a variance is about sqrt(2 / n); one number shared by all images
    # would make it more than four times as large.
    assert lengths.var() == pytest.approx(variance, rel=5 * math.sqrt(2 / EPOCHS))
    assert abs(np.corrcoef(lengths[:-1], lengths[1:])[0, 1]) < 5 / math.sqrt(EPOCHS)


def test_every_order_is_equally_likely() -> None:
    orders = Counter(
        tuple(repeat_indices([1.0, 1.0, 1.0], seed=3, epoch=epoch).tolist())
        for epoch in range(6000)
    )
    assert len(orders) == 6
    # 1000 each, standard deviation 29.
    assert all(abs(times - 1000) < 5 * 29 for times in orders.values())


def test_repeats_are_not_neighbours_by_construction() -> None:
    indices = repeat_indices([2.0] * 500, seed=0, epoch=0)
    # 1000 images in random order have one such pair on average.
    assert int((indices[1:] == indices[:-1]).sum()) < 8
    assert not torch.equal(indices, indices.sort().values)


def test_seed_and_epoch_decide_alone() -> None:
    factors = [1.5] * 60
    draws = {
        (seed, epoch): tuple(repeat_indices(factors, seed=seed, epoch=epoch).tolist())
        for seed in (0, 1, 2**32, 2**64 - 1)
        for epoch in (0, 1, 2)
    }
    assert len(set(draws.values())) == len(draws)
    torch.manual_seed(5)
    np.random.seed(5)
    assert draws[1, 2] == tuple(repeat_indices(factors, seed=1, epoch=2).tolist())


def test_an_epoch_stays_what_it_was() -> None:
    # Pinned: a run that is resumed with another version has to go on with the same images.
    indices = repeat_indices([1.0, 2.5, 1.5, 3.0], seed=7, epoch=3)
    assert indices.tolist() == [3, 0, 2, 3, 2, 1, 1, 1, 3]


def test_no_global_random_state_is_moved() -> None:
    before = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()
    sampler = RepeatFactorSampler([1.5] * 9, seed=0)
    sampler.set_epoch(4)
    list(sampler)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert random.getstate() == before[1]
    assert (np.random.get_state()[1] == before[2]).all()


def test_real_epochs_have_the_expected_length(labels_of_images: list[list[int]]) -> None:
    counts = Counter(label for labels in labels_of_images for label in labels)
    by_category = category_repeat_factors([counts[c] for c in range(1, 1231)], 56_740)
    sampler = RepeatFactorSampler(image_repeat_factors(labels_of_images, by_category), seed=0)
    lengths = []
    for epoch in range(12):
        sampler.set_epoch(epoch)
        lengths.append(len(sampler))
    parts = sampler._factors % 1
    deviation = math.sqrt((parts * (1 - parts)).sum())
    assert deviation == pytest.approx(40.70, abs=0.01)
    assert all(abs(length - 64_858.19) < 5 * deviation for length in lengths)
    assert len(set(lengths)) > 6


# --- the sampler ---------------------------------------------------------------------------------


@given(
    factors=st.lists(st.floats(1, 4), min_size=5, max_size=30),
    num_replicas=st.integers(1, 5),
    seed=seeds,
    epoch=st.integers(0, 50),
)
def test_parts_are_disjoint_and_make_up_the_list(
    factors: list[float], num_replicas: int, seed: int, epoch: int
) -> None:
    samplers = [
        RepeatFactorSampler(factors, seed=seed, num_replicas=num_replicas, rank=rank)
        for rank in range(num_replicas)
    ]
    for sampler in samplers:
        sampler.set_epoch(epoch)
    parts = [list(sampler) for sampler in samplers]
    whole = repeat_indices(factors, seed=seed, epoch=epoch).tolist()
    length = len(whole) // num_replicas
    assert [len(part) for part in parts] == [length] * num_replicas
    assert [len(sampler) for sampler in samplers] == [length] * num_replicas
    # Place by place: what step s of all processes reads is the next `num_replicas` of the list.
    together = [index for step in zip(*parts, strict=True) for index in step]
    assert together == whole[: length * num_replicas]
    assert len(whole) - len(together) < num_replicas


def test_the_length_is_that_of_the_current_epoch() -> None:
    sampler = RepeatFactorSampler([1.5] * 64, seed=1)
    lengths = set()
    for epoch in (0, 1, 2, 1, 0):
        sampler.set_epoch(epoch)
        assert sampler.epoch == epoch
        length = len(sampler)
        assert len(list(sampler)) == len(list(sampler)) == length
        assert length == len(repeat_indices([1.5] * 64, seed=1, epoch=epoch))
        lengths.add(length)
    assert len(lengths) > 1


def test_an_iterator_keeps_its_epoch() -> None:
    sampler = RepeatFactorSampler([1.5] * 20)
    expected = list(sampler)
    running = iter(sampler)
    first = next(running)
    sampler.set_epoch(1)
    assert [first, *running] == expected != list(sampler)


def test_the_factors_are_copied() -> None:
    factors = torch.full((9,), 1.5, dtype=torch.float64)
    sampler = RepeatFactorSampler(factors)
    expected = list(sampler)
    factors.fill_(3.0)
    sampler.set_epoch(0)
    assert list(sampler) == expected


@pytest.mark.parametrize(
    "dtype", [torch.float16, torch.bfloat16, torch.float32, torch.int32], ids=str
)
def test_factors_of_any_dtype(dtype: torch.dtype) -> None:
    factors = torch.tensor([1, 3, 2], dtype=dtype, requires_grad=dtype.is_floating_point)
    assert sorted(RepeatFactorSampler(factors)) == [0, 1, 1, 1, 2, 2]


def test_a_loader_takes_it_and_so_does_a_pickle() -> None:
    sampler = RepeatFactorSampler([1.0, 2.5, 1.5, 3.0] * 5, seed=3)
    loader: DataLoader[int] = DataLoader(range(20), 4, sampler=sampler)  # type: ignore[arg-type]
    for epoch in range(3):
        sampler.set_epoch(epoch)
        read = torch.cat(list(loader))
        assert read.tolist() == list(sampler) == list(pickle.loads(pickle.dumps(sampler)))
        assert len(loader) == math.ceil(len(sampler) / 4)


def test_the_code_of_the_page_runs() -> None:
    page = (Path(__file__).parents[2] / "docs" / "samplers.md").read_text(encoding="utf-8")
    (block,) = re.findall(r"^```python\n(.*?)^```", page, re.M | re.S)
    names: dict[str, Any] = {}
    exec(block, names)
    assert names["by_image"].tolist() == pytest.approx([1, math.sqrt(3), 1, 1])


# --- bad arguments -------------------------------------------------------------------------------

BAD: dict[str, tuple[Callable[[], object], type[Exception], str]] = {
    "count above N": (
        lambda: category_repeat_factors([3, 11], 10),
        ValueError,
        r"Expected `image_counts` in \[0, 10\], got 11 at position 1",
    ),
    "negative count": (
        lambda: category_repeat_factors([-1], 10),
        ValueError,
        r"`image_counts` in \[0, 10\], got -1 at position 0",
    ),
    "fractional count": (lambda: category_repeat_factors([1.5], 10), TypeError, "`image_counts`"),
    "counts of two dimensions": (
        lambda: category_repeat_factors([[1]], 10),
        ValueError,
        r"`image_counts` to be one-dimensional, got shape \[1, 1\]",
    ),
    "no images": (
        lambda: category_repeat_factors([0], 0),
        ValueError,
        "`num_images` of at least 1, got 0",
    ),
    "images as float": (lambda: category_repeat_factors([0], 9.0), TypeError, "`num_images`"),  # type: ignore[arg-type]
    "threshold above 1": (
        lambda: category_repeat_factors([0], 9, threshold=1.5),
        ValueError,
        r"`threshold` to be in \[0, 1\], got 1.5",
    ),
    "threshold NaN": (
        lambda: category_repeat_factors([0], 9, threshold=math.nan),
        ValueError,
        "`threshold`.*got nan",
    ),
    "label of the background": (
        lambda: image_repeat_factors([[1], [2, 0]], [1.0, 2.0]),
        ValueError,
        r"Expected `labels` in \[1, 2\], got 0 in image 1",
    ),
    "label beyond the last": (
        lambda: image_repeat_factors([[], [], [1, 2]], [1.0, 2.0], background="last"),
        ValueError,
        r"Expected `labels` in \[0, 1\], got 2 in image 2",
    ),
    "flat labels": (
        lambda: image_repeat_factors([1, 2], [1.0, 2.0]),
        TypeError,
        r"`labels\[0\]` to be a sequence of ints, got 1",
    ),
    "fractional label": (
        lambda: image_repeat_factors([[1], [1.5]], [1.0, 2.0]),
        TypeError,
        r"`labels\[1\]` to be integers",
    ),
    "labels by name": (
        lambda: image_repeat_factors({"a.jpg": [1]}, [1.0]),
        TypeError,
        "`labels` to be a sequence, got",
    ),
    "unknown convention": (
        lambda: image_repeat_factors([[1]], [1.0], background="middle"),
        ValueError,
        "`background` to be one of .* got 'middle'",
    ),
    "category factor below 1": (
        lambda: image_repeat_factors([[1]], [0.5]),
        ValueError,
        r"`category_factors` in \[1, 2147483648\), got 0.5 at position 0",
    ),
    "factor NaN": (
        lambda: repeat_indices([1.0, math.nan], seed=0, epoch=0),
        ValueError,
        r"`factors` in \[1, 2147483648\), got nan at position 1",
    ),
    "factor infinite": (
        lambda: repeat_indices([math.inf], seed=0, epoch=0),
        ValueError,
        "got inf at position 0",
    ),
    "factors as text": (lambda: repeat_indices("12", seed=0, epoch=0), TypeError, "got '12'"),
    "factors of text": (lambda: repeat_indices(["1"], seed=0, epoch=0), TypeError, "numbers"),
    "one factor": (lambda: repeat_indices(2.0, seed=0, epoch=0), TypeError, "got 2.0"),
    "no factors": (lambda: repeat_indices(None, seed=0, epoch=0), TypeError, "got None"),
    "factors of bools": (lambda: repeat_indices([True], seed=0, epoch=0), TypeError, "numbers"),
    "ragged factors": (
        lambda: repeat_indices([[1.0], [1.0, 2.0]], seed=0, epoch=0),
        TypeError,
        "`factors` to be a sequence of numbers",
    ),
    "complex factors": (
        lambda: repeat_indices(torch.ones(2, dtype=torch.complex64), seed=0, epoch=0),
        TypeError,
        "`factors` to be a sequence of numbers",
    ),
    "factors on the meta device": (
        lambda: repeat_indices(torch.ones(2, device="meta"), seed=0, epoch=0),
        ValueError,
        "meta device",
    ),
    "factors of two dimensions": (
        lambda: repeat_indices(torch.ones(2, 2), seed=0, epoch=0),
        ValueError,
        r"got shape \[2, 2\]",
    ),
    "negative seed": (lambda: repeat_indices([1.0], seed=-1, epoch=0), ValueError, "`seed`.*-1"),
    "negative epoch": (lambda: repeat_indices([1.0], seed=0, epoch=-2), ValueError, "`epoch`.*-2"),
    "epoch as float": (
        lambda: RepeatFactorSampler([1.0]).set_epoch(1.0),  # type: ignore[arg-type]
        TypeError,
        "`epoch` to be an integer, got float",
    ),
    "rank beyond the last": (
        lambda: RepeatFactorSampler([1.0] * 9, num_replicas=2, rank=2),
        ValueError,
        r"`rank` in \[0, 2\), got 2",
    ),
    "negative rank": (
        lambda: RepeatFactorSampler([1.0] * 9, num_replicas=2, rank=-1),
        ValueError,
        r"`rank` in \[0, 2\), got -1",
    ),
    "no replicas": (lambda: RepeatFactorSampler([1.0], num_replicas=0), ValueError, "at least 1"),
    "more processes than images": (
        lambda: RepeatFactorSampler([1.0, 2.0], num_replicas=3, rank=0),
        ValueError,
        "at least 3 images, one for each process, got 2",
    ),
}


@pytest.mark.parametrize(("call", "error", "message"), BAD.values(), ids=BAD)
def test_bad_arguments_are_named(
    call: Callable[[], object], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        call()


def test_a_failed_epoch_changes_nothing() -> None:
    sampler = RepeatFactorSampler([1.5] * 9)
    sampler.set_epoch(2)
    expected = list(sampler)
    with pytest.raises(ValueError, match="`epoch`"):
        sampler.set_epoch(-1)
    assert (sampler.epoch, list(sampler)) == (2, expected)


def test_the_unpickler_of_these_tests_imports_nothing(tmp_path: Path) -> None:
    (tmp_path / "bad.pt").write_bytes(pickle.dumps(Fraction(1, 2)))
    with (tmp_path / "bad.pt").open("rb") as file, pytest.raises(pickle.UnpicklingError):
        Builtins(file).load()
