"""A hook of mkdocs: the site's pages, of files that are written to be read on GitHub.

- Some pages lie outside docs/, beside what they are about. They are pages of the site too.
- Links to other files (sources, examples) work on GitHub, but the site does not have these files,
  and cannot link to the repository until its address is settled. They become plain text with the
  path behind it. All other links are checked by a strict build.
- What a comment says to the tests about the block below it is left out.
- Code blocks inside list items are indented by two spaces, which Python-Markdown wants to be four.
"""

import re
from pathlib import Path
from posixpath import dirname, join, normpath
from typing import Any

from mkdocs.structure.files import File

ROOT = Path(__file__).parents[2]
RESULTS = "benchmarks/results/amd-epyc-2-cores"
# Files outside docs/, and what they are called in the site.
INCLUDED = {
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "contributing.md",
    "benchmarks/README.md": "benchmarks.md",
    f"{RESULTS}.md": "benchmark-results.md",
    f"{RESULTS}-loss.png": "images/benchmark-loss.png",
    f"{RESULTS}-scores.png": "images/benchmark-scores.png",
    "examples/mmdet/README.md": "mmdet-configs.md",
}
SOURCES = {place: source for source, place in INCLUDED.items()}

_FENCE = re.compile(r"^( *)(```|~~~).*?^\1\2[ ]*$", re.M | re.S)
_MARK = re.compile(r"^ *<!-- (?:run|not run)\b.* -->\n", re.M)
_LINK = re.compile(r"(\(?)(!?)\[([^\]]+)\]\(([^)#\s]+)(#[^)]*)?\)")


def on_files(files: Any, config: Any) -> Any:
    """Add the pages and pictures from outside docs/."""
    for source, place in INCLUDED.items():
        files.append(File.generated(config, place, abs_src_path=str(ROOT / source)))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Rewrite what GitHub understands and the site does not."""
    place = page.file.src_uri
    source = SOURCES.get(place, f"docs/{place}")
    markdown = _MARK.sub("", markdown)
    parts, end = [], 0
    for fence in _FENCE.finditer(markdown):
        parts.append(_with_links(markdown[end : fence.start()], source))
        indent = len(fence[1])
        code = fence[0]
        if 0 < indent < 4:
            code = re.sub(r"^(?=.)", " " * (4 - indent), code, flags=re.M)
        parts.append(code)
        end = fence.end()
    return "".join(parts) + _with_links(markdown[end:], source)


def _with_links(text: str, source: str) -> str:
    """Let links lead to where the site has a file, from a file of the repository."""

    def place_of(link: re.Match[str]) -> str:
        before, picture, label, path, anchor = link.groups("")
        if "://" in path:
            return link[0]
        target = normpath(join(dirname(source), path))
        place = INCLUDED.get(target)
        if place is None and target.startswith("docs/"):
            place = target.removeprefix("docs/")
        if place is not None:
            return f"{before}{picture}[{label}]({place}{anchor})"
        if label.strip("`") in (path, target):
            return f"{before}`{target}`"
        return f"({label}: `{target}`" if before else f"{label} (`{target}`)"

    return _LINK.sub(place_of, text)
