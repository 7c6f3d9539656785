"""`--help` of the programs that need mmdet."""

import sys
from pathlib import Path

import pytest

pytest.importorskip("mmdet.registry", reason="mmdet is not installed: docs/mmdet.md says how")

sys.path.insert(0, str(Path(__file__).parents[1]))
from help_cases import check_help, programs


@pytest.mark.parametrize("program", programs("examples/mmdet"))
def test_every_program_explains_itself(program: str, monkeypatch: pytest.MonkeyPatch) -> None:
    check_help(program, monkeypatch)
