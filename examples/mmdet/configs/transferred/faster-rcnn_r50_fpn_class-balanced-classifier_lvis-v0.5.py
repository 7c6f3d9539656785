"""Re-weight-cls: class-balanced weights, only `fc_cls` trains. The original has box AP 24.66."""

_base_ = "../baselines/faster-rcnn_r50_fpn_1x_lvis-v0.5.py"

model = dict(
    roi_head=dict(
        bbox_head=dict(
            loss_cls=dict(
                _delete_=True,
                type="ReweightedCrossEntropyLoss",
                annotations=_base_.train_annotations,
                scheme="class_balanced",
            )
        )
    )
)
custom_hooks = [dict(type="BAGSFreezeHook", train="classifier")]
load_from = "work_dirs/faster-rcnn_r50_fpn_1x_lvis-v0.5/epoch_12.pth"
