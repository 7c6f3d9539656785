"""Fields of LVIS and COCO annotations that the library does not look at, checked before use."""

import math
import os
import reprlib
from collections.abc import Mapping, Sequence
from numbers import Real
from typing import Any

import numpy as np

from balanced_group_softmax.counts import Source

Row = Mapping[str, Any]


def source_name(annotations: Source) -> str:
    """Return what error messages call an annotation file or its content."""
    return os.fspath(annotations) if isinstance(annotations, str | os.PathLike) else "annotations"


def category_name(row: Row) -> str:
    """Return the name of a category entry; its id where there is none."""
    name = row.get("name", str(row["id"]))
    if not isinstance(name, str):
        raise ValueError(
            f"Expected `name` of category {row['id']} to be text, got {reprlib.repr(name)}"
        )
    return name


def image_size(row: Row) -> tuple[int, int]:
    """Return (width, height) of an image entry."""
    size = row.get("width"), row.get("height")
    for key, value in zip(("width", "height"), size, strict=True):
        if type(value) is not int or not 0 < value < 2**31:
            raise ValueError(
                f"Expected `{key}` of image {row['id']} to be a positive integer, "
                f"got {reprlib.repr(value)}"
            )
    return size  # type: ignore[return-value]


def verified_categories(row: Row, known: set[int]) -> dict[str, list[int]]:
    """Return LVIS's lists of category ids of an image entry, those that it has.

    Args:
        row: May hold `neg_category_ids`, categories that are verified not to be in the image, and
            `not_exhaustive_category_ids`, those of which not all objects are annotated.
        known: The category ids of the file.
    """
    lists = {}
    for key in ("neg_category_ids", "not_exhaustive_category_ids"):
        value = row.get(key)
        if value is None:
            continue
        if not isinstance(value, list | tuple) or not all(
            type(number) is int and number in known for number in value
        ):
            raise ValueError(
                f"Expected `{key}` of image {row['id']} to be a list of ids in `categories`, "
                f"got {reprlib.repr(value)}"
            )
        lists[key] = list(value)
    return lists


def read_boxes(rows: Sequence[Row], section: str = "annotation") -> np.ndarray:
    """Return `bbox` (x, y, width, height) of annotations, float64 [N, 4]."""
    try:
        boxes = np.array([row["bbox"] for row in rows])
        if boxes.dtype.kind in "iuf" and boxes.shape[1:] == (4,) and np.isfinite(boxes).all():
            return boxes.astype(np.float64)
    except (KeyError, ValueError):
        pass
    for i, row in enumerate(rows):  # something is wrong: find it
        box = row.get("bbox")
        if not (isinstance(box, list | tuple) and len(box) == 4 and all(map(is_number, box))):
            raise ValueError(
                f"Expected `bbox` of {section} {row.get('id', i)} to be 4 finite numbers, "
                f"got {reprlib.repr(box)}"
            )
    return np.array([row["bbox"] for row in rows], np.float64).reshape(-1, 4)


def read_areas(rows: Sequence[Row], boxes: np.ndarray) -> np.ndarray:
    """Return `area` of annotations, float64 [N]; that of the box where none is stated."""
    with np.errstate(over="ignore"):
        area = boxes[:, 2] * boxes[:, 3]
    for i, row in enumerate(rows):
        value = row.get("area")
        if value is None:
            continue
        if not is_number(value) or value < 0:
            raise ValueError(
                f"Expected `area` of annotation {row['id']} to be a number >= 0, "
                f"got {reprlib.repr(value)}"
            )
        area[i] = value
    return area


def is_number(value: Any) -> bool:
    if not isinstance(value, Real) or isinstance(value, bool):
        return False
    try:
        return math.isfinite(value)
    except OverflowError:  # an integer beyond float
        return False
