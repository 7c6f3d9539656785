"""The data set of the examples: exact targets, every kind of image, and every bad input by name."""

import copy
import json
import os
import pickle
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("torchvision")
pytest.importorskip("pycocotools")
EXAMPLES = Path(__file__).parents[2] / "examples"
sys.path.insert(0, str(EXAMPLES))

import render_annotations  # noqa: E402
from coco_masks import decompress_run_lengths, draw_mask, read_segmentation  # noqa: E402
from detection_data import (  # noqa: E402
    ImageError,
    LVISDetection,
    collate,
    image_names,
    load_image,
    make_transforms,
)
from PIL import Image, PngImagePlugin  # noqa: E402
from pycocotools import mask as coco_mask  # noqa: E402
from torch.utils.data import DataLoader  # noqa: E402

# pycocotools 2.0.11 on numpy 2.4.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

WIDTH, HEIGHT = 20, 12


def box(number: int, image: int, category: int, *bbox: float, **more: Any) -> dict[str, Any]:
    x, y, w, h = bbox
    polygon = [x, y, x + w, y, x + w, y + h, x, y + h]
    row = {"id": number, "image_id": image, "category_id": category, "bbox": list(bbox)}
    return row | {"area": w * h, "segmentation": [polygon]} | more


def annotations(**changes: Any) -> dict[str, Any]:
    data: dict[str, Any] = {
        "images": [
            {"id": i, "width": WIDTH, "height": HEIGHT, "file_name": f"{i}.png"} for i in (7, 3, 5)
        ],
        "categories": [{"id": 40, "name": "b"}, {"id": 2, "name": "a"}, {"id": 90, "name": "c"}],
        "annotations": [
            box(1, 3, 90, 2, 3, 4, 5),
            box(2, 7, 2, 0, 0, 10, 6),
            box(3, 3, 40, 15, 1, 15, 4),  # reaches out of the image
            box(4, 3, 40, 1, 1, 0.5, 5),  # thinner than a pixel
            box(5, 3, 2, 0, 0, 9, 9, iscrowd=1),
            box(6, 3, 2, 0, 0, 0.5, 9, iscrowd=1),  # left out once, not twice
        ],
    }
    return data | changes


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "images"
    folder.mkdir()
    for i in (3, 5, 7):
        pixels = np.random.default_rng(i).integers(0, 256, (HEIGHT, WIDTH, 3), np.uint8)
        Image.fromarray(pixels).save(folder / f"{i}.png")
    return folder


# --- what comes out ------------------------------------------------------------------------------


def test_items_hold_boxes_and_labels_in_the_models_terms(folder: Path) -> None:
    data = LVISDetection(annotations(), folder)
    assert len(data) == 3
    assert data.category_ids == [2, 40, 90]
    assert data.image_ids == [7, 3, 5]
    image, target = data[1]
    expected = np.asarray(Image.open(folder / "3.png")).transpose(2, 0, 1) / np.float32(255)
    assert type(image) is torch.Tensor
    assert image.dtype == torch.float32
    np.testing.assert_allclose(image.numpy(), expected, atol=1e-7)
    assert target["boxes"].tolist() == [[2, 3, 6, 8], [15, 1, 20, 5]]
    assert target["labels"].tolist() == [3, 2]
    assert target["area"].tolist() == [20, 60]
    assert target["iscrowd"].tolist() == [0, 0]
    assert target["image_id"] == 3
    assert data.dropped == {"crowd": 2, "degenerate": 1}
    assert (data.num_boxes, data.cut) == (3, 1)
    types = {k: v.dtype for k, v in target.items() if k != "image_id"}
    assert types == {
        "boxes": torch.float32,
        "labels": torch.int64,
        "area": torch.float32,
        "iscrowd": torch.int64,
    }
    assert all(type(v) in (torch.Tensor, int) for v in target.values())


@pytest.mark.parametrize(
    ("bbox", "cut"),
    [
        ([-1, -1, 5, 5], 0),
        ([-1.5, 2, 5, 5], 1),
        ([2, -1.5, 5, 5], 1),
        ([2, 2, 19, 5], 0),
        ([2, 2, 19.5, 5], 1),
        ([2, 2, 5, 11.5], 1),
        ([-9, 2, 9, 5], 0),  # left out
    ],
)
def test_boxes_that_reach_out_by_more_than_a_pixel_are_counted(
    folder: Path, bbox: list[float], cut: int
) -> None:
    data = LVISDetection(annotations(annotations=[box(1, 3, 2, *bbox)]), folder)
    assert data.cut == cut


def test_crowd_is_kept_on_request(folder: Path) -> None:
    _, target = LVISDetection(annotations(), folder, crowd=True)[1]
    assert target["iscrowd"].tolist() == [0, 0, 1]
    assert target["labels"].tolist() == [3, 2, 1]


