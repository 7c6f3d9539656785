"""The format of the original's results, that of mmdetection 1: one pickle.

It is a list over images, in the order of the annotation file, of lists over categories, in the
order of that file, of float arrays [n, 5] with x1, y1, x2, y2, score; or, where there are masks, of
pairs (such a list, a list over categories of lists of run-length codes).

mmdetection 1 counts pixels: a box from 10 to 12 is 3 wide. A file does not say so, thus
`legacy_widths` has to: with it, width = x2 - x1 + 1, as in the original; without it, x2 - x1, as in
mmdetection 2 and 3. Files are written with the same choice.

A file that is written here is a pickle like any other, but has before each image its length, as a
number that a pickle drops, so that it is written and read one image at a time. Files of others are
read whole.
"""

import io
import os
import pickle
import reprlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from detection_results import (
    Detections,
    Gatherer,
    ImageDetections,
    ResultsWriter,
)
from mask_codes import Code, read_codes
from tqdm import tqdm

from balanced_group_softmax.legacy import safe_pickle

# Protocol 3 names the place in the memo at each use, so that pickles can stand one after the other.
_PROTOCOL = pickle.PROTO + bytes([3])
_BEGIN = _PROTOCOL + pickle.EMPTY_LIST + pickle.MARK
_END = pickle.APPENDS + pickle.STOP


class PickleWriter(ResultsWriter):
    """Writes the original's format, one image at a time.

    Args:
        path: Of the file.
        image_ids: All images in the order of the annotation file. They have to come in that
            order; those that do not come have no detections.
        category_ids: All categories in the order of the annotation file.
        legacy_widths: Write x2 = x1 + width - 1.
    """

    def __init__(
        self,
        path: Path,
        image_ids: Sequence[int],
        category_ids: Sequence[int],
        *,
        legacy_widths: bool = True,
    ) -> None:
        super().__init__(path)
        self._places = {image_id: i for i, image_id in enumerate(image_ids)}
        self._categories = {category_id: i for i, category_id in enumerate(category_ids)}
        self._one = 1.0 if legacy_widths else 0.0
        self._written = 0
        self._with_masks: bool | None = None
        self._file.write(_BEGIN)

    def _write(self, image: ImageDetections) -> None:
        place = self._places.get(image.image_id)
        if place is None:
            raise ValueError(f"Expected an image of the annotations, got image {image.image_id}")
        if place < self._written:
            raise ValueError(
                f"Expected images in the order of the annotations, got image {image.image_id} late"
            )
        with_masks = image.masks is not None
        if self._with_masks is None:
            self._with_masks = with_masks
        elif with_masks != self._with_masks:
            raise ValueError(
                f"Expected masks in all images or in none, got the other in image {image.image_id}"
            )
        self._fill(place)
        self._write_item(self._item(image))
        self._written = place + 1

    def _fill(self, place: int) -> None:
        for _ in range(self._written, place):
            self._write_item(self._with_no_detections())

    def _end(self) -> None:
        self._fill(len(self._places))
        self._file.write(_END)

    def _write_item(self, item: Any) -> None:
        content = pickle.dumps(item, 3)[len(_PROTOCOL) : -len(pickle.STOP)]
        length = pickle.BININT + len(content).to_bytes(4, "little") + pickle.POP
        self._file.write(length + content)

    def _with_no_detections(self) -> Any:
        boxes = [np.zeros((0, 5))] * len(self._categories)  # one array: pickled once
        return (boxes, [[] for _ in boxes]) if self._with_masks else boxes

    def _item(self, image: ImageDetections) -> Any:
        item = self._with_no_detections()
        boxes, masks = item if self._with_masks else (item, None)
        x, y, width, height = image.boxes.T
        rows = np.stack([x, y, x + width - self._one, y + height - self._one, image.scores], axis=1)
        for category in np.unique(image.category_ids).tolist():
            place = self._categories.get(category)
            if place is None:
                raise ValueError(f"Expected a category of the annotations, got {category}")
            chosen = np.flatnonzero(image.category_ids == category)
            boxes[place] = rows[chosen]
            if masks is not None and image.masks is not None:
                masks[place] = [_own_dict(image.masks[i]) for i in chosen.tolist()]
        return item


def _own_dict(code: Code) -> dict[str, Any]:
    """Return a mask that shares nothing: a pickle says what is the same object elsewhere in it."""
    return {"size": [code.height, code.width], "counts": bytes(bytearray(code.counts))}


