"""A Faster or Mask R-CNN that trains from scratch in a minute or two on two CPU cores.

Everything but the backbone is torchvision's own. Sizes are chosen for images of about 128 pixels.
"""

from collections import OrderedDict
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.models.detection import FasterRCNN, MaskRCNN
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.ops import FeaturePyramidNetwork, MultiScaleRoIAlign

WIDTH = 32  # channels of the stem
FPN_CHANNELS = 64
BOX_FEATURES = 256
ROI_SIZE = 6
ANCHORS = (0.16, 0.28, 0.44)  # of the image's side, for each level
ASPECT_RATIOS = (0.5, 1.0, 2.0)


def small_detector(kind: type[FasterRCNN], num_categories: int, **limits: Any) -> FasterRCNN:
    """Build the detector, with fresh weights.

    Args:
        kind: `FasterRCNN` or `MaskRCNN`.
        num_categories: C; label 0 is background.
        limits: Further arguments of `kind`. Images are resized to the last of `min_size`, for
            which the anchors are made.
    """
    levels = ["0", "1", "2"]
    side = limits["min_size"][-1]
    if issubclass(kind, MaskRCNN):
        limits |= {
            "mask_roi_pool": MultiScaleRoIAlign(levels, output_size=14, sampling_ratio=1),
            "mask_head": MaskRCNNHeads(FPN_CHANNELS, (FPN_CHANNELS,) * 2, 1),
            "mask_predictor": MaskRCNNPredictor(FPN_CHANNELS, FPN_CHANNELS, num_categories + 1),
        }
    return kind(
        SmallBackbone(),
        rpn_anchor_generator=AnchorGenerator(
            tuple((round(part * side),) for part in ANCHORS),
            (ASPECT_RATIOS,) * len(levels),
        ),
        rpn_pre_nms_top_n_train=300,
        rpn_post_nms_top_n_train=100,
        rpn_pre_nms_top_n_test=200,
        rpn_post_nms_top_n_test=100,
        rpn_batch_size_per_image=64,
        box_roi_pool=MultiScaleRoIAlign(levels, output_size=ROI_SIZE, sampling_ratio=1),
        box_head=TwoMLPHead(FPN_CHANNELS * ROI_SIZE**2, BOX_FEATURES),
        box_predictor=FastRCNNPredictor(BOX_FEATURES, num_categories + 1),
        **limits,
    )


class SmallBackbone(nn.Module):
    """Three levels of a feature pyramid, strides 4, 8 and 16."""

    out_channels = FPN_CHANNELS

    def __init__(self) -> None:
        super().__init__()
        widths = [2 * WIDTH, 3 * WIDTH, 4 * WIDTH]
        self.level0 = nn.Sequential(
            conv_bn_relu(3, WIDTH, stride=2),
            conv_bn_relu(WIDTH, widths[0], stride=2),
            Residual(widths[0]),
        )
        self.level1 = nn.Sequential(
            conv_bn_relu(widths[0], widths[1], stride=2), Residual(widths[1])
        )
        self.level2 = nn.Sequential(
            conv_bn_relu(widths[1], widths[2], stride=2), Residual(widths[2])
        )
        self.fpn = FeaturePyramidNetwork(widths, FPN_CHANNELS)

    def forward(self, images: Tensor) -> OrderedDict[str, Tensor]:
        level0 = self.level0(images)
        level1 = self.level1(level0)
        level2 = self.level2(level1)
        pyramid: OrderedDict[str, Tensor] = self.fpn(
            OrderedDict([("0", level0), ("1", level1), ("2", level2)])
        )
        return pyramid


class Residual(nn.Module):
    """A basic block."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1 = conv_bn_relu(channels, channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(x + self.bn2(self.conv2(self.conv1(x))))


def conv_bn_relu(inputs: int, outputs: int, stride: int = 1) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1, bias=False),
        nn.BatchNorm2d(outputs),
        nn.ReLU(inplace=True),
    )


class SharedBoxRegression(nn.Linear):
    """Four deltas, repeated for every label, since torchvision picks them by label.

    A category seen five times cannot learn a box regression of its own; sharing it, as cascades
    do, leaves the classifier as what separates rare from frequent categories.
    """

    def __init__(self, in_features: int, num_labels: int) -> None:
        super().__init__(in_features, 4)
        self.num_labels = num_labels

    def forward(self, features: Tensor) -> Tensor:
        return super().forward(features).repeat(1, self.num_labels)
