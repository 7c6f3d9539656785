"""Time of `select_detections` against torchvision's post-processing, on the same boxes and scores.

Both get decoded, clipped boxes and the scores of one image and return the best detections:

- `torchvision`: what `RoIHeads.postprocess_detections` does after softmax and decoding (threshold,
  small boxes, `batched_nms`, cut), from torchvision's own functions;
- `select_detections`: this library.

The kinds of scores:

- `trained`: a softmax with a long tail; 15 objects, most proposals background, many around objects;
- `untrained`: a softmax over logits that are almost equal, as at the start of training;
- `uniform`: independent uniform scores, `equal`: one score for all, `one_box`: uniform scores on
  boxes that are all the same, so that a category has one survivor.

A last pair, `whole`, starts from logits and deltas and calls `RoIHeads.postprocess_detections`
itself. Every result is compared bit by bit with one `nms` call per category and a stable sort.

    python benchmarks/bench_detections.py --quick
    python benchmarks/bench_detections.py --json results/detections.json
    python benchmarks/bench_detections.py --device cuda
"""

import argparse
import math
from dataclasses import asdict, dataclass
from functools import partial

import torch
from arguments import device_name, limit, output_file, seed, whole
from machine import environment
from program import MAX_SECONDS
from records import brief, markdown_table, write_json
from timing import Timing, interleave
from torch import Tensor
from torchvision.models.detection.roi_heads import RoIHeads
from torchvision.ops import batched_nms, clip_boxes_to_image, nms, remove_small_boxes

from balanced_group_softmax.cli_program import HelpFormatter, ended
from balanced_group_softmax.detections import Detections, select_detections

STATUS = """\
exit status: 0 if done; 1 if detections are not those expected, or a case could not be measured; 2
if the usage is wrong; 130 after Ctrl-C.
"""

IMAGE_SIZE = (800, 1216)
OBJECTS = 15
NMS_THRESHOLD = 0.5
MIN_SIZE = 1e-2


@dataclass(frozen=True)
class Case:
    kind: str
    per_class: bool
    score_threshold: float
    rows: int
    categories: int

    def __str__(self) -> str:
        boxes = "boxes per category" if self.per_class else "one box a row"
        return f"{self.kind}, {boxes}, threshold {self.score_threshold:g}"


@dataclass(frozen=True)
class Result:
    case: Case
    candidates: int
    detections: int
    torchvision: Timing
    select_detections: Timing
    identical: bool

    @property
    def ratio(self) -> float:
        return self.torchvision.median / self.select_detections.median


def make_boxes(
    shape: tuple[int, ...], objects: Tensor, near: Tensor, generator: torch.Generator
) -> Tensor:
    """Boxes within the image: around their object where `near` names one, anywhere otherwise."""
    height, width = IMAGE_SIZE
    scale = torch.tensor([width, height]).repeat(2)
    corners = torch.rand(*shape, 2, generator=generator)
    sizes = 0.02 + 0.3 * torch.rand(*shape, 2, generator=generator) ** 2
    anywhere = torch.cat([corners - sizes / 2, corners + sizes / 2], -1) * scale
    around = objects[near.clamp(min=0)]
    if len(shape) == 2:
        around, near = around[:, None], near[:, None]
    jitter = torch.randn(*shape, 4, generator=generator) * 0.01 * scale
    return torch.where(near[..., None] >= 0, around + jitter, anywhere)


