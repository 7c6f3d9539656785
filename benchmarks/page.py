"""One page of what a run found: the GPU tests, the goals, every table, what is missing."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from goals import Measurements, all_goals
from judging import Goal
from matrix import unmeasured
from records import Result, markdown_table, number, read_results, result_tables

READING = """\
Times are medians. On the CPU loss and scores run on one thread, detections on all. `wall` is the
clock on the wall around a call, with the host's work and, on a GPU, the wait for it. `graph` is the
time of a step within a CUDA graph of many, without host and launch: `cold` with buffers that rotate
through more than the L2 cache holds, `warm` with one. `live` is the share of the logits in
(row, group) pairs that count in the loss, which decides what can be left out; the dense
alternatives read all. `original` is the loop over groups (the merge of scores) of the method's
first implementation, `loop` one without waits for the host, `dense` plain cross-entropy (softmax)
over the same logits, `copy` a `copy_` of the logits. `loss x 65536` marks rows whose loss is
multiplied before backward, as in training in float16. Ours writes its gradient in the forward pass,
so that a forward pass alone is compared with less work than it does."""


@dataclass
class Part:
    """One run of one program: what it wrote, or why it wrote nothing."""

    command: str
    record: Mapping[str, Any] | None
    problem: str = ""
    """What went wrong."""
    late: str = ""
    """What there was no time for."""


@dataclass
class Outcome:
    """Everything that goes onto the page."""

    machine: str
    device: str
    facts: Mapping[str, str | int]
    command: str
    parts: list[Part]
    tests: str = ""
    """Outcome of the GPU tests; empty where they were not asked for."""
    skipped: dict[str, str] = field(default_factory=dict)
    interrupted: bool = False

    @property
    def name(self) -> str:
        """Of its files; those of an interrupted run replace none of a whole one."""
        return f"{self.machine}-interrupted" if self.interrupted else self.machine


def measurements(outcome: Outcome) -> Measurements:
    """What the parts measured, the same size of several parts put together."""
    found = Measurements(outcome.device)
    for part in outcome.parts:
        if part.record is None:
            continue
        kind = part.record["benchmark"]
        if kind == "detections":
            found.detections += part.record["results"]
            continue
        results = found.loss if kind == "loss" else found.scores
        _merge(results, read_results(part.record["results"]))
        for layout, same in part.record.get("reproducible", {}).items():
            found.reproducible.setdefault(layout, {}).update(same)
    for results in (found.loss, found.scores):
        results.sort(key=lambda r: (r.case.all_active, r.case.foreground or 0, r.case.rows))
    return found


def _merge(results: list[Result], more: Sequence[Result]) -> None:
    """Add results; a size that is there already gains the kinds of time that it lacks."""
    for new in more:
        old = next((result for result in results if result.case == new.case), None)
        if old is None:
            results.append(new)
        else:
            old.times = new.times | old.times
            old.counts = new.counts | old.counts
            old.problems += new.problems


def make_page(outcome: Outcome, found: Measurements, pictures: Mapping[str, str]) -> str:
    """The page as Markdown.

    Args:
        outcome: of the run.
        found: `measurements` of it.
        pictures: the title of each plot, by file name.
    """
    facts = ", ".join(f"{name} {value}" for name, value in outcome.facts.items())
    blocks = [f"# Benchmarks: {outcome.machine}", f"`{outcome.command}`", facts]
    if outcome.interrupted:
        blocks.append("Interrupted: the parts below are those that were done.")
    if outcome.tests:
        blocks += ["## GPU tests", outcome.tests]
    blocks += ["## Goals", goals_table(all_goals(found))]
    faults = _faults(outcome)
    if faults:
        blocks += ["## Faults", _list(faults)]
    late = [f"`{part.command}`: {part.late}" for part in outcome.parts if part.late]
    if late:
        blocks += ["## Out of time", _list(late)]
    blocks += ["## How to read the figures", READING, "## Agreement", _agreement(outcome)]
    blocks += [f"![{title}]({file})" for file, title in pictures.items()]
    if found.loss:
        blocks += ["## Loss and gradient", result_tables(found.loss, relative_to="original")]
    if found.scores:
        blocks += ["## Scores", result_tables(found.scores, relative_to="original")]
    for part in outcome.parts:
        if part.record is not None and part.record["benchmark"] == "detections":
            blocks += ["## Detections", part.record["table"]]
    blocks += ["## Skipped and not measured", _list(_missing(outcome, found)) or "Nothing."]
    commands = "\n".join(part.command for part in outcome.parts)
    blocks += ["## Commands", f"```text\n{commands}\n```"]
    return "\n\n".join(blocks) + "\n"


def goals_table(goals: Sequence[Goal]) -> str:
    rows = [(goal.what, goal.wanted, goal.found, goal.verdict) for goal in goals]
    return markdown_table(("goal", "wanted", "measured", ""), rows)


def _agreement(outcome: Outcome) -> str:
    """How far the alternatives lie from each other where nothing is drawn."""
    worst: dict[tuple[str, str, str, str], float] = {}
    for part in outcome.parts:
        record = part.record or {}
        for layout, found in record.get("agreement", {}).items():
            for name, facts in found.items():
                for what in ("loss", "gradient", "scores"):
                    if what in facts:
                        place = (what, layout, name, facts["with"])
                        worst[place] = max(worst.get(place, 0.0), facts[what])
    if not worst:
        return "Not checked."
    rows = [(*place, number(1e6 * error)) for place, error in worst.items()]
    about = (
        "Largest difference where nothing is drawn at random, in millionths: of the loss relative "
        "to it, of the gradient relative to its largest entry, of scores absolute."
    )
    return about + "\n\n" + markdown_table(("", "layout", "of", "from", "x 1e-6"), rows)


def _faults(outcome: Outcome) -> list[str]:
    faults = [f"`{part.command}`: {part.problem}" for part in outcome.parts if part.problem]
    for part in outcome.parts:
        faults += (part.record or {}).get("faults", [])
    return faults


def _missing(outcome: Outcome, found: Measurements) -> list[str]:
    skipped = dict(outcome.skipped)
    for part in outcome.parts:
        for name, reason in (part.record or {}).get("skipped", {}).items():
            skipped.setdefault(name, reason)
    lines = [f"{name}: {reason}" for name, reason in skipped.items()]
    problems = (f"{r.case}: {text}" for r in (*found.loss, *found.scores) for text in r.problems)
    return lines + list(dict.fromkeys(problems)) + unmeasured(found.loss)


def _list(lines: Sequence[str]) -> str:
    return "\n".join(f"- {line}" for line in lines)
