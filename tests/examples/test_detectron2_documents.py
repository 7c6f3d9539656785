"""The blocks of the documentation that need detectron2 run, or say why they are not run."""

import sys
from pathlib import Path

import pytest

pytest.importorskip(
    "detectron2.modeling", reason="detectron2 is not installed: docs/detectron2.md says how"
)
sys.path.insert(0, str(Path(__file__).parents[1] / "documents"))

import document_blocks as documents
from document_settings import run_in_its_setting


@pytest.mark.parametrize("chain", documents.chains("detectron2"), ids=documents.place_of_chain)
def test_blocks_run(
    chain: list[documents.Block], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_in_its_setting(chain, tmp_path, monkeypatch)


@pytest.mark.parametrize("block", documents.not_run("detectron2"), ids=lambda block: block.place)
def test_options_of_blocks_that_are_not_run(block: documents.Block, tmp_path: Path) -> None:
    documents.check_without_running(block, tmp_path)