def make_image(
    kind: str, rows: int, categories: int, per_class: bool, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Boxes and scores of one image on the CPU."""
    corners = torch.rand(OBJECTS, 2, generator=generator) * 0.7
    sides = 0.05 + 0.25 * torch.rand(OBJECTS, 2, generator=generator)
    height, width = IMAGE_SIZE
    objects = torch.cat([corners, corners + sides], 1) * torch.tensor([width, height]).repeat(2)
    # Half of the proposals lie around objects, as those of a trained detector do.
    near = torch.randint(-OBJECTS, OBJECTS, (rows,), generator=generator)
    shape = (rows, categories) if per_class else (rows,)
    boxes = make_boxes(shape, objects, near, generator)
    if kind == "one_box":
        boxes = objects[0].expand(*shape, 4)
    boxes = clip_boxes_to_image(boxes, IMAGE_SIZE).contiguous()

    if kind in ("uniform", "one_box"):
        return boxes, torch.rand(rows, categories, generator=generator)
    if kind == "equal":
        return boxes, torch.full((rows, categories), 0.5)
    logits = torch.randn(rows, categories + 1, generator=generator)
    if kind == "untrained":
        return boxes, (0.01 * logits).softmax(1)[:, 1:]
    # Frequent categories are the likelier ones: an offset by the logarithm of a Zipf frequency.
    logits[:, 1:] -= torch.arange(1, categories + 1).log()[
        torch.randperm(categories, generator=generator)
    ]
    logits[:, 0] += 6
    labels = torch.randint(0, categories, (OBJECTS,), generator=generator)
    found = (near >= 0).nonzero().squeeze(1)
    logits[found, 1 + labels[near[found]]] += 12
    return boxes, logits.softmax(1)[:, 1:]


def by_torchvision(boxes: Tensor, scores: Tensor, threshold: float, limit: int) -> Detections:
    """The part of torchvision's post-processing that follows softmax and decoding."""
    rows, categories = scores.shape
    labels = torch.arange(categories, device=scores.device).expand(rows, categories).reshape(-1)
    boxes, scores = boxes.reshape(-1, 4), scores.reshape(-1)
    index = torch.where(scores > threshold)[0]
    index = index[remove_small_boxes(boxes[index], MIN_SIZE)]
    boxes, scores, labels = boxes[index], scores[index], labels[index]
    best = batched_nms(boxes, scores, labels, NMS_THRESHOLD)[:limit]
    return Detections(boxes[best], scores[best], labels[best], index[best] // categories)


def by_category(boxes: Tensor, scores: Tensor, threshold: float, limit: int) -> Detections:
    """What the result must be: `nms` for each category, then a stable sort."""
    rows, categories = scores.shape
    if boxes.ndim == 2:
        boxes = boxes[:, None].expand(rows, categories, 4)
    kept = torch.zeros_like(scores, dtype=torch.bool)
    for category in range(categories):
        index = torch.where(scores[:, category] > threshold)[0]
        index = index[remove_small_boxes(boxes[index, category], MIN_SIZE)]
        survivors = nms(boxes[index, category], scores[index, category], NMS_THRESHOLD)
        kept[index[survivors], category] = True
    flat = kept.flatten().nonzero().squeeze(1)
    order = scores.flatten()[flat].argsort(descending=True, stable=True)[:limit]
    row, column = flat[order] // categories, flat[order] % categories
    return Detections(boxes[row, column], scores[row, column], column, row)


def by_us(boxes: Tensor, scores: Tensor, threshold: float, limit: int) -> Detections:
    return select_detections(
        boxes,
        scores,
        score_threshold=threshold,
        nms_threshold=NMS_THRESHOLD,
        max_detections=limit,
        min_size=MIN_SIZE,
    )


def identical(one: Detections, two: Detections) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, two, strict=True))


def measure(case: Case, options: argparse.Namespace) -> Result:
    if case.kind == "whole":
        return measure_whole(case, options)
    generator = torch.Generator().manual_seed(options.seed)
    boxes, scores = (
        value.to(options.device)
        for value in make_image(case.kind, case.rows, case.categories, case.per_class, generator)
    )
    arguments = (boxes, scores, case.score_threshold, options.max_detections)
    ours = by_us(*arguments)
    # torchvision knows boxes per category only; making them so is not part of the time.
    spread = boxes if case.per_class else boxes[:, None].expand(*scores.shape, 4).contiguous()
    calls = {
        "torchvision": lambda turn: by_torchvision(spread, *arguments[1:]),
        "select_detections": lambda turn: by_us(*arguments),
    }
    times = time_calls(calls, options)
    return Result(
        case=case,
        candidates=int((scores > case.score_threshold).sum()),
        detections=len(ours.scores),
        **times,
        identical=identical(ours, by_category(*arguments)),
    )


def measure_whole(case: Case, options: argparse.Namespace) -> Result:
    """From logits and deltas, against `RoIHeads.postprocess_detections` itself."""
    generator = torch.Generator().manual_seed(options.seed)
    boxes, scores = make_image("trained", case.rows, case.categories, False, generator)
    background = 1 - scores.sum(1, keepdim=True)
    logits = torch.cat([background, scores], 1).clamp(min=1e-30).log().to(options.device)
    deltas = torch.randn(case.rows, 4 * (case.categories + 1), generator=generator)
    proposals, deltas = [boxes.to(options.device)], deltas.to(options.device)
    heads = RoIHeads(
        box_roi_pool=None,
        box_head=None,
        box_predictor=None,
        fg_iou_thresh=0.5,
        bg_iou_thresh=0.5,
        batch_size_per_image=512,
        positive_fraction=0.25,
        bbox_reg_weights=None,
        score_thresh=0.0,
        nms_thresh=NMS_THRESHOLD,
        detections_per_img=options.max_detections,
    )

    def ours(turn: int = 0) -> Detections:
        decoded = heads.box_coder.decode(deltas, proposals)
        decoded = clip_boxes_to_image(decoded, IMAGE_SIZE)
        columns = logits.softmax(-1)[:, 1:]
        return by_us(decoded[:, 1:], columns, 0.0, options.max_detections)

    stock = partial(heads.postprocess_detections, logits, deltas, proposals, [IMAGE_SIZE])
    found = ours()
    expected = [value[0] for value in stock()]
    same = all(
        torch.equal(a, b)
        for a, b in zip((found.boxes, found.scores, found.categories + 1), expected, strict=True)
    )
    calls = {"torchvision": lambda turn: stock(), "select_detections": ours}
    return Result(
        case=case,
        candidates=case.rows * case.categories,
        detections=len(found.scores),
        **time_calls(calls, options),
        identical=same,
    )


