"""Stage two on the drawn data set: nothing but the classifier trains, by Balanced Group Softmax.

It starts from what demo.py left in its folder, or from another `train.init_checkpoint`.
"""

import torch
from detectron2.config import LazyCall as L
from detectron2.solver.build import get_default_optimizer_params
from detectron2_setup import annotations_of

from balanced_group_softmax.adapters.detectron2 import BAGSFastRCNNOutputLayers

from .demo import dataloader, lr_multiplier, model, train

STEPS = 400

model.roi_heads.box_predictor.update(
    _target_=BAGSFastRCNNOutputLayers,
    annotations=L(annotations_of)(name="${dataloader.train.dataset.names}"),
)
# The original's 0.01 for 16 images.
optimizer = L(torch.optim.SGD)(
    params=L(get_default_optimizer_params)(), lr=5e-3, momentum=0.9, weight_decay=1e-4
)
lr_multiplier.warmup_length = 19 / STEPS
train.update(
    max_iter=STEPS,
    trainable="classifier",
    init_checkpoint=f"{train['output_dir']}/model_final.pth",
    output_dir="runs/detectron2_bags",
)
