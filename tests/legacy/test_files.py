"""The original's seven files: written from annotations, read back, refused if they are not."""

import io
import json
import os
import pickle
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from balanced_group_softmax import GroupLayout
from balanced_group_softmax.cli import main
from balanced_group_softmax.legacy import safe_pickle
from balanced_group_softmax.legacy.checkpoints import convert_checkpoint
from balanced_group_softmax.legacy.files import FILES, read_original_files, write_original_files
from balanced_group_softmax.legacy.torch_files import load_torch

COUNTS = [3, 5000, 12, 0, 700, 12]


def annotations(counts: list[int]) -> dict[str, Any]:
    """Annotations of so many instances: category c in images 1, 2, 3, ... in turn."""
    images = [{"id": 7 * i, "width": 99, "height": 99} for i in range(1, 6)]
    rows = [
        {"id": 0, "image_id": images[i % 4]["id"], "category_id": c}
        for c, count in enumerate(counts, start=1)
        for i in range(count)
    ]
    for i, row in enumerate(rows):
        row["id"] = i
    return {
        "images": images,
        "annotations": rows,
        "categories": [{"id": c} for c in range(1, len(counts) + 1)],
    }


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_original_files(annotations(COUNTS), tmp_path / "files")
    return tmp_path / "files"


@settings(max_examples=25)
@given(
    counts=st.lists(st.integers(0, 60), min_size=1, max_size=12),
    thresholds=st.lists(st.integers(1, 40), max_size=4, unique=True).map(sorted),
)
def test_what_is_written_is_read_back(
    tmp_path_factory: pytest.TempPathFactory, counts: list[int], thresholds: list[int]
) -> None:
    folder = tmp_path_factory.mktemp("files")
    layout = write_original_files(annotations(counts), folder, thresholds=tuple(thresholds))
    files = read_original_files(folder)
    assert files.layout == layout
    assert layout.num_groups == 2 + len(thresholds)
    for group, name in zip(layout.groups, layout.names, strict=True):
        low, _, high = name.partition("_")
        assert all(int(low) <= counts[c] < float(high) for c in group)
    assert files.category_images is not None
    for images, count in zip(files.category_images, counts, strict=True):
        assert images.instance_count == count
        assert len(images.image_ids) == min(count, 4)
    assert sorted(path.name for path in folder.iterdir()) == sorted(FILES)


def test_tables_are_those_of_the_original_formulas(folder: Path) -> None:
    # Groups by hand: 3 and 0 below 10, twice 12 below 100, 700 below 1000, 5000 above.
    assert load_torch(folder / "label2binlabel.pt").tolist() == [
        [0, 1, 1, 1, 1, 1, 1],
        [0, 1, 0, 0, 2, 0, 0],
        [0, 0, 0, 1, 0, 0, 2],
        [0, 0, 0, 0, 0, 1, 0],
        [0, 0, 1, 0, 0, 0, 0],
    ]
    assert load_torch(folder / "pred_slice_with0.pt").tolist() == [
        [0, 2], [2, 3], [5, 3], [8, 2], [10, 2]
    ]  # fmt: skip
    with (folder / "valsplit.pkl").open("rb") as file:
        splits = safe_pickle.load_plain(file)
    assert {key: value.tolist() for key, value in splits.items()} == {
        "(0, 10)": [1, 4],
        "[10, 100)": [3, 6],
        "[100, 1000)": [5],
        "[1000, ~)": [2],
        "normal": [1, 2, 3, 4, 5, 6],
        "background": [0],
        "all": [0, 1, 2, 3, 4, 5, 6],
    }
    n = np.array([3, 5000, 12, 1, 700, 12])  # a count of 0 is taken as 1
    inverse = (1 / n) / (1 / n).mean()
    expected = [1, *np.where(inverse > 5, 5, np.where(inverse < 0.1, 0.1, inverse))]
    np.testing.assert_allclose(load_torch(folder / "cls_weight.pt").numpy(), expected)
    balanced = 0.001 / (1 - 0.999**n)
    balanced = balanced / balanced.mean()
    expected = [1, *np.where(balanced > 5, 5, np.where(balanced < 0.1, 0.1, balanced))]
    np.testing.assert_allclose(load_torch(folder / "cls_weight_bours.pt").numpy(), expected)
    files = read_original_files(folder)
    assert [len(weights) for weights in files.group_weights] == [3, 3, 2, 2]
    first = (1 / np.array([3, 1])) / (1 / np.array([3, 1])).mean()
    np.testing.assert_allclose(files.group_weights[0], [1, *first])
    np.testing.assert_allclose(files.category_weights[[0, 3]], first)


