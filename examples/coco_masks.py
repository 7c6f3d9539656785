"""Masks of LVIS and COCO annotations, polygons and run lengths, checked before they are drawn.

Drawing code written in C trusts what it is given, so nothing reaches it unchecked.
"""

import math
import reprlib
from collections.abc import Callable
from typing import Any

import numpy as np

# Polygons, each float64 [2 * points]; or the run lengths of a mask, int64, columns first.
Segment = list[np.ndarray] | np.ndarray


def check_segmentation(row: dict[str, Any], width: int, height: int) -> None:
    """Check the mask of an annotation whose box alone is used.

    A fraction of the time of :func:`read_segmentation`, as there may be a million: how far the
    points of polygons lie outside the image matters only to drawing and is not looked at.

    Raises:
        ValueError: Neither polygons nor a run-length code that fits the image.
    """
    _read(row, width, height, check_polygon)


def read_segmentation(row: dict[str, Any], width: int, height: int) -> Segment:
    """Return the mask of an annotation in a form that is safe to draw.

    Raises:
        ValueError: Neither polygons nor a run-length code that fits the image.
    """
    return _read(row, width, height, lambda polygon: read_polygon(polygon, width, height))


def _read(row: dict[str, Any], width: int, height: int, polygon: Callable[[Any], Any]) -> Any:
    segmentation = row.get("segmentation")
    try:
        if isinstance(segmentation, dict):
            return read_run_lengths(segmentation, width, height)
        if isinstance(segmentation, list | tuple) and segmentation:
            return [polygon(part) for part in segmentation]
        raise ValueError(f"Expected polygons or run lengths, got {reprlib.repr(segmentation)}")
    except ValueError as error:
        raise ValueError(f"`segmentation` of annotation {row['id']}: {error}") from None


def check_polygon(polygon: Any) -> None:
    """Check that a polygon is a list of x, y, x, y, ..."""
    if not isinstance(polygon, list | tuple) or len(polygon) < 6 or len(polygon) % 2:
        raise ValueError(f"Expected x, y of 3 points or more, got {reprlib.repr(polygon)}")
    try:
        # One step for all points: a sum is finite only if its terms are.
        finite = all(map(_is_numeric, set(map(type, polygon)))) and math.isfinite(sum(polygon))
    except OverflowError:  # an integer beyond float
        finite = False
    if not finite:
        raise ValueError(f"Expected finite numbers, got {reprlib.repr(polygon)}")


def _is_numeric(kind: type) -> bool:
    return issubclass(kind, int | float | np.integer | np.floating) and kind is not bool


def read_polygon(polygon: Any, width: int, height: int) -> np.ndarray:
    """Return the x, y, x, y, ... of one polygon."""
    check_polygon(polygon)
    points = np.array(polygon, np.float64)
    # Drawing takes memory by the length of the outline, so a far point would exhaust it.
    for axis, size in ((0, width), (1, height)):
        far = points[axis::2][np.abs(points[axis::2] - size / 2) > 1.5 * size]
        if far.size:
            raise ValueError(
                f"Expected points at most one image ({width} x {height}) outside, got {far[0]}"
            )
    return points


def read_run_lengths(code: dict[str, Any], width: int, height: int) -> np.ndarray:
    """Return the run lengths, background first, of a compressed or plain COCO code."""
    if code.get("size") not in ([height, width], (height, width)):
        size = reprlib.repr(code.get("size"))
        raise ValueError(f"Expected `size` [{height}, {width}], as the image, got {size}")
    counts = code.get("counts")
    if isinstance(counts, str | bytes):
        runs = decompress_run_lengths(counts)
    elif isinstance(counts, list | tuple) and all(type(run) is int for run in counts):
        if any(not 0 <= run <= width * height for run in counts):
            raise ValueError(f"Expected `counts` in [0, {width * height}]")
        runs = np.array(counts, np.int64)
    else:
        raise ValueError(f"Expected `counts` as text or integers, got {reprlib.repr(counts)}")
    if (runs < 0).any() or (runs > width * height).any() or runs.sum() != width * height:
        raise ValueError(
            f"Expected run lengths >= 0 that add up to {height} x {width} = {width * height}"
        )
    return runs


def decompress_run_lengths(text: str | bytes) -> np.ndarray:
    """Return the run lengths in COCO's compressed text.

    Each number is written in base 32, lowest digit first, a character per digit from "0" on: bit 5
    says that more digits follow, bit 4 of the last digit is the sign. From the third run after the
    first on, the difference to the run before the previous one is stored.
    """
    try:
        raw = text.encode("ascii") if isinstance(text, str) else text
    except UnicodeEncodeError:
        raise ValueError("Expected `counts` in ASCII") from None
    digits = np.frombuffer(raw, np.uint8).astype(np.int64) - 48
    if not digits.size:
        raise ValueError("Expected `counts` to hold run lengths, got none")
    if (digits < 0).any() or (digits > 63).any() or digits[-1] & 32:
        raise ValueError("Expected `counts` in COCO's compressed form, got a corrupt code")
    ends = np.flatnonzero((digits & 32) == 0)
    starts = np.concatenate([[0], ends[:-1] + 1])
    lengths = ends - starts + 1
    if (lengths > 7).any():  # 35 bits; no image has as many pixels
        raise ValueError("Expected `counts` of at most 7 digits each, got a corrupt code")
    place = np.arange(digits.size) - np.repeat(starts, lengths)
    values = np.add.reduceat((digits & 31) << (5 * place), starts)
    values -= np.where(digits[ends] & 16, 1 << (5 * lengths), 0)
    for first in (1, 2):
        values[first::2] = np.cumsum(values[first::2])
    return values


def compress(segment: Segment, width: int, height: int) -> bytes:
    """Return COCO's compressed run lengths of a mask."""
    from pycocotools import mask as coco_mask

    if isinstance(segment, list):
        # Drawn by pycocotools, whose rounding evaluation uses too.
        code = coco_mask.merge(coco_mask.frPyObjects(segment, height, width))
    else:
        runs = {"size": [height, width], "counts": segment.tolist()}
        code = coco_mask.frPyObjects(runs, height, width)
    counts: bytes = code["counts"]
    return counts


def draw_mask(segment: Segment, width: int, height: int) -> np.ndarray:
    """Return a mask as uint8 [height, width]."""
    if isinstance(segment, list):
        segment = decompress_run_lengths(compress(segment, width, height))
    inside = (np.arange(len(segment)) % 2).astype(np.uint8)
    return np.repeat(inside, segment).reshape(width, height).T
