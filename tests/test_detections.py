"""`select_detections` against torchvision's `nms`, category by category, and its post-processing.

Everything is compared bit by bit: the sets, their order, the boxes and the scores.
"""

import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from balanced_group_softmax import detections as module
from balanced_group_softmax.detections import Detections, select_detections

torchvision = pytest.importorskip("torchvision")
from torchvision.models.detection.roi_heads import RoIHeads  # noqa: E402
from torchvision.ops import clip_boxes_to_image, nms  # noqa: E402

LVIS_V1_CATEGORIES = 1203


def oracle(
    boxes: Tensor,
    scores: Tensor,
    score_threshold: float,
    nms_threshold: float,
    max_detections: int,
    min_size: float = 0.0,
) -> Detections:
    """Every candidate, one `nms` call per category, then a stable sort over all categories."""
    num_rows, num_categories = scores.shape
    if boxes.ndim == 2:
        boxes = boxes[:, None].expand(num_rows, num_categories, 4)
    comparable = boxes if boxes.dtype == torch.float64 else boxes.float()
    kept = torch.zeros(num_rows, num_categories, dtype=torch.bool)
    for category in range(num_categories):
        own = comparable[:, category]
        large = (own[:, 2] - own[:, 0] >= min_size) & (own[:, 3] - own[:, 1] >= min_size)
        rows = (large & (scores[:, category] > score_threshold)).nonzero().squeeze(1)
        if len(rows) > 0:
            # torchvision sorts stably, so among equal scores the lower row is looked at first.
            own_scores = scores[rows, category].to(comparable.dtype)
            kept[rows[nms(own[rows], own_scores, nms_threshold)], category] = True
    flat = kept.flatten().nonzero().squeeze(1)
    order = scores.flatten()[flat].argsort(descending=True, stable=True)
    flat = flat[order][:max_detections]
    rows, categories = flat // max(num_categories, 1), flat % max(num_categories, 1)
    return Detections(boxes[rows, categories], scores[rows, categories], categories, rows)


def assert_identical(ours: Detections, expected: Detections) -> None:
    for name, value, wanted in zip(Detections._fields, ours, expected, strict=True):
        assert value.dtype == wanted.dtype, name
        assert torch.equal(value, wanted), name


def check(boxes: Tensor, scores: Tensor, *thresholds: Any) -> Detections:
    """Compare with the oracle, and make sure that the inputs stay as they are."""
    boxes_before, scores_before = boxes.clone(), scores.clone()
    names = ("score_threshold", "nms_threshold", "max_detections", "min_size")
    ours = select_detections(boxes, scores, **dict(zip(names, thresholds, strict=False)))
    assert_identical(ours, oracle(boxes, scores, *thresholds))
    assert boxes.allclose(boxes_before, rtol=0, atol=0, equal_nan=True)
    assert scores.allclose(scores_before, rtol=0, atol=0, equal_nan=True)
    return ours