def test_the_formats_are_those_that_the_original_reads(folder: Path) -> None:
    # torch 1.3 reads no zip archives, NumPy 1 knows no numpy._core.
    for path in folder.iterdir():
        content = path.read_bytes()
        assert not content.startswith(b"PK")
        assert b"numpy._core" not in content
    with (folder / "valsplit.pkl").open("rb") as file:
        assert pickle.load(file)["normal"].dtype == np.int64
    with (folder / FILES[6]).open("rb") as file:
        assert list(pickle.load(file)[1]) == [
            "image_info_id", "img_id", "isntance_count", "category_id"
        ]  # fmt: skip


def test_the_real_file_is_matched(lvis_data: Path, tmp_path: Path) -> None:
    real = lvis_data / FILES[6]
    with real.open("rb") as file:
        table = safe_pickle.load_plain(file)
    categories = json.loads((lvis_data / "lvis_v0.5_train_categories.json").read_text())
    rows = []
    for label, row in table.items():
        rows += [(image, label) for image in row["img_id"]]
        missing = row["isntance_count"] - len(row["img_id"])
        rows += [(row["img_id"][0], label)] * missing if row["img_id"] else []
    ids = sorted({image for image, _ in rows})
    layout = write_original_files(
        {
            "categories": categories,
            "images": [{"id": i, "width": 640, "height": 480} for i in ids],
            "annotations": [
                {"id": i, "image_id": image, "category_id": label}
                for i, (image, label) in enumerate(rows)
            ],
        },
        tmp_path,
    )
    assert (tmp_path / FILES[6]).read_bytes() == real.read_bytes()
    assert layout.group_sizes == (2, 295, 454, 303, 182)
    assert read_original_files(tmp_path).layout == layout


def test_files_without_ranges_have_groups_by_number(folder: Path) -> None:
    for name in FILES[1:]:
        (folder / name).unlink()
    files = read_original_files(folder)
    assert files.layout.names == ("bin1", "bin2", "bin3", "bin4")
    assert (files.group_weights, files.category_images, files.category_weights) == (None,) * 3


def test_small_and_empty_images_have_no_number(tmp_path: Path) -> None:
    data = annotations([3, 3])
    data["images"][0]["height"] = 31  # dropped; image 5 has no annotations
    write_original_files(data, tmp_path)
    images = read_original_files(tmp_path).category_images
    assert images is not None
    assert images[0].image_ids == (14, 21)
    assert images[0].image_positions == (0, 1)
    assert images[0].instance_count == 3


# --- refused -------------------------------------------------------------------------------------


