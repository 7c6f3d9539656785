"""The command line: `balanced-group-softmax COMMAND ...`.

Each command is a function of the library with its arguments read from text. Exit status 0, or 2
with one line on standard error.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from balanced_group_softmax._version import __version__
from balanced_group_softmax.layout import GroupLayout
from balanced_group_softmax.legacy.checkpoints import convert_checkpoint
from balanced_group_softmax.legacy.files import FILES, read_original_files, write_original_files


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; return its exit status."""
    args = _parser().parse_args(argv)
    try:
        args.run(args)
    except (OSError, TypeError, ValueError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    return 0


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
        description="Balanced Group Softmax: groups, and files of the original code.",
    )
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")

    def command(name: str, run: Any, description: str) -> Any:
        made = commands.add_parser(name, help=description, description=description)
        made.set_defaults(run=run)
        return made.add_argument

    add = command(
        "import-groups",
        _import_groups,
        "Turn the original's files of groups into a layout's JSON.",
    )
    add("folder", type=Path, metavar="FOLDER", help=f"holds {FILES[0]}, perhaps the other files")
    add("--out", type=Path, required=True, metavar="JSON", help="the layout")

    add = command(
        "export-legacy",
        _export_legacy,
        "Write the original's seven intermediate files for a training set.",
    )
    add("annotations", type=Path, metavar="ANNOTATIONS", help="LVIS or COCO annotations, ids 1..C")
    add("--out", type=Path, required=True, metavar="DIR", help="folder; made if it is not there")
    add(
        "--thresholds",
        type=int,
        nargs="+",
        default=[10, 100, 1000],
        metavar="N",
        help="boundaries between groups, in instances (default: 10 100 1000)",
    )

    add = command(
        "convert-checkpoint",
        _convert_checkpoint,
        "Convert a checkpoint of the original (mmdetection 1). Nothing in it is run.",
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


if __name__ == "__main__":
    sys.exit(main())
