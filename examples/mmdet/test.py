r"""Test with mmdet's own runner, and evaluate as all examples do.

    python examples/mmdet/test.py CONFIG.py CHECKPOINT.pth --out x.pkl --eval bbox segm
    torchrun --nproc-per-node 8 examples/mmdet/test.py CONFIG.py CHECKPOINT.pth --launcher pytorch

Prints the original's table, then AP of each count group (with --train-annotations), AP fixed and
pooled AP; docs/evaluation.md says what each figure means. A checkpoint of the original has to be
converted first (`balanced-group-softmax convert-checkpoint`) and tested with --original-geometry.
"""

import argparse
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from mmengine.runner import Runner
from runs import add_examples_to_path, parser, prepare_versions, processes, read_config

add_examples_to_path()


def main(argv: Sequence[str] | None = None) -> int:
    args = parse_arguments(argv)
    try:
        from results_files import check_suffix

        config = read_config(args)
        if not args.checkpoint.is_file():
            raise FileNotFoundError(f"{args.checkpoint}: Expected a checkpoint, found none")
        if args.out is not None:
            check_suffix(args.out)
        config.load_from = str(args.checkpoint)
        dataset = config.test_dataloader.dataset
        annotations = Path(dataset.get("data_root", ""), dataset.ann_file)
        if not config.model.roi_head.get("mask_head") and "segm" in args.eval:
            raise ValueError(f"{args.config}: Expected a detector with masks for segm")
        prepare_versions()
        with tempfile.TemporaryDirectory() as folder:
            config.test_evaluator = dict(
                type="SharedEvaluation",
                annotations=str(annotations),
                out=str(args.out or Path(folder, "results.json")),
                kinds=list(dict.fromkeys(args.eval)),
                train_annotations=args.train_annotations,
                figures=args.metrics,
            )
            import shared_evaluation  # noqa: F401  # registers it

            with processes(args.launcher):
                Runner.from_cfg(config).test()
    except (ImportError, OSError, TypeError, ValueError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    return 0


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    made = parser(__doc__)
    add = made.add_argument
    add("checkpoint", type=Path, help="of mmdet 3")
    add("--out", type=Path, metavar="RESULTS", help="keep the detections, .pkl or .json")
    add("--eval", nargs="*", choices=("bbox", "segm"), default=["bbox"], help="default: bbox")
    add("--metrics", metavar="JSON", help="write the figures here, in percent")
    add("--train-annotations", metavar="JSON", help="training annotations, for count groups")
    return made.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main())
