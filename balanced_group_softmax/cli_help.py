"""The help of programs, as wide as the terminal."""

import argparse
import re
import textwrap

__all__ = ["HelpFormatter"]


class HelpFormatter(argparse.HelpFormatter):
    """Wraps paragraphs and lists to the width of the terminal, and nothing that is indented.

    So the description may be the docstring of a module, with examples of commands in it.
    """

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        blocks = re.split(r"\n\s*\n", text.strip("\n"))
        return "\n\n".join(
            "\n".join(indent + line for part in _parts(block) for line in _wrapped(part, width))
            for block in blocks
        )


def _parts(block: str) -> list[list[str]]:
    """Return the lines of each paragraph, of each point of a list, and of what is indented."""
    parts: list[list[str]] = []
    for line in block.splitlines():
        kind, last = _kind(line), _kind(parts[-1][0]) if parts else ""
        goes_on = kind == "indented" if last == "point" else kind == last
        if goes_on:
            parts[-1].append(line)
        else:
            parts.append([line])
    return parts


def _kind(line: str) -> str:
    return "point" if line.startswith("- ") else "indented" if line.startswith(" ") else "text"


def _wrapped(lines: list[str], width: int) -> list[str]:
    kind = _kind(lines[0])
    if kind == "indented":
        return lines
    return textwrap.wrap(
        " ".join(line.strip() for line in lines),
        width,
        subsequent_indent="  " if kind == "point" else "",
        break_long_words=False,
        break_on_hyphens=False,
    )
