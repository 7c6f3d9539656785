"""What train.py and test.py share: options of mmdet's tools, and two things that versions need."""

import argparse
import os
import sys
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from mmengine.config import Config, DictAction
from mmengine.logging.history_buffer import HistoryBuffer

EXAMPLES = Path(__file__).resolve().parents[1]


def parser(description: str | None) -> argparse.ArgumentParser:
    """Return a parser with the options of both programs."""
    made = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    made.add_argument("config", type=Path, help="config file of mmdet")
    made.add_argument("--work-dir", help="logs and checkpoints (default: work_dirs/CONFIG)")
    made.add_argument(
        "--launcher", choices=("none", "pytorch"), default="none", help="pytorch: under torchrun"
    )
    made.add_argument(
        "--cfg-options",
        nargs="+",
        action=DictAction,
        metavar="KEY=VALUE",
        help="changes of the config, such as model.backbone.init_cfg=None",
    )
    made.add_argument(
        "--original-geometry",
        action="store_true",
        help="anchors, RoIAlign and clipping of the original, for its converted checkpoints",
    )
    made.add_argument("--local_rank", "--local-rank", type=int, help=argparse.SUPPRESS)
    return made


def read_config(args: argparse.Namespace) -> Config:
    """Read the config and apply the options.

    Raises:
        OSError: There is no such file.
        ValueError: An option does not fit the config.
    """
    if not args.config.is_file():
        raise FileNotFoundError(f"{args.config}: Expected a config file, found none")
    config = Config.fromfile(args.config)
    if args.cfg_options is not None:
        config.merge_from_dict(args.cfg_options)
    if args.original_geometry:
        from balanced_group_softmax.adapters.mmdet.original_geometry import use_original_geometry

        config.model = use_original_geometry(config.model)
    config.launcher = args.launcher
    if args.launcher == "pytorch" and not torch.cuda.is_available():
        config.model_wrapper_cfg = dict(
            type="MMDistributedDataParallel", device_ids=None, broadcast_buffers=False
        )
    config.work_dir = args.work_dir or config.get(
        "work_dir", os.path.join("work_dirs", args.config.stem)
    )
    return config


def processes(launcher: str) -> AbstractContextManager[None]:
    """Join the processes of torchrun without a GPU, which mmengine's own start asks for.

    What is wrapped for them has to be gone when the block ends.
    """
    if launcher != "pytorch" or torch.cuda.is_available():
        return nullcontext()
    add_examples_to_path()
    from distributed import process_group

    return process_group(torch.device("cpu"))


def prepare_versions() -> None:
    """Let today's torch and numpy do what mmengine 0.10 and lvis 0.5.3 expect.

    torch reads checkpoints without running code since 2.6, and has to be told of mmengine's own
    harmless class in them. lvis asks for `np.float`, which numpy no longer has; its evaluation gets
    a numpy of its own that does.
    """
    torch.serialization.add_safe_globals(_harmless())
    if hasattr(np, "float"):
        return
    try:
        import lvis.eval
    except ImportError:
        return  # mmdet says what to install
    numpy = ModuleType("numpy")
    numpy.__dict__.update(vars(np), float=float)
    lvis.eval.np = numpy


def _harmless() -> list[Any]:
    dtypes: list[Any] = [np.dtype, *(type(np.dtype(kind)) for kind in ("f4", "f8", "i8"))]
    multiarray = sys.modules.get("numpy._core.multiarray") or sys.modules["numpy.core.multiarray"]
    attributes = [(_statistic, f"{module}.getattr") for module in ("builtins", "__builtin__")]
    arrays = [np.ndarray, multiarray._reconstruct, multiarray.scalar, *dtypes]
    return [HistoryBuffer, *arrays, *attributes]


def _statistic(owner: Any, name: str) -> Any:
    """Stands for `getattr` in checkpoints: the methods of a HistoryBuffer and nothing else."""
    if owner is not HistoryBuffer or name not in ("mean", "max", "min", "current"):
        raise ValueError(f"Expected a statistic of HistoryBuffer, got {name!r} of {owner!r}")
    return getattr(owner, name)


def add_examples_to_path() -> None:
    """Let the evaluation and the drawn data set of the examples be imported."""
    if str(EXAMPLES) not in sys.path:
        sys.path.insert(1, str(EXAMPLES))
