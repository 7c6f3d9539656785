"""Faster R-CNN, ResNeXt-101-32x8d-FPN, LVIS v1, Balanced Group Softmax."""

from .lvis import bags

model, dataloader, optimizer, lr_multiplier, train = bags("faster_rcnn_x101", "v1")
