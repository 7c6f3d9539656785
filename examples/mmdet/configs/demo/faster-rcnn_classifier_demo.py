"""Plain softmax as BAGS trains: only `fc_cls`, the same steps. What differs is the loss alone."""

_base_ = "bags_faster-rcnn_demo.py"

model = dict(roi_head=dict(bbox_head=dict(loss_cls=dict(_delete_=True, type="CrossEntropyLoss"))))
custom_hooks = [dict(type="BAGSFreezeHook", train="classifier")]
