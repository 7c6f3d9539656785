r"""Compare the methods of long-tailed detection on one data set, each beside an equal control.

    python examples/compare_methods.py --seeds 0 1 2 --output runs/comparison

For each seed one detector is trained with plain softmax; every method starts from it, and those
that train the classifier alone read the same stored features. Each stands beside what plain softmax
makes of as many steps, since a detector that is trained on gets better by itself:

- softmax, continued, for methods that train the classifier,
- x2, that is softmax continued with all layers, for those that train all,
- the softmax detector itself for what does not train, or trains from scratch.

As in the paper, finetune tail takes 10 steps where its control takes 12. Where a recipe has epochs
and no steps, repeat factors lengthen an epoch, and that of finetune tail has few images.

`--methods` takes the names below, and `paper` (the rows of the paper's table), `newer`, `improved`,
`ablations`, `all`. All other options are those of torchvision_lvis_train.py, whose `--help` has
them, such as `--config`, `--annotations` and `--images`; without these the data set of the demo is
drawn anew for each seed:

    python examples/compare_methods.py --methods bags seesaw --output runs/own \
        --config examples/configs/faster_rcnn_r50.toml \
        --annotations train.json --images train/ \
        --val-annotations val.json --val-images val/

The same command goes on where it was stopped; methods and seeds can be added. A method that fails,
such as finetune tail where nothing is rare, is left out of the table, and the status is 2 in the
end.

In the folder: `table.md`, `comparison.png`, `results.json`, and a run folder for each method.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev

import comparison_figure
import distributed
import figures
import torchvision_lvis_train
from lvis_demo_data import write_demo_data
from lvis_evaluation import Metrics
from methods import METHODS
from option_types import whole
from recipe import recipes_of
from run_data import named_files
from run_folder import write_json, write_text
from tqdm import tqdm
from training_arguments import DEMO, check_arguments, options_for, parse_arguments

from balanced_group_softmax.cli_program import FAILED, INTERRUPTED, HelpFormatter, ended, line_of

STATUS = """\
exit status:
  0    done
  2    wrong usage, or an input or output that is not what it should be, or
       methods that failed; standard error says in a line what was wrong
  130  interrupted by Ctrl-C, 143 asked to end by SIGTERM; the same command
       goes on
