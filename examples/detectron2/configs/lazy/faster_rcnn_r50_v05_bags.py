"""Faster R-CNN, ResNet-50-FPN, LVIS v0.5, Balanced Group Softmax."""

from .lvis import bags

model, dataloader, optimizer, lr_multiplier, train = bags("faster_rcnn_r50", "v0.5")
