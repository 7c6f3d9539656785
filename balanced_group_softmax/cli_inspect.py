"""What the command `inspect` finds in a checkpoint: BAGS heads and the norms of their weights."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from balanced_group_softmax.cli_program import aligned, count_range, one_line
from balanced_group_softmax.layout import BACKGROUND_GROUP, GroupLayout
from balanced_group_softmax.layout_json import text_of_extra_state

__all__ = ["FoundHead", "describe_head", "describe_plain", "find_heads", "find_plain"]

_EXTRA_STATE = "_extra_state"
_MAX_DEPTH = 8  # of dicts in dicts; a checkpoint may even hold itself

# Last layers of classifiers: torchvision, detectron2, mmdet and timm, and of `rebalance`.
_CLASSIFIER = re.compile(
    r"(?:.*\.)?(?:cls_score(?:\.fc|\.linear)?|fc_cls|classifier|fc|head|linear)\.weight"
)
_MMDET_1 = re.compile(r"(?:module\.)?bbox_head\.(?:\d+\.)?fc_cls\.weight")


@dataclass(frozen=True, eq=False)
class FoundHead:
    """A BAGS classifier in a checkpoint.

    Attributes:
        where: the dict of the checkpoint it is in, such as `model`; empty for the outermost.
        name: its name in there; empty where the checkpoint is the head's own.
        layout: its groups.
        features: width of the features; None without weights.
        norms: L2 norm of the weights of each logit, float64 [L]; None if the checkpoint has the
            layout and no weights.
    """

    where: str
    name: str
    layout: GroupLayout
    features: int | None
    norms: Tensor | None

    @property
    def title(self) -> str:
        """Where it is, in words."""
        name = one_line(self.name, 120) or "the head"
        return f"{name} (in `{one_line(self.where, 120)}`)" if self.where else name

    def category_norms(self, group: int) -> Tensor:
        """The norms of the categories of one of `layout.groups`, in ascending category order."""
        start, size = self._columns(group)
        return self._known_norms()[start + 1 : start + size]

    def others_norm(self, group: int) -> float:
        """The norm of the column `others` of one of `layout.groups`."""
        return float(self._known_norms()[self._columns(group)[0]])

    def background_norms(self) -> tuple[float, float] | None:
        """The norms of background and foreground, if the layout has them."""
        if self.layout.background is None:
            return None
        background, foreground = self._known_norms()[:2].tolist()
        return background, foreground

    def _columns(self, group: int) -> tuple[int, int]:
        at = group + (self.layout.background is not None)
        return self.layout.group_starts[at], self.layout.group_sizes[at]

    def _known_norms(self) -> Tensor:
        if self.norms is None:
            raise ValueError(f"Expected weights of {self.title}, found its layout alone")
        return self.norms


def find_heads(content: Any) -> list[FoundHead]:
    """Return every BAGS classifier of a checkpoint, in the checkpoint's order.

    Args:
        content: what the file holds; dicts are looked for in it by name, up to eight deep.

    Raises:
        ValueError: a layout is damaged, or its weights are not of its width.
    """
    found = []
    for where, state in _dicts(content, set()):
        for key, value in state.items():
            if key == _EXTRA_STATE or key.endswith(f".{_EXTRA_STATE}"):
                prefix = key.removesuffix(_EXTRA_STATE)
                text = text_of_extra_state(value)
                if text is None:  # what another module keeps there
                    continue
                try:
                    layout = GroupLayout.from_json(text)
                except ValueError as error:
                    raise ValueError(f"{_path(where, key)}: {error}") from None
                found.append(_head(where, state, prefix, layout))
    return found


def find_plain(content: Any) -> list[tuple[str, Tensor]]:
    """Return name and weights of what may be a softmax classifier, by the names of last layers."""
    return [
        (_path(where, key), value)
        for where, state in _dicts(content, set())
        for key, value in state.items()
        if isinstance(value, Tensor)
        and value.ndim == 2
        and value.numel()
        and value.is_floating_point()
        and _CLASSIFIER.fullmatch(key)
    ]


def describe_head(head: FoundHead) -> list[str]:
    """Return what is known of a head, and the table of its groups."""
    layout = head.layout
    ids = "category ids known" if layout.category_ids is not None else "category ids not known"
    width = "" if head.features is None else f" of {head.features} features"
    lines = [
        head.title,
        f"{layout.num_categories} categories, background {layout.background or 'none'}, "
        f"{layout.num_logits} logits{width}, {ids}",
    ]
    if head.norms is None:
        lines.append("no weights: the checkpoint holds the layout alone")
    elif not bool(head.norms.isfinite().all()):
        number = int((~head.norms.isfinite()).sum())
        lines.append(f"{number} of {layout.num_logits} rows of weights are not finite")
    rows: list[tuple[str, ...]] = [
        ("group", "instances", "categories", "columns", "mean", "min", "max", "others")
    ]
    if layout.background is not None:
        rows.append((BACKGROUND_GROUP, "", "", f"{layout.group_sizes[0]}", "", "", "", ""))
    for index, (name, group) in enumerate(zip(layout.names, layout.groups, strict=True)):
        norms = [""] * 4
        if head.norms is not None:
            own = head.category_norms(index)
            if len(own):  # groups of the original may be empty
                norms[:3] = [f"{float(one):.4f}" for one in (own.mean(), own.min(), own.max())]
            norms[3] = f"{head.others_norm(index):.4f}"
        size = str(1 + len(group))
        # A group that is not named by a range of counts says nothing of counts.
        instances = count_range(name) if count_range(name) != name else ""
        rows.append((one_line(name), instances, str(len(group)), size, *norms))
    lines += [f"  {line}" for line in aligned(rows, left=(0, 1))]
    if head.norms is not None and (pair := head.background_norms()) is not None:
        lines.append(f"  {BACKGROUND_GROUP}: background {pair[0]:.4f}, foreground {pair[1]:.4f}")
    return lines


def describe_plain(classifiers: list[tuple[str, Tensor]]) -> list[str]:
    """Return that there is no layout, and the classifiers that there are."""
    lines = ["no layout of Balanced Group Softmax: no BAGSHead is in this checkpoint"]
    for name, weight in classifiers:
        rows, features = weight.shape
        norms = weight.double().norm(dim=1)
        lines.append(
            f"{one_line(name, 120)}: a classifier without groups, {rows} rows ({rows} classes, or "
            f"{rows - 1} and background) of {features} features"
        )
        low, mean, high = (float(value) for value in (norms.min(), norms.mean(), norms.max()))
        lines.append(f"  norm of a row: mean {mean:.4f}, min {low:.4f}, max {high:.4f}")
    if any(_MMDET_1.fullmatch(name.rpartition(": ")[2]) for name, _ in classifiers):
        lines.append(
            "names are those of mmdetection 1, where rows may be the logits of groups: "
            "`convert-checkpoint --groups` gives such a checkpoint its layout"
        )
    return lines


def _dicts(
    content: Any, seen: set[int], where: str = "", depth: int = 0
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield each dict of a checkpoint that names its entries, with its place, and each once."""
    if not isinstance(content, Mapping) or depth > _MAX_DEPTH or id(content) in seen:
        return
    seen.add(id(content))
    named = {key: value for key, value in content.items() if isinstance(key, str)}
    yield where, named
    for key, value in named.items():
        yield from _dicts(value, seen, f"{where}.{key}" if where else key, depth + 1)


