"""AP and AR of LVIS for boxes and masks: over all, by frequency, by count group, fixed, pooled.

Two methods give the same figures: the official code, and `faster-coco-eval`, which is several times
faster and needs less memory.
"""

import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import fast_lvis
import numpy as np
from detection_results import Detections, from_records
from detection_selection import best_of_categories, best_of_images
from fast_lvis import Curves, evaluate_fast
from fixed_ap import evaluate_fixed
from ground_truth import (
    IOU_THRESHOLDS,
    GroundTruth,
    frequency,
    read_frequencies,
    read_ground_truth,
)
from official_lvis import evaluate_officially, official_classes
from torch import Tensor

from balanced_group_softmax.counts import Source

__all__ = [
    "FIXED",
    "METHODS",
    "METRICS",
    "RECALLS",
    "Metrics",
    "as_results",
    "check_installed",
    "choose_method",
    "evaluate",
    "evaluate_boxes",
    "frequency",
    "read_frequencies",
]

Metrics = dict[str, float | None]
Groups = Mapping[str, Sequence[int]]

METRICS = ("AP", "AP50", "AP75", "APs", "APm", "APl", "APr", "APc", "APf")
RECALLS = ("AR", "ARs", "ARm", "ARl")
FIXED = ("APfixed", "APfixed_r", "APfixed_c", "APfixed_f", "APpooled")
METHODS = ("fast", "official")
FREQUENCIES = "rcf"


def evaluate_boxes(
    annotations: Source,
    detections: Iterable[Mapping[str, Any]],
    *,
    groups: Groups | None = None,
    frequencies: Mapping[int, str] | None = None,
) -> Metrics:
    """Return box metrics in percent by the official code; `None` where there is nothing to measure.

    Keys: `AP`, `AP50`, `AP75` (IoU), `APs`, `APm`, `APl` (area), `APr`, `APc`, `APf` (frequency),
    `AR`, `ARs`, `ARm`, `ARl` (at 300 detections an image), and `AP_<name>` for each of `groups`.

    COCO files lack what LVIS knows about absence: there every category counts as verified absent
    where it is not annotated, and crowds are ignored.

    Args:
        annotations: Path of an LVIS or COCO file, or its content.
        detections: In the format of LVIS results: `image_id`, `category_id`, `bbox` as (x, y,
            width, height), `score`. There may be none.
        groups: Category ids by the name of a group.
        frequencies: "r", "c" or "f" by category id, as :func:`read_frequencies` returns them for
            the training annotations. By default those of the file itself.

    Raises:
        ImportError: `lvis` or `pycocotools` is not installed.
        ValueError: The annotation file is not valid, or detections are not, or of images or
            categories that it does not have.
    """
    check_installed("official")
    truth = read_ground_truth(annotations, frequencies=frequencies)
    boxes = [{k: v for k, v in row.items() if k != "segmentation"} for row in detections]
    return evaluate(truth, from_records(boxes), groups=groups, method="official", fixed=False)


