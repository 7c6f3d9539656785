"""The command line: `balanced-group-softmax COMMAND ...`.

Each command is a function of the library with its arguments read from text. Exit status 0, or 2
with one line on standard error. What `groups` and `inspect` say and draw is in `cli_groups`,
`cli_inspect` and `cli_figures`.
"""

import argparse
import sys
import warnings
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from balanced_group_softmax import cli_figures, cli_groups, cli_inspect
from balanced_group_softmax._version import __version__
from balanced_group_softmax.cli_tables import count_range, one_line
from balanced_group_softmax.counts import counted_categories
from balanced_group_softmax.layout import GroupLayout
from balanced_group_softmax.legacy.checkpoints import convert_checkpoint
from balanced_group_softmax.legacy.files import FILES, read_original_files, write_original_files
from balanced_group_softmax.legacy.torch_files import load_torch

MAX_PANELS = 12
"""Heads that one picture shows; a cascade has three."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; return its exit status."""
    args = _parser().parse_args(argv)
    with warnings.catch_warnings():
        warnings.simplefilter("always", UserWarning)
        warnings.showwarning = lambda message, *_, **__: _warn(str(message))
        try:
            args.run(args)
        except (ImportError, OSError, TypeError, ValueError) as error:
            print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
            return 2
    return 0


def _warn(text: str) -> None:
    """A warning as one line, as errors are."""
    print(f"warning: {' '.join(text.split())}", file=sys.stderr)


def _groups(args: argparse.Namespace) -> None:
    _check_outputs(args.annotations, args.out, args.plot)
    categories = counted_categories(args.annotations)
    ids = [category.id for category in categories if category.id is not None]
    try:
        layout = GroupLayout.from_counts(
            [category.instances for category in categories],
            thresholds=tuple(args.thresholds),
            background=None if args.background == "none" else args.background,
            category_ids=ids or None,
        )
    except (TypeError, ValueError) as error:
        raise ValueError(f"{args.annotations}: {error}") from None
    if args.plot is not None:
        groups = [
            cli_figures.CountGroup(
                count_range(name),
                [cli_groups.title(categories[index], index) for index in group],
                [categories[index].instances for index in group],
            )
            for name, group in zip(layout.names, layout.groups, strict=True)
        ]
        title = f"{args.annotations.name}: {layout.num_categories} categories"
        cli_figures.save(cli_figures.draw_counts(groups, args.thresholds, title), args.plot)
    if args.out is not None:
        layout.save(args.out)
    _say(cli_groups.describe(layout, categories))
    for name in cli_groups.empty_groups(layout, args.thresholds):
        _warn(f"group {name} ({count_range(name)}) has no categories and is left out")
    if len(layout.groups) == 1:
        _warn(
            f"all {layout.num_categories} categories are in one group, where they compete as in a "
            "plain softmax; other `--thresholds` may divide them"
        )
    _say(f"wrote {path}" for path in (args.out, args.plot) if path is not None)


def _inspect(args: argparse.Namespace) -> None:
    _check_outputs(args.checkpoint, args.plot, args.plot)
    content = load_torch(args.checkpoint, skip_records=True)
    if not isinstance(content, Mapping):
        raise ValueError(
            f"{args.checkpoint}: expected a dict of weights, got {type(content).__name__}"
        )
    try:
        heads = cli_inspect.find_heads(content)
    except ValueError as error:
        raise ValueError(f"{args.checkpoint}: {error}") from None
    if not heads:
        plain = cli_inspect.find_plain(content)
        if not plain:
            raise ValueError(
                f"{args.checkpoint}: expected a classifier, found neither a BAGSHead nor a layer "
                f"named like a classifier among {len(content)} entries "
                f"({', '.join(one_line(str(key)) for key in list(content)[:3]) or 'none'}...)"
            )
        _say(cli_inspect.describe_plain(plain))
        if args.plot is not None:
            raise ValueError(f"{args.checkpoint}: expected a BAGSHead for --plot, found no layout")
        return
    drawn = [
        (
            head.title,
            [
                cli_figures.NormGroup(
                    count_range(name), head.category_norms(index).numpy(), head.others_norm(index)
                )
                for index, name in enumerate(head.layout.names)
            ],
        )
        for head in heads
        if head.norms is not None
    ]
    if args.plot is not None:
        if not drawn:
            raise ValueError(f"{args.checkpoint}: expected weights for --plot, found layouts alone")
        if len(drawn) > MAX_PANELS:
            raise ValueError(
                f"{args.checkpoint}: expected at most {MAX_PANELS} heads for --plot, found "
                f"{len(drawn)}"
            )
        title = (
            f"{args.checkpoint.name}, {drawn[0][0]}" if len(drawn) == 1 else args.checkpoint.name
        )
        cli_figures.save(cli_figures.draw_norms(drawn, title), args.plot)
    for index, head in enumerate(heads):
        _say([""] * (index > 0) + cli_inspect.describe_head(head))
    _say(f"wrote {path}" for path in [args.plot] if path is not None)