@contextmanager
def tuned(**constants: Any) -> Iterator[None]:
    """Change the tuning constants, so that small inputs walk every path."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in constants.items():
            patch.setattr(module, f"_{name}", value)
        yield


@contextmanager
def torchvision_hidden() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "torchvision.ops", None)
        assert module._find_nms() is module._plain_nms
        yield


def random_boxes(*shape: int, generator: torch.Generator, grid: int | None = None) -> Tensor:
    """Boxes that overlap a lot; with a grid, equal coordinates and exact IoUs abound."""
    corners = torch.rand(*shape, 2, generator=generator) * 60
    sizes = torch.rand(*shape, 2, generator=generator) * 60
    boxes = torch.cat([corners, corners + sizes], -1)
    return boxes if grid is None else (boxes / grid).round() * grid


def random_scores(kind: str, *shape: int, generator: torch.Generator) -> Tensor:
    draw = torch.rand(*shape, generator=generator)
    if kind == "equal":
        return torch.full(shape, 0.5)
    if kind == "coarse":  # many ties, exact zeros, and exact hits of the threshold 0.05
        return (draw * 20).floor() / 20
    if kind == "softmax":
        return (torch.randn(*shape, generator=generator) * 3).softmax(-1)
    if kind == "sparse":  # few candidates pass
        return torch.where(draw > 0.95, draw, torch.zeros(()))
    if kind == "wild":
        odd = torch.tensor([float("nan"), float("inf"), -float("inf"), 0.0, -0.5, 0.5])
        pick = torch.randint(0, 12, shape, generator=generator)
        return torch.where(pick < 6, odd[pick.clamp(max=5)], draw)
    return draw


def overlapping_pair(seed: int, dtype: torch.dtype) -> tuple[Tensor, Any]:
    """Two boxes and their IoU, rounded as `nms` rounds it on most processors."""
    generator = torch.Generator().manual_seed(seed)
    corners = torch.rand(2, 2, generator=generator, dtype=dtype)
    boxes = torch.cat([corners, corners + 1 + corners.flip(0)], 1) * 100
    sides = torch.minimum(boxes[0, 2:], boxes[1, 2:]) - torch.maximum(boxes[0, :2], boxes[1, :2])
    areas = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
    overlap = sides[0] * sides[1]
    return boxes, (overlap / (areas[0] + areas[1] - overlap)).numpy()[()]


def cases(largest: int) -> dict[str, st.SearchStrategy[Any]]:
    return {
        "seed": st.integers(0, 2**31),
        "num_rows": st.integers(0, largest),
        "num_categories": st.integers(1, largest),
        "kind": st.sampled_from(["uniform", "equal", "coarse", "softmax", "sparse", "wild"]),
        "per_class": st.booleans(),
        "grid": st.sampled_from([None, 1, 10, 30]),
        "score_threshold": st.sampled_from([0.0, 0.05, 0.5, -1.0, float("-inf"), float("inf")]),
        "nms_threshold": st.sampled_from([0.0, 0.25, 0.3, 0.5, 0.7, 1.0]),
        "max_detections": st.integers(0, 12) | st.just(10_000),
        "min_size": st.sampled_from([0.0, 1e-2, 10.0, 30.0]),
    }


def check_case(
    seed: int,
    num_rows: int,
    num_categories: int,
    kind: str,
    per_class: bool,
    grid: int | None,
    score_threshold: float,
    nms_threshold: float,
    max_detections: int,
    min_size: float,
) -> None:
    generator = torch.Generator().manual_seed(seed)
    shape = (num_rows, num_categories) if per_class else (num_rows,)
    boxes = random_boxes(*shape, generator=generator, grid=grid)
    scores = random_scores(kind, num_rows, num_categories, generator=generator)
    check(boxes, scores, score_threshold, nms_threshold, max_detections, min_size)


class TestEqualsPerCategoryNms:
    @given(**cases(largest=30))
    @settings(max_examples=150)
    def test_as_shipped(self, **case: Any) -> None:
        check_case(**case)

    # A first look at one or two candidates, doubled each time: every input takes many looks.
    @given(pairwise_size=st.sampled_from([1, 3, 32]), **cases(largest=30))
    @settings(max_examples=300)
    def test_many_looks(self, pairwise_size: int, **case: Any) -> None:
        with tuned(FIRST_LOOK=1, GROWTH=2, PAIRWISE_SIZE_CPU=pairwise_size):
            check_case(**case)

    @given(**cases(largest=16))
    @settings(max_examples=60)
    def test_without_the_pairwise_step(self, **case: Any) -> None:
        with tuned(FIRST_LOOK=1, GROWTH=3, MAX_PAIRS=0):
            check_case(**case)

    @given(pairwise_size=st.sampled_from([1, 32]), **cases(largest=16))
    @settings(max_examples=100)
    def test_without_torchvision(self, pairwise_size: int, **case: Any) -> None:
        generator = torch.Generator().manual_seed(case["seed"])
        shape = (case["num_rows"], case["num_categories"])
        boxes = random_boxes(
            *(shape if case["per_class"] else shape[:1]), generator=generator, grid=case["grid"]
        )
        scores = random_scores(case["kind"], *shape, generator=generator)
        options = {k: v for k, v in case.items() if k.endswith(("threshold", "ions", "min_size"))}
        with tuned(FIRST_LOOK=1, PAIRWISE_SIZE_CPU=pairwise_size), torchvision_hidden():
            ours = select_detections(boxes, scores, **options)
        assert_identical(ours, oracle(boxes, scores, **options))

    @given(
        coordinates=st.lists(
            st.floats(-1e4, 1e4, width=32) | st.sampled_from([0.0, 1e-30, 1e30, float("inf")]),
            min_size=12,
            max_size=12,
        ),
        threshold=st.floats(0, 1),
    )
    def test_any_three_boxes(self, coordinates: list[float], threshold: float) -> None:
        boxes = torch.tensor(coordinates).reshape(3, 4)
        check(boxes, torch.tensor([[0.9, 0.2], [0.5, 0.3], [0.1, 0.4]]), 0.0, threshold, 10)

    @given(seed=st.integers(0, 2**31), quarter_steps=st.integers(-6, 6))
    @settings(max_examples=200)
    @pytest.mark.parametrize("plain", [False, True], ids=["torchvision", "plain"])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
    def test_overlap_at_the_threshold(
        self, dtype: torch.dtype, plain: bool, seed: int, quarter_steps: int
    ) -> None:
        """The threshold is the rounded IoU of two boxes itself, or a hair's breadth away."""
        boxes, iou = overlapping_pair(seed, dtype)
        threshold = float(iou + quarter_steps * np.spacing(iou).astype(np.float64) / 4)
        scores = torch.tensor([[0.9], [0.8]], dtype=dtype)
        expected = oracle(boxes, scores, 0.0, threshold, 10)
        with torchvision_hidden() if plain else nullcontext():
            ours = select_detections(
                boxes, scores, score_threshold=0.0, nms_threshold=threshold, max_detections=10
            )
        assert_identical(ours, expected)


