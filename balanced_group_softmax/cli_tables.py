"""Text that the commands print: tables, count ranges, and names from foreign files."""

import re
from collections.abc import Sequence

__all__ = ["aligned", "count_range", "one_line"]


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


def one_line(text: str, longest: int = 40) -> str:
    """Return text of a foreign file as a terminal may show it: no control characters, not long."""
    text = "".join(letter if letter.isprintable() else "?" for letter in text)
    return text if len(text) <= longest else f"{text[: longest - 3]}..."
