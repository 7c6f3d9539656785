"""The command line of torchvision_lvis_train.py, and what it asks for."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from feature_cache import CacheOptions
from methods import METHODS, options_of
from option_types import whole
from recipe import ARCHITECTURE, add_options, given_options, read_options, recipes_of
from stages import BAGS, CONTINUED, SOFTMAX

from balanced_group_softmax.cli_program import HelpFormatter

DEMO = Path(__file__).parent / "configs" / "demo.toml"
STAGES = {
    "compare": (SOFTMAX, CONTINUED, BAGS),
    "softmax": (SOFTMAX,),
    "continued": (CONTINUED,),
    "bags": (BAGS,),
}


STATUS = """\
exit status:
  0    done
  2    wrong usage, an input or output that is not what it should be, a full
       disk, or a training that diverged; a line on standard error says which
  130  interrupted by Ctrl-C, 143 asked to end by SIGTERM; during training both
       save first, and --resume goes on from there
Under torchrun the status is torchrun's own.
"""


def parse_arguments(argv: Sequence[str] | None, description: str | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=description,
        usage="%(prog)s [--config TOML]\n           [--stage STAGE | --method NAME] [option ...]",
        epilog=STATUS,
        formatter_class=HelpFormatter,
        allow_abbrev=False,  # who looks for an option among arguments knows its name
    )
    add = parser.add_argument
    add(
        "--config",
        type=Path,
        metavar="TOML",
        help="file of recipe options, see below and examples/configs/ (default: demo.toml there, "
        "for small images)",
    )
    what = parser.add_mutually_exclusive_group()
    what.add_argument(
        "--stage",
        choices=STAGES,
        default="compare",
        help="what to train: a detector with plain softmax; from its --checkpoint the classifier, "
        "with BAGS (bags) or with plain softmax for as long (continued); or one after the other "
        "(compare) (default: compare)",
    )
    what.add_argument(
        "--method",
        choices=METHODS,
        metavar="NAME",
        help="in place of a stage, one of the methods that BAGS is compared with, which "
        f"docs/methods.md explains: {', '.join(METHODS)}",
    )
    add(
        "--checkpoint",
        type=Path,
        metavar="PT",
        help="what to start from: for a training from scratch (stage or method softmax, method "
        "rfs) weights of any detector, of which is taken what fits; for all others the softmax.pt "
        "of stage softmax",
    )
    add(
        "--output",
        metavar="DIR",
        help="run folder, new or empty (default: a new one under runs/, with seed and time)",
    )
    add(
        "--resume",
        nargs="?",
        const="auto",
        choices=("auto",),
        metavar="auto",
        help="go on in --output from the last checkpoint, or begin where there is none",
    )
    add(
        "--seed",
        type=whole(0),
        default=0,
        metavar="N",
        help="seed of the drawn data and of training (default: 0)",
    )
    data = parser.add_argument_group("your own data (default: the demo's)")
    data.add_argument(
        "--annotations",
        metavar="JSON",
        help="training annotations, LVIS (v0.5, v1) or COCO; with --images",
    )
    data.add_argument("--images", metavar="DIR", help="folder of the training images")
    data.add_argument(
        "--val-annotations",
        metavar="JSON",
        help="annotations to evaluate on, with --val-images (default: the training annotations)",
    )
    data.add_argument(
        "--val-images",
        metavar="DIR",
        help="folder of the images to evaluate on (default: the training images)",
    )
    data.add_argument(
        "--skip-broken", action="store_true", help="go past images that cannot be read; list them"
    )
    work = parser.add_argument_group("running")
    add = work.add_argument
    add(
        "--device",
        metavar="NAME",
        help="what to train on, such as cuda:1 or cpu (default: a GPU if there is one)",
    )
    add(
        "--num-workers",
        type=whole(0),
        default=0,
        metavar="N",
        help="processes that load images, of each process that trains; 0: it does so itself "
        "(default: 0)",
    )
    add(
        "--save-every",
        type=whole(1),
        default=500,
        metavar="STEPS",
        help="write a checkpoint, to --resume from, after so many steps (default: 500)",
    )
    add(
        "--evaluate-every",
        type=whole(0),
        default=0,
        metavar="EPOCHS",
        help="evaluate after so many epochs too; 0: at the end only (default: 0)",
    )
    add(
        "--cache-features",
        type=Path,
        metavar="DIR",
        help="stage two: store what reaches the classifier here, and train from that",
    )
    add(
        "--cache-rois",
        type=whole(1),
        default=CacheOptions.rois,
        metavar="N",
        help="with --cache-features: RoIs of each image to store, from which each epoch draws "
        "those that train (default: twice as many as train)",
    )
    add(
        "--cache-passes",
        type=whole(1),
        default=CacheOptions.passes,
        metavar="N",
        help="with --cache-features: times that the detector runs over the images, each with "
        "other flips, which epochs read in turn (default: 1)",
    )
    add(
        "--tensorboard",
        action="store_true",
        help="log losses for TensorBoard, in the run folder; needs the package tensorboard",
    )
    add_options(parser)
    return parser.parse_args(argv)


def check_arguments(args: argparse.Namespace) -> None:
    """Check what does not need the data.

    Raises:
        OSError: The configuration cannot be read.
        ValueError: Arguments do not go together, or an option has a bad value.
    """
    recipes = recipes_of(*options_for(args))
    if len(methods_of(args)) > 1:
        for name in ARCHITECTURE:
            one, two = (getattr(recipes[stage], name) for stage in ("softmax", "bags"))
            if one != two:
                raise ValueError(f"Expected the same `{name}` in both stages, got {one} and {two}")
    if not starts_from_softmax(args):
        recipes["softmax"].check_start(from_checkpoint=bool(args.checkpoint))
    cache_options(args)
    if args.resume and not args.output:
        raise ValueError("Expected `--output` with `--resume`, got none")
    if starts_from_softmax(args) and not args.checkpoint:
        what = f"--method {args.method}" if args.method else f"--stage {args.stage}"
        raise ValueError(f"Expected `--checkpoint` with `{what}`, a softmax detector to start from")


def methods_of(args: argparse.Namespace) -> tuple[str, ...]:
    """Return what is to be trained, in this order."""
    return (args.method,) if args.method else STAGES[args.stage]


def starts_from_softmax(args: argparse.Namespace) -> bool:
    """Return whether a trained softmax detector is needed."""
    return METHODS[methods_of(args)[0]].start == "softmax"


def options_for(args: argparse.Namespace) -> list[dict[str, dict[str, Any]]]:
    """Return the options of the file, of the method and of the command line.

    Raises:
        OSError: The file cannot be read.
        ValueError: It has unknown options or values.
    """
    file = read_options(args.config or DEMO)
    sources = [file, given_options(args)]
    if args.method:
        sources.insert(1, options_of(args.method, recipes_of(file)))
    return sources


def cache_options(args: argparse.Namespace) -> CacheOptions | None:
    """Return what is asked of the feature cache; None without one."""
    if args.cache_features is None:
        return None
    return CacheOptions(args.cache_features, args.cache_passes, args.cache_rois)


def run_options(args: argparse.Namespace) -> dict[str, Any]:
    """Return the options that are not the recipe's, as far as they were given."""
    return {
        key: str(value) if isinstance(value, Path) else value
        for key, value in vars(args).items()
        if "." not in key and value is not None
    }
