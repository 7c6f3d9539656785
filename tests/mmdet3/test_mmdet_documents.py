"""The blocks of the documentation that need mmdet run, or say why they are not run."""

import sys
from pathlib import Path

import pytest

pytest.importorskip("mmdet.registry", reason="mmdet is not installed: docs/mmdet.md says how")
sys.path.insert(0, str(Path(__file__).parents[1] / "documents"))

import document_blocks as documents
from document_settings import run_in_its_setting


@pytest.mark.parametrize("chain", documents.chains("mmdet"), ids=documents.place_of_chain)
def test_blocks_run(
    chain: list[documents.Block], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_in_its_setting(chain, tmp_path, monkeypatch)


@pytest.mark.parametrize("block", documents.not_run("mmdet"), ids=lambda block: block.place)
def test_options_of_blocks_that_are_not_run(block: documents.Block, tmp_path: Path) -> None:
    documents.check_without_running(block, tmp_path)
