"""Focal loss, all layers train. The original has box AP 11.12.

As in the original, the loss takes each of C + 1 outputs for a sigmoid and the test for a softmax.
"""

_base_ = "../baselines/faster-rcnn_r50_fpn_1x_lvis-v0.5.py"

model = dict(
    roi_head=dict(
        bbox_head=dict(
            loss_cls=dict(_delete_=True, type="FocalLoss", use_sigmoid=True, gamma=2.0, alpha=0.25)
        )
    )
)
load_from = "work_dirs/faster-rcnn_r50_fpn_1x_lvis-v0.5/epoch_12.pth"
