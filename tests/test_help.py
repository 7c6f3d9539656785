"""`--help` of every program."""

import argparse
import subprocess
from pathlib import Path

import pytest
from help_cases import FOLDERS, ROOT, check_help, faults_of_options, faults_of_text, programs

from balanced_group_softmax.cli_program import HelpFormatter

pytest.importorskip("torchvision")
pytest.importorskip("matplotlib")

SCRIPTS = sorted((ROOT / ".ci").iterdir()) if (ROOT / ".ci").is_dir() else []


@pytest.mark.parametrize("program", programs(*FOLDERS))
def test_every_program_explains_itself(program: str, monkeypatch: pytest.MonkeyPatch) -> None:
    check_help(program, monkeypatch)


def test_programs_are_found() -> None:
    found = programs(*FOLDERS)
    assert len(found) >= 20
    assert "examples/torchvision_lvis_train.py" in found
    assert "balanced_group_softmax/__main__.py" in found


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_scripts_of_ci_explain_themselves(script: Path) -> None:
    result = subprocess.run([script, "--help"], capture_output=True, text=True, timeout=20)
    assert result.returncode == 0
    assert f".ci/{script.name}" in result.stdout
    assert "set -e" not in result.stdout
    assert max(map(len, result.stdout.splitlines())) <= 100


@pytest.mark.parametrize(
    ("options", "fault"),
    [
        ({"help": None}, "--rows has no help"),
        ({"help": "rows of logits", "default": 3}, "--rows does not name its default, 3"),
        ({"help": "rows of logits", "required": True}, "--rows is required, and does not say so"),
    ],
)
def test_a_fault_is_noticed(options: dict[str, object], fault: str) -> None:
    parser = argparse.ArgumentParser(prog="a.py", description="Measure. See\n\n    python a.py\n")
    assert list(faults_of_text(parser)) == []
    assert list(faults_of_options(parser)) == []
    parser.add_argument("--rows", **options)  # type: ignore[arg-type]
    assert list(faults_of_options(parser)) == [fault]
    parser.description = "measures things"
    assert list(faults_of_text(parser)) == ["no sentence says what it is for", "no example"]


TEXT = """\
First words of a paragraph that is longer than the line, and
goes on:

    python example.py --with a very long line that stays as it is, whatever the width may be

- a point of a list, which is longer than a line as well,
  and goes on
- another
Words after the list: a table
  name   what it is
"""


def test_paragraphs_are_wrapped_and_the_rest_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "42")
    parser = argparse.ArgumentParser("p", description=TEXT, formatter_class=HelpFormatter)
    assert parser.format_help().split("\n\n")[1:-1] == [
        "First words of a paragraph that is\nlonger than the line, and goes on:",
        "    python example.py --with a very long line that stays as it is, whatever the width "
        "may be",
        "- a point of a list, which is longer\n  than a line as well, and goes on\n- another\n"
        "Words after the list: a table\n  name   what it is",
    ]
