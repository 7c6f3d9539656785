"""Which categories share a group, which columns they own, and what a layout refuses."""

import copy
import dataclasses
import json
import os
import pickle
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from bags_oracle import Recipe, oracle_layout, recipes
from hypothesis import given
from hypothesis import strategies as st

from balanced_group_softmax import GroupLayout

BAD = (ValueError, TypeError)


def make(recipe: Recipe) -> GroupLayout:
    return GroupLayout.from_counts(
        recipe.counts, thresholds=recipe.thresholds, background=recipe.background
    )


def real_counts(lvis_data: Path, version: str) -> list[int]:
    rows = json.loads((lvis_data / f"lvis_{version}_train_categories.json").read_text())
    return [row["instance_count"] for row in sorted(rows, key=lambda row: row["id"])]


# What a layout is ---------------------------------------------------------------------------


@given(recipes())
def test_layout_is_that_of_the_method(recipe: Recipe) -> None:
    layout, expected = make(recipe), recipe.oracle
    assert layout.num_categories == len(recipe.counts)
    assert layout.num_groups == expected.num_groups
    assert layout.num_labels == expected.num_labels
    assert layout.num_logits == expected.num_logits
    assert tuple(layout.group_sizes) == expected.sizes
    assert tuple(layout.group_starts) == expected.starts
    assert tuple(layout.group_names) == expected.names


@given(recipes())
def test_width_is_categories_and_groups_and_one_for_background(recipe: Recipe) -> None:
    layout = make(recipe)
    with_background = recipe.background is not None
    assert layout.num_logits == layout.num_categories + layout.num_groups + with_background


@given(recipes())
def test_bin_labels_are_those_of_the_method(recipe: Recipe) -> None:
    layout, expected = make(recipe), recipe.oracle
    table = layout.bin_labels
    assert table.dtype == torch.int64
    assert table.device.type == "cpu"
    assert table.shape == (layout.num_groups, layout.num_labels)
    assert table.tolist() == [
        [expected.bin_label(group, label) for label in range(expected.num_labels)]
        for group in range(expected.num_groups)
    ]


@given(recipes())
def test_every_category_owns_one_column(recipe: Recipe) -> None:
    layout = make(recipe)
    table, start = layout.bin_labels, int(recipe.background is not None)
    columns = list(range(layout.num_labels))[layout.foreground]
    own = (table[start:, columns] > 0).sum(0)
    assert own.tolist() == [1] * layout.num_categories


@pytest.mark.parametrize(
    ("background", "foreground"), [("first", (1, 4)), ("last", (0, 3)), (None, (0, 3))]
)
def test_foreground_is_the_slice_of_categories(
    background: str | None, foreground: tuple[int, int]
) -> None:
    layout = GroupLayout.from_counts([1, 20, 3], background=background)
    columns = list(range(layout.num_labels))[layout.foreground]
    assert columns == list(range(*foreground))


@given(recipes())
def test_columns_do_not_depend_on_the_label_convention(recipe: Recipe) -> None:
    first = make(dataclasses.replace(recipe, background="first"))
    last = make(dataclasses.replace(recipe, background="last"))
    assert first.group_sizes == last.group_sizes
    assert first.group_names == last.group_names
    assert torch.equal(first.bin_labels[:, 1:], last.bin_labels[:, :-1])
    assert torch.equal(first.bin_labels[:, 0], last.bin_labels[:, -1])


def test_bin_labels_are_a_fresh_tensor_each_time() -> None:
    layout = GroupLayout.from_counts([1, 20, 3])
    layout.bin_labels.fill_(7)
    assert layout.bin_labels.max() < 7


def test_thresholds_belong_to_the_higher_group() -> None:
    layout = GroupLayout.from_counts([9, 10, 99, 100, 999, 1000])
    assert layout.group_sizes == (2, 2, 3, 3, 2)
    assert layout.bin_labels[1:, 1:].argmax(0).tolist() == [0, 1, 1, 2, 2, 3]


def test_never_seen_category_is_in_the_lowest_group() -> None:
    layout = GroupLayout.from_counts([0, 5000])
    assert layout.group_names == ("bg_fg", "0_10", "1000_inf")
    assert layout.bin_labels[1].tolist() == [0, 1, 0]


def test_groups_without_categories_shift_no_name() -> None:
    layout = GroupLayout.from_counts([5, 500])
    assert layout.group_names == ("bg_fg", "0_10", "100_1000")
    assert layout.group_sizes == (2, 2, 2)


