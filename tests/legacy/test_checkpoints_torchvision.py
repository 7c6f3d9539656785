"""Converted to torchvision, a detector says what the original's arithmetic says."""

from dataclasses import replace

import pytest
import torch
from lvis_layouts import large_layout, tables
from original_detector import (
    STRIDES,
    Kind,
    anchors,
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
from torch import Tensor, nn
from torchvision.models.detection import fasterrcnn_resnet50_fpn, maskrcnn_resnet50_fpn

from balanced_group_softmax import BAGSHead, GroupLayout
from balanced_group_softmax.adapters.torchvision import convert_classifier
from balanced_group_softmax.adapters.torchvision_legacy import (
    OriginalAnchorGenerator,
    OriginalRoIAlign,
)
from balanced_group_softmax.legacy.checkpoints import convert_to_torchvision

SIZE = (128, 160)
LAYOUT = large_layout()
BAGS = Kind(num_logits=LAYOUT.num_logits)
KINDS = {
    "bags": BAGS,
    "bags, agnostic boxes": replace(BAGS, agnostic=True),
    "bags, masks": replace(BAGS, mask=True),
    "softmax": Kind(),
}


def build(kind: Kind, layout: GroupLayout | None) -> nn.Module:
    """A torchvision detector for the kind, with the original's geometry, in float64."""
    make = maskrcnn_resnet50_fpn if kind.mask else fasterrcnn_resnet50_fpn
    model = make(
        weights=None,
        weights_backbone=None,
        num_classes=kind.num_labels,
        rpn_pre_nms_top_n_test=300,
        rpn_post_nms_top_n_test=100,
    )
    if kind.agnostic:
        model.roi_heads.box_predictor.bbox_pred = nn.Linear(1024, 4)
    if layout is not None:
        convert_classifier(model, BAGSHead(1024, layout))
    model.rpn.anchor_generator = OriginalAnchorGenerator()
    levels = ["0", "1", "2", "3"]
    model.roi_heads.box_roi_pool = OriginalRoIAlign(levels, 7)
    if kind.mask:
        model.roi_heads.mask_roi_pool = OriginalRoIAlign(levels, 14)
    return model.eval().double()


def one_pixel_further(boxes: Tensor) -> Tensor:
    """Boxes that count their last pixel, as (x1, y1, x2 + 1, y2 + 1)."""
    return boxes + boxes.new_tensor([0, 0, 1, 1])


@pytest.mark.parametrize("kind", KINDS.values(), ids=list(KINDS))
@torch.no_grad()
def test_scores_and_boxes_are_those_of_the_original(kind: Kind) -> None:
    state = random_state(kind)
    layout = LAYOUT if kind.num_logits != kind.num_labels else None
    model = build(kind, layout)
    converted = convert_to_torchvision(state, layout=layout)
    model.load_state_dict(converted)  # strict: every name, every shape
    state = {name: tensor.double() for name, tensor in state.items()}
    image = torch.randn(1, 3, *SIZE, dtype=torch.float64)

    levels = features(state, kind, image)
    pyramid = model.backbone(image)
    for level, other in zip(levels, pyramid.values(), strict=True):
        torch.testing.assert_close(other, level, atol=1e-8, rtol=1e-8)

    rois, _ = proposals(state, levels, SIZE, 300, 100)
    _, deltas = model.rpn.head(list(pyramid.values()))
    batch = type("Batch", (), {"tensors": image, "image_sizes": [SIZE]})()
    places = model.rpn.anchor_generator(batch, list(pyramid.values()))[0]
    flat = torch.cat([part.permute(0, 2, 3, 1).reshape(-1, 4) for part in deltas])
    mine = model.rpn.box_coder.decode(flat, [places]).squeeze(1)
    theirs = torch.cat([_level_boxes(state, level, index) for index, level in enumerate(levels)])
    torch.testing.assert_close(mine, theirs, atol=1e-4, rtol=0)

    found = detect(state, kind, levels, rois, SIZE)
    heads = model.roi_heads
    pooled = heads.box_roi_pool(pyramid, [one_pixel_further(rois)], [SIZE])
    logits, box_deltas = heads.box_predictor(heads.box_head(pooled))
    if layout is None:
        scores, expected = logits.softmax(1), found.logits.softmax(1)
    else:
        scores = heads.classifier.scores(logits)
        expected = merge_scores(found.logits, *tables(layout))
    torch.testing.assert_close(scores, expected, atol=1e-4, rtol=0)
    torch.testing.assert_close(logits, found.logits, atol=1e-5, rtol=1e-5)
    boxes = heads.box_coder.decode(box_deltas, [one_pixel_further(rois)])
    boxes = boxes.reshape(len(rois), -1, 4)
    boxes = boxes if kind.agnostic else boxes[:, 1:]
    height, width = SIZE
    low, high = boxes.new_tensor([0, 0, 1, 1]), boxes.new_tensor([width - 1, height - 1] * 2)
    high[2:] += 1
    clipped = torch.minimum(torch.maximum(boxes, low), high)
    torch.testing.assert_close(clipped, one_pixel_further(found.boxes), atol=1e-4, rtol=0)
    assert (scores[:, 1:].amax(1) - scores[:, 1:].amin(1)).min() > 1e-3  # not all alike

    if kind.mask:
        pooled = heads.mask_roi_pool(pyramid, [one_pixel_further(rois[:8])], [SIZE])
        masks = heads.mask_predictor(heads.mask_head(pooled)).sigmoid()[:, 1:]
        expected = mask_probabilities(state, kind, levels, rois[:8])
        torch.testing.assert_close(masks, expected, atol=1e-4, rtol=0)


def _level_boxes(state: dict[str, Tensor], level: Tensor, index: int) -> Tensor:
    """Every box of a level before suppression, not clipped, in today's convention."""
    _, deltas = rpn_outputs(state, level)
    places = anchors(STRIDES[index], *level.shape[-2:]).to(deltas)
    far = 10**6
    boxes = decode(places + far, deltas, (1, 1, 1, 1), (4 * far, 4 * far))[:, 0] - far
    return one_pixel_further(boxes)


@torch.no_grad()
def test_a_whole_detector_finds_what_the_original_finds() -> None:
    state = random_state(BAGS, seed=3)
    model = build(BAGS, LAYOUT)
    model.load_state_dict(convert_to_torchvision(state, layout=LAYOUT))
    model.roi_heads.score_thresh, model.roi_heads.detections_per_img = 0.0, 50
    state = {name: tensor.double() for name, tensor in state.items()}
    image = torch.randn(1, 3, *SIZE, dtype=torch.float64)
    batch = type("Batch", (), {"tensors": image, "image_sizes": [SIZE]})()
    pyramid = model.backbone(image)
    rois, _ = model.rpn(batch, pyramid)
    result = model.roi_heads(pyramid, rois, [SIZE])[0][0]

    levels = features(state, BAGS, image)
    theirs, _ = proposals(state, levels, SIZE, 300, 100)
    found = detect(state, BAGS, levels, theirs, SIZE)
    scores = merge_scores(found.logits, *tables(LAYOUT))[:, 1:]
    candidates = []
    for category in range(scores.shape[1]):
        kept = nms(found.boxes[:, category], scores[:, category], 0.5)
        candidates += [(float(scores[row, category]), category, row) for row in kept]
    best = sorted(candidates, reverse=True)[:50]
    expected = torch.stack([one_pixel_further(found.boxes[row, c]) for _, c, row in best])
    assert result["labels"].tolist() == [category + 1 for _, category, _ in best]
    torch.testing.assert_close(
        result["scores"], torch.tensor([score for score, _, _ in best]).double(), atol=1e-4, rtol=0
    )
    torch.testing.assert_close(result["boxes"], expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    ("kind", "what"),
    [
        (replace(BAGS, stages=3, agnostic=True), "cascade"),
        (replace(BAGS, dcn=True), "deformable"),
    ],
)
def test_what_torchvision_lacks_is_refused(kind: Kind, what: str) -> None:
    with pytest.raises(ValueError, match=f"torchvision has no {what}"):
        convert_to_torchvision(random_state(kind), layout=LAYOUT)
