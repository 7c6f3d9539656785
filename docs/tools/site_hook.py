"""What the site needs beyond the pages, which are written to be read on GitHub.

- Links to files outside docs/ (README, sources, examples) work on GitHub, but the site does not
  have these files, and cannot link to the repository until its address is settled. There they
  become plain text with the path behind it. All other links are checked by a strict build.
- What a comment says to the tests about the block below it is left out.
- Code blocks inside list items are indented by two spaces, which Python-Markdown wants to be four.
- Docstrings have formulas and names as Sphinx roles, and examples as doctests. Formulas become
  MathML, which browsers show without any script; names and examples become code.
"""

import re
from typing import Any

from latex2mathml.converter import convert
from markdown import Extension, Markdown
from markdown.preprocessors import Preprocessor

_FENCE = re.compile(r"^( *)(```|~~~).*?^\1\2[ ]*$", re.M | re.S)
_MARK = re.compile(r"^ *<!-- (?:run|not run)\b.* -->\n", re.M)
_OUTSIDE = re.compile(r"(\(?)(?<!!)\[([^\]]+)\]\((?:\.\./)+([^)#\s]+)(?:#[^)]*)?\)")
_BLOCK = re.compile(r"^( *)\.\. math::(.*(?:\n\1 +\S.*)*)", re.M)
_INLINE = re.compile(r":math:`([^`]+)`")
_DOCTEST = re.compile(r"^>>> .*(?:\n.+)*", re.M)
_ROLE = re.compile(r":(?:func|class|meth|mod|attr|data):`~?([^`]+)`")


def on_config(config: Any) -> Any:
    """Add the extension for formulas, for pages and docstrings alike."""
    config.markdown_extensions.append(DocstringMarkup())
    return config


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Rewrite what GitHub understands and the site does not."""
    markdown = _MARK.sub("", markdown)
    parts, end = [], 0
    for fence in _FENCE.finditer(markdown):
        parts.append(_without_links(markdown[end : fence.start()]))
        indent = len(fence[1])
        code = fence[0]
        if 0 < indent < 4:
            code = re.sub(r"^(?=.)", " " * (4 - indent), code, flags=re.M)
        parts.append(code)
        end = fence.end()
    return "".join(parts) + _without_links(markdown[end:])


def _without_links(text: str) -> str:
    return _OUTSIDE.sub(_named, text)


def _named(link: re.Match[str]) -> str:
    before, text, path = link.groups()
    if text.strip("`") == path:
        return f"{before}`{path}`"
    return f"({text}: `{path}`" if before else f"{text} (`{path}`)"


class DocstringMarkup(Extension):
    """`.. math::` and `:math:` as MathML; `:func:` and its like, and doctests, as code."""

    def extendMarkdown(self, md: Markdown) -> None:
        """Register the preprocessor, before that of fenced code."""
        md.preprocessors.register(_Markup(md), "docstring_markup", 28)


class _Markup(Preprocessor):
    def run(self, lines: list[str]) -> list[str]:
        text = _BLOCK.sub(lambda found: f"\n{self._formula(found[2], 'block')}\n", "\n".join(lines))
        text = _INLINE.sub(lambda found: self._formula(found[1], "inline"), text)
        text = _ROLE.sub(r"`\1`", text)
        return _DOCTEST.sub(r"```pycon\n\g<0>\n```", text).split("\n")

    def _formula(self, tex: str, display: str) -> str:
        return self.md.htmlStash.store(convert(" ".join(tex.split()), display=display))
