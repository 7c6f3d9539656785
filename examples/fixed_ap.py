"""AP fixed and pooled AP: the best 10,000 detections of a category, however many an image has.

Dave et al., "Evaluating Large-Vocabulary Object Detectors: The Devil is in the Details" (2021).
Both judge the best 10,000 detections of each category over all images, however many an image has.
AP fixed is the mean over categories of the area under their precision-recall curves. For pooled AP
the detections of all categories are ranked in one list, each is right if it matches an annotation
of its own category, and there is one curve for each IoU: scores have to be comparable across
categories, and a category counts by its annotations.
"""

from typing import NamedTuple

import numpy as np
from chunking import chunks
from detection_matching import match
from detection_results import Detections
from detection_selection import Selection
from ground_truth import IOU_THRESHOLDS, RECALL_THRESHOLDS, GroundTruth
from tqdm import tqdm

CHUNK = 200_000  # detections that are matched at once, whole categories


class FixedAP(NamedTuple):
    """AP fixed of each category with annotations, and pooled AP."""

    precision: np.ndarray  # float64 [IoU, recall, K], of `truth.present`; -1: nothing to find
    pooled: np.ndarray  # float64 [IoU, recall]; -1: nothing to find


def evaluate_fixed(
    truth: GroundTruth,
    detections: Detections,
    selection: Selection,
    kind: str,
    *,
    progress: bool = False,
) -> FixedAP:
    """Match the detections of all categories, and rank them within and across categories.

    Of equal scores, those of the image with the smaller id come first, then those of the category
    with the smaller id, then the order of the file holds.

    Args:
        truth: The annotations.
        detections: What is evaluated.
        selection: The best detections of each category.
        kind: "bbox" or "segm".
        progress: Show a bar.
    """
    num_categories = len(truth.category_ids)
    found = selection.counts(num_categories)
    ends = found.cumsum()
    to_find = np.bincount(truth.categories[~truth.ignored], minlength=num_categories)
    by_category = np.argsort(truth.categories, kind="stable")
    annotated_ends = np.bincount(truth.categories, minlength=num_categories).cumsum()
    curves: dict[int, np.ndarray] = {}
    right = np.zeros((len(IOU_THRESHOLDS), len(selection)), bool)
    ignored = np.zeros_like(right)
    scores = detections.scores[selection.rows]
    with tqdm(
        total=len(selection),
        desc=f"Evaluating {kind} (fixed)",
        unit="detection",
        unit_scale=True,
        disable=not progress,
    ) as bar:
        for part in chunks(found, CHUNK):
            chosen = slice(int(ends[part.start] - found[part.start]), int(ends[part.stop - 1]))
            begin = annotated_ends[part.start - 1] if part.start else 0
            annotations = by_category[begin : annotated_ends[part.stop - 1]]
            matches = match(truth, detections, selection, chosen, annotations, kind)
            right[:, chosen], ignored[:, chosen] = matches
            for category in part:
                own = slice(int(ends[category] - found[category]), int(ends[category]))
                order = np.argsort(-scores[own], kind="stable")
                curves[category] = precision_at_recalls(
                    right[:, own][:, order], ignored[:, own][:, order], int(to_find[category])
                )
            bar.update(chosen.stop - chosen.start)
    order = np.lexsort((selection.categories, selection.images, -scores))
    pooled = [
        precision_at_recalls(r[order][None], i[order][None], int(to_find.sum()))[0]
        for r, i in zip(right, ignored, strict=True)
    ]
    present = [curves[category] for category in truth.present.tolist()]
    shape = (len(IOU_THRESHOLDS), len(RECALL_THRESHOLDS), 0)
    return FixedAP(np.stack(present, axis=2) if present else np.zeros(shape), np.stack(pooled))


def precision_at_recalls(right: np.ndarray, ignored: np.ndarray, to_find: int) -> np.ndarray:
    """Return the precision at the 101 recalls of LVIS, float64 [IoU, recall].

    It is the best precision at that recall or a higher one, 0 where the recall is not reached, and
    -1 if there is nothing to find.

    Args:
        right: Where a detection matches, bool [IoU, n], from the highest score on.
        ignored: Where it does not count, bool [IoU, n].
        to_find: The number of annotations.
    """
    result = np.full((len(right), len(RECALL_THRESHOLDS)), -1.0)
    if not to_find:
        return result
    for row, is_right, is_ignored in zip(result, right, ignored, strict=True):
        counted = is_right[~is_ignored]
        true = counted.cumsum()
        # As the official code, which avoids 0 / 0 in this way.
        precision = true / (np.arange(1, len(true) + 1) + np.spacing(1))
        best = np.maximum.accumulate(precision[::-1])[::-1]
        places = np.searchsorted(true / to_find, RECALL_THRESHOLDS, side="left")
        row[:] = np.append(best, 0.0)[places]
    return result
