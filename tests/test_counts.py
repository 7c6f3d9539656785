"""Counts from annotations: the real LVIS totals, both sources of counts, and every bad file."""

import gc
import json
import os
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from balanced_group_softmax import counts as counts_module
from balanced_group_softmax.counts import (
    category_counts,
    category_ids,
    image_counts,
    read_annotations,
)


def coco(**changes: Any) -> dict[str, Any]:
    """A small valid COCO file: counts 2, 0, 1 for the ids 2, 5, 9, given in another order."""
    data: dict[str, Any] = {
        "images": [{"id": 1}, {"id": 4}],
        "categories": [{"id": 9}, {"id": 2}, {"id": 5}],
        "annotations": [
            {"id": 10, "image_id": 1, "category_id": 2},
            {"id": 11, "image_id": 4, "category_id": 2, "iscrowd": 0},
            {"id": 12, "image_id": 4, "category_id": 9, "iscrowd": False},
            {"id": 13, "image_id": 4, "category_id": 5, "iscrowd": 1},
        ],
    }
    return data | changes


def lvis(*counts: Any) -> dict[str, Any]:
    return {"categories": [{"id": i, "instance_count": n} for i, n in enumerate(counts, 1)]}


# --- what comes out ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("file", "categories", "total"),
    [
        ("lvis_v0.5_train_categories.json", 1230, 693_958),
        ("lvis_v1_train_categories.json", 1203, 1_270_141),
        ("lvis_val_100.json", 1230, 977),
    ],
)
def test_real_lvis_totals(lvis_data: Path, file: str, categories: int, total: int) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        counts = category_counts(lvis_data / file)
    assert (len(counts), sum(counts)) == (categories, total)
    assert category_ids(lvis_data / file) == list(range(1, categories + 1))


def test_real_annotations_add_up_to_the_stated_counts(lvis_data: Path) -> None:
    path = lvis_data / "lvis_val_100.json"
    data = json.loads(path.read_text())
    for row in data["categories"]:
        del row["instance_count"]
    assert category_counts(data) == category_counts(path)


def test_crowd_annotations_do_not_count() -> None:
    assert category_counts(coco()) == [2, 0, 1]
    assert category_ids(coco()) == [2, 5, 9]


def test_stated_counts_are_taken_by_ascending_id() -> None:
    rows = [{"id": 7, "instance_count": 4}, {"id": 0, "instance_count": 0}]
    assert category_counts(rows) == category_counts({"categories": rows}) == [0, 4]


