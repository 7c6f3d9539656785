"""A layout as text: its JSON, in files and in checkpoints."""

from __future__ import annotations

import json
from typing import Any, NamedTuple

import torch
from torch import Tensor

FORMAT_NAME = "balanced_group_softmax.GroupLayout"
FORMAT_VERSION = 1
MAX_CHARACTERS = 1 << 26


class Fields(NamedTuple):
    """What JSON says of a layout; its values are not checked."""

    groups: tuple[Any, ...]
    names: tuple[Any, ...]
    background: Any
    category_ids: Any
    num_categories: Any


def write(
    names: tuple[str, ...],
    groups: tuple[tuple[int, ...], ...],
    background: str | None,
    category_ids: tuple[int, ...] | None,
) -> str:
    """A layout as JSON."""
    return json.dumps(
        {
            "format": FORMAT_NAME,
            "format_version": FORMAT_VERSION,
            "background": background,
            "num_categories": sum(map(len, groups)),
            "groups": [
                {"name": name, "categories": group}
                for name, group in zip(names, groups, strict=True)
            ],
            "category_ids": category_ids,
        }
    )


def read(text: Any) -> Fields:
    """The fields of a layout's JSON.

    Raises:
        TypeError: if `text` is not a str.
        ValueError: if it is not JSON of this format and version, or too long.
    """
    if not isinstance(text, str):
        raise TypeError(f"Expected `text` to be a str of JSON, got {type(text).__name__}")
    if len(text) > MAX_CHARACTERS:
        raise ValueError(
            f"Expected layout JSON of at most {MAX_CHARACTERS} characters, got {len(text)}"
        )
    try:
        data = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"Expected a layout as JSON, got text that is not: {error}") from None
    if not isinstance(data, dict) or data.get("format") != FORMAT_NAME:
        raise ValueError(f"Expected a JSON object with 'format': {FORMAT_NAME!r}")
    version = data.get("format_version")
    if version != FORMAT_VERSION or isinstance(version, bool):
        raise ValueError(
            f"Expected 'format_version' {FORMAT_VERSION}, got {version!r:.40}: the layout was "
            f"written by another version of the library"
        )
    missing = {"background", "num_categories", "groups", "category_ids"} - data.keys()
    if missing:
        raise ValueError(f"Expected a layout with {sorted(missing)}, found none in the JSON")
    groups = data["groups"]
    if not isinstance(groups, list) or not all(
        isinstance(group, dict) and {"name", "categories"} <= group.keys() for group in groups
    ):
        raise ValueError("Expected 'groups', a list of objects with 'name' and 'categories'")
    return Fields(
        groups=tuple(group["categories"] for group in groups),
        names=tuple(group["name"] for group in groups),
        background=data["background"],
        category_ids=data["category_ids"],
        num_categories=data["num_categories"],
    )


def text_of_extra_state(state: Any) -> str | None:
    """The JSON in a checkpoint's extra state, or None if it is not of a layout."""
    if not isinstance(state, Tensor) or state.ndim != 1:
        return None
    if state.dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        state = state.to(torch.uint8)  # of a state dict cast as a whole; ASCII is exact in all
    if state.dtype != torch.uint8:
        return None
    text = bytes(state.cpu().numpy()).decode("utf-8", errors="replace")
    return text if FORMAT_NAME in text[:200] else None
