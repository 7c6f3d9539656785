"""What the programs measure, as records, tables and files."""

import json
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from timing import Timing

OURS = "bags"
"""How the names of this library's columns begin."""
ALL = "all"
"""As a share of foreground: every row counts in every group."""
ALL_ACTIVE_FOREGROUND = 0.25
"""The share of foreground then."""


@dataclass(frozen=True)
class Case:
    """One size: a matrix of logits and what its labels are like."""

    layout: str
    logits: int
    dtype: str
    rows: int
    foreground: float | None = None
    """Share of rows that are not background; None where labels play no part."""
    all_active: bool = False
    """Whether every row counts in every group."""
    loss_scale: float = 1.0

    @property
    def labels(self) -> str:
        """What the rows are like, and what their loss is multiplied by."""
        if self.foreground is None:
            return "-"
        labels = "all active" if self.all_active else f"{self.foreground:.0%}"
        return labels if self.loss_scale == 1 else f"{labels}, loss x {self.loss_scale:g}"

    def __str__(self) -> str:
        labels = "" if self.foreground is None else f", foreground {self.labels}"
        return f"{self.layout} (L = {self.logits}), {self.dtype}, R = {self.rows}{labels}"


@dataclass
class Result:
    """What was measured at one size."""

    case: Case
    live: float | None = None
    """Share of the matrix that counts in the loss."""
    times: dict[str, dict[str, Timing]] = field(default_factory=dict)
    """Of each kind of measurement, of each alternative."""
    counts: dict[str, dict[str, float]] = field(default_factory=dict)
    """Launches, waits and memory, of each alternative."""
    problems: list[str] = field(default_factory=list)
    """What could not be measured, and why."""

    def progress(self) -> str:
        """One line: the size, and the first kind of time that was measured."""
        medians = [
            f"{name} {number(timing.median)}"
            for name, timing in next(iter(self.times.values()), {}).items()
        ]
        return f"{self.case}: {', '.join(medians) or 'nothing measured,'} ms"

    def count(self, kind: str, name: str, value: float | None) -> None:
        """Keep a count, unless it could not be taken."""
        if value is not None:
            self.counts.setdefault(kind, {})[name] = value

    def attempt(self, what: str, measure: Callable[[], Any]) -> Any:
        """What `measure` returns, or None with a note if it fails: the others still count."""
        try:
            return measure()
        except Exception as error:
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            if (problem := f"{what}: {reason}") not in self.problems:
                self.problems.append(problem)
            return None


def brief(error: BaseException) -> str:
    """The first line of an error, with its type."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


def read_results(entries: Iterable[Mapping[str, Any]]) -> list[Result]:
    """Results from the objects that JSON made of them."""
    results = []
    for entry in entries:
        times = {
            kind: {name: Timing(**timing) for name, timing in timings.items()}
            for kind, timings in entry["times"].items()
        }
        results.append(Result(**{**entry, "case": Case(**entry["case"]), "times": times}))
    return results


def number(value: float | None) -> str:
    """Three significant digits, never with an exponent."""
    if value is None:
        return "-"
    if value == 0 or abs(value) >= 100:
        return f"{value:.0f}"
    digits = 0
    while abs(value) * 10**digits < 100 and digits < 6:
        digits += 1
    return f"{value:.{digits}f}"


def markdown_table(header: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A Markdown table; the first column is aligned left, the others right."""
    ruler = ["---"] + ["---:"] * (len(header) - 1)
    lines = [header, ruler, *rows]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines)


def result_tables(results: Sequence[Result], *, relative_to: str = "") -> str:
    """Tables of all times and counts, with the sizes of one layout and dtype together.

    Args:
        results: of one program.
        relative_to: an alternative; ours is also shown as so many times faster than it.
    """
    blocks = []
    for layout, dtype in dict.fromkeys((r.case.layout, r.case.dtype) for r in results):
        group = [r for r in results if (r.case.layout, r.case.dtype) == (layout, dtype)]
        blocks.append(f"### {layout}, L = {group[0].case.logits}, {dtype}")
        for kind in dict.fromkeys(kind for r in group for kind in r.times):
            blocks += _time_tables(group, kind, relative_to)
        for kind in dict.fromkeys(kind for r in group for kind in r.counts):
            names = _names(r.counts.get(kind, {}) for r in group)
            rows = [
                [*_place(r), *(number(r.counts[kind].get(name)) for name in names)]
                for r in group
                if kind in r.counts
            ]
            blocks += [f"{kind}:", markdown_table([*_place_header(group), *names], rows)]
    return "\n\n".join(blocks)


def _time_tables(group: Sequence[Result], kind: str, relative_to: str) -> list[str]:
    """Medians, then how ours compares with each alternative."""
    names = _names(r.times.get(kind, {}) for r in group)
    own = [name for name in names if name.startswith(OURS)]
    peers = [name for name in names if name not in own]
    absolute, relative = [], []
    for result in group:
        median = {name: timing.median for name, timing in result.times.get(kind, {}).items()}
        if not median:
            continue
        absolute.append([*_place(result), *(number(median.get(name)) for name in names)])
        for name in own:
            if name not in median:
                continue
            cells = [number(_ratio(median[name], median.get(peer))) for peer in peers]
            times = [number(_ratio(median.get(relative_to), median[name]))] if relative_to else []
            relative.append([*_place(result), name, *cells, *times])
    head = _place_header(group)
    blocks = [
        f"{kind}, median milliseconds:",
        markdown_table([*head, *names], absolute),
    ]
    if relative:
        last = [f"x {relative_to}"] if relative_to else []
        blocks += [
            "Time of ours / time of the alternative"
            + (f"; last: how many times faster than `{relative_to}`:" if relative_to else ":"),
            markdown_table([*head, "", *peers, *last], relative),
        ]
    return blocks


def _names(columns: Iterable[Mapping[str, object]]) -> list[str]:
    return list(dict.fromkeys(name for column in columns for name in column))


def _place_header(group: Sequence[Result]) -> list[str]:
    if group[0].case.foreground is None:
        return ["rows"]
    return ["rows", "foreground", "live"]


def _place(result: Result) -> list[str]:
    if result.case.foreground is None:
        return [str(result.case.rows)]
    live = "-" if result.live is None else f"{result.live:.2f}"
    return [str(result.case.rows), result.case.labels, live]


def _ratio(numerator: float | None, denominator: float | None) -> float | None:
    return numerator / denominator if numerator is not None and denominator else None


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file so that another one of its name is replaced whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        partial.write_bytes(content)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def write_json(path: Path, record: Mapping[str, object]) -> None:
    """Write a record as JSON; dataclasses in it become objects."""
    write_bytes(path, (json.dumps(record, indent=1, default=asdict) + "\n").encode())
