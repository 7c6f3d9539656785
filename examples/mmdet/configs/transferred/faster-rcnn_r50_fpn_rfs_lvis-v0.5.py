"""RFS: repeat-factor sampling with t = 1e-3. The original has box AP 23.41."""

_base_ = "../baselines/faster-rcnn_r50_fpn_1x_lvis-v0.5.py"

train_dataloader = dict(
    dataset=dict(
        _delete_=True,
        type="ClassBalancedDataset",
        oversample_thr=1e-3,
        dataset=_base_.train_dataloader.dataset,
    )
)
