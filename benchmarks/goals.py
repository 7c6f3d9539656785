"""The goals of this library's speed and memory, and what a run says of each."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from cuda_measures import BUSY
from records import OURS, Case, Result, number

BOTH = "both, wall"
SCORES = "scores, wall"
COLD = "graph, cold"
MEMORY = "peak memory / logits"
WAITS = "waits of the host"
NARROW = 1300
"""Columns up to which a layout is of LVIS size."""

Chosen = Callable[[Case], bool]
Value = Callable[[Result], float | None]


@dataclass(frozen=True)
class Goal:
    """One line of the table: what is wanted, what was found."""

    what: str
    wanted: str
    found: str
    verdict: str
    """"met", "missed" or "not measured"."""


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
    return [*_gpu_goals(measured), *_cpu_goals(measured)]


def _gpu_goals(measured: Measurements) -> list[Goal]:
    def judge(
        what: str,
        value: Value,
        limit: float,
        chosen: Chosen,
        *,
        least: bool = False,
        unit: str = "",
        results: Sequence[Result] = measured.loss,
    ) -> Goal:
        reason = "" if measured.device == "cuda" else "no GPU in this run: --device cuda"
        return _judge(what, value, limit, results, chosen, least=least, unit=unit, reason=reason)

    scores = measured.scores
    return [
        judge(
            "GPU, all active, R >= 8192: loss + gradient / copy",
            _over(COLD, "copy"),
            1.10,
            lambda case: case.all_active and case.rows >= 8192,
        ),
        judge(
            "GPU, 10 % foreground, R >= 8192: loss + gradient / copy",
            _over(COLD, "copy"),
            0.70,
            lambda case: _share(case, 0.10) and case.rows >= 8192,
        ),
        judge(
            "GPU, 10 % foreground, R >= 8192: best dense cross-entropy / ours",
            _best_dense,
            2.2,
            lambda case: _share(case, 0.10) and case.rows >= 8192,
            least=True,
        ),
        judge(
            "GPU, R <= 1024, LVIS, graph, draw included: loss + gradient",
            lambda result: _times_1000(_ours(result, COLD)),
            10,
            _small,
            unit=" us",
        ),
        judge(
            "GPU, R <= 1024, LVIS: original (wall, no graph can hold it) / ours (graph)",
            lambda result: _ratio(_time(result, BOTH, "original"), _ours(result, COLD)),
            100,
            _small,
            least=True,
        ),
        judge(
            "GPU, R <= 1024, LVIS: `torch.compile` of the loop / ours, both graphs",
            lambda result: _ratio(_time(result, COLD, "loop, compiled"), _ours(result, COLD)),
            2,
            _small,
            least=True,
        ),
        judge(
            "GPU, scores, R >= 8192: ours / copy",
            _over(COLD, "copy"),
            1.2,
            lambda case: case.rows >= 8192,
            results=scores,
        ),
        judge(
            "GPU, scores, R = 1000, LVIS: ours",
            lambda result: _times_1000(_ours(result, COLD)),
            5,
            lambda case: case.rows == 1000 and case.logits < NARROW,
            unit=" us",
            results=scores,
        ),
        judge(
            "GPU, peak memory / logits, R >= 8192 (1 and 2 % for small tensors)",
            lambda result: _count(result, MEMORY),
            1.02,
            lambda case: case.rows >= 8192,
        ),
        judge("GPU, loss: waits of the host", lambda r: _count(r, WAITS), 0, lambda case: True),
        judge(
            "GPU, scores: waits of the host",
            lambda result: _count(result, WAITS),
            0,
            lambda case: True,
            results=scores,
        ),
        _reproducible(measured, "cuda", "GPU"),
    ]


def _cpu_goals(measured: Measurements) -> list[Goal]:
    reason = "" if measured.device == "cpu" else "a run on the GPU: --device cpu"

    def judge(
        what: str, value: Value, limit: float, chosen: Chosen, *, least: bool = False
    ) -> Goal:
        return _judge(what, value, limit, measured.loss, chosen, least=least, reason=reason)

    def usual(layout: str, rows: Callable[[int], bool]) -> Chosen:
        return lambda case: (
            case.layout == layout
            and case.dtype == "float32"
            and any(_share(case, share) for share in (0.05, 0.10, 0.25))
            and rows(case.rows)
        )

    faster = _over(BOTH, "original", inverse=True)
    goals = [
        judge(
            f"CPU, L = 1236, {name}: original / loss + backward",
            faster,
            limit,
            usual("lvis_v0.5", rows),
            least=True,
        )
        for name, rows, limit in (
            ("R >= 1024", lambda rows: rows >= 1024, 3.0),
            ("R = 512", lambda rows: rows == 512, 2.5),
            ("R = 128", lambda rows: rows == 128, 1.5),
        )
    ]
    goals += [
        judge(
            f"CPU, L = {logits}, R {name}: loss + backward / dense cross-entropy",
            _over(BOTH, "dense"),
            limit,
            usual(layout, rows),
        )
        for layout, logits, name, rows, limit in (
            ("lvis_v0.5", 1236, "= 512", lambda rows: rows == 512, 1.4),
            ("lvis_v0.5", 1236, "= 1024", lambda rows: rows == 1024, 1.0),
            ("lvis_v0.5", 1236, "= 8192", lambda rows: rows == 8192, 0.35),
            ("v3det", 13210, ">= 512", lambda rows: rows >= 512, 0.7),
        )
    ]
    goals += [
        judge(
            "CPU, L = 1236, R = 8192: peak memory / logits",
            lambda result: _count(result, MEMORY),
            1.2,
            usual("lvis_v0.5", lambda rows: rows == 8192),
        ),
        _judge(
            "CPU, scores, R = 1000, L = 1236: the original's merge / ours",
            _over(SCORES, "original", inverse=True),
            2,
            measured.scores,
            lambda case: case.rows == 1000 and case.layout == "lvis_v0.5",
            least=True,
            reason=reason,
        ),
        _detections(measured, reason),
        _reproducible(measured, "cpu", "CPU"),
    ]
    return goals


def _judge(
    what: str,
    value: Value,
    limit: float,
    results: Sequence[Result],
    chosen: Chosen,
    *,
    least: bool = False,
    unit: str = "",
    reason: str = "",
) -> Goal:
    """The worst value of each dtype against a limit that all have to keep."""
    wanted = f"{'>=' if least else '<='} {number(limit)}{unit}"
    if reason:
        return Goal(what, wanted, reason, "not measured")
    found: dict[str, list[tuple[float, Case]]] = {}
    missing = []
    for result in results:
        if chosen(result.case):
            measured = value(result)
            if measured is None:
                missing.append(result.case)
            else:
                found.setdefault(result.case.dtype, []).append((measured, result.case))
    if not found:
        why = "a measurement failed or was skipped" if missing else "no such size in this run"
        return Goal(what, wanted, why, "not measured")
    worst = {
        dtype: (min if least else max)(values, key=lambda pair: pair[0])
        for dtype, values in found.items()
    }
    kept = all(worst[d][0] >= limit if least else worst[d][0] <= limit for d in worst)
    texts = [f"{_unlike(v, limit)}{unit} ({_short(case)})" for v, case in worst.values()]
    sizes = sum(len(values) for values in found.values())
    text = "; ".join(texts) + (f"; worst of {sizes} sizes" if sizes > len(worst) else "")
    if missing:
        text += f"; {len(missing)} sizes not measured"
    return Goal(what, wanted, text, "met" if kept else "missed")


def _unlike(value: float, limit: float) -> str:
    """A number, with more digits where it would look like the limit that it misses or keeps."""
    text = number(value)
    return f"{value:.5g}" if text == number(limit) and value != limit else text


def _short(case: Case) -> str:
    labels = "" if case.foreground is None else f", {case.labels}"
    return f"{case.dtype}, L = {case.logits}, R = {case.rows}{labels}"


def _share(case: Case, share: float) -> bool:
    return not case.all_active and case.foreground is not None and case.foreground == share


def _small(case: Case) -> bool:
    return case.rows <= 1024 and case.logits < NARROW and not case.all_active


def _time(result: Result, kind: str, name: str) -> float | None:
    timing = result.times.get(kind, {}).get(name)
    return None if timing is None else timing.median


def _own(columns: Mapping[str, object]) -> str:
    """The first of our columns: the one that a user gets, unless others were asked for."""
    return next((name for name in columns if name.startswith(OURS)), OURS)


def _ours(result: Result, kind: str) -> float | None:
    return _time(result, kind, _own(result.times.get(kind, {})))


def _count(result: Result, kind: str) -> float | None:
    counts = result.counts.get(kind, {})
    return counts.get(_own(counts))


def _ratio(numerator: float | None, denominator: float | None) -> float | None:
    return None if numerator is None or not denominator else numerator / denominator


def _times_1000(value: float | None) -> float | None:
    return None if value is None else 1000 * value


def _over(kind: str, name: str, *, inverse: bool = False) -> Value:
    """Time of ours over an alternative's, or the other way round."""

    def value(result: Result) -> float | None:
        ours, other = _ours(result, kind), _time(result, kind, name)
        return _ratio(other, ours) if inverse else _ratio(ours, other)

    return value


def _best_dense(result: Result) -> float | None:
    """The fastest dense cross-entropy over ours.

    One that no graph can hold counts with the time that its kernels alone keep the GPU busy, the
    least that it can take.
    """
    cold, busy = result.times.get(COLD, {}), result.times.get(BUSY, {})
    dense = {
        name: cold.get(name, timing).median
        for name, timing in (busy | cold).items()
        if name.startswith("dense")
    }
    return _ratio(min(dense.values(), default=None), _ours(result, COLD))


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
    found = [
        entry
        for entry in measured.detections
        if entry["case"]["kind"] in ("trained", "whole") and entry["case"]["score_threshold"] == 0
    ]
    if reason or not found:
        return Goal(what, wanted, reason or "not in this run", "not measured")
    worst = min(found, key=lambda entry: entry["ratio"])
    same = all(entry["identical"] for entry in measured.detections)
    text = f"{number(worst['ratio'])} ({worst['case']['kind']}), {'' if same else 'NOT '}identical"
    return Goal(what, wanted, text, "met" if same and worst["ratio"] >= 50 else "missed")
