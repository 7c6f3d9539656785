"""Draw the method on one picture, with the groups of LVIS v1: docs/images/layout.png.

python docs/tools/draw_layout.py
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, Rectangle

from balanced_group_softmax import GroupLayout
from balanced_group_softmax.cli_figures import check_outputs, colours, save
from balanced_group_softmax.cli_program import FAILED, HelpFormatter, ended, line_of

STATUS = "exit status: 0 if done; 2 if it cannot be drawn there; 130 after Ctrl-C."
OUT = Path(__file__).parents[1] / "images" / "layout.png"
# How many categories of LVIS v1 have fewer than 10, 100, 1000 training instances, and more.
SIZES = {5: 200, 50: 412, 500: 334, 5000: 257}
COLOURS = ("#5b6b8c", *colours(4))  # of the groups, as `balanced-group-softmax groups` has them
OTHERS_WIDTH = 6.5
OTHERS, INK, FAINT = "#d9dce3", "#2b2d42", "#5f6b80"
TITLES = {
    "bg_fg": "background or\nforeground",
    "0_10": "0 to 9\ninstances",
    "10_100": "10 to 99",
    "100_1000": "100 to 999",
    "1000_inf": "1000 and\nmore",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Draw and save the picture; return the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=STATUS, formatter_class=HelpFormatter
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=OUT,
        metavar="PICTURE",
        help="draw it here (default: docs/images/layout.png)",
    )
    out = parser.parse_args(argv).out
    try:
        check_outputs([], None, out)
        save(draw(), out, dpi=110)
    except (OSError, ValueError) as error:
        print(f"error: {line_of(error)}", file=sys.stderr)
        return FAILED
    print(f"wrote {out}")
    return 0


def draw() -> Figure:
    """Draw the picture."""
    counts = [count for count, size in SIZES.items() for _ in range(size)]
    layout = GroupLayout.from_counts(counts)
    figure = Figure(figsize=(11, 7.6), layout="constrained")
    top, middle, bottom = figure.subplots(3, 1, height_ratios=(3.7, 4.8, 4.3))
    spans = draw_columns(top, layout)
    draw_labels(middle, layout, spans)
    draw_scores(bottom, layout, spans)
    return figure


def prepare(axes: Axes, title: str, height: float) -> None:
    """Set up axes without frame; the coordinates are those of the picture."""
    axes.set(xlim=(-20, 117), ylim=(0, height))
    axes.axis("off")
    axes.set_title(title, loc="left", fontsize=11, fontweight="bold", color=INK)


def cell(axes: Axes, x: float, y: float, width: float, colour: str, text: str) -> None:
    """Draw a box with text in it."""
    axes.add_patch(Rectangle((x, y), width, 1, facecolor=colour, edgecolor="white", lw=1.5))
    is_light = colour in (OTHERS, COLOURS[2], COLOURS[3])
    axes.text(
        x + width / 2,
        y + 0.48,
        text,
        ha="center",
        va="center",
        fontsize=8.5,
        color=INK if is_light else "white",
    )


def draw_columns(axes: Axes, layout: GroupLayout) -> list[tuple[float, float]]:
    """Draw the logit columns; return where each group is, left and right."""
    prepare(
        axes, f"1. A row of logits: {layout.num_logits} columns in {layout.num_groups} groups", 3.7
    )
    spans = []
    x = 0.0
    for group, (name, size, start) in enumerate(
        zip(layout.group_names, layout.group_sizes, layout.group_starts, strict=True)
    ):
        if group == 0:
            width = 20.0
            cell(axes, x, 1.4, width / 2, OTHERS, "background")
            cell(axes, x + width / 2, 1.4, width / 2, COLOURS[0], "foreground")
        else:
            width = 17 + size / 60
            cell(axes, x, 1.4, OTHERS_WIDTH, OTHERS, "others")
            cell(
                axes,
                x + OTHERS_WIDTH,
                1.4,
                width - OTHERS_WIDTH,
                COLOURS[group],
                f"{size - 1} categories",
            )
        centre = x + width / 2
        axes.text(centre, 2.65, TITLES[name], ha="center", va="bottom", fontsize=9.5, color=INK)
        axes.text(
            centre,
            0.95,
            f"columns {start} to {start + size - 1}",
            ha="center",
            va="center",
            fontsize=8,
            color=FAINT,
        )
        spans.append((x, x + width))
        x += width + 2.2
    axes.text(-1, 1.9, "logits", ha="right", va="center", fontsize=9.5, color=INK)
    axes.text(
        spans[0][0],
        0.25,
        "Each group has a softmax of its own over its columns, those of others included.",
        fontsize=9,
        color=INK,
        va="center",
    )
    return spans


def draw_labels(axes: Axes, layout: GroupLayout, spans: list[tuple[float, float]]) -> None:
    """Draw what each group's softmax is asked to give, for three labels."""
    prepare(axes, "2. Training: a label becomes one label for each group", 4.8)
    rare, frequent = 1 + layout.groups[0][16], 1 + layout.groups[-1][99]
    examples = [
        ("background", 0),
        ("17th category\nof the rarest", rare),
        ("100th category\nof the most frequent", frequent),
    ]
    table = layout.bin_labels
    for row, (title, label) in enumerate(examples):
        y = 3.6 - 1.35 * row
        axes.text(-1, y + 0.5, title, ha="right", va="center", fontsize=9, color=INK)
        for group, (left, right) in enumerate(spans):
            value = int(table[group, label])
            if group == 0:
                text = "1: foreground" if value else "0: background"
            else:
                text = f"{value}: the category" if value else "0: others"
            cell(axes, left, y, right - left, COLOURS[group] if value else OTHERS, text)
    axes.text(
        spans[0][0],
        0.3,
        "Group 0 counts every row. Another group counts its own rows and at most 8 times as many "
        "of the others, drawn anew in each step.",
        fontsize=9,
        color=INK,
        va="center",
    )


