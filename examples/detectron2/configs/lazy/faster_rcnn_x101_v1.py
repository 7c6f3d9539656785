"""Faster R-CNN, ResNeXt-101-32x8d-FPN, LVIS v1, plain softmax."""

from .lvis import baseline

model, dataloader, optimizer, lr_multiplier, train = baseline("faster_rcnn_x101", "v1")
