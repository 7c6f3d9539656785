"""Cascade Mask R-CNN, ResNet-50-FPN, LVIS v1, plain softmax."""

from .lvis import baseline

model, dataloader, optimizer, lr_multiplier, train = baseline("cascade_mask_rcnn_r50", "v1")
