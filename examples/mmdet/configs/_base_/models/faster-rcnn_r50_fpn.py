"""mmdet's Faster R-CNN R50-FPN, with proposals and thresholds of the original."""

_base_ = "mmdet::_base_/models/faster-rcnn_r50_fpn.py"

model = dict(
    roi_head=dict(bbox_head=dict(type="SelectDetectionsShared2FCBBoxHead")),
    train_cfg=dict(rpn_proposal=dict(max_per_img=2000)),
    test_cfg=dict(rcnn=dict(score_thr=0.0, max_per_img=300)),
)