@pytest.mark.parametrize("masks", [False, True])
def test_images_without_objects_are_kept(folder: Path, masks: bool) -> None:
    _, target = LVISDetection(annotations(), folder, masks=masks)[2]
    assert target["boxes"].shape == (0, 4)
    assert target["labels"].shape == (0,)
    assert target["labels"].dtype == torch.int64
    if masks:
        assert target["masks"].shape == (0, HEIGHT, WIDTH)
    nothing = LVISDetection(annotations(annotations=[]), folder, masks=masks)
    assert [len(nothing[i][1]["labels"]) for i in range(3)] == [0, 0, 0]


def test_iteration_ends_and_indices_are_checked(folder: Path) -> None:
    data = LVISDetection(annotations(), folder)
    assert len(list(data)) == 3
    for index in (3, -1):
        with pytest.raises(IndexError, match=rf"\[0, 3\), got {index}"):
            data[index]
        with pytest.raises(IndexError):
            data.labels(index)
    assert data.labels(1).tolist() == [3, 2]


def test_masks_of_polygons_and_both_run_length_forms(folder: Path) -> None:
    pixels = np.zeros((HEIGHT, WIDTH), np.uint8)
    pixels[3:8, 2:6] = 1
    code = coco_mask.encode(np.asfortranarray(pixels))
    runs = [int(n) for n in np.diff(np.flatnonzero(np.diff(pixels.T.ravel(), prepend=-1)))]
    runs.append(WIDTH * HEIGHT - sum(runs))
    forms = [
        [[2, 3, 6, 3, 6, 8, 2, 8]],
        {"size": [HEIGHT, WIDTH], "counts": code["counts"].decode()},
        {"size": [HEIGHT, WIDTH], "counts": runs},
    ]
    rows = [box(i, 3, 2, 2, 3, 4, 5, segmentation=form) for i, form in enumerate(forms)]
    _, target = LVISDetection(annotations(annotations=rows), folder, masks=True)[1]
    assert target["masks"].dtype == torch.uint8
    for mask in target["masks"]:
        np.testing.assert_array_equal(mask.numpy(), pixels)


@given(
    shape=st.tuples(st.integers(1, 40), st.integers(1, 40)),
    density=st.floats(0, 1),
    seed=st.integers(0, 2**32 - 1),
)
def test_run_lengths_read_what_pycocotools_writes(
    shape: tuple[int, int], density: float, seed: int
) -> None:
    mask = (np.random.default_rng(seed).random(shape) < density).astype(np.uint8)
    code = coco_mask.encode(np.asfortranarray(mask))
    height, width = shape
    row = {"id": 1, "segmentation": {"size": [height, width], "counts": code["counts"].decode()}}
    np.testing.assert_array_equal(
        draw_mask(read_segmentation(row, width, height), width, height), mask
    )


def test_long_runs_need_several_digits() -> None:
    mask = np.zeros((3000, 2000), np.uint8)
    mask[:, 1500:1900] = 1
    code = coco_mask.encode(np.asfortranarray(mask))["counts"]
    assert decompress_run_lengths(code).tolist() == [4_500_000, 1_200_000, 300_000]


def test_real_lvis_masks_equal_pycocotools(lvis_data: Path, tmp_path: Path) -> None:
    full = json.loads((lvis_data / "lvis_val_100.json").read_text())
    ids = {row["id"] for row in full["images"][:10]}
    full["images"] = full["images"][:10]
    full["annotations"] = [a for a in full["annotations"] if a["image_id"] in ids]
    assert render_annotations.render(full, tmp_path) == 10
    data = LVISDetection(full, tmp_path, masks=True)
    compared = 0
    for i in range(len(data)):
        _, target = data[i]
        rows = [a for a in full["annotations"] if a["image_id"] == target["image_id"]]
        assert target["labels"].tolist() == [a["category_id"] for a in rows]  # ids are 1..1230
        width, height = data.sizes[i].tolist()
        for mask, row in zip(target["masks"], rows, strict=True):
            code = coco_mask.merge(coco_mask.frPyObjects(row["segmentation"], height, width))
            np.testing.assert_array_equal(mask.numpy(), coco_mask.decode(code))
            compared += 1
    assert compared == len(full["annotations"]) > 40


# --- transforms, loaders -------------------------------------------------------------------------


def test_flip_turns_image_boxes_and_masks_together(folder: Path) -> None:
    plain = LVISDetection(annotations(), folder, masks=True)
    flipped = LVISDetection(annotations(), folder, masks=True, transforms=make_transforms(flip=1.0))
    image, target = plain[1]
    image_f, target_f = flipped[1]
    assert torch.equal(image_f, image.flip(-1))
    assert torch.equal(target_f["masks"], target["masks"].flip(-1))
    x1, y1, x2, y2 = target["boxes"].unbind(1)
    assert torch.equal(target_f["boxes"], torch.stack([WIDTH - x2, y1, WIDTH - x1, y2], 1))
    assert type(target_f["boxes"]) is torch.Tensor
    assert torch.equal(plain[1][1]["boxes"], target["boxes"])  # the data set is as it was


