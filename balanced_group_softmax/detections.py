"""From boxes and scores to detections: exact class-wise NMS that looks only at what can survive.

With 1000 proposals and the 1203 categories of LVIS an image has 1.2 million candidates, of which
300 are reported. Greedy suppression only ever goes downwards in score, so what becomes of the best
M candidates does not depend on the others: once `max_detections` of them survive, the answer is
known. `select_detections` looks at the best few hundred first and takes more only when too few
survive, in the end all, so its result is always that of the exhaustive computation.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from balanced_group_softmax._arguments import as_float, as_int

__all__ = ["Detections", "select_detections"]

# How many candidates the first look takes, and by how much each further look is larger.
_FIRST_LOOK = 1024
_GROWTH = 8
# Categories with up to this many candidates are decided together, pair by pair; a larger one costs
# a call of `nms` of its own. A call costs about as much as 500 pairs on a CPU; on an accelerator
# pairs are almost free and every call waits for the device.
_PAIRWISE_SIZE_CPU = 32
_PAIRWISE_SIZE_ACCELERATOR = 256
# Bounds the memory of the pairwise step (some 100 bytes a pair).
_MAX_PAIRS = 1 << 20
# IoUs closer to the threshold than this many machine epsilons (relative) are left to `nms` itself.
_UNSURE_EPS = 32.0

_Nms = Callable[[Tensor, Tensor, float], Tensor]


class Detections(NamedTuple):
    """The detections of one image, best first.

    Attributes:
        boxes: `[D, 4]` as (x1, y1, x2, y2), in the units and dtype of the boxes that came in.
        scores: `[D]`, descending, in the dtype of the scores that came in.
        categories: `[D]` int64, the column of `scores` (0-based, background not counted).
        rows: `[D]` int64, the row of `scores`: the index of the RoI, for masks and features.
    """

    boxes: Tensor
    scores: Tensor
    categories: Tensor
    rows: Tensor


@torch.no_grad()
def select_detections(
    boxes: Tensor,
    scores: Tensor,
    *,
    score_threshold: float,
    nms_threshold: float,
    max_detections: int,
    min_size: float = 0.0,
) -> Detections:
    r"""Return the best detections of one image after class-wise non-maximum suppression.

    Every (row, category) with `score > score_threshold` whose box is at least `min_size` wide and
    high is a candidate. Within a category, in descending score, a candidate is dropped when its
    overlap with one that was kept exceeds the threshold,

    .. math:: \mathrm{IoU}(a, b) = \frac{|a \cap b|}{|a| + |b| - |a \cap b|} > t_\mathrm{nms} .

    The `max_detections` best of those that remain, over all categories, are returned. Among equal
    scores the lower flat index `row * C + category` comes first, in suppression and in the result.

    The result equals, bit by bit, `torchvision.ops.nms` run for each category on the boxes as they
    are, followed by a stable sort. Boxes are not shifted apart by category: in float32 such offsets
    change overlaps. Without torchvision the same arithmetic runs in plain PyTorch.

    NaN scores and boxes with a NaN never become candidates. float16 and bfloat16 boxes are compared
    in float32. No gradient flows to the result and the inputs are left as they are. On an
    accelerator the usual case waits for the device about ten times, whatever C is.

    Args:
        boxes: `[R, 4]`, or `[R, C, 4]` with a box per category; (x1, y1, x2, y2), floating point.
        scores: `[R, C]`, floating point; categories only, without background. Any scores will do:
            rows need not sum to 1.
        score_threshold: candidates score strictly more than this (compared in the dtype of
            `scores`).
        nms_threshold: in [0, 1]; an overlap strictly above it suppresses.
        max_detections: how many detections to return at most; 0 gives none.
        min_size: least width and height, in the units of `boxes`. Boxes that are inside out are
            dropped at 0 too.

    Returns:
        At most `max_detections` detections, best first.

    Raises:
        TypeError: `boxes` or `scores` is not a floating-point tensor, a threshold or `min_size` is
            not a number, or `max_detections` not an integer.
        ValueError: shapes or devices do not fit, a threshold or `min_size` is NaN or out of range,
            or `max_detections` is negative.

    Example:
        >>> boxes = torch.tensor([[0.0, 0, 10, 10], [0, 0, 10, 9], [20, 20, 30, 30]])
        >>> scores = torch.tensor([[0.9, 0.1], [0.8, 0.2], [0.0, 0.7]])
        >>> found = select_detections(
        ...     boxes, scores, score_threshold=0.05, nms_threshold=0.5, max_detections=10
        ... )
        >>> found.rows, found.categories
        (tensor([0, 2, 1]), tensor([0, 1, 1]))
    """
    _check_tensors(boxes, scores)
    score_threshold = as_float(score_threshold, "score_threshold")
    nms_threshold = as_float(nms_threshold, "nms_threshold", lowest=0.0, highest=1.0)
    min_size = as_float(min_size, "min_size", lowest=0.0)
    max_detections = as_int(max_detections, "max_detections", lowest=0)

    boxes, scores = boxes.detach(), scores.detach()
    num_categories = scores.shape[1]
    flat_scores = scores.reshape(-1)
    chosen = torch.empty(0, dtype=torch.int64, device=scores.device)
    if max_detections > 0 and flat_scores.numel() > 0:
        ranking = _Ranking(flat_scores, score_threshold)
        nms = _find_nms()
        seen, look = 0, max(_FIRST_LOOK, 2 * max_detections)
        while True:
            best, complete = ranking.best(look)
            # `chosen` is settled: candidates further down cannot suppress it, and those it
            # suppressed need no second look. So each look costs only what is new.
            fresh = best[seen:]
            seen = best.shape[0]
            fresh = fresh[_wide_enough(_boxes_of(boxes, fresh, num_categories), min_size)]
            candidates = torch.cat([chosen, fresh])
            kept = _keep_classwise(
                _boxes_of(boxes, candidates, num_categories),
                candidates % num_categories,
                num_categories,
                nms_threshold,
                nms,
            )
            chosen = candidates[kept]
            if complete or chosen.shape[0] >= max_detections:
                break
            look *= _GROWTH
        chosen = chosen[:max_detections]

    rows = _div(chosen, num_categories)
    categories = chosen - rows * num_categories
    found = boxes.index_select(0, rows) if boxes.ndim == 2 else boxes[rows, categories]
    return Detections(found, flat_scores[chosen], categories, rows)


class _Ranking:
    """The candidates above the threshold, by descending score, then ascending flat index."""

    def __init__(self, flat_scores: Tensor, threshold: float) -> None:
        self._scores = flat_scores
        self._threshold = threshold
        # Exact, keeps the order, and every device can sort it.
        self._values = flat_scores.float() if flat_scores.element_size() < 4 else flat_scores

    def best(self, wanted: int) -> tuple[Tensor, bool]:
        """Return flat indices of a head of the ranking and whether it is the whole ranking.

        The head has at least `wanted` entries unless it is the whole ranking.
        """
        values = self._values
        total = values.shape[0]
        if total <= 4 * wanted:
            index = (self._scores > self._threshold).nonzero().squeeze(1)
            return self._sorted(index), True

        # A value that at least `wanted` scores reach: the scores are split into many columns, and
        # that many column maxima reach it. Few scores more than those do, as a rule. A column with
        # a NaN has a NaN for its maximum and tells nothing, and the last scores may fill no row;
        # leaving them out only lowers the value.
        columns = min(8 * wanted, total // 2)
        full = total - total % columns
        grid = values[:full].view(-1, columns)
        maxima = grid.amax(0)
        known = torch.where(maxima.isnan(), -math.inf, maxima)
        reached = known.topk(wanted, sorted=False).values.amin()
        # What reaches it is in a column whose maximum does, or is NaN, or in the last scores. NaN
        # scores fail these comparisons, too.
        column = (~(maxima < reached)).nonzero().squeeze(1)
        place = (grid.index_select(1, column) >= reached).nonzero()
        index = place[:, 0] * columns + column[place[:, 1]]
        last = (values[full:] >= reached).nonzero().squeeze(1)
        index = torch.cat([index, last + full])
        if index.shape[0] > 4 * wanted:
            index = self._cut(index, wanted)
        passing = self._scores[index] > self._threshold
        above = index[passing]
        # What is left out scores no more than what is in, so if any of that failed, all of it does.
        return self._sorted(above), above.shape[0] < index.shape[0]

    def _cut(self, index: Tensor, wanted: int) -> Tensor:
        """Keep the `wanted` best of the ascending `index`, lower indices first among equals."""
        values = self._values[index]
        last = values.topk(wanted, sorted=False).values.amin()
        better = index[values > last]
        equal = index[values == last]
        return torch.cat([better, equal[: wanted - better.shape[0]]])

    def _sorted(self, index: Tensor) -> Tensor:
        # Equal scores stand in ascending index already, and a stable sort leaves them so.
        return index[self._values[index].sort(descending=True, stable=True).indices]


def _boxes_of(boxes: Tensor, flat_index: Tensor, num_categories: int) -> Tensor:
    """Gather the boxes of candidates for comparison: at least float32."""
    rows = _div(flat_index, num_categories)
    found = (
        boxes.index_select(0, rows)
        if boxes.ndim == 2
        else boxes[rows, flat_index - rows * num_categories]
    )
    return found.float() if found.element_size() < 4 else found


def _div(index: Tensor, num_categories: int) -> Tensor:
    # Without categories there are no indices either; 1 spares a division by zero.
    return torch.div(index, max(num_categories, 1), rounding_mode="floor")


def _wide_enough(boxes: Tensor, min_size: float) -> Tensor:
    sizes = boxes[:, 2:] - boxes[:, :2]
    return (sizes >= min_size).all(1)


def _keep_classwise(
    boxes: Tensor, categories: Tensor, num_categories: int, threshold: float, nms: _Nms
) -> Tensor:
    """Say which of the ranked candidates class-wise NMS keeps.

    Most categories have few candidates here, so those of all small categories are compared in one
    go. How `nms` rounds an IoU depends on the device it was compiled for (fused multiply-add, the
    width of the threshold); all ways agree unless the IoU is within a few epsilons of the
    threshold. So pairs that are clear are decided here, and a category with an unclear pair, like a
    category with many candidates, is handed to `nms`.

    Args:
        boxes: `[N, 4]`, best first, at least float32.
        categories: `[N]` int64, below `num_categories`.
        num_categories: C.
        threshold: overlaps strictly above it suppress.
        nms: what decides large and unclear categories.

    Returns:
        `[N]` bool.
    """
    number = boxes.shape[0]
    if number == 0:
        return torch.ones(0, dtype=torch.bool, device=boxes.device)
    by_category = categories.sort(stable=True)
    grouped, order = by_category.values, by_category.indices
    boxes = boxes.index_select(0, order)
    position = torch.arange(number, device=boxes.device)
    # For each candidate: where its category starts, how many it has, how many of them rank higher.
    counts = torch.zeros(num_categories, dtype=torch.int64, device=boxes.device)
    counts.scatter_add_(0, grouped, torch.ones_like(grouped))
    size = counts[grouped]
    start = (counts.cumsum(0) - counts)[grouped]
    limit = _PAIRWISE_SIZE_CPU if boxes.device.type == "cpu" else _PAIRWISE_SIZE_ACCELERATOR
    handed_over = size > limit
    higher = (position - start).masked_fill(handed_over, 0)
    num_pairs = int(higher.sum())

    kept = torch.ones(number, dtype=torch.bool, device=boxes.device)
    if num_pairs > _MAX_PAIRS:
        handed_over = size > 1
    elif num_pairs > 0:
        lower = torch.repeat_interleave(position, higher, output_size=num_pairs)
        running = torch.arange(num_pairs, device=boxes.device)
        upper = start[lower] + running - (higher.cumsum(0) - higher)[lower]
        suppresses, unclear = _compare(boxes, upper, lower, threshold)
        unclear_pairs = torch.zeros_like(position).scatter_add_(0, start[lower], unclear.long())
        handed_over = handed_over | (unclear_pairs[start] > 0)
        clear_pairs = suppresses.nonzero().squeeze(1)
        kept = _resolve(upper[clear_pairs], lower[clear_pairs], number)

    starts = (handed_over & (position == start)).nonzero().squeeze(1)
    if starts.shape[0] > 0:
        for first, count in torch.stack([starts, size[starts]], 1).tolist():
            # Ranks in place of scores: no ties, and exact in float32.
            ranks = torch.arange(count, 0, -1, dtype=boxes.dtype, device=boxes.device)
            survivors = nms(boxes[first : first + count], ranks, threshold)
            kept[first : first + count] = False
            kept[first + survivors] = True
    return torch.empty_like(kept).scatter_(0, order, kept)


def _compare(
    boxes: Tensor, upper: Tensor, lower: Tensor, threshold: float
) -> tuple[Tensor, Tensor]:
    """Say for each pair whether it overlaps clearly above the threshold, and whether it is unclear.

    Boxes that do not meet have IoU 0 (or NaN, when both are points), never above a threshold.
    For boxes that are not inside out an IoU has less than 8 epsilons of relative error, however it
    is computed, unless something leaves the range of normal numbers; then, or with an infinity, the
    pair is unclear.
    """
    left_top = torch.maximum(boxes[upper, :2], boxes[lower, :2])
    right_bottom = torch.minimum(boxes[upper, 2:], boxes[lower, 2:])
    sizes = right_bottom - left_top
    apart = (sizes <= 0).any(1)
    area = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
    intersection = sizes[:, 0] * sizes[:, 1]
    union = area[upper] + area[lower] - intersection
    iou = intersection / union
    number_format = torch.finfo(boxes.dtype)
    margin = _UNSURE_EPS * number_format.eps
    # An overflow makes the IoU 0 or NaN, which is not normal either.
    normal = torch.minimum(intersection, iou) >= number_format.tiny
    clear = normal & ((iou - threshold).abs() > margin * (iou + threshold))
    return ~apart & clear & (iou > threshold), ~apart & ~clear


def _resolve(upper: Tensor, lower: Tensor, number: int) -> Tensor:
    """Keep, from the pairs in which `upper` overlaps `lower`, what no kept candidate suppresses.

    Repeats "kept unless a kept one overlaps it from above" until nothing changes. Pairs point
    downwards only, so after n steps everything with fewer than n candidates in a chain above it is
    settled, and the state that no longer changes is the one greedy suppression reaches.
    """
    kept = torch.ones(number, dtype=torch.bool, device=upper.device)
    while upper.shape[0] > 0:
        suppressors = torch.zeros(number, dtype=torch.int32, device=upper.device)
        after = suppressors.scatter_add_(0, lower, kept[upper].int()) == 0
        if torch.equal(after, kept):
            break
        kept = after
    return kept


def _find_nms() -> _Nms:
    try:
        from torchvision.ops import nms
    except (ImportError, RuntimeError):  # RuntimeError: built for another version of torch
        return _plain_nms
    return nms


def _plain_nms(boxes: Tensor, scores: Tensor, threshold: float) -> Tensor:
    """`torchvision.ops.nms` in plain PyTorch, for boxes that come best first."""
    area = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
    left = torch.arange(boxes.shape[0], device=boxes.device)
    survivors = []
    while left.shape[0] > 0:
        best, left = left[:1], left[1:]
        survivors.append(best)
        sizes = torch.minimum(boxes[best, 2:], boxes[left, 2:])
        sizes = (sizes - torch.maximum(boxes[best, :2], boxes[left, :2])).clamp(min=0)
        intersection = sizes[:, 0] * sizes[:, 1]
        iou = intersection / (area[best] + area[left] - intersection)
        # In double, since a Python number would be rounded to the dtype of the tensor.
        left = left[~(iou.double() > threshold)]
    return torch.cat(survivors) if survivors else left


def _check_tensors(boxes: Tensor, scores: Tensor) -> None:
    for name, value in (("boxes", boxes), ("scores", scores)):
        if not isinstance(value, Tensor):
            raise TypeError(f"Expected `{name}` to be a tensor, got {type(value).__name__}")
        if not value.is_floating_point():
            raise TypeError(f"Expected `{name}` to be floating point, got {value.dtype}")
    if scores.ndim != 2:
        raise ValueError(f"Expected `scores` of shape [R, C], got {list(scores.shape)}")
    num_rows, num_categories = scores.shape
    if boxes.shape not in ((num_rows, 4), (num_rows, num_categories, 4)):
        raise ValueError(
            f"Expected `boxes` of shape [{num_rows}, 4] or [{num_rows}, {num_categories}, 4] "
            f"to go with `scores` [{num_rows}, {num_categories}], got {list(boxes.shape)}"
        )
    if boxes.device != scores.device:
        raise ValueError(
            f"Expected `boxes` and `scores` on one device, got {boxes.device} and {scores.device}"
        )
