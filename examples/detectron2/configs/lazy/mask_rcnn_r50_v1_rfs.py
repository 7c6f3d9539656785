"""Mask R-CNN, ResNet-50-FPN, LVIS v1, plain softmax with repeat-factor sampling of images."""

from .lvis import repeat_factor_sampler
from .mask_rcnn_r50_v1 import dataloader, train

dataloader.train.sampler = repeat_factor_sampler(threshold=1e-3)
train.output_dir = "output/lazy_mask_rcnn_r50_v1_rfs"
