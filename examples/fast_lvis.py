"""The figures of the official LVIS code by `faster-coco-eval`, a few categories at a time.

It equals the official code (see the tests) because of what is done before:

- The best 300 detections of an image are chosen as the official code chooses them, while
  faster-coco-eval has a limit for each category of an image only.
- Boxes without area, and detections that cannot be judged, are left out.
- Annotations to ignore are not called crowds: a crowd is matched again and again there, by another
  overlap, while the official code matches it once, as any other. An area beyond all ranges makes
  faster-coco-eval ignore an annotation, and the area serves for nothing else.

What a category is worth does not depend on the others, so memory stays bounded by the chunk.
"""

import contextlib
import gc
import importlib.util
import logging
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
from detection_results import Detections
from detection_selection import Selection
from ground_truth import MAX_AREA, MAX_DETECTIONS, GroundTruth, contains
from tqdm import tqdm

CHUNK = 100_000  # detections and annotations that are evaluated at once
MAX_PAIRS = 500_000  # of images and categories that are evaluated at once


class Curves(NamedTuple):
    """What evaluation finds for each of K categories, -1 for one whose annotations are ignored."""

    precision: np.ndarray  # float64 [IoU, recall, K, area]
    recall: np.ndarray  # float64 [IoU, K, area]


def is_installed() -> bool:
    return importlib.util.find_spec("faster_coco_eval") is not None


def check_installed() -> None:
    """Raise ImportError where faster-coco-eval is not installed."""
    if not is_installed():
        raise ImportError(
            "The fast method needs the package faster-coco-eval: pip install faster-coco-eval"
        )


def evaluate_fast(
    truth: GroundTruth,
    detections: Detections,
    selection: Selection,
    kind: str,
    *,
    progress: bool = False,
) -> Curves:
    """Evaluate the categories that have annotations, `truth.present`.

    Args:
        truth: With at least one annotation.
        detections: What is evaluated.
        selection: The detections that take part.
        kind: "bbox" or "segm".
        progress: Show a bar.

    Raises:
        ImportError: faster-coco-eval is not installed.
    """
    check_installed()
    present = truth.present
    by_category = np.argsort(truth.categories, kind="stable")
    num_categories = len(truth.category_ids)
    found = selection.counts(num_categories)
    annotated = np.bincount(truth.categories, minlength=num_categories)
    found_ends, annotated_ends = found.cumsum(), annotated.cumsum()
    work = (found + annotated)[present]
    # Each chunk has the images of its categories; few where all its categories are rare.
    order = np.argsort(work, kind="stable")
    present, work = present[order], work[order]
    curves = []
    with tqdm(
        total=len(selection),
        desc=f"Evaluating {kind}",
        unit="detection",
        unit_scale=True,
        disable=not progress,
    ) as bar:
        for part in _portions(work, len(truth.image_ids)):
            chosen = present[part.start : part.stop]
            annotations = [
                by_category[annotated_ends[i] - annotated[i] : annotated_ends[i]] for i in chosen
            ]
            rows = [np.arange(found_ends[i] - found[i], found_ends[i]) for i in chosen]
            with paused_collector():
                some = np.concatenate(annotations), np.concatenate(rows)
                found_curves = _evaluate(truth, detections, selection, *some, kind)
            # Chunks have their categories in ascending order.
            back = np.argsort(np.argsort(chosen))
            curves.append(Curves(found_curves.precision[:, :, back], found_curves.recall[:, back]))
            bar.update(sum(map(len, rows)))
    back = np.argsort(order)
    return Curves(
        np.concatenate([part.precision for part in curves], axis=2)[:, :, back],
        np.concatenate([part.recall for part in curves], axis=1)[:, back],
    )


def _portions(work: np.ndarray, num_images: int) -> Iterator[range]:
    """Yield ranges of categories that are evaluated at once.

    Args:
        work: Detections and annotations of each category: it has at most as many images.
        num_images: Of the whole set.
    """
    start, total = 0, 0
    for i, size in enumerate(work.tolist()):
        total += size
        pairs = (i + 1 - start) * min(total, num_images)
        if i > start and (total > CHUNK or pairs > MAX_PAIRS):
            yield range(start, i)
            start, total = i, size
    yield range(start, len(work))


