"""The original's seven intermediate files: reads and writes a folder of them.

| file | content |
|---|---|
| `label2binlabel.pt` | int64 [G, C + 1]: the label within each group of each label |
| `pred_slice_with0.pt` | int64 [G, 2]: first logit column and number of columns of each group |
| `valsplit.pkl` | labels of each count range |
| `cls_weight.pt` | float64 [C + 1]: weights by inverse frequency, background 1 |
| `cls_weight_bours.pt` | float64 [C + 1]: class-balanced weights, background 1 |
| `bins_cls_weight.pkl` | for each group of categories, float64 [1 + n]: weights, `others` 1 |
| `class_to_imageid_and_inscount.pt` | a plain pickle: images and instance count of each label |

The first is what a layout needs; the others may be absent and are checked where they are not.
"""

import io
import os
import pickle
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from balanced_group_softmax._arguments import as_int_array, shown
from balanced_group_softmax._files import written_whole
from balanced_group_softmax.counts import Source, category_counts, read_annotations
from balanced_group_softmax.layout import GroupLayout
from balanced_group_softmax.legacy import safe_pickle
from balanced_group_softmax.legacy.layout_files import (
    group_columns,
    layout_of_bin_labels,
    original_layout,
    splits_of_layout,
)
from balanced_group_softmax.legacy.torch_files import load_torch
from balanced_group_softmax.rebalance.class_weights import (
    class_balanced_weights,
    inverse_frequency_weights,
)

__all__ = [
    "FILES",
    "CategoryImages",
    "OriginalFiles",
    "read_original_files",
    "write_original_files",
]

FILES = (
    "label2binlabel.pt",
    "pred_slice_with0.pt",
    "valsplit.pkl",
    "cls_weight.pt",
    "cls_weight_bours.pt",
    "bins_cls_weight.pkl",
    "class_to_imageid_and_inscount.pt",
)
_MIN_SIDE = 32  # pixels; the original drops smaller images before it numbers them
_COUNT_KEY = "isntance_count"  # as the original spells it


@dataclass(frozen=True)
class CategoryImages:
    """Where a category occurs in the training set.

    Attributes:
        image_ids: ids of the images that hold it, in the order of the annotation file.
        image_positions: their positions among the images that the original trains on.
        instance_count: its instances.
    """

    image_ids: tuple[int, ...]
    image_positions: tuple[int, ...]
    instance_count: int


@dataclass(frozen=True, eq=False)
class OriginalFiles:
    """What a folder of the original's files holds; None for a file that is not there.

    Attributes:
        layout: the groups, background first, those without categories included.
        inverse_weights: of `cls_weight.pt`, float64 [C + 1], background first.
        class_balanced_weights: of `cls_weight_bours.pt`, float64 [C + 1], background first.
        group_weights: of `bins_cls_weight.pkl`, for each group of categories float64 [1 + n],
            `others` first.
        category_images: of `class_to_imageid_and_inscount.pt`, for each of the C categories.
    """

    layout: GroupLayout
    inverse_weights: Tensor | None = None
    class_balanced_weights: Tensor | None = None
    group_weights: tuple[Tensor, ...] | None = None
    category_images: tuple[CategoryImages, ...] | None = None

    @property
    def category_weights(self) -> Tensor | None:
        """`group_weights` in category order, [C]: for `grouped_softmax_loss(category_weights=)`."""
        if self.group_weights is None:
            return None
        weights = torch.ones(self.layout.num_categories, dtype=torch.float64)
        for group, values in zip(self.layout.groups, self.group_weights, strict=True):
            weights[list(group)] = values[1:]
        return weights


