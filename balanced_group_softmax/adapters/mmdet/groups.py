"""Groups and counts as configs give them."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

from balanced_group_softmax._arguments import as_int_array
from balanced_group_softmax.counts import category_counts, category_ids, read_annotations
from balanced_group_softmax.layout import GroupLayout

__all__ = ["as_layout", "read_counts"]


def as_layout(layout: Any) -> GroupLayout:
    """A path, a dict or a layout as a layout with background last.

    Raises:
        OSError: the file cannot be read.
        TypeError: it is something else.
        ValueError: it is no layout, or one without background.
    """
    if isinstance(layout, str | Path):
        layout = GroupLayout.load(layout)
    elif isinstance(layout, Mapping):
        layout = GroupLayout.from_json(json.dumps(dict(layout)))
    elif not isinstance(layout, GroupLayout):
        raise TypeError(
            f"Expected `layout` to be a path, a dict or a GroupLayout, got {type(layout).__name__}"
        )
    if layout.background is None:
        raise ValueError("Expected `layout` with background, got one for classification without")
    return replace(layout, background="last")


def read_counts(
    annotations: str | None, counts: Sequence[int] | None
) -> tuple[tuple[int, ...] | None, tuple[int, ...]]:
    """Category ids, if known, and counts, of a file or as they are given.

    Raises:
        OSError: the file cannot be read.
        TypeError: the counts are not integers, or the annotations not a path.
        ValueError: the annotations are not valid.
    """
    if annotations is None:
        return None, tuple(as_int_array(counts, "counts").tolist())
    if not isinstance(annotations, str | Path):
        raise TypeError(f"Expected `annotations` to be a path, got {type(annotations).__name__}")
    status = Path(annotations).stat()
    return _of_file(str(annotations), status.st_size, status.st_mtime_ns)


@lru_cache(maxsize=4)
def _of_file(path: str, *_: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    # Every stage of a cascade asks for it.
    data = read_annotations(path)
    return tuple(category_ids(data)), tuple(category_counts(data))
