"""The command line: `balanced-group-softmax COMMAND ...`.

Each command is a function of the library with its arguments read from text. What `groups` and
`inspect` say and draw is in `cli_groups`, `cli_inspect` and `cli_figures`, what `--help` says below
the options in `cli_texts`.
"""

import argparse
import sys
import warnings
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from balanced_group_softmax import cli_figures, cli_groups, cli_inspect, cli_texts
from balanced_group_softmax._files import check_folder, check_output
from balanced_group_softmax._version import __version__
from balanced_group_softmax.cli_figures import check_outputs
from balanced_group_softmax.cli_program import (
    FAILED,
    HelpFormatter,
    count_range,
    ended,
    line_of,
    one_line,
    printable,
    say,
)
from balanced_group_softmax.counts import counted_categories
from balanced_group_softmax.layout import GroupLayout
from balanced_group_softmax.legacy.checkpoints import convert_checkpoint
from balanced_group_softmax.legacy.files import FILES, read_original_files, write_original_files
from balanced_group_softmax.legacy.torch_files import load_torch

MAX_PANELS = 12
"""Heads that one picture shows; a cascade has three."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; return its exit status."""
    return ended(lambda: _run(argv))


def _run(argv: Sequence[str] | None) -> int:
    args = _parser().parse_args(argv)
    with warnings.catch_warnings():
        warnings.simplefilter("always", UserWarning)
        warnings.showwarning = lambda message, *_, **__: _warn(str(message))
        try:
            args.run(args)
        except BrokenPipeError:
            raise
        except (ImportError, MemoryError, OSError, TypeError, ValueError) as error:
            say(f"error: {line_of(error)}")
            return FAILED
    return 0


def _warn(text: str) -> None:
    """A warning as one line, as errors are."""
    say(f"warning: {printable(' '.join(text.split()))}")