@contextlib.contextmanager
def paused_collector() -> Iterator[None]:
    """Hold Python's garbage collector, which walks millions of objects again and again here.

    None of them refers to itself, so all are freed without it.
    """
    collecting = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collecting:
            gc.enable()


def _evaluate(
    truth: GroundTruth,
    detections: Detections,
    selection: Selection,
    annotations: np.ndarray,
    rows: np.ndarray,
    kind: str,
) -> Curves:
    """Evaluate some annotations and some rows of the selection, of the same categories."""
    from faster_coco_eval import COCO
    from faster_coco_eval.core import COCOeval_faster

    logging.getLogger("faster_coco_eval").setLevel(logging.WARNING)
    categories = np.unique(truth.categories[annotations]).tolist()
    images = np.unique(np.concatenate([truth.images[annotations], selection.images[rows]]))
    entries = _image_entries(truth, images, categories)
    letters = [{"id": i, "frequency": truth.frequencies[i]} for i in categories]
    wanted = {"images": entries, "categories": letters}
    gt = COCO({**wanted, "annotations": _annotations(truth, annotations, kind)})
    dt = COCO({**wanted, "annotations": _detections(detections, selection, rows, kind)})
    evaluation = COCOeval_faster(gt, dt, kind, lvis_style=True)
    evaluation.params.maxDets = [MAX_DETECTIONS]
    evaluation.evaluate()
    evaluation.accumulate()
    return Curves(
        np.asarray(evaluation.eval["precision"])[..., 0],
        np.asarray(evaluation.eval["recall"])[..., 0],
    )


def _image_entries(
    truth: GroundTruth, images: np.ndarray, categories: list[int]
) -> list[dict[str, Any]]:
    pairs = truth.pairs(images[:, None], np.array(categories)[None])
    incomplete = contains(truth.incomplete, pairs)
    everything = frozenset(categories)  # what cannot be judged has been left out before
    sizes = [(1, 1)] * len(images) if truth.sizes is None else truth.sizes[images].tolist()
    numbers = np.array(categories)
    return [
        {
            "id": image,
            "height": height,
            "width": width,
            "neg_category_ids": everything,
            "not_exhaustive_category_ids": numbers[unjudged].tolist(),
        }
        for image, (height, width), unjudged in zip(images.tolist(), sizes, incomplete, strict=True)
    ]


def _annotations(truth: GroundTruth, chosen: np.ndarray, kind: str) -> list[dict[str, Any]]:
    areas = np.where(truth.ignored, 10 * MAX_AREA, truth.areas)
    columns = (truth.images, truth.categories, truth.boxes, areas)
    rows: list[dict[str, Any]] = [
        {"id": i, "image_id": image, "category_id": category, "bbox": box, "area": area}
        for i, (image, category, box, area) in enumerate(
            zip(*(column[chosen].tolist() for column in columns), strict=True), start=1
        )
    ]
    for i, row in zip(chosen.tolist(), rows, strict=True):
        row["iscrowd"] = 0
        if kind == "segm":
            row["segmentation"] = truth.code(i).as_dict()
    return rows


def _detections(
    detections: Detections, selection: Selection, chosen: np.ndarray, kind: str
) -> list[dict[str, Any]]:
    places = selection.rows[chosen]
    columns = (
        selection.images[chosen],
        selection.categories[chosen],
        detections.boxes[places],
        detections.scores[places],
        selection.areas[chosen],
    )
    rows: list[dict[str, Any]] = [
        {
            "id": i,
            "image_id": image,
            "category_id": category,
            "bbox": box,
            "score": score,
            "area": area,
            "iscrowd": 0,
        }
        for i, (image, category, box, score, area) in enumerate(
            zip(*(column.tolist() for column in columns), strict=True), start=1
        )
    ]
    if kind == "segm":
        for place, row in zip(places.tolist(), rows, strict=True):
            row["segmentation"] = detections.code(place).as_dict()
    return rows
