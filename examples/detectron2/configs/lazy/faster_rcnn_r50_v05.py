"""Faster R-CNN, ResNet-50-FPN, LVIS v0.5, plain softmax."""

from .lvis import baseline

model, dataloader, optimizer, lr_multiplier, train = baseline("faster_rcnn_r50", "v0.5")
