"""Batches of an epoch: what they hold, over processes, after a resume; and seeded augmentation."""

import math
import pickle
import random
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

pytest.importorskip("torchvision")
EXAMPLES = Path(__file__).parents[2] / "examples"
sys.path.insert(0, str(EXAMPLES))

from detection_data import LVISDetection, collate, make_transforms  # noqa: E402
from PIL import Image  # noqa: E402
from training_samplers import EpochBatches, Item, SeededItems  # noqa: E402

from balanced_group_softmax.rebalance.repeat_factors import repeat_indices  # noqa: E402

WIDE, HIGH, SQUARE = (20, 12), (12, 20), (16, 16)


def batches_of(sampler: EpochBatches, epoch: int = 0, start: int = 0) -> list[list[Item]]:
    sampler.set_epoch(epoch, start)
    found = list(sampler)
    assert len(found) == len(sampler)
    return found


def processes(number: int, *args: Any, **options: Any) -> list[EpochBatches]:
    return [EpochBatches(*args, num_replicas=number, rank=r, **options) for r in range(number)]


# --- what an epoch holds -------------------------------------------------------------------------


def test_without_options_an_epoch_is_a_shuffle() -> None:
    sampler = EpochBatches(12, 3)
    epochs = [batches_of(sampler, epoch) for epoch in range(3)]
    for batches in epochs:
        assert [len(batch) for batch in batches] == [3, 3, 3, 3]
        assert sorted(index for batch in batches for index, _ in batch) == list(range(12))
    orders = {tuple(index for batch in batches for index, _ in batch) for batches in epochs}
    assert len(orders) == 3


def dealt(images: list[int], upright: list[bool], batch_size: int) -> Iterator[list[int]]:
    """Places of an epoch's list, dealt to two piles one by one: the independent re-expression."""
    piles: dict[bool, list[int]] = {False: [], True: []}
    for place, image in enumerate(images):
        pile = piles[upright[image]]
        pile.append(place)
        if len(pile) == batch_size:
            yield list(pile)
            pile.clear()


@given(data=st.data(), num_replicas=st.integers(1, 3), batch_size=st.integers(1, 4))
def test_batches_equal_images_dealt_one_by_one(
    data: st.DataObject, num_replicas: int, batch_size: int
) -> None:
    enough = num_replicas * batch_size + 2 * (batch_size - 1)
    number = data.draw(st.integers(enough, enough + 20))
    factors = data.draw(st.lists(st.floats(1, 3), min_size=number, max_size=number))
    sizes = data.draw(
        st.lists(st.sampled_from([WIDE, HIGH, SQUARE]), min_size=number, max_size=number)
    )
    seed, epoch = data.draw(st.integers(0, 2**64)), data.draw(st.integers(0, 99))

    samplers = processes(num_replicas, number, batch_size, factors=factors, sizes=sizes, seed=seed)
    found = [batches_of(sampler, epoch) for sampler in samplers]

    images = repeat_indices(factors, seed=seed, epoch=epoch).tolist()
    upright = [height > width for width, height in sizes]
    high = sum(int(factor) for factor, up in zip(factors, upright, strict=True) if up)
    wide = sum(map(int, factors)) - high
    if 0 < high < batch_size or 0 < wide < batch_size:  # too few for a batch of their own
        upright = [False] * number
    expected = list(dealt(images, upright, batch_size))
    steps = len(expected) // num_replicas
    assert [len(batches) for batches in found] == [steps] * num_replicas
    together = [batch for step in zip(*found, strict=True) for batch in step]
    assert [[index for index, _ in batch] for batch in together] == [
        [images[place] for place in batch] for batch in expected[: steps * num_replicas]
    ]
    # Nothing is lost but what the documentation says.
    lost = len(images) - batch_size * steps * num_replicas
    assert lost <= 2 * (batch_size - 1) + (num_replicas - 1) * batch_size
    for batch in together:
        assert len({upright[index] for index, _ in batch}) == 1


