"""Stand-ins for the programs that documented commands start, for the search path of a shell.

`python`, `torchrun` and the console script run the real program, with options behind those of the
command that make it small: few steps on few small images. `pip` installs nothing, and looks
whether the extras that it is asked for exist. With `PARSE_ONLY` in the environment no program goes
further than its own reading of the command line.
"""

import itertools
import os
import re
import runpy
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).parents[2]
PARSE_ONLY = "DOCUMENTS_PARSE_ONLY"  # names the folder to which refusals are written
OURS = ("benchmarks/", "docs/", "examples/", "tests/")
NAMES = ("python", "torchrun", "pip", "balanced-group-softmax")
SMALL_DATA = ".small"  # in the working directory: a drawn data set of nine images

SIZES = ("--short-sides", "64", "--long-side", "96", "--rois-per-image", "32")
STEPS = [
    *(option for stage in ("", "softmax.", "bags.") for option in (f"--{stage}steps", "2")),
    *("--batch-size", "2", "--weights", "none", "--num-workers", "0", "--device", "cpu"),
]
FROM_NOTHING = ("--norm", "batch", "--trainable-layers", "5")  # no weights to download
TIMED = ("--rounds", "1", "--max-seconds", "0.01")
# What makes a program small, by its path in the repository.
SMALL = {
    "examples/torchvision_lvis_train.py": (*SIZES, *STEPS),
    "examples/compare_methods.py": (*SIZES, *STEPS, "--seeds", "0", "--methods", "bags"),
    "examples/torchvision_lvis_eval.py": ("--num-workers", "0"),
    "examples/classification.py": ("--seeds", "0", "--epochs", "1"),
    "benchmarks/bench_loss.py": (*TIMED, "--rows", "64"),
    "benchmarks/bench_scores.py": (*TIMED, "--rows", "64"),
    "benchmarks/bench_detections.py": (*TIMED, "--rows", "50"),
    "benchmarks/run_all.py": ("--device", "cpu", "--quick", "--minutes", "0", "--output", "out"),
}
# The same for detectron2, whose entries take keys of the configuration last.
D2_SMALL = {
    "examples/detectron2/lazyconfig_train_net.py": (
        *("train.max_iter=2", "dataloader.train.total_batch_size=2", "train.device=cpu"),
    ),
    "examples/detectron2/train_net.py": (
        *("MODEL.DEVICE", "cpu", "DATALOADER.NUM_WORKERS", "0"),
        *("SOLVER.REFERENCE_WORLD_SIZE", "0", "SOLVER.IMS_PER_BATCH", "2", "SOLVER.STEPS", "()"),
        *("SOLVER.MAX_ITER", "1", "INPUT.MIN_SIZE_TRAIN", "(64,)", "INPUT.MIN_SIZE_TEST", "64"),
    ),
}
SMALL |= D2_SMALL
DRAWN = ("examples/torchvision_lvis_train.py", "examples/compare_methods.py")
NEEDS = {"examples/mmdet/": "mmdet", "examples/detectron2/": "detectron2"}


def write(folder: Path) -> Path:
    """Write the stand-ins into a folder, and return it."""
    folder.mkdir(exist_ok=True)
    for name in NAMES:
        path = folder / name
        path.write_text(f'#!/bin/sh\nexec "{sys.executable}" "{__file__}" {name} "$@"\n')
        path.chmod(0o755)
    return folder


def main(name: str, arguments: Sequence[str]) -> int:
    parse_only = bool(os.environ.get(PARSE_ONLY))
    arguments = [a for a in arguments if a != "..."]  # as before
    if name == "python" and arguments[:2] == ["-m", "pip"]:
        name, arguments = "pip", arguments[2:]
    if name == "pip":
        return check_install(arguments)
    if name == "balanced-group-softmax":
        return start(["-m", "balanced_group_softmax.cli"], arguments, parse_only)
    launcher = []
    if name == "torchrun":
        place = next(i for i, argument in enumerate(arguments) if argument.endswith(".py"))
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
        arguments = arguments[place:]
    if not arguments or not arguments[0].endswith(".py"):
        return other_python(arguments, parse_only)
    program = arguments[0]
    if parse_only and not program.startswith(OURS):
        return 0
    if not Path(program).is_file():
        raise ValueError(f"Expected a program, got {program}, which is not there")
    for path in arguments[1:]:
        if path.startswith(OURS) and not Path(path).exists():
            raise ValueError(f"Expected a file, got {path}, which is not there")
    if parse_only:
        no_gpu = ["cpu" if word == "cuda" else word for word in arguments[1:]]
        return start([program], no_gpu, True)
    small = list(SMALL.get(program, ()))
    if program in DRAWN and any("/configs/" in argument for argument in arguments):
        small += FROM_NOTHING
    if program == "examples/detectron2/train_net.py" and "MODEL.WEIGHTS" not in arguments:
        small += ["MODEL.WEIGHTS", ""]  # no weights to download
    if program in DRAWN and "--annotations" not in arguments:
        small += drawn_data(Path(SMALL_DATA))
    return start([*launcher, program], [*arguments[1:], *small], False)


