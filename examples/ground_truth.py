"""Annotations in the form that evaluation needs: columns, masks compressed, what is verified."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from annotation_fields import image_size, read_areas, read_boxes, source_name, verified_categories
from coco_masks import compress, read_segmentation
from detection_results import Detections
from mask_codes import Code

from balanced_group_softmax.counts import Source, read_annotations

MAX_AREA = 1e5**2  # pixels; what is larger counts nowhere
MAX_DETECTIONS = 300  # of an image
MAX_DETECTIONS_FIXED = 10_000  # of a category, for AP fixed
IOU_THRESHOLDS = np.linspace(0.5, 0.95, 10)
RECALL_THRESHOLDS = np.linspace(0, 1, 101)


@dataclass(frozen=True)
class GroundTruth:
    """Annotations, A in all, of I images and C categories, and what LVIS knows of absence.

    Images and categories are numbered by ascending id. A pair of both has the number
    `image * C + category`. Boxes without area are left out, as the official code does.
    """

    name: str  # in error messages
    image_ids: np.ndarray  # int64 [I], ascending
    category_ids: np.ndarray  # int64 [C], ascending
    file_image_ids: list[int]  # in the order of the file
    file_category_ids: list[int]
    frequencies: list[str]  # "r", "c" or "f" of each category
    sizes: np.ndarray | None  # int64 [I, 2], heights and widths, with masks only
    images: np.ndarray  # int64 [A], numbers of images
    categories: np.ndarray  # int64 [A], numbers of categories
    boxes: np.ndarray  # float64 [A, 4]: x, y, width, height
    areas: np.ndarray  # float64 [A]
    ignored: np.ndarray  # bool [A], crowds
    masks: list[bytes] | None  # compressed run lengths
    all_verified: np.ndarray  # bool [I], where all that is not annotated is absent
    verified: np.ndarray  # int64, pairs that are annotated or verified to be absent, ascending
    incomplete: np.ndarray  # int64, pairs of which not all objects are annotated, ascending

    @property
    def present(self) -> np.ndarray:
        """The categories that have annotations, int64, ascending."""
        return np.unique(self.categories)

    def pairs(self, images: np.ndarray, categories: np.ndarray) -> np.ndarray:
        """Return the numbers of pairs of images and categories."""
        return images * len(self.category_ids) + categories

    def code(self, annotation: int) -> Code:
        """Return the mask of an annotation."""
        if self.masks is None or self.sizes is None:
            raise ValueError(f"{self.name}: Expected masks to have been read, got boxes only")
        height, width = self.sizes[self.images[annotation]].tolist()
        return Code(height, width, self.masks[annotation])

    def is_verified(self, images: np.ndarray, categories: np.ndarray) -> np.ndarray:
        """Return where a detection can be told right or wrong."""
        pairs = self.pairs(images, categories)
        return self.all_verified[images] | contains(self.verified, pairs)

    def locate(self, detections: Detections, kind: str) -> tuple[np.ndarray, np.ndarray]:
        """Return the numbers of the images and categories of detections, int64 [N] each.

        Args:
            detections: What is evaluated.
            kind: "bbox", or "segm" for which the masks are checked too.

        Raises:
            ValueError: Detections are of other images or categories, or their masks are missing
                or of other sizes.
        """
        images, known_image = _find(self.image_ids, detections.image_ids)
        categories, known_category = _find(self.category_ids, detections.category_ids)
        known = known_image & known_category
        if not known.all():
            i = int(known.argmin())
            raise ValueError(
                f"{detections.name}: Expected `detections` of images and categories in the "
                f"annotations, got image {detections.image_ids[i]}, "
                f"category {detections.category_ids[i]} in detection {i}"
            )
        if kind == "segm" and len(detections):
            if detections.masks is None:
                raise ValueError(f"{detections.name}: Expected detections with masks, got none")
            if self.sizes is None:
                raise ValueError(f"{self.name}: Expected masks to have been read, got boxes only")
            sizes, wanted = detections.masks.sizes(), self.sizes[images]
            fits = (sizes == wanted).all(axis=1)
            if not fits.all():
                i = int(fits.argmin())
                raise ValueError(
                    f"{detections.name}: Expected the mask of detection {i} with the size "
                    f"{wanted[i].tolist()} of image {detections.image_ids[i]}, "
                    f"got {sizes[i].tolist()}"
                )
        return images, categories


def read_ground_truth(
    annotations: Source,
    *,
    masks: bool = False,
    frequencies: Mapping[int, str] | None = None,
) -> GroundTruth:
    """Read annotations for evaluation.

    COCO files lack what LVIS knows about absence: there every category counts as verified absent
    where it is not annotated.

    Args:
        annotations: Path of an LVIS or COCO file, or its content.
        masks: Read the masks as well.
        frequencies: "r", "c" or "f" by category id, as :func:`read_frequencies` returns them for
            the training annotations. By default those of the file itself.

    Raises:
        OSError: The file cannot be read.
        ValueError: The annotations are not valid; the message says where.
    """
    data = read_annotations(annotations, complete=True)
    name = source_name(annotations)
    try:
        return _ground_truth(data, name, masks, frequencies)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None


def read_frequencies(annotations: Source) -> dict[int, str]:
    """Return LVIS's "r", "c" or "f" by category id, from a training annotation file.

    What the file says holds; where it does not say, as in COCO, the images with the category count.
    """
    data = read_annotations(annotations, complete=True)
    images: dict[int, set[int]] = {row["id"]: set() for row in data["categories"]}
    for row in data["annotations"]:
        images[row["category_id"]].add(row["image_id"])
    return {
        row["id"]: row["frequency"]
        if row.get("frequency") in ("r", "c", "f")
        else frequency(len(images[row["id"]]))
        for row in data["categories"]
    }


def frequency(image_count: int) -> str:
    """Return LVIS's letter: rare in at most 10 training images, common in at most 100."""
    return "r" if image_count <= 10 else "c" if image_count <= 100 else "f"