def evaluate(
    truth: GroundTruth,
    detections: Detections,
    kind: str = "bbox",
    *,
    groups: Groups | None = None,
    method: str = "fast",
    fixed: bool = True,
    progress: bool = False,
) -> Metrics:
    """Return metrics in percent; `None` where there is nothing to measure.

    Keys: those of :func:`evaluate_boxes`, and with `fixed` `APfixed`, the same by frequency as
    `APfixed_r`, `APfixed_c`, `APfixed_f`, and `APpooled` (see `fixed_ap`).

    Args:
        truth: The annotations; with masks for "segm".
        detections: With masks for "segm". There may be none.
        kind: "bbox" or "segm".
        groups: Category ids by the name of a group.
        method: "fast" or "official". AP fixed and pooled AP are computed in one way only.
        fixed: Compute AP fixed and pooled AP too, as a second pass.
        progress: Show bars.

    Raises:
        ImportError: What the method needs is not installed.
        ValueError: Detections are of other images or categories, or lack masks.
    """
    if kind not in ("bbox", "segm"):
        raise ValueError(f'Expected `kind` "bbox" or "segm", got {kind!r}')
    if method not in METHODS:
        raise ValueError(f"Expected `method` in {METHODS}, got {method!r}")
    images, categories = truth.locate(detections, kind)
    groups = groups or {}
    names = [*METRICS, *RECALLS, *(f"AP_{name}" for name in groups), *(FIXED if fixed else ())]
    if not len(truth.images):
        return dict.fromkeys(names)
    means = _Means(truth)
    if method == "official":
        figures, precision = evaluate_officially(truth, detections, images, categories, kind)
        metrics = {name: _percent(figures[name]) for name in (*METRICS, *RECALLS)}
        precision = precision[..., 0]
    else:
        selection = best_of_images(truth, detections, images, categories)
        curves = evaluate_fast(truth, detections, selection, kind, progress=progress)
        metrics = means.figures(curves)
        precision = curves.precision[..., 0]
    for name, members in groups.items():
        metrics[f"AP_{name}"] = _mean(precision[..., means.of_ids(members)])
    if fixed:
        selection = best_of_categories(truth, detections, images, categories)
        found = evaluate_fixed(truth, detections, selection, kind, progress=progress)
        metrics["APfixed"] = _mean(found.precision)
        for letter in FREQUENCIES:
            metrics[f"APfixed_{letter}"] = _mean(found.precision[..., means.of_letter(letter)])
        metrics["APpooled"] = _mean(found.pooled)
    return metrics


def choose_method(method: str) -> str:
    """Return the method if it can be used; the official one, with a warning, in place of "fast".

    Raises:
        ImportError: What the method needs is not installed.
    """
    if method == "fast" and not fast_lvis.is_installed():
        warnings.warn(
            "faster-coco-eval is not installed (pip install faster-coco-eval): evaluating by the "
            "official code, which gives the same figures and takes longer",
            stacklevel=2,
        )
        method = "official"
    check_installed(method)
    return method


def check_installed(method: str = "official") -> None:
    """Raise ImportError now, rather than after training, if evaluation lacks a package."""
    if method == "official":
        official_classes()
    else:
        fast_lvis.check_installed()


def as_results(
    image_id: int, output: Mapping[str, Tensor], category_ids: Sequence[int]
) -> list[dict[str, Any]]:
    """Return a torchvision detector's output for an image in the format of LVIS results.

    Args:
        image_id: Of the annotation file.
        output: `boxes` [N, 4] (x1, y1, x2, y2), `scores` [N], `labels` [N] in 1..C.
        category_ids: Of labels 1..C.
    """
    boxes = output["boxes"].double().cpu()
    boxes[:, 2:] -= boxes[:, :2]
    return [
        {"image_id": image_id, "category_id": category_ids[label - 1], "bbox": box, "score": score}
        for box, score, label in zip(
            boxes.tolist(), output["scores"].tolist(), output["labels"].tolist(), strict=True
        )
    ]


class _Means:
    """Means over categories, which are numbered as `truth.present` has them."""

    def __init__(self, truth: GroundTruth) -> None:
        self._ids = truth.category_ids[truth.present]
        self._letters = np.array(truth.frequencies)[truth.present]

    def of_ids(self, ids: Iterable[int]) -> np.ndarray:
        return np.flatnonzero(np.isin(self._ids, list(ids)))

    def of_letter(self, letter: str) -> np.ndarray:
        return np.flatnonzero(self._letters == letter)

    def figures(self, curves: Curves) -> Metrics:
        """Return the 13 figures of LVIS."""
        precision, recall = curves
        everything = precision[..., 0]
        values = [everything]
        values += [everything[np.isclose(IOU_THRESHOLDS, iou)] for iou in (0.5, 0.75)]
        values += [precision[..., area] for area in (1, 2, 3)]
        values += [everything[..., self.of_letter(letter)] for letter in FREQUENCIES]
        values += [recall[..., area] for area in range(4)]
        return {
            name: _mean(value) for name, value in zip((*METRICS, *RECALLS), values, strict=True)
        }


def _mean(values: np.ndarray) -> float | None:
    """Return the mean in percent of what is not -1."""
    some = values[values > -1]
    return _percent(some.mean()) if some.size else None


def _percent(value: float) -> float | None:
    """The official code says -1 where there is nothing to average."""
    return None if value < 0 else 100 * float(value)