class TestOtherRounding:
    """Decisions are those of `nms`, also where it is compiled to round in another way.

    On other processors and on accelerators `nms` fuses multiplications and additions or keeps the
    threshold in float32. An `nms` that computes in double stands in for all of these.
    """

    @staticmethod
    def check(boxes: Tensor, scores: Tensor, threshold: float) -> None:
        def in_double(boxes: Tensor, scores: Tensor, threshold: float) -> Tensor:
            return nms(boxes.double(), scores.double(), threshold)

        expected = oracle(boxes.double(), scores, 0.0, threshold, 100)
        with tuned(find_nms=lambda: in_double):
            ours = select_detections(
                boxes, scores, score_threshold=0.0, nms_threshold=threshold, max_detections=100
            )
        assert_identical(ours._replace(boxes=ours.boxes.double()), expected)

    @given(seed=st.integers(0, 2**31), quarter_steps=st.integers(-10, 10))
    @settings(max_examples=300)
    def test_overlap_at_the_threshold(self, seed: int, quarter_steps: int) -> None:
        boxes, iou = overlapping_pair(seed, torch.float32)
        threshold = float(iou + quarter_steps * np.spacing(iou).astype(np.float64) / 4)
        self.check(boxes, torch.tensor([[0.9], [0.8]]), threshold)

    # Products of sides below 1e-19 are not normal float32 numbers, those above 1e19 overflow.
    @pytest.mark.parametrize("threshold", [0.0, 1e-300, 0.25, 0.5, 0.8, 1.0])
    @pytest.mark.parametrize("side", [1e-22, 5e-23, 1e-10, 1.0, 1.8e19, 1.9e19, 1e30])
    @pytest.mark.parametrize("height", [1e-22, 1.0, 1e19])
    def test_areas_beyond_the_range(self, height: float, side: float, threshold: float) -> None:
        for other in (1e-22, 5e-23, 1.0, 1.8e19, 1.9e19):
            boxes = torch.tensor([[0.0, 0.0, side, height], [0.0, 0.0, other, other]])
            self.check(boxes, torch.tensor([[0.9], [0.8]]), threshold)
            boxes = torch.tensor([[0.0, 0.0, side, side], [0.0, 0.0, other, other]])
            self.check(boxes, torch.tensor([[0.9], [0.8]]), threshold)


