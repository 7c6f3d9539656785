r"""Balanced Group Softmax in a torchvision detector: train, compare, draw.

    python examples/torchvision_lvis_train.py

draws a long-tailed detection data set in LVIS v1 format, trains a small Faster R-CNN with plain
softmax, and then, with everything but the classifier frozen, trains

- Balanced Group Softmax, started from the softmax classifier, and
- as a control, the softmax classifier itself, for as many steps on the same batches.

All three are evaluated as LVIS is. A table, `metrics.json`, checkpoints, the layout of the groups
and pictures go to a run folder. `--config` chooses another recipe, such as those of the paper, and
`--annotations` and `--images` an LVIS (v0.5, v1) or COCO data set of yours; `--stage` runs one
training alone:

    torchrun --nproc-per-node 8 examples/torchvision_lvis_train.py --stage softmax \
        --config examples/configs/faster_rcnn_r50.toml --annotations lvis_v0.5_train.json \
        --images coco/ --val-annotations lvis_v0.5_val.json --val-images coco/ --output runs/softmax
    torchrun --nproc-per-node 8 examples/torchvision_lvis_train.py --stage bags \
        --config examples/configs/faster_rcnn_r50.toml --checkpoint runs/softmax/softmax.pt ... \
        --output runs/bags

A run that was killed goes on with the same command and `--resume`.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import platform
import shutil
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import distributed
import torch
import torchvision
from checkpoints import Checkpoint
from detection_data import ImageError
from feature_cache import CacheOptions
from lvis_demo_data import seed_of, write_demo_data
from lvis_evaluation import Metrics, check_installed
from recipe import (
    ARCHITECTURE,
    FIELDS,
    add_options,
    given_options,
    read_options,
    recipes_of,
    run_toml,
)
from resuming import check_folder, noted_broken, origin
from run_data import Files, describe, load_data, named_files
from run_folder import make_run_folder, write_json, write_text
from run_results import (
    draw,
    evaluated,
    groups_of,
    layout_of,
    report_broken,
    report_epoch,
    tables,
)
from stages import (
    BAGS,
    CONTINUED,
    SOFTMAX,
    Log,
    Setting,
    run_stage,
)
from starting_points import start_of_stage_two, with_weights_of
from training import Interrupted

DEMO = Path(__file__).parent / "configs" / "demo.toml"
STAGES = {
    "compare": (SOFTMAX, CONTINUED, BAGS),
    "softmax": (SOFTMAX,),
    "continued": (CONTINUED,),
    "bags": (BAGS,),
}
EFFECTIVE = "recipe.toml"
FAILED = 2
TERMINATED = 143
"""How a shell says that SIGTERM ended a command."""


def main(argv: Sequence[str] | None = None) -> int:
    args = parse_arguments(argv)
    try:
        check_arguments(args)
        device = distributed.local_device(args.device)
    except (OSError, ValueError) as error:
        return fail(error, None)
    begun = bool(args.resume) and Path(args.output).is_dir()
    with distributed.process_group(device):
        folder = None
        try:
            check_installed()
            check_tensorboard(args)
            folder = Path(distributed.first_does(lambda: str(open_run_folder(args))))
            setting = prepare(args, folder, device)
            run(args, setting)
        except Interrupted:
            if distributed.is_first():
                print(f"Asked to end; go on with --resume --output {folder}", file=sys.stderr)
            return TERMINATED
        except distributed.FailedElsewhere:
            return FAILED
        except RuntimeError as error:
            if not distributed.is_loss_of_a_process(error):
                raise
            return fail(RuntimeError("another process has ended"), folder, begun=begun)
        except (OSError, ValueError, ImportError, ImageError, FloatingPointError) as error:
            return fail(error, folder, begun=begun)
    return 0


def prepare(args: argparse.Namespace, folder: Path, device: torch.device) -> Setting:
    """Read data and recipes, and say what will be done."""
    options = [read_options(args.config or DEMO), given_options(args)]
    recipes = recipes_of(*options)
    in_stage_two = args.stage in ("continued", "bags")
    start = Checkpoint.load(args.checkpoint) if in_stage_two else None
    if start is not None and not args.config and start.recipe.backbone != "small":
        raise ValueError(
            f"Expected `--config` with a detector of backbone {start.recipe.backbone}, got none: "
            "the default is the demo's, for small images"
        )
    files = named_files(args.annotations, args.images, args.val_annotations, args.val_images)
    if files is None:
        if start is not None and start.origin["seed"] != args.seed and distributed.is_first():
            print(
                f"Drawing other images than {args.checkpoint} was trained on: its --seed was "
                f"{start.origin['seed']}"
            )
        files = distributed.first_does(lambda: draw_demo_data(args, folder))
    elif not args.val_annotations and distributed.is_first():
        print("No --val-annotations: evaluating on the training images.")
    detector = (start.recipe if start is not None else recipes["softmax"]).detector
    data = load_data(
        files,
        masks=detector == "mask_rcnn",
        skip_broken=args.skip_broken,
        progress=distributed.is_first(),
    )
    if start is not None:
        asked = options if args.config else options[1:]  # nobody asked for the demo's detector
        given = {name for source in asked for table in source.values() for name in table}
        start, recipes["bags"] = start_of_stage_two(
            args.checkpoint, start, data, recipes["bags"], given & FIELDS.keys()
        )
    elif args.checkpoint:
        start = with_weights_of(args.checkpoint, recipes["softmax"], data, args.seed)
    cache = cache_options(args)
    setting = Setting(
        folder=folder,
        data=data,
        recipes=recipes,
        device=device,
        seed=args.seed,
        num_workers=args.num_workers,
        save_every=args.save_every,
        skip_broken=args.skip_broken,
        resume=args.resume is not None,
        broken=noted_broken(folder) if args.resume else {},
        logger=lambda name, step: make_log(args, folder, name, step),
        start=start,
        cache=cache,
    )
    if args.evaluate_every:
        setting.after_epoch = lambda name, model, epoch: (
            report_epoch(setting, name, model, epoch) if epoch % args.evaluate_every == 0 else None
        )
    identity = {
        "stage": args.stage,
        **origin(
            seed=args.seed,
            data=data.train.fingerprint,
            start=start,
            cache=cache,
        ),
        "val_data": data.val.fingerprint[:16],
    }
    recipe_file = folder / EFFECTIVE
    if args.resume and recipe_file.exists():
        distributed.first_does(lambda: check_folder(recipe_file, recipes, identity))
    if distributed.is_first():
        if args.annotations and not args.config and start is None:
            print(
                "No --config: training the demo's small detector; those of the paper are in "
                f"{DEMO.parent}"
            )
        if not recipe_file.exists():
            write_text(recipe_file, run_toml(recipes, run_options(args), identity))
        groups = ", ".join(f"{name}: {len(ids)}" for name, ids in groups_of(setting).items())
        print(
            f"{describe(data)}\nGroups by training instances: {groups}\n"
            f"Training on {device} with torch {torch.__version__}, "
            f"{distributed.world_size()} process(es)\nRun folder: {folder}"
        )
    return setting


def run(args: argparse.Namespace, setting: Setting) -> None:
    """Train what was asked for, evaluate it, and write everything down."""
    started = time.perf_counter()
    folder, first = setting.folder, distributed.is_first()
    checkpoints: dict[str, Checkpoint] = {}
    for name in STAGES[args.stage]:
        start = checkpoints.get(SOFTMAX, setting.start)
        checkpoints[name] = run_stage(setting, name, start)
        if first:
            layout_of(setting).save(folder / "layout.json")
    trained = time.perf_counter() - started

    metrics: dict[str, Metrics] = {}
    for name, checkpoint in checkpoints.items():
        model = checkpoint.make_model().to(setting.device)
        found = evaluated(setting, name, model)
        if first:
            metrics[name] = found
    if first:
        write_json(folder / "metrics.json", metrics)
        table = tables(setting, metrics)
        write_text(folder / "table.md", table)
        if args.stage == "compare":
            draw(setting, checkpoints, metrics)
        write_json(folder / "run.json", summary(args, setting, trained, started))
        report_broken(setting)
        print(f"\n{table}\nWritten to {folder} in {time.perf_counter() - started:.0f} s")
    distributed.barrier()


# --- data and folders ---------------------------------------------------------------------------


def open_run_folder(args: argparse.Namespace) -> Path:
    """Return a new or empty folder, or the one to go on in."""
    if args.resume and Path(args.output).is_dir():
        folder = Path(args.output)
        names = {path.name for path in folder.iterdir() if not path.name.startswith(".partial-")}
        if names - {"data"} and EFFECTIVE not in names:
            raise ValueError(
                f"{folder}: Expected a run folder with {EFFECTIVE}, or an empty one, to `--resume` "
                f"in, got a folder with {', '.join(sorted(names)[:3])}"
            )
        for left in folder.glob(".partial-*"):  # of a run that was killed
            shutil.rmtree(left) if left.is_dir() else left.unlink()
        return folder
    return make_run_folder(args.output, f"torchvision-lvis-seed{args.seed}")


def draw_demo_data(args: argparse.Namespace, folder: Path) -> Files:
    """Return the demo's data, which an earlier part of the run may have drawn."""
    if not (folder / "data").is_dir():
        write_demo_data(folder / "data", args.seed, progress=True)
    elif (seed := seed_of(folder / "data")) != args.seed:
        raise ValueError(
            f"{folder / 'data'}: Expected data drawn with `--seed` {args.seed}, got those of {seed}"
        )
    return Files(*(folder / "data" / part for part in ("train.json", "train", "val.json", "val")))