def test_a_transform_that_works_in_place_does_not_change_the_data(folder: Path) -> None:
    def spoil(image: torch.Tensor, target: dict[str, Any]) -> tuple[torch.Tensor, dict[str, Any]]:
        for value in (image, *(target[k] for k in ("boxes", "labels", "area", "iscrowd", "masks"))):
            value.zero_()
        return image, target

    data = LVISDetection(annotations(), folder, masks=True, transforms=spoil)
    data[1]
    data.transforms = None
    image, target = data[1]
    expected_image, expected = LVISDetection(annotations(), folder, masks=True)[1]
    assert torch.equal(image, expected_image)
    assert all(torch.equal(target[k], expected[k]) for k in expected if k != "image_id")


def test_resize_keeps_the_aspect_ratio(folder: Path) -> None:
    transform = make_transforms(short_side=24, long_side=1000)
    image, target = LVISDetection(annotations(), folder, masks=True, transforms=transform)[1]
    assert image.shape == (3, 24, 40)
    assert target["masks"].shape == (2, 24, 40)
    assert target["boxes"].tolist() == [[4, 6, 12, 16], [30, 2, 40, 10]]
    capped = LVISDetection(
        annotations(), folder, transforms=make_transforms(short_side=24, long_side=30)
    )
    assert capped[1][0].shape == (3, 18, 30)


def epoch(data: LVISDetection, workers: int, **more: Any) -> list[Any]:
    torch.manual_seed(5)
    loader = DataLoader(
        data,
        batch_size=2,
        shuffle=True,
        num_workers=workers,
        collate_fn=collate,
        generator=torch.Generator().manual_seed(3),
        **more,
    )
    return [
        (target["image_id"], target["boxes"].tolist(), image.double().sum().item())
        for images, targets in loader
        for image, target in zip(images, targets, strict=True)
    ]


@pytest.mark.parametrize("workers", [0, 2])
def test_seeds_decide_order_and_flips(folder: Path, workers: int) -> None:
    data = LVISDetection(annotations(), folder, transforms=make_transforms(flip=0.5))
    first = epoch(data, workers)
    assert sorted(item[0] for item in first) == [3, 5, 7]
    assert epoch(data, workers) == first


def test_spawned_workers_give_the_same_as_forked_ones(folder: Path) -> None:
    data = LVISDetection(annotations(), folder, masks=True, transforms=make_transforms(flip=0.5))
    assert epoch(data, 1, multiprocessing_context="spawn") == epoch(data, 1)


def test_copies_and_pickles(folder: Path) -> None:
    data = LVISDetection(annotations(), folder, masks=True, transforms=make_transforms(flip=1.0))
    for other in (copy.deepcopy(data), pickle.loads(pickle.dumps(data))):
        assert repr(other) == repr(data)
        assert torch.equal(other[1][0], data[1][0])
        assert torch.equal(other[1][1]["masks"], data[1][1]["masks"])


# --- names of images -----------------------------------------------------------------------------

URL = "http://images.cocodataset.org/val2017/000000000009.jpg"


@pytest.mark.parametrize(
    ("row", "names"),
    [
        ({"file_name": "a/b.jpg"}, ["a/b.jpg", "b.jpg"]),
        ({"coco_url": URL}, ["val2017/000000000009.jpg", "000000000009.jpg"]),
        ({"file_name": "COCO_val2014_000000000009.jpg", "coco_url": URL},
         ["COCO_val2014_000000000009.jpg", "val2017/000000000009.jpg", "000000000009.jpg"]),
        ({"file_name": "val2014/COCO_val2014_000000000009.jpg"},
         ["val2014/COCO_val2014_000000000009.jpg", "000000000009.jpg"]),
        ({"coco_url": "http://[/x/9.jpg?v=1"}, ["x/9.jpg", "9.jpg"]),
        ({"file_name": "..a/b..jpg"}, ["..a/b..jpg", "b..jpg"]),
    ],
    ids=["file_name", "coco_url", "LVIS v0.5", "2014 in a folder", "odd URL", "dots in names"],
)  # fmt: skip
def test_names_an_image_may_have(row: dict[str, Any], names: list[str]) -> None:
    assert image_names({"id": 1} | row) == names


@pytest.mark.parametrize("place", ["COCO_val2014_000000000009.jpg", "val2017/000000000009.jpg",
                                   "000000000009.jpg"])  # fmt: skip