class Evil:
    """Runs a command when it is unpickled by a careless reader."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.mark}",)


class Hidden(Evil):
    """The same, inside of what looks like an array."""

    def __reduce__(self) -> tuple[Any, ...]:
        return np.frombuffer, (Evil(self.mark), "int64")


def torch_saved(value: Any, **how: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer, **how)
    return buffer.getvalue()


def tar_of(content: bytes) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        info = tarfile.TarInfo("storages")
        info.size = len(content)
        archive.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


ATTACKS: dict[str, Callable[[Path], bytes]] = {
    "os.system, pickled": lambda mark: pickle.dumps(Evil(mark)),
    "os.system in a list, pickled": lambda mark: pickle.dumps([[1, {"a": Evil(mark)}]]),
    "os.system under an array, pickled": lambda mark: pickle.dumps({0: Hidden(mark)}),
    "os.system, by torch": lambda mark: torch_saved({"state_dict": Evil(mark)}),
    "os.system under an array, by torch": lambda mark: torch_saved([Hidden(mark)]),
    "os.system, by an older torch": lambda mark: torch_saved(
        {"state_dict": {"bbox_head.fc_cls.weight": Evil(mark)}},
        _use_new_zipfile_serialization=False,
    ),
    "a module, by torch": lambda mark: torch_saved(torch.nn.Linear(2, 2)),
    "a tar archive": lambda mark: tar_of(pickle.dumps(Evil(mark))),
}


@pytest.mark.parametrize("attack", ATTACKS.values(), ids=list(ATTACKS))
@pytest.mark.parametrize("name", [*FILES, "checkpoint.pth"])
def test_files_that_hold_code_are_refused_and_nothing_runs(
    folder: Path, tmp_path: Path, name: str, attack: Callable[[Path], bytes]
) -> None:
    mark = tmp_path / "executed"
    (folder / name).write_bytes(attack(mark))

    def read() -> None:
        if name == "checkpoint.pth":
            convert_checkpoint(folder / name, tmp_path / "out.pth", target="mmdet")
        else:
            read_original_files(folder)

    with pytest.raises(ValueError, match=name):
        read()
    assert not mark.exists()
    assert not (tmp_path / "out.pth").exists()


def test_the_attacks_would_be_noticed(tmp_path: Path) -> None:
    mark = tmp_path / "executed"
    pickle.loads(ATTACKS["os.system, pickled"](mark))
    assert mark.exists()


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("keep", [0.0, 0.3, 0.9])
def test_truncated_files_are_refused(folder: Path, name: str, keep: float) -> None:
    content = (folder / name).read_bytes()
    (folder / name).write_bytes(content[: int(keep * len(content))])
    with pytest.raises(ValueError, match=name):
        read_original_files(folder)


def as_pickle(change: Callable[[Any], Any]) -> Callable[[Path], bytes]:
    def changed(path: Path) -> bytes:
        with path.open("rb") as file:
            return pickle.dumps(change(safe_pickle.load_plain(file)), 3)

    return changed


def as_tensor(change: Callable[[Any], Any]) -> Callable[[Path], bytes]:
    return lambda path: torch_saved(change(load_torch(path)))


def with_value(table: Any, place: tuple[int, ...], value: Any) -> Any:
    table[place] = value
    return table


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        (0, as_tensor(lambda table: table.double()), "expected integers, got torch.float64"),
        (0, as_tensor(lambda table: table[0]), "two dimensions, got shape"),
        (0, as_tensor(lambda table: table[:1]), "G >= 2"),
        (0, as_tensor(lambda table: table.tolist()), "table of integers, got list"),
        (0, as_tensor(lambda table: with_value(table, (0, 0), 1)), "row 0"),
        (0, as_tensor(lambda table: with_value(table, (1, 0), 1)), "background in `others`"),
        (0, as_tensor(lambda table: with_value(table, (1, 2), 3)), "label 2 in 2"),
        (0, as_tensor(lambda table: with_value(table, (1, 1), 5)), "count its categories from 1"),
        (0, as_tensor(lambda table: table[:, :-1]), "valsplit to have the labels"),
        (1, as_tensor(lambda table: table[:-1]), r"expected pred_slice \[\[0, 2\]"),
        (1, as_tensor(lambda table: with_value(table, (2, 0), 4)), "as label2binlabel has it"),
        (2, as_pickle(lambda splits: list(splits)), "a dict of labels, got list"),
        (2, as_pickle(lambda splits: {**splits, "[10, 100)": [3]}), "4 groups"),
        (2, as_pickle(lambda splits: {**splits, "[10, 100)": [0.5]}), "integers"),
        (3, as_tensor(lambda weights: weights[1:]), r"shape \[7\], got \[6\]"),
        (3, as_tensor(lambda weights: weights.long()), "floating-point"),
        (4, as_tensor(lambda weights: weights * float("nan")), "finite weights"),
        (5, as_pickle(lambda weights: weights[:-1]), "weights for each group"),
        (5, as_pickle(lambda weights: [part[1:] for part in weights]), "weights for each group"),
        (6, as_pickle(lambda table: list(table)), r"labels 0\.\.6, got list"),
        (6, as_pickle(lambda table: {**table, 1: {}}), "of label 1, got"),
        (6, as_pickle(lambda table: {**table, 1: {**table[1], "img_id": [1]}}), "as many"),
    ],
)
def test_files_of_the_wrong_shape_are_refused(
    folder: Path, name: int, change: Callable[[Path], bytes], message: str
) -> None:
    path = folder / FILES[name]
    path.write_bytes(change(path))
    with pytest.raises(ValueError, match=message) as caught:
        read_original_files(folder)
    assert str(folder) in str(caught.value)


def test_ids_that_are_no_labels_are_refused(tmp_path: Path) -> None:
    data = annotations([1])
    data["categories"][0]["id"] = data["annotations"][0]["category_id"] = 5
    with pytest.raises(ValueError, match=r"category ids 1\.\.C"):
        write_original_files(data, tmp_path)
    with pytest.raises(FileNotFoundError, match=r"label2binlabel\.pt"):
        read_original_files(tmp_path)


# --- the command line ----------------------------------------------------------------------------


def test_commands_write_and_import(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = tmp_path / "train.json"
    source.write_text(json.dumps(annotations(COUNTS)))
    folder, out = tmp_path / "files", tmp_path / "layout.json"
    assert main(["export-legacy", str(source), "--out", str(folder)]) == 0
    assert main(["import-groups", str(folder), "--out", str(out)]) == 0
    assert GroupLayout.load(out) == read_original_files(folder).layout
    assert "6 categories" in capsys.readouterr().out

    (folder / FILES[0]).write_bytes(b"nonsense")
    assert main(["import-groups", str(folder), "--out", str(out)]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert FILES[0] in error
    assert error.count("\n") == 1


def test_stated_counts_below_the_images_are_read_back(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = annotations(COUNTS)
    for row, count in zip(data["categories"], COUNTS, strict=True):
        row["instance_count"] = min(count, 1)
    layout = write_original_files(data, tmp_path / "files")
    assert read_original_files(tmp_path / "files").layout == layout


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="has no named pipes")
@pytest.mark.parametrize("name", FILES)
def test_pipes_are_not_waited_for(folder: Path, name: str) -> None:
    (folder / name).unlink()
    os.mkfifo(folder / name)
    error = FileNotFoundError if name == FILES[0] else ValueError
    with pytest.raises(error, match=f"{name}, found none|{name}: .* got a device or pipe"):
        read_original_files(folder)


@pytest.mark.parametrize("side", [None, "99", [99]])
def test_what_cannot_be_written_whole_is_not_begun(tmp_path: Path, side: Any) -> None:
    data = annotations(COUNTS)
    data["images"][1]["height"] = side
    with pytest.raises(ValueError, match="width and height of image 14 as numbers"):
        write_original_files(data, tmp_path / "files")
    assert not (tmp_path / "files").exists()


@pytest.mark.parametrize("number", [[1], "1", np.ones(2, np.int64), 2])
def test_a_row_of_another_label_is_refused(folder: Path, number: Any) -> None:
    path = folder / "class_to_imageid_and_inscount.pt"
    table = pickle.loads(path.read_bytes())
    table[1]["category_id"] = number
    path.write_bytes(pickle.dumps(table))
    with pytest.raises(ValueError, match=r"inscount\.pt: .*label 1"):
        read_original_files(folder)
