"""Detections as columns, and the files that hold them."""

import json
import pickle
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("pycocotools")
sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))

import results_json
from coco_masks import read_run_lengths
from detection_results import (
    Detections,
    Gatherer,
    ImageDetections,
    from_records,
    from_torchvision,
)
from evaluation_cases import rectangle
from mask_codes import Code, are_valid
from results_files import (
    ShardWriter,
    merge_shards,
    open_writer,
    read_results,
    shard_path,
)

IMAGE_IDS = [7, 3, 11]  # in the order of the file
CATEGORY_IDS = [5, 9, 2]
CODE = Code(20, 30, rectangle([2, 3, 10, 8], 20, 30)["counts"].encode())


def image(image_id: int, n: int = 3, *, masks: bool = False, seed: int = 0) -> ImageDetections:
    generator = np.random.default_rng([seed, image_id])
    return ImageDetections(
        image_id,
        generator.choice(CATEGORY_IDS, n).astype(np.int64),
        generator.uniform(0, 100, (n, 4)),
        generator.random(n),
        [CODE] * n if masks else None,
    )


def write(path: Path, images: list[ImageDetections], **options: Any) -> Path:
    with open_writer(path, IMAGE_IDS, CATEGORY_IDS, **options) as writer:
        for one in images:
            writer.append(one)
    return path


def read(path: Path, **options: Any) -> Detections:
    return read_results(path, IMAGE_IDS, CATEGORY_IDS, **options)


def rows(detections: Detections) -> list[Any]:
    """All detections of an image side by side, in an order that a format may change."""
    columns = (detections.image_ids, detections.category_ids, detections.scores, detections.boxes)
    return sorted(zip(*(column.tolist() for column in columns), strict=True))


def gathered(images: list[ImageDetections]) -> Detections:
    gatherer = Gatherer()
    for one in images:
        gatherer.add(one)
    return gatherer.finish()


# --- columns -------------------------------------------------------------------------------------


def record(**changes: Any) -> dict[str, Any]:
    return {"image_id": 7, "category_id": 5, "bbox": [1, 2, 3, 4], "score": 0.5, **changes}


def test_records_become_columns():
    mask = CODE.as_dict()
    found = from_records([record(segmentation=mask), record(image_id=3, segmentation=mask)])
    assert found.image_ids.tolist() == [7, 3]
    assert found.category_ids.tolist() == [5, 5]
    assert found.boxes.tolist() == [[1, 2, 3, 4]] * 2
    assert found.scores.tolist() == [0.5, 0.5]
    assert [found.masks[i] for i in range(2)] == [CODE, CODE]
    assert found.masks.sizes().tolist() == [[20, 30]] * 2


def test_no_records_are_no_detections():
    found = from_records([])
    assert len(found) == 0
    assert found.boxes.shape == (0, 4)
    assert found.masks is None


def test_plain_run_lengths_are_compressed():
    runs = read_run_lengths(CODE.as_dict(), 30, 20)
    found = from_records([record(segmentation={"size": [20, 30], "counts": runs.tolist()})])
    assert found.masks[0] == CODE


BAD_RECORDS = [
    ({"image_id": None}, "`image_id` of detection 1 .* got None"),
    ({"image_id": True}, "`image_id` of detection 1 .* got True"),
    ({"image_id": 2**63}, "`image_id` of detection 1"),
    ({"category_id": 5.0}, r"`category_id` of detection 1 .* got 5\.0"),
    ({"category_id": -1}, "`category_id` of detection 1 .* got -1"),
    ({"bbox": [1, 2, 3]}, r"`bbox` of detection 1 .* got \[1, 2, 3\]"),
    ({"bbox": [1, 2, 3, float("nan")]}, "`bbox` of detection 1 .* nan"),
    ({"bbox": [1, 2, 3, "4"]}, "`bbox` of detection 1 .* '4'"),
    ({"bbox": 10**400}, "`bbox` of detection 1"),
    ({"score": float("inf")}, "`score` of detection 1 .* inf"),
    ({"score": "0.5"}, "`score` of detection 1 .* got '0.5'"),
    ({"score": 10**400}, "`score` of detection 1"),
]


@pytest.mark.parametrize(("changes", "message"), BAD_RECORDS, ids=[m for _, m in BAD_RECORDS])
def test_a_bad_record_is_named(changes, message):
    with pytest.raises(ValueError, match=message):
        from_records([record(), record(**changes), record()])