def test_squares_go_with_wide_images_and_without_sizes_all_mix() -> None:
    sizes = [SQUARE, WIDE, HIGH, HIGH]
    for epoch in range(9):
        kinds = [{i for i, _ in batch} for batch in batches_of(EpochBatches(4, 2, sizes=sizes),
                                                               epoch)]  # fmt: skip
        assert sorted(map(sorted, kinds)) == [[0, 1], [2, 3]]
    mixed = {
        tuple(sorted(i for i, _ in batch))
        for epoch in range(30)
        for batch in batches_of(EpochBatches(4, 2), epoch)
    }
    assert len(mixed) == 6


@pytest.mark.parametrize(
    ("wide", "high", "num_replicas"),
    [(9, 3, 1), (1, 8, 1), (3, 3, 1), (7, 7, 3), (8, 1, 2)],
    ids=["few high", "few wide", "few of both", "enough together", "one high"],
)
def test_images_of_a_rare_shape_are_mixed_with_the_others(
    wide: int, high: int, num_replicas: int
) -> None:
    sizes, number = [WIDE] * wide + [HIGH] * high, wide + high
    options: dict[str, Any] = {"sizes": sizes, "seed": 5}
    of_shapes = processes(num_replicas, number, 4, **options)
    mixed = processes(num_replicas, number, 4, seed=5)
    read: Counter[int] = Counter()
    for epoch in range(200):
        found = items(of_shapes, epoch)
        assert found == items(mixed, epoch)
        read.update(index for index, _ in found)
    assert len(read) == number
    assert min(read.values()) > 0.3 * max(read.values())


def test_shapes_are_mixed_only_if_a_batch_cannot_be_sure() -> None:
    sizes = [WIDE] * 8 + [HIGH] * 3
    for factors, together in (([1.9] * 11, True), ([1.0] * 10 + [2.0], False)):
        sampler = EpochBatches(11, 4, factors=factors, sizes=sizes)
        shapes = [{sizes[i] for i, _ in b} for e in range(20) for b in batches_of(sampler, e)]
        assert any(len(of_batch) == 2 for of_batch in shapes) == together


def test_repeat_factors_show_in_the_counts() -> None:
    times: Counter[int] = Counter()
    sampler = EpochBatches(4, 1, factors=[1.0, 1.25, 2.5, 4.0], seed=2)
    for epoch in range(2000):
        times.update(index for ((index, _),) in batches_of(sampler, epoch))
    for index, factor in enumerate([1.0, 1.25, 2.5, 4.0]):
        part = factor % 1
        bound = 5 * math.sqrt(part * (1 - part) / 2000)
        assert abs(times[index] / 2000 - factor) <= bound


def test_no_image_is_dropped_more_often_than_others() -> None:
    dropped: Counter[int] = Counter()
    sampler = EpochBatches(11, 4)
    for epoch in range(2000):
        read = {index for batch in batches_of(sampler, epoch) for index, _ in batch}
        dropped.update(set(range(11)) - read)
    expected = 2000 * 3 / 11
    assert all(abs(dropped[i] - expected) < 5 * math.sqrt(expected) for i in range(11))


# --- seeds of items ------------------------------------------------------------------------------


def items(samplers: list[EpochBatches], epoch: int = 0) -> list[Item]:
    return [item for sampler in samplers for batch in batches_of(sampler, epoch) for item in batch]


def test_an_item_has_its_seed_whatever_the_batches_and_processes() -> None:
    options = {"factors": [1.5] * 48, "sizes": [WIDE, HIGH] * 24, "seed": 9}
    # Batches of one image in one process drop nothing.
    everything = Counter(items(processes(1, 48, 1, **options)))
    assert sum(everything.values()) == len(repeat_indices([1.5] * 48, seed=9, epoch=0))
    for number, batch_size in [(1, 2), (1, 5), (2, 3), (4, 4)]:
        part = Counter(items(processes(number, 48, batch_size, **options)))
        assert part <= everything
    in_order = [seed for _, seed in items(processes(1, 48, 1, seed=9))]
    alone = [seed for _, seed in items(processes(1, 30, 1, seed=9))]
    assert in_order[:30] == alone  # the place decides