def test_without_background_there_is_no_group_zero() -> None:
    layout = GroupLayout.from_counts([5, 50, 60], background=None)
    assert (layout.num_groups, layout.num_labels, layout.num_logits) == (2, 3, 5)
    assert layout.group_names == ("0_10", "10_100")


def test_real_lvis_v05(lvis_data: Path) -> None:
    counts = real_counts(lvis_data, "v0.5")
    assert (len(counts), sum(counts)) == (1230, 693_958)
    layout = GroupLayout.from_counts(counts)
    assert layout.group_sizes == (2, 295, 454, 303, 182)
    assert layout.group_names == ("bg_fg", "0_10", "10_100", "100_1000", "1000_inf")
    assert (layout.num_logits, layout.num_labels) == (1236, 1231)


def test_real_lvis_v1(lvis_data: Path) -> None:
    counts = real_counts(lvis_data, "v1")
    assert (len(counts), sum(counts)) == (1203, 1_270_141)
    layout = GroupLayout.from_counts(counts)
    assert layout.group_sizes == (2, 201, 413, 335, 258)
    assert (layout.num_logits, layout.num_labels) == (1209, 1204)


@pytest.mark.parametrize("version", ["v0.5", "v1"])
def test_real_lvis_bin_labels(lvis_data: Path, version: str) -> None:
    counts = real_counts(lvis_data, version)
    expected = oracle_layout(counts)
    table = GroupLayout.from_counts(counts).bin_labels
    for group in range(5):
        row = [expected.bin_label(group, label) for label in range(expected.num_labels)]
        assert table[group].tolist() == row


# Ways to give counts ------------------------------------------------------------------------

COUNTS = [3, 0, 12, 2500, 700, 10]


@pytest.mark.parametrize(
    "counts",
    [
        pytest.param(COUNTS, id="list"),
        pytest.param(tuple(COUNTS), id="tuple"),
        pytest.param(np.array(COUNTS), id="numpy-int64"),
        pytest.param(np.array(COUNTS, dtype=np.int32), id="numpy-int32"),
        pytest.param(np.array(COUNTS, dtype=np.uint16), id="numpy-uint16"),
        pytest.param([np.int64(count) for count in COUNTS], id="list-of-numpy"),
        pytest.param(torch.tensor(COUNTS), id="torch-int64"),
        pytest.param(torch.tensor(COUNTS, dtype=torch.int32), id="torch-int32"),
    ],
)
def test_counts_may_be_any_sequence_of_integers(counts: Any) -> None:
    assert GroupLayout.from_counts(counts) == GroupLayout.from_counts(COUNTS)


def test_thresholds_may_be_a_list_or_array() -> None:
    layout = GroupLayout.from_counts(COUNTS, thresholds=(5, 50))
    assert layout == GroupLayout.from_counts(COUNTS, thresholds=[5, 50])
    assert layout == GroupLayout.from_counts(COUNTS, thresholds=np.array([5, 50]))


@given(recipes(), st.data())
def test_unsorted_category_ids_are_sorted_with_their_counts(
    recipe: Recipe, data: st.DataObject
) -> None:
    size = len(recipe.counts)
    ids = data.draw(st.lists(st.integers(0, 5000), min_size=size, max_size=size, unique=True))
    order = sorted(range(size), key=ids.__getitem__)
    layout = GroupLayout.from_counts(
        recipe.counts,
        thresholds=recipe.thresholds,
        background=recipe.background,
        category_ids=ids,
    )
    by_id = GroupLayout.from_counts(
        [recipe.counts[place] for place in order],
        thresholds=recipe.thresholds,
        background=recipe.background,
        category_ids=sorted(ids),
    )
    assert layout == by_id
    assert torch.equal(
        layout.bin_labels,
        make(dataclasses.replace(recipe, counts=tuple(recipe.counts[p] for p in order))).bin_labels,
    )


def test_category_ids_survive_json() -> None:
    layout = GroupLayout.from_counts([5, 50], category_ids=[90, 7])
    other = GroupLayout.from_counts([5, 50], category_ids=[90, 8])
    assert GroupLayout.from_json(layout.to_json()) == layout
    assert layout != other


# Value semantics ----------------------------------------------------------------------------


@given(recipes())
def test_equal_recipes_make_equal_layouts(recipe: Recipe) -> None:
    assert make(recipe) == make(recipe)
    assert hash(make(recipe)) == hash(make(recipe))
    assert len({make(recipe), make(recipe)}) == 1