BAD_MASKS = [
    ([[1, 2, 3, 4, 5, 6]], "Expected run lengths"),
    ({"size": [20], "counts": "01"}, "`size`"),
    ({"size": [20, 0], "counts": "01"}, "`size`"),
    ({"size": [20, 30], "counts": None}, "`counts`"),
    ({"size": [20, 30], "counts": "é"}, "ASCII"),
    ({"size": [20, 30], "counts": ""}, "to hold run lengths"),
    ({"size": [20, 31], "counts": CODE.counts}, "add up to 20 x 31"),
    ({"size": [20, 30], "counts": CODE.counts[:-1]}, "add up to|corrupt"),
    ({"size": [20, 30], "counts": "\x01\x02"}, "corrupt"),
    ({"size": [20, 30], "counts": [10, 20]}, "add up to"),
]


@pytest.mark.parametrize(("mask", "message"), BAD_MASKS, ids=[m for _, m in BAD_MASKS])
def test_a_bad_mask_is_named(mask, message):
    good = record(segmentation=CODE.as_dict())
    with pytest.raises(ValueError, match=f"`segmentation` of detection 1: .*{message}"):
        from_records([good, record(segmentation=mask)])


def test_masks_come_with_all_detections_or_with_none():
    some = record(segmentation=CODE.as_dict())
    with pytest.raises(ValueError, match="got one without at detection 1"):
        from_records([some, record()])
    with pytest.raises(ValueError, match="got a detection with at detection 1"):
        from_records([record(), some])


@st.composite
def codes(draw: st.DrawFn) -> tuple[int, int, bytes]:
    """A mask, sometimes with a byte changed or a size that is not its own."""
    from pycocotools import mask as coco_mask

    height, width = draw(st.integers(1, 9)), draw(st.integers(1, 9))
    pixels = draw(st.binary(min_size=height * width, max_size=height * width))
    inside = (np.frombuffer(pixels, np.uint8).reshape(height, width) > 99).astype(np.uint8)
    counts = bytearray(coco_mask.encode(np.asfortranarray(inside))["counts"])
    if draw(st.booleans()):
        counts[draw(st.integers(0, len(counts) - 1))] = draw(st.integers(0, 127))
    return height, width + draw(st.integers(0, 1)), bytes(counts)


@given(st.lists(codes(), max_size=8))
def test_masks_are_valid_if_reading_each_says_so(some):
    def is_read(code: tuple[int, int, bytes]) -> bool:
        height, width, counts = code
        try:
            read_run_lengths({"size": [height, width], "counts": counts}, width, height)
        except ValueError:
            return False
        return True

    assert are_valid(some).tolist() == [is_read(code) for code in some]


def test_a_detectors_output():
    masks = torch.zeros(1, 1, 20, 30)
    masks[0, 0, 3:11, 2:12] = 0.5
    output = {
        "boxes": torch.tensor([[1.0, 2.0, 4.0, 8.0]], dtype=torch.float64),
        "scores": torch.tensor([0.25]),
        "labels": torch.tensor([2]),
        "masks": masks,
    }
    found = from_torchvision(7, output, [5, 9])
    assert [*found.records()] == [
        record(
            category_id=9,
            bbox=[1, 2, 3, 6],
            score=0.25,
            segmentation={"size": [20, 30], "counts": CODE.counts.decode()},
        )
    ]
    assert output["boxes"].tolist() == [[1, 2, 4, 8]]
    empty = from_torchvision(7, {key: value[:0] for key, value in output.items()}, [5, 9])
    assert [*empty.records()] == []


# --- files ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("masks", [False, True], ids=["boxes", "masks"])
@pytest.mark.parametrize("suffix", [".json", ".pkl"])
def test_what_is_written_is_read(tmp_path, suffix, masks):
    images = [image(7, masks=masks), image(3, 0, masks=masks), image(11, 5, masks=masks)]
    found = read(write(tmp_path / f"r{suffix}", images))
    expected = gathered(images)
    assert len(found) == 8
    for one, other in zip(rows(found), rows(expected), strict=True):
        # x2 = x + width - 1 is rounded.
        assert np.allclose([*one[:3], *one[3]], [*other[:3], *other[3]], rtol=0, atol=1e-12)
    if masks:
        assert {found.masks[i] for i in range(8)} == {CODE}
    if suffix == ".json":
        assert rows(found) == rows(expected)
        assert found.image_ids.tolist() == expected.image_ids.tolist()