def test_seeds_differ_by_item_epoch_and_seed() -> None:
    seeds = [
        seed
        for run in range(4)
        for epoch in range(4)
        for _, seed in items(processes(1, 200, 4, seed=run), epoch)
    ]
    assert len(set(seeds)) == len(seeds) == 3200
    assert all(type(seed) is int and 0 <= seed < 2**63 for seed in seeds)
    # torch's CPU generator looks at the lower 32 bits only.
    assert len({seed % 2**32 for seed in seeds}) >= 3198


def test_an_epoch_stays_what_it_was() -> None:
    # Pinned: a run that is resumed with another version has to go on with the same batches.
    sampler = EpochBatches(5, 2, factors=[1, 1, 2.5, 1, 1], sizes=[WIDE, HIGH] * 2 + [WIDE], seed=3)
    assert batches_of(sampler, 1) == [
        [(3, 5424974885487252406), (1, 3486718627853020691)],
        [(2, 4601332607222966275), (4, 6051919924546648891)],
        [(0, 6042890609351018277), (2, 6442382808120757796)],
    ]


# --- resuming ------------------------------------------------------------------------------------


@given(
    start=st.integers(0, 4),
    epoch=st.integers(0, 20),
    num_replicas=st.integers(1, 3),
    aspect=st.booleans(),
)
def test_a_resumed_epoch_is_the_rest(
    start: int, epoch: int, num_replicas: int, aspect: bool
) -> None:
    sizes = [WIDE, HIGH, WIDE] * 12 if aspect else None
    options: dict[str, Any] = {"factors": [1.25] * 36, "sizes": sizes, "seed": 4}
    for rank in range(num_replicas):
        whole, fresh = (
            EpochBatches(36, 2, num_replicas=num_replicas, rank=rank, **options) for _ in "ab"
        )
        expected = batches_of(whole, epoch)
        assert batches_of(fresh, epoch, start) == expected[start:]
        assert (fresh.start_batch, fresh.num_batches) == (start, len(expected))
        # The next epoch is whole again.
        assert batches_of(fresh, epoch + 1) == batches_of(whole, epoch + 1)


def test_an_epoch_may_be_resumed_at_its_end() -> None:
    assert batches_of(EpochBatches(8, 2), 0, 4) == []


def test_an_iterator_keeps_its_epoch() -> None:
    sampler = EpochBatches(12, 2)
    expected = batches_of(sampler, 3)
    running = iter(sampler)
    first = next(running)
    sampler.set_epoch(4, 2)
    assert [first, *running] == expected


def test_a_pickle_goes_on_where_it_was() -> None:
    sampler = EpochBatches(12, 2, factors=[1.5] * 12)
    sampler.set_epoch(2, 3)
    assert list(pickle.loads(pickle.dumps(sampler))) == list(sampler)


def test_arguments_stay_as_they_are() -> None:
    factors = torch.full((12,), 1.5, dtype=torch.float64)
    sizes = np.array([WIDE, HIGH] * 6)
    sampler = EpochBatches(12, 2, factors=factors, sizes=sizes)
    expected = batches_of(sampler)
    factors.fill_(3.0)
    sizes[:] = 1
    assert batches_of(sampler) == expected


# --- seeded items --------------------------------------------------------------------------------


class Noise(Dataset[tuple[int, Tensor]]):
    """Index and random numbers; keeps which items were read in this process."""

    def __init__(self, number: int) -> None:
        self.number = number
        self.read: list[int] = []

    def __len__(self) -> int:
        return self.number

    def __getitem__(self, index: int) -> tuple[int, Tensor]:
        self.read.append(index)
        noise = torch.rand(3)
        if index >= self.number:
            raise IndexError(index)
        return index, noise


def as_is(batch: list[Any]) -> list[Any]:
    return batch


