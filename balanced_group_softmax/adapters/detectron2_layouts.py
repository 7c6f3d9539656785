"""Where the groups of a detectron2 detector come from, and their fingerprint in checkpoints."""

import hashlib
import os
import pickle
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import lru_cache
from pathlib import Path

import torch
from detectron2.data import MetadataCatalog
from detectron2.utils.file_io import PathManager
from torch import Tensor, nn

from balanced_group_softmax._arguments import as_int_tuple
from balanced_group_softmax.counts import category_counts, category_ids
from balanced_group_softmax.layout import GroupLayout

__all__ = ["fingerprint", "read_layout", "same_category_ids", "same_groups", "training_annotations"]

_CHECKPOINTS = (".pth", ".pt")
_DIGEST = hashlib.sha256().digest_size


def read_layout(
    layout: GroupLayout | str | os.PathLike[str] | None = None,
    annotations: str | os.PathLike[str] | None = None,
    thresholds: Sequence[int] = (10, 100, 1000),
) -> GroupLayout:
    """Return the groups in detectron2's label convention, background last.

    The arguments are those of `BAGSFastRCNNOutputLayers`, exactly one of the first two.

    Raises:
        OSError: a file cannot be read.
        TypeError: an argument is of the wrong type.
        ValueError: none or both are given, or what a file holds is not valid.
    """
    if (layout is None) == (annotations is None):
        raise ValueError(
            "Expected exactly one of `layout` and `annotations` (MODEL.BAGS.LAYOUT, "
            f"MODEL.BAGS.ANNOTATIONS), got {'none' if layout is None else 'both'}"
        )
    if annotations is not None:
        path = PathManager.get_local_path(os.fspath(annotations))
        bounds = as_int_tuple(list(thresholds), "thresholds")
        status = Path(path).stat()
        return _count(path, bounds, status.st_size, status.st_mtime_ns)
    if isinstance(layout, str | os.PathLike):
        path = PathManager.get_local_path(os.fspath(layout))
        suffix = Path(path).suffix
        if suffix == ".pkl":
            raise ValueError(
                f"{path}: expected a layout's JSON file or a checkpoint (.pth, .pt), "
                "got a pickle, which is not read since it may run code"
            )
        is_checkpoint = suffix in _CHECKPOINTS
        layout = _layout_in_checkpoint(path) if is_checkpoint else GroupLayout.load(path)
    if not isinstance(layout, GroupLayout):
        raise TypeError(
            f"Expected `layout` to be a GroupLayout or a path, got {type(layout).__name__}"
        )
    if layout.background is None:
        raise ValueError("Expected `layout` with background, got one for classification without")
    return replace(layout, background="last")


@lru_cache(maxsize=4)
def _count(path: str, thresholds: tuple[int, ...], *_: int) -> GroupLayout:
    # Every stage of a cascade asks for it.
    ids = category_ids(path)
    return GroupLayout.from_counts(category_counts(path), thresholds, "last", ids)


def _layout_in_checkpoint(path: str) -> GroupLayout:
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
        # torch's own text advises to load it unsafely.
        raise ValueError(
            f"{path}: expected a checkpoint of tensors and plain values, got {type(error).__name__}"
        ) from None
    if not isinstance(state, Mapping):
        raise ValueError(f"{path}: expected a checkpoint of detectron2, got {type(state).__name__}")
    try:
        return GroupLayout.from_state_dict(state.get("model", state))
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def training_annotations(names: Sequence[str]) -> str:
    """Return the annotation file of the one data set of a config's `DATASETS.TRAIN`.

    Raises:
        ValueError: there are several, none, or it has no annotation file.
    """
    if len(names) != 1:
        raise ValueError(
            "Expected MODEL.BAGS.LAYOUT or MODEL.BAGS.ANNOTATIONS, or one data set in "
            f"DATASETS.TRAIN to count its instances, got {list(names)}"
        )
    path = MetadataCatalog.get(names[0]).get("json_file")
    if path is None:
        raise ValueError(
            f"Expected MODEL.BAGS.LAYOUT or MODEL.BAGS.ANNOTATIONS: the data set {names[0]!r} has "
            "no `json_file` in its metadata"
        )
    return str(path)


def fingerprint(classifier: nn.Module) -> Tensor:
    """Return digests of a classifier's groups and of its category ids, zeros if not known.

    One without groups is known by its kind and the shapes of its weights. Classifiers whose
    fingerprints agree can share weights. Its shape, [64] uint8, is the same for all.
    """
    layout = getattr(classifier, "layout", None)
    ids = None
    if isinstance(layout, GroupLayout):
        text, ids = replace(layout, category_ids=None).to_json(), layout.category_ids
    else:
        state = classifier.state_dict()
        shapes = [(k, tuple(v.shape)) for k, v in state.items() if not k.endswith("_extra_state")]
        text = repr((type(classifier).__name__, shapes))
    digests = hashlib.sha256(text.encode()).digest()
    digests += bytes(_DIGEST) if ids is None else hashlib.sha256(repr(ids).encode()).digest()
    return torch.frombuffer(bytearray(digests), dtype=torch.uint8)


def same_groups(mine: Tensor, other: Tensor) -> bool:
    """Whether two fingerprints are of the same groups."""
    return mine.shape == other.shape and torch.equal(mine[:_DIGEST], other[:_DIGEST])


def same_category_ids(mine: Tensor, other: Tensor) -> bool:
    """Whether two fingerprints are of the same category ids, or one of them knows none."""
    ids = [one[_DIGEST:] for one in (mine, other)]
    return torch.equal(*ids) or not all(bool(one.any()) for one in ids)
