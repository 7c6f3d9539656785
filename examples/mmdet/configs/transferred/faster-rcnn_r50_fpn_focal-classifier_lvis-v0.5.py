"""Focal loss-cls: only `fc_cls` trains. The original has box AP 19.29."""

_base_ = "faster-rcnn_r50_fpn_focal_lvis-v0.5.py"

custom_hooks = [dict(type="BAGSFreezeHook", train="classifier")]
