"""The official LVIS evaluation, loaded privately.

The reference is the package `lvis` 0.5.3. It asks for `np.float`, which numpy no longer has, and
importing it needs OpenCV, for drawing. So its evaluation is loaded here as private modules with
names of their own: nothing in numpy, and no module called `lvis`, is touched.
"""

import builtins
import importlib.util
import logging
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
from detection_results import Detections
from ground_truth import MAX_DETECTIONS, GroundTruth


def evaluate_officially(
    truth: GroundTruth,
    detections: Detections,
    images: np.ndarray,
    categories: np.ndarray,
    kind: str,
) -> tuple[dict[str, float], np.ndarray]:
    """Run the official code on the categories that have annotations.

    Categories without annotations have no AP and enter no mean: leaving them out changes nothing
    but the time.

    Args:
        truth: With at least one annotation.
        detections: What is evaluated.
        images: Numbers of the images of the detections, int64 [N].
        categories: Numbers of their categories, int64 [N].
        kind: "bbox" or "segm".

    Returns:
        The official figures by name, -1 where there is nothing to average, and the precision
        float64 [IoU, recall, category, area] of the categories with annotations.
    """
    official, truth_class, results_class = official_classes()
    data = _dataset(truth, kind)
    made = _indexed(truth_class, data)
    if len(detections):
        rows = _results(detections, images, categories, kind)
        results = results_class(made, rows, max_dets=MAX_DETECTIONS)
    else:  # the official reader looks into the first detection
        results = _indexed(results_class, {**data, "annotations": []})
    evaluation = official(made, results, iou_type=kind)
    evaluation.params.cat_ids = truth.present.tolist()
    evaluation.run()
    figures = {name.partition("@")[0]: value for name, value in evaluation.results.items()}
    return figures, evaluation.eval["precision"]


def _dataset(truth: GroundTruth, kind: str) -> dict[str, Any]:
    """Return annotations as the official code wants them, by numbers in place of ids."""
    every_category = range(len(truth.category_ids))
    annotated: dict[int, list[int]] = {}
    incomplete: dict[int, list[int]] = {}
    for lists, pairs in ((annotated, truth.verified), (incomplete, truth.incomplete)):
        for image, category in zip(
            *(part.tolist() for part in np.divmod(pairs, len(every_category))), strict=True
        ):
            lists.setdefault(image, []).append(category)
    sizes = [(1, 1)] * len(truth.image_ids) if truth.sizes is None else truth.sizes.tolist()
    images = [
        {
            "id": image,
            "height": height,
            "width": width,
            "neg_category_ids": every_category if all_verified else annotated.get(image, []),
            "not_exhaustive_category_ids": incomplete.get(image, []),
        }
        for image, (all_verified, (height, width)) in enumerate(
            zip(truth.all_verified.tolist(), sizes, strict=True)
        )
    ]
    columns = (truth.images, truth.categories, truth.boxes, truth.areas, truth.ignored)
    annotations: list[dict[str, Any]] = [
        {
            "id": i,
            "image_id": image,
            "category_id": category,
            "bbox": box,
            "area": area,
            "ignore": ignored,
        }
        # From 1 on: the official code takes 0 for no match.
        for i, (image, category, box, area, ignored) in enumerate(
            zip(*(column.tolist() for column in columns), strict=True), start=1
        )
    ]
    if kind == "segm":
        for i, row in enumerate(annotations):
            row["segmentation"] = truth.code(i).as_dict()
    categories = [{"id": i, "frequency": letter} for i, letter in enumerate(truth.frequencies)]
    return {"images": images, "annotations": annotations, "categories": categories}


def _results(
    detections: Detections, images: np.ndarray, categories: np.ndarray, kind: str
) -> list[dict[str, Any]]:
    columns = (images, categories, detections.boxes, detections.scores)
    rows: list[dict[str, Any]] = [
        {"image_id": image, "category_id": category, "bbox": box, "score": score}
        for image, category, box, score in zip(
            *(column.tolist() for column in columns), strict=True
        )
    ]
    if kind == "segm":
        for i, row in enumerate(rows):
            row["segmentation"] = detections.code(i).as_dict()
    return rows


def _indexed(cls: Any, data: Mapping[str, Any]) -> Any:
    """Make an official `LVIS` object from content; its constructor reads files only."""
    made = cls.__new__(cls)
    made.logger = logging.getLogger(cls.__module__)
    made.dataset = data
    made._create_index()
    return made


@cache
def official_classes() -> tuple[Any, Any, Any]:
    """Return `LVISEval`, `LVIS`, `LVISResults` of private copies of the official modules.

    Raises:
        ImportError: `lvis` or `pycocotools` is not installed.
    """
    spec = importlib.util.find_spec("lvis")
    if spec is None or not spec.submodule_search_locations:
        raise ImportError("Evaluation needs the package lvis: pip install lvis pycocotools")
    folder = Path(spec.submodule_search_locations[0])
    loaded: dict[str, ModuleType] = {}

    def load(name: str) -> ModuleType:
        if name not in loaded:
            module = loaded[name] = ModuleType(f"_official_{name}")
            path = folder / f"{name.partition('.')[2]}.py"
            module.__dict__["__builtins__"] = {**vars(builtins), "__import__": import_}
            exec(compile(path.read_text(encoding="utf-8"), path, "exec"), module.__dict__)
        return loaded[name]

    def import_(name: str, *args: Any, **kwargs: Any) -> Any:
        # The modules import each other by absolute names, which would run the package's
        # __init__, and with it the import of OpenCV.
        return (
            load(name) if name.startswith("lvis.") else builtins.__import__(name, *args, **kwargs)
        )

    evaluation = load("lvis.eval")
    old_numpy = ModuleType("numpy")
    old_numpy.__dict__.update(vars(np), float=float)
    evaluation.__dict__["np"] = old_numpy
    # It warns of results that are not read from a file.
    logging.getLogger("_official_lvis.results").setLevel(logging.ERROR)
    truth, results = load("lvis.lvis"), load("lvis.results")
    return evaluation.LVISEval, truth.LVIS, results.LVISResults
