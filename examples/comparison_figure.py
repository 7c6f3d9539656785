"""The picture of a comparison: what each method has, seed by seed, beside its control."""

from __future__ import annotations

from collections.abc import Mapping
from statistics import mean

from figures import COLOURS, INK, tidy
from lvis_evaluation import Metrics
from matplotlib.figure import Figure

PANELS = {"AP": "box AP, all categories (%)", "APr": "box AP, rare categories (%)"}


def plot(
    results: Mapping[int, Mapping[str, Metrics]],
    titles: Mapping[str, str],
    controls: Mapping[str, str],
) -> Figure:
    """Draw a line for each method: a dot for each seed, the mean, and the mean of its control.

    Args:
        results: By seed and method.
        titles: By method, from top to bottom.
        controls: The method that each is held against.
    """
    figure = Figure(figsize=(10, 1.3 + 0.3 * len(titles)), layout="constrained")
    left, right = figure.subplots(1, len(PANELS), sharey=True)
    for axes, (key, label) in zip((left, right), PANELS.items(), strict=True):
        for place, name in enumerate(titles):
            values = _values(results, name, key)
            if not values:
                continue
            colour = COLOURS["bags" if name.startswith("bags") else "softmax_continued"]
            axes.scatter(values, [place] * len(values), s=18, color=colour, alpha=0.45, zorder=3)
            axes.scatter([mean(values)], [place], s=60, color=colour, zorder=4)
            control = _values(results, controls[name], key)
            if control and controls[name] != name:
                at = mean(control)
                axes.plot([at, mean(values)], [place, place], color=colour, lw=1.2, zorder=2)
                axes.plot([at, at], [place - 0.3, place + 0.3], color=INK, lw=1.2, zorder=2)
        axes.set_xlabel(label)
        tidy(axes)
        axes.xaxis.grid(True, color=INK, alpha=0.12, zorder=0)
    left.set_yticks(range(len(titles)), list(titles.values()))
    left.set_ylim(len(titles) - 0.4, -0.6)
    figure.suptitle(
        "small dots: seeds   |   large dots: their mean   |   upright line: mean of the control, "
        "plain softmax",
        fontsize=9,
        color=INK,
    )
    return figure


def _values(results: Mapping[int, Mapping[str, Metrics]], name: str, key: str) -> list[float]:
    found = [metrics[name][key] for metrics in results.values() if name in metrics]
    return [value for value in found if value is not None]