def test_lvis_images_are_found_in_every_usual_folder(tmp_path: Path, place: str) -> None:
    path = tmp_path / place
    path.parent.mkdir(exist_ok=True)
    Image.new("RGB", (WIDTH, HEIGHT)).save(path)
    row = {"id": 9, "width": WIDTH, "height": HEIGHT, "coco_url": URL}
    row["file_name"] = "COCO_val2014_000000000009.jpg"
    data = LVISDetection(annotations(images=[row], annotations=[]), tmp_path)
    assert data.paths == [str(path.resolve())]


@pytest.mark.parametrize(
    "name",
    [
        "../7.png",
        "sub/../../7.png",
        "/etc/passwd",
        "..",
        "C:\\7.png",
        "C:7.png",
        "..\\7.png",
        "\\7.png",
        "a\0",
    ],
    ids=repr,
)
@pytest.mark.parametrize("use", ["load", "draw"])
def test_names_that_leave_the_folder(folder: Path, name: str, use: str) -> None:
    data = annotations()
    data["images"][1]["file_name"] = name
    before = sorted(folder.parent.rglob("*"))
    with pytest.raises(ValueError, match=r"`file_name` of image 3 to stay in the image folder"):
        LVISDetection(data, folder) if use == "load" else render_annotations.render(data, folder)
    assert sorted(folder.parent.rglob("*")) == before


def test_links_that_leave_the_folder(folder: Path) -> None:
    outside = folder.parent / "outside"
    outside.mkdir()
    (folder / "3.png").rename(outside / "3.png")
    (folder / "3.png").symlink_to(outside / "3.png")
    with pytest.raises(ValueError, match=r"image 3 to stay .* 3\.png, a link to .*outside"):
        LVISDetection(annotations(), folder)
    (folder / "3.png").unlink()
    (folder / "sub").symlink_to(outside)
    data = annotations()
    data["images"][1]["file_name"] = "sub/3.png"
    with pytest.raises(ValueError, match=r"image 3 to stay .* sub/3\.png, a link to"):
        LVISDetection(data, folder)


def test_links_inside_the_folder_and_to_it_are_fine(folder: Path) -> None:
    (folder / "3.png").rename(folder / "real.png")
    (folder / "3.png").symlink_to("real.png")
    (folder.parent / "link").symlink_to(folder)
    assert len(LVISDetection(annotations(), folder.parent / "link")[1][1]["labels"]) == 2


def test_missing_images_are_counted_and_named(folder: Path) -> None:
    data = annotations()
    data["images"] += [
        {"id": i, "width": 4, "height": 4, "file_name": f"x{i}.jpg"} for i in range(10, 15)
    ]
    expected = r"5 of 8 images are not there: x10\.jpg \(image 10\), x11\.jpg .*, \.\.\.$"
    with pytest.raises(FileNotFoundError, match=expected):
        LVISDetection(data, folder)
    with pytest.raises(FileNotFoundError, match=r"nowhere: Expected the folder of the images"):
        LVISDetection(data, folder / "nowhere")


# --- bad annotations -----------------------------------------------------------------------------


def with_row(section: str, **changes: Any) -> dict[str, Any]:
    data = annotations()
    data[section][0].update(changes)
    return {
        **data,
        section: [{k: v for k, v in row.items() if v is not ...} for row in data[section]],
    }


NAN, INF = float("nan"), float("inf")
CODE = {"size": [HEIGHT, WIDTH]}
BAD = {
    "no annotations": ({"categories": [{"id": 1}], "images": []}, "Expected `annotations`"),
    "no width": (with_row("images", width=...), "`width` of image 7 .* got None"),
    "height 0": (with_row("images", height=0), "`height` of image 7 .* got 0"),
    "float width": (with_row("images", width=20.0), r"`width` of image 7 .* got 20\.0"),
    "no name": (with_row("images", file_name=...), "`file_name` or `coco_url` in image 7"),
    "name a number": (with_row("images", file_name=7), "`file_name` of image 7 to be text, got 7"),
    "name empty": (with_row("images", file_name=""), "`file_name` of image 7 to be text, got ''"),
    "box missing": (with_row("annotations", bbox=...), "`bbox` of annotation 1 .* got None"),
    "box of 3": (with_row("annotations", bbox=[1, 2, 3]), r"annotation 1 .* got \[1, 2, 3\]"),
    "box NaN": (with_row("annotations", bbox=[1, 2, NAN, 3]), "`bbox` of annotation 1 .* nan"),
    "box inf": (with_row("annotations", bbox=[1, 2, INF, 3]), "`bbox` of annotation 1 .* inf"),
    "box text": (with_row("annotations", bbox=["1", 2, 3, 4]), "`bbox` of annotation 1 .*'1'"),
    "box null": (with_row("annotations", bbox=[None, 2, 3, 4]), "`bbox` of annotation 1"),
    "category name a number": (with_row("categories", name=5), "`name` of category 40 .* got 5"),
    "category name null": (with_row("categories", name=None), "`name` of category 40 .* got None"),
    "absent 5": (with_row("images", neg_category_ids=5), "`neg_category_ids` of image 7 .* got 5"),
    "absent unknown": (
        with_row("images", neg_category_ids=[2, 3]), r"`neg_category_ids` of image 7 .* \[2, 3\]"
    ),
    "absent text": (with_row("images", neg_category_ids=["2"]), "`neg_category_ids` of image 7"),
    "absent list": (with_row("images", neg_category_ids=[[2]]), "`neg_category_ids` of image 7"),
    "not exhaustive unknown": (
        with_row("images", not_exhaustive_category_ids=[3]),
        r"`not_exhaustive_category_ids` of image 7 .* \[3\]",
    ),
    "area text": (with_row("annotations", area="big"), "`area` of annotation 1 .* got 'big'"),
    "area NaN": (with_row("annotations", area=NAN), "`area` of annotation 1 .* got nan"),
    "box huge": (with_row("annotations", bbox=[10**400, 2, 3, 4]), "`bbox` of annotation 1"),
    "area huge": (with_row("annotations", area=10**400), "`area` of annotation 1"),
    "area negative": (with_row("annotations", area=-4), "`area` of annotation 1 .* got -4"),
}  # fmt: skip


