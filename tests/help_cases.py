"""Programs of the repository, found by themselves, and what the help of any of them has to have."""

import argparse
import contextlib
import io
import re
import runpy
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FOLDERS = ("balanced_group_softmax", "examples", "benchmarks", "docs")
# Those that need one of them skip where it is missing.
OPTIONAL = {"mmcv", "mmdet", "mmengine", "detectron2", "jupytext", "nbclient"}
# Of detectron2's own parser, whose texts are not ours.
DETECTRON2 = {"num_gpus", "num_machines", "machine_rank", "dist_url", "config_file"}
WIDTHS = (80, 100)


def programs(*folders: str) -> list[str]:
    """Every Python file in some folders that can be run, as a path from the root."""
    return [
        path.relative_to(ROOT).as_posix()
        for folder in folders
        for path in sorted((ROOT / folder).rglob("*.py"))
        if 'if __name__ == "__main__":' in path.read_text(encoding="utf-8")
    ]


def parser_of(program: str, monkeypatch: pytest.MonkeyPatch) -> tuple[argparse.ArgumentParser, str]:
    """Run a program with `--help`, in this process; its parser, and what it printed."""
    path, used = ROOT / program, []
    source = path.read_text(encoding="utf-8")
    # One that looks at no options would do its work.
    assert re.search(r"^import argparse|cli import main", source, re.M), f"{program} has no options"
    parse = argparse.ArgumentParser.parse_known_args

    def note(self: argparse.ArgumentParser, *args: object, **kwargs: object) -> object:
        used.append(self)
        return parse(self, *args, **kwargs)  # type: ignore[call-overload]

    monkeypatch.setattr(argparse.ArgumentParser, "parse_known_args", note)
    monkeypatch.setattr("sys.argv", [str(path), "--help"])
    monkeypatch.syspath_prepend(path.parent)
    printed = io.StringIO()
    status = "none: it does its work"
    with contextlib.redirect_stdout(printed):
        try:
            runpy.run_path(str(path), run_name="__main__")
        except SystemExit as left:
            status = str(left.code)
        except ModuleNotFoundError as error:
            name = (error.name or "").partition(".")[0]
            if name not in OPTIONAL:
                raise
            pytest.skip(f"{name} is not installed")
    assert status == "0", f"{program} --help: exit status {status}"
    assert used, f"{program} has no options"
    return used[0], printed.getvalue()


def check_help(program: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run a program with `--help`, and check what it and its commands say."""
    parser, printed = parser_of(program, monkeypatch)
    assert parser.description
    assert "exit status" in printed
    assert " ".join(parser.description.split())[:60] in " ".join(printed.split())
    for command, one in commands(parser):
        faults = [*faults_of_text(one), *faults_of_options(one)]
        for width in WIDTHS:
            monkeypatch.setenv("COLUMNS", str(width))
            faults += [line for line in one.format_help().splitlines() if len(line) > width]
        assert not faults, f"{program} {command}: {faults}"


def commands(parser: argparse.ArgumentParser) -> Iterator[tuple[str, argparse.ArgumentParser]]:
    """Yield a parser, and those of its commands, by name."""
    yield "", parser
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            yield from action.choices.items()


def faults_of_text(parser: argparse.ArgumentParser) -> Iterator[str]:
    """Yield what is wrong with the text around the options."""
    description = (parser.description or "").strip()
    if not description[:1].isupper() or "." not in description:
        yield "no sentence says what it is for"
    text = f"{description}\n{parser.epilog or ''}"
    name = Path(parser.prog.split()[0]).name
    if not any(name in line for line in text.splitlines() if line.startswith("  ")) and (
        f"python docs/tools/{name}" not in text
    ):
        yield "no example"


def faults_of_options(parser: argparse.ArgumentParser) -> Iterator[str]:
    """Yield the options of which it is not said what they mean, or what is without them."""
    for action in parser._actions:
        name = "/".join(action.option_strings) or action.metavar or action.dest
        if action.help == argparse.SUPPRESS or isinstance(action, argparse._SubParsersAction):
            continue
        if len((action.help or "").split()) < 2:
            yield f"{name} has no help"
        elif action.default not in (None, False, [], argparse.SUPPRESS) and (
            "default" not in (action.help or "") and action.dest not in DETECTRON2
        ):
            yield f"{name} does not name its default, {action.default}"
        if action.required and action.option_strings and "required" not in (action.help or ""):
            yield f"{name} is required, and does not say so"