class TestAdversarial:
    """At sizes where the shortcuts of the shipped constants are taken."""

    # 120 x 200 = 24,000 candidates: more than 4 first looks, so the selection by maxima runs.
    ROWS, COLUMNS = 120, 200

    @pytest.mark.parametrize("score_threshold", [0.0, 0.05], ids="above {}".format)
    @pytest.mark.parametrize("per_class", [False, True], ids=["agnostic", "per_class"])
    @pytest.mark.parametrize("kind", ["uniform", "equal", "coarse", "softmax", "sparse", "wild"])
    def test_scores(self, kind: str, per_class: bool, score_threshold: float) -> None:
        generator = torch.Generator().manual_seed(1)
        shape = (self.ROWS, self.COLUMNS) if per_class else (self.ROWS,)
        boxes = random_boxes(*shape, generator=generator)
        scores = random_scores(kind, self.ROWS, self.COLUMNS, generator=generator)
        for max_detections in (1, 300, 10**6):
            check(boxes, scores, score_threshold, 0.5, max_detections)

    @pytest.mark.parametrize("kind", ["uniform", "equal", "coarse"])
    def test_all_boxes_identical_leaves_one_a_category(self, kind: str) -> None:
        """200 survive where 300 are asked: everything is looked at, in several looks."""
        generator = torch.Generator().manual_seed(2)
        boxes = torch.tensor([10.0, 10.0, 50.0, 40.0]).repeat(self.ROWS, 1)
        scores = random_scores(kind, self.ROWS, self.COLUMNS, generator=generator) + 0.01
        assert len(check(boxes, scores, 0.0, 0.5, 300).scores) == self.COLUMNS

    def test_survivor_hidden_below_thousands_of_suppressed(self) -> None:
        """Stopping when the survivors of a look stop growing would miss the last candidate."""
        boxes = torch.tensor([0.0, 0.0, 10.0, 10.0]).repeat(30_000, 1)
        boxes[-1] += 100
        scores = torch.linspace(1, 0.5, 30_000)[:, None]
        assert check(boxes, scores, 0.0, 0.5, 300).rows.tolist() == [0, 29_999]

    def test_one_category(self) -> None:
        generator = torch.Generator().manual_seed(3)
        boxes = random_boxes(20_000, generator=generator)
        check(boxes, random_scores("coarse", 20_000, 1, generator=generator), 0.05, 0.5, 300)

    def test_one_category_holds_all_the_best(self) -> None:
        generator = torch.Generator().manual_seed(4)
        boxes = random_boxes(2_000, generator=generator)
        scores = random_scores("uniform", 2_000, 12, generator=generator) * 0.5
        scores[:, 7] += 0.5
        check(boxes, scores, 0.0, 0.3, 300)

    def test_best_scores_in_one_run_of_memory(self) -> None:
        """Rows of high scores, so that few column maxima stand for many high scores."""
        generator = torch.Generator().manual_seed(5)
        scores = random_scores("coarse", 100, 400, generator=generator) * 0.1
        scores[20:50] += 0.8
        check(random_boxes(100, generator=generator), scores, 0.0, 0.5, 100)

    def test_nan_in_every_column_of_maxima(self) -> None:
        generator = torch.Generator().manual_seed(6)
        scores = random_scores("uniform", 400, 200, generator=generator)
        scores.view(-1)[::3] = float("nan")
        check(random_boxes(400, generator=generator), scores, 0.0, 0.5, 300)

    def test_boxes_too_small_among_the_best(self) -> None:
        generator = torch.Generator().manual_seed(7)
        boxes = random_boxes(self.ROWS, self.COLUMNS, generator=generator)
        scores = random_scores("uniform", self.ROWS, self.COLUMNS, generator=generator)
        # The best 10 % are empty, inside out, or NaN.
        for part, value in ((0.98, 0.0), (0.95, -5.0), (0.9, float("nan"))):
            chosen = scores > part
            boxes[..., 2] = torch.where(chosen, boxes[..., 0] + value, boxes[..., 2])
        for min_size in (0.0, 1e-2, 20.0):
            check(boxes, scores, 0.0, 0.5, 300, min_size)

    @pytest.mark.parametrize("per_class", [False, True], ids=["agnostic", "per_class"])
    @pytest.mark.parametrize("shape", [(0, 5), (5, 0), (0, 0), (1, 1)], ids=str)
    def test_empty_and_tiny(self, shape: tuple[int, int], per_class: bool) -> None:
        boxes = torch.tensor([0.0, 0.0, 2.0, 2.0]).expand(*(shape if per_class else shape[:1]), 4)
        found = check(boxes, torch.full(shape, 0.5), 0.0, 0.5, 300)
        assert found.boxes.shape == (len(found.scores), 4)
        assert found.rows.dtype == found.categories.dtype == torch.int64

    def test_no_detections_asked(self) -> None:
        found = check(torch.rand(4, 4), torch.rand(4, 3), 0.0, 0.5, 0)
        assert [list(value.shape) for value in found] == [[0, 4], [0], [0], [0]]


