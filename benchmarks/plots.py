"""Time over copy time against rows, one line for each alternative."""

from collections.abc import Sequence
from io import BytesIO
from typing import Literal

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from records import OURS, Result

COPY = "copy"
INK = "#2b2d42"
OURS_COLOUR = "#e07a2f"
COLOURS = ("#3a6ea5", "#8d99ae", "#5b8c5a", "#8a5a8c", "#b5a642", "#4a4e69", "#c06c84")


def plot_over_copy(results: Sequence[Result], kind: str, title: str) -> bytes | None:
    """A PNG with a row of panels for each layout and dtype, a panel for each kind of labels.

    Args:
        results: of one program.
        kind: which of their times.
        title: of the figure.

    Returns:
        None if no alternative was measured at more than one size with this kind of time.
    """
    shown = [r for r in results if COPY in r.times.get(kind, {})]
    panels: dict[tuple[str, str], dict[str, list[Result]]] = {}
    for result in sorted(shown, key=lambda r: r.case.rows):
        of_labels = panels.setdefault((result.case.layout, result.case.dtype), {})
        of_labels.setdefault(result.case.labels, []).append(result)
    lines = {
        place: {labels: found for labels, found in of_labels.items() if len(found) > 1}
        for place, of_labels in panels.items()
    }
    lines = {place: of_labels for place, of_labels in lines.items() if of_labels}
    if not lines:
        return None
    names = list(dict.fromkeys(name for r in shown for name in r.times[kind] if name != COPY))
    width = max(len(of_labels) for of_labels in lines.values())
    figure = Figure(figsize=(1.6 + 3.1 * width, 1.3 + 2.9 * len(lines)), layout="constrained")
    axes = figure.subplots(len(lines), width, squeeze=False)
    for row, ((layout, dtype), of_labels) in zip(axes, lines.items(), strict=True):
        for panel in row[len(of_labels) :]:
            panel.set_visible(False)
        for panel, (labels, found) in zip(row, of_labels.items(), strict=False):
            _draw(panel, found, kind, names)
            about = f", {labels}" if found[0].case.foreground is not None else ""
            panel.set_title(f"{layout}, {dtype}{about}", fontsize=9, color=INK)
        row[0].set_ylabel("time / time of a copy", color=INK)
    handles = [
        Line2D(
            [],
            [],
            color=_colour(name, names),
            linestyle=_style(name, names),
            marker="o",
            markersize=4,
            label=name,
        )
        for name in names
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=min(4, len(names)))
    figure.suptitle(f"{title} ({kind})", color=INK)
    png = BytesIO()
    figure.savefig(png, format="png", dpi=130, facecolor="white")
    return png.getvalue()


def _draw(panel: Axes, found: Sequence[Result], kind: str, names: Sequence[str]) -> None:
    rows = [result.case.rows for result in found]
    for name in names:
        points = [
            (result.case.rows, result.times[kind][name].median / result.times[kind][COPY].median)
            for result in found
            if name in result.times[kind]
        ]
        if points:
            panel.plot(
                *zip(*points, strict=True),
                color=_colour(name, names),
                linestyle=_style(name, names),
                linewidth=2.2 if name.startswith(OURS) else 1.2,
                marker="o",
                markersize=4,
            )
    panel.axhline(1, color=INK, linewidth=0.8, linestyle=":")
    panel.set_xscale("log", base=2)
    panel.set_yscale("log")
    ticks = [str(r.case.rows) if r.live is None else f"{r.case.rows}\n{r.live:.2f}" for r in found]
    panel.set_xticks(rows, ticks, fontsize=8)
    panel.tick_params(axis="x", which="minor", bottom=False, labelbottom=False)
    below = "" if found[0].live is None else ", live fraction of the logits below"
    panel.set_xlabel(f"rows{below}", fontsize=8, color=INK)
    panel.grid(alpha=0.3)


def _colour(name: str, names: Sequence[str]) -> str:
    if name.startswith(OURS):
        return OURS_COLOUR
    peers = [other for other in names if not other.startswith(OURS)]
    return COLOURS[peers.index(name) % len(COLOURS)]


def _style(name: str, names: Sequence[str]) -> Literal["-", "--"]:
    """Dashes for a second implementation of ours, which has the colour of the first."""
    ours = [other for other in names if other.startswith(OURS)]
    return "--" if name in ours[1:] else "-"
