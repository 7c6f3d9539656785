"""The pictures of the commands: counts by category, and weight norms, coloured by group.

matplotlib is loaded by the first call and not by importing this module.
"""

from __future__ import annotations

import warnings
from bisect import bisect_right
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from balanced_group_softmax._files import check_output, written_whole
from balanced_group_softmax.cli_program import one_line

__all__ = ["CountGroup", "NormGroup", "check_picture", "draw_counts", "draw_norms", "save"]

_INK = "#2b2d42"
# From rare to frequent; told apart in grey, where their lightness (CIE L*) is 55, 82, 68 and 32,
# and by colour-blind readers: any two are at least 26 apart (CIE 1976) as Machado simulates them.
_COLOURS = ("#d4621a", "#f2c864", "#6fb3a8", "#2f4b7c")
_NAMES_UP_TO = 80  # categories that fit with their names
_LEGEND_UP_TO = 24  # entries; beyond that it would be larger than the picture
_ROOM_FOR_TEXT = 0.03  # of the width, for a number below or above it
_LETTERS = 100  # of names beside each other across the width
_LARGEST_PLAIN = 10**7  # of the counts on an axis in plain numbers; larger ones are powers of ten


class CountGroup(NamedTuple):
    """A group in the picture of counts: its label, and its categories' names and counts."""

    label: str
    names: Sequence[str]
    counts: Sequence[int]


class NormGroup(NamedTuple):
    """A group in the picture of norms: its label, its categories' norms, and that of `others`."""

    label: str
    norms: np.ndarray
    others: float


def check_outputs(inputs: Sequence[Path], out: Path | None, plot: Path | None) -> None:
    """Check what `--out` and `--plot` name.

    Raises:
        ImportError: there is a picture to draw, and no matplotlib.
        OSError: a folder cannot be written in.
        ValueError: a file cannot be written, would take the place of an input or of the other
            output, or the picture is of no format that matplotlib writes.
    """
    for path in (out, plot):
        if path is not None:
            check_output(path, inputs)
    if plot is not None:
        if out is not None and out.resolve() == plot.resolve():
            raise ValueError(f"{plot}: expected different files for --out and --plot")
        check_picture(plot)


