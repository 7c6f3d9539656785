"""Which detections match which annotations, of all images and categories at once.

The rule is that of the official LVIS code. Within an image and a category, detections choose from
the highest score on: the annotation of the largest overlap, at least the threshold, that is still
free; of equal overlaps the later one; an annotation to ignore only if no other is left.
"""

from typing import NamedTuple

import numpy as np
from detection_results import Detections
from detection_selection import Selection
from ground_truth import IOU_THRESHOLDS, GroundTruth


class Matches(NamedTuple):
    """What becomes of n detections at each IoU threshold; neither: a false positive."""

    right: np.ndarray  # bool [IoU, n]
    ignored: np.ndarray  # bool [IoU, n]


class _Overlaps(NamedTuple):
    """Detections and annotations of the same image and category that overlap enough."""

    detection: np.ndarray  # int64 [m], places in the chunk, ascending
    annotation: np.ndarray  # int64 [m], places in the chunk
    iou: np.ndarray  # float64 [m]


def match(
    truth: GroundTruth,
    detections: Detections,
    selection: Selection,
    chosen: slice,
    annotations: np.ndarray,
    kind: str,
) -> Matches:
    """Match some detections to the annotations of the same categories.

    Args:
        truth: The annotations.
        detections: What is evaluated.
        selection: The detections that take part.
        chosen: Of the selection, whole categories.
        annotations: Of these categories, all of them, int64 [a].
        kind: "bbox" or "segm".
    """
    order = np.argsort(truth.pairs(truth.images, truth.categories)[annotations], kind="stable")
    annotations = annotations[order]
    overlaps = _overlaps(truth, detections, selection, chosen, annotations, kind)
    matched, ignored = _choose(overlaps, selection.pairs[chosen], truth.ignored[annotations])
    unjudged = selection.unjudged[chosen] | selection.too_large()[chosen]
    return Matches(matched & ~ignored, ignored | (~matched & unjudged))


def _overlaps(
    truth: GroundTruth,
    detections: Detections,
    selection: Selection,
    chosen: slice,
    annotations: np.ndarray,
    kind: str,
) -> _Overlaps:
    pairs = selection.pairs[chosen]
    annotated = truth.pairs(truth.images, truth.categories)[annotations]
    first = np.searchsorted(annotated, pairs, side="left")
    counts = np.searchsorted(annotated, pairs, side="right") - first
    detection = np.repeat(np.arange(len(pairs)), counts)
    place = np.arange(len(detection)) - np.repeat(counts.cumsum() - counts, counts)
    annotation = np.repeat(first, counts) + place
    rows = selection.rows[chosen]
    if kind == "bbox":
        iou = box_iou(detections.boxes[rows[detection]], truth.boxes[annotations[annotation]])
    else:
        iou = _mask_iou(truth, detections, rows, annotations, pairs, first, counts)
    enough = iou >= IOU_THRESHOLDS[0]
    return _Overlaps(detection[enough], annotation[enough], iou[enough])


def box_iou(boxes: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Return the IoU of boxes (x, y, width, height), row by row, as pycocotools has it."""
    least = np.maximum(boxes[:, :2], others[:, :2])
    most = np.minimum(boxes[:, :2] + boxes[:, 2:], others[:, :2] + others[:, 2:])
    width, height = (most - least).T
    common = np.where((width > 0) & (height > 0), width * height, 0.0)
    return common / (boxes[:, 2] * boxes[:, 3] + others[:, 2] * others[:, 3] - common)


def _mask_iou(
    truth: GroundTruth,
    detections: Detections,
    rows: np.ndarray,
    annotations: np.ndarray,
    pairs: np.ndarray,
    first: np.ndarray,
    counts: np.ndarray,
) -> np.ndarray:
    """Return the IoU of each detection with all annotations of its image and category."""
    from pycocotools import mask as coco_mask

    overlaps = [np.zeros(0)]
    with_annotations = np.flatnonzero(counts)
    starts = np.flatnonzero(np.diff(pairs[with_annotations], prepend=-1))
    for group in np.split(with_annotations, starts[1:]):
        if not len(group):
            continue
        begin, count = int(first[group[0]]), int(counts[group[0]])
        wanted = [truth.code(i).as_dict() for i in annotations[begin : begin + count].tolist()]
        found = [detections.code(row).as_dict() for row in rows[group].tolist()]
        overlaps.append(coco_mask.iou(found, wanted, [0] * count).ravel())
    return np.concatenate(overlaps)


def _choose(
    overlaps: _Overlaps, pairs: np.ndarray, ignored: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Return which detections are matched, and which to an annotation to ignore, bool [IoU, n].

    The best detections of all pairs of an image and a category choose at once, then the second
    best, and so on: those of different pairs do not compete.
    """
    shape = (len(IOU_THRESHOLDS), len(pairs))
    matched, to_ignore = np.zeros(shape, bool), np.zeros(shape, bool)
    taken = np.zeros((len(IOU_THRESHOLDS), len(ignored)), bool)
    turn = _turns(overlaps.detection, pairs)
    order = np.lexsort(
        (
            -overlaps.annotation,
            -overlaps.iou,
            ignored[overlaps.annotation],
            overlaps.detection,
            turn,
        )
    )
    turn = turn[order]
    detection, annotation, iou = (column[order] for column in overlaps)
    ends = np.flatnonzero(np.diff(turn, append=-1)) + 1
    begin = 0
    for end in ends.tolist():
        some = annotation[begin:end]
        free = (iou[begin:end] >= IOU_THRESHOLDS[:, None]) & ~taken[:, some]
        starts = np.flatnonzero(np.diff(detection[begin:end], prepend=-1))
        place = np.where(free, np.arange(end - begin), end - begin)
        best = np.minimum.reduceat(place, starts, axis=1)
        threshold, which = np.nonzero(best < end - begin)
        best_annotation = some[best[threshold, which]]
        chooser = detection[begin:end][starts[which]]
        taken[threshold, best_annotation] = True
        matched[threshold, chooser] = True
        to_ignore[threshold, chooser] = ignored[best_annotation]
        begin = end
    return matched, to_ignore


def _turns(detection: np.ndarray, pairs: np.ndarray) -> np.ndarray:
    """Return for each overlap when its detection chooses: 0 for the best one of its pair."""
    if not len(detection):
        return np.zeros(0, np.int64)
    choosers, place = np.unique(detection, return_inverse=True)
    begins = np.flatnonzero(np.diff(pairs[choosers], prepend=-1))
    sizes = np.diff(begins, append=len(choosers))
    turns = np.arange(len(choosers)) - np.repeat(begins, sizes)
    return turns[place]
