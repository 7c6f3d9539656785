"""Post-processing by `select_detections` gives what mmdet's gives, and sooner."""

import time
from typing import Any

import pytest

pytest.importorskip("mmdet.registry", reason="mmdet is not installed: docs/mmdet.md says how")

import torch
from mmdet.models.roi_heads.bbox_heads import Shared2FCBBoxHead
from mmengine.config import ConfigDict

from balanced_group_softmax.adapters.mmdet import SelectDetectionsShared2FCBBoxHead

NUM_CATEGORIES = 1203
META = {"img_shape": (800, 1216), "ori_shape": (1600, 2432), "scale_factor": (0.5, 0.5)}


def heads(num_categories: int, agnostic: bool) -> list[Any]:
    """mmdet's head and ours, with the same weights."""
    made = []
    for kind in (Shared2FCBBoxHead, SelectDetectionsShared2FCBBoxHead):
        counts = [3 + i for i in range(num_categories)]
        made.append(
            kind(
                in_channels=4,
                fc_out_channels=8,
                roi_feat_size=1,
                num_classes=num_categories,
                reg_class_agnostic=agnostic,
                bbox_coder={"type": "DeltaXYWHBBoxCoder", "target_stds": [1.0] * 4},
                loss_cls={"type": "BAGSLoss", "counts": counts},
            ).eval()
        )
    made[1].load_state_dict(made[0].state_dict())
    return made


def outputs(num_rois: int, head: Any, seed: int = 0) -> dict[str, Any]:
    """What a head may say of RoIs around a few objects, with boxes at whole pixels.

    mmdet shifts boxes apart by category, in float32. Whole numbers it shifts exactly; other boxes
    change their overlaps a little, so that near the threshold another one may survive.
    """
    generator = torch.Generator().manual_seed(seed)
    layout = head.loss_cls.layout

    def whole(low: int, high: int, *shape: int) -> torch.Tensor:
        return torch.randint(low, high, shape, generator=generator).float()

    objects = whole(100, 600, num_rois // 8 + 1, 2).repeat(8, 1)[:num_rois]
    corners = objects + whole(-6, 7, num_rois, 2)
    sizes = 8 * whole(4, 8, num_rois, 2)
    deltas = torch.zeros(num_rois, 1 if head.reg_class_agnostic else layout.num_categories, 4)
    deltas[..., :2] = whole(-2, 3, *deltas.shape[:2], 2) / 8
    logits = 1.5 * torch.randn(num_rois, layout.num_logits, generator=generator)
    return {
        "roi": torch.cat([torch.zeros(num_rois, 1), corners, corners + sizes], dim=1),
        "cls_score": logits,
        "bbox_pred": deltas.flatten(1),
        "img_meta": META,
        "rescale": True,
    }


def options(**changed: Any) -> ConfigDict:
    nms = {"type": "nms", "iou_threshold": 0.5}
    return ConfigDict({"score_thr": 1e-4, "nms": nms, "max_per_img": 300, **changed})


@pytest.mark.parametrize("agnostic", [False, True], ids=["a box a category", "one box"])
@pytest.mark.parametrize(
    "changed",
    [
        {},
        {"score_thr": 0.05},
        {"score_thr": 2.0},  # nothing
        {"max_per_img": -1, "score_thr": 0.02},
        {"nms": {"type": "nms", "iou_threshold": 0.5, "offset": 1}},
        {"nms": {"type": "soft_nms", "iou_threshold": 0.5}, "score_thr": 0.02},  # mmdet's own
    ],
    ids=str,
)
@torch.no_grad()
def test_detections_are_those_of_mmdet(agnostic: bool, changed: dict[str, Any]) -> None:
    theirs, ours = heads(60, agnostic)
    for seed in range(3):
        given = outputs(80, theirs, seed)
        expected = theirs._predict_by_feat_single(**given, rcnn_test_cfg=options(**changed))
        found = ours._predict_by_feat_single(**given, rcnn_test_cfg=options(**changed))
        assert found.labels.tolist() == expected.labels.tolist()
        torch.testing.assert_close(found.scores, expected.scores, atol=0, rtol=0)
        torch.testing.assert_close(found.bboxes, expected.bboxes, atol=0, rtol=0)


@torch.no_grad()
def test_no_rois_no_detections() -> None:
    theirs, ours = heads(5, False)
    given = outputs(0, theirs)
    assert len(ours._predict_by_feat_single(**given, rcnn_test_cfg=options())) == 0
    raw = ours._predict_by_feat_single(**outputs(4, theirs), rcnn_test_cfg=None)
    assert raw.bboxes.shape == (4, 20)


@torch.no_grad()
def test_at_lvis_scale_it_is_twenty_times_faster_with_the_same_result(
    record_property: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mmdet.models.roi_heads.bbox_heads import bbox_head

    theirs, _ = heads(NUM_CATEGORIES, False)
    given = outputs(1000, theirs)
    raw = theirs._predict_by_feat_single(**given, rcnn_test_cfg=None)
    config = options()
    above = int((raw.scores[:, :-1] > config.score_thr).sum())
    assert above > 100_000

    started = time.perf_counter()
    dets, labels = bbox_head.multiclass_nms(
        raw.bboxes, raw.scores, config.score_thr, config.nms, config.max_per_img
    )
    slow = time.perf_counter() - started

    from balanced_group_softmax import select_detections

    boxes = raw.bboxes.view(1000, NUM_CATEGORIES, 4)

    def ours() -> Any:
        return select_detections(
            boxes,
            raw.scores[:, :-1],
            score_threshold=config.score_thr,
            nms_threshold=config.nms.iou_threshold,
            max_detections=config.max_per_img,
        )

    ours()
    times = []
    for _ in range(5):
        started = time.perf_counter()
        found = ours()
        times.append(time.perf_counter() - started)
    fast = sorted(times)[2]
    print(f"{above} candidates: mmdet {slow:.3f} s, ours {fast:.4f} s: {slow / fast:.0f} times")
    assert found.categories.tolist() == labels.tolist()
    torch.testing.assert_close(found.boxes, dets[:, :4], atol=0, rtol=0)
    torch.testing.assert_close(found.scores, dets[:, 4], atol=0, rtol=0)
    assert slow / fast > 20