def test_layouts_that_differ_are_not_equal() -> None:
    base = GroupLayout.from_counts([5, 50, 500])
    assert base != GroupLayout.from_counts([5, 50, 50])
    assert base != GroupLayout.from_counts([5, 50, 500], background="last")
    assert base != GroupLayout.from_counts([5, 50, 500], background=None)
    assert base != "layout"


@given(recipes())
def test_copies_equal_the_original(recipe: Recipe) -> None:
    layout = make(recipe)
    layout.tables(torch.device("cpu"))  # a cache must neither be copied wrongly nor get in the way
    for twin in (
        copy.copy(layout),
        copy.deepcopy(layout),
        pickle.loads(pickle.dumps(layout)),
    ):
        assert twin == layout
        assert hash(twin) == hash(layout)
        assert torch.equal(twin.bin_labels, layout.bin_labels)


def test_layout_is_frozen() -> None:
    layout = GroupLayout.from_counts([5, 50])
    name = dataclasses.fields(layout)[0].name
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(layout, name, None)


def test_layout_holds_no_tensor() -> None:
    layout = GroupLayout.from_counts(torch.tensor([5, 50]), category_ids=torch.tensor([3, 9]))
    layout.tables(torch.device("cpu"))

    def leaves(value: Any) -> list[Any]:
        if isinstance(value, tuple | list):
            return [leaf for item in value for leaf in leaves(item)]
        return [value]

    for field in dataclasses.fields(layout):
        for leaf in leaves(getattr(layout, field.name)):
            assert leaf is None or type(leaf) in (int, float, str), field.name


def test_repr_is_short_for_a_thousand_categories() -> None:
    layout = GroupLayout.from_counts([5] * 1000)
    assert "GroupLayout" in repr(layout)
    assert len(str(layout)) < 1000


def test_tables_are_cached_per_device() -> None:
    layout = GroupLayout.from_counts([5, 50])
    assert layout.tables(torch.device("cpu")) is layout.tables(torch.device("cpu"))


# JSON and files -----------------------------------------------------------------------------


@given(recipes())
def test_json_round_trip(recipe: Recipe) -> None:
    layout = make(recipe)
    text = layout.to_json()
    again = GroupLayout.from_json(text)
    assert again == layout
    assert hash(again) == hash(layout)
    assert again.to_json() == text
    assert "format_version" in json.loads(text)


def test_json_is_plain_and_standard() -> None:
    text = GroupLayout.from_counts([5, 50000]).to_json()
    json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is not standard JSON"))


def test_json_of_real_lvis_round_trips(lvis_data: Path) -> None:
    layout = GroupLayout.from_counts(real_counts(lvis_data, "v0.5"))
    assert GroupLayout.from_json(layout.to_json()) == layout


@pytest.mark.parametrize("kind", [str, Path])
def test_save_and_load(tmp_path: Path, kind: type) -> None:
    layout = GroupLayout.from_counts(COUNTS)
    target = tmp_path / "layout.json"
    layout.save(kind(target))
    assert GroupLayout.load(kind(target)) == layout
    assert [path.name for path in tmp_path.iterdir()] == ["layout.json"]


def test_failed_save_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    old, new = GroupLayout.from_counts([1, 2]), GroupLayout.from_counts([1, 2, 3])
    target = tmp_path / "layout.json"
    old.save(target)

    def refuse(*_: Any, **__: Any) -> None:
        raise OSError("no space left on device")

    for name in ("replace", "rename"):
        monkeypatch.setattr(os, name, refuse)
    with pytest.raises(OSError, match="no space left"):
        new.save(target)
    monkeypatch.undo()
    assert GroupLayout.load(target) == old
    assert [path.name for path in tmp_path.iterdir()] == ["layout.json"], "a remnant is left"


def test_reader_never_sees_half_a_file(tmp_path: Path) -> None:
    one, two = GroupLayout.from_counts([1] * 3000), GroupLayout.from_counts([1, 50] * 3000)
    target = tmp_path / "layout.json"
    one.save(target)
    done = threading.Event()

    def write() -> None:
        for turn in range(30):
            (two if turn % 2 else one).save(target)
        done.set()

    writer = threading.Thread(target=write)
    writer.start()
    try:
        while not done.is_set():
            assert GroupLayout.load(target) in (one, two)
    finally:
        writer.join()