def loaded(data: Dataset[Any], sampler: EpochBatches, workers: int = 0) -> list[list[Any]]:
    loader = DataLoader(
        SeededItems(data), batch_sampler=sampler, collate_fn=as_is, num_workers=workers
    )
    return list(loader)


def test_augmentation_depends_neither_on_workers_nor_on_ranks() -> None:
    def noises(batches: list[list[Any]]) -> set[tuple[float, ...]]:
        return {(index, *noise.tolist()) for batch in batches for index, noise in batch}

    alone = loaded(Noise(24), EpochBatches(24, 2, seed=1))
    torch.manual_seed(77)
    workers = loaded(Noise(24), EpochBatches(24, 2, seed=1), workers=2)
    assert [[i for i, _ in batch] for batch in alone] == [[i for i, _ in b] for b in workers]
    ranks = [loaded(Noise(24), sampler) for sampler in processes(3, 24, 2, seed=1)]
    assert len(noises(alone)) == 24
    assert noises(alone) == noises(workers) == set().union(*map(noises, ranks))
    other = EpochBatches(24, 2, seed=1)
    other.set_epoch(1)
    assert not noises(alone) & noises(loaded(Noise(24), other))


def test_an_item_is_that_of_the_data_set_after_seeding() -> None:
    data = Noise(5)
    index, noise = SeededItems(data)[3, 2**63 - 1]
    assert index == 3
    assert torch.equal(noise, torch.rand(3, generator=torch.Generator().manual_seed(2**63 - 1)))
    assert len(SeededItems(data)) == 5


