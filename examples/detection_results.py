"""Detections of many images: a column per field, gathered image by image, masks kept on disk."""

import os
import reprlib
import tempfile
from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

import numpy as np
import torch
from annotation_fields import is_number, read_boxes
from mask_codes import Code, are_valid, read_codes
from run_folder import partial_path
from torch import Tensor

CHUNK = 50_000  # records that are turned into columns at once


class ImageDetections(NamedTuple):
    """What a detector found in one image, n detections."""

    image_id: int
    category_ids: np.ndarray  # int64 [n]
    boxes: np.ndarray  # float64 [n, 4]: x, y, width, height
    scores: np.ndarray  # float64 [n]
    masks: Sequence[Code] | None = None

    def records(self) -> Iterator[dict[str, Any]]:
        """Yield the detections in the format of LVIS results."""
        columns = (self.category_ids.tolist(), self.boxes.tolist(), self.scores.tolist())
        for i, (category, box, score) in enumerate(zip(*columns, strict=True)):
            record = {
                "image_id": self.image_id,
                "category_id": category,
                "bbox": box,
                "score": score,
            }
            if self.masks is not None:
                height, width, counts = self.masks[i]
                record["segmentation"] = {"size": [height, width], "counts": counts.decode()}
            yield record


class MaskStore:
    """Compressed run lengths in a file without a name, for they may not fit in memory."""

    def __init__(self) -> None:
        self._file = tempfile.TemporaryFile()  # open as long as the store
        self._ends = array("q", [0])
        self._sizes = array("q")

    def __len__(self) -> int:
        return len(self._ends) - 1

    def extend(self, codes: Sequence[Code]) -> None:
        self._file.seek(0, os.SEEK_END)
        self._file.write(b"".join(code.counts for code in codes))
        for height, width, counts in codes:
            self._ends.append(self._ends[-1] + len(counts))
            self._sizes.extend((height, width))

    def __getitem__(self, row: int) -> Code:
        self._file.seek(self._ends[row])
        counts = self._file.read(self._ends[row + 1] - self._ends[row])
        return Code(self._sizes[2 * row], self._sizes[2 * row + 1], counts)

    def sizes(self) -> np.ndarray:
        """Return heights and widths, int64 [N, 2]."""
        return np.array(self._sizes, np.int64).reshape(-1, 2)


@dataclass(frozen=True)
class Detections:
    """Detections of many images, N in all, in the order of their file."""

    image_ids: np.ndarray  # int64 [N]
    category_ids: np.ndarray  # int64 [N]
    boxes: np.ndarray  # float64 [N, 4]: x, y, width, height
    scores: np.ndarray  # float64 [N]
    masks: MaskStore | None = None
    name: str = "detections"  # in error messages

    def __len__(self) -> int:
        return len(self.scores)

    def code(self, row: int) -> Code:
        """Return the mask of a detection."""
        if self.masks is None:
            raise ValueError(f"{self.name}: Expected detections with masks, got none")
        return self.masks[row]


