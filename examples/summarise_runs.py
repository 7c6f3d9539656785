"""Average runs of `torchvision_lvis_train.py` on the same categories, such as several seeds.

    python examples/summarise_runs.py runs/seed0 runs/seed1 runs/seed2
    python examples/summarise_runs.py runs/* --picture ap_per_group.png

prints two tables: the means over the runs of AP and AR, of all three classifiers, and what Balanced
Group Softmax gains over the two others, in the mean and in each run. The runs are of `--stage
compare`, which is what the training script does if it is not told otherwise.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import mean

import figures
from annotation_fields import is_number
from lvis_evaluation import Metrics

from balanced_group_softmax import GroupLayout
from balanced_group_softmax.cli_figures import check_outputs
from balanced_group_softmax.cli_program import FAILED, HelpFormatter, ended, line_of

STATUS = """\
exit status: 0 if done; 2 with a line on standard error if arguments, runs or the picture are not
what they should be; 130 after Ctrl-C.
"""
GAINS = ("AP", "APr", "APc", "APf")


def read_metrics(path: Path, group_names: Sequence[str]) -> dict[str, Metrics]:
    """Return what is shown of a run's metrics.

    Raises:
        OSError: The file cannot be read.
        ValueError: A metric is missing, or neither a number nor null.
    """
    try:
        data = json.loads(path.read_text("utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: Expected JSON, got {error}") from None
    metrics: dict[str, Metrics] = {}
    for method in figures.LABELS:
        values = data.get(method) if isinstance(data, dict) else None
        if not isinstance(values, dict):
            raise ValueError(f"{path}: Expected metrics of {method!r}, got none")
        metrics[method] = {}
        for key in (*figures.TABLE, *(f"AP_{name}" for name in group_names)):
            value = values.get(key, "nothing")
            if value is not None and not is_number(value):
                raise ValueError(
                    f"{path}: Expected {key!r} of {method!r} to be a number or null, got {value}"
                )
            metrics[method][key] = value
    return metrics


def mean_metrics(runs: Sequence[dict[str, Metrics]]) -> dict[str, Metrics]:
    """Return the mean of each metric over runs; None where a run has none."""
    means: dict[str, Metrics] = {}
    for method, metrics in runs[0].items():
        means[method] = {}
        for key in metrics:
            values = [run[method][key] for run in runs]
            known = [value for value in values if value is not None]
            means[method][key] = mean(known) if len(known) == len(values) else None
    return means


def gains(runs: Sequence[dict[str, Metrics]]) -> str:
    """Return what BAGS gains over the others in each run, as Markdown."""
    lines = ["| gain | mean | each run |", "|---|---:|---|"]
    for other in ("softmax", "softmax_continued"):
        for key in GAINS:
            pairs = [(run["bags"][key], run[other][key]) for run in runs]
            values = [ours - theirs for ours, theirs in pairs if None not in (ours, theirs)]  # type: ignore[operator]
            if values:
                each = ", ".join(f"{value:+.1f}" for value in values)
                title = f"{key} over {figures.LABELS[other]}"
                lines.append(f"| {title} | {mean(values):+.1f} | {each} |")
    return "\n".join(lines) + "\n"


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=STATUS, formatter_class=HelpFormatter
    )
    parser.add_argument(
        "runs",
        nargs="+",
        type=Path,
        metavar="RUN",
        help="run folder; its metrics.json and layout.json are read",
    )
    parser.add_argument(
        "--picture",
        type=Path,
        metavar="PICTURE",
        help="draw the means of AP by count group here, as .png, .svg or .pdf",
    )
    args = parser.parse_args(argv)
    try:
        check_outputs([], None, args.picture)
        layouts = [GroupLayout.load(run / "layout.json") for run in args.runs]
        if len(set(layouts)) > 1:
            raise ValueError("Expected runs with the same layout of groups, got different ones")
        names = layouts[0].names
        runs = [read_metrics(run / "metrics.json", names) for run in args.runs]
        layout, means = layouts[0], mean_metrics(runs)
        if args.picture is not None:
            sizes = [len(members) for members in layout.groups]
            figures.save(figures.plot_ap_per_group(means, layout.names, sizes), args.picture)
    except (OSError, ValueError) as error:
        print(f"error: {line_of(error)}", file=sys.stderr)
        return FAILED
    print(figures.make_table(means, layout.names))
    print(gains(runs))
    return 0


if __name__ == "__main__":
    sys.exit(ended(main))