def test_json_has_a_detection_to_a_line_and_is_what_lvis_reads(tmp_path):
    images = [image(7, masks=True), image(3, 2, masks=True)]
    path = write(tmp_path / "r.json", images)
    lines = path.read_text().splitlines()
    assert (lines[0], lines[-1], len(lines)) == ("[", "]", 7)
    assert json.loads(path.read_text()) == [row for one in images for row in one.records()]


@pytest.mark.parametrize("suffix", [".json", ".pkl"])
def test_no_detections_at_all(tmp_path, suffix):
    assert len(read(write(tmp_path / f"r{suffix}", []))) == 0


@pytest.mark.parametrize("block", [1, 2, 7, 64, 2**20])
@pytest.mark.parametrize("indent", [None, 0, 3], ids=str)
def test_any_json_list_is_read_in_blocks_of_any_size(tmp_path, monkeypatch, block, indent):
    monkeypatch.setattr(results_json, "BLOCK", block)
    records = [row for one in (image(7), image(3)) for row in one.records()]
    records[1]["extra"] = ["]", '\\"}', {"a": []}, "é" * 9]
    path = tmp_path / "r.json"
    path.write_text("\ufeff \n" + json.dumps(records, indent=indent, ensure_ascii=False) + " \n")
    assert rows(read(path)) == rows(gathered([image(7), image(3)]))


BAD_JSON = [
    ("", "Expected a JSON list of detections, got the end of the file"),
    ('{"annotations": []}', "Expected a JSON list of detections, got '{\"annotations"),
    ("[", "Expected detection 0 as JSON, .* truncated"),
    ("[1]", "Expected detection 0 to be an object, got '1]'"),
    ("[{}", "Expected `,` or `]` after detection 0, got the end of the file"),
    ("[{} {}]", "Expected `,` or `]` after detection 0, got '{}]'"),
    ("[{}]x", "Expected nothing after the list, got 'x'"),
    ('[{"a": 1, }]', 'Expected detection 0 as JSON, got .*\'{"a": 1'),
    ('[{"image_id": 1', "Expected detection 0 as JSON, .* truncated"),
    ("[{}]", "`image_id` of detection 0 .* got None"),
    ('[{"a": ' + "[" * 100_000, "nested too deeply"),
    (b"[\xff", "Expected JSON in UTF-8"),
]


@pytest.mark.parametrize(("content", "message"), BAD_JSON, ids=[m[:40] for _, m in BAD_JSON])
def test_bad_json_is_named_with_its_file(tmp_path, content, message):
    path = tmp_path / "r.json"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError, match=rf"r\.json: .*{message}"):
        read(path)


def test_bad_records_are_numbered_over_the_whole_file(tmp_path, monkeypatch):
    monkeypatch.setattr(results_json, "CHUNK", 2)
    path = tmp_path / "r.json"
    path.write_text(json.dumps([record()] * 5 + [record(score=None)]))
    with pytest.raises(ValueError, match=r"r\.json: Expected `score` of detection 5 .* None"):
        read(path)


def test_other_names_are_no_results(tmp_path):
    with pytest.raises(ValueError, match=r"end in \.json or \.pkl, got .*r\.txt"):
        read(tmp_path / "r.txt")


# --- the original's format -----------------------------------------------------------------------


def original(masks: bool = False) -> list[Any]:
    """Images 7, 3, 11; categories 5, 9, 2, as mmdetection 1 has them."""
    none = np.zeros((0, 5), np.float32)
    boxes = np.array([[10, 10, 19, 29, 0.5], [0, 0, 4, 4, 0.25]], np.float32)
    items = [[none, boxes, none], [none, none, none], [boxes[:1], none, boxes[1:]]]
    if not masks:
        return items
    return [(item, [[CODE.as_dict()] * len(rows) for rows in item]) for item in items]


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
@pytest.mark.parametrize("masks", [False, True], ids=["boxes", "masks"])
@pytest.mark.parametrize(("legacy", "one"), [(True, 1), (False, 0)], ids=["legacy", "plain"])
def test_results_of_the_original_are_read(tmp_path, protocol, masks, legacy, one):
    path = tmp_path / "r.pkl"
    path.write_bytes(pickle.dumps(original(masks), protocol))
    found = read(path, legacy_widths=legacy)
    assert found.image_ids.tolist() == [7, 7, 11, 11]
    assert found.category_ids.tolist() == [9, 9, 5, 2]
    assert found.scores.tolist() == [0.5, 0.25, 0.5, 0.25]
    assert found.boxes[:2].tolist() == [[10, 10, 9 + one, 19 + one], [0, 0, 4 + one, 4 + one]]
    assert (found.masks is not None) == masks