def contains(ascending: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Return which values are among others, which are sorted."""
    return _find(ascending, values)[1]


def _find(ascending: np.ndarray, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the places of values in a sorted array, and where they are in it at all."""
    if not len(ascending):
        return np.zeros(values.shape, np.int64), np.zeros(values.shape, bool)
    places = np.minimum(np.searchsorted(ascending, values), len(ascending) - 1)
    return places, ascending[places] == values


def _ground_truth(
    data: dict[str, Any], name: str, with_masks: bool, frequencies: Mapping[int, str] | None
) -> GroundTruth:
    rows: Sequence[dict[str, Any]] = data["annotations"]
    boxes = read_boxes(rows)
    areas = read_areas(rows, boxes)
    letters = {**read_frequencies(data), **(frequencies or {})}
    file_image_ids = [row["id"] for row in data["images"]]
    file_category_ids = [row["id"] for row in data["categories"]]
    image_ids = np.array(sorted(file_image_ids), np.int64)
    category_ids = np.array(sorted(file_category_ids), np.int64)
    images = np.searchsorted(image_ids, [row["image_id"] for row in rows]).astype(np.int64)
    categories = np.searchsorted(category_ids, [row["category_id"] for row in rows])
    ignored = np.array([row.get("ignore", row.get("iscrowd", 0)) for row in rows], bool)
    codes = sizes = None
    if with_masks:
        sizes_of = {row["id"]: image_size(row)[::-1] for row in data["images"]}
        sizes = np.array([sizes_of[i] for i in image_ids.tolist()], np.int64).reshape(-1, 2)
        codes = [_compressed(row, *sizes_of[row["image_id"]]) for row in rows]
    kept = np.flatnonzero((areas > 0) & (areas < np.inf))
    pairs = (images * len(category_ids) + categories)[kept]
    absence = _Absence(data["images"], image_ids, category_ids)
    return GroundTruth(
        name=name,
        image_ids=image_ids,
        category_ids=category_ids,
        file_image_ids=file_image_ids,
        file_category_ids=file_category_ids,
        frequencies=[letters[i] for i in category_ids.tolist()],
        sizes=sizes,
        images=images[kept],
        categories=categories[kept],
        boxes=boxes[kept],
        areas=areas[kept],
        ignored=ignored[kept],
        masks=None if codes is None else [codes[i] for i in kept],
        all_verified=absence.all_verified,
        verified=np.unique(np.concatenate([pairs, absence.negative])),
        incomplete=absence.incomplete,
    )


def _compressed(row: dict[str, Any], height: int, width: int) -> bytes:
    return compress(read_segmentation(row, width, height), width, height)


class _Absence:
    """What the image entries of an annotation file say about categories that are not annotated."""

    def __init__(
        self, rows: Sequence[dict[str, Any]], image_ids: np.ndarray, category_ids: np.ndarray
    ) -> None:
        known = set(category_ids.tolist())
        place = {category: i for i, category in enumerate(category_ids.tolist())}
        self.all_verified = np.zeros(len(image_ids), bool)
        pairs: dict[str, list[int]] = {"neg_category_ids": [], "not_exhaustive_category_ids": []}
        numbers = np.searchsorted(image_ids, [row["id"] for row in rows]).tolist()
        for number, row in zip(numbers, rows, strict=True):
            lists = verified_categories(row, known)
            self.all_verified[number] = "neg_category_ids" not in lists
            for key, ids in lists.items():
                pairs[key].extend(number * len(category_ids) + place[i] for i in ids)
        self.negative = np.unique(np.array(pairs["neg_category_ids"], np.int64))
        self.incomplete = np.unique(np.array(pairs["not_exhaustive_category_ids"], np.int64))