def draw(folder: Path) -> None:
    """Write `train.json`, `train/`, `val.json`, `val/`: nine training images, three categories."""
    sys.path.insert(0, str(ROOT / "examples"))
    import lvis_demo_data

    few = (("star", "red", 30), ("disc", "blue", 12), ("bar", "cyan", 2))
    categories = [lvis_demo_data.Category(*what) for what in few]
    lvis_demo_data.write_demo_data(folder, 0, categories=categories, val_instances=2)


def drawn_data(folder: Path) -> list[str]:
    """Return the options that name a drawn data set, which is drawn if it is not there."""
    if not folder.exists():
        draw(folder)
    parts = {"--annotations": "train.json", "--images": "train"}
    parts |= {"--val-annotations": "val.json", "--val-images": "val"}
    return [word for option, name in parts.items() for word in (option, str(folder / name))]


def start(program: Sequence[str], arguments: Sequence[str], parse_only: bool) -> int:
    """Run a program of ours, or let it read its command line."""
    if parse_only:
        return parse(program, arguments)
    return subprocess.run([sys.executable, *program, *arguments]).returncode


def parse(program: Sequence[str], arguments: Sequence[str]) -> int:
    """Run a program to the end of its first complete reading of the command line."""
    import argparse

    framework = next((need for path, need in NEEDS.items() if program[0].startswith(path)), None)
    if framework and not importable(framework):
        return 0  # its own test session looks at it
    whole = argparse.ArgumentParser.parse_args

    def parse_and_stop(self: argparse.ArgumentParser, *args: object, **more: object) -> None:
        whole(self, *args, **more)  # type: ignore[arg-type]
        raise SystemExit(0)

    argparse.ArgumentParser.parse_args = parse_and_stop  # type: ignore[assignment, method-assign]
    sys.argv = [program[-1], *arguments]
    if program[0] == "-m":
        runpy.run_module(program[1], run_name="__main__", alter_sys=True)
    else:
        sys.path[0] = str(Path(program[0]).parent.resolve())
        runpy.run_path(program[0], run_name="__main__")
    raise ValueError(f"Expected {program[-1]} to read its command line, which it did not")


def importable(framework: str) -> bool:
    from importlib.util import find_spec

    return find_spec(framework) is not None


def other_python(arguments: Sequence[str], parse_only: bool) -> int:
    """`python -c CODE`, `python -m MODULE`."""
    if not parse_only:
        return subprocess.run([sys.executable, *arguments]).returncode
    if arguments[:1] == ["-c"]:
        compile(arguments[1], "-c", "exec")
    elif arguments[:2] == ["-m", "pytest"]:
        for before, path in itertools.pairwise(arguments[1:]):
            if path.startswith("-") or before in {"-n", "--dist", "-k"}:
                continue
            if not Path(path.split("::")[0]).exists():
                raise ValueError(f"Expected tests, got {path}, which is not there")
    return 0


def check_install(arguments: Sequence[str]) -> int:
    """Look whether what `pip install` is asked for can be meant: a requirement, or our extras."""
    from packaging.requirements import Requirement

    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    section = project.split("[project.optional-dependencies]")[1].split("\n[")[0]
    known = set(re.findall(r"^([\w-]+) = \[", section, re.M))
    for argument in arguments[1:]:
        ours = re.fullmatch(r"\.\[(.*)\]", argument)
        if ours:
            extras = set(ours[1].split(","))
        elif argument.startswith("-") or argument in {".", "./detectron2"}:
            continue
        else:
            requirement = Requirement(argument)
            extras = requirement.extras if requirement.name == "balanced-group-softmax" else set()
        if extras - known:
            raise ValueError(f"Expected extras among {sorted(known)}, got {sorted(extras - known)}")
    return 0


if __name__ == "__main__":
    try:
        code: int | str | None = main(sys.argv[1], sys.argv[2:])
    except SystemExit as end:
        code = end.code
    except Exception as error:
        code = f"{type(error).__name__}: {error}"
    if code and os.environ.get(PARSE_ONLY):
        with open(Path(os.environ[PARSE_ONLY]) / "refused.txt", "a", encoding="utf-8") as file:
            file.write(f"{' '.join(sys.argv[1:])}: {code}\n")
    sys.exit(code)