def check_picture(path: Path) -> None:
    """Check that a picture can be drawn, in the format that its name ends with.

    Raises:
        ImportError: matplotlib is missing; the message says what to install.
        ValueError: the suffix is of no format that matplotlib writes.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(
            f"Expected matplotlib to draw {path}, got {error}; `python -m pip install matplotlib` "
            "installs it, and without a picture it is not needed"
        ) from None
    # raw and rgba are not pictures, and pgf needs LaTeX
    formats = Figure().canvas.get_supported_filetypes().keys() - {"pgf", "raw", "rgba"}
    if path.suffix[1:].lower() not in formats:
        raise ValueError(
            f"{path}: expected a picture that ends in one of {', '.join(sorted(formats))}, got "
            f"{path.suffix!r}"
        )


def draw_counts(groups: Sequence[CountGroup], thresholds: Sequence[int], name: str) -> Any:
    """Draw the instances of each category on a log axis, the most frequent category first.

    Args:
        groups: from rare to frequent, none of them empty.
        thresholds: boundaries between groups, in instances.
        name: of the data set.

    Returns:
        A figure of matplotlib.
    """
    from matplotlib.figure import Figure

    number = sum(len(group.counts) for group in groups)
    total = sum(sum(group.counts) for group in groups)
    named = number <= _NAMES_UP_TO
    figure = Figure(figsize=(10, 5.4 if named else 4.8), layout="constrained")
    axes = figure.subplots()
    axes.set_yscale("log")
    floor = 0.5  # a logarithm knows no 0
    highest = max(max(group.counts) for group in groups)
    axes.set_ylim(floor, floor * (max(highest, 4) / floor) ** 1.12)  # room for the sizes
    if highest < _LARGEST_PLAIN:
        axes.yaxis.set_major_formatter(lambda count, _: f"{count:,.0f}")
    start, names, boundaries = 0, [], [0]
    unseen: list[int] = []
    palette = colours(1 + len(thresholds))  # one for each range, whether it has categories or not
    legend: list[Any] = []
    drawn: Any
    for group in reversed(groups):
        colour = palette[bisect_right(thresholds, group.counts[0])]
        order = np.argsort(-np.asarray(group.counts, dtype=np.float64), kind="stable")
        counts = np.asarray(group.counts, dtype=np.float64)[order]
        ranks = start + 1 + np.arange(len(counts))
        share = f", {_share(sum(group.counts), total)} of instances" if total else ""
        label = f"{group.label}: {_categories(len(counts))}{share}"
        if named:
            heights = np.maximum(counts, floor)
            drawn = axes.bar(ranks, heights, 0.8, color=colour, label=label, zorder=2)
        else:
            edges = start + 0.5 + np.arange(len(counts) + 1)
            heights = np.append(counts, counts[-1:])
            drawn = axes.fill_between(
                edges, np.maximum(heights, floor), floor, step="post", color=colour, lw=0,
                label=label, zorder=2,
            )  # fmt: skip
        legend.append(drawn)
        unseen += ranks[counts == 0].tolist()
        names += [group.names[index] for index in order]
        start += len(counts)
        boundaries.append(start)
    if unseen:
        crosses = axes.scatter(
            unseen, [floor * 1.15] * len(unseen), marker="x", s=18 if named else 6, lw=0.8,
            color=_INK, label=f"never seen: {_categories(len(unseen))}", zorder=3, clip_on=False,
        )  # fmt: skip
        legend.append(crosses)
    shown = [threshold for threshold in thresholds if threshold < axes.get_ylim()[1]]
    lines = [
        axes.axhline(threshold, color=_INK, lw=0.7, ls=(0, (4, 3)), alpha=0.6, zorder=1)
        for threshold in shown
    ]
    if lines:
        lines[0].set_label("boundaries between groups")
        legend.append(lines[0])
    _mark_groups(axes, boundaries, named)
    if named:
        size = 9 if number <= 25 else 6.5
        axes.set_xticks(range(1, number + 1), [_plain(name) for name in names], fontsize=size)
        if number > 12 or number * max(len(_plain(name)) for name in names) > _LETTERS:
            axes.tick_params(axis="x", rotation=90)
    axes.set_xlabel("categories, the most frequent first")
    axes.set_ylabel("training instances")
    _finish(axes, columns=2, handles=legend)
    _title(figure, f"{name}: {_categories(number)}, {total:,} training instances")
    return figure


def draw_norms(heads: Sequence[tuple[str, Sequence[NormGroup]]], title: str) -> Any:
    """Draw the weight norm of each category, coloured by group: a panel for each head.

    Groups stand from frequent to rare, and in each the categories from the largest norm to the
    smallest, since a checkpoint does not hold counts.

    Args:
        heads: of each head its name and its groups, from rare to frequent.
        title: of the picture.

    Returns:
        A figure of matplotlib.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 1.4 + 3.0 * len(heads)), layout="constrained")
    panels = figure.subplots(len(heads), squeeze=False)[:, 0]
    for axes, (name, groups) in zip(panels, heads, strict=True):
        start, boundaries = 0, [0]
        number = sum(len(group.norms) for group in groups)
        for group, colour in reversed(list(zip(groups, colours(len(groups)), strict=True))):
            norms = np.sort(group.norms)[::-1]
            if not len(norms):
                continue
            ends = [start + 0.5, start + len(norms) + 0.5]
            axes.scatter(
                start + 1 + np.arange(len(norms)), norms, s=22 if number <= 200 else 5,
                color=colour, label=f"{group.label}: {_categories(len(norms))}", zorder=3,
            )  # fmt: skip
            mean = float(norms.mean())
            axes.plot(ends, [mean, mean], color=colour, lw=1.8, zorder=2)
            axes.plot(ends, [group.others] * 2, color=_INK, lw=1.4, ls=(0, (2, 1.5)), zorder=4)
            start += len(norms)
            boundaries.append(start)
        axes.plot([], [], color="#777777", lw=1.8, label="mean of the group")
        axes.plot([], [], color=_INK, lw=1.4, ls=(0, (2, 1.5)), label="`others` of the group")
        drawn = np.concatenate([*(group.norms for group in groups), [g.others for g in groups]])
        highest = float(np.max(drawn, initial=0.0, where=np.isfinite(drawn)))
        axes.set_ylim(0, 1.16 * highest or 1.0)  # room for the sizes of the groups
        _mark_groups(axes, boundaries, named=False)
        axes.set_ylabel("L2 norm of the weights")
        _finish(axes, columns=3, title=_plain(name, 100) if len(heads) > 1 else None)
    panels[-1].set_xlabel("categories: groups from frequent to rare, in each by norm")
    _title(figure, title)
    return figure


