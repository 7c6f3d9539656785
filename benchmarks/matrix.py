"""The sizes at which losses are to be known, and which of them a run leaves open."""

import itertools
from collections.abc import Sequence

from records import ALL_ACTIVE_FOREGROUND, Case, Result

WIDTHS = {"lvis_v0.5": 1236, "lvis_v1": 1209, "v3det": 13210}
DTYPES = ("float32", "bfloat16", "float16")
ROWS = (512, 1024, 8192, 65536)
SHARES = (0.0, 0.05, 0.10, 0.25)


def unmeasured(results: Sequence[Result]) -> list[str]:
    """What is missing of each layout and dtype, by rows."""
    measured = {result.case for result in results if any(result.times.values())}
    lines = []
    for (layout, width), dtype in itertools.product(WIDTHS.items(), DTYPES):
        missing = []
        for rows in ROWS:
            sizes = [Case(layout, width, dtype, rows, share) for share in SHARES]
            sizes.append(Case(layout, width, dtype, rows, ALL_ACTIVE_FOREGROUND, True))
            open_ones = [size.labels for size in sizes if size not in measured]
            every = len(open_ones) == len(sizes)
            if open_ones:
                missing.append(f"R = {rows}" if every else f"R = {rows} ({', '.join(open_ones)})")
        if missing:
            lines.append(f"loss, {layout}, {dtype}: {', '.join(missing)}")
    return lines