@pytest.mark.parametrize("masks", [False, True], ids=["boxes", "masks"])
def test_what_is_written_is_a_pickle_in_the_format_of_the_original(tmp_path, masks):
    path = tmp_path / "original.pkl"
    path.write_bytes(pickle.dumps(original(masks), 2))
    found = read(path)
    images = []
    for image_id in (7, 11):
        chosen = np.flatnonzero(found.image_ids == image_id)
        columns = (found.category_ids[chosen], found.boxes[chosen], found.scores[chosen])
        images.append(ImageDetections(image_id, *columns, [CODE] * 2 if masks else None))
    written = pickle.loads(write(tmp_path / "ours.pkl", images).read_bytes())
    assert len(written) == 3
    for one, other in zip(written, original(masks), strict=True):
        if masks:
            assert one[1] == other[1]
            one, other = one[0], other[0]
        for ours, theirs in zip(one, other, strict=True):
            assert ours.shape == theirs.shape
            np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({}, "list over images, got dict"),
        (original()[:2], "results of the 3 images of the annotations, got 2 images"),
        ([*original(), original()[0]], "3 images of the annotations, got 4 images"),
        ([[], [], []], "boxes of image 0 .* over the 3 categories of the annotations, got 0"),
        ([None] * 3, "boxes of image 0 .* got None"),
        ([[None] * 3] * 3, "category 5, as a float array .* got None"),
        ([[np.zeros((1, 4))] * 3] * 3, r"as a float array \[n, 5\], got float64 \[1, 4\]"),
        ([[np.zeros((1, 5), int)] * 3] * 3, "as a float array .* got int64"),
        ([[np.full((1, 5), np.nan)] * 3] * 3, "image 0 .* to be finite"),
        ([(original()[0], [[], [], []])] * 3, "list of 2 masks of image 0 .* category 9, .* got 0"),
        ([(original()[0], None)] * 3, "Expected masks of image 0 .* got None"),
        ([(original()[0], [[], [{}, {}], []])] * 3, "`segmentation` of detection 0: .*image 0"),
    ],
    ids=[
        "dict",
        "too few",
        "too many",
        "no categories",
        "no lists",
        "no arrays",
        "columns",
        "integers",
        "nan",
        "missing masks",
        "no masks",
        "bad masks",
    ],
)
def test_pickles_of_other_content(tmp_path, content, message):
    path = tmp_path / "r.pkl"
    path.write_bytes(pickle.dumps(content))
    with pytest.raises(ValueError, match=rf"r\.pkl: .*({message})"):
        read(path)


@pytest.mark.parametrize("part", [0.1, 0.5, 0.9, -1])
def test_a_truncated_pickle_of_ours(tmp_path, part):
    path = write(tmp_path / "r.pkl", [image(7), image(3), image(11)])
    content = path.read_bytes()
    path.write_bytes(content[: part if part < 0 else int(part * len(content))])
    with pytest.raises(ValueError, match=r"r\.pkl: Expected .* truncated"):
        read(path)


def test_a_pickle_of_ours_is_read_no_less_carefully(tmp_path):
    path = write(tmp_path / "r.pkl", [image(7)])
    content = path.read_bytes()
    item = b"cos\nsystem\nX\x04\x00\x00\x00true\x85R"
    begin = content[:4] + b"J" + len(item).to_bytes(4, "little") + b"0" + item
    path.write_bytes(begin + b"e.")
    with pytest.raises(ValueError, match=r"got os\.system; nothing of it was run"):
        read(path)