def check_tensorboard(args: argparse.Namespace) -> None:
    """Check that losses can be logged.

    Raises:
        ImportError: TensorBoard is asked for and not there.
    """
    if args.tensorboard and importlib.util.find_spec("tensorboard") is None:
        raise ImportError("Expected the package tensorboard for `--tensorboard`, found none")


def make_log(args: argparse.Namespace, folder: Path, name: str, step: int) -> Log:
    """Return what is called with the losses of a step."""
    if not args.tensorboard or not distributed.is_first():
        return lambda step, values: None
    from torch.utils.tensorboard import SummaryWriter

    writer = SummaryWriter(str(folder / "tensorboard" / name), purge_step=step)

    def log(step: int, values: dict[str, float]) -> None:
        for key, value in values.items():
            writer.add_scalar(key, value, step)

    return log


def summary(
    args: argparse.Namespace, setting: Setting, trained: float, started: float
) -> dict[str, Any]:
    """Return what a reader of the figures wants to know of the run."""
    return {
        **run_options(args),
        "output": str(setting.folder),
        "device": str(setting.device),
        "processes": distributed.world_size(),
        "seconds": {
            "training": round(trained, 1),
            "all": round(time.perf_counter() - started, 1),
        },
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "torchvision": torchvision.__version__,
        },
    }


