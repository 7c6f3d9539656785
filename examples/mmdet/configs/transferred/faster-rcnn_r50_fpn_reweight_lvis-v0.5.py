"""Re-weight: weights by inverse frequency, all layers train. The original has box AP 23.48."""

_base_ = "../baselines/faster-rcnn_r50_fpn_1x_lvis-v0.5.py"

model = dict(
    roi_head=dict(
        bbox_head=dict(
            loss_cls=dict(
                _delete_=True,
                type="ReweightedCrossEntropyLoss",
                annotations=_base_.train_annotations,
                scheme="inverse_frequency",
            )
        )
    )
)
load_from = "work_dirs/faster-rcnn_r50_fpn_1x_lvis-v0.5/epoch_12.pth"
