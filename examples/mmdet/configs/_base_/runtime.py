"""What every config shares: how the original trains and tests, in mmdet's own terms.

A learning rate of 0.01 is for 16 images a step; `auto_scale_lr.enable=True` scales it.
"""

_base_ = "mmdet::_base_/default_runtime.py"

custom_imports = dict(imports=["balanced_group_softmax.adapters.mmdet"])

train_cfg = dict(type="EpochBasedTrainLoop", max_epochs=12, val_interval=12)
val_cfg = dict(type="ValLoop")
test_cfg = dict(type="TestLoop")
optim_wrapper = dict(
    type="OptimWrapper",
    optimizer=dict(type="SGD", lr=0.01, momentum=0.9, weight_decay=0.0001),
    clip_grad=dict(max_norm=35, norm_type=2),
)
param_scheduler = [
    dict(type="LinearLR", start_factor=1 / 3, by_epoch=False, begin=0, end=500),
    dict(type="MultiStepLR", begin=0, end=12, by_epoch=True, milestones=[8, 11], gamma=0.1),
]
auto_scale_lr = dict(enable=False, base_batch_size=16)
