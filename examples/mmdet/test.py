r"""Test a detector of mmdet 3 with mmdet's own runner, and evaluate it as all examples do.

    python examples/mmdet/test.py CONFIG.py epoch_12.pth \
        --out x.pkl --eval bbox segm
    torchrun --nproc-per-node 8 examples/mmdet/test.py CONFIG.py epoch_12.pth \
        --launcher pytorch

Prints the original's table, then AP of each count group (with --train-annotations), AP fixed and
pooled AP; docs/evaluation.md says what each figure means. The groups of BAGS are those that the
checkpoint carries: training annotations that the config names need not be there. A checkpoint of
the original has to be converted first (`balanced-group-softmax convert-checkpoint`) and tested with
--original-geometry.
"""

import argparse
import json
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mmengine.config import Config
from runs import (
    add_examples_to_path,
    build_runner,
    parser,
    prepare_versions,
    processes,
    read_checkpoint,
    read_config,
)

from balanced_group_softmax import GroupLayout
from balanced_group_softmax._files import check_output
from balanced_group_softmax.adapters.mmdet import bags_losses, check_categories
from balanced_group_softmax.cli_program import FAILED, ended, line_of

add_examples_to_path()
from results_files import check_suffix  # noqa: E402


def main(argv: Sequence[str] | None = None) -> int:
    args = parse_arguments(argv)
    try:
        config = read_config(args)
        if not args.checkpoint.is_file():
            raise FileNotFoundError(f"{args.checkpoint}: Expected a checkpoint, found none")
        dataset = config.test_dataloader.dataset
        annotations = Path(dataset.get("data_root", ""), dataset.ann_file)
        check_outputs(args, annotations)
        config.load_from = str(args.checkpoint)
        if "roi_head" not in config.model:
            raise ValueError(f"{args.config}: Expected a two-stage detector, got no `roi_head`")
        if not config.model.roi_head.get("mask_head") and "segm" in args.eval:
            raise ValueError(f"{args.config}: Expected a detector with masks for segm")
        prepare_versions()
        take_groups(config, args.checkpoint)
        with tempfile.TemporaryDirectory() as folder:
            config.test_evaluator = dict(
                type="SharedEvaluation",
                annotations=str(annotations),
                out=str(args.out or Path(folder, "results.json")),
                kinds=list(dict.fromkeys(args.eval)),
                train_annotations=args.train_annotations,
                figures=args.metrics and str(args.metrics),
            )
            import shared_evaluation  # noqa: F401  # registers it

            with processes(args.launcher):
                runner = build_runner(config)
                check_labels(runner)
                runner.test()
    except (ImportError, OSError, TypeError, ValueError) as error:
        print(f"error: {line_of(error)}", file=sys.stderr)
        return FAILED
    return 0


def check_outputs(args: argparse.Namespace, annotations: Path) -> None:
    """Check that what `--out` and `--metrics` name can be written, and is nothing that is read."""
    inputs = [args.checkpoint, args.config, annotations]
    if args.train_annotations is not None:
        inputs.append(Path(args.train_annotations))
    outputs = [path for path in (args.out, args.metrics) if path is not None]
    for path in outputs:
        check_output(path, inputs)
    if len({path.resolve() for path in outputs}) < len(outputs):
        raise ValueError(f"{args.out}: Expected different files for --out and --metrics")
    if args.out is not None:
        check_suffix(args.out)


def take_groups(config: Config, checkpoint: Path) -> None:
    """Give every BAGS loss of the config the layout that the checkpoint carries.

    Raises:
        ValueError: The checkpoint cannot be read, or has no layout, or several.
    """
    content = read_checkpoint(checkpoint)
    heads = config.model.roi_head.bbox_head
    losses = [head.loss_cls for head in (heads if isinstance(heads, list) else [heads])]
    losses = [loss for loss in losses if loss.type == "BAGSLoss"]
    if not losses:
        return
    try:
        layout = GroupLayout.from_state_dict(content.get("state_dict", content))
    except ValueError as error:
        raise ValueError(f"{checkpoint}: {error}; a softmax detector has none") from None
    for loss in losses:
        for key in ("annotations", "counts", "thresholds", "category_weights"):  # of training alone
            loss.pop(key, None)
        loss.layout = json.loads(layout.to_json())


def check_labels(runner: Any) -> None:
    """Check that the images are of the categories that the detector tells apart.

    Raises:
        ValueError: The data set has other categories, or in another order.
    """
    layouts = [loss.layout for loss in bags_losses(runner.model)]
    if not layouts:
        heads = runner.cfg.model.roi_head.bbox_head
        number = (heads[0] if isinstance(heads, list) else heads).num_classes
        layouts = [GroupLayout.from_counts([1] * number, background="last")]
    check_categories(runner.test_dataloader.dataset, layouts[0])


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    made = parser(__doc__)
    add = made.add_argument
    add("checkpoint", type=Path, metavar="CHECKPOINT", help="a .pth file of mmdet 3")
    add("--out", type=Path, metavar="RESULTS", help="keep the detections here, .pkl or .json")
    add(
        "--eval",
        nargs="*",
        choices=("bbox", "segm"),
        default=["bbox"],
        help="what to judge: boxes, masks, both, or with --eval alone nothing (default: bbox)",
    )
    add("--metrics", type=Path, metavar="JSON", help="write the figures here, in percent")
    add(
        "--train-annotations",
        metavar="JSON",
        help="training annotations, for AP by count group (default: no count groups)",
    )
    return made.parse_args(argv)


if __name__ == "__main__":
    sys.exit(ended(main))
