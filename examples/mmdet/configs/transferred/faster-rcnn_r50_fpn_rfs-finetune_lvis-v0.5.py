"""RFS-finetune: repeat-factor sampling on a trained baseline. The original has box AP 22.66."""

_base_ = "faster-rcnn_r50_fpn_rfs_lvis-v0.5.py"

load_from = "work_dirs/faster-rcnn_r50_fpn_1x_lvis-v0.5/epoch_12.pth"
