"""How a run is judged: a rule, the sizes that it is about, and what the worst of them says."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from records import OURS, Case, Result, number

Value = Callable[[Result], float | None]


@dataclass(frozen=True)
class Goal:
    """One line of the table: what is wanted, what was found."""

    what: str
    wanted: str
    found: str
    verdict: str
    """"met", "missed", "incomplete" (kept where it was measured) or "not measured"."""


@dataclass(frozen=True)
class Rule:
    """A limit that every size has to keep."""

    what: str
    value: Value
    limit: float
    chosen: Callable[[Case], bool]
    """Which sizes it is about."""
    needs: frozenset[Case] = frozenset()
    """Sizes without which it is not met, however many others there are."""
    least: bool = False
    """Whether the limit is the least that is wanted, not the most."""
    unit: str = ""
    remark: Callable[[Result], str] = lambda result: ""
    """What else is to be said of the worst size."""

    @property
    def wanted(self) -> str:
        return f"{'>=' if self.least else '<='} {number(self.limit)}{self.unit}"

    def kept_by(self, value: float) -> bool:
        return value >= self.limit if self.least else value <= self.limit

    def judge(self, results: Sequence[Result], reason: str) -> Goal:
        """The worst value of each dtype.

        Args:
            results: of one program.
            reason: why none of them can be judged; empty if they can.
        """
        if reason:
            return Goal(self.what, self.wanted, reason, "not measured")
        judged = [r for r in results if r.case.loss_scale == 1 and self.chosen(r.case)]
        found: dict[str, list[tuple[float, Result]]] = {}
        missing = self.needs | {result.case for result in judged}
        for result in judged:
            value = self.value(result)
            if value is not None:
                missing -= {result.case}
                found.setdefault(result.case.dtype, []).append((value, result))
        if not found:
            why = "a measurement failed or was skipped" if judged else "no such size in this run"
            return Goal(self.what, self.wanted, why, "not measured")
        pick = min if self.least else max
        worst = [pick(values, key=lambda pair: pair[0]) for values in found.values()]
        text = "; ".join(self._text(*pair) for pair in worst)
        sizes = sum(map(len, found.values()))
        text += f"; worst of {sizes} sizes" if sizes > len(worst) else ""
        if missing:
            text += f"; not measured: {_list(missing)}"
        if not all(self.kept_by(value) for value, _ in worst):
            return Goal(self.what, self.wanted, text, "missed")
        return Goal(self.what, self.wanted, text, "incomplete" if missing else "met")

    def _text(self, value: float, result: Result) -> str:
        """A value and its size; more digits where it would look like a limit that it is not."""
        text = number(value)
        if text == number(self.limit) and value != self.limit:
            text = f"{value:.5g}"
        return f"{text}{self.unit} ({_short(result.case)}{self.remark(result)})"


def _short(case: Case) -> str:
    labels = "" if case.foreground is None else f", {case.labels}"
    return f"{case.dtype}, L = {case.logits}, R = {case.rows}{labels}"


def _list(cases: frozenset[Case]) -> str:
    first, *more = sorted(map(_short, cases))
    return f"{first} and {len(more)} more" if more else first


def time_of(result: Result, kind: str, name: str) -> float | None:
    timing = result.times.get(kind, {}).get(name)
    return None if timing is None else timing.median


def our_time(result: Result, kind: str) -> float | None:
    return time_of(result, kind, _own(result.times.get(kind, {})))


def our_count(kind: str) -> Value:
    def value(result: Result) -> float | None:
        counts = result.counts.get(kind, {})
        return counts.get(_own(counts))

    return value


def our_microseconds(kind: str) -> Value:
    def value(result: Result) -> float | None:
        milliseconds = our_time(result, kind)
        return None if milliseconds is None else 1000 * milliseconds

    return value


def ratio(numerator: float | None, denominator: float | None) -> float | None:
    return None if numerator is None or not denominator else numerator / denominator


def ours_over(kind: str, name: str) -> Value:
    """Time of ours over an alternative's."""
    return lambda result: ratio(our_time(result, kind), time_of(result, kind, name))


def over_ours(kind: str, name: str, our_kind: str = "") -> Value:
    """Time of an alternative over ours, which may be of another kind."""
    return lambda result: ratio(time_of(result, kind, name), our_time(result, our_kind or kind))


def _own(columns: Mapping[str, object]) -> str:
    """The first of our columns: the one that a user gets, unless others were asked for."""
    return next((name for name in columns if name.startswith(OURS)), OURS)
