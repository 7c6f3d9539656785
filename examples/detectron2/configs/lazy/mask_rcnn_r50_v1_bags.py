"""Mask R-CNN, ResNet-50-FPN, LVIS v1, Balanced Group Softmax."""

from .lvis import bags

model, dataloader, optimizer, lr_multiplier, train = bags("mask_rcnn_r50", "v1")