def test_load_names_the_file_that_is_missing_or_broken(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        GroupLayout.load(tmp_path / "absent.json")
    text = GroupLayout.from_counts(COUNTS).to_json()
    broken = tmp_path / "broken.json"
    broken.write_text(text[: len(text) // 2])
    with pytest.raises(ValueError, match=r"broken\.json"):
        GroupLayout.load(broken)
    broken.write_bytes(b"\xff\xfe\x00layout")
    with pytest.raises(ValueError, match=r"broken\.json: Expected a layout in JSON, got a file"):
        GroupLayout.load(broken)


# What is refused ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "counts",
    [
        pytest.param([3, -1], id="negative"),
        pytest.param([3, float("nan")], id="nan"),
        pytest.param([3, float("inf")], id="infinite"),
        pytest.param([], id="empty"),
        pytest.param(np.zeros(0, dtype=np.int64), id="empty-array"),
        pytest.param([[3, 4]], id="2-d-list"),
        pytest.param(np.ones((2, 2), dtype=np.int64), id="2-d-array"),
        pytest.param(torch.ones(2, 2, dtype=torch.int64), id="2-d-tensor"),
        pytest.param(torch.tensor(3), id="0-d-tensor"),
        pytest.param([3.0, 4.0], id="floats"),
        pytest.param(np.array([3.0, 4.0]), id="float-array"),
        pytest.param(torch.tensor([3.0, 4.0]), id="float-tensor"),
        pytest.param([True, False], id="bools"),
        pytest.param(np.array([True, False]), id="bool-array"),
        pytest.param(torch.tensor([True, False]), id="bool-tensor"),
        pytest.param(["3", "4"], id="strings"),
        pytest.param("34", id="string"),
        pytest.param([3, None], id="none-inside"),
        pytest.param(None, id="none"),
        pytest.param(7, id="int"),
        pytest.param(torch.ones(2, dtype=torch.int64, device="meta"), id="meta-tensor"),
    ],
)
def test_bad_counts(counts: Any) -> None:
    with pytest.raises(BAD, match="counts"):
        GroupLayout.from_counts(counts)


def test_bad_count_is_named_with_its_place() -> None:
    with pytest.raises(ValueError, match=r"-4.*2"):
        GroupLayout.from_counts([3, 8, -4, 1])


@pytest.mark.parametrize(
    "thresholds",
    [
        pytest.param((100, 10), id="unsorted"),
        pytest.param((10, 10), id="duplicate"),
        pytest.param((0, 10), id="zero"),
        pytest.param((-5, 10), id="negative"),
        pytest.param((10.5,), id="float"),
        pytest.param((float("nan"),), id="nan"),
        pytest.param((True, 10), id="bool"),
        pytest.param(("10",), id="string"),
        pytest.param(((10,), (100,)), id="2-d"),
        pytest.param(None, id="none"),
    ],
)
def test_bad_thresholds(thresholds: Any) -> None:
    with pytest.raises(BAD, match="thresholds"):
        GroupLayout.from_counts([5, 50], thresholds=thresholds)


@pytest.mark.parametrize("background", ["middle", "", "FIRST", 0, True, False])
def test_bad_background(background: Any) -> None:
    with pytest.raises(BAD, match="background"):
        GroupLayout.from_counts([5, 50], background=background)


@pytest.mark.parametrize(
    "category_ids",
    [
        pytest.param([1, 1], id="duplicate"),
        pytest.param([1], id="too-few"),
        pytest.param([1, 2, 3], id="too-many"),
        pytest.param([1.0, 2.0], id="floats"),
        pytest.param([True, False], id="bools"),
        pytest.param(["a", "b"], id="strings"),
        pytest.param([[1, 2]], id="2-d"),
    ],
)
def test_bad_category_ids(category_ids: Any) -> None:
    with pytest.raises(BAD, match="category_ids"):
        GroupLayout.from_counts([5, 50], category_ids=category_ids)


@pytest.mark.parametrize(
    "text",
    [
        pytest.param("", id="empty"),
        pytest.param("not json", id="not-json"),
        pytest.param("[]", id="list"),
        pytest.param("null", id="null"),
        pytest.param("3", id="number"),
        pytest.param("{}", id="no-fields"),
        pytest.param('{"format_version": 1}', id="version-only"),
        pytest.param("[" * 100_000 + "]" * 100_000, id="deep-list"),
        pytest.param('{"a":' * 100_000 + "1" + "}" * 100_000, id="deep-object"),
        pytest.param('{"format_version": ' + "9" * 10_000 + "}", id="huge-number"),
        pytest.param(json.dumps({"format_version": 1, "x": "y" * 200_000_000}), id="huge-text"),
    ],
)
def test_absurd_json(text: str) -> None:
    with pytest.raises(ValueError):  # noqa: PT011  the message depends on what is wrong
        GroupLayout.from_json(text)


@pytest.mark.parametrize("text", [None, 3, {"format_version": 1}, b"{}"])
def test_json_of_another_type(text: Any) -> None:
    with pytest.raises(BAD):
        GroupLayout.from_json(text)


@pytest.mark.parametrize("version", [0, 2, 10**6, -1, "1", 1.5, None, True, [1]])
def test_json_of_another_version(version: Any) -> None:
    record = json.loads(GroupLayout.from_counts(COUNTS).to_json())
    with pytest.raises(ValueError, match="format_version"):
        GroupLayout.from_json(json.dumps({**record, "format_version": version}))


def paths(value: Any, prefix: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Every place in a JSON value, the whole left out."""
    keys = (
        value if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ()
    )
    found = []
    for key in keys:
        found += [(*prefix, key), *paths(value[key], (*prefix, key))]
    return found


JUNK = [None, True, -1, 0, 1, 2, 10**30, 1.5, "x", "", [], {}, [[]], [1, 1], [-3], {"a": 1}]


@given(recipes(max_categories=4), st.data())
def test_damaged_json_is_refused_or_still_a_layout(recipe: Recipe, data: st.DataObject) -> None:
    record = json.loads(make(recipe).to_json())
    place = data.draw(st.sampled_from(paths(record)))
    owner = record
    for key in place[:-1]:
        owner = owner[key]
    if data.draw(st.booleans()):
        del owner[place[-1]]
    else:
        owner[place[-1]] = data.draw(st.sampled_from(JUNK))
    try:
        layout = GroupLayout.from_json(json.dumps(record))
    except ValueError:
        return
    table, start = layout.bin_labels, int(layout.num_labels > layout.num_categories)
    categories = table[start:, layout.foreground]
    assert (categories > 0).sum(0).tolist() == [1] * layout.num_categories
    assert layout.num_logits == layout.num_categories + layout.num_groups + start
    assert len(layout.group_names) == len(layout.group_sizes) == layout.num_groups
    assert GroupLayout.from_json(layout.to_json()) == layout


@pytest.mark.parametrize("name", ["format_version", "background", "groups"])
def test_needed_fields_of_the_json(name: str) -> None:
    record = json.loads(GroupLayout.from_counts(COUNTS).to_json())
    del record[name]
    with pytest.raises(ValueError, match=name):
        GroupLayout.from_json(json.dumps(record))


def test_from_state_dict_without_a_layout_says_so() -> None:
    with pytest.raises(BAD):
        GroupLayout.from_state_dict({"fc.weight": torch.zeros(3, 4)})


@pytest.mark.parametrize(
    ("counts", "error", "said"),
    [
        ([10**30, 1], ValueError, "fit 64-bit integers, got 1000"),
        ([1, 2**63], ValueError, "fit 64-bit integers, got 9223372036854775808"),
        ([2**63, 2**63], ValueError, "fit 64-bit signed integers, got 9223372036854775808"),
        ([1, 2.5], TypeError, "to be integers, got float64"),
        (torch.ones(2, dtype=torch.bfloat16), TypeError, "to be integers, got float64"),
        (torch.ones(2, dtype=torch.int64).to_sparse(), ValueError, "of layout torch.sparse_coo"),
    ],
    ids=["beyond 64 bits", "2**63", "2**63 alone", "float", "bfloat16", "sparse"],
)
def test_unusual_counts_are_refused(counts: Any, error: type[Exception], said: str) -> None:
    with pytest.raises(error, match=said):
        GroupLayout.from_counts(counts)


def test_loading_from_what_is_no_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="got a folder or device"):
        GroupLayout.load(tmp_path)
    with pytest.raises(FileNotFoundError):
        GroupLayout.load(tmp_path / "none.json")


def test_a_state_dict_must_be_one() -> None:
    with pytest.raises(TypeError, match="`state_dict` to be a mapping, got NoneType"):
        GroupLayout.from_state_dict(None)  # type: ignore[arg-type]
