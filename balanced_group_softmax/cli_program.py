"""What programs have in common: tables, help as wide as the terminal, and how they end.

They end with a status, and with a line on standard error if something was wrong.
"""

import argparse
import os
import re
import sys
import textwrap
from collections.abc import Callable, Sequence

__all__ = [
    "BROKEN_PIPE",
    "FAILED",
    "INTERRUPTED",
    "HelpFormatter",
    "aligned",
    "count_range",
    "ended",
    "line_of",
    "one_line",
    "printable",
    "say",
]

FAILED = 2
INTERRUPTED = 130
"""How a shell says that SIGINT, which is Ctrl-C, ended a command."""
BROKEN_PIPE = 141
"""How a shell says that SIGPIPE ended a command."""


def ended(main: Callable[[], int | None]) -> int:
    """Run a program and return its status; that of `main`, or one of these.

    `INTERRUPTED` after Ctrl-C; `BROKEN_PIPE` where nobody reads any more what is printed, as in
    `program | head -1`, of which nothing needs to be said; `FAILED` where it cannot be written.
    """
    try:
        try:
            return main() or 0
        finally:
            _flush()
    except KeyboardInterrupt:
        say("interrupted")
        return INTERRUPTED
    except BrokenPipeError:
        _print_nowhere()
        return BROKEN_PIPE
    except _OutputLostError as error:
        _print_nowhere()
        say(f"error: standard output: {error}")
        return FAILED


def line_of(error: BaseException) -> str:
    """Return what an error says, in one line; of the system's errors file and reason alone."""
    text = " ".join(str(error).split())
    if isinstance(error, OSError) and error.strerror:
        text = f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    return printable(text) or type(error).__name__


def say(line: str) -> None:
    """Print a line on standard error, if there is one."""
    if sys.stderr is not None:  # else print would take standard output
        print(line, file=sys.stderr)


class _OutputLostError(Exception):
    """What was printed could not be written, such as to a full disk."""


def _flush() -> None:
    if sys.stdout is None:  # closed before the start
        return
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        raise
    except OSError as error:
        raise _OutputLostError(error.strerror) from None


def _print_nowhere() -> None:
    # Python flushes once more at its end, and would complain.
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


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


def aligned(rows: Sequence[Sequence[str]], left: Sequence[int] = (0,)) -> list[str]:
    """Return rows as lines whose columns are aligned.

    Args:
        rows: the cells, as many in each row; the first row is the heading.
        left: the columns of text; the others are numbers and stand to the right.
    """
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(
            cell.ljust(width) if index in left else cell.rjust(width)
            for index, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]


def count_range(name: str) -> str:
    """Return a group's name as a range: "10_100" as "10 to 99"; other names as they are."""
    found = re.fullmatch(r"(\d+)_(\d+|inf)", name)
    if not found:
        return one_line(name)
    low, high = found.groups()
    if high == "inf":
        return "any number" if low == "0" else f"{low} and more"
    last = int(high) - 1
    return low if int(low) == last else f"{low} to {last}"


def printable(text: str) -> str:
    """Return text with `?` for what a terminal or a font does not show."""
    return "".join(letter if letter.isprintable() else "?" for letter in text)


def one_line(text: str, longest: int = 40) -> str:
    """Return text of a foreign file as a terminal may show it: no control characters, not long."""
    text = printable(text)
    return text if len(text) <= longest else f"{text[: longest - 3]}..."
