"""COCO's compressed run lengths of many masks, checked at once.

`coco_masks.decompress_run_lengths` reads one mask in some 30 microseconds; results hold millions.
"""

import reprlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from chunking import chunks
from coco_masks import compress, read_run_lengths

DIGITS = 2**17  # that are decoded at once: their arrays stay in the cache


class Code(NamedTuple):
    """A mask in COCO's compressed run lengths."""

    height: int
    width: int
    counts: bytes

    def as_dict(self) -> dict[str, Any]:
        """Return what pycocotools takes."""
        return {"size": [self.height, self.width], "counts": self.counts}


def read_codes(segmentations: Sequence[Any], first: int = 0) -> list[Code]:
    """Return masks of detections, compressed and checked.

    Args:
        segmentations: `{"size": [height, width], "counts": text, bytes or run lengths}`, each.
        first: The number of the first one in its file, for messages.

    Raises:
        ValueError: A mask is not a run-length code that fits its size.
    """
    codes = []
    for i, segmentation in enumerate(segmentations):
        try:
            codes.append(_read_code(segmentation))
        except ValueError as error:
            raise ValueError(f"`segmentation` of detection {first + i}: {error}") from None
    valid = are_valid(codes)
    if not valid.all():
        i = int(valid.argmin())
        try:  # for the message
            read_run_lengths(codes[i].as_dict(), codes[i].width, codes[i].height)
        except ValueError as error:
            raise ValueError(f"`segmentation` of detection {first + i}: {error}") from None
        raise AssertionError(f"both checks of masks must agree, on {codes[i]}")
    return codes


def _read_code(segmentation: Any) -> Code:
    if not isinstance(segmentation, dict):
        raise ValueError(f"Expected run lengths, got {reprlib.repr(segmentation)}")
    size, counts = segmentation.get("size"), segmentation.get("counts")
    if not (
        isinstance(size, list | tuple)
        and len(size) == 2
        and all(type(side) is int and 0 < side < 2**31 for side in size)
    ):
        raise ValueError(f"Expected `size` as [height, width], got {reprlib.repr(size)}")
    height, width = size
    if isinstance(counts, bytes):
        return Code(height, width, counts)
    if isinstance(counts, str):
        try:
            return Code(height, width, counts.encode("ascii"))
        except UnicodeEncodeError:
            raise ValueError("Expected `counts` in ASCII") from None
    runs = read_run_lengths({"size": [height, width], "counts": counts}, width, height)
    return Code(height, width, compress(runs, width, height))


def are_valid(codes: Sequence[tuple[int, int, bytes]]) -> np.ndarray:
    """Return for each mask whether its run lengths decode and add up to its size, bool [N].

    Args:
        codes: (height, width, counts) of each mask.
    """
    lengths = np.array([len(counts) for _, _, counts in codes], np.int64)
    parts = [_are_valid(codes[part.start : part.stop]) for part in chunks(lengths, DIGITS)]
    return np.concatenate([np.zeros(0, bool), *parts])


def _are_valid(codes: Sequence[tuple[int, int, bytes]]) -> np.ndarray:
    lengths = np.array([len(counts) for _, _, counts in codes], np.int64)
    areas = np.array([height * width for height, width, _ in codes], np.int64)
    valid = lengths > 0
    raw = np.frombuffer(b"".join(counts for _, _, counts in codes), np.uint8)
    digits = raw.astype(np.int64) - 48
    stops = lengths.cumsum()
    code_of_digit = np.repeat(np.arange(len(codes)), lengths)
    _refuse(valid, code_of_digit[(digits < 0) | (digits > 63)])
    valid[valid] &= (digits[stops[valid] - 1] & 32) == 0  # the last digit says that more follow

    # Only what decodes is decoded.
    kept = valid[code_of_digit]
    digits, code_of_digit = digits[kept], code_of_digit[kept]
    if not digits.size:
        return valid
    ends = np.flatnonzero((digits & 32) == 0)
    starts = np.concatenate([[0], ends[:-1] + 1])
    sizes = ends - starts + 1
    code_of_number = code_of_digit[ends]
    _refuse(valid, code_of_number[sizes > 7])  # 35 bits; no image has as many pixels
    place = np.minimum(np.arange(digits.size) - np.repeat(starts, sizes), 7)
    values = np.add.reduceat((digits & 31) << (5 * place), starts)
    values -= np.where(digits[ends] & 16, 1 << (5 * np.minimum(sizes, 8)), 0)

    runs = _undo_differences(values, code_of_number, len(codes))
    _refuse(valid, code_of_number[(runs < 0) | (runs > areas[code_of_number])])
    sums = np.zeros(len(codes), np.int64)
    np.add.at(sums, code_of_number, runs)
    return valid & (sums == areas)


def _refuse(valid: np.ndarray, codes: np.ndarray) -> None:
    valid[codes] = False


def _undo_differences(values: np.ndarray, code: np.ndarray, count: int) -> np.ndarray:
    """Return run lengths: from the fourth on, the difference to the run before the last is stored.

    Args:
        values: Of all masks, one after the other.
        code: The number of the mask of each value, ascending.
        count: Of masks.
    """
    numbers = np.bincount(code, minlength=count)
    place = np.arange(len(values)) - np.repeat(numbers.cumsum() - numbers, numbers)
    runs = values.copy()
    for first in (1, 2):
        chosen = (place >= first) & ((place - first) % 2 == 0)
        sums = values[chosen].cumsum()
        chosen_numbers = np.bincount(code[chosen], minlength=count)
        before = np.concatenate([[0], sums])[chosen_numbers.cumsum() - chosen_numbers]
        runs[chosen] = sums - np.repeat(before, chosen_numbers)
    return runs