def read_original_files(folder: str | os.PathLike[str]) -> OriginalFiles:
    """Read the original's files; nothing in them is run.

    Args:
        folder: holds `label2binlabel.pt`, and any of the other `FILES`.

    Raises:
        FileNotFoundError: there is no `label2binlabel.pt`.
        OSError: a file cannot be read.
        ValueError: a file is not what its name says, or files contradict each other; the message
            names the file.
    """
    folder = Path(folder)
    first = folder / FILES[0]
    if not first.is_file():
        raise FileNotFoundError(f"{folder}: expected a folder with {FILES[0]}, found none")
    columns = _if_there(folder / FILES[1], load_torch)
    splits = _if_there(folder / FILES[2], _load_splits)
    layout = layout_of_bin_labels(load_torch(first), columns, splits, where=str(folder))
    return OriginalFiles(
        layout,
        inverse_weights=_if_there(folder / FILES[3], lambda path: _label_weights(path, layout)),
        class_balanced_weights=_if_there(
            folder / FILES[4], lambda path: _label_weights(path, layout)
        ),
        group_weights=_if_there(folder / FILES[5], lambda path: _group_weights(path, layout)),
        category_images=_if_there(folder / FILES[6], lambda path: _category_images(path, layout)),
    )


def write_original_files(
    annotations: Source,
    folder: str | os.PathLike[str],
    *,
    thresholds: Sequence[int] = (10, 100, 1000),
) -> GroupLayout:
    """Write the original's seven files for any LVIS or COCO training set.

    The original takes a category's id for its label, so ids have to be 1..C.

    Args:
        annotations: path of the training annotations, or their content, with images and
            annotations.
        folder: where to write; made if it is not there. Files already there are replaced, each in
            one step.
        thresholds: boundaries between groups, in instances.

    Returns:
        The layout, as `read_original_files` will read it.

    Raises:
        OSError: a file cannot be read or written.
        TypeError: an argument is of the wrong type.
        ValueError: the annotations are not valid, or their category ids are not 1..C.
    """
    data = read_annotations(annotations, complete=True)
    ids = sorted(row["id"] for row in data["categories"])
    if ids != list(range(1, len(ids) + 1)):
        raise ValueError(
            "Expected category ids 1..C, which the original takes for labels, got "
            f"{shown(ids)}; renumber the categories"
        )
    counts = category_counts(data)
    layout = original_layout(counts, thresholds)
    within = inverse_frequency_weights(counts, within=layout.groups, background=None).numpy()
    group_weights = [np.concatenate([np.ones(1), within[list(group)]]) for group in layout.groups]
    contents = (  # all of them before the first is written
        _torch_bytes(layout.bin_labels),
        _torch_bytes(group_columns(layout)),
        _pickle_bytes(splits_of_layout(layout)),
        _torch_bytes(inverse_frequency_weights(counts)),
        _torch_bytes(class_balanced_weights(counts)),
        _pickle_bytes(group_weights),
        _pickle_bytes(_images_by_label(data, counts)),
    )
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in zip(FILES, contents, strict=True):
        _write(folder / name, content)
    return layout


# --- reading -------------------------------------------------------------------------------------


def _if_there(path: Path, read: Callable[[Path], Any]) -> Any:
    return read(path) if path.exists() else None


def _load_pickle(path: Path) -> Any:
    if not path.is_file():
        kind = "folder" if path.is_dir() else "device or pipe"
        raise ValueError(f"{path}: expected a pickle, got a {kind}")
    with path.open("rb") as file:
        try:
            return safe_pickle.load_plain(file)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None


def _load_splits(path: Path) -> dict[Any, Any]:
    splits = _load_pickle(path)
    if not isinstance(splits, dict):
        raise ValueError(f"{path}: expected a dict of labels, got {type(splits).__name__}")
    return splits


def _label_weights(path: Path, layout: GroupLayout) -> Tensor:
    weights = load_torch(path)
    expected = [layout.num_labels]
    if not isinstance(weights, Tensor) or not weights.dtype.is_floating_point:
        got = weights.dtype if isinstance(weights, Tensor) else type(weights).__name__
        raise ValueError(f"{path}: expected a floating-point tensor of shape {expected}, got {got}")
    if list(weights.shape) != expected:
        raise ValueError(
            f"{path}: expected a weight for each label, shape {expected}, got {list(weights.shape)}"
        )
    _check_weights(weights, path)
    return weights