def read_pickle(
    path: Path,
    image_ids: Sequence[int],
    category_ids: Sequence[int],
    *,
    legacy_widths: bool = True,
    progress: bool = False,
) -> Detections:
    """Read a file in the original's format; nothing that it may hold is run.

    Args:
        path: Of the file.
        image_ids: All images in the order of the annotation file.
        category_ids: All categories in the order of the annotation file.
        legacy_widths: Width is x2 - x1 + 1.
        progress: Show a bar.

    Raises:
        OSError: The file cannot be read.
        ValueError: It is not of this format, or of other images or categories.
    """
    gatherer = Gatherer(str(path))
    count = 0
    try:
        with path.open("rb") as file:
            for item in tqdm(
                _items(file),
                total=len(image_ids),
                desc=f"Reading {path.name}",
                unit="image",
                disable=not progress,
            ):
                if count < len(image_ids):
                    gatherer.add(_image(item, count, image_ids[count], category_ids, legacy_widths))
                count += 1
        if count != len(image_ids):
            raise ValueError(
                f"Expected results of the {len(image_ids)} images of the annotations, "
                f"got {count} images"
            )
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    return gatherer.finish()


def _items(file: BinaryIO) -> Iterator[Any]:
    """Yield the images of a file, one at a time where it has been written here."""
    beginning = file.read(len(_BEGIN) + 1)
    file.seek(0)
    if beginning in (_BEGIN + pickle.BININT, _BEGIN + pickle.APPENDS):
        yield from _own_items(file)
        return
    items = safe_pickle.load(file)
    if not isinstance(items, list):
        raise ValueError(f"Expected a list over images, got {type(items).__name__}")
    items.reverse()
    while items:
        yield items.pop()  # what has been read can be freed


def _own_items(file: BinaryIO) -> Iterator[Any]:
    size = os.fstat(file.fileno()).st_size
    file.seek(len(_BEGIN))
    cut = "the file is truncated or has been changed"
    while (mark := file.read(1)) == pickle.BININT:
        length = int.from_bytes(file.read(4), "little")
        if file.read(1) != pickle.POP or length > size - file.tell():
            raise ValueError(f"Expected the length of an image's results; {cut}")
        content = file.read(length)
        yield safe_pickle.load(io.BytesIO(_PROTOCOL + content + pickle.STOP))
    if mark + file.read() != _END:
        raise ValueError(f"Expected another image or the end; {cut}")


def _image(
    item: Any, number: int, image_id: int, category_ids: Sequence[int], legacy_widths: bool
) -> ImageDetections:
    """Return an image's results as columns."""
    where = f"of image {number} (counted from 0)"
    boxes, masks = item if isinstance(item, tuple) and len(item) == 2 else (item, None)
    lists = {"boxes": boxes, "masks": masks} if isinstance(item, tuple) else {"boxes": boxes}
    for key, value in lists.items():
        if not isinstance(value, list) or len(value) != len(category_ids):
            got = f"{len(value)}" if isinstance(value, list) else reprlib.repr(value)
            raise ValueError(
                f"Expected {key} {where} as a list over the {len(category_ids)} categories of the "
                f"annotations, got {got}"
            )
    counts, rows = _rows(boxes, category_ids, where)
    codes = None if masks is None else _codes(masks, counts, category_ids, where)
    one = 1.0 if legacy_widths else 0.0
    corner, far = rows[:, :2], rows[:, 2:4]
    return ImageDetections(
        image_id,
        np.repeat(np.array(category_ids, np.int64), counts),
        np.concatenate([corner, far - corner + one], axis=1),
        rows[:, 4].copy(),
        codes,
    )


def _rows(boxes: list[Any], category_ids: Sequence[int], where: str) -> tuple[list[int], Any]:
    """Return how many boxes each category has, and all of them, float64 [n, 5]."""
    counts, found = [], [np.zeros((0, 5))]
    for category_id, made in zip(category_ids, boxes, strict=True):
        rows = made.value if isinstance(made, safe_pickle.Array) else None
        if rows is None or rows.ndim != 2 or rows.shape[1] != 5 or rows.dtype.kind != "f":
            got = reprlib.repr(made) if rows is None else f"{rows.dtype} {list(rows.shape)}"
            raise ValueError(
                f"Expected boxes {where}, category {category_id}, as a float array [n, 5], "
                f"got {got}"
            )
        counts.append(len(rows))
        if len(rows):
            found.append(rows.astype(np.float64))
    joined = np.concatenate(found)
    if not np.isfinite(joined).all():
        raise ValueError(f"Expected boxes and scores {where} to be finite, got others")
    return counts, joined


def _codes(
    masks: list[Any], counts: list[int], category_ids: Sequence[int], where: str
) -> list[Code]:
    """Return the masks of all categories, in the order of the boxes."""
    joined = []
    for category_id, some, count in zip(category_ids, masks, counts, strict=True):
        if not isinstance(some, list) or len(some) != count:
            got = f"{len(some)}" if isinstance(some, list) else reprlib.repr(some)
            raise ValueError(
                f"Expected a list of {count} masks {where}, category {category_id}, as there are "
                f"boxes, got {got}"
            )
        joined += some
    try:
        return read_codes(joined)
    except ValueError as error:
        raise ValueError(f"{error} ({where.removeprefix('of ')})") from None