# --- writing -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"boxes": np.zeros((2, 4))}, r"`boxes` of image 7 as f8 \[3, 4\], got f8 \[2, 4\]"),
        ({"boxes": np.zeros((3, 4), np.float32)}, r"got f4 \[3, 4\]"),
        ({"scores": np.array([0.5, np.nan, 1])}, "`scores` of image 7 to be finite"),
        ({"category_ids": np.array([5, 9, 77])}, "a category of the annotations, got 77"),
        ({"image_id": 8}, "an image of the annotations, got image 8"),
        ({"masks": [CODE]}, "3 masks of image 7, got 1"),
        ({"masks": [CODE, CODE, Code(1, 1, b"2")]}, "masks of image 7 in COCO's"),
    ],
    ids=["rows", "float32", "nan", "category", "image", "number of masks", "mask"],
)
def test_what_is_not_valid_is_not_written(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        write(tmp_path / "r.pkl", [image(7)._replace(**changes)])
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("suffix", [".json", ".pkl"])
def test_an_image_comes_once(tmp_path, suffix):
    with pytest.raises(ValueError, match="each image once, got image 7 again"):
        write(tmp_path / f"r{suffix}", [image(7), image(7)])


def test_a_pickle_wants_images_in_order(tmp_path):
    with pytest.raises(ValueError, match="in the order of the annotations, got image 7 late"):
        write(tmp_path / "r.pkl", [image(3), image(7)])


def test_a_block_that_fails_leaves_an_older_file_as_it_was(tmp_path):
    path = write(tmp_path / "r.json", [image(7)])
    before = path.read_bytes()
    with pytest.raises(ValueError, match="again"):
        write(path, [image(3), image(3)])
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


# --- shards --------------------------------------------------------------------------------------


def write_shards(folder: Path, images: list[ImageDetections], world_size: int) -> None:
    for rank in range(world_size):
        with ShardWriter(folder, rank, world_size) as writer:
            for i in range(rank, len(images), world_size):
                writer.append(images[i])


@pytest.mark.parametrize("world_size", [1, 2, 3, 5])
@pytest.mark.parametrize("suffix", [".json", ".pkl"])
@pytest.mark.parametrize("masks", [False, True], ids=["boxes", "masks"])
def test_merged_shards_are_the_file_of_one_process(tmp_path, world_size, suffix, masks):
    images = [image(7, 4, masks=masks), image(3, 0, masks=masks), image(11, masks=masks)]
    write_shards(tmp_path, images, world_size)
    with open_writer(tmp_path / f"r{suffix}", IMAGE_IDS, CATEGORY_IDS) as writer:
        merge_shards(tmp_path, world_size, IMAGE_IDS, writer)
    one = write(tmp_path / f"one{suffix}", images)
    assert (tmp_path / f"r{suffix}").read_bytes() == one.read_bytes()


def merge(folder: Path, world_size: int) -> None:
    with open_writer(folder / "r.json", IMAGE_IDS, CATEGORY_IDS) as writer:
        merge_shards(folder, world_size, IMAGE_IDS, writer)


def test_shards_that_lack_an_image(tmp_path):
    write_shards(tmp_path, [image(7), image(3)], 2)
    with pytest.raises(ValueError, match="all 3 images in the shards, got none of image 11"):
        merge(tmp_path, 2)
    assert not (tmp_path / "r.json").exists()


def test_shards_with_an_image_twice(tmp_path):
    images = [image(7), image(3), image(11)]
    for rank in range(2):
        with ShardWriter(tmp_path, rank, 2) as writer:
            for one in images[rank:]:
                writer.append(one)
    with pytest.raises(ValueError, match="each image once, got image 3 again"):
        merge(tmp_path, 2)


def test_a_shard_that_is_missing(tmp_path):
    write_shards(tmp_path, [image(7), image(3), image(11)], 2)
    shard_path(tmp_path, 1, 2).unlink()
    with pytest.raises(FileNotFoundError, match=r"shard-1-of-2.* found nothing there"):
        merge(tmp_path, 2)


@pytest.mark.parametrize("keep", [-1, -3, 40, 0])
def test_a_shard_that_is_cut(tmp_path, keep):
    write_shards(tmp_path, [image(7), image(3), image(11)], 2)
    path = shard_path(tmp_path, 0, 2)
    content = path.read_bytes().rstrip()
    path.write_bytes(content[:keep])
    with pytest.raises(ValueError, match=r"shard-0-of-2.* not complete"):
        merge(tmp_path, 2)


def test_images_out_of_order_in_a_shard(tmp_path):
    with ShardWriter(tmp_path, 0, 1) as writer:
        writer.append(image(3))
        writer.append(image(7))
    with pytest.raises(ValueError, match="images of the annotations in their order, got 7"):
        merge(tmp_path, 1)


@pytest.mark.parametrize("rank", [-1, 2])
def test_a_rank_that_does_not_exist(tmp_path, rank):
    with pytest.raises(ValueError, match=rf"`rank` in \[0, 2\), got {rank}"):
        ShardWriter(tmp_path, rank, 2)
