"""The goals of this library's speed and memory, and what a run says of each."""

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from cuda_measures import BUSY
from judging import (
    Goal,
    Rule,
    our_count,
    our_microseconds,
    our_time,
    ours_over,
    over_ours,
    ratio,
    time_of,
)
from matrix import WIDTHS
from records import ALL_ACTIVE_FOREGROUND, Case, Result, number

BOTH = "both, wall"
SCORES = "scores, wall"
COLD = "graph, cold"
MEMORY = "peak memory / logits"
WAITS = "waits of the host"
NARROW = 1300
"""Columns up to which a layout is of LVIS size."""
SHARES = (0.05, 0.10, 0.25)
DENSE = ("dense", "dense, Liger", "dense, QuACK")
FULL, HALF = ("float32",), ("bfloat16",)


@dataclass
class Measurements:
    """All that a run measured."""

    device: str
    loss: list[Result] = field(default_factory=list)
    scores: list[Result] = field(default_factory=list)
    detections: list[Mapping[str, Any]] = field(default_factory=list)
    reproducible: dict[str, dict[str, bool]] = field(default_factory=dict)


def all_goals(measured: Measurements) -> list[Goal]:
    """Every goal, for both kinds of device, in the order of the page."""
    no_gpu = "" if measured.device == "cuda" else "no GPU in this run: --device cuda"
    no_cpu = "" if measured.device == "cpu" else "a run on the GPU: --device cpu"
    return [
        *(rule.judge(measured.loss, no_gpu) for rule in GPU_LOSS),
        *(rule.judge(measured.scores, no_gpu) for rule in GPU_SCORES),
        _reproducible(measured, "cuda", "GPU"),
        *(rule.judge(measured.loss, no_cpu) for rule in CPU_LOSS),
        *(rule.judge(measured.scores, no_cpu) for rule in CPU_SCORES),
        _detections(measured, no_cpu),
        _reproducible(measured, "cpu", "CPU"),
    ]


def sizes(
    dtypes: Sequence[str],
    rows: Sequence[int],
    shares: Sequence[float | None] = (None,),
    *,
    all_active: bool = False,
    layout: str = "lvis_v0.5",
) -> frozenset[Case]:
    """All combinations; scores have no share of foreground."""
    return frozenset(
        Case(layout, WIDTHS[layout], dtype, number_of_rows, share, all_active)
        for dtype, number_of_rows, share in itertools.product(dtypes, rows, shares)
    )


def _share(case: Case, share: float) -> bool:
    return not case.all_active and case.foreground == share


def _tenth_and_large(case: Case) -> bool:
    return _share(case, 0.10) and case.rows >= 8192


def _usual(layout: str, least: int, most: float = math.inf) -> Callable[[Case], bool]:
    """Sizes on the CPU: so many rows in float32, with the usual shares of foreground."""
    return lambda case: (
        (case.layout, case.dtype) == (layout, "float32")
        and least <= case.rows <= most
        and any(_share(case, share) for share in SHARES)
    )


def _small(case: Case) -> bool:
    return case.rows <= 1024 and case.logits < NARROW and not case.all_active


def _best_dense(result: Result) -> tuple[str, float] | None:
    """The fastest dense cross-entropy.

    One that no graph can hold counts with the time that its kernels alone keep the GPU busy, the
    least that it can take.
    """
    found = []
    for name in DENSE:
        time = time_of(result, COLD, name) or time_of(result, BUSY, name)
        if time is not None:
            found.append((time, name))
    return min(found)[::-1] if found else None


def _best_dense_over_ours(result: Result) -> float | None:
    best = _best_dense(result)
    return ratio(best[1] if best else None, our_time(result, COLD))


def _which_dense(result: Result) -> str:
    """Names the fastest, and those that it was not compared with."""
    best = _best_dense(result)
    missing = [
        name for name in DENSE if all(time_of(result, k, name) is None for k in (COLD, BUSY))
    ]
    without = f"; without {' and '.join(missing)}" if missing else ""
    return f"; best: {best[0] if best else 'none'}{without}"


LARGE = (8192, 65536)
SMALL = sizes(FULL, (512, 1024), SHARES) | sizes(HALF, (512, 1024), [0.10])
TENTH = sizes(FULL + HALF, LARGE, [0.10])
ACTIVE = sizes(FULL + HALF, LARGE, [ALL_ACTIVE_FOREGROUND], all_active=True)

