"""RFS: repeat-factor sampling with t = 1e-3, Faster R-CNN X101-64x4d-FPN."""

_base_ = "../baselines/faster-rcnn_x101-64x4d_fpn_1x_lvis-v0.5.py"

train_dataloader = dict(
    dataset=dict(
        _delete_=True,
        type="ClassBalancedDataset",
        oversample_thr=1e-3,
        dataset=_base_.train_dataloader.dataset,
    )
)
