"""Detections for the tests of evaluation: around annotations, with ties, crowds and empty boxes."""

from typing import Any

import numpy as np


def rectangle(box: list[float], height: int, width: int) -> dict[str, Any]:
    """Return a box as a mask in run lengths."""
    from pycocotools import mask as coco_mask

    x, y, w, h = box
    corners = [[x, y, x, y + h, x + w, y + h, x + w, y]]
    code = coco_mask.merge(coco_mask.frPyObjects(corners, height, width))
    return {"size": [height, width], "counts": code["counts"].decode()}


def detections_around(
    data: dict[str, Any], *, each: int, seed: int = 0, masks: bool = False
) -> list[dict[str, Any]]:
    """Return detections around every annotation, in a random order.

    Scores have two digits, so that many are equal; some boxes have no area; a fifth have another
    category; the images of every tenth and the categories of every fifth annotation have none.

    Args:
        data: Annotations.
        each: Detections of an annotation at most.
        seed: Of all random choices.
        masks: Add masks: the same boxes.
    """
    generator = np.random.default_rng(seed)
    images = {row["id"]: row for row in data["images"]}
    present = sorted({row["category_id"] for row in data["annotations"]})
    no_images = {row["image_id"] for row in data["annotations"][::50]}
    records = []
    for annotation in data["annotations"]:
        if annotation["image_id"] in no_images:
            continue
        image = images[annotation["image_id"]]
        height, width = image["height"], image["width"]
        for _ in range(generator.integers(0, each + 1)):
            x, y, w, h = annotation["bbox"] * generator.normal(1, 0.08, 4)
            x, y = np.clip(x, 0, width - 2), np.clip(y, 0, height - 2)
            w, h = np.clip(w, 0, width - x), np.clip(h, 0, height - y)
            if generator.random() < 0.02:
                w = 0.0
            category = annotation["category_id"]
            if generator.random() < 0.2:
                category = int(generator.choice(present))
            if category in present[::5]:
                continue
            box = [float(value) for value in (x, y, w, h)]
            record = {
                "image_id": annotation["image_id"],
                "category_id": category,
                "bbox": box,
                "score": round(float(generator.random()), 2),
            }
            if masks:
                record["segmentation"] = rectangle(box, height, width)
            records.append(record)
    return [records[i] for i in generator.permutation(len(records))]
