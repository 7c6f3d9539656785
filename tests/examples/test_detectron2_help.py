"""`--help` of the programs that need detectron2."""

import sys
from pathlib import Path

import pytest

pytest.importorskip("detectron2", reason="detectron2 is not installed: docs/detectron2.md says how")

sys.path.insert(0, str(Path(__file__).parents[1]))
from help_cases import check_help, programs


@pytest.mark.parametrize("program", programs("examples/detectron2"))
def test_every_program_explains_itself(program: str, monkeypatch: pytest.MonkeyPatch) -> None:
    check_help(program, monkeypatch)