@pytest.mark.parametrize(("data", "message"), BAD.values(), ids=BAD)
def test_bad_annotations_name_file_and_entry(
    folder: Path, tmp_path: Path, data: dict[str, Any], message: str
) -> None:
    path = tmp_path / "bad.json"
    path.write_text(json.dumps(data))
    with pytest.raises(ValueError, match=rf"bad\.json: .*{message}"):
        LVISDetection(path, folder)


def test_categories_without_a_name_are_called_by_their_id(folder: Path) -> None:
    data = LVISDetection(with_row("categories", name=...), folder)
    assert [row["name"] for row in data.categories] == ["a", "40", "c"]


@pytest.mark.parametrize("value", [None, [], [2, 90]], ids=str)
def test_lists_of_absence_may_be_null_or_of_known_categories(folder: Path, value: Any) -> None:
    changes = dict.fromkeys(("neg_category_ids", "not_exhaustive_category_ids"), value)
    assert len(LVISDetection(with_row("images", **changes), folder)) == 3


BAD_MASKS: dict[str, tuple[Any, str]] = {
    "missing": (None, "polygons or run lengths, got None"),
    "empty": ([], r"polygons or run lengths, got \[\]"),
    "text": ("polygon", "got 'polygon'"),
    "two points": ([[1, 2, 3, 4]], "3 points or more"),
    "odd": ([[1, 2, 3, 4, 5, 6, 7]], "3 points or more"),
    "a flat list": ([1, 2, 3, 4, 5, 6], "3 points or more, got 1"),
    "NaN": ([[1, 2, 3, 4, 5, NAN]], "finite"),
    "text in points": ([[1, 2, 3, "4", 5, 6]], "finite"),
    "nested points": ([[[1, 2], [3, 4], [5, 6], [1], [2], [3]]], "finite"),
    "far away": ([[1, 2, 1e9, 4, 5, 6]], r"at most one image \(20 x 12\) outside, got 1000000000"),
    "second polygon bad": ([[1, 2, 3, 4, 5, 6], [1]], "3 points or more"),
    "no size": ({"counts": [240]}, r"`size` \[12, 20\], as the image, got None"),
    "other size": ({"size": [WIDTH, HEIGHT], "counts": [240]}, r"`size` \[12, 20\]"),
    "huge size": ({"size": [10**6, 10**6], "counts": [10**12]}, r"`size` \[12, 20\]"),
    "no counts": (CODE, "text or integers, got None"),
    "short": (CODE | {"counts": [239]}, "add up to 12 x 20 = 240"),
    "long": (CODE | {"counts": [200, 41]}, "add up to 12 x 20 = 240"),
    "negative": (CODE | {"counts": [241, -1]}, r"`counts` in \[0, 240\]"),
    "float run": (CODE | {"counts": [240.0]}, "text or integers"),
    "integer beyond float": ([[1, 2, 3, 4, 5, 10**400]], "finite"),
    "true": ([[1, 2, 3, 4, 5, True]], "finite"),
    "beyond int64": (CODE | {"counts": [2**70]}, r"`counts` in \[0, 240\]"),
    "bad letters": (CODE | {"counts": "!!!"}, "corrupt code"),
    "not ASCII": (CODE | {"counts": "\u00e9"}, "in ASCII"),
    "cut off": (CODE | {"counts": "PPP"}, "corrupt code"),
    "endless digit": (CODE | {"counts": "P" * 40 + "0"}, "at most 7 digits"),
    "no text": (CODE | {"counts": ""}, "got none"),
    "code too short": (CODE | {"counts": "5"}, "add up to"),
    "control letters": (CODE | {"counts": "\x0f"}, "corrupt code"),
    "negative runs": (CODE | {"counts": "X6OY1"}, "run lengths >= 0"),  # 200, -1, 41
}