# --- command line -------------------------------------------------------------------------------


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--config", type=Path, metavar="TOML", help="recipe (default: the demo's)")
    add("--stage", choices=STAGES, default="compare", help="what to train (default: compare)")
    add(
        "--checkpoint",
        type=Path,
        metavar="PT",
        help="what to start from: for stage bags and continued the softmax.pt of stage softmax; "
        "for stage softmax weights of any detector, of which is taken what fits",
    )
    add("--output", metavar="DIR", help="new or empty run folder (default: one under runs/)")
    add(
        "--resume",
        nargs="?",
        const="auto",
        choices=("auto",),
        help="go on in --output from the last checkpoint, or begin where there is none",
    )
    add("--seed", type=whole(0), default=0, help="of the drawn data and of training (default: 0)")
    data = parser.add_argument_group("your own data (default: the demo's)")
    data.add_argument("--annotations", metavar="JSON", help="training annotations, LVIS or COCO")
    data.add_argument("--images", metavar="DIR", help="folder of the training images")
    data.add_argument("--val-annotations", metavar="JSON", help="default: the training annotations")
    data.add_argument("--val-images", metavar="DIR", help="folder of the validation images")
    data.add_argument(
        "--skip-broken", action="store_true", help="go past images that cannot be read; list them"
    )
    work = parser.add_argument_group("running")
    add = work.add_argument
    add("--device", help="such as cuda:1 or cpu (default: a GPU if there is one)")
    add("--num-workers", type=whole(0), default=0, help="processes that load images (default: 0)")
    add("--save-every", type=whole(1), default=500, metavar="STEPS", help="default: 500")
    add(
        "--evaluate-every",
        type=whole(0),
        default=0,
        metavar="EPOCHS",
        help="evaluate during training too (default: 0, at the end only)",
    )
    add(
        "--cache-features",
        type=Path,
        metavar="DIR",
        help="stage two: store what reaches the classifier here, and train from that",
    )
    add(
        "--cache-draws",
        type=whole(1),
        default=CacheOptions.draws,
        metavar="N",
        help="times that it samples RoIs of each image, which epochs read in turn (default: 2)",
    )
    add(
        "--cache-passes",
        type=whole(1),
        default=CacheOptions.passes,
        metavar="N",
        help="times that the detector runs over the images for that, each with other flips "
        "(default: 1)",
    )
    add("--tensorboard", action="store_true", help="log losses for TensorBoard")
    add_options(parser)
    return parser.parse_args(argv)


def check_arguments(args: argparse.Namespace) -> None:
    """Check what does not need the data.

    Raises:
        OSError: The configuration cannot be read.
        ValueError: Arguments do not go together, or an option has a bad value.
    """
    recipes = recipes_of(read_options(args.config or DEMO), given_options(args))
    if args.stage == "compare":
        for name in ARCHITECTURE:
            one, two = (getattr(recipes[stage], name) for stage in ("softmax", "bags"))
            if one != two:
                raise ValueError(f"Expected the same `{name}` in both stages, got {one} and {two}")
    if args.stage in ("compare", "softmax"):
        recipes["softmax"].check_start(from_checkpoint=bool(args.checkpoint))
    cache_options(args)
    if args.resume and not args.output:
        raise ValueError("Expected `--output` with `--resume`, got none")
    if args.stage in ("continued", "bags") and not args.checkpoint:
        raise ValueError(
            f"Expected `--checkpoint` with `--stage {args.stage}`, a softmax detector to start from"
        )


def cache_options(args: argparse.Namespace) -> CacheOptions | None:
    """Return what is asked of the feature cache; None without one."""
    if args.cache_features is None:
        return None
    return CacheOptions(args.cache_features, args.cache_passes, args.cache_draws)


def run_options(args: argparse.Namespace) -> dict[str, Any]:
    """Return the options that are not the recipe's, as far as they were given."""
    return {
        key: str(value) if isinstance(value, Path) else value
        for key, value in vars(args).items()
        if "." not in key and value is not None
    }


def whole(least: int, most: int = 2**31) -> Any:
    def parse(text: str) -> int:
        value = int(text)
        if not least <= value <= most:
            raise argparse.ArgumentTypeError(f"Expected {least} to {most}, got {text}")
        return value

    parse.__name__ = "integer"  # argparse names it in its message
    return parse


def fail(error: BaseException, folder: Path | None, *, begun: bool = False) -> int:
    """Tell the error in a line; remove the run folder, unless something is in it, or was before."""
    text = " ".join(str(error).split())
    if folder is not None and distributed.is_first():
        if not begun and [path.name for path in folder.iterdir()] == [EFFECTIVE]:
            (folder / EFFECTIVE).unlink()
        with contextlib.suppress(OSError):
            if not begun:
                folder.rmdir()
        if folder.is_dir():
            kept = ", ".join(sorted(path.name for path in folder.iterdir()))
            text += (
                f" ({folder} keeps {kept}; go on with `--resume`, or remove it or give another "
                "`--output` to start again)"
            )
    # Processes share a terminal, where another's bar may be in the middle of a line.
    who = f"\nprocess {distributed.rank()}: " if distributed.world_size() > 1 else ""
    print(f"{who}error: {text}", file=sys.stderr)
    return FAILED


if __name__ == "__main__":
    sys.exit(main())