def save(figure: Any, path: Path, dpi: int = 150) -> None:
    """Write a figure in the format of the path's suffix; a file there is replaced in one step.

    Raises:
        OSError: it cannot be written.
        ValueError: the suffix is of no format that matplotlib writes.
    """
    check_picture(path)
    with written_whole(path) as partial, warnings.catch_warnings():
        # Names in scripts that the font lacks are drawn as boxes, which shows by itself.
        warnings.filterwarnings("ignore", message="Glyph")
        figure.savefig(partial, format=path.suffix[1:].lower(), dpi=dpi, facecolor="white")


def colours(number: int) -> list[Any]:
    """Return a colour for each of some groups, from rare to frequent."""
    from matplotlib.colors import LinearSegmentedColormap, to_hex

    if number == 1:
        return [_COLOURS[-1]]
    if number == len(_COLOURS):
        return list(_COLOURS)
    colour_map = LinearSegmentedColormap.from_list("groups", _COLOURS)
    return [to_hex(colour_map(index / (number - 1))) for index in range(number)]


def _mark_groups(axes: Any, boundaries: Sequence[int], named: bool) -> None:
    """Draw where groups end, and write their sizes above them where there is room."""
    number = boundaries[-1]
    axes.set_xlim(0.5, number + 0.5)
    for boundary in boundaries[1:-1]:
        axes.axvline(boundary + 0.5, color=_INK, lw=0.8, alpha=0.5, zorder=1)
    for before, after in pairwise(boundaries):
        if (after - before) / number >= _ROOM_FOR_TEXT:
            axes.text(
                (before + after + 1) / 2, 0.985, str(after - before), color=_INK, fontsize=10,
                ha="center", va="top", transform=axes.get_xaxis_transform(), zorder=5,
                fontweight="bold", bbox={"facecolor": "white", "edgecolor": "none", "pad": 1.5},
            )  # fmt: skip
    if not named:
        ticks = [1]
        for boundary in boundaries[1:]:
            if (boundary - ticks[-1]) / number >= _ROOM_FOR_TEXT:
                ticks.append(boundary)
        axes.set_xticks(ticks, [str(tick) for tick in ticks])


def _finish(
    axes: Any, columns: int, title: str | None = None, handles: list[Any] | None = None
) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.yaxis.grid(True, color=_INK, alpha=0.12, zorder=0)
    axes.set_axisbelow(True)
    axes.tick_params(length=0)
    if handles is None:
        handles, _ = axes.get_legend_handles_labels()
    if len(handles) <= _LEGEND_UP_TO:
        # Above the axes: nothing that is drawn is hidden, however the counts fall.
        axes.legend(
            handles=handles, frameon=False, loc="lower left", bbox_to_anchor=(-0.01, 1.0),
            ncols=columns, fontsize=9, borderaxespad=0.2, title=title, title_fontsize=10,
            alignment="left", scatteryoffsets=[0.5],
        )  # fmt: skip


def _title(figure: Any, text: str) -> None:
    figure.suptitle(_plain(text, 100), color=_INK, fontsize=12, x=0.01, ha="left")


def _categories(number: int) -> str:
    return "1 category" if number == 1 else f"{number} categories"


def _share(part: int, total: int) -> str:
    """A share in percent, short, and never 0% or 100% of what is neither."""
    percent = 100 * part / total
    if part and percent < 0.01:
        return "less than 0.01%"
    if part < total and percent >= 99.5:
        return "more than 99%"
    return f"{percent:.0f}%" if percent >= 10 else f"{percent:.2g}%"


def _plain(text: str, longest: int = 28) -> str:
    """Text that is not read as mathematics, and not longer than there is room for."""
    return one_line(text, longest).replace("$", r"\$")