def time_calls(calls: dict, options: argparse.Namespace) -> dict[str, Timing]:
    return interleave(
        calls,
        rounds=options.rounds,
        warmup=1,
        device=torch.device(options.device),
        max_seconds=options.max_seconds,
    )


def all_cases(options: argparse.Namespace) -> list[Case]:
    layouts = (False, True)
    thresholds = (0.0,) if options.quick else (0.0, 1e-4, 0.05)
    cases = [("trained", per_class, t) for per_class in layouts for t in thresholds]
    if not options.quick:
        cases += [("untrained", per_class, t) for per_class in layouts for t in thresholds[:2]]
        cases += [
            (kind, per_class, 0.0)
            for kind in ("uniform", "equal", "one_box")
            for per_class in layouts
        ]
    cases.append(("whole", True, 0.0))
    return [Case(*case, options.rows, options.categories) for case in cases]


def table(results: list[Result]) -> str:
    rows = [
        (
            f"`{result.case.kind}`",
            "per category" if result.case.per_class else "one a row",
            f"{result.case.score_threshold:g}",
            f"{result.candidates:,}",
            result.detections,
            f"{result.torchvision.median:.1f}",
            f"{result.select_detections.median:.2f}",
            f"{result.ratio:.3g}",
            "yes" if result.identical else "NO",
        )
        for result in results
    ]
    header = ("scores", "boxes", "threshold", "candidates", "detections")
    return markdown_table((*header, "torchvision ms", "ours ms", "ratio", "identical"), rows)


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=STATUS, formatter_class=HelpFormatter
    )
    add = parser.add_argument
    add(
        "--device",
        type=device_name,
        default="cpu",
        metavar="NAME",
        help="cpu, cuda or cuda:N (default: cpu)",
    )
    add("--rows", type=whole, default=1000, metavar="R", help="proposals (default: 1000)")
    add(
        "--categories",
        type=whole,
        default=1203,
        metavar="C",
        help="categories (default: 1203, those of LVIS v1)",
    )
    add(
        "--max-detections",
        type=whole,
        default=300,
        metavar="N",
        help="detections that are kept (default: 300)",
    )
    add("--rounds", type=whole, default=7, metavar="N", help="timed runs of each (default: 7)")
    add(
        "--max-seconds",
        type=limit,
        default=math.inf,
        metavar="S",
        help=f"{MAX_SECONDS} (default: no limit)",
    )
    add("--threads", type=whole, metavar="N", help="threads of torch (default: torch decides)")
    add("--seed", type=seed, default=0, metavar="N", help="seed of boxes and scores (default: 0)")
    add("--quick", action="store_true", help="trained scores at threshold 0 only")
    add("--json", type=output_file, metavar="OUT", help="write the record here")
    return parser.parse_args(arguments)


def write_record(
    options: argparse.Namespace,
    facts: dict[str, str | int],
    results: list[Result],
    faults: list[str],
) -> None:
    record = {
        "benchmark": "detections",
        "environment": facts,
        "options": {name: str(value) for name, value in vars(options).items() if name != "json"},
        "results": [asdict(result) | {"ratio": result.ratio} for result in results],
        "faults": faults,
        "table": table(results),
    }
    write_json(options.json, record)


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    facts = environment(torch.device(options.device))
    print(", ".join(f"{name} {value}" for name, value in facts.items()))
    print(f"{options.rows} proposals, {options.categories} categories; medians of wall time")
    results: list[Result] = []
    faults: list[str] = []
    for case in all_cases(options):
        try:
            result = measure(case, options)
        except Exception as error:  # the other cases still count
            faults.append(f"{case}: {brief(error)}")
        else:
            results.append(result)
            print(f"{case}: {result.ratio:.0f} times faster", flush=True)
            if not result.identical:
                faults.append(f"{case}: other detections than expected")
        if options.json is not None:
            write_record(options, facts, results, faults)
    print(f"\n{table(results)}")
    for fault in faults:
        print(f"FAULT: {fault}")
    return 1 if faults else 0


if __name__ == "__main__":
    raise SystemExit(ended(main))