def _check_outputs(source: Path, out: Path | None, plot: Path | None) -> None:
    """Refuse what cannot be written before the work that may take minutes."""
    for path in (out, plot):
        if path is None:
            continue
        if not path.parent.is_dir():
            raise ValueError(f"{path}: expected a folder to write in, found no {path.parent}")
        if path.is_dir():
            raise ValueError(f"{path}: expected a file to write, got a folder")
        if path.exists() and source.exists() and path.samefile(source):
            raise ValueError(f"{path}: expected another file than the one that is read")
    if plot is not None:
        if out is not None and out is not plot and out.absolute() == plot.absolute():
            raise ValueError(f"{plot}: expected different files for --out and --plot")
        cli_figures.require_matplotlib()


def _say(lines: Iterable[str]) -> None:
    """Print lines; letters that the output's encoding lacks become question marks."""
    encoding = sys.stdout.encoding or "utf-8"
    for line in lines:
        print(line.encode(encoding, "replace").decode(encoding))


def _import_groups(args: argparse.Namespace) -> None:
    layout = read_original_files(args.folder).layout
    layout.save(args.out)
    print(f"{args.out}: {layout}")


def _export_legacy(args: argparse.Namespace) -> None:
    layout = write_original_files(args.annotations, args.out, thresholds=tuple(args.thresholds))
    print(f"{args.out}: {len(FILES)} files of {layout}")


