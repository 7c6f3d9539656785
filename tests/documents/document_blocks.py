"""The fenced blocks of all pages, what the comment before each says of it, and how they are run.

A comment on the line before a block's fence:

    <!-- run -->                 in an empty folder
    <!-- run: SETTING -->        in one that `document_settings.py` has prepared
    <!-- run: continued -->      in the folder of the block before it
    <!-- not run: REASON -->     the syntax is checked, and the options of our own programs
    <!-- run in mmdet: ... -->   in the environment that has mmdet (or detectron2); not run as well

Blocks of `text` are output and need none. Data (`json`, `toml`) are parsed.
"""

import ast
import json
import os
import re
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import stand_ins

ROOT = Path(__file__).parents[2]
PATTERNS = ("*.md", "docs/**/*.md", "benchmarks/**/*.md", "examples/**/*.md")
PAGES = sorted(page.relative_to(ROOT) for pattern in PATTERNS for page in ROOT.glob(pattern))
FRAMEWORKS = ("mmdet", "detectron2")
LANGUAGES = ("bash", "json", "python", "text", "toml", "yaml")
CODE = ("bash", "python")

_FENCE = re.compile(r"^( *)(```+|~~~+)([^\n]*)\n(.*?)^\1\2 *$", re.M | re.S)
_MARK = re.compile(r"<!-- (run|not run)(?: in (\w+))?(?:: (\S.*?))? -->")


@dataclass(frozen=True)
class Block:
    """A fenced block; `text` is a setting's name, or the reason why it is not run."""

    page: Path
    line: int
    language: str
    code: str
    mark: str  # the line before the fence, as it stands
    runs: bool | None = None  # None where the mark says nothing
    framework: str | None = None
    text: str | None = None

    @property
    def place(self) -> str:
        return f"{self.page}:{self.line}"


def blocks_of(page: Path) -> Iterator[Block]:
    """Yield the blocks of a page, from the top."""
    text = (ROOT / page).read_text(encoding="utf-8")
    for fence in _FENCE.finditer(text):
        before = text[: fence.start()].split("\n")
        mark = before[-2].strip() if len(before) > 1 else ""
        found = _MARK.fullmatch(mark)
        said = {}
        if found:
            said = {"runs": found[1] == "run", "framework": found[2], "text": found[3]}
        code = textwrap.dedent(fence[4])
        yield Block(page, len(before), fence[3].strip(), code, mark, **said)


BLOCKS = [block for page in PAGES for block in blocks_of(page)]


def chains(framework: str | None) -> list[list[Block]]:
    """Return the blocks that run in a framework's environment, each with those that continue it.

    A chain that another page has word for word is left out.
    """
    found: list[list[Block]] = []
    for block in BLOCKS:
        if not block.runs or block.framework != framework:
            continue
        if block.text == "continued" and found and found[-1][0].page == block.page:
            found[-1].append(block)
        else:
            found.append([block])
    seen: set[tuple[Any, ...]] = set()
    unique = []
    for chain in found:
        key = (chain[0].text, *(block.code for block in chain))
        if key not in seen:
            unique.append(chain)
        seen.add(key)
    return unique


def place_of_chain(chain: list[Block]) -> str:
    """Return where a chain begins, for the name of its test."""
    return chain[0].place


def not_run(framework: str | None) -> list[Block]:
    """Return the blocks of code whose mark gives a reason for not running them."""
    return [b for b in BLOCKS if b.runs is False and b.framework == framework]


def run_chain(chain: list[Block], folder: Path, names: dict[str, Any]) -> None:
    """Run blocks one after the other; Python blocks share `names` and the working directory."""
    for block in chain:
        if block.language == "python":
            source = "\n" * block.line + block.code  # errors name the line of the page
            exec(compile(source, str(block.page), "exec"), names)
        else:
            run_commands(block, folder)


def run_commands(block: Block, folder: Path) -> str:
    """Run a block of shell commands with stand-ins for our programs; return what it printed."""
    return _bash(block, folder, "set -euo pipefail\n" + block.code, parse_only=False)


def check_without_running(block: Block, folder: Path) -> None:
    """Check a block's syntax, and the options of our own programs in it."""
    if block.language == "python":
        ast.parse(block.code, str(block.page))
    elif block.language == "bash":
        link_repository(folder)
        # Whatever is not ours is not there, and does nothing.
        unknown = "command_not_found_handle() { return 0; }\n"
        refused = folder / "refused.txt"
        printed = _bash(block, folder, unknown + block.code + "\ntrue", parse_only=True)
        assert not refused.exists(), f"{block.place}: {refused.read_text()}\n{printed}"


def link_repository(folder: Path) -> None:
    """Let a folder look like a clone, for programs that are named by their path in it."""
    for name in ("examples", "benchmarks", "docs", "tests", "pyproject.toml", "mkdocs.yml"):
        if not (folder / name).exists():
            (folder / name).symlink_to(ROOT / name)


def _bash(block: Block, folder: Path, script: str, *, parse_only: bool) -> str:
    bin_folder = stand_ins.write(folder / ".bin")
    path = [str(bin_folder)] if parse_only else [str(bin_folder), os.environ["PATH"]]
    package = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    environment = {
        **os.environ,
        **{"PATH": os.pathsep.join(path), "PYTHONPATH": package, "OMP_NUM_THREADS": "1"},
        **{"MPLBACKEND": "Agg", stand_ins.PARSE_ONLY: str(folder) if parse_only else ""},
    }
    done = subprocess.run(
        ["/bin/bash", "-c", script],
        cwd=folder,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, f"{block.place}: exit {done.returncode}\n{done.stdout[-4000:]}"
    return done.stdout


def parse_data(block: Block) -> None:
    """Read a block of data."""
    if block.language == "json":
        json.loads(block.code)
    elif block.language == "toml":
        if sys.version_info >= (3, 11):
            import tomllib
        else:
            import tomli as tomllib
        tomllib.loads(block.code)
