"""The geometry of the original (mmdetection 1) in mmdet 3, for its converted checkpoints.

The original counts pixels: a box from 10 to 12 is 3 wide. In boxes (x1, y1, x2 + 1, y2 + 1) all
its arithmetic is that of today (widths, deltas, overlaps, levels), but for three things, which are
here:

- anchors: their centres are half a pixel off, and their corners are rounded;
- RoIAlign: corners are not moved by half a pixel, and a RoI may be narrower than a cell;
- clipping: x1 stays within [0, width - 1] and x2 within [1, width].

And Hybrid Task Cascade takes the mean of the masks of its stages, of which mmdet 3.3 takes the
last.

    custom_imports = dict(imports=["balanced_group_softmax.adapters.mmdet.original_geometry"])

registers them; `use_original_geometry` puts them in a model's config.
"""

import copy
from typing import Any

import torch
from mmcv.ops import RoIAlign
from mmdet.models.roi_heads import HybridTaskCascadeRoIHead
from mmdet.models.roi_heads.roi_extractors import SingleRoIExtractor
from mmdet.models.task_modules import DeltaXYWHBBoxCoder, LegacyAnchorGenerator
from mmdet.registry import MODELS, TASK_UTILS
from torch import Tensor, nn

__all__ = [
    "OriginalAnchorGenerator",
    "OriginalBBoxCoder",
    "OriginalHybridTaskCascadeRoIHead",
    "OriginalRoIAlign",
    "OriginalRoIExtractor",
    "use_original_geometry",
]


@TASK_UTILS.register_module()
class OriginalAnchorGenerator(LegacyAnchorGenerator):
    """The original's anchors, as boxes whose widths are x2 - x1."""

    def __init__(self, *args: Any, center_offset: float = 0.5, **kwargs: Any) -> None:
        super().__init__(*args, center_offset=center_offset, **kwargs)

    def gen_single_level_base_anchors(self, *args: Any, **kwargs: Any) -> Tensor:
        """Anchors around the first cell of a level, [A, 4]."""
        anchors = super().gen_single_level_base_anchors(*args, **kwargs)
        return anchors + anchors.new_tensor([0, 0, 1, 1])


@TASK_UTILS.register_module()
class OriginalBBoxCoder(DeltaXYWHBBoxCoder):
    """mmdet's coder, with boxes clipped as the original does: at least a pixel of the image."""

    def decode(
        self, bboxes: Any, pred_bboxes: Tensor, max_shape: Any = None, **kwargs: Any
    ) -> Tensor:
        """Boxes of deltas; see mmdet. `max_shape` is (height, width) of one image."""
        boxes = super().decode(bboxes, pred_bboxes, None, **kwargs)
        if max_shape is None or not self.clip_border:
            return boxes
        height, width = (int(side) for side in max_shape[:2])
        parts = boxes.reshape(*boxes.shape[:-1], -1, 4)
        least = parts.new_tensor([0, 0, 1, 1])
        most = parts.new_tensor([width - 1, height - 1, width, height])
        return torch.minimum(torch.maximum(parts, least), most).reshape(boxes.shape)


class OriginalRoIAlign(nn.Module):
    """RoIAlign without the shift of half a cell, and without a least size of RoIs.

    mmcv's unaligned variant makes RoIs at least a cell wide, which the original did not. So the
    aligned one is given RoIs half a cell further.
    """

    def __init__(self, output_size: Any, spatial_scale: float, sampling_ratio: int = 0) -> None:
        super().__init__()
        self.align = RoIAlign(output_size, spatial_scale, sampling_ratio, aligned=True)
        self.output_size = self.align.output_size
        self.spatial_scale = spatial_scale

    def forward(self, features: Tensor, rois: Tensor) -> Tensor:
        """Features [R, channels, height, width] of RoIs [R, 5]."""
        shift = 0.5 / self.spatial_scale
        return self.align(features, rois + rois.new_tensor([0, shift, shift, shift, shift]))


@MODELS.register_module()
class OriginalRoIExtractor(SingleRoIExtractor):
    """mmdet's extractor with `OriginalRoIAlign`; `roi_layer` keeps its sizes."""

    def __init__(self, roi_layer: dict[str, Any], *args: Any, **kwargs: Any) -> None:
        layer = {key: roi_layer[key] for key in ("output_size", "sampling_ratio")}
        super().__init__({"type": OriginalRoIAlign, **layer}, *args, **kwargs)


@MODELS.register_module()
class OriginalHybridTaskCascadeRoIHead(HybridTaskCascadeRoIHead):
    """mmdet's head of Hybrid Task Cascade, with the masks of all stages at test."""

    def _mask_forward(
        self,
        stage: int,
        x: Any,
        rois: Tensor,
        semantic_feat: Tensor | None = None,
        training: bool = True,
    ) -> dict[str, Any]:
        whole = super()._mask_forward
        if training:
            results: dict[str, Any] = whole(stage, x, rois, semantic_feat, True)
            return results
        stages = range(self.num_stages)
        return {"mask_preds": [whole(i, x, rois, semantic_feat)["mask_preds"] for i in stages]}


_REPLACED = {
    "AnchorGenerator": OriginalAnchorGenerator.__name__,
    "DeltaXYWHBBoxCoder": OriginalBBoxCoder.__name__,
    "SingleRoIExtractor": OriginalRoIExtractor.__name__,
    "HybridTaskCascadeRoIHead": OriginalHybridTaskCascadeRoIHead.__name__,
}


def use_original_geometry(model: Any) -> Any:
    """Return the config of a two-stage detector with the original's geometry; not changed itself.

    Anchors, coders and RoI extractors are replaced, each bin has 2 x 2 samples, and no box is
    dropped for its size.

    Args:
        model: a model's config, such as `Config.fromfile(path).model`.

    Raises:
        ValueError: there is nothing to replace: it is no two-stage detector on feature pyramids.
    """
    model = copy.deepcopy(model)
    if not _replace(model):
        raise ValueError(
            "Expected the config of a two-stage detector with AnchorGenerator, DeltaXYWHBBoxCoder "
            "and SingleRoIExtractor, got none of them"
        )
    return model


def _replace(part: Any) -> int:
    """Replace in place; return how many."""
    if isinstance(part, list | tuple):
        return sum(_replace(one) for one in part)
    if not isinstance(part, dict):
        return 0
    replaced = 0
    if part.get("type") in _REPLACED:
        part["type"] = _REPLACED[part["type"]]
        replaced += 1
    if part.get("type") == "RoIAlign":
        part["sampling_ratio"] = 2
    if "min_bbox_size" in part:
        part["min_bbox_size"] = -1
    return replaced + sum(_replace(part[key]) for key in part)
