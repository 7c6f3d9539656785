"""From boxes and scores to `Instances` of detectron2, by `select_detections`."""

from collections.abc import Sequence

from detectron2.structures import Boxes, Instances
from torch import Tensor

from balanced_group_softmax.detections import select_detections

__all__ = ["select_instances"]


def select_instances(
    boxes: Sequence[Tensor],
    scores: Sequence[Tensor],
    image_shapes: Sequence[tuple[int, int]],
    score_thresh: float,
    nms_thresh: float,
    topk_per_image: int,
) -> tuple[list[Instances], list[Tensor]]:
    """Return what detectron2's `fast_rcnn_inference` returns, by `select_detections`.

    detectron2 shifts boxes apart by category in float32, which can move an overlap across the
    threshold; this is exact, and faster with many categories.

    Args:
        boxes: of each image, [Ri, 4] or [Ri, K * 4] as (x1, y1, x2, y2), pixels.
        scores: of each image, [Ri, K + 1], background last.
        image_shapes: (height, width) of each image, to which boxes are clipped.
        score_thresh: detections score strictly more.
        nms_thresh: in [0, 1]; an overlap strictly above it suppresses.
        topk_per_image: detections of an image at most; all if negative.

    Returns:
        Per image, `Instances` with `pred_boxes`, `scores` and `pred_classes`, best first, and the
        index of the RoI of each, int64.
    """
    found = [
        _select_in_image(*image, score_thresh, nms_thresh, topk_per_image)
        for image in zip(boxes, scores, image_shapes, strict=True)
    ]
    return [instances for instances, _ in found], [rows for _, rows in found]


def _select_in_image(
    boxes: Tensor,
    scores: Tensor,
    image_shape: tuple[int, int],
    score_thresh: float,
    nms_thresh: float,
    topk: int,
) -> tuple[Instances, Tensor]:
    # As in detectron2, a RoI with anything that is not finite gives no detection.
    finite = boxes.isfinite().all(dim=1) & scores.isfinite().all(dim=1)
    scores = scores[:, :-1].masked_fill(~finite[:, None], float("nan"))
    clipped = Boxes(boxes.masked_fill(~finite[:, None], 0).reshape(-1, 4))
    clipped.clip(image_shape)
    per_row = clipped.tensor.view(len(boxes), boxes.shape[1] // 4, 4)
    detections = select_detections(
        per_row[:, 0] if per_row.shape[1] == 1 else per_row,
        scores,
        score_threshold=score_thresh,
        nms_threshold=nms_thresh,
        max_detections=topk if topk >= 0 else scores.numel(),
    )
    instances = Instances(
        image_shape,
        pred_boxes=Boxes(detections.boxes),
        scores=detections.scores,
        pred_classes=detections.categories,
    )
    return instances, detections.rows
