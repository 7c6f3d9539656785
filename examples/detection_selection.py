"""Which detections take part in evaluation: the best of each image, or of each category."""

import numpy as np
from detection_results import Detections
from ground_truth import MAX_AREA, MAX_DETECTIONS, MAX_DETECTIONS_FIXED, GroundTruth, contains


class Selection:
    """Rows of detections that take part, sorted by category, image, and score from high to low.

    Equal scores keep the order of the file.
    """

    def __init__(
        self,
        truth: GroundTruth,
        detections: Detections,
        rows: np.ndarray,
        images: np.ndarray,
        categories: np.ndarray,
    ) -> None:
        with np.errstate(over="ignore"):
            areas = detections.boxes[rows, 2] * detections.boxes[rows, 3]
        # As the official code, which looks at nothing else.
        kept = (areas > 0) & (areas < np.inf)
        kept &= truth.is_verified(images[rows], categories[rows])
        rows, areas = rows[kept], areas[kept]
        order = np.lexsort((-detections.scores[rows], images[rows], categories[rows]))
        self.rows = rows[order]  # int64 [n], of the detections
        self.areas = areas[order]  # float64 [n]
        self.images = images[self.rows]
        self.categories = categories[self.rows]
        self.pairs = truth.pairs(self.images, self.categories)
        self.unjudged = contains(truth.incomplete, self.pairs)
        """Whether a detection without a match is ignored, as not all objects are annotated."""

    def __len__(self) -> int:
        return len(self.rows)

    def counts(self, num_categories: int) -> np.ndarray:
        """Return the number of detections of each category."""
        return np.bincount(self.categories, minlength=num_categories)

    def too_large(self) -> np.ndarray:
        return self.areas > MAX_AREA


def best_of_images(
    truth: GroundTruth, detections: Detections, images: np.ndarray, categories: np.ndarray
) -> Selection:
    """Select the 300 best detections of each image, as the official code does.

    Among equal scores the first ones of the file are taken. The cut comes first: detections of
    categories that nobody has verified in an image take places there all the same.
    """
    rows = _best(images, detections.scores, MAX_DETECTIONS)
    return Selection(truth, detections, rows, images, categories)


def best_of_categories(
    truth: GroundTruth, detections: Detections, images: np.ndarray, categories: np.ndarray
) -> Selection:
    """Select the 10,000 best detections of each category over all images, for AP fixed."""
    rows = _best(categories, detections.scores, MAX_DETECTIONS_FIXED)
    return Selection(truth, detections, rows, images, categories)


def _best(groups: np.ndarray, scores: np.ndarray, limit: int) -> np.ndarray:
    """Return the rows of the best `limit` of each group, ascending."""
    if not len(groups):
        return np.zeros(0, np.int64)
    counts = np.bincount(groups)
    crowded = np.flatnonzero((counts > limit)[groups])
    if not len(crowded):
        return np.arange(len(groups))
    order = crowded[np.lexsort((-scores[crowded], groups[crowded]))]
    sizes = counts[counts > limit]
    place = np.arange(len(order)) - np.repeat(sizes.cumsum() - sizes, sizes)
    kept = np.ones(len(groups), bool)
    kept[order[place >= limit]] = False
    return np.flatnonzero(kept)
