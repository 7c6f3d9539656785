"""The small backbone of the demo for detectron2: three levels, trained from scratch on a CPU."""

import sys
from pathlib import Path

from detectron2.layers import ShapeSpec
from detectron2.modeling import Backbone
from torch import Tensor

# After detectron2 was found: this folder's parent has a folder of the same name.
sys.path.append(str(Path(__file__).resolve().parents[1]))

import small_detector

STRIDES = {"p2": 4, "p3": 8, "p4": 16}


class SmallBackbone(Backbone):
    """`small_detector.SmallBackbone` as a backbone of detectron2."""

    def __init__(self) -> None:
        super().__init__()
        self.pyramid = small_detector.SmallBackbone()

    @property
    def size_divisibility(self) -> int:
        return STRIDES["p4"]

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        return dict(zip(STRIDES, self.pyramid(images).values(), strict=True))

    def output_shape(self) -> dict[str, ShapeSpec]:
        channels = small_detector.FPN_CHANNELS
        return {name: ShapeSpec(channels, stride=stride) for name, stride in STRIDES.items()}
