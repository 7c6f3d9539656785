"""Converted to mmdet 3, a detector says what the original's arithmetic says."""

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("mmdet.registry", reason="mmdet is not installed: docs/mmdet.md says how")

import torch
from mmdet.models.task_modules import LegacyAnchorGenerator
from mmdet_cases import batch, build, read_config
from mmengine.runner.checkpoint import load_state_dict
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parents[1] / "legacy"))
from lvis_layouts import large_layout, tables
from original_detector import (
    STRIDES,
    Kind,
    anchors,
    box_head,
    decode,
    detect,
    features,
    mask_probabilities,
    merge_scores,
    nms,
    proposals,
    random_state,
    rpn_outputs,
)

from balanced_group_softmax import GroupLayout
from balanced_group_softmax.adapters.mmdet.original_geometry import use_original_geometry
from balanced_group_softmax.legacy.checkpoints import convert_to_mmdet

SIZE = (128, 160)
LAYOUT = large_layout()
BAGS = Kind(num_logits=LAYOUT.num_logits)
CASCADE = replace(BAGS, stages=3, agnostic=True)
KINDS = {
    "bags": ("faster-rcnn_r50_fpn_1x", BAGS),
    "bags, agnostic boxes": ("faster-rcnn_r50_fpn_1x", replace(BAGS, agnostic=True)),
    "softmax": ("faster-rcnn_r50_fpn_1x", Kind()),
    "bags, masks": ("mask-rcnn_r50_fpn_1x", replace(BAGS, mask=True)),
    "softmax, masks": ("mask-rcnn_r50_fpn_1x", Kind(mask=True)),
    "cascade": ("cascade-rcnn_x101-64x4d_fpn_1x", replace(CASCADE, groups=64, width=4)),
    "cascade, softmax": (
        "cascade-rcnn_x101-64x4d_fpn_1x",
        Kind(stages=3, agnostic=True, groups=64, width=4),
    ),
    "htc, dcn": (
        "htc_x101-64x4d-dconv-c3-c5_fpn_ms-400-1400_20e",
        replace(CASCADE, mask=True, semantic=True, groups=64, width=4, dcn=True),
    ),
}  # fmt: skip


def converted_model(network: str, kind: Kind) -> tuple[nn.Module, dict[str, Tensor]]:
    """A detector with converted weights, 50 layers deep, and the original's state dict."""
    is_bags = kind.num_logits != kind.num_labels
    name = f"bags/bags_{network}_lvis-v0.5" if is_bags else f"baselines/{network}_lvis-v0.5"
    config = read_config(name)
    config.model.backbone.depth = 50
    heads = config.model.roi_head.bbox_head
    for head in heads if isinstance(heads, list) else [heads]:
        head.reg_class_agnostic = kind.agnostic
        if is_bags:
            del head.loss_cls["counts"]
            head.loss_cls["layout"] = LAYOUT
    config.model = use_original_geometry(config.model)
    model = build(config).eval()
    state = random_state(kind)
    layout, number = (LAYOUT, None) if is_bags else (None, kind.num_labels - 1)
    converted = convert_to_mmdet(state, layout=layout, num_categories=number)
    load_state_dict(model, converted, strict=True)
    return model, state