"""
OURS = (
    "--seed", "--output", "--resume", "--checkpoint", "--stage", "--method", "--cache-features"
)  # fmt: skip
"""Options of the training script that are decided here."""
SHOWN = {
    "AP": "AP",
    "APr": "APr",
    "APc": "APc",
    "APf": "APf",
    "APfixed": "AP fixed",
    "APpooled": "AP pooled",
}


@dataclass(frozen=True)
class Entry:
    """A line of the comparison: a method, perhaps with options of its own."""

    title: str
    method: str
    options: tuple[str, ...] = ()
    control: str = ""
    """The line that it is held against; by default that of its kind."""


def _ablation(text: str, *options: str, control: str = "") -> Entry:
    return Entry(f"BAGS, {text}", "bags", options, control)


LONGER = "softmax_continued_longer"
ABLATIONS = {
    "bags_2_groups": _ablation("2 groups", "--thresholds", "100"),
    "bags_8_groups": _ablation(
        "8 groups", "--thresholds", "5", "10", "50", "100", "500", "1000", "5000"
    ),
    "bags_ratio_0": _ablation("no others", "--others-ratio", "0"),
    "bags_ratio_1": _ablation("ratio 1", "--others-ratio", "1"),
    "bags_ratio_3": _ablation("ratio 3", "--others-ratio", "3"),
    "bags_ratio_all": _ablation("all others", "--others-ratio", "inf"),
    "bags_box_head": _ablation("box head trains", "--train", "box_head", control="x2"),
    "bags_all": _ablation("all layers train", "--train", "all", control="x2"),
    "bags_all_small_rate": _ablation(
        "all layers train, a tenth of the learning rate", "--train", "all", control="x2"
    ),
    "bags_longer": _ablation("20 epochs for 12", control=LONGER),
    "bags_rfs": _ablation("with repeat factors", "--bags.sampler", "repeat_factor"),
    "bags_weighted": _ablation("weights within groups", "--category-weights", "inverse_frequency"),
    LONGER: Entry("softmax, continued, 20 epochs for 12", "softmax_continued"),
}
ENTRIES = {name: Entry(method.title, name) for name, method in METHODS.items()} | ABLATIONS
SETS = {
    "paper": [name for name, method in METHODS.items() if method.row],
    "newer": [name for name, method in METHODS.items() if method.newer],
    "improved": [name for name, method in METHODS.items() if method.discriminant],
    "ablations": list(ABLATIONS),
    "all": list(ENTRIES),
}


def own_options(name: str, shared: Sequence[str]) -> list[str]:
    """Return a line's options; some depend on the recipe that all share."""
    entry = ENTRIES[name]
    options = ["--method", entry.method, *entry.options]
    bags = recipes_of(*options_for(parse_arguments([*shared, "--method", "bags"], None)))["bags"]
    if name == "finetune_tail":  # else an option that all share would have the last word
        own = METHODS[name].options(bags)
        for key in ("learning_rate", "epochs", "steps"):
            if key in own:
                options += [f"--bags.{key.replace('_', '-')}", str(own[key])]
    if name in ("bags_longer", LONGER):
        if bags.steps:
            options += ["--bags.steps", str(round(bags.steps * 20 / 12))]
        else:
            options += ["--bags.epochs", str(bags.epochs * 20 / 12)]
    if name == "bags_all_small_rate":
        options += ["--bags.learning-rate", str(bags.learning_rate / 10)]
    return options


def control_of(name: str, shared: Sequence[str]) -> str:
    """Return the line that a line is held against."""
    entry, method = ENTRIES[name], METHODS[ENTRIES[name].method]
    if entry.control:
        return entry.control
    if method.start == "scratch" or not method.trains:
        return "softmax"
    return "softmax_continued" if trains_classifier(name, shared) else "x2"


def trains_classifier(name: str, shared: Sequence[str]) -> bool:
    """Return whether a line trains from stored features."""
    method = METHODS[ENTRIES[name].method]
    args = parse_arguments([*shared, *own_options(name, shared)], None)
    recipe = recipes_of(*options_for(args))[method.stage]
    return method.start == "softmax" and method.trains and recipe.train == "classifier"


def main(argv: Sequence[str] | None = None) -> int:
    args, shared = parse(argv)
    try:
        check_options(shared)
        names = chosen(args.methods, shared)
        device = distributed.local_device(parse_arguments(shared, None).device)
    except (OSError, ValueError) as error:
        print(f"error: {line_of(error)}", file=sys.stderr)
        return FAILED
    with distributed.process_group(device):
        try:
            distributed.first_does(lambda: open_folder(args.output, shared))
            return compare(args.output, args.seeds, names, shared)
        except KeyboardInterrupt:
            print("\ninterrupted; the same command goes on", file=sys.stderr)
            return INTERRUPTED
        except (OSError, ValueError) as error:
            print(f"error: {line_of(error)}", file=sys.stderr)
            return FAILED
        except distributed.FailedElsewhere:
            return FAILED