class TestKindsOfTensors:
    @pytest.mark.parametrize("box_dtype", [torch.float32, torch.float64, torch.half], ids=str)
    @pytest.mark.parametrize(
        "score_dtype", [torch.float32, torch.float64, torch.half, torch.bfloat16], ids=str
    )
    @pytest.mark.parametrize("score_threshold", [0.0, 0.05], ids="above {}".format)
    def test_dtypes(
        self, score_dtype: torch.dtype, box_dtype: torch.dtype, score_threshold: float
    ) -> None:
        generator = torch.Generator().manual_seed(0)
        boxes = random_boxes(100, generator=generator).to(box_dtype)
        scores = random_scores("softmax", 100, 300, generator=generator).to(score_dtype)
        if box_dtype != torch.float64 and score_dtype == torch.float64:
            # `nms` wants one dtype and the oracle would round scores to that of the boxes.
            scores = scores.float().double()
        check(boxes, scores, score_threshold, 0.5, 300)

    def test_double_scores_are_not_rounded_to_the_dtype_of_the_boxes(self) -> None:
        boxes = torch.tensor([[0.0, 0, 10, 10], [0, 0, 10, 9]])
        scores = torch.tensor([[0.5], [0.5 + 1e-12]], dtype=torch.float64)
        found = select_detections(
            boxes, scores, score_threshold=0, nms_threshold=0.5, max_detections=9
        )
        assert found.rows.tolist() == [1]

    def test_views_of_larger_tensors(self) -> None:
        """As they come from a head: the background column sliced off, boxes transposed."""
        generator = torch.Generator().manual_seed(0)
        scores = random_scores("softmax", 50, 401, generator=generator)[:, 1:]
        boxes = random_boxes(50, 401, generator=generator)[:, 1:]
        check(boxes, scores, 0.0, 0.5, 300)
        check(boxes.transpose(0, 1).contiguous().transpose(0, 1), scores, 0.0, 0.5, 300)
        check(boxes[:, 0], scores, 0.0, 0.5, 300)

    def test_no_gradient_flows(self) -> None:
        boxes = torch.tensor([[0.0, 0, 10, 10]], requires_grad=True)
        scores = torch.tensor([[0.5]], requires_grad=True)
        found = select_detections(
            boxes, scores * 1, score_threshold=0, nms_threshold=0.5, max_detections=9
        )
        assert not found.boxes.requires_grad
        assert not found.scores.requires_grad


def roi_heads(score_threshold: float, nms_threshold: float, max_detections: int) -> RoIHeads:
    return RoIHeads(
        box_roi_pool=None,
        box_head=None,
        box_predictor=None,
        fg_iou_thresh=0.5,
        bg_iou_thresh=0.5,
        batch_size_per_image=512,
        positive_fraction=0.25,
        bbox_reg_weights=None,
        score_thresh=score_threshold,
        nms_thresh=nms_threshold,
        detections_per_img=max_detections,
    )