@pytest.mark.parametrize(("network", "kind"), KINDS.values(), ids=list(KINDS))
@torch.no_grad()
def test_scores_boxes_and_masks_are_those_of_the_original(network: str, kind: Kind) -> None:
    model, state = converted_model(network, kind)
    model.double()
    state = {name: tensor.double() for name, tensor in state.items()}
    image = torch.randn(1, 3, *SIZE, dtype=torch.float64)
    levels = features(state, kind, image)
    theirs = model.extract_feat(image)
    for level, other in zip(levels, theirs, strict=True):
        torch.testing.assert_close(other, level, atol=1e-6, rtol=1e-6)

    _check_rpn(model, state, levels, theirs)
    rois, _ = proposals(state, levels, SIZE, 200, 60)
    found = detect(state, kind, levels, rois, SIZE)
    raw, meta = raw_detections(model, theirs, rois)
    expected = found.logits.softmax(1)
    if kind.num_logits != kind.num_labels:
        expected = merge_scores(found.logits, *tables(LAYOUT))
    torch.testing.assert_close(raw.scores, background_last(expected), atol=1e-4, rtol=0)
    boxes = raw.bboxes.view(len(rois), -1, 4)
    torch.testing.assert_close(boxes, further(found.boxes), atol=1e-4, rtol=0)
    assert (expected[:, 1:].amax(1) - expected[:, 1:].amin(1)).min() > 1e-4  # not all alike

    if kind.mask:
        some = rois[:6]
        probabilities = mask_probabilities_of(model, theirs, some, meta)
        theirs_ = mask_probabilities(state, kind, levels, some)
        torch.testing.assert_close(probabilities, theirs_, atol=1e-4, rtol=0)


def _check_rpn(
    model: nn.Module, state: dict[str, Tensor], levels: list[Tensor], theirs: Any
) -> None:
    """Compare every anchor's score and box."""
    scores, deltas = model.rpn_head(theirs)
    sizes = [level.shape[-2:] for level in theirs]
    places = model.rpn_head.prior_generator.grid_priors(sizes, device="cpu")
    for level, stride, score, delta, place in zip(
        levels, STRIDES, scores, deltas, places, strict=True
    ):
        flat = delta[0].permute(1, 2, 0).reshape(-1, 4)
        boxes = model.rpn_head.bbox_coder.decode(place.double(), flat, SIZE)
        expected_scores, expected = rpn_outputs(state, level)
        places_here = anchors(stride, *level.shape[-2:]).double()
        expected = decode(places_here, expected, (1, 1, 1, 1), SIZE)[:, 0]
        torch.testing.assert_close(boxes, further(expected), atol=1e-4, rtol=0)
        mine = score[0].permute(1, 2, 0).reshape(-1).sigmoid()
        torch.testing.assert_close(mine, expected_scores, atol=1e-5, rtol=0)


def raw_detections(model: nn.Module, levels: Any, rois: Tensor) -> tuple[Any, dict[str, Any]]:
    """Every box and score of given proposals, before suppression."""
    from mmengine.structures import InstanceData

    meta = {"img_shape": SIZE, "ori_shape": SIZE, "scale_factor": (1.0, 1.0)}
    given = [InstanceData(bboxes=further(rois))]
    head = model.roi_head
    options: dict[str, Any] = {}
    if getattr(head, "with_semantic", False):
        options["semantic_feat"] = head.semantic_head(levels)[1]
    return head.predict_bbox(levels, [meta], given, None, rescale=False, **options)[0], meta


def mask_probabilities_of(
    model: nn.Module, levels: Any, rois: Tensor, meta: dict[str, Any]
) -> Tensor:
    head = model.roi_head
    given = torch.cat([rois.new_zeros(len(rois), 1), further(rois)], dim=1)
    if not hasattr(head, "num_stages"):
        return head._mask_forward(levels, rois=given)["mask_preds"].sigmoid()
    semantic = head.semantic_head(levels)[1]
    results = head._mask_forward(2, levels, given, semantic_feat=semantic, training=False)
    return torch.stack([part.sigmoid() for part in results["mask_preds"]]).mean(0)


def further(boxes: Tensor) -> Tensor:
    """Boxes that count their last pixel, in today's convention."""
    return boxes + boxes.new_tensor([0, 0, 1, 1])


def background_last(scores: Tensor) -> Tensor:
    return torch.cat([scores[:, 1:], scores[:, :1]], dim=1)