@pytest.mark.parametrize(("segmentation", "message"), BAD_MASKS.values(), ids=BAD_MASKS)
def test_bad_masks_name_the_annotation(folder: Path, segmentation: Any, message: str) -> None:
    data = with_row("annotations", segmentation=segmentation)
    with pytest.raises(ValueError, match=f"`segmentation` of annotation 1: Expected .*{message}"):
        LVISDetection(data, folder, masks=True)
    if segmentation in (None, []) or "outside" in message:  # boxes alone do not need it
        assert len(LVISDetection(data, folder)[1][1]["labels"]) == 2
    else:
        with pytest.raises(ValueError, match=f"`segmentation` of annotation 1: .*{message}"):
            LVISDetection(data, folder)


@pytest.mark.parametrize("masks", [False, True])
@pytest.mark.parametrize("place", [3, 4], ids=["thin box", "crowd"])
def test_masks_of_boxes_that_are_left_out_are_checked_too(
    folder: Path, place: int, masks: bool
) -> None:
    data = annotations()
    data["annotations"][place]["segmentation"] = [[1, 2]]
    with pytest.raises(ValueError, match=f"`segmentation` of annotation {place + 1}: "):
        LVISDetection(data, folder, masks=masks)


@given(text=st.text(st.characters(min_codepoint=40, max_codepoint=120), max_size=30))
def test_no_run_length_text_goes_wrong_silently(text: str) -> None:
    row = {"id": 1, "segmentation": {"size": [HEIGHT, WIDTH], "counts": text}}
    try:
        segment = read_segmentation(row, WIDTH, HEIGHT)
    except ValueError:
        return
    mask = draw_mask(segment, WIDTH, HEIGHT)
    assert mask.shape == (HEIGHT, WIDTH)
    np.testing.assert_array_equal(mask, coco_mask.decode(row["segmentation"]))


# --- image files ---------------------------------------------------------------------------------


def gradient() -> np.ndarray:
    return np.linspace(0, 255, WIDTH * HEIGHT).astype(np.uint8).reshape(HEIGHT, WIDTH)