def _groups(args: argparse.Namespace) -> None:
    check_outputs([args.annotations], args.out, args.plot)
    thresholds = _thresholds(args)
    categories = counted_categories(args.annotations)
    ids = [category.id for category in categories if category.id is not None]
    try:
        layout = GroupLayout.from_counts(
            [category.instances for category in categories],
            thresholds=thresholds,
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
        picture = cli_figures.draw_counts(groups, thresholds, args.annotations.name)
        cli_figures.save(picture, args.plot)
    if args.out is not None:
        layout.save(args.out)
    _say(cli_groups.describe(layout, categories))
    for name in cli_groups.empty_groups(layout, thresholds):
        _warn(f"group {name} ({count_range(name)}) has no categories and is left out")
    if len(layout.groups) == 1:
        _warn(
            f"all {layout.num_categories} categories are in one group, where they compete as in a "
            "plain softmax; other `--thresholds` may divide them"
        )
    _say(f"wrote {path}" for path in (args.out, args.plot) if path is not None)


def _inspect(args: argparse.Namespace) -> None:
    check_outputs([args.checkpoint], None, args.plot)
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


def _thresholds(args: argparse.Namespace) -> tuple[int, ...]:
    """The boundaries that were asked for, checked before files are read."""
    thresholds = tuple(args.thresholds)
    try:
        GroupLayout.from_counts([0], thresholds)
    except ValueError as error:
        raise ValueError(f"--thresholds: {error}") from None
    return thresholds


def _say(lines: Iterable[str]) -> None:
    """Print lines; letters that the output's encoding lacks become question marks."""
    encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
    for line in lines:
        print(line.encode(encoding, "replace").decode(encoding))


def _import_groups(args: argparse.Namespace) -> None:
    check_output(args.out, _files_of(args.folder))
    layout = read_original_files(args.folder).layout
    layout.save(args.out)
    _say([f"{args.out}: {layout}"])


def _export_legacy(args: argparse.Namespace) -> None:
    check_folder(args.out)
    for name in FILES if args.out.is_dir() else ():
        check_output(args.out / name, [args.annotations])
    layout = write_original_files(args.annotations, args.out, thresholds=_thresholds(args))
    _say([f"{args.out}: {len(FILES)} files of {layout}"])


def _convert_checkpoint(args: argparse.Namespace) -> None:
    layout = None
    check_output(args.out, [args.source, *(_files_of(args.groups) if args.groups else [])])
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
    _say([f"{args.out}: {number} entries for {args.to}"])


def _files_of(path: Path) -> list[Path]:
    """A file, or the original's files in a folder."""
    return [path, *(path / name for name in FILES)]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="balanced-group-softmax",
        description="Balanced Group Softmax (BAGS) for long-tailed detection: see how a data set "
        "falls into groups and what a trained detector holds, and convert files of the original "
        "code.",
        epilog=cli_texts.MAIN,
        formatter_class=HelpFormatter,
    )
    parser.add_argument(
        "--version", action="version", version=__version__, help="print the version and exit"
    )
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")

    def command(name: str, run: Any, description: str, more: str) -> Any:
        made = commands.add_parser(
            name,
            help=description[0].lower() + description[1:-1],
            description=description,
            epilog=more,
            formatter_class=HelpFormatter,
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
            help="boundaries between groups, in training instances, ascending; a category with N "
            "instances is in the group above (default: 10 100 1000)",
        )

    add = command(
        "groups",
        _groups,
        "Show how the categories of a data set fall into groups.",
        cli_texts.GROUPS,
    )
    add(
        "annotations",
        type=Path,
        metavar="ANNOTATIONS",
        help="training annotations in LVIS or COCO format, or a JSON list: of categories with `id` "
        "and `instance_count`, or of counts",
    )
    add_thresholds()
    add(
        "--background",
        choices=("first", "last", "none"),
        default="first",
        help="where labels have background, for the layout: first (torchvision), last (mmdet, "
        "detectron2), or none (classification) (default: first)",
    )
    add("--out", type=Path, metavar="JSON", help="write the layout here, for GroupLayout.load")
    add(
        "--plot",
        type=Path,
        metavar="PICTURE",
        help="draw the counts here, as .png, .svg or .pdf; needs matplotlib",
    )

    add = command(
        "inspect",
        _inspect,
        "Show the groups and weight norms of the BAGS heads in a checkpoint.",
        cli_texts.INSPECT,
    )
    add("checkpoint", type=Path, metavar="CHECKPOINT", help="a .pt or .pth file of torch.save")
    add(
        "--plot",
        type=Path,
        metavar="PICTURE",
        help="draw the norms here, as .png, .svg or .pdf; needs matplotlib",
    )

    add = command(
        "import-groups",
        _import_groups,
        "Turn the original's files of groups into the JSON of a layout.",
        cli_texts.IMPORT,
    )
    add(
        "folder",
        type=Path,
        metavar="FOLDER",
        help=f"has {FILES[0]}, and perhaps {FILES[1]}, {FILES[2]} and the others",
    )
    add("--out", type=Path, required=True, metavar="JSON", help="write the layout here (required)")

    add = command(
        "export-legacy",
        _export_legacy,
        "Write the original's seven intermediate files for a training set.",
        cli_texts.EXPORT,
    )
    add(
        "annotations",
        type=Path,
        metavar="ANNOTATIONS",
        help="training annotations in LVIS or COCO format, with images and annotations",
    )
    add(
        "--out",
        type=Path,
        required=True,
        metavar="DIR",
        help="folder for the files, made if it is not there (required)",
    )
    add_thresholds()

    add = command(
        "convert-checkpoint",
        _convert_checkpoint,
        "Convert a checkpoint of the original (mmdetection 1) for mmdet 3 or torchvision.",
        cli_texts.CONVERT,
    )
    add("source", type=Path, metavar="CHECKPOINT", help="a .pth file of the original")
    add(
        "--out",
        type=Path,
        required=True,
        metavar="FILE",
        help="write the converted checkpoint here (required)",
    )
    add(
        "--to",
        choices=("mmdet", "torchvision"),
        required=True,
        help="for mmdet 3, or for torchvision, which has Faster and Mask R-CNN alone (required)",
    )
    add(
        "--groups",
        type=Path,
        metavar="PATH",
        help="of a BAGS checkpoint: the folder of the original's files, or a layout's JSON; a "
        "plain softmax checkpoint needs none",
    )
    add(
        "--num-categories",
        type=int,
        metavar="C",
        help="number of categories, without background; needed for a plain cascade without "
        "masks, whose file may not say it",
    )
    return parser


if __name__ == "__main__":
    sys.exit(main())
