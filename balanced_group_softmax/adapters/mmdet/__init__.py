"""Balanced Group Softmax in mmdet 3, by config alone.

    custom_imports = dict(imports=["balanced_group_softmax.adapters.mmdet"])
    model = dict(roi_head=dict(bbox_head=dict(
        num_classes=1203,
        loss_cls=dict(_delete_=True, type="BAGSLoss", annotations="lvis_v1_train.json"))))
    custom_hooks = [dict(type="BAGSFreezeHook", train="classifier")]

`BAGSLoss` is all that a detector needs: mmdet asks the loss for the width of `fc_cls`, for the
scores and for the accuracy. It serves every head made of mmdet's `BBoxHead` that leaves `fc_cls` to
it: Faster, Mask and Cascade R-CNN, Hybrid Task Cascade. Labels have background last.

State dict: `fc_cls` has the layout's width, and `loss_cls._extra_state` holds the layout, so that a
checkpoint describes itself; loading one of another layout raises.

`original_geometry`, which is not imported here, is for converted checkpoints of the original.
"""

from balanced_group_softmax.adapters.mmdet.checks import check_categories, check_detector
from balanced_group_softmax.adapters.mmdet.detections import (
    SelectDetections,
    SelectDetectionsShared2FCBBoxHead,
)
from balanced_group_softmax.adapters.mmdet.loss import (
    MMDetBAGSLoss,
    ReweightedCrossEntropyLoss,
    bags_losses,
)
from balanced_group_softmax.adapters.mmdet.training import (
    FreezeHook,
    StartHook,
    freeze,
    start_from_softmax,
)

__all__ = [
    "FreezeHook",
    "MMDetBAGSLoss",
    "ReweightedCrossEntropyLoss",
    "SelectDetections",
    "SelectDetectionsShared2FCBBoxHead",
    "StartHook",
    "bags_losses",
    "check_categories",
    "check_detector",
    "freeze",
    "start_from_softmax",
]