@pytest.mark.parametrize("kind", ["L", "1", "P", "RGBA", "LA", "CMYK", "I;16", "P with alpha"])
def test_every_image_mode_becomes_rgb(tmp_path: Path, kind: str) -> None:
    grey = gradient()
    rgb = np.stack([grey, 255 - grey, grey // 2], 2)
    expected, tolerance, options = np.stack([grey] * 3), 0, {}
    name = "image.png"
    if kind == "L":
        image = Image.fromarray(grey)
    elif kind == "1":
        image, expected = Image.fromarray(grey > 127), np.stack([(grey > 127) * 255] * 3)
    elif kind == "LA":
        image = Image.merge("LA", [Image.fromarray(grey), Image.fromarray(255 - grey)])
    elif kind == "I;16":
        image = Image.fromarray(grey.astype(np.uint16) * 257)
    elif kind.startswith("P"):
        image = Image.fromarray(grey % 7).convert("P")
        palette = np.arange(256 * 3, dtype=np.uint8) * 31
        image.putpalette(palette.tolist())
        expected = palette.reshape(256, 3)[np.asarray(image)].transpose(2, 0, 1)
        if kind == "P with alpha":
            options = {"transparency": bytes([0, 128, 255] * 85 + [0])}
    else:
        image, expected = Image.fromarray(rgb), rgb.transpose(2, 0, 1)
        image = image.convert(kind)
        if kind == "CMYK":
            name, tolerance, options = "image.jpg", 12, {"quality": 100, "subsampling": 0}
    image.save(tmp_path / name, **options)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        result = load_image(tmp_path / name, WIDTH, HEIGHT)
    assert result.dtype == torch.uint8
    assert result.shape == (3, HEIGHT, WIDTH)
    difference = np.abs(result.numpy().astype(int) - expected)
    assert difference.max() <= tolerance, f"{kind}: {difference.max()}"


def save_with_orientation(path: Path, orientation: int) -> np.ndarray:
    pixels = np.stack([gradient()] * 3, 2)
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(pixels).save(path, exif=exif)
    return pixels


def test_rotation_in_exif_follows_the_annotated_size(tmp_path: Path) -> None:
    pixels = save_with_orientation(tmp_path / "a.png", 6)
    turned = load_image(tmp_path / "a.png", HEIGHT, WIDTH)
    np.testing.assert_array_equal(turned.numpy(), np.rot90(pixels, -1).transpose(2, 0, 1))
    stored = load_image(tmp_path / "a.png", WIDTH, HEIGHT)
    np.testing.assert_array_equal(stored.numpy(), pixels.transpose(2, 0, 1))
    with pytest.raises(ImageError, match=r"is 12 x 20 pixels, the annotations say 20 x 20"):
        load_image(tmp_path / "a.png", 20, 20)


def test_upside_down_in_exif_is_turned(tmp_path: Path) -> None:
    pixels = save_with_orientation(tmp_path / "a.png", 3)
    image = load_image(tmp_path / "a.png", WIDTH, HEIGHT)
    np.testing.assert_array_equal(image.numpy(), np.rot90(pixels, 2).transpose(2, 0, 1))


def break_image(path: Path, how: str) -> None:
    content = path.read_bytes()
    if how == "truncated":
        path.write_bytes(content[: len(content) // 2])
    elif how == "empty":
        path.write_bytes(b"")
    elif how == "not an image":
        path.write_text("<html>404</html>")
    elif how == "corrupt":
        path.write_bytes(content[:60] + bytes(40) + content[100:])
    elif how == "other size":
        Image.new("RGB", (WIDTH + 1, HEIGHT)).save(path)
    elif how == "floating point":
        Image.new("F", (WIDTH, HEIGHT)).save(path, "TIFF")
    elif how == "gone":
        path.unlink()


BROKEN = {
    "truncated": "truncated",
    "empty": r"3\.png: cannot identify image file$",
    "not an image": r"3\.png: cannot identify image file$",
    "corrupt": r"\w+",
    "other size": "the image is 21 x 12 pixels, the annotations say 20 x 12",
    "floating point": "floating-point",
    "gone": "no such file",
}


# A loader may take 5 seconds to end its workers after an error: two kinds are enough there.
@pytest.mark.parametrize(
    ("how", "workers"), [(how, 0) for how in BROKEN] + [("truncated", 1), ("gone", 1)]
)
def test_broken_images_are_named_in_one_line(folder: Path, how: str, workers: int) -> None:
    data = LVISDetection(annotations(), folder)
    break_image(folder / "3.png", how)
    with pytest.raises(ImageError) as caught:
        list(DataLoader(data, batch_size=1, num_workers=workers, collate_fn=collate))
    text = str(caught.value)
    assert text.startswith(f"{folder.resolve() / '3.png'}: ")
    assert "\n" not in text
    assert "Traceback" not in text
    with pytest.raises(ImageError, match=BROKEN[how]):
        data[1]
    assert str(pickle.loads(pickle.dumps(caught.value))) == text


@pytest.mark.parametrize("how", [how for how in BROKEN if how not in ("truncated", "corrupt")])
def test_headers_are_checked_without_decoding(
    folder: Path, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    data = LVISDetection(annotations(), folder)
    data.check_images()
    break_image(folder / "3.png", how)
    if how != "other size":  # its message asks for the orientation, for which Pillow decodes a PNG
        monkeypatch.setattr(Image.Image, "load", None)
    with pytest.raises(ImageError, match=BROKEN[how]):
        data.check_images()


def test_checking_headers_does_not_decode(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = LVISDetection(annotations(), folder)
    break_image(folder / "3.png", "truncated")

    def load(image: Image.Image) -> None:
        raise AssertionError("decoded")

    monkeypatch.setattr(PngImagePlugin.PngImageFile, "load", load)
    data.check_images()
    with pytest.raises(ImageError, match="decoded"):
        data[1]


@pytest.mark.parametrize("warn", ["ignore", "error"])
@pytest.mark.parametrize("limit", [WIDTH * HEIGHT - 1, WIDTH * HEIGHT // 3])
def test_bombs_are_refused_before_decoding(
    folder: Path, monkeypatch: pytest.MonkeyPatch, limit: int, warn: Any
) -> None:
    data = LVISDetection(annotations(), folder)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
    monkeypatch.setattr(Image.Image, "convert", None)
    with warnings.catch_warnings():
        warnings.simplefilter(warn)
        with pytest.raises(ImageError, match=r"3\.png: .*(limit of 239|240 pixels)"):
            data[1]
        with pytest.raises(ImageError, match=r"7\.png: .*(limit of 239|240 pixels)"):
            data.check_images()
    assert limit == Image.MAX_IMAGE_PIXELS
    monkeypatch.undo()
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
    data[1]


def test_a_script_can_end_with_one_line(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(json.dumps(annotations()))
    break_image(folder / "3.png", "truncated")
    script = f"""
import sys
sys.path.insert(0, {str(EXAMPLES)!r})
from detection_data import *
from torch.utils.data import DataLoader
try:
    data = LVISDetection({str(tmp_path / "a.json")!r}, {str(folder)!r})
    list(DataLoader(data, num_workers=1, collate_fn=collate))
except ImageError as error:
    raise SystemExit(f"error: {{error}}")
"""
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert result.returncode == 1
    assert result.stderr.count("\n") == 1
    assert result.stderr.startswith(f"error: {folder.resolve() / '3.png'}: ")


# --- drawing images ------------------------------------------------------------------------------


def content(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_drawing_is_deterministic_and_goes_on_where_it_was(tmp_path: Path) -> None:
    data = annotations()
    data["images"][0]["file_name"] = "sub/7.jpg"
    assert render_annotations.render(data, tmp_path / "a") == 3
    first = content(tmp_path / "a")
    assert set(first) == {"sub/7.jpg", "3.png", "5.png"}
    (tmp_path / "a" / "3.png").unlink()
    (tmp_path / "a" / "5.png").write_bytes(b"kept as it is")
    assert render_annotations.render(data, tmp_path / "a") == 1
    assert content(tmp_path / "a") == first | {"5.png": b"kept as it is"}
    assert render_annotations.render(data, tmp_path / "b") == 3
    assert content(tmp_path / "b") == first


def test_categories_look_the_same_in_every_image(tmp_path: Path) -> None:
    whole = [box(i, i, c, 0, 0, WIDTH, HEIGHT) for i, c in ((7, 2), (3, 2), (5, 40))]
    render_annotations.render(annotations(annotations=whole), tmp_path)
    seven, three, five = (np.asarray(Image.open(tmp_path / f"{i}.png")) for i in (7, 3, 5))
    assert (seven == three).all()
    assert (seven != five).any(axis=2).mean() > 0.9


def test_drawing_shows_masks_and_boxes_without_masks(tmp_path: Path) -> None:
    code = coco_mask.encode(np.asfortranarray(np.ones((HEIGHT, WIDTH), np.uint8)))
    rows = [
        box(1, 7, 2, 5, 4, 10, 6),
        box(2, 3, 2, 5, 4, 10, 6, segmentation=[]),
        box(3, 5, 2, 5, 4, 10, 6, segmentation={**code, "counts": code["counts"].decode()}),
    ]
    render_annotations.render(annotations(annotations=rows), tmp_path)
    render_annotations.render(annotations(annotations=[]), tmp_path / "empty")
    changed = {}
    for i in (7, 3, 5):
        drawn, empty = (
            np.asarray(Image.open(f / f"{i}.png")) for f in (tmp_path, tmp_path / "empty")
        )
        changed[i] = (drawn != empty).any(axis=2)
    expected = np.zeros((HEIGHT, WIDTH), bool)
    expected[4:10, 5:15] = True
    np.testing.assert_array_equal(changed[7], expected)
    np.testing.assert_array_equal(changed[3], expected)
    assert changed[5].all()


def test_a_run_that_is_stopped_leaves_no_half_image(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(self: Image.Image, path: Path, *args: Any, **options: Any) -> None:
        Path(path).write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(Image.Image, "save", stop)
    with pytest.raises(KeyboardInterrupt):
        render_annotations.render(annotations(), tmp_path)
    assert content(tmp_path) == {}


def test_drawing_refuses_before_it_draws(tmp_path: Path) -> None:
    for change, message in (
        ({"file_name": "a.exe"}, r"image 7 to be \.jpg, \.jpeg, \.png, got a\.exe"),
        ({"file_name": "3.png"}, r"got 3\.png twice"),
        ({"width": 10**6, "height": 10**6}, r"image 7 to have at most \d+ pixels"),
    ):
        with pytest.raises(ValueError, match=message):
            render_annotations.render(with_row("images", **change), tmp_path)
    with pytest.raises(ValueError, match="`segmentation` of annotation 1"):
        render_annotations.render(with_row("annotations", segmentation=[[1, 2]]), tmp_path)
    assert content(tmp_path) == {}


def test_drawing_does_not_follow_links_out(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "outside").mkdir()
    (tmp_path / "out" / "sub").symlink_to(tmp_path / "outside")
    data = annotations()
    data["images"][0]["file_name"] = "sub/7.png"
    with pytest.raises(ValueError, match="a link leads elsewhere"):
        render_annotations.render(data, tmp_path / "out")
    assert os.listdir(tmp_path / "outside") == []


def test_drawing_from_the_command_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "a.json").write_text(json.dumps(annotations()))
    out = tmp_path / "out"
    monkeypatch.setattr(sys, "argv", ["render", str(tmp_path / "a.json"), "--out", str(out)])
    render_annotations.main()
    assert capsys.readouterr().out == f"Drew 3 images into {out}\n"
    assert len(LVISDetection(annotations(), out)) == 3
    monkeypatch.setattr(sys, "argv", ["render", str(tmp_path / "b.json"), "--out", str(out)])
    assert render_annotations.main() == 2
    message = capsys.readouterr().err
    assert message.startswith(f"error: {tmp_path / 'b.json'}: Expected an annotation file")
    assert message.count("\n") == 1
    file = tmp_path / "a.json"
    assert render_annotations.main([str(file), "--out", str(file)]) == 2
    assert capsys.readouterr().err.startswith(f"error: {file}: expected a folder to write in")