def compare(folder: Path, seeds: Sequence[int], names: list[str], shared: list[str]) -> int:
    """Run what has not been run, and write the table after each.

    A method that fails is passed over, unless others start from it, or processes wait for others.
    """
    results: dict[int, dict[str, Metrics]] = {seed: {} for seed in seeds}
    lines = [(seed, name) for seed in seeds for name in names]
    first = distributed.is_first()
    failed: list[str] = []
    for seed, name in tqdm(lines, "Methods", unit="run", disable=not first):
        place = folder / f"seed-{seed}"
        # The last that a run writes.
        if not distributed.from_first((place / name / "run.json").exists()):
            status = run(place, seed, name, shared)
            if status == FAILED and name != "softmax" and distributed.world_size() == 1:
                failed.append(f"{name} (seed {seed})")
                continue
            if status != 0:
                return status
        results[seed][name] = read_metrics(place / name / "metrics.json")
        if first:
            report(folder, results, names, shared)
    if first:
        print(f"\n{(folder / 'table.md').read_text(encoding='utf-8')}\nWritten to {folder}")
    if failed:
        print(f"error: without {', '.join(failed)}, for the reasons above", file=sys.stderr)
    return FAILED if failed else 0


def run(place: Path, seed: int, name: str, shared: list[str]) -> int:
    """Train and evaluate a method as its user would; return the status of the program."""
    arguments = [*shared, *own_options(name, shared), "--seed", str(seed), "--resume"]
    arguments += ["--output", str(place / name)]
    asked = parse_arguments(shared, None)
    if not asked.annotations:
        data = place / "data"
        distributed.first_does(
            lambda: None if data.is_dir() else write_demo_data(data, seed, progress=True)
        )
        for part, prefix in (("train", ""), ("val", "val-")):
            arguments += [f"--{prefix}annotations", str(data / f"{part}.json")]
            arguments += [f"--{prefix}images", str(data / part)]
    if not asked.config:
        arguments += ["--config", str(DEMO)]
    if METHODS[ENTRIES[name].method].start == "softmax":
        arguments += ["--checkpoint", str(place / "softmax" / "softmax.pt")]
    if trains_classifier(name, shared):
        arguments += ["--cache-features", str(place / "features")]
    with output_to(place / f"{name}.log"):
        return torchvision_lvis_train.main(arguments)


@contextlib.contextmanager
def output_to(path: Path) -> Iterator[None]:
    """Let what is printed go to a file; bars and errors are shown all the same."""
    if not distributed.is_first():
        yield
        return
    path.parent.mkdir(exist_ok=True)
    with path.open("w", encoding="utf-8") as file, contextlib.redirect_stdout(file):
        yield


# --- the folder ---------------------------------------------------------------------------------


def open_folder(folder: Path, shared: Sequence[str]) -> None:
    """Make the folder, or check that it is of a comparison with the same options.

    Raises:
        OSError: It cannot be made.
        ValueError: It is of another comparison, or of something else.
    """
    about = folder / "options.json"
    if about.exists():
        try:
            before = json.loads(about.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"{about}: Expected JSON, got {error}") from None
        if before != list(shared):
            raise ValueError(
                f"{folder}: Expected the options that it was begun with, {' '.join(before) or '-'},"
                f" got {' '.join(shared) or 'none'}; give another `--output`"
            )
        return
    if folder.is_dir() and any(folder.iterdir()):
        raise ValueError(f"{folder}: Expected a new folder or a comparison's, got other files")
    folder.mkdir(parents=True, exist_ok=True)
    write_json(about, list(shared))


def read_metrics(path: Path) -> Metrics:
    """Return the figures of the one method of a run."""
    content: dict[str, Metrics] = json.loads(path.read_text(encoding="utf-8"))
    (metrics,) = content.values()
    return metrics


def report(
    folder: Path,
    results: Mapping[int, Mapping[str, Metrics]],
    names: Sequence[str],
    shared: Sequence[str],
) -> None:
    """Write figures, table and picture of what there is."""
    write_json(folder / "results.json", {str(seed): found for seed, found in results.items()})
    controls = {name: control_of(name, shared) for name in names}
    write_text(folder / "table.md", make_table(results, names, controls))
    titles = {name: ENTRIES[name].title for name in names}
    figures.save(comparison_figure.plot(results, titles, controls), folder / "comparison.png")