GPU_LOSS = [
    Rule(
        "GPU, all active, R >= 8192: loss + gradient / copy",
        ours_over(COLD, "copy"),
        1.10,
        lambda case: case.all_active and case.rows >= 8192,
        ACTIVE,
    ),
    Rule(
        "GPU, 10 % foreground, R >= 8192: loss + gradient / copy",
        ours_over(COLD, "copy"),
        0.70,
        _tenth_and_large,
        TENTH,
    ),
    Rule(
        "GPU, 10 % foreground, R >= 8192: best dense cross-entropy / ours",
        _best_dense_over_ours,
        2.2,
        _tenth_and_large,
        TENTH,
        least=True,
        remark=_which_dense,
    ),
    Rule(
        "GPU, R <= 1024, LVIS, graph, draw included: loss + gradient",
        our_microseconds(COLD),
        10,
        _small,
        SMALL,
        unit=" us",
    ),
    Rule(
        "GPU, R <= 1024, LVIS: original (wall, no graph can hold it) / ours (graph)",
        over_ours(BOTH, "original", COLD),
        100,
        _small,
        SMALL,
        least=True,
    ),
    Rule(
        "GPU, R <= 1024, LVIS: `torch.compile` of the loop / ours, both graphs",
        over_ours(COLD, "loop, compiled"),
        2,
        _small,
        SMALL,
        least=True,
    ),
    Rule(
        "GPU, peak memory / logits, R >= 8192 (1 and 2 % for small tensors)",
        our_count(MEMORY),
        1.02,
        lambda case: case.rows >= 8192,
        TENTH | ACTIVE,
    ),
    Rule("GPU, loss: waits of the host", our_count(WAITS), 0, lambda case: True),
]
GPU_SCORES = [
    Rule(
        "GPU, scores, float32, R >= 8192: ours / copy (of 16-bit logits, not judged, scores move "
        "1.5 times the bytes that a copy does)",
        ours_over(COLD, "copy"),
        1.2,
        lambda case: case.rows >= 8192 and case.dtype == "float32",
        sizes(FULL, LARGE),
    ),
    Rule(
        "GPU, scores, R = 1000, LVIS: ours",
        our_microseconds(COLD),
        5,
        lambda case: case.rows == 1000 and case.logits < NARROW,
        sizes(FULL + HALF, [1000]),
        unit=" us",
    ),
    Rule("GPU, scores: waits of the host", our_count(WAITS), 0, lambda case: True),
]


CPU_LOSS = [
    *(
        Rule(
            f"CPU, L = 1236, {name}: original / loss + backward",
            over_ours(BOTH, "original"),
            limit,
            _usual("lvis_v0.5", rows[0], most),
            sizes(FULL, rows, SHARES),
            least=True,
        )
        for name, rows, most, limit in (
            ("R >= 1024", (1024, 8192), math.inf, 3.0),
            ("R = 512", (512,), 512, 2.5),
            ("R = 128", (128,), 128, 1.5),
        )
    ),
    *(
        Rule(
            f"CPU, L = 1236, R = {rows}: loss + backward / dense cross-entropy",
            ours_over(BOTH, "dense"),
            limit,
            _usual("lvis_v0.5", rows, rows),
            sizes(FULL, [rows], SHARES),
        )
        for rows, limit in ((512, 1.4), (1024, 1.0), (8192, 0.35))
    ),
    Rule(
        "CPU, L = 13210, R >= 512: loss + backward / dense cross-entropy",
        ours_over(BOTH, "dense"),
        0.7,
        _usual("v3det", 512),
        sizes(FULL, (512, 1024), SHARES, layout="v3det")
        | sizes(FULL, [8192], [0.25], layout="v3det"),
    ),
    Rule(
        "CPU, L = 1236, R = 8192: peak memory / logits",
        our_count(MEMORY),
        1.2,
        _usual("lvis_v0.5", 8192, 8192),
        sizes(FULL, [8192], SHARES),
    ),
]
CPU_SCORES = [
    Rule(
        "CPU, scores, R = 1000, L = 1236: the original's merge / ours",
        over_ours(SCORES, "original"),
        2,
        lambda case: case.rows == 1000 and case.layout == "lvis_v0.5",
        sizes(FULL, [1000]),
        least=True,
    ),
]


def _reproducible(measured: Measurements, device: str, title: str) -> Goal:
    what, wanted = f"{title}, loss and gradient for the same seed", "equal bit by bit"
    if measured.device != device:
        return Goal(what, wanted, f"another device: --device {device}", "not measured")
    if not measured.reproducible:
        return Goal(what, wanted, "no loss was measured", "not measured")
    different = [
        f"{name}, {layout}"
        for layout, found in measured.reproducible.items()
        for name, same in found.items()
        if not same
    ]
    if different:
        return Goal(what, wanted, f"different: {'; '.join(different)}", "missed")
    return Goal(what, wanted, f"equal ({', '.join(measured.reproducible)})", "met")


def _detections(measured: Measurements, reason: str) -> Goal:
    what = "CPU, detections, 1000 x 1203, threshold 0: torchvision / ours"
    wanted = ">= 50, identical output"
    found = {
        (entry["case"]["kind"], entry["case"]["per_class"]): entry
        for entry in measured.detections
        if (entry["case"]["rows"], entry["case"]["categories"]) == (1000, 1203)
        and entry["case"]["kind"] in ("trained", "whole")
        and entry["case"]["score_threshold"] == 0
    }
    if reason or not found:
        return Goal(what, wanted, reason or "not in this run", "not measured")
    worst = min(found.values(), key=lambda entry: entry["ratio"])
    same = all(entry["identical"] for entry in measured.detections)
    text = f"{number(worst['ratio'])} ({worst['case']['kind']}), {'' if same else 'NOT '}identical"
    if not same or worst["ratio"] < 50:
        return Goal(what, wanted, text, "missed")
    if len(found) < 3:  # one box a row, boxes per category, and the whole of the post-processing
        return Goal(what, wanted, f"{text}; not all kinds measured", "incomplete")
    return Goal(what, wanted, text, "met")