class Gatherer:
    """Collects detections into columns."""

    def __init__(self, name: str = "detections") -> None:
        self.name = name
        self._columns: list[list[np.ndarray]] = [[], [], [], []]
        self._masks: MaskStore | None = None
        self._count = 0

    def add(self, image: ImageDetections) -> None:
        """Take the detections of an image, which :func:`check_image` has seen."""
        ids = np.full(len(image.scores), image.image_id, np.int64)
        self._extend(ids, image.category_ids, image.boxes, image.scores, masks=image.masks)

    def add_records(self, records: Sequence[Mapping[str, Any]]) -> None:
        """Take detections in the format of LVIS results.

        Raises:
            ValueError: A record is not valid; the message names it by its number in the file,
                counted from 0.
        """
        for row in range(0, len(records), CHUNK):
            self._add_chunk(records[row : row + CHUNK])

    def _add_chunk(self, records: Sequence[Mapping[str, Any]]) -> None:
        columns = _columns(records)
        if columns is None:  # something is wrong, or unusual: look at each
            for i, record in enumerate(records):
                _check_record(record, self._count + i)
            columns = (
                _integers([record["image_id"] for record in records]),
                _integers([record["category_id"] for record in records]),
                read_boxes(records),
                np.array([float(record["score"]) for record in records]),
            )
        self._extend(*columns, masks=self._codes(records))

    def _codes(self, records: Sequence[Mapping[str, Any]]) -> list[Code] | None:
        having = ["segmentation" in record for record in records]
        expected = having[0] if self._count == 0 else self._masks is not None
        if not all(has == expected for has in having):
            number = self._count + having.index(not expected)
            what = "a detection with" if not expected else "one without"
            raise ValueError(
                "Expected `segmentation` in every detection or in none, "
                f"got {what} at detection {number}"
            )
        if not expected:
            return None
        return read_codes([record["segmentation"] for record in records], self._count)

    def _extend(self, *columns: np.ndarray, masks: Sequence[Code] | None) -> None:
        if not len(columns[-1]):
            return
        if self._count and (self._masks is None) != (masks is None):
            raise ValueError("Expected masks with all detections or with none, got both")
        for gathered, column in zip(self._columns, columns, strict=True):
            gathered.append(column)
        self._count += len(columns[-1])
        if masks is not None:
            self._masks = self._masks or MaskStore()
            self._masks.extend(masks)

    def finish(self) -> Detections:
        """Return all that was taken; the gatherer is empty after that."""
        joined = []
        for gathered, empty in zip(self._columns, _empty_columns(), strict=True):
            joined.append(np.concatenate([empty, *gathered]))
            gathered.clear()  # now rather than at the end: there may be a gigabyte of them
        masks, self._masks, self._count = self._masks, None, 0
        images, categories, boxes, scores = joined
        return Detections(images, categories, boxes, scores, masks=masks, name=self.name)


