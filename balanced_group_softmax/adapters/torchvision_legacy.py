"""The geometry of the original (mmdetection 1) in torchvision, for its converted checkpoints.

The original counts pixels: a box from 10 to 12 is 3 wide. In boxes (x1, y1, x2 + 1, y2 + 1) all
its arithmetic is that of torchvision, but for the places of anchors and for RoIs narrower than a
cell, which are here. What stays different: boxes that lie outside the image altogether, which the
original keeps as a pixel at its border and torchvision drops.

    model.rpn.anchor_generator = OriginalAnchorGenerator()
    model.roi_heads.box_roi_pool = OriginalRoIAlign(["0", "1", "2", "3"], 7)
    model.roi_heads.mask_roi_pool = OriginalRoIAlign(["0", "1", "2", "3"], 14)
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.ops import roi_align

__all__ = ["OriginalAnchorGenerator", "OriginalRoIAlign"]


class OriginalAnchorGenerator(AnchorGenerator):
    """The original's anchors: three a cell, eight cells wide, corners rounded.

    Args:
        strides: of each level, in pixels.
        scale: width of an anchor, in cells.
        ratios: height / width.
    """

    def __init__(
        self,
        strides: Sequence[int] = (4, 8, 16, 32, 64),
        scale: float = 8.0,
        ratios: Sequence[float] = (0.5, 1.0, 2.0),
    ) -> None:
        super().__init__(
            tuple((round(scale * stride),) for stride in strides), (tuple(ratios),) * len(strides)
        )
        self.strides = tuple(strides)
        roots = torch.tensor(ratios).sqrt()
        self.cell_anchors = [
            _cell_anchors(stride, scale * stride / roots, scale * stride * roots)
            for stride in strides
        ]

    def grid_anchors(
        self, grid_sizes: list[list[int]], strides: list[list[Tensor]]
    ) -> list[Tensor]:
        """Anchors of each level, [cells * 3, 4].

        The strides are the levels' own. torchvision divides the image by the level, which gives
        other ones where a level is rounded up: the fifth of an image 160 pixels wide has 3 cells.
        """
        own = [
            [first.new_full((), stride)] * 2
            for (first, _), stride in zip(strides, self.strides, strict=True)
        ]
        return super().grid_anchors(grid_sizes, own)


def _cell_anchors(stride: int, widths: Tensor, heights: Tensor) -> Tensor:
    centre = 0.5 * (stride - 1)
    x, y = 0.5 * (widths - 1), 0.5 * (heights - 1)
    corners = torch.stack([centre - x, centre - y, centre + x, centre + y], dim=1).round()
    return corners + torch.tensor([0.0, 0.0, 1.0, 1.0])  # in today's boxes


class OriginalRoIAlign(nn.Module):
    """RoIAlign over the levels of a pyramid, as the original reads RoIs.

    Corners are not moved by half a cell, and a RoI may be narrower than a cell, which torchvision's
    own pooling does not allow. A RoI of scale s goes to level floor(log2(s / 56)).

    Args:
        featmap_names: names of the levels, of strides 4, 8, 16, ...
        output_size: height and width of the output, in bins.
        sampling_ratio: samples a bin and axis.
    """

    def __init__(
        self, featmap_names: Sequence[str], output_size: int, sampling_ratio: int = 2
    ) -> None:
        super().__init__()
        self.featmap_names = list(featmap_names)
        self.output_size = (output_size, output_size)
        self.sampling_ratio = sampling_ratio

    def forward(
        self,
        features: dict[str, Tensor],
        boxes: list[Tensor],
        image_shapes: list[tuple[int, int]],
    ) -> Tensor:
        """Features [R, channels, output_size, output_size] of boxes, one tensor [n, 4] an image."""
        levels = [features[name] for name in self.featmap_names]
        images = [box.new_full((len(box), 1), index) for index, box in enumerate(boxes)]
        rois = torch.cat([torch.cat(images), torch.cat(boxes)], dim=1)
        sizes = rois[:, 3:] - rois[:, 1:3]
        scales = sizes.prod(1).clamp(min=0).sqrt()
        homes = torch.floor(torch.log2(scales / 56 + 1e-6)).clamp(0, len(levels) - 1)
        pooled = levels[0].new_zeros(len(rois), levels[0].shape[1], *self.output_size)
        for index, level in enumerate(levels):
            stride = 4 << index
            rows = (homes == index).nonzero().squeeze(1)
            shift = rois.new_tensor([0, 1, 1, 1, 1]) * (0.5 * stride)
            pooled[rows] = roi_align(
                level,
                rois[rows] + shift,
                self.output_size,
                spatial_scale=1 / stride,
                sampling_ratio=self.sampling_ratio,
                aligned=True,
            ).to(pooled.dtype)
        return pooled
