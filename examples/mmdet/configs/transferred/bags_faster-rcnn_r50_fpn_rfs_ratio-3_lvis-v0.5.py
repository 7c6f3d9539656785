"""BAGS with 3 others a foreground row and repeat-factor sampling, on a baseline trained with it."""

_base_ = "../bags/bags_faster-rcnn_r50_fpn_1x_lvis-v0.5.py"

model = dict(roi_head=dict(bbox_head=dict(loss_cls=dict(others_ratio=3.0))))
train_dataloader = dict(
    dataset=dict(
        _delete_=True,
        type="ClassBalancedDataset",
        oversample_thr=1e-3,
        dataset=_base_.train_dataloader.dataset,
    )
)
load_from = "work_dirs/faster-rcnn_r50_fpn_rfs_lvis-v0.5/epoch_12.pth"
