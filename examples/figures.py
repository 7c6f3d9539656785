"""What is shown of a run: its table, AP per count group, weight norms, detections."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from lvis_evaluation import Metrics
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import MaxNLocator
from run_folder import write
from torch import Tensor
from torchvision.ops import box_iou, nms

LABELS = {
    "softmax": "softmax",
    "softmax_continued": "softmax, continued",
    "bags": "balanced group softmax",
}
COLOURS = {"softmax": "#8d99ae", "softmax_continued": "#5b6b8c", "bags": "#e07a2f"}
INK = "#2b2d42"
PICTURE = 3.3
"""Inches of an image with boxes."""
LABEL_SIZE = 6.5
TABLE = ("AP", "AP50", "AP75", "APs", "APm", "APl", "APr", "APc", "APf", "AR")


def save(figure: Figure, path: Path) -> None:
    write(path, lambda partial: figure.savefig(partial, dpi=130, facecolor="white"))


def make_table(metrics: Mapping[str, Metrics], group_names: Sequence[str]) -> str:
    """Return the methods side by side, as Markdown."""
    keys = [*TABLE, *(f"AP_{name}" for name in group_names)]
    titles = [*TABLE, *(f"AP {count_range(name)}" for name in group_names)]
    lines = [
        "| |" + "|".join(f" {title} " for title in titles) + "|",
        "|---|" + "---:|" * len(keys),
    ]
    for method, values in metrics.items():
        cells = ["-" if values[key] is None else f"{values[key]:.1f}" for key in keys]
        lines.append(f"| {LABELS[method]} |" + "|".join(f" {c} " for c in cells) + "|")
    return "\n".join(lines) + "\n"


def plot_ap_per_group(
    metrics: Mapping[str, Metrics], group_names: Sequence[str], group_sizes: Sequence[int]
) -> Figure:
    """Draw AP of each method over all categories and for each count group, as bars.

    Args:
        metrics: Of each method: `AP`, and `AP_<name>` of each group.
        group_names: Such as "10_100".
        group_sizes: Categories in each group.
    """
    figure = Figure(figsize=(8, 4.2), layout="constrained")
    axes = figure.subplots()
    keys = ["AP", *(f"AP_{name}" for name in group_names)]
    width = 0.8 / len(metrics)
    for i, (method, values) in enumerate(metrics.items()):
        heights = [values[key] or 0.0 for key in keys]
        places = np.arange(len(keys)) + (i - (len(metrics) - 1) / 2) * width
        bars = axes.bar(
            places, heights, width * 0.94, color=COLOURS[method], label=LABELS[method], zorder=2
        )
        texts = ["-" if values[key] is None else f"{values[key]:.1f}" for key in keys]
        axes.bar_label(bars, texts, padding=2, fontsize=8, color=INK)
    ticks = ["all categories"]
    for name, size in zip(group_names, group_sizes, strict=True):
        ticks.append(f"{count_range(name)}\n{size} categories")
    axes.set_xticks(np.arange(len(keys)), ticks)
    axes.set_xlabel("training instances of the category")
    axes.set_ylabel("box AP (%)")
    axes.axvline(0.5, color=INK, linewidth=0.6, alpha=0.4)
    axes.margins(y=0.12)
    tidy(axes)
    axes.legend(frameon=False, ncols=len(metrics), loc="lower center", bbox_to_anchor=(0.5, 1.0))
    return figure


def plot_weight_norms(
    norms: Mapping[str, np.ndarray], counts: Sequence[int], groups: Sequence[Sequence[int]]
) -> Figure:
    """Draw the norm of each category's row in the classifier, the most frequent category first.

    A dot for each category, a line for the mean of each count group. After figure 1 of the paper
    (Li et al., CVPR 2020), where softmax gives frequent categories larger weights.

    Args:
        norms: Of each method, [C].
        counts: Training instances of each category.
        groups: The categories of each group, as positions in `counts`.
    """
    figure = Figure(figsize=(8, 3.8), layout="constrained")
    axes = figure.subplots()
    order = np.argsort(-np.asarray(counts), kind="stable")
    ranks = np.arange(1, len(order) + 1)
    instances = axes.twinx()
    shown = np.maximum(np.asarray(counts)[order], 0.5)  # a logarithm knows no 0
    edges = np.arange(len(order) + 1) + 0.5  # of the steps, each around its dots
    instances.fill_between(
        edges, np.append(shown, shown[-1:]), 0.5, step="post", color="#edf0f5", zorder=0
    )
    instances.set_yscale("log")
    instances.set_ylim(bottom=0.5)
    instances.set_ylabel("training instances (area)")
    if max(counts) < 10**7:
        instances.yaxis.set_major_formatter(lambda count, _: f"{count:,.0f}")
    place = np.empty(len(order))
    place[order] = ranks
    for method, values in norms.items():
        colour = COLOURS[method]
        size = 16 if len(order) <= 200 else 3
        # Told apart by shape as well: in grey the colours are one.
        marker = "o" if method == "bags" else "s"
        axes.scatter(
            place, values, s=size, marker=marker, color=colour, alpha=0.75, label=LABELS[method]
        )
        for members in groups:
            some = list(members)
            if some:
                ends = [float(np.min(place[some])) - 0.4, float(np.max(place[some])) + 0.4]
                mean = float(np.mean(np.asarray(values)[some]))
                axes.plot(ends, [mean, mean], color=colour, linewidth=2.2, solid_capstyle="butt")
    axes.set_zorder(instances.get_zorder() + 1)
    axes.patch.set_visible(False)
    axes.set_xlim(0.5, len(order) + 0.5)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlabel("categories, the most frequent first")
    axes.set_ylabel("L2 norm of the classifier's weights")
    axes.plot([], [], color=INK, linewidth=2.2, label="mean of a count group")
    tidy(axes)
    for side in ("top", "left"):
        instances.spines[side].set_visible(False)
    instances.tick_params(length=0)
    axes.legend(frameon=False, ncols=len(norms) + 1, loc="lower center", bbox_to_anchor=(0.5, 1.0))
    return figure


def plot_detections(
    items: Sequence[tuple[Tensor, Mapping[str, Any]]],
    columns: Mapping[str, Sequence[Mapping[str, Tensor]]],
    names: Sequence[str],
    rare: Sequence[bool],
    *,
    score_threshold: float = 0.2,
) -> Figure:
    """Draw boxes on images: a row for each image, the annotated boxes first, then detections.

    At each place the detection with the highest score is drawn, and the right one (the category of
    an annotated box, IoU at least 0.5) if that is another; right ones have a solid line and their
    label below.

    Args:
        items: Images, float [3, H, W] in [0, 1], with targets, of which `boxes` and `labels`.
        columns: By title, for each image `boxes`, `labels` in 1..C and `scores`.
        names: Of the categories, label 1 first.
        rare: Whether each category is rare; their boxes are orange.
        score_threshold: Detections below it are not drawn.
    """
    heights = [PICTURE * image.shape[1] / image.shape[2] for image, _ in items]
    figure = Figure(
        figsize=(PICTURE * (len(columns) + 1), sum(heights) + 0.5), layout="constrained"
    )
    grid = figure.subplots(len(items), len(columns) + 1, squeeze=False, height_ratios=heights)
    for (image, target), row in zip(items, grid, strict=True):
        for axes in row:
            axes.imshow(image.permute(1, 2, 0).numpy(), interpolation="bilinear")
            axes.set_axis_off()
        for box, label in zip(target["boxes"].tolist(), target["labels"].tolist(), strict=True):
            _draw_box(row[0], box, names[label - 1], rare[label - 1])
    grid[0][0].set_title("annotated", color=INK)
    for column, (title, outputs) in enumerate(columns.items(), start=1):
        grid[0][column].set_title(title, color=INK)
        for row, (_, target), output in zip(grid, items, outputs, strict=True):
            detected = {
                key: value[output["scores"] >= score_threshold] for key, value in output.items()
            }
            overlaps = box_iou(detected["boxes"], target["boxes"]) >= 0.5
            matches = overlaps & (detected["labels"][:, None] == target["labels"])
            right = matches.any(dim=1)
            best = nms(detected["boxes"], detected["scores"], 0.5).tolist()
            # Detections are sorted by score: the first match of each annotated box is its best.
            found = [int(hit.nonzero()[0]) for hit in matches.T if hit.any()]
            for i in sorted({*best, *found}):
                label = int(detected["labels"][i])
                text = f"{names[label - 1]} {detected['scores'][i]:.2f}"
                box = detected["boxes"][i].tolist()
                _draw_box(row[column], box, text, rare[label - 1], bool(right[i]))
    figure.supxlabel(
        "orange: rare category   |   solid: right, dashed: wrong   |   "
        f"scores of at least {score_threshold:g}",
        fontsize=9,
        color=INK,
    )
    return figure


def _draw_box(axes: Axes, box: list[float], text: str, rare: bool, right: bool = True) -> None:
    x1, y1, x2, y2 = box
    left, right_edge = axes.get_xlim()
    bottom = axes.get_ylim()[0]
    # A character is about 0.6 of the font's size wide, and a picture `PICTURE` inches.
    letter = LABEL_SIZE / (72 * PICTURE) * (right_edge - left)
    width = len(text) * 0.6 * letter
    colour = COLOURS["bags"] if rare else "#ffffff"
    axes.add_patch(
        Rectangle(
            (x1 - 0.5, y1 - 0.5),
            x2 - x1,
            y2 - y1,
            fill=False,
            edgecolor=colour,
            linewidth=1.8,
            linestyle="-" if right else (0, (2, 1.5)),
        )
    )
    axes.text(
        max(min(x1, right_edge - width), left),  # inside the picture
        min(y2 + 0.5, bottom - 2 * letter) if right else max(y1 - 1.5, 2 * letter),
        text,
        fontsize=LABEL_SIZE,
        color=INK,
        verticalalignment="top" if right else "bottom",
        clip_on=True,
        bbox={"facecolor": colour, "edgecolor": "none", "alpha": 0.85, "pad": 0.8},
    )


def tidy(axes: Axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.yaxis.grid(True, color=INK, alpha=0.12, zorder=0)
    axes.set_axisbelow(True)
    axes.tick_params(length=0)


def count_range(name: str) -> str:
    """Return "10_100" as "10 to 99"; other names as they are."""
    low, _, high = name.partition("_")
    if not low.isdigit():
        return name
    if high == "inf":
        return f"{low} and more"
    return f"{low} to {int(high) - 1}" if high.isdigit() else name