def _group_weights(path: Path, layout: GroupLayout) -> tuple[Tensor, ...]:
    values = _load_pickle(path)
    shapes = [[size] for size in layout.group_sizes[1:]]
    found = (
        [list(value.shape) if isinstance(value, np.ndarray) else shown(value) for value in values]
        if isinstance(values, list | tuple)
        else shown(values)
    )
    if found != shapes:
        raise ValueError(
            f"{path}: expected an array of weights for each group, of shapes {shapes}, got {found}"
        )
    weights = tuple(torch.from_numpy(value.astype(np.float64)) for value in values)
    for value in weights:
        _check_weights(value, path)
    return weights


def _check_weights(weights: Tensor, path: Path) -> None:
    bad = ~(weights.isfinite() & (weights >= 0))
    if bad.any():
        at = int(bad.nonzero()[0])
        raise ValueError(
            f"{path}: expected finite weights >= 0, got {float(weights[at])} at position {at}"
        )


def _category_images(path: Path, layout: GroupLayout) -> tuple[CategoryImages, ...]:
    table = _load_pickle(path)
    labels = list(range(layout.num_labels))
    if not isinstance(table, dict) or list(table) != labels:
        got = f"{len(table)} entries" if isinstance(table, dict) else type(table).__name__
        raise ValueError(
            f"{path}: expected a dict with the labels 0..{layout.num_categories}, got {got}"
        )
    return tuple(_images_of(table[label], label, path) for label in labels[1:])


def _images_of(row: Any, label: int, path: Path) -> CategoryImages:
    keys = {"image_info_id", "img_id", _COUNT_KEY, "category_id"}
    if not isinstance(row, dict) or not keys <= row.keys():
        got = sorted(map(str, row)) if isinstance(row, dict) else type(row).__name__
        raise ValueError(f"{path}: expected {sorted(keys)} of label {label}, got {got}")
    try:
        ids = as_int_array(row["img_id"], "img_id").tolist()
        positions = as_int_array(row["image_info_id"], "image_info_id").tolist()
        count, number = as_int_array([row[_COUNT_KEY], row["category_id"]], _COUNT_KEY).tolist()
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path}: label {label}: {error}") from None
    if len(ids) != len(positions) or count < 0 or number != label:
        raise ValueError(
            f"{path}: expected of label {label} as many positions as image ids, no negative "
            f"instances, and its own number, got {len(positions)} positions, {len(ids)} ids, "
            f"{count} instances and number {number}"
        )
    return CategoryImages(tuple(ids), tuple(positions), count)


# --- writing -------------------------------------------------------------------------------------


def _images_by_label(data: dict[str, Any], counts: list[int]) -> dict[int, dict[str, Any]]:
    holding: dict[int, set[int]] = {}
    for row in data["annotations"]:
        if not row.get("iscrowd", 0):
            holding.setdefault(row["image_id"], set()).add(row["category_id"])
    table: dict[int, dict[str, Any]] = {
        label: {"image_info_id": [], "img_id": [], _COUNT_KEY: count, "category_id": label}
        for label, count in enumerate([0, *counts])
    }
    position = 0
    for image in data["images"]:
        sides = [image.get(side, _MIN_SIDE) for side in ("width", "height")]
        if not all(isinstance(side, int | float) for side in sides):
            raise ValueError(
                f"Expected width and height of image {image['id']} as numbers, got {shown(sides)}"
            )
        if image["id"] not in holding or min(sides) < _MIN_SIDE:
            continue
        for label in holding[image["id"]]:
            table[label]["image_info_id"].append(position)
            table[label]["img_id"].append(image["id"])
        position += 1
    return table


def _torch_bytes(tensor: Tensor) -> bytes:
    # The original's torch reads the older of the two formats only.
    buffer = io.BytesIO()
    torch.save(tensor, buffer, _use_new_zipfile_serialization=False)
    return buffer.getvalue()


def _pickle_bytes(value: Any) -> bytes:
    # Names are lines of text in this protocol. NumPy 1 does not know the name that NumPy 2 writes;
    # both know the old one.
    return pickle.dumps(value, 3).replace(b"cnumpy._core.multiarray\n", b"cnumpy.core.multiarray\n")


def _write(path: Path, content: bytes) -> None:
    with written_whole(path) as partial:
        partial.write_bytes(content)