def draw_scores(axes: Axes, layout: GroupLayout, spans: list[tuple[float, float]]) -> None:
    """Draw how the softmax of a group and that of group 0 give the scores."""
    prepare(axes, "3. Test: the groups are put together", 4.3)
    axes.text(-1, 3.5, "probabilities", ha="right", va="center", fontsize=9.5, color=INK)
    axes.text(-1, 0.9, "scores", ha="right", va="center", fontsize=9.5, color=INK)
    for group, (left, right) in enumerate(spans):
        if group == 0:
            half = (right - left) / 2
            cell(axes, left, 3, half, OTHERS, "p₀(bg)")
            cell(axes, left + half, 3, half, COLOURS[0], "p₀(fg)")
            cell(axes, left, 0.4, half, OTHERS, "p₀(bg)")
            arrow(axes, (left + half / 2, 3), (left + half / 2, 1.4), FAINT)
            continue
        cell(axes, left, 3, OTHERS_WIDTH, OTHERS, "others")
        axes.text(
            left + OTHERS_WIDTH / 2,
            2.65,
            "dropped",
            ha="center",
            va="center",
            fontsize=8,
            color=FAINT,
        )
        cell(
            axes,
            left + OTHERS_WIDTH,
            3,
            right - left - OTHERS_WIDTH,
            COLOURS[group],
            f"p{'₀₁₂₃₄'[group]}(c)",
        )
        cell(
            axes,
            left + 3,
            0.4,
            right - left - 3,
            COLOURS[group],
            f"p{'₀₁₂₃₄'[group]}(c) · p₀(fg)",
        )
        centre = (left + OTHERS_WIDTH + right) / 2
        arrow(axes, (centre, 3), (centre, 1.4), COLOURS[group])
    first, last = spans[0], spans[-1]
    foreground = first[0] + 0.75 * (first[1] - first[0])
    axes.plot([foreground, foreground], [3, 2.1], color=COLOURS[0], lw=1.3)
    axes.plot(
        [foreground, (last[0] + OTHERS_WIDTH + last[1]) / 2],
        [2.1, 2.1],
        color=COLOURS[0],
        lw=1.3,
        zorder=0,
    )
    for left, right in spans[1:]:
        axes.text(
            (left + OTHERS_WIDTH + right) / 2 - 1.4,
            1.72,
            "\u00d7",
            ha="center",
            va="center",
            fontsize=11,
            color=COLOURS[0],
        )


def arrow(axes: Axes, start: tuple[float, float], end: tuple[float, float], colour: str) -> None:
    """Draw an arrow."""
    axes.add_patch(
        FancyArrowPatch(start, end, arrowstyle="-|>", mutation_scale=11, color=colour, lw=1.3)
    )


if __name__ == "__main__":
    sys.exit(ended(main))