def test_path_text_and_content_agree(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_bytes(b"\xef\xbb\xbf" + json.dumps(coco()).encode())  # some editors add the mark
    assert category_counts(path) == category_counts(str(path)) == category_counts(coco())
    path.write_text(json.dumps(lvis(3, 1)["categories"]))
    assert category_counts(path) == [3, 1]


def test_stated_counts_win_over_annotations_with_a_warning() -> None:
    data = coco(categories=[{"id": i, "instance_count": 7} for i in (2, 5, 9)])
    with pytest.warns(UserWarning, match=r"of 3 of 3 categories .*category 2: 7 against 2"):
        assert category_counts(data) == [7, 7, 7]


def test_annotations_left_out_of_the_file_are_no_contradiction() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert category_counts(lvis(7, 5) | {"annotations": []}) == [7, 5]


def test_a_list_of_counts_is_checked_and_returned(tmp_path: Path) -> None:
    assert category_counts([5, 0, 2]) == [5, 0, 2]
    (tmp_path / "counts.json").write_text("[5, 0, 2]")
    assert category_counts(tmp_path / "counts.json") == [5, 0, 2]


def test_no_annotations_at_all_means_never_seen() -> None:
    assert category_counts({"categories": [{"id": 1}, {"id": 2}], "annotations": []}) == [0, 0]


def test_numpy_integers_in_a_dict_become_plain_ones() -> None:
    counts = category_counts({"categories": [{"id": np.int64(1), "instance_count": np.int32(4)}]})
    assert counts == [4]
    assert type(counts[0]) is int


def test_the_content_is_not_changed() -> None:
    data, before = coco(), json.dumps(coco())
    assert read_annotations(data, complete=True) is data
    assert json.dumps(data) == before


@given(
    ids=st.lists(st.integers(0, 2**63 - 1), min_size=1, max_size=8, unique=True),
    picks=st.lists(st.tuples(st.integers(0, 7), st.booleans()), max_size=30),
)
def test_counting_equals_a_plain_loop(ids: list[int], picks: list[tuple[int, bool]]) -> None:
    annotations = [
        {"id": k, "category_id": ids[i % len(ids)], "iscrowd": int(crowd)}
        for k, (i, crowd) in enumerate(picks)
    ]
    expected = []
    for category in sorted(ids):
        mine = [a for a in annotations if a["category_id"] == category]
        expected.append(sum(a["iscrowd"] == 0 for a in mine))
    data = {"categories": [{"id": i} for i in ids], "annotations": annotations}
    assert category_counts(data) == expected
    assert category_ids(data) == sorted(ids)
    stated = {"categories": [{"id": i, "instance_count": i // 2} for i in ids]}
    assert category_counts(stated) == [i // 2 for i in sorted(ids)]


def test_a_million_annotations_take_seconds() -> None:
    n = 1_000_000
    data = {
        "images": [{"id": i} for i in range(100_000)],
        "categories": [{"id": i} for i in range(1203)],
        "annotations": [
            {"id": i, "image_id": i % 100_000, "category_id": i % 1203} for i in range(n)
        ],
    }
    start = time.process_time()
    assert sum(category_counts(data)) == n
    assert time.process_time() - start < 5  # about 0.6 s on a desktop core


# --- images per category -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("file", "categories", "total"),
    [
        ("lvis_v0.5_train_categories.json", 1230, 201_417),
        ("lvis_v1_train_categories.json", 1203, 360_952),
        ("lvis_val_100.json", 1230, 299),
    ],
)
def test_real_image_counts(lvis_data: Path, file: str, categories: int, total: int) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        counts = image_counts(lvis_data / file)
    assert (len(counts), sum(counts)) == (categories, total)
    instances = category_counts(lvis_data / file)
    assert all(0 <= images <= n for images, n in zip(counts, instances, strict=True))


def test_real_annotations_lie_in_the_stated_images(lvis_data: Path) -> None:
    path = lvis_data / "lvis_val_100.json"
    data = json.loads(path.read_text())
    for row in data["categories"]:
        del row["image_count"]
    assert image_counts(data) == image_counts(path)


def test_an_image_counts_once_and_crowds_do_not() -> None:
    again = {"id": 14, "image_id": 1, "category_id": 2}
    data = coco()
    data["annotations"].append(again)
    assert category_counts(data) == [3, 0, 1]
    assert image_counts(data) == [2, 0, 1]


def test_stated_image_counts_win_with_a_warning_at_the_caller() -> None:
    data = coco(categories=[{"id": i, "image_count": 7} for i in (9, 2, 5)])
    with pytest.warns(UserWarning, match=r"`image_count` of 3 of 3 .*category 2: 7 ag") as caught:
        assert image_counts(data) == [7, 7, 7]
    assert caught[0].filename == __file__
    assert image_counts(data["categories"]) == image_counts([7, 7, 7]) == [7, 7, 7]


def test_each_kind_of_count_asks_for_its_own_key() -> None:
    with pytest.raises(ValueError, match="with `image_count` or a list `annotations`"):
        image_counts(lvis(3, 4))
    with pytest.raises(ValueError, match="with `instance_count` or a list `annotations`"):
        category_counts([{"id": 1, "image_count": 3}])


@given(
    picks=st.lists(st.tuples(st.integers(0, 3), st.integers(0, 4), st.booleans()), max_size=30),
)
def test_counting_images_equals_a_plain_loop(picks: list[tuple[int, int, bool]]) -> None:
    data = {
        "categories": [{"id": i} for i in (3, 1, 0, 2)],
        "annotations": [
            {"category_id": category, "image_id": image, "iscrowd": int(crowd)}
            for category, image, crowd in picks
        ],
    }
    expected = []
    for category in range(4):
        held = [any(p == (category, image, False) for p in picks) for image in range(5)]
        expected.append(sum(held))
    assert image_counts(data) == expected


BAD_IMAGE_COUNTS: dict[str, tuple[Any, str]] = {
    "annotation without image": (
        coco(images=[], annotations=[{"id": 1, "category_id": 2}]),
        r"Expected `image_id` in annotations\[0\] \(id 1\)",
    ),
    "unknown image": (
        coco(annotations=[{"id": 1, "category_id": 2, "image_id": 2}]),
        "to be in `images`, got 2",
    ),
    "negative, in the order of the file": (
        [{"id": 9, "image_count": 1}, {"id": 4, "image_count": -1}],
        r"`image_count` of categories\[1\] \(id 4\).*int -1",
    ),
    "some categories only": (
        [{"id": 1, "image_count": 4}, {"id": 6}],
        "`image_count` in every category or in none, got it in 1 of 2; category 6",
    ),
}


@pytest.mark.parametrize(("content", "message"), BAD_IMAGE_COUNTS.values(), ids=BAD_IMAGE_COUNTS)
def test_bad_image_counts(content: Any, message: str) -> None:
    with pytest.raises(ValueError, match=f"annotations: .*{message}"):
        image_counts(content)


# --- bad content ---------------------------------------------------------------------------------

ROW = {"id": 10, "image_id": 1, "category_id": 2}

BAD_CONTENT: dict[str, tuple[Any, str]] = {
    "no categories": ({"images": []}, r"Expected `categories`, got only \['images'\]"),
    "empty categories": (coco(categories=[]), "at least one entry in `categories`"),
    "empty list": ([], "at least one entry in `categories`"),
    "categories not a list": (coco(categories={"1": "cat"}), "`categories` to be a list, got dict"),
    "category not an object": (coco(categories=[{"id": 1}, "cat"]), r"categories\[1\].*'cat'"),
    "category without id": (coco(categories=[{"name": "cat"}]), r"`id` in categories\[0\]"),
    "duplicate category": (coco(categories=[{"id": 2}, {"id": 9}, {"id": 2}]), "2 twice, at 0 and"),
    "duplicate image": (coco(images=[{"id": 1}, {"id": 4}, {"id": 4}]), "`images`, got 4 twice"),
    "duplicate annotation": (coco(annotations=[ROW, ROW]), "`annotations`, got 10 twice"),
    "unknown category": (
        coco(annotations=[ROW, ROW | {"id": 11, "category_id": 3}]),
        r"`category_id` of annotations\[1\] \(id 11\) to be in `categories`, got 3",
    ),
    "unknown image": (
        coco(annotations=[ROW | {"image_id": 2}]),
        r"`image_id` of annotations\[0\] \(id 10\) to be in `images`, got 2",
    ),
    "annotation without category": (coco(annotations=[{"id": 1, "image_id": 1}]), "`category_id`"),
    "some annotations without id": (
        coco(annotations=[ROW, {"image_id": 1, "category_id": 2}]),
        r"`id` in annotations\[1\]",
    ),
    "annotation not an object": (coco(annotations=[ROW, [1]]), r"annotations\[1\].*list \[1\]"),
    "annotations not a list": (coco(annotations=None), "`annotations` to be a list, got NoneType"),
    "bool id": (coco(categories=[{"id": True}]), r"`id` of categories\[0\].*bool True"),
    "float id": (coco(images=[{"id": 1.0}]), r"`id` of images\[0\].*float 1\.0"),
    "text id": (coco(categories=[{"id": "2"}]), "str '2'"),
    "negative id": (coco(categories=[{"id": -2}]), "int -2"),
    "id beyond int64": (coco(categories=[{"id": 2**63}]), "int 9223372036854775808"),
    "text reference": (coco(annotations=[ROW | {"category_id": "2"}]), r"\(id 10\).*str '2'"),
    "bool reference": (coco(annotations=[ROW | {"image_id": True}]), r"\(id 10\).*bool True"),
    "crowd 2": (coco(annotations=[ROW | {"iscrowd": 2}]), r"`iscrowd` of annotations\[0\].*int 2"),
    "crowd text": (coco(annotations=[ROW | {"iscrowd": "0"}]), "str '0'"),
    "crowd list": (coco(annotations=[ROW | {"iscrowd": []}]), r"list \[\]"),
    "negative count": (lvis(3, -1), r"`instance_count` of categories\[1\] \(id 2\).*int -1"),
    "float count": (lvis(3.0), r"float 3\.0"),
    "NaN count": (lvis(float("nan")), "float nan"),
    "null count": (lvis(None), "NoneType None"),
    "bool count": (lvis(True), "bool True"),
    "count beyond int64": (lvis(10**30), "int 1000"),
    "some categories without count": (
        {"categories": [{"id": 1, "instance_count": 4}, {"id": 6}], "annotations": []},
        "in every category or in none, got it in 1 of 2; category 6 is the first without",
    ),
    "neither counts nor annotations": ([{"id": 1}], "or a list `annotations` to count"),
    "negative in a list": ([3, -1], r"counts\[1\].*int -1"),
    "float in a list": ([3, 1.5], r"counts\[1\].*float 1\.5"),
    "NaN in a list": ([float("nan")], r"counts\[0\].*float nan"),
    "list of lists": ([[1, 2]], r"counts\[0\].*list \[1, 2\]"),
}


@pytest.mark.parametrize(("content", "message"), BAD_CONTENT.values(), ids=BAD_CONTENT)
def test_bad_content_names_entry_and_value(content: Any, message: str) -> None:
    with pytest.raises(ValueError, match=f"annotations: .*{message}"):
        category_counts(content)


@pytest.mark.parametrize("content", ["dup", "nan"])
def test_bad_content_of_a_file_names_the_file(tmp_path: Path, content: str) -> None:
    path = tmp_path / "bad.json"
    path.write_text(
        '[{"id": 1}, {"id": 1}]' if content == "dup" else '[{"id": 1, "instance_count": NaN}]'
    )
    with pytest.raises(ValueError, match=r"bad\.json: Expected"):
        category_counts(path)


@pytest.mark.parametrize("value", [None, 3, 2.5, {1}, b"[1]"], ids=repr)
def test_other_types_are_type_errors(value: Any) -> None:
    with pytest.raises(TypeError, match=f"path, a dict or a list, got {type(value).__name__}"):
        category_counts(value)


@pytest.mark.parametrize(
    "lacking", ["images", "annotations", "annotation id", "annotation image_id"]
)
def test_complete_requires_what_counting_does_not(lacking: str) -> None:
    data = coco(annotations=[ROW])
    if lacking.startswith("annotation "):
        key = lacking.split()[1]
        data["annotations"] = [{k: v for k, v in ROW.items() if k != key}]
    else:
        key = lacking
        del data[key]
    read_annotations(data)
    with pytest.raises(ValueError, match=f"Expected `{key}`"):
        read_annotations(data, complete=True)


# --- bad files -----------------------------------------------------------------------------------

BAD_FILES: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "Expected JSON, .*truncated"),
    "truncated": (json.dumps(coco()).encode()[:-20], r"line 1 column \d+; the file may be trunc"),
    "truncated in text": (b'{"categories": [{"name": "ca', "may be truncated"),
    "not JSON": (b"id,count\n1,2\n", r"Expected JSON, got a file that starts b'id,count\\n1,2"),
    "not JSON inside": (b"\xef\xbb\xbf {id: 3}", "Expected JSON, got .* at line 1 column 3$"),
    "binary": (b"\x89PNG\r\n\x1a\n\xff\xfe", r"got a file that starts b'\\x89PNG"),
    "not UTF-8": (b'{"name": "\xff\xfe"}', "JSON in UTF-8"),
    "nested too deeply": (b"[" * 200_000 + b"]" * 200_000, "nested too deeply"),
    "a number of many digits": (b'[{"id": ' + b"1" * 10_000 + b"}]", "Expected"),
    "a number": (b"17", "Expected JSON, got a file that starts b'17'"),
    "null": (b"null", "got a file that starts b'null'"),
}


@pytest.mark.parametrize(("content", "message"), BAD_FILES.values(), ids=BAD_FILES)
def test_bad_files_name_the_file(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "bad.json"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message) as caught:
        category_counts(path)
    assert str(path) in str(caught.value)
    assert len(str(caught.value)) < 500
    assert gc.isenabled()  # it is paused while parsing


@pytest.mark.parametrize("read", [category_counts, category_ids, image_counts, read_annotations])
def test_missing_file_and_folder(tmp_path: Path, read: Callable[[Path], object]) -> None:
    with pytest.raises(FileNotFoundError, match=r"no\.json: Expected an annotation file"):
        read(tmp_path / "no.json")
    with pytest.raises(IsADirectoryError, match="got a folder"):
        read(tmp_path)


def test_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.json")
    with pytest.raises(ValueError, match=r"pipe\.json: .* got a device or pipe"):
        category_counts(tmp_path / "pipe.json")


def test_a_file_over_the_limit_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert counts_module.MAX_FILE_BYTES == 8 * 2**30
    (tmp_path / "big.json").write_text("[1, 2]")
    monkeypatch.setattr(counts_module, "MAX_FILE_BYTES", 6)
    assert category_counts(tmp_path / "big.json") == [1, 2]
    monkeypatch.setattr(counts_module, "MAX_FILE_BYTES", 5)
    with pytest.raises(ValueError, match=r"big\.json: .* at most 5 bytes, got 6"):
        category_counts(tmp_path / "big.json")


def test_running_out_of_memory_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def exhausted(text: str) -> None:
        raise MemoryError

    (tmp_path / "big.json").write_text("[1]")
    monkeypatch.setattr(counts_module.json, "loads", exhausted)
    with pytest.raises(ValueError, match=r"big\.json: .* fit in memory, got 3 bytes"):
        category_counts(tmp_path / "big.json")
