"""An evaluator for mmdet's runner that hands detections to the evaluation of the examples."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from detection_results import ImageDetections
from evaluation_report import report, training_or_none
from mask_codes import Code
from mmdet.registry import METRICS
from mmengine.evaluator import BaseMetric
from pycocotools import mask as coco_mask
from results_files import open_writer

from balanced_group_softmax.counts import read_annotations


@METRICS.register_module()
class SharedEvaluation(BaseMetric):
    """Writes a file of detections, and prints the original's table and more.

    Args:
        annotations: LVIS or COCO annotations of the images.
        out: Where to write the detections: .json (LVIS results) or .pkl (the original's format).
        kinds: "bbox", "segm" or both; none only writes.
        train_annotations: For AP by count group.
        figures: A JSON file for the figures. (`metrics` would mean something to mmengine.)
        legacy_widths: Of .pkl files: see `results_pickle`.
    """

    default_prefix = "lvis"

    def __init__(
        self,
        annotations: str,
        out: str,
        kinds: Sequence[str] = ("bbox",),
        train_annotations: str | None = None,
        figures: str | None = None,
        legacy_widths: bool = True,
        **options: Any,
    ) -> None:
        super().__init__(**options)
        self.annotations = annotations
        self.out = Path(out)
        self.kinds = list(kinds)
        self.train_annotations = train_annotations
        self.figures = None if figures is None else Path(figures)
        self.legacy_widths = legacy_widths

    def process(self, data_batch: Any, data_samples: Sequence[dict[str, Any]]) -> None:
        """Keep the detections of some images, masks compressed."""
        for sample in data_samples:
            found = sample["pred_instances"]
            boxes = found["bboxes"].double().cpu().numpy()
            boxes[:, 2:] -= boxes[:, :2]
            codes = None
            if "masks" in found:
                codes = [_code(mask) for mask in found["masks"].cpu().numpy()]
            labels, scores = found["labels"].cpu().numpy(), found["scores"].double().cpu().numpy()
            self.results.append((sample["img_id"], labels, boxes, scores, codes))

    def compute_metrics(self, results: list[Any]) -> dict[str, float]:
        """Write the file, print the tables, and return the figures; of the first process alone."""
        data = read_annotations(self.annotations)
        image_ids = [row["id"] for row in data["images"]]
        category_ids = [row["id"] for row in data["categories"]]
        ids = np.array(category_ids)  # mmdet's labels follow the file
        by_image = {result[0]: result for result in results}
        with open_writer(
            self.out, image_ids, category_ids, legacy_widths=self.legacy_widths
        ) as writer:
            for image_id in image_ids:
                if image_id in by_image:
                    _, labels, boxes, scores, codes = by_image[image_id]
                    writer.append(ImageDetections(image_id, ids[labels], boxes, scores, codes))
        if not self.kinds:
            return {}
        figures = report(
            self.out,
            data,
            training=training_or_none(self.train_annotations),
            kinds=self.kinds,
            out=self.figures,
            legacy_widths=self.legacy_widths,
            progress=False,
        )
        return {
            f"{kind}_{name}": -1.0 if value is None else value
            for kind, values in figures.items()
            for name, value in values.items()
        }


def _code(mask: np.ndarray) -> Code:
    counts = coco_mask.encode(np.asfortranarray(mask, np.uint8))["counts"]
    height, width = mask.shape
    return Code(height, width, counts)
