r"""AP and AR of LVIS: of a trained detector, or of a file of detections without a model.

    python examples/torchvision_lvis_eval.py runs/bags/bags.pt --out found.json
    python examples/torchvision_lvis_eval.py results.json \
        --annotations lvis_v1_val.json --train-annotations lvis_v1_train.json \
        --eval bbox segm --metrics metrics.json

A checkpoint is one of torchvision_lvis_train.py, evaluated on the images that its run had, or on
others by --annotations and --images; torchrun spreads them over processes. A file of detections is
in the format of LVIS results (.json) or in that of the original, mmdetection 1 (.pkl). Prints the
original's table, then AP of each count group (of the checkpoint's training data, or of
--train-annotations), AP fixed and pooled AP. docs/evaluation.md says what each figure means.

Soft-NMS and test-time augmentation are out of scope: detections are judged as they are.
"""

import argparse
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from evaluation_report import (
    Disagreement,
    Training,
    report,
    training_or_none,
    usable_methods,
)
from lvis_evaluation import METHODS
from option_types import whole
from results_files import SUFFIXES, check_suffix

from balanced_group_softmax._files import check_output
from balanced_group_softmax.cli_program import FAILED, HelpFormatter, ended, line_of

CHECKPOINTS = (".pt", ".pth")
DIFFERENT = 1
STATUS = """\
exit status:
  0    done
  1    with --method both: the two differ by more than 1e-6
  2    wrong usage, or an input or output that is not what it should be;
       standard error says in a line what was wrong, and no file is left
  130  interrupted by Ctrl-C
"""


def main(argv: Sequence[str] | None = None) -> int:
    args = parse_arguments(argv)
    try:
        check_arguments(args)
        if args.source.suffix in CHECKPOINTS:
            evaluate_checkpoint(args)
        else:
            judge(args, args.source, training_or_none(args.train_annotations))
    except BrokenPipeError:
        raise
    except (OSError, ValueError, ImportError, MemoryError) as error:
        print(f"error: {line_of(error)}", file=sys.stderr)
        return DIFFERENT if isinstance(error, Disagreement) else FAILED
    return 0


def judge(args: argparse.Namespace, results: Path, training: Training | None) -> None:
    """Print the tables of a file of detections, and write the figures."""
    report(
        results,
        args.annotations,
        training=training,
        kinds=list(dict.fromkeys(args.eval)),
        method=args.method,
        out=args.metrics,
        legacy_widths=args.legacy_widths,
        progress=not args.no_progress,
    )


def evaluate_checkpoint(args: argparse.Namespace) -> None:
    """Run a detector over the images, and judge what it finds."""
    import distributed
    from checkpoints import Checkpoint
    from detecting import detect
    from detection_data import LVISDetection
    from training import AUTOCAST

    device = distributed.local_device(args.device)
    with distributed.process_group(device):
        checkpoint = Checkpoint.load(args.source)
        recipe, categories = checkpoint.recipe, checkpoint.categories
        if checkpoint.training is not None:
            step = checkpoint.training["step"]
            print(f"{args.source}: in the middle of a training, at step {step}", file=sys.stderr)
        if "segm" in args.eval and recipe.detector != "mask_rcnn":
            raise ValueError(f"{args.source}: Expected a Mask R-CNN for segm, got a Faster R-CNN")
        if args.annotations is None:
            args.annotations, args.images = checkpoint.val_files
        data = LVISDetection(args.annotations, args.images)
        if tuple(data.category_ids) != categories.ids:
            raise ValueError(
                f"{args.annotations}: Expected the {len(categories.ids)} categories that "
                f"{args.source} was trained on, got {len(data.category_ids)} with other ids"
            )
        if not args.skip_broken:
            data.check_images(progress=distributed.is_first() and not args.no_progress)
        layout = categories.layout(recipe.thresholds)
        named = zip(layout.names, layout.groups, strict=True)
        training = Training(
            dict(zip(categories.ids, categories.frequencies, strict=True)),
            {name: [categories.ids[i] for i in members] for name, members in named},
        )
        with tempfile.TemporaryDirectory() as folder:
            results = args.out or Path(distributed.from_first(folder), "results.json")
            broken = detect(
                checkpoint.make_model().to(device),
                data,
                results,
                batch_size=args.batch_size or recipe.batch_size,
                device=device,
                num_workers=args.num_workers,
                autocast=AUTOCAST.get(recipe.amp),
                skip_broken=args.skip_broken,
                progress=not args.no_progress,
            )
            if distributed.is_first():
                for reason in broken:
                    print(f"left out: {reason}", file=sys.stderr)
                judge(args, results, training)
            distributed.barrier()


