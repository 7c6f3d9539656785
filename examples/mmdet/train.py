r"""Train a detector of mmdet 3, plain softmax or Balanced Group Softmax, with mmdet's own runner.

    C=examples/mmdet/configs
    python examples/mmdet/train.py $C/bags/CONFIG.py
    torchrun --nproc-per-node 8 examples/mmdet/train.py $C/bags/CONFIG.py \
        --launcher pytorch

BAGS starts from a trained detector: `load_from` in the config, or `--load-from`. On the data set
that the examples draw, without any download:

    python examples/mmdet/train.py $C/demo/faster-rcnn_demo.py
    python examples/mmdet/train.py $C/demo/bags_faster-rcnn_demo.py
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from mmengine.runner import find_latest_checkpoint
from runs import (
    add_examples_to_path,
    build_runner,
    parser,
    prepare_versions,
    processes,
    read_checkpoint,
    read_config,
)

from balanced_group_softmax.cli_program import FAILED, ended, line_of


def main(argv: Sequence[str] | None = None) -> int:
    args = parse_arguments(argv)
    try:
        config = read_config(args)
        if args.load_from is not None:
            read_checkpoint(args.load_from)  # else mmengine would look at it after the data
            config.load_from = str(args.load_from)
        last = find_latest_checkpoint(config.work_dir) if args.resume else None
        if last is not None:  # or mmengine would go on from `load_from`, as if it were of this run
            config.load_from, config.resume = last, True
        if args.amp:
            config.optim_wrapper.update(type="AmpOptimWrapper", loss_scale="dynamic")
        if args.seed is not None:
            config.randomness = dict(seed=args.seed)
        if args.config.parent.name == "demo":
            draw_demo_data(Path(config.data_root))
        prepare_versions()
        with processes(args.launcher):
            build_runner(config).train()
    except (OSError, TypeError, ValueError) as error:
        print(f"error: {line_of(error)}", file=sys.stderr)
        return FAILED
    return 0


def draw_demo_data(folder: Path) -> None:
    """Draw the data set of the examples where it is missing."""
    if folder.exists():
        return
    add_examples_to_path()
    from lvis_demo_data import write_demo_data

    try:
        write_demo_data(folder)  # which appears whole
    except OSError:
        if not folder.exists():  # else another process was sooner, with the same
            raise


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    made = parser(__doc__)
    add = made.add_argument
    add(
        "--load-from",
        type=Path,
        metavar="FILE",
        help="checkpoint to start from, of a trained softmax detector for BAGS (default: "
        "`load_from` of the config)",
    )
    add("--resume", action="store_true", help="go on from the last checkpoint of the work dir")
    add("--amp", action="store_true", help="train in mixed precision")
    add(
        "--seed",
        type=int,
        metavar="N",
        help="seed of weights, data and samplers (default: a random one)",
    )
    return made.parse_args(argv)


if __name__ == "__main__":
    sys.exit(ended(main))
