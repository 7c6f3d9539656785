"""The control of demo_bags.py: the softmax classifier itself trains on, in the same way."""

from detectron2.modeling.roi_heads import FastRCNNOutputLayers

from .demo_bags import dataloader, lr_multiplier, model, optimizer, train

del model.roi_heads.box_predictor.annotations
model.roi_heads.box_predictor._target_ = FastRCNNOutputLayers
train.output_dir = "runs/detectron2_continued"