def check_arguments(args: argparse.Namespace) -> None:
    """Check what would be noticed late.

    Raises:
        OSError: A file cannot be written.
        ValueError: Arguments do not go together.
        ImportError: What the method needs is not installed.
    """
    is_checkpoint = args.source.suffix in CHECKPOINTS
    if args.source.suffix not in (*CHECKPOINTS, *SUFFIXES):
        raise ValueError(
            f"{args.source}: Expected a checkpoint ({', '.join(CHECKPOINTS)}) or detections "
            f"({', '.join(SUFFIXES)})"
        )
    if not is_checkpoint and args.annotations is None:
        raise ValueError(f"Expected `--annotations` with the detections {args.source}, got none")
    if is_checkpoint and (args.annotations is None) != (args.images is None):
        raise ValueError("Expected `--annotations` and `--images` together, got only one of them")
    for name in ("images", "out"):
        if not is_checkpoint and getattr(args, name) is not None:
            raise ValueError(f"Expected `--{name}` with a checkpoint only, got {args.source}")
    inputs = (args.source, args.annotations, args.train_annotations)
    for path in (args.out, args.metrics):
        if path is not None:
            check_output(path, [Path(read) for read in inputs if read is not None])
    if is_checkpoint:
        usable_methods(args.method)
        if args.out is not None:
            check_suffix(args.out)


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=STATUS, formatter_class=HelpFormatter
    )
    add: Any = parser.add_argument
    add("source", metavar="SOURCE", type=Path, help="checkpoint (.pt), or detections (.json, .pkl)")
    add(
        "--annotations",
        metavar="JSON",
        help="LVIS (v0.5, v1) or COCO annotations to judge by; of detections required, of a "
        "checkpoint with --images (default: those of its run)",
    )
    add(
        "--eval",
        nargs="+",
        choices=("bbox", "segm"),
        default=["bbox"],
        help="what to judge: boxes, masks, or both (default: bbox)",
    )
    add(
        "--method",
        choices=(*METHODS, "both"),
        default="fast",
        help="fast: faster-coco-eval; official: the package lvis; both: compare them, exit status "
        "1 if they differ by more than 1e-6 (default: fast)",
    )
    add("--metrics", metavar="JSON", type=Path, help="write the figures here, in percent")
    add("--no-progress", action="store_true", help="show no bars")
    add = parser.add_argument_group("of a checkpoint").add_argument
    add("--images", metavar="DIR", help="folder of the images, with --annotations")
    add("--out", metavar="RESULTS", type=Path, help="keep the detections here, .json or .pkl")
    add(
        "--batch-size",
        type=whole(1),
        metavar="N",
        help="images of a batch, in each process (default: as in training)",
    )
    add(
        "--num-workers",
        type=whole(0),
        default=0,
        metavar="N",
        help="processes that load images; 0: the main process does (default: 0)",
    )
    add(
        "--device",
        metavar="NAME",
        help="what to run on, such as cuda:1 or cpu (default: a GPU if there is one)",
    )
    add("--skip-broken", action="store_true", help="go past images that cannot be read")
    add = parser.add_argument_group("of a file of detections").add_argument
    add(
        "--train-annotations",
        metavar="JSON",
        help="training annotations, for count groups and frequencies (default: no count groups, "
        "frequencies of --annotations)",
    )
    add(
        "--legacy-widths",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="of a .pkl: a box is x2 - x1 + 1 wide, as in mmdetection 1; with "
        "--no-legacy-widths it is x2 - x1 wide (default: --legacy-widths)",
    )
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(ended(main))
