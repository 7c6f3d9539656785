"""The documentation site builds without a warning, and has what its pages promise."""

import ast
import os
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
NEEDED = ("mkdocs", "material", "mkdocstrings", "latex2mathml")
# What users do not import: implementations, the command line, parts of adapters.
INTERNAL = ("ops", "triton_kernels", "cli", "detectron2_layouts", "groups")


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    missing = [name for name in NEEDED if find_spec(name) is None]
    if missing:
        pytest.skip(f"{', '.join(missing)} not installed; pip install -e '.[docs]'")
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)]
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


def pages(site: Path) -> dict[str, str]:
    """The HTML of each page by its name, those from outside docs/ included."""
    found = {
        page.parent.name: page.read_text(encoding="utf-8") for page in site.glob("*/index.html")
    }
    found["index"] = (site / "index.html").read_text(encoding="utf-8")
    assert {page.stem for page in (ROOT / "docs").glob("*.md")} | {"benchmarks"} <= set(found)
    return found


def test_every_page_is_there_and_nothing_is_left_of_its_markup(site: Path) -> None:
    for name, html in pages(site).items():
        text = re.sub(r"<(script|style|pre|code)\b.*?</\1>", "", html, flags=re.S)
        for left in (".. math::", "$$", ":math:", ":func:", "```", "](", "&gt;&gt;&gt;", "<merror"):
            assert left not in text, f"{left!r} in the page of {name}"
        assert "```" not in html, f"a block of {name} is none in its page"
        assert not re.search("<!-- (not )?run", html), f"a mark in the page of {name}"


def test_formulas_of_docstrings_are_mathml(site: Path) -> None:
    sources = (ROOT / "balanced_group_softmax").rglob("*.py")
    written = sum(source.read_text(encoding="utf-8").count(".. math::") for source in sources)
    assert pages(site)["api"].count('display="block"') >= written > 0


def test_public_names_are_in_the_reference(site: Path) -> None:
    html = pages(site)["api"]
    named = set(re.findall(r'id="balanced_group_softmax\.(?:\w+\.)*(\w+)"', html))
    for source in (ROOT / "balanced_group_softmax").rglob("*.py"):
        if source.parent.name in INTERNAL or source.name.startswith(INTERNAL):
            continue
        body = ast.parse(source.read_text(encoding="utf-8")).body
        defined = {n.name for n in body if isinstance(n, ast.ClassDef | ast.FunctionDef)}
        public = [n.value for n in body if ast.unparse(n).startswith("__all__ = ")]
        absent = defined & {name for value in public for name in ast.literal_eval(value)} - named
        assert not absent, f"{source.name}: {sorted(absent)}"


def test_the_site_asks_no_other_host_for_anything(site: Path) -> None:
    for name, html in pages(site).items():
        fetched = re.findall(r'<(?:script|img|link)\b[^>]*(?:src|href)="(https?:[^"]*)"', html)
        assert not fetched, f"{name}: {fetched}"


def test_links_out_of_docs_lead_somewhere() -> None:
    """On GitHub; the site has them as text."""
    for page in (ROOT / "docs").glob("*.md"):
        for path in re.findall(r"\]\((\.\./[^)#\s]+)", page.read_text(encoding="utf-8")):
            assert (page.parent / path).exists(), f"{page.name}: {path}"
