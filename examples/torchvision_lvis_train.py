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

    torchrun --nproc-per-node 8 examples/torchvision_lvis_train.py \
        --stage softmax --config examples/configs/faster_rcnn_r50.toml \
        --annotations lvis_v0.5_train.json --images coco/ \
        --val-annotations lvis_v0.5_val.json --val-images coco/ \
        --output runs/softmax
    torchrun --nproc-per-node 8 examples/torchvision_lvis_train.py \
        --stage bags --checkpoint runs/softmax/softmax.pt \
        --config examples/configs/faster_rcnn_r50.toml \
        --annotations lvis_v0.5_train.json --images coco/ \
        --val-annotations lvis_v0.5_val.json --val-images coco/ \
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
from checkpoints import Checkpoint, read_state
from detection_data import ImageError
from lvis_demo_data import seed_of, write_demo_data
from lvis_evaluation import Metrics, check_installed
from recipe import FIELDS, given_options, recipes_of, run_toml
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
from stages import SOFTMAX, Log, Setting, run_stage
from starting_points import start_of_stage_two, with_weights_of
from training import Interrupted
from training_arguments import (
    DEMO,
    cache_options,
    check_arguments,
    methods_of,
    options_for,
    parse_arguments,
    run_options,
    starts_from_softmax,
)

from balanced_group_softmax.cli_program import FAILED, INTERRUPTED, ended, line_of

EFFECTIVE = "recipe.toml"


def main(argv: Sequence[str] | None = None) -> int:
    args = parse_arguments(argv, __doc__)
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
        except (Interrupted, KeyboardInterrupt) as error:
            if distributed.is_first():
                go_on = f"; go on with --resume --output {folder}" if folder else ""
                print(f"\nAsked to end{go_on}", file=sys.stderr)
            return error.status if isinstance(error, Interrupted) else INTERRUPTED
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
    recipes = recipes_of(*options_for(args))
    start = Checkpoint.load(args.checkpoint) if starts_from_softmax(args) else None
    if start is not None and not args.config and start.recipe.backbone != "small":
        raise ValueError(
            f"Expected `--config` with a detector of backbone {start.recipe.backbone}, got none: "
            "the default is the demo's, for small images"
        )
    if args.checkpoint and start is None:
        read_state(args.checkpoint)  # before data take their time
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
        # Nobody asked for the demo's detector.
        asked = [options_for(args)[0] if args.config else {}, given_options(args)]
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
        "stage": args.method or args.stage,
        **origin(
            seed=args.seed,
            data=data.train.fingerprint,
            start=start,
            cache=cache,
        ),
        "val_data": data.val.fingerprint[:16],
    }
    recipe_file = folder / EFFECTIVE
    if args.resume:
        # The first process looks for all: it writes the file below, and others may be late.
        distributed.first_does(
            lambda: check_folder(recipe_file, recipes, identity) if recipe_file.exists() else None
        )
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
    for name in methods_of(args):
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
        if len(checkpoints) > 1:
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


def fail(error: BaseException, folder: Path | None, *, begun: bool = False) -> int:
    """Tell the error in a line; remove the run folder, unless something is in it, or was before."""
    text = line_of(error)
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
    sys.exit(ended(main))
