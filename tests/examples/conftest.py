"""A small data set for the tests of the training pipeline."""

from pathlib import Path

import pytest


@pytest.fixture(scope="module")
def few(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a data set of nine training images in three categories."""
    import lvis_demo_data
    from pipeline_cases import FEW

    folder = tmp_path_factory.mktemp("few") / "data"
    lvis_demo_data.write_demo_data(folder, 0, categories=FEW, val_instances=2)
    return folder
