"""Evaluates a detector of detectron2 as LVIS does, by this project's own evaluation.

detectron2's `LVISEvaluator` needs what numpy 2 no longer has, and is slower.
"""

import sys
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from detectron2.evaluation import DatasetEvaluator
from detectron2.structures import BoxMode, Instances
from detectron2.utils import comm
from detectron2_setup import annotations_of

from balanced_group_softmax.counts import category_ids

# After detectron2 was found: this folder's parent has a folder of the same name.
sys.path.append(str(Path(__file__).resolve().parents[1]))

from detection_results import Gatherer, ImageDetections, check_image
from evaluation_report import read_training, report
from mask_codes import Code
from results_json import JsonWriter


class LVISReport(DatasetEvaluator):
    """AP and AR of LVIS, by frequency and count group, AP fixed and pooled AP; see docs/evaluation.

    For LVIS and COCO annotations. Label k is the category with the k-th smallest id, from 0.

    Args:
        dataset_name: Of the registered data set that is evaluated.
        train_dataset_name: Of the training set, for count groups and frequencies; the latter are
            those of the evaluated file without it.
        kinds: "bbox", "segm" or both.
        output_dir: For results.json and metrics.json; None for no files.
        method: "fast" or "official".
    """

    def __init__(
        self,
        dataset_name: str,
        train_dataset_name: str | None = None,
        kinds: Sequence[str] = ("bbox",),
        output_dir: str | None = None,
        method: str = "fast",
    ) -> None:
        self.annotations = annotations_of(dataset_name)
        self.train_annotations = (
            None if train_dataset_name is None else annotations_of(train_dataset_name)
        )
        self.kinds = tuple(kinds)
        self.output_dir = None if output_dir is None else Path(output_dir)
        self.method = method
        self._ids = np.array(category_ids(self.annotations), np.int64)
        self._images: list[ImageDetections] = []

    def reset(self) -> None:
        self._images = []

    def process(self, inputs: Any, outputs: Any) -> None:
        for image, output in zip(inputs, outputs, strict=True):
            found = output["instances"].to("cpu")
            detections = as_detections(image["image_id"], found, self._ids, "segm" in self.kinds)
            check_image(detections)
            self._images.append(detections)

    def evaluate(self) -> dict[str, dict[str, float]]:
        parts = comm.gather(self._images, dst=0)
        if not comm.is_main_process():
            return {}
        images = {image.image_id: image for part in parts for image in part}
        gatherer = Gatherer()
        for image in images.values():
            gatherer.add(image)
        if self.output_dir is not None:
            self.output_dir.mkdir(parents=True, exist_ok=True)
            with JsonWriter(self.output_dir / "results.json") as writer:
                for image in images.values():
                    writer.append(image)
        training = None
        if self.train_annotations is not None:
            training = read_training(self.train_annotations)
        metrics = report(
            gatherer.finish(),
            self.annotations,
            training=training,
            kinds=self.kinds,
            method=self.method,
            out=None if self.output_dir is None else self.output_dir / "metrics.json",
            progress=False,
        )
        return OrderedDict((kind, as_numbers(figures)) for kind, figures in metrics.items())


def as_detections(
    image_id: int, found: Instances, ids: np.ndarray, with_masks: bool
) -> ImageDetections:
    """Return an image's detections; labels are positions in `ids`.

    Raises:
        ValueError: Masks are wanted, and there are none.
    """
    masks = None
    if with_masks:
        if not found.has("pred_masks"):
            raise ValueError("Expected a detector with masks to evaluate segm, got one without")
        from pycocotools import mask as coco_mask

        masks = []
        for mask in found.pred_masks:
            code = coco_mask.encode(np.asfortranarray(mask.numpy(), np.uint8))
            masks.append(Code(mask.shape[0], mask.shape[1], code["counts"]))
    boxes = found.pred_boxes.tensor.to(torch.float64)
    return ImageDetections(
        image_id,
        ids[found.pred_classes.numpy()],
        BoxMode.convert(boxes, BoxMode.XYXY_ABS, BoxMode.XYWH_ABS).numpy(),
        found.scores.double().numpy(),
        masks,
    )


def as_numbers(figures: Mapping[str, float | None]) -> dict[str, float]:
    """Return figures as detectron2 writes them: NaN where there is nothing to measure."""
    return {name: float("nan") if value is None else value for name, value in figures.items()}
