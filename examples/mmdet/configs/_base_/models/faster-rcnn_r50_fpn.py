"""mmdet's Faster R-CNN R50-FPN, tested as the original is."""

_base_ = "mmdet::_base_/models/faster-rcnn_r50_fpn.py"

model = dict(
    roi_head=dict(bbox_head=dict(type="SelectDetectionsShared2FCBBoxHead")),
    test_cfg=dict(rcnn=dict(score_thr=0.0, max_per_img=300)),
)