def _head(where: str, state: dict[str, Any], prefix: str, layout: GroupLayout) -> FoundHead:
    """The head whose layout is under a prefix.

    The weights of a `BAGSHead` are beside its layout. In mmdet the loss has the layout, and the
    box head the loss and the weights.
    """
    name = prefix.removesuffix(".")
    places = {f"{prefix}fc.weight": name}
    if prefix.endswith("loss_cls."):
        box_head = prefix.removesuffix("loss_cls.")
        places[f"{box_head}fc_cls.weight"] = f"{box_head}fc_cls"
    for place, own_name in places.items():
        weight = state.get(place)
        if not isinstance(weight, Tensor):
            continue
        shape = list(weight.shape)
        if weight.ndim != 2 or shape[0] != layout.num_logits or not weight.is_floating_point():
            raise ValueError(
                f"Expected {_path(where, place)} of shape [{layout.num_logits}, features], "
                f"floating point, as its layout has {layout.num_logits} logits, got {shape} of "
                f"{weight.dtype}"
            )
        norms = torch.linalg.vector_norm(weight.detach().double(), dim=1)
        return FoundHead(where, own_name, layout, shape[1], norms)
    return FoundHead(where, name, layout, None, None)


def _path(where: str, key: str) -> str:
    return f"{where}: {key}" if where else key
