"""Box AP and AR by the official LVIS code, over all, by frequency, and by count group.

The reference is the package `lvis` 0.5.3. It asks for `np.float`, which numpy no longer has, and
importing it needs OpenCV, for drawing. So its evaluation is loaded here as private modules with
names of their own: nothing in numpy, and no module called `lvis`, is touched.
"""

import builtins
import importlib.util
import logging
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
from annotation_fields import is_number, read_areas, read_boxes, source_name, verified_categories
from torch import Tensor

from balanced_group_softmax.counts import Source, read_annotations

Metrics = dict[str, float | None]

MAX_DETECTIONS = 300  # of an image
METRICS = ("AP", "AP50", "AP75", "APs", "APm", "APl", "APr", "APc", "APf")
RECALLS = ("AR", "ARs", "ARm", "ARl")


def evaluate_boxes(
    annotations: Source,
    detections: Iterable[Mapping[str, Any]],
    *,
    groups: Mapping[str, Sequence[int]] | None = None,
    frequencies: Mapping[int, str] | None = None,
) -> Metrics:
    """Return box metrics in percent; `None` where there is nothing to measure.

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
    official, truth_class, results_class = _official_classes()
    source = read_annotations(annotations, complete=True)
    try:
        data = _complete(source, frequencies)
    except ValueError as error:
        raise ValueError(f"{source_name(annotations)}: {error}") from None
    rows = [dict(row) for row in detections]
    _check_detections(rows, data)

    truth = _indexed(truth_class, data)
    if rows:
        results = results_class(truth, rows, max_dets=MAX_DETECTIONS)
    else:  # the official reader looks into the first detection
        results = _indexed(results_class, {**data, "annotations": []})
    evaluation = official(truth, results, iou_type="bbox")
    # Categories without annotations have no AP and enter no mean: leaving them out changes
    # nothing but the time.
    present = sorted({row["category_id"] for row in data["annotations"]})
    evaluation.params.cat_ids = present
    if not present:
        return dict.fromkeys([*METRICS, *RECALLS, *(f"AP_{name}" for name in groups or {})])
    evaluation.run()
    values = {name.partition("@")[0]: value for name, value in evaluation.results.items()}
    metrics = {name: _percent(values[name]) for name in (*METRICS, *RECALLS)}
    precision = evaluation.eval["precision"][:, :, :, 0]  # IoU, recall, category, all areas
    for name, members in (groups or {}).items():
        wanted = set(members)
        some = precision[:, :, [i for i, category in enumerate(present) if category in wanted]]
        some = some[some > -1]
        metrics[f"AP_{name}"] = _percent(some.mean() if some.size else -1)
    return metrics


def check_installed() -> None:
    """Raise ImportError now, rather than after training, if evaluation lacks a package."""
    _official_classes()


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


def _percent(value: float) -> float | None:
    """The official code says -1 where there is nothing to average."""
    return None if value < 0 else 100 * float(value)


def _check_detections(rows: Sequence[dict[str, Any]], data: Mapping[str, Any]) -> None:
    known_images = {row["id"] for row in data["images"]}
    known_categories = {row["id"] for row in data["categories"]}
    for i, row in enumerate(rows):
        image, category, score = row.get("image_id"), row.get("category_id"), row.get("score")
        if image not in known_images or category not in known_categories:
            raise ValueError(
                "Expected `detections` of images and categories in the annotations, got image "
                f"{image}, category {category}"
            )
        if not is_number(score):
            raise ValueError(f"Expected `score` of detection {i} to be finite, got {score!r}")
    read_boxes(rows, "detection")


def _complete(data: dict[str, Any], frequencies: Mapping[int, str] | None) -> dict[str, Any]:
    """Return an annotation file with all that the official code reads; `data` stays as it is."""
    every_id = [row["id"] for row in data["categories"]]
    known = set(every_id)
    absence = {"neg_category_ids": every_id, "not_exhaustive_category_ids": []}
    images = [{**row, **absence, **verified_categories(row, known)} for row in data["images"]]
    areas = read_areas(data["annotations"], read_boxes(data["annotations"])).tolist()
    annotations = [
        {"ignore": row.get("iscrowd", 0), **row, "area": area}
        for row, area in zip(data["annotations"], areas, strict=True)
    ]
    letters = read_frequencies(data)
    letters.update(frequencies or {})
    categories = [{**row, "frequency": letters[row["id"]]} for row in data["categories"]]
    return {"images": images, "annotations": annotations, "categories": categories}


def _indexed(cls: Any, data: Mapping[str, Any]) -> Any:
    """Make an official `LVIS` object from content; its constructor reads files only."""
    made = cls.__new__(cls)
    made.logger = logging.getLogger(cls.__module__)
    made.dataset = data
    made._create_index()
    return made


@cache
def _official_classes() -> tuple[Any, Any, Any]:
    """Return `LVISEval`, `LVIS`, `LVISResults` of private copies of the official modules."""
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
