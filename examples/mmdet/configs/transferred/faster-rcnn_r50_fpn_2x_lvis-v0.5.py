"""x2: the baseline trained for 12 more epochs. The original has box AP 21.93."""

_base_ = "../baselines/faster-rcnn_r50_fpn_1x_lvis-v0.5.py"

load_from = "work_dirs/faster-rcnn_r50_fpn_1x_lvis-v0.5/epoch_12.pth"