def test_no_global_random_state_is_moved(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(seed: int) -> None:
        raise AssertionError("the GPUs were seeded")

    monkeypatch.setattr(torch.cuda, "manual_seed_all", refuse)
    monkeypatch.setattr(torch.cuda, "manual_seed", refuse)
    before = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()
    sampler = EpochBatches(6, 2, factors=[1.5] * 6)
    for epoch in range(3):
        batches_of(sampler, epoch)
    data = SeededItems(Noise(6))
    data[0, 5]
    with pytest.raises(IndexError):
        data[6, 5]  # after it has drawn
    assert torch.equal(torch.get_rng_state(), before[0])
    assert random.getstate() == before[1]
    assert (np.random.get_state()[1] == before[2]).all()


def test_skipped_batches_are_not_read() -> None:
    sampler, data = EpochBatches(12, 2), Noise(12)
    expected = batches_of(sampler, 1)
    sampler.set_epoch(1, 4)
    loaded(data, sampler)
    assert data.read == [index for batch in expected[4:] for index, _ in batch]


def test_a_detection_data_set_end_to_end(tmp_path: Path) -> None:
    sizes = [WIDE, HIGH, SQUARE, WIDE, HIGH, WIDE, HIGH, WIDE]
    for i, size in enumerate(sizes):
        pixels = np.random.default_rng(i).integers(0, 256, (size[1], size[0], 3), np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"{i}.png")
    content = {
        "images": [
            {"id": i, "file_name": f"{i}.png", "width": w, "height": h}
            for i, (w, h) in enumerate(sizes)
        ],
        "categories": [{"id": 1, "name": "a"}],
        "annotations": [],
    }
    data = LVISDetection(content, tmp_path, transforms=make_transforms(flip=0.5))
    epochs = []
    for workers in (0, 2):
        sampler = EpochBatches(len(data), 2, sizes=data.sizes, seed=5)
        loader = DataLoader(
            SeededItems(data), batch_sampler=sampler, collate_fn=collate, num_workers=workers
        )
        assert len(loader) == len(sampler) == 3  # of 5 and 3 images
        epochs.append(list(loader))
    plain = LVISDetection(content, tmp_path)
    flipped = []
    for (images, targets), (again, _) in zip(*epochs, strict=True):
        assert len({image.shape[1] > image.shape[2] for image in images}) == 1
        assert all(map(torch.equal, images, again))
        for image, target in zip(images, targets, strict=True):
            original, _ = plain[target["image_id"]]
            flipped.append(not torch.equal(image, original))
            assert torch.equal(image.flip(-1) if flipped[-1] else image, original)
    assert set(flipped) == {True, False}


# --- bad arguments -------------------------------------------------------------------------------

BAD: dict[str, tuple[Callable[[], object], type[Exception], str]] = {
    "no images": (lambda: EpochBatches(0, 2), ValueError, "`num_images` of at least 1, got 0"),
    "batch of none": (lambda: EpochBatches(9, 0), ValueError, "`batch_size` of at least 1, got 0"),
    "batch size as float": (lambda: EpochBatches(9, 2.0), TypeError, "`batch_size`.*got float"),  # type: ignore[arg-type]
    "batch size as bool": (lambda: EpochBatches(9, True), TypeError, "`batch_size`.*got bool"),
    "negative seed": (lambda: EpochBatches(9, 2, seed=-1), ValueError, "`seed`.*got -1"),
    "rank": (
        lambda: EpochBatches(9, 2, num_replicas=2, rank=2),
        ValueError,
        r"`rank` in \[0, 2\), got 2",
    ),
    "negative rank": (
        lambda: EpochBatches(9, 2, num_replicas=2, rank=-1),
        ValueError,
        "`rank` of at least 0, got -1",
    ),
    "factors of another length": (
        lambda: EpochBatches(3, 1, factors=[1.0, 2.0]),
        ValueError,
        r"`factors` of shape \[3\], got \[2\]",
    ),
    "factor below 1": (
        lambda: EpochBatches(2, 1, factors=[1.0, 0.5]),
        ValueError,
        r"`factors` in .* got 0.5 at position 1",
    ),
    "factor NaN": (
        lambda: EpochBatches(2, 1, factors=[math.nan, 1.0]),
        ValueError,
        r"`factors` in .* got nan at position 0",
    ),
    "sizes of another length": (
        lambda: EpochBatches(3, 1, sizes=[WIDE, HIGH]),
        ValueError,
        r"`sizes` of shape \[3, 2\], got \[2, 2\]",
    ),
    "too few for a batch": (
        lambda: EpochBatches(3, 4),
        ValueError,
        "at least 1 full batches of 4, one for each process, got 3 images",
    ),
    "too few of both kinds together": (
        lambda: EpochBatches(6, 4, sizes=[WIDE, HIGH] * 3, num_replicas=2, rank=1),
        ValueError,
        "at least 2 full batches of 4, one for each process, got 6 images",
    ),
    "too few for all processes": (
        lambda: EpochBatches(15, 4, num_replicas=4, rank=0),
        ValueError,
        "at least 4 full batches of 4",
    ),
    # In some epochs there would be five images, in others four.
    "too few in some epochs": (
        lambda: EpochBatches(4, 5, factors=[1.0, 1.0, 1.0, 1.999]),
        ValueError,
        "at least 1 full batches of 5, .* got 4 images",
    ),
    "start beyond the end": (
        lambda: EpochBatches(8, 2).set_epoch(3, 5),
        ValueError,
        r"`start_batch` in \[0, 4\] in epoch 3, got 5",
    ),
    "negative start": (
        lambda: EpochBatches(8, 2).set_epoch(3, -1),
        ValueError,
        "`start_batch` of at least 0, got -1",
    ),
    "negative epoch": (lambda: EpochBatches(8, 2).set_epoch(-1), ValueError, "`epoch`.*got -1"),
    "an index for an item": (
        lambda: SeededItems(Noise(3))[1],  # type: ignore[index]
        TypeError,
        r"Expected `item` to be a pair \(index, seed\), got 1",
    ),
}


@pytest.mark.parametrize(("call", "error", "message"), BAD.values(), ids=BAD)
def test_bad_arguments_are_named(
    call: Callable[[], object], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        call()


def test_a_failed_epoch_changes_nothing() -> None:
    sampler = EpochBatches(8, 2)
    expected = batches_of(sampler, 2, 1)
    with pytest.raises(ValueError, match="`start_batch`"):
        sampler.set_epoch(3, 9)
    assert (sampler.epoch, list(sampler)) == (2, expected)
