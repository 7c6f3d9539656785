"""A hook of mkdocs: formulas, names and examples in docstrings.

Docstrings have formulas and names as Sphinx roles, and examples as doctests. Formulas become
MathML, which browsers show without any script; names and examples become code.
"""

import re
from typing import Any

from latex2mathml.converter import convert
from markdown import Extension, Markdown
from markdown.preprocessors import Preprocessor

_BLOCK = re.compile(r"^( *)\.\. math::(.*(?:\n\1 +\S.*)*)", re.M)
_INLINE = re.compile(r":math:`([^`]+)`")
_DOCTEST = re.compile(r"^>>> .*(?:\n.+)*", re.M)
_ROLE = re.compile(r":(?:func|class|meth|mod|attr|data):`~?([^`]+)`")


def on_config(config: Any) -> Any:
    """Add the extension for formulas, for pages and docstrings alike."""
    config.markdown_extensions.append(DocstringMarkup())
    return config


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