class ResultsWriter:
    """Writes detections to a file image by image: under a temporary name, moved when complete.

    To be used with `with`. A block that ends by an exception leaves nothing behind.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._partial = partial_path(path)
        self._file = self._partial.open("xb")
        self._seen: set[int] = set()

    def append(self, image: ImageDetections) -> None:
        """Write the detections of an image; each image comes once, also without detections.

        Raises:
            ValueError: The detections are not valid, or the image has come before.
        """
        check_image(image)
        if image.image_id in self._seen:
            raise ValueError(f"Expected each image once, got image {image.image_id} again")
        self._write(image)
        self._seen.add(image.image_id)

    def _write(self, image: ImageDetections) -> None:
        raise NotImplementedError

    def _end(self) -> None:
        """Write what stands after the last image."""

    def __enter__(self) -> "ResultsWriter":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            if kind is None:
                self._end()
            self._file.close()
            if kind is None:
                self._partial.replace(self.path)
        finally:
            self._file.close()
            self._partial.unlink(missing_ok=True)


def from_records(records: Iterable[Mapping[str, Any]], name: str = "detections") -> Detections:
    """Return detections in the format of LVIS results as columns.

    Raises:
        ValueError: A record is not valid.
    """
    gatherer = Gatherer(name)
    gatherer.add_records(list(records))
    return gatherer.finish()


def from_torchvision(
    image_id: int, output: Mapping[str, Tensor], category_ids: Sequence[int]
) -> ImageDetections:
    """Return a torchvision detector's output for an image; masks are cut at 0.5.

    Args:
        image_id: Of the annotation file.
        output: `boxes` [N, 4] (x1, y1, x2, y2), `scores` [N], `labels` [N] in 1..C, and perhaps
            `masks` [N, 1, height, width] of the image's size.
        category_ids: Of labels 1..C.
    """
    boxes = output["boxes"].double().cpu()
    boxes = torch.cat([boxes[:, :2], boxes[:, 2:] - boxes[:, :2]], 1)
    masks = None
    if "masks" in output:
        from pycocotools import mask as coco_mask

        masks = []
        for mask in output["masks"]:
            inside = (mask[0] >= 0.5).cpu().numpy()
            code = coco_mask.encode(np.asfortranarray(inside, np.uint8))
            masks.append(Code(inside.shape[0], inside.shape[1], code["counts"]))
    return ImageDetections(
        image_id,
        np.array(category_ids, np.int64)[output["labels"].cpu().numpy() - 1],
        boxes.numpy(),
        output["scores"].double().cpu().numpy(),
        masks,
    )


def check_image(image: ImageDetections) -> None:
    """Check the columns of one image.

    Raises:
        ValueError: The columns are not finite numbers of these shapes and types, or masks do not
            decode.
    """
    n, where = len(image.scores), f"of image {image.image_id}"
    wanted = {"category_ids": ((n,), "i"), "boxes": ((n, 4), "f"), "scores": ((n,), "f")}
    for key, (shape, kind) in wanted.items():
        value = getattr(image, key)
        if value.shape != shape or value.dtype.kind != kind or value.dtype.itemsize != 8:
            raise ValueError(
                f"Expected `{key}` {where} as {kind}8 {list(shape)}, "
                f"got {value.dtype.str[1:]} {list(value.shape)}"
            )
        if not np.isfinite(value).all():
            raise ValueError(f"Expected `{key}` {where} to be finite, got {reprlib.repr(value)}")
    if image.masks is not None:
        if len(image.masks) != n:
            raise ValueError(f"Expected {n} masks {where}, got {len(image.masks)}")
        if not are_valid(image.masks).all():
            raise ValueError(f"Expected masks {where} in COCO's compressed form")


def _columns(records: Sequence[Mapping[str, Any]]) -> tuple[np.ndarray, ...] | None:
    """Return the columns of records, or None if these are not all of the usual types."""
    try:
        images = [record["image_id"] for record in records]
        categories = [record["category_id"] for record in records]
        boxes = np.array([record["bbox"] for record in records])
        scores = [record["score"] for record in records]
        if not (
            set(map(type, images)) <= {int}
            and set(map(type, categories)) <= {int}
            and set(map(type, scores)) <= {int, float}
            and boxes.dtype.kind in "iuf"
            and boxes.shape[1:] == (4,)
            and np.isfinite(boxes).all()
        ):
            return None
        numbers = np.array(scores, np.float64)
        if not np.isfinite(numbers).all():
            return None
        columns = _integers(images), _integers(categories), boxes.astype(np.float64), numbers
        return columns if min([*images, *categories], default=0) >= 0 else None
    except (AttributeError, IndexError, KeyError, OverflowError, TypeError, ValueError):
        return None


def _check_record(record: Any, number: int) -> None:
    if not isinstance(record, Mapping):
        raise ValueError(f"Expected detection {number} to be an object, got {reprlib.repr(record)}")
    for key in ("image_id", "category_id"):
        value = record.get(key)
        if not isinstance(value, int | np.integer) or value is True or not 0 <= value < 2**63:
            raise ValueError(
                f"Expected `{key}` of detection {number} to be an integer in [0, 2**63), "
                f"got {reprlib.repr(value)}"
            )
    box = record.get("bbox")
    if not (isinstance(box, list | tuple) and len(box) == 4 and all(map(is_number, box))):
        raise ValueError(
            f"Expected `bbox` of detection {number} to be 4 finite numbers, got {reprlib.repr(box)}"
        )
    if not is_number(record.get("score")):
        raise ValueError(
            f"Expected `score` of detection {number} to be finite, "
            f"got {reprlib.repr(record.get('score'))}"
        )


def _integers(values: Sequence[Any]) -> np.ndarray:
    return np.array(values, np.int64)


def _empty_columns() -> tuple[np.ndarray, ...]:
    integers, floats = np.zeros(0, np.int64), np.zeros(0)
    return integers, integers, floats.reshape(0, 4), floats
