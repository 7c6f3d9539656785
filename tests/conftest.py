"""Shared fixtures: where the real LVIS facts are, and steady settings for hypothesis and torch."""

import os
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, settings

settings.register_profile(
    "default", deadline=None, suppress_health_check=[HealthCheck.too_slow], print_blob=True
)
settings.load_profile("default")

# Without a GPU the Triton kernels are run by Triton's interpreter. Triton asks for it once, when it
# is imported, which importing torch does not do.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers() -> int:
    """How many processes `-n auto` starts: one for each core, up to eight.

    They share the threads as well. Threads that wait for each other on busy cores are many times
    slower than one alone.
    """
    cores = os.cpu_count() or 1
    if hasattr(os, "sched_getaffinity"):
        cores = len(os.sched_getaffinity(0))
    processes = min(cores, 8)
    os.environ.setdefault("OMP_NUM_THREADS", str(cores // processes))
    return processes


@pytest.fixture(scope="session")
def lvis_data() -> Path:
    """The folder with real LVIS facts; skips, with the reason, where it is absent."""
    named = os.environ.get("BGS_LVIS_DATA")
    folder = Path(named) if named else Path(__file__).parents[2] / "shared" / "data"
    if not folder.is_dir():
        pytest.skip(f"real LVIS facts not found at {folder}; set BGS_LVIS_DATA to their folder")
    return folder


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)
