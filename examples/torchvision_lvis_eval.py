r"""AP and AR of LVIS for a file of detections, without a model.

    python examples/torchvision_lvis_eval.py results.json --annotations lvis_v1_val.json \
        --train-annotations lvis_v1_train.json --eval bbox segm --out metrics.json

RESULTS is in the format of LVIS results (.json) or in that of the original, mmdetection 1 (.pkl).
Prints the original's table, then AP of each count group (with --train-annotations), AP fixed and
pooled AP. docs/evaluation.md says what each figure means.

Soft-NMS and test-time augmentation are out of scope: detections are judged as they are.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from evaluation_report import Disagreement, report, training_or_none
from lvis_evaluation import METHODS


def main(argv: Sequence[str] | None = None) -> int:
    args = parse_arguments(argv)
    try:
        report(
            args.results,
            args.annotations,
            training=training_or_none(args.train_annotations),
            kinds=list(dict.fromkeys(args.eval)),
            method=args.method,
            out=args.out,
            legacy_widths=args.legacy_widths,
            progress=not args.no_progress,
        )
    except (OSError, ValueError, ImportError, MemoryError) as error:
        text = " ".join(str(error).split()) or type(error).__name__
        print(f"error: {text}", file=sys.stderr)
        return 1 if isinstance(error, Disagreement) else 2
    return 0


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("results", metavar="RESULTS", type=Path, help="detections, .json or .pkl")
    add("--annotations", metavar="JSON", required=True, help="LVIS (v0.5, v1) or COCO annotations")
    add(
        "--train-annotations",
        metavar="JSON",
        help="training annotations, for count groups and frequencies (default: no count groups, "
        "frequencies of --annotations)",
    )
    add("--eval", nargs="+", choices=("bbox", "segm"), default=["bbox"], help="default: bbox")
    add(
        "--method",
        choices=(*METHODS, "both"),
        default="fast",
        help="fast: faster-coco-eval; official: the package lvis; both: compare them, exit status "
        "1 if they differ by more than 1e-6 (default: fast)",
    )
    add("--out", metavar="JSON", type=Path, help="write the figures here, in percent")
    add(
        "--legacy-widths",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="of a .pkl: width = x2 - x1 + 1, as mmdetection 1 has it; x2 - x1 without "
        "(default: with)",
    )
    add("--no-progress", action="store_true", help="show no bars")
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main())
