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
from mmengine.runner import Runner

from balanced_group_softmax.cli_program import HelpFormatter
from balanced_group_softmax.legacy.torch_files import load_torch

EXAMPLES = Path(__file__).resolve().parents[1]


STATUS = """\
exit status: 0 if done; 2 if a file, an option or the config is not what it should be, with a line
on standard error; 130 after Ctrl-C.
"""


class Changes(DictAction):
    """Changes of the config, KEY=VALUE; mmengine's own raises where there is no `=`."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: Any,
        option_string: str | None = None,
    ) -> None:
        for value in values:
            if "=" not in value:
                parser.error(f"argument {option_string}: expected KEY=VALUE, got {value!r}")
        super().__call__(parser, namespace, values, option_string)


def parser(description: str | None) -> argparse.ArgumentParser:
    """Return a parser with the options of both programs."""
    made = argparse.ArgumentParser(
        description=description, epilog=STATUS, formatter_class=HelpFormatter
    )
    made.add_argument(
        "config",
        type=Path,
        metavar="CONFIG",
        help="config file of mmdet, such as those in examples/mmdet/configs/",
    )
    made.add_argument(
        "--work-dir",
        metavar="DIR",
        help="folder of logs and checkpoints (default: `work_dir` of the config, or else "
        "work_dirs/ and the config's name)",
    )
    made.add_argument(
        "--launcher",
        choices=("none", "pytorch"),
        default="none",
        help="pytorch where torchrun starts the program, none otherwise (default: none)",
    )
    made.add_argument(
        "--cfg-options",
        nargs="+",
        action=Changes,
        metavar="KEY=VALUE",
        help="changes of the config, such as model.backbone.init_cfg=None, which downloads no "
        "weights",
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
        ValueError: It is no config of mmdet, or an option does not fit it.
    """
    if not args.config.is_file():
        raise FileNotFoundError(f"{args.config}: Expected a config file, found none")
    try:
        config = Config.fromfile(args.config)
    except (OSError, SyntaxError, ValueError) as error:
        raise ValueError(f"{args.config}: Expected a config of mmdet, got {error}") from None
    if "model" not in config:
        found = ", ".join(map(str, list(config)[:3])) or "nothing"
        raise ValueError(f"{args.config}: Expected a config of mmdet with `model`, got {found}")
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


def read_checkpoint(path: str | Path) -> dict[str, Any]:
    """Read a checkpoint of a file, without its records of training.

    Raises:
        OSError: There is no such file.
        ValueError: It is something else, or damaged.
    """
    content = load_torch(Path(path), skip_records=True)
    if not isinstance(content, dict):
        raise ValueError(f"{path}: Expected a checkpoint, got {type(content).__name__}")
    return content


def processes(launcher: str) -> AbstractContextManager[None]:
    """Join the processes of torchrun without a GPU, which mmengine's own start asks for.

    What is wrapped for them has to be gone when the block ends.
    """
    if launcher != "pytorch" or torch.cuda.is_available():
        return nullcontext()
    add_examples_to_path()
    from distributed import process_group

    return process_group(torch.device("cpu"))


def build_runner(config: Config) -> Runner:
    """Build what a config describes.

    Raises:
        ValueError: Something that it names is not there.
    """
    try:
        return Runner.from_cfg(config)
    except (AttributeError, KeyError) as error:
        raise ValueError(f"Expected a config that mmdet can build, got {error}") from None


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
