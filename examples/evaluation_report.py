"""Evaluates detections, prints the original's table, and writes the figures."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from annotation_fields import source_name
from detection_results import Detections
from ground_truth import MAX_DETECTIONS, MAX_DETECTIONS_FIXED, GroundTruth, read_ground_truth
from lvis_evaluation import (
    METHODS,
    Groups,
    Metrics,
    check_installed,
    choose_method,
    evaluate,
    read_frequencies,
)
from results_files import check_suffix, read_results
from run_folder import write_json

from balanced_group_softmax import GroupLayout, category_counts
from balanced_group_softmax._files import check_output
from balanced_group_softmax.counts import Source, category_ids

HEADER = (
    "| Type | IoU | Area | MaxDets | CatIds | Result |",
    "| :---: | :---: | :---: | :---: | :---: | :---: |",
)
TOLERANCE = 1e-6  # of a figure between 0 and 1
# Of each figure of LVIS: IoU, area, categories.
ROWS = {
    "AP": ("0.50:0.95", "all", "all"),
    "AP50": ("0.50", "all", "all"),
    "AP75": ("0.75", "all", "all"),
    "APs": ("0.50:0.95", "s", "all"),
    "APm": ("0.50:0.95", "m", "all"),
    "APl": ("0.50:0.95", "l", "all"),
    "APr": ("0.50:0.95", "all", "r"),
    "APc": ("0.50:0.95", "all", "c"),
    "APf": ("0.50:0.95", "all", "f"),
    "AR": ("0.50:0.95", "all", "all"),
    "ARs": ("0.50:0.95", "s", "all"),
    "ARm": ("0.50:0.95", "m", "all"),
    "ARl": ("0.50:0.95", "l", "all"),
}
FIXED_ROWS = {
    "APfixed": ("(AP fixed)", "all"),
    "APfixed_r": ("(AP fixed)", "r"),
    "APfixed_c": ("(AP fixed)", "c"),
    "APfixed_f": ("(AP fixed)", "f"),
    "APpooled": ("(AP pooled)", "all"),
}


class Training(NamedTuple):
    """What evaluation takes from the training annotations."""

    frequencies: dict[int, str]  # by category id
    groups: dict[str, list[int]]  # category ids of each count group


class Disagreement(ValueError):
    """The two methods do not give the same figures."""


def report(
    results: Path | Detections,
    annotations: Source,
    *,
    training: Training | None = None,
    kinds: Sequence[str] = ("bbox",),
    method: str = "fast",
    out: Path | None = None,
    legacy_widths: bool = True,
    progress: bool = True,
) -> dict[str, Metrics]:
    """Evaluate detections, print a table for each kind, and write all figures.

    Args:
        results: A results file, or the detections themselves.
        annotations: Path of an LVIS or COCO file, or its content.
        training: Of the training set, for AP by count group and by its frequencies.
        kinds: "bbox", "segm" or both.
        method: "fast", "official", or "both", which are compared.
        out: A JSON file for the figures.
        legacy_widths: Of a .pkl file: see `results_pickle`.
        progress: Show bars.

    Returns:
        The metrics of each kind, in percent.

    Raises:
        ImportError: What the method needs is not installed.
        OSError: A file cannot be read or written.
        ValueError: Annotations or detections are not valid, or not of the same images and
            categories.
        Disagreement: With "both", figures differ by more than 1e-6.
    """
    if isinstance(results, Path):
        check_file(results)
    if out is not None:
        inputs = (results, annotations)
        check_output(out, [Path(path) for path in inputs if isinstance(path, str | Path)])
    methods = usable_methods(method)
    truth = read_ground_truth(
        annotations,
        masks="segm" in kinds,
        frequencies=None if training is None else training.frequencies,
    )
    groups: Groups = {}
    if training is not None:
        check_categories(truth, training)
        groups = training.groups
    if isinstance(results, Path):
        results = read_results(
            results,
            truth.file_image_ids,
            truth.file_category_ids,
            legacy_widths=legacy_widths,
            progress=progress,
        )
    metrics = {}
    for kind in kinds:
        found = [
            evaluate(truth, results, kind, groups=groups, method=one, progress=progress)
            for one in methods
        ]
        metrics[kind] = found[0]
        print(f"\n{make_table(found[0], kind, list(groups))}", flush=True)
        if len(found) == 2:
            print(f"\n{compare(*found)}", flush=True)
    if out is not None:
        write_json(out, {"method": methods[0], **metrics})
    return metrics


def read_training(annotations: Source) -> Training:
    """Read frequencies and count groups from training annotations.

    Raises:
        OSError: The file cannot be read.
        ValueError: The annotations are not valid.
    """
    ids = category_ids(annotations)
    layout = GroupLayout.from_counts(category_counts(annotations), category_ids=ids)
    named = zip(layout.names, layout.groups, strict=True)
    groups = {name: [ids[i] for i in members] for name, members in named}
    return Training(read_frequencies(annotations), groups)


def make_table(metrics: Metrics, kind: str, group_names: Sequence[str] = ()) -> str:
    """Return the table of the original, and one with what it does not have, as Markdown."""
    lines = [f"{kind}:", "", *HEADER]
    for name, (iou, area, categories) in ROWS.items():
        lines.append(_row(f"({name[:2]})", iou, area, MAX_DETECTIONS, categories, metrics[name]))
    more = [
        _row("(AP)", "0.50:0.95", "all", MAX_DETECTIONS, name, metrics[f"AP_{name}"])
        for name in group_names
    ]
    for name, (title, categories) in FIXED_ROWS.items():
        if name in metrics:
            limit = f"{MAX_DETECTIONS_FIXED} a category"
            more.append(_row(title, "0.50:0.95", "all", limit, categories, metrics[name]))
    if more:
        lines += ["", *HEADER, *more]
    return "\n".join(lines)


def compare(fast: Mapping[str, float | None], official: Mapping[str, float | None]) -> str:
    """Say how far two methods are apart.

    Raises:
        Disagreement: A figure differs by more than 1e-6.
    """
    differences = {}
    for name, value in fast.items():
        other = official[name]
        if (value is None) != (other is None):
            raise Disagreement(
                f"Expected both methods to agree, got {value} against {other} in {name}"
            )
        differences[name] = abs((value or 0) - (other or 0)) / 100
    worst = max(differences, key=lambda name: differences[name])
    if differences[worst] > TOLERANCE:
        raise Disagreement(
            f"Expected both methods to agree to {TOLERANCE:g}, got {fast[worst]} % (fast) against "
            f"{official[worst]} % (official) in {worst}"
        )
    return f"Both methods agree: the largest difference is {differences[worst]:.1e}, in {worst}"


def usable_methods(method: str) -> list[str]:
    """Return the methods to run, which are installed; "fast" may become "official"."""
    if method != "both":
        return [choose_method(method)]
    for one in METHODS:
        check_installed(one)
    return list(METHODS)


def check_categories(truth: GroundTruth, training: Training) -> None:
    ids, trained = set(truth.category_ids.tolist()), set(training.frequencies)
    if ids != trained:
        raise ValueError(
            f"{truth.name}: Expected the category ids of the training annotations; ids only in "
            f"the latter: {sorted(trained - ids)[:5]}, only in the former: "
            f"{sorted(ids - trained)[:5]} (the first five of each)"
        )


def check_file(path: Path) -> None:
    """Check that there is a results file, before annotations take their time to be read."""
    check_suffix(path)
    if not path.is_file():
        found = "a folder" if path.is_dir() else "nothing there"
        raise FileNotFoundError(f"{path}: Expected a file of results, found {found}")


def training_or_none(annotations: Source | None) -> Training | None:
    """Read training annotations where there are some; errors name the file."""
    if annotations is None:
        return None
    try:
        return read_training(annotations)
    except ValueError as error:
        name = source_name(annotations)
        text = str(error)
        raise ValueError(text if text.startswith(name) else f"{name}: {text}") from None


def _row(kind: str, iou: str, area: str, limit: int | str, ids: str, value: float | None) -> str:
    result = "-" if value is None else f"{value:.2f}%"
    return f"| {kind:^6} | {iou:<9} | {area:>6} | {limit} | {ids:>12} | {result} |"
