"""Types of options that several programs have."""

import argparse
from collections.abc import Callable


def whole(least: int, most: int = 2**31) -> Callable[[str], int]:
    """Return a type for argparse: an integer in a range."""

    def parse(text: str) -> int:
        value = int(text)  # argparse says what is none
        if not least <= value <= most:
            raise argparse.ArgumentTypeError(f"Expected {least} to {most}, got {text}")
        return value

    parse.__name__ = "integer"  # argparse names it in its message
    return parse
