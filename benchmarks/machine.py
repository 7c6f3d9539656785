"""What a reader needs in order to judge figures: machine, versions, commit."""

import os
import platform
import re
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import numpy as np
import torch

PACKAGES = ("triton", "torchvision", "liger-kernel", "quack-kernels")


def environment(device: torch.device) -> dict[str, str | int]:
    """Facts about machine and software, each a word or a number."""
    facts: dict[str, str | int] = {
        "processor": _processor(),
        "cores": cores(),
        "threads": torch.get_num_threads(),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": np.__version__,
        "commit": commit(),
    }
    for package in PACKAGES:
        try:
            facts[package] = version(package)
        except PackageNotFoundError:
            facts[package] = "not installed"
    if device.type == "cuda":
        facts["gpu"] = torch.cuda.get_device_name(device)
        facts["cuda"] = str(torch.version.cuda or torch.version.hip)
        facts["driver"] = _driver()
    return facts


def machine_name(device: torch.device) -> str:
    """A file name: the GPU's model, or the processor's and how many cores there are of it."""
    if device.type == "cuda":
        model = torch.cuda.get_device_name(device)
    else:
        model = f"{_processor()} {cores()} core{'' if cores() == 1 else 's'}"
    model = re.sub(r"\([^)]*\)|@.*?GHz|\b(CPU|Processor|\d+-Core)\b", " ", model)
    return re.sub(r"[^a-z0-9.]+", "-", model.lower()).strip("-.")


def cores() -> int:
    """Processor cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def commit() -> str:
    """The commit that is measured, marked where files differ from it."""
    return _output(["git", "describe", "--always", "--dirty", "--abbrev=12"]) or "unknown"


def _driver() -> str:
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    return (_output(query) or "unknown").splitlines()[0]


def _output(command: list[str]) -> str:
    """What a program prints; nothing where it is missing or fails."""
    try:
        done = subprocess.run(
            command, cwd=Path(__file__).parent, capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return ""
    return done.stdout.strip()


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    named = (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    return next(named, platform.machine())