def _convert_checkpoint(args: argparse.Namespace) -> None:
    layout = None
    if args.groups is not None:
        is_folder = args.groups.is_dir()
        layout = (
            read_original_files(args.groups).layout if is_folder else GroupLayout.load(args.groups)
        )
    number = convert_checkpoint(
        args.source,
        args.out,
        target=args.to,
        layout=layout,
        num_categories=args.num_categories,
    )
    print(f"{args.out}: {number} entries for {args.to}")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="balanced-group-softmax",
        description="Balanced Group Softmax: groups of a data set, what a checkpoint holds, and "
        "files of the original code.",
        epilog=_HELP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")

    def command(name: str, run: Any, description: str, more: str) -> Any:
        made = commands.add_parser(
            name,
            help=description,
            description=description,
            epilog=more,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        made.set_defaults(run=run)
        return made.add_argument

    def add_thresholds() -> None:
        add(
            "--thresholds",
            type=int,
            nargs="+",
            default=[10, 100, 1000],
            metavar="N",
            help="boundaries between groups, in instances, ascending (default: 10 100 1000)",
        )

    add = command(
        "groups", _groups, "Show how a data set's categories fall into groups.", _GROUPS_HELP
    )
    add(
        "annotations",
        type=Path,
        metavar="ANNOTATIONS",
        help="LVIS or COCO annotations of the training set, or a JSON list of counts",
    )
    add_thresholds()
    add(
        "--background",
        choices=("first", "last", "none"),
        default="first",
        help="where labels have background: first (torchvision), last (mmdet, detectron2), or none "
        "(classification); default: first",
    )
    add("--out", type=Path, metavar="JSON", help="write the layout, for GroupLayout.load")
    add("--plot", type=Path, metavar="PICTURE", help="draw the counts; .png, .svg or .pdf")

    add = command(
        "inspect",
        _inspect,
        "Show the groups and weight norms of the BAGS heads in a checkpoint. Nothing in it is run.",
        _INSPECT_HELP,
    )
    add("checkpoint", type=Path, metavar="CHECKPOINT", help="a .pt or .pth file of torch.save")
    add("--plot", type=Path, metavar="PICTURE", help="draw the norms; .png, .svg or .pdf")

    add = command(
        "import-groups",
        _import_groups,
        "Turn the original's files of groups into a layout's JSON.",
        _IMPORT_HELP,
    )
    add("folder", type=Path, metavar="FOLDER", help=f"holds {FILES[0]}, perhaps the other files")
    add("--out", type=Path, required=True, metavar="JSON", help="the layout")

    add = command(
        "export-legacy",
        _export_legacy,
        "Write the original's seven intermediate files for a training set.",
        _EXPORT_HELP,
    )
    add("annotations", type=Path, metavar="ANNOTATIONS", help="LVIS or COCO annotations, ids 1..C")
    add("--out", type=Path, required=True, metavar="DIR", help="folder; made if it is not there")
    add_thresholds()

    add = command(
        "convert-checkpoint",
        _convert_checkpoint,
        "Convert a checkpoint of the original (mmdetection 1). Nothing in it is run.",
        _CONVERT_HELP,
    )
    add("source", type=Path, metavar="CHECKPOINT", help="a .pth file of the original")
    add("--out", type=Path, required=True, metavar="FILE", help="the converted checkpoint")
    add("--to", choices=("mmdet", "torchvision"), required=True, help="mmdet 3 or torchvision")
    add(
        "--groups",
        type=Path,
        metavar="PATH",
        help="of a BAGS checkpoint: folder of the original's files, or a layout's JSON",
    )
    add(
        "--num-categories",
        type=int,
        metavar="C",
        help="of a plain cascade without masks, whose file does not name its categories",
    )
    return parser


_HELP = """\
a first look at your own data, and at a trained detector:
  balanced-group-softmax groups train.json --plot groups.png --out layout.json
  balanced-group-softmax inspect bags.pth --plot norms.png

COMMAND --help has examples and says what the output means. The exit status is 0, or 2 with one line
on standard error if an input is not what it should be; no output is then left half written.
"""

_GROUPS_HELP = """\
examples:
  balanced-group-softmax groups lvis_v1_train.json
  balanced-group-softmax groups train.json --thresholds 5 50 500 --plot groups.png
  balanced-group-softmax groups train.json --background last --out layout.json

A category's group is given by its training instances: `instance_count` where the file states it
(LVIS), or else its annotations that are not `iscrowd`. A category that was never seen is in the
lowest group; a group without categories is left out, with a warning.

output, a line for each group:
  group       its name, LOW_HIGH: at least LOW instances, fewer than HIGH; bg_fg tells background
              from foreground
  columns     of the classifier: one for each category, and one for `others`
  instances   of all its categories in training, and their share of all instances
  fewest      the category with the fewest instances, and with the most
The row `all` has the width of the classifier under `columns`. In the picture a bar or step is a
category, and dashed lines are the thresholds.
"""

_INSPECT_HELP = """\
examples:
  balanced-group-softmax inspect bags.pth
  balanced-group-softmax inspect epoch_12.pth --plot norms.png

Every BAGSHead is found, wherever it is: in a bare state dict, under `model` or `state_dict`, and in
each stage of a cascade; checkpoints of torchvision, mmdet 3, detectron2 and the examples.

output, for each head its place and a line for each group:
  columns     of the classifier: one for each category, and one for `others`
  mean, min, max
              of the L2 norms of the categories' rows of weights
  others      the norm of the row of `others`
In figure 1 of the paper a plain softmax has larger norms for frequent categories, which is what the
groups are there to even out. In the picture a dot is a category, a line the mean of its group, and
a dashed line its `others`. For a checkpoint without a layout, what may be its classifier is named.
"""

_IMPORT_HELP = """\
example:
  balanced-group-softmax import-groups data/lvis --out layout.json

output: the layout that was written, with how many categories are in each group.
"""

_EXPORT_HELP = """\
example:
  balanced-group-softmax export-legacy lvis_v0.5_train.json --out data/lvis

output: the folder, and the groups that its files describe.
"""

_CONVERT_HELP = """\
examples:
  balanced-group-softmax convert-checkpoint faster_rcnn.pth --out softmax.pth --to torchvision
  balanced-group-softmax convert-checkpoint gs_faster_rcnn.pth --out bags.pth --to mmdet \\
      --groups data/lvis

output: the file, and how many entries it has; `inspect` shows what they are.
"""


if __name__ == "__main__":
    sys.exit(main())
