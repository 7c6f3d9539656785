"""A small data set for the tests of the training pipeline, and a device."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch


@pytest.fixture(scope="package", autouse=True)
def _on_the_cpu() -> Iterator[None]:
    """Train on the CPU, where there is a GPU too: runs are compared bit by bit."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("CUDA_VISIBLE_DEVICES", "")
        patched.setattr(torch.cuda, "is_available", lambda: False)
        yield


@pytest.fixture(scope="module")
def few(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a data set of nine training images in three categories."""
    import lvis_demo_data
    from pipeline_cases import FEW

    folder = tmp_path_factory.mktemp("few") / "data"
    lvis_demo_data.write_demo_data(folder, 0, categories=FEW, val_instances=2)
    return folder
