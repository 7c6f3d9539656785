"""Mask R-CNN, ResNet-50-FPN, LVIS v1, plain softmax with repeat-factor sampling of images."""

from .lvis import baseline, repeat_factor_sampler

model, dataloader, optimizer, lr_multiplier, train = baseline("mask_rcnn_r50", "v1")
dataloader.train.sampler = repeat_factor_sampler(threshold=1e-3)
train.output_dir += "_rfs"