@pytest.mark.parametrize(
    ("num_rows", "num_categories", "score_threshold"),
    [(200, 60, 0.0), (200, 60, 1e-4), (200, 60, 0.01), (400, LVIS_V1_CATEGORIES, 1e-3)],
    ids=["all", "low", "usual", "lvis"],
)
@pytest.mark.parametrize("max_detections", [20, 300])
def test_equals_the_post_processing_of_torchvision(
    num_rows: int, num_categories: int, score_threshold: float, max_detections: int
) -> None:
    generator = torch.Generator().manual_seed(8)
    logits = torch.randn(num_rows, num_categories + 1, generator=generator) * 3
    deltas = torch.randn(num_rows, 4 * (num_categories + 1), generator=generator)
    proposals = random_boxes(num_rows, generator=generator) * 10
    size = (900, 1100)
    heads = roi_heads(score_threshold, 0.5, max_detections)
    expected_boxes, expected_scores, expected_labels = (
        value[0] for value in heads.postprocess_detections(logits, deltas, [proposals], [size])
    )

    scores = logits.softmax(-1)[:, 1:]
    # torchvision leaves the order of equal scores open.
    reported = scores[scores >= expected_scores[-1]]
    assert reported.unique().numel() == reported.numel()
    # Above this torchvision leaves its coordinate offsets for one `nms` call per category.
    assert 4 * int((scores > score_threshold).sum()) > 4000
    boxes = clip_boxes_to_image(heads.box_coder.decode(deltas, [proposals]), size)[:, 1:]
    found = select_detections(
        boxes,
        scores,
        score_threshold=score_threshold,
        nms_threshold=0.5,
        max_detections=max_detections,
        min_size=1e-2,
    )
    assert torch.equal(found.boxes, expected_boxes)
    assert torch.equal(found.scores, expected_scores)
    assert torch.equal(found.categories + 1, expected_labels)