@torch.no_grad()
def test_the_head_alone_to_1e_5() -> None:
    model, state = converted_model(*KINDS["bags"])
    pooled = torch.randn(64, 256, 7, 7)
    logits, deltas = model.roi_head.bbox_head(pooled)
    expected, expected_deltas = box_head(state, "bbox_head", pooled)
    torch.testing.assert_close(logits, expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(deltas, expected_deltas[:, 4:], atol=1e-5, rtol=1e-5)
    scores = model.roi_head.bbox_head.loss_cls.get_activation(logits)
    torch.testing.assert_close(
        scores, background_last(merge_scores(expected, *tables(LAYOUT))), atol=1e-5, rtol=0
    )


@torch.no_grad()
def test_a_whole_detector_finds_what_the_original_finds() -> None:
    model, state = converted_model(*KINDS["bags"])
    model.test_cfg.rpn.update(nms_pre=200, max_per_img=60)
    model.roi_head.test_cfg.update(score_thr=0.0, max_per_img=40)
    data = batch(1230)
    data = {"inputs": [torch.randint(0, 256, (3, *SIZE), dtype=torch.uint8)],
            "data_samples": data["data_samples"][:1]}  # fmt: skip
    data["data_samples"][0].set_metainfo(dict.fromkeys(("img_shape", "ori_shape"), SIZE))
    result = model.test_step(data)[0].pred_instances

    image = (data["inputs"][0].flip(0).float() - _column(123.675, 116.28, 103.53)) / _column(
        58.395, 57.12, 57.375
    )
    levels = features(state, BAGS, image[None])
    rois, _ = proposals(state, levels, SIZE, 200, 60)
    found = detect(state, BAGS, levels, rois, SIZE)
    scores = merge_scores(found.logits, *tables(LAYOUT))[:, 1:]
    candidates = [
        (float(scores[row, category]), category, row)
        for category in range(scores.shape[1])
        for row in nms(found.boxes[:, category], scores[:, category], 0.5)
    ]
    best = sorted(candidates, reverse=True)[:40]
    assert result.labels.tolist() == [category for _, category, _ in best]
    torch.testing.assert_close(
        result.scores, torch.tensor([score for score, _, _ in best]), atol=1e-4, rtol=0
    )
    boxes = torch.stack([further(found.boxes[row, category]) for _, category, row in best])
    torch.testing.assert_close(result.bboxes, boxes, atol=1e-3, rtol=0)  # float32, of pixels


def _column(*values: float) -> Tensor:
    return torch.tensor(values)[:, None, None]


def test_without_its_geometry_scores_would_differ() -> None:
    config = read_config("bags/bags_faster-rcnn_r50_fpn_1x_lvis-v0.5")
    changed = use_original_geometry(config.model)
    assert config.model.rpn_head.anchor_generator.type == "AnchorGenerator"
    assert changed.rpn_head.anchor_generator.type == "OriginalAnchorGenerator"
    assert changed.rpn_head.bbox_coder.type == changed.roi_head.bbox_head.bbox_coder.type
    assert changed.roi_head.bbox_roi_extractor.roi_layer.sampling_ratio == 2
    assert changed.test_cfg.rpn.min_bbox_size == -1
    with pytest.raises(ValueError, match="got none of them"):
        use_original_geometry({"type": "RetinaNet"})


def test_anchors_are_mmdets_legacy_anchors_in_boxes_of_today() -> None:
    legacy = LegacyAnchorGenerator(
        strides=list(STRIDES), scales=[8], ratios=[0.5, 1, 2], center_offset=0.5
    )
    expected = legacy.grid_priors([(2, 3)] * 5, device="cpu")
    for stride, level in zip(STRIDES, expected, strict=True):
        torch.testing.assert_close(anchors(stride, 2, 3), level, atol=0, rtol=0)


def test_the_layout_of_another_checkpoint_is_refused() -> None:
    model, _ = converted_model(*KINDS["bags"])
    moved = GroupLayout(LAYOUT.groups[::-1], LAYOUT.names[::-1], "last", LAYOUT.category_ids)
    state = convert_to_mmdet(random_state(BAGS), layout=moved)
    with pytest.raises(ValueError, match="has another layout"):
        load_state_dict(model, state)