def make_table(
    results: Mapping[int, Mapping[str, Metrics]],
    names: Sequence[str],
    controls: Mapping[str, str],
) -> str:
    """Return means over seeds, their standard deviations, and what is gained over the control.

    Args:
        results: By seed and line.
        names: The lines.
        controls: The line that each is held against.
    """
    heads = [*SHOWN.values(), "AP - control", "APr - control", "control"]
    lines = [f"| | {' | '.join(heads)} |", "|---|" + "---:|" * (len(heads) - 1) + "---|"]
    for name in names:
        control = controls[name]
        own = [found[name] for found in results.values() if name in found]
        cells = [spread([metrics[key] for metrics in own]) for key in SHOWN]
        cells += [spread(gains(results, name, control, key), "+") for key in ("AP", "APr")]
        cells.append("" if control == name else ENTRIES[control].title)
        lines.append(f"| {ENTRIES[name].title} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def gains(
    results: Mapping[int, Mapping[str, Metrics]], name: str, control: str, key: str
) -> list[float | None]:
    """Return what a line has more than its control, seed by seed."""
    found: list[float | None] = []
    for metrics in results.values():
        if name == control or name not in metrics or control not in metrics:
            continue
        ours, theirs = metrics[name][key], metrics[control][key]
        found.append(None if ours is None or theirs is None else ours - theirs)
    return found


def spread(values: Sequence[float | None], sign: str = "") -> str:
    """Return mean and standard deviation, as far as there are some."""
    known = [value for value in values if value is not None]
    if not known:
        return "-" if values else ""
    text = f"{round(mean(known), 1) + 0.0:{sign}.1f}"  # adding 0.0 makes -0.0 plain 0.0
    return f"{text} ± {stdev(known):.1f}" if len(known) > 1 else text


# --- command line -------------------------------------------------------------------------------


def parse(argv: Sequence[str] | None) -> tuple[argparse.Namespace, list[str]]:
    lines = "\n".join(f"  {name:26}{entry.title}" for name, entry in ENTRIES.items())
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=HelpFormatter,
        usage="%(prog)s --output DIR [--methods NAME ...] [--seeds N ...]\n"
        "           [option of torchvision_lvis_train.py ...]",
        epilog=f"methods:\n{lines}\n\n{STATUS}",
        allow_abbrev=False,
    )
    parser.add_argument(
        "--methods",
        nargs="+",
        default=["paper", "newer", "improved"],
        choices=[*SETS, *ENTRIES],
        metavar="NAME",
        help="methods to compare, by name or set, and what they are held against "
        "(default: paper newer improved)",
    )
    parser.add_argument(
        "--seeds",
        nargs="+",
        type=whole(0),
        default=[0],
        metavar="N",
        help="seeds, with each of which all methods are trained (default: 0)",
    )
    parser.add_argument(
        "--output",
        type=Path,
        required=True,
        metavar="DIR",
        help="folder of the comparison: new, empty, or one to go on with (required)",
    )
    return parser.parse_known_args(argv)


def chosen(names: Sequence[str], shared: Sequence[str]) -> list[str]:
    """Return the lines that are asked for, and those that they are held against, in order."""
    wanted = {name for given in names for name in SETS.get(given, [given])} | {"softmax"}
    wanted |= {control_of(name, shared) for name in wanted}
    return [name for name in ENTRIES if name in wanted]


def check_options(shared: Sequence[str]) -> None:
    """Check the options that go to every training.

    Raises:
        OSError: The configuration cannot be read.
        ValueError: An option is decided here, or they do not go together.
    """
    for option in shared:
        if option.split("=")[0] in OURS:
            raise ValueError(f"Expected no `{option}`, which each method has its own of")
    args = parse_arguments([*shared, "--method", "softmax"], None)
    check_arguments(args)
    named_files(args.annotations, args.images, args.val_annotations, args.val_images)


if __name__ == "__main__":
    sys.exit(ended(main))