class TestEffort:
    def test_looks_at_a_small_part_of_the_candidates(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """1.2 million candidates, a few thousand of them compared."""
        compared = []
        original = module._keep_classwise

        def count(boxes: Tensor, *rest: Any) -> Tensor:
            compared.append(len(boxes))
            return original(boxes, *rest)

        monkeypatch.setattr(module, "_keep_classwise", count)
        generator = torch.Generator().manual_seed(9)
        boxes = random_boxes(1000, generator=generator) * 10
        for kind in ("softmax", "uniform", "equal"):
            scores = random_scores(kind, 1000, LVIS_V1_CATEGORIES, generator=generator)
            found = select_detections(
                boxes, scores, score_threshold=0.0, nms_threshold=0.5, max_detections=300
            )
            assert len(found.scores) == 300
            assert sum(compared) < 15_000, kind
            compared.clear()
        # A NaN here and there does not spoil the shortcut.
        scores = random_scores("uniform", 1000, LVIS_V1_CATEGORIES, generator=generator)
        scores[::100, ::100] = float("nan")
        select_detections(boxes, scores, score_threshold=0.0, nms_threshold=0.5, max_detections=300)
        assert len(compared) == 1
        assert sum(compared) < 5_000
        compared.clear()
        # No second look where the first shows that nothing is left above the threshold.
        scores = random_scores("uniform", 1000, LVIS_V1_CATEGORIES, generator=generator)
        assert 0 < (scores > 0.9999).sum() < 300
        select_detections(
            boxes, scores, score_threshold=0.9999, nms_threshold=0.5, max_detections=300
        )
        assert len(compared) == 1

    @pytest.mark.parametrize("num_categories", [80, LVIS_V1_CATEGORIES])
    def test_few_waits_for_the_device(self, num_categories: int) -> None:
        """Counts the operations that read a value or a size back from the device."""
        waits = []

        class Watch(TorchDispatchMode):
            def __torch_dispatch__(
                self, func: Any, types: Any, args: Any = (), kwargs: Any = None
            ) -> Any:
                name = func.overloadpacket.__name__
                masks = name == "index" and any(
                    index is not None and index.dtype == torch.bool for index in args[1]
                )
                if masks or name in ("_local_scalar_dense", "nonzero", "equal", "nms", "bincount"):
                    waits.append(name)
                return func(*args, **(kwargs or {}))

        generator = torch.Generator().manual_seed(10)
        boxes = random_boxes(1000, generator=generator) * 10
        scores = random_scores("softmax", 1000, num_categories, generator=generator)
        # As many pairs in one go as an accelerator takes.
        with tuned(PAIRWISE_SIZE_CPU=module._PAIRWISE_SIZE_ACCELERATOR), Watch():
            select_detections(
                boxes, scores, score_threshold=0.0, nms_threshold=0.5, max_detections=300
            )
        assert len(waits) <= 14, waits


GOOD: dict[str, Any] = {"score_threshold": 0.0, "nms_threshold": 0.5, "max_detections": 10}


class TestBadInput:
    @pytest.mark.parametrize(
        ("boxes", "scores", "error", "message"),
        [
            ([[0, 0, 1, 1]], torch.rand(1, 2), TypeError, "`boxes` to be a tensor, got list"),
            (torch.rand(2, 4), 0.5, TypeError, "`scores` to be a tensor, got float"),
            (torch.zeros(2, 4).long(), torch.rand(2, 3), TypeError, "`boxes`.*torch.int64"),
            (torch.rand(2, 4), torch.ones(2, 3).bool(), TypeError, "`scores`.*torch.bool"),
            (torch.rand(2, 4), torch.rand(2), ValueError, r"`scores`.*\[R, C\], got \[2\]"),
            (torch.rand(3, 4), torch.rand(2, 3), ValueError, r"`boxes`.*\[2, 4\].*got \[3, 4\]"),
            (torch.rand(2, 5), torch.rand(2, 3), ValueError, r"got \[2, 5\]"),
            (torch.rand(2, 2, 4), torch.rand(2, 3), ValueError, r"\[2, 3, 4\].*got \[2, 2, 4\]"),
            (torch.rand(2, 12), torch.rand(2, 3), ValueError, r"got \[2, 12\]"),
            (
                torch.rand(2, 4, device="meta"),
                torch.rand(2, 3),
                ValueError,
                "one device, got meta and cpu",
            ),
        ],
        ids=[
            "boxes_list",
            "scores_float",
            "boxes_int",
            "scores_bool",
            "scores_1d",
            "rows_differ",
            "five_coordinates",
            "categories_differ",
            "flattened_boxes",
            "devices",
        ],
    )
    def test_tensors(self, boxes: Any, scores: Any, error: type[Exception], message: str) -> None:
        with pytest.raises(error, match=message):
            select_detections(boxes, scores, **GOOD)

    @pytest.mark.parametrize(
        ("name", "value", "error", "message"),
        [
            ("score_threshold", float("nan"), ValueError, "to be a number, got nan"),
            ("score_threshold", "0.5", TypeError, "to be a number, got str"),
            ("score_threshold", None, TypeError, "to be a number, got NoneType"),
            ("score_threshold", True, TypeError, "to be a number, got bool"),
            ("nms_threshold", float("nan"), ValueError, r"in \[0, 1\], got nan"),
            ("nms_threshold", -0.1, ValueError, r"in \[0, 1\], got -0.1"),
            ("nms_threshold", 1.1, ValueError, r"in \[0, 1\], got 1.1"),
            ("nms_threshold", torch.tensor(0.5), TypeError, "to be a number, got Tensor"),
            ("min_size", -1, ValueError, "got -1"),
            ("min_size", float("nan"), ValueError, "got nan"),
            ("max_detections", -1, ValueError, "at least 0, got -1"),
            ("max_detections", 1.5, TypeError, "an integer, got float"),
            ("max_detections", True, TypeError, "an integer, got bool"),
            ("max_detections", None, TypeError, "an integer, got NoneType"),
        ],
    )
    def test_numbers(self, name: str, value: Any, error: type[Exception], message: str) -> None:
        with pytest.raises(error, match=f"`{name}`.*{message}"):
            select_detections(torch.rand(2, 4), torch.rand(2, 3), **{**GOOD, name: value})

    def test_numbers_of_numpy_will_do(self) -> None:
        boxes, scores = torch.rand(2, 4), torch.rand(2, 3)
        found = select_detections(
            boxes,
            scores,
            score_threshold=np.float32(0),
            nms_threshold=np.float64(0.5),
            max_detections=np.int64(10),
        )
        assert_identical(found, select_detections(boxes, scores, **GOOD))
