"""The original's detectors, re-expressed: names of their weights, and what they compute at test.

Written from the formulas of mmdetection 1 in plain functions of a state dict: boxes count their
last pixel, background is label 0. It shares no code with what converts checkpoints, nor with mmdet.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.ops import deform_conv2d

BLOCKS = (3, 4, 6, 3)  # of a ResNet-50
STRIDES = (4, 8, 16, 32, 64)
STDS = ((0.1, 0.1, 0.2, 0.2), (0.05, 0.05, 0.1, 0.1), (0.033, 0.033, 0.067, 0.067))
MAX_RATIO = 4.135166556742356  # log(1000 / 16)

State = dict[str, Tensor]


@dataclass(frozen=True)
class Kind:
    """What a detector is made of."""

    num_labels: int = 1231
    num_logits: int = 1231
    stages: int = 1
    agnostic: bool = False  # box regression
    mask: bool = False
    semantic: bool = False
    groups: int = 1
    dcn: bool = False
    width: int = 64  # channels of a group in the first stage


# --- weights -------------------------------------------------------------------------------------


@dataclass
class _Maker:
    generator: torch.Generator
    state: State = field(default_factory=dict)

    def add(self, name: str, *shape: int, std: float | None = None, bias: bool = True) -> None:
        fan_in = torch.Size(shape[1:]).numel()
        std = (2 / fan_in) ** 0.5 if std is None else std
        self.state[f"{name}.weight"] = self.random(*shape) * std
        if bias:
            self.state[f"{name}.bias"] = self.random(shape[0]) * 0.05

    def norm(self, name: str, channels: int) -> None:
        self.state[f"{name}.weight"] = 0.6 + 0.1 * self.random(channels)
        self.state[f"{name}.bias"] = 0.1 * self.random(channels)
        self.state[f"{name}.running_mean"] = 0.1 * self.random(channels)
        self.state[f"{name}.running_var"] = 1 + 0.2 * self.random(channels).abs()
        self.state[f"{name}.num_batches_tracked"] = torch.tensor(7)

    def random(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self.generator)


def random_state(kind: Kind, seed: int = 0) -> State:
    """Random weights under the original's names."""
    make = _Maker(torch.Generator().manual_seed(seed))
    make.add("backbone.conv1", 64, 3, 7, 7, bias=False)
    make.norm("backbone.bn1", 64)
    inputs = 64
    for stage, blocks in enumerate(BLOCKS):
        planes = 64 << stage
        width = planes * kind.width * kind.groups // 64
        for block in range(blocks):
            name = f"backbone.layer{stage + 1}.{block}"
            make.add(f"{name}.conv1", width, inputs, 1, 1, bias=False)
            make.add(f"{name}.conv2", width, width // kind.groups, 3, 3, bias=False)
            if kind.dcn and stage > 0:
                make.add(f"{name}.conv2_offset", 18, width, 3, 3, std=0.01)
            make.add(f"{name}.conv3", 4 * planes, width, 1, 1, bias=False)
            for number, channels in ((1, width), (2, width), (3, 4 * planes)):
                make.norm(f"{name}.bn{number}", channels)
            if block == 0:
                make.add(f"{name}.downsample.0", 4 * planes, inputs, 1, 1, bias=False)
                make.norm(f"{name}.downsample.1", 4 * planes)
            inputs = 4 * planes
    for level in range(4):
        make.add(f"neck.lateral_convs.{level}.conv", 256, 256 << level, 1, 1, std=0.01)
        make.add(f"neck.fpn_convs.{level}.conv", 256, 256, 3, 3, std=0.02)
    make.add("rpn_head.rpn_conv", 256, 256, 3, 3, std=0.02)
    make.add("rpn_head.rpn_cls", 3, 256, 1, 1, std=0.05)
    make.add("rpn_head.rpn_reg", 12, 256, 1, 1, std=0.02)
    for stage in range(kind.stages):
        name = f"bbox_head.{stage}" if kind.stages > 1 else "bbox_head"
        make.add(f"{name}.shared_fcs.0", 1024, 256 * 49, std=0.01)
        make.add(f"{name}.shared_fcs.1", 1024, 1024)
        make.add(f"{name}.fc_cls", kind.num_logits, 1024, std=0.1)
        make.add(f"{name}.fc_reg", 4 if kind.agnostic else 4 * kind.num_labels, 1024, std=0.02)
        if not kind.mask:
            continue
        name = name.replace("bbox", "mask")
        for i in range(4):
            make.add(f"{name}.convs.{i}.conv", 256, 256, 3, 3)
        if kind.stages > 1:
            make.add(f"{name}.conv_res.conv", 256, 256, 1, 1)
        make.add(f"{name}.upsample", 256, 256, 2, 2, std=0.03)
        make.add(f"{name}.conv_logits", kind.num_labels, 256, 1, 1)
    if kind.semantic:
        for i in range(5):
            make.add(f"semantic_head.lateral_convs.{i}.conv", 256, 256, 1, 1)
        for i in range(4):
            make.add(f"semantic_head.convs.{i}.conv", 256, 256, 3, 3)
        make.add("semantic_head.conv_embedding.conv", 256, 256, 1, 1)
        make.add("semantic_head.conv_logits", 183, 256, 1, 1)
    return make.state


# --- features ------------------------------------------------------------------------------------


def features(state: State, kind: Kind, image: Tensor) -> list[Tensor]:
    """Five levels of a pyramid for an image [1, 3, height, width], sides multiples of 32."""
    x = F.conv2d(image, state["backbone.conv1.weight"], stride=2, padding=3)
    x = F.max_pool2d(_norm(state, "backbone.bn1", x).relu(), 3, 2, 1)
    levels = []
    for stage, blocks in enumerate(BLOCKS):
        for block in range(blocks):
            stride = 2 if block == 0 and stage > 0 else 1
            x = _bottleneck(state, kind, f"backbone.layer{stage + 1}.{block}", x, stride)
        levels.append(_conv(state, f"neck.lateral_convs.{stage}.conv", x))
    for stage in (2, 1, 0):
        levels[stage] = levels[stage] + F.interpolate(levels[stage + 1], scale_factor=2)
    levels = [
        _conv(state, f"neck.fpn_convs.{stage}.conv", level, padding=1)
        for stage, level in enumerate(levels)
    ]
    return [*levels, F.max_pool2d(levels[-1], 1, 2)]


def _bottleneck(state: State, kind: Kind, name: str, x: Tensor, stride: int) -> Tensor:
    out = _norm(state, f"{name}.bn1", F.conv2d(x, state[f"{name}.conv1.weight"])).relu()
    weight = state[f"{name}.conv2.weight"]
    if f"{name}.conv2_offset.weight" in state:
        offset = _conv(state, f"{name}.conv2_offset", out, stride=stride, padding=1)
        out = deform_conv2d(out, offset, weight, stride=stride, padding=1)
    else:
        out = F.conv2d(out, weight, stride=stride, padding=1, groups=kind.groups)
    out = _norm(state, f"{name}.bn2", out).relu()
    out = _norm(state, f"{name}.bn3", F.conv2d(out, state[f"{name}.conv3.weight"]))
    if f"{name}.downsample.0.weight" in state:
        x = F.conv2d(x, state[f"{name}.downsample.0.weight"], stride=stride)
        x = _norm(state, f"{name}.downsample.1", x)
    return (out + x).relu()


def _norm(state: State, name: str, x: Tensor) -> Tensor:
    parts = (state[f"{name}.{part}"] for part in ("running_mean", "running_var", "weight", "bias"))
    return F.batch_norm(x, *parts)


def _conv(state: State, name: str, x: Tensor, stride: int = 1, padding: int = 0) -> Tensor:
    return F.conv2d(
        x, state[f"{name}.weight"], state[f"{name}.bias"], stride=stride, padding=padding
    )


# --- boxes that count their last pixel -----------------------------------------------------------


def decode(boxes: Tensor, deltas: Tensor, stds: Sequence[float], size: tuple[int, int]) -> Tensor:
    """Boxes [R, K, 4] of boxes [R, 4] and deltas [R, 4 K], within an image (height, width)."""
    deltas = deltas.view(len(boxes), -1, 4) * deltas.new_tensor(stds)
    centres = ((boxes[:, :2] + boxes[:, 2:]) / 2)[:, None]
    sizes = (boxes[:, 2:] - boxes[:, :2] + 1)[:, None]
    new_centres = centres + sizes * deltas[..., :2]
    new_sizes = sizes * deltas[..., 2:].clamp(-MAX_RATIO, MAX_RATIO).exp()
    low, high = new_centres - new_sizes / 2 + 0.5, new_centres + new_sizes / 2 - 0.5
    most = boxes.new_tensor([size[1] - 1, size[0] - 1])
    parts = [torch.minimum(part.clamp(min=0), most) for part in (low, high)]
    return torch.cat(parts, dim=-1)


def nms(boxes: Tensor, scores: Tensor, threshold: float) -> list[int]:
    """Rows kept by greedy suppression, best first."""
    area = (boxes[:, 2:] - boxes[:, :2] + 1).prod(1)
    low = torch.maximum(boxes[:, None, :2], boxes[None, :, :2])
    high = torch.minimum(boxes[:, None, 2:], boxes[None, :, 2:])
    shared = (high - low + 1).clamp(min=0).prod(2)
    overlap = (shared / (area[:, None] + area - shared) > threshold).numpy()
    gone = np.zeros(len(boxes), bool)
    kept: list[int] = []
    for i in scores.argsort(descending=True, stable=True).tolist():
        if not gone[i]:
            kept.append(i)
            gone |= overlap[i]
    return kept


def anchors(stride: int, height: int, width: int) -> Tensor:
    """Anchors of a level, [height * width * 3, 4]."""
    base = []
    centre = 0.5 * (stride - 1)
    for ratio in (0.5, 1.0, 2.0):
        root = torch.tensor(ratio).sqrt()
        w, h = stride * 8 / root, stride * 8 * root
        half = (0.5 * (w - 1), 0.5 * (h - 1))
        base.append([centre - half[0], centre - half[1], centre + half[0], centre + half[1]])
    cell = torch.tensor(base).round()
    y, x = torch.meshgrid(
        torch.arange(height) * stride, torch.arange(width) * stride, indexing="ij"
    )
    shifts = torch.stack([x, y, x, y], dim=-1).reshape(-1, 1, 4)
    return (cell + shifts).reshape(-1, 4)


def rpn_outputs(state: State, level: Tensor) -> tuple[Tensor, Tensor]:
    """Scores [N] and deltas [N, 4] of the anchors of a level."""
    x = _conv(state, "rpn_head.rpn_conv", level, padding=1).relu()
    scores = _conv(state, "rpn_head.rpn_cls", x)[0].permute(1, 2, 0).reshape(-1).sigmoid()
    return scores, _conv(state, "rpn_head.rpn_reg", x)[0].permute(1, 2, 0).reshape(-1, 4)


def proposals(
    state: State, levels: list[Tensor], size: tuple[int, int], nms_pre: int, limit: int
) -> tuple[Tensor, Tensor]:
    """Boxes [N, 4] and scores [N] of the region proposal network."""
    found = []
    for level, stride in zip(levels, STRIDES, strict=True):
        scores, deltas = rpn_outputs(state, level)
        best = scores.topk(min(nms_pre, len(scores))).indices
        places = anchors(stride, *level.shape[-2:]).to(deltas)[best]
        boxes = decode(places, deltas[best], (1, 1, 1, 1), size)[:, 0]
        kept = nms(boxes, scores[best], 0.7)[:limit]
        found.append((boxes[kept], scores[best][kept]))
    boxes, scores = (torch.cat(parts) for parts in zip(*found, strict=True))
    best = scores.topk(min(limit, len(scores))).indices
    return boxes[best], scores[best]


# --- regions -------------------------------------------------------------------------------------


def roi_align(level: Tensor, boxes: Tensor, stride: int, bins: int) -> Tensor:
    """Average of 2 x 2 samples in each bin, of a level [1, c, h, w]: [R, c, bins, bins]."""
    start = boxes[:, :2] / stride
    size = ((boxes[:, 2:] + 1) / stride - start).clamp(min=0)
    steps = (torch.arange(2 * bins).to(boxes) + 0.5) / (2 * bins)
    points = start[:, None] + steps[None, :, None] * size[:, None]  # [R, 2 bins, (x, y)]
    height, width = level.shape[-2:]
    parts = []
    for x, y in zip(points[..., 0], points[..., 1], strict=True):
        rows, columns = _taps(y, height), _taps(x, width)
        value = rows @ level[0] @ columns.T
        parts.append(F.avg_pool2d(value, 2))
    return torch.stack(parts) if parts else level.new_zeros(0, level.shape[1], bins, bins)


def _taps(places: Tensor, length: int) -> Tensor:
    """Bilinear weights [places, length]; none for places more than a cell outside."""
    inside = (places >= -1) & (places <= length)
    at = places.clamp(min=0)
    low = at.floor().long().clamp(max=length - 1)
    high = (low + 1).clamp(max=length - 1)
    part = torch.where(low >= length - 1, 0, at - low)
    weights = places.new_zeros(len(places), length)
    rows = torch.arange(len(places))
    weights[rows, low] += 1 - part
    weights[rows, high] += part
    return weights * inside[:, None]


def pool(levels: list[Tensor], boxes: Tensor, bins: int) -> Tensor:
    """RoI features over the four finest levels."""
    scale = (boxes[:, 2:] - boxes[:, :2] + 1).prod(1).sqrt()
    homes = (scale / 56 + 1e-6).log2().floor().clamp(0, 3).long()
    pooled = levels[0].new_zeros(len(boxes), levels[0].shape[1], bins, bins)
    for index in range(4):
        rows = homes == index
        pooled[rows] = roi_align(levels[index], boxes[rows], STRIDES[index], bins)
    return pooled


def semantic_features(state: State, levels: list[Tensor]) -> Tensor:
    """What the semantic branch hands to boxes and masks, at stride 8."""
    size = levels[1].shape[-2:]
    x = _conv(state, "semantic_head.lateral_convs.1.conv", levels[1]).relu()
    for index in (0, 2, 3, 4):
        level = F.interpolate(levels[index], size, mode="bilinear", align_corners=True)
        x = x + _conv(state, f"semantic_head.lateral_convs.{index}.conv", level).relu()
    for index in range(4):
        x = _conv(state, f"semantic_head.convs.{index}.conv", x, padding=1).relu()
    return _conv(state, "semantic_head.conv_embedding.conv", x).relu()


def _region_features(
    state: State, kind: Kind, levels: list[Tensor], boxes: Tensor, bins: int
) -> Tensor:
    pooled = pool(levels, boxes, bins)
    if kind.semantic:
        more = roi_align(semantic_features(state, levels), boxes, 8, 14)
        pooled = pooled + F.adaptive_avg_pool2d(more, bins)
    return pooled


def box_head(state: State, name: str, pooled: Tensor) -> tuple[Tensor, Tensor]:
    """Logits and deltas of pooled features [R, 256, 7, 7]."""
    x = pooled.flatten(1)
    for index in range(2):
        x = _linear(state, f"{name}.shared_fcs.{index}", x).relu()
    return _linear(state, f"{name}.fc_cls", x), _linear(state, f"{name}.fc_reg", x)


def _linear(state: State, name: str, x: Tensor) -> Tensor:
    return F.linear(x, state[f"{name}.weight"], state[f"{name}.bias"])


def merge_scores(logits: Tensor, columns: Tensor, splits: Sequence[Tensor]) -> Tensor:
    """Scores of BAGS [R, C + 1], background first, from the original's tables."""
    parts = [logits[:, a : a + n].softmax(1) for a, n in columns.tolist()]
    scores = logits.new_zeros(len(logits), 1 + sum(map(len, splits)))
    for part, labels in zip(parts[1:], splits, strict=True):
        scores[:, labels] = part[:, 1:]
    scores *= parts[0][:, 1:2]
    scores[:, 0] = parts[0][:, 0]
    return scores


@dataclass(frozen=True)
class Found:
    """What a detector says of given boxes."""

    logits: Tensor  # [R, L], mean over the stages
    boxes: Tensor  # [R, C, 4], or [R, 1, 4] if class-agnostic


def detect(
    state: State, kind: Kind, levels: list[Tensor], rois: Tensor, size: tuple[int, int]
) -> Found:
    """Run the box heads on proposals [R, 4]."""
    every_logits = []
    for stage in range(kind.stages):
        name = f"bbox_head.{stage}" if kind.stages > 1 else "bbox_head"
        pooled = _region_features(state, kind, levels, rois, 7)
        logits, deltas = box_head(state, name, pooled)
        every_logits.append(logits)
        boxes = decode(rois, deltas, STDS[stage], size)
        if stage < kind.stages - 1:
            rois = boxes[:, 0]
    if not kind.agnostic:
        boxes = boxes[:, 1:]  # the first are of background
    return Found(torch.stack(every_logits).mean(0), boxes)


def mask_probabilities(state: State, kind: Kind, levels: list[Tensor], boxes: Tensor) -> Tensor:
    """Mask probabilities [R, C, 28, 28] of boxes, mean over the stages."""
    pooled = _region_features(state, kind, levels, boxes, 14)
    return torch.stack(list(_masks_of_stages(state, kind, pooled))).mean(0)[:, 1:]


def _masks_of_stages(state: State, kind: Kind, pooled: Tensor) -> Iterator[Tensor]:
    before = None
    for stage in range(kind.stages):
        name = f"mask_head.{stage}" if kind.stages > 1 else "mask_head"
        x = pooled
        if before is not None:
            x = x + _conv(state, f"{name}.conv_res.conv", before).relu()
        for index in range(4):
            x = _conv(state, f"{name}.convs.{index}.conv", x, padding=1).relu()
        before = x
        weight, bias = state[f"{name}.upsample.weight"], state[f"{name}.upsample.bias"]
        x = F.conv_transpose2d(x, weight, bias, stride=2).relu()
        yield _conv(state, f"{name}.conv_logits", x).sigmoid()
