"""Checkpoints of the original (mmdetection 1.0rc0) as state dicts of mmdet 3 and of torchvision.

Names change, and rows move where mmdet 3 has background last: see `convert_to_mmdet` and
`convert_to_torchvision`. No number is computed; every weight is one of the original's.

What a detector computes also depends on its geometry, in which the original counts pixels: a box
from 10 to 12 is 3 wide. Written as (x1, y1, x2 + 1, y2 + 1) its boxes are those of today, and what
remains are the places of anchors, how RoIs are read, and how boxes are clipped:
`adapters.mmdet.original_geometry` and `adapters.torchvision_legacy`.
"""

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from balanced_group_softmax._arguments import as_int, shown
from balanced_group_softmax._files import written_whole
from balanced_group_softmax.layout import GroupLayout
from balanced_group_softmax.legacy.torch_files import is_plain, load_torch

__all__ = ["Target", "convert_checkpoint", "convert_to_mmdet", "convert_to_torchvision"]

Target = Literal["mmdet", "torchvision"]

_CLASSIFIER = re.compile(r"bbox_head\.(?:\d+\.)?fc_cls\.(weight|bias)")
_REGRESSION = re.compile(r"bbox_head\.(?:\d+\.)?fc_reg\.(weight|bias)")
_MASK_LOGITS = re.compile(r"mask_head\.(?:\d+\.)?conv_logits\.(weight|bias)")


@dataclass(frozen=True)
class _Original:
    """A state dict of the original, checked, and what its shapes say."""

    tensors: dict[str, Tensor]
    num_categories: int
    layout: GroupLayout | None  # None: a plain softmax classifier


def convert_to_mmdet(
    state_dict: Mapping[str, Any],
    *,
    layout: GroupLayout | None = None,
    num_categories: int | None = None,
) -> dict[str, Tensor]:
    """Return the state dict of mmdet 3 for one of the original.

    Faster, Mask and Cascade R-CNN and Hybrid Task Cascade, with or without deformable convolutions.
    Box, mask and semantic heads gain the prefix `roi_head.`. The row of background goes from the
    first place to the last in a softmax classifier, and out of class-specific box and mask layers,
    which have none in mmdet 3. The classifier of BAGS stays as it is, and its layout is added as
    `roi_head.bbox_head.loss_cls._extra_state`. `mask_head.0.conv_res`, which nothing uses in a
    Hybrid Task Cascade, is left out.

    Args:
        state_dict: of the original. Not changed; tensors that stay as they are are shared.
        layout: of a BAGS checkpoint, in any label convention. A softmax checkpoint needs none.
        num_categories: C; needed only of a softmax checkpoint whose box and mask layers are the
            same for all categories.

    Returns:
        Tensors by name, and for BAGS the layout.

    Raises:
        TypeError: an argument is of the wrong type.
        ValueError: the state dict is not one of the original, its shapes contradict each other or
            the layout, or it needs a layout or the number of categories.
    """
    original = _read(state_dict, layout, num_categories)
    layout = original.layout and replace(original.layout, background="last")
    converted: dict[str, Tensor] = {}
    for name, tensor in original.tensors.items():
        part = name.partition(".")[0]
        if name.startswith("mask_head.0.conv_res."):
            continue
        if part in ("bbox_head", "mask_head", "semantic_head", "shared_head"):
            new_name = f"roi_head.{name}"
        elif part in ("backbone", "neck", "rpn_head"):
            new_name = name.replace(".conv2_offset.", ".conv2.conv_offset.")
        else:
            raise _unknown(name)
        if _CLASSIFIER.fullmatch(name):
            if layout is None:
                tensor = torch.cat([tensor[1:], tensor[:1]])
            elif name.endswith(".weight"):
                state_name = new_name.removesuffix("fc_cls.weight") + "loss_cls._extra_state"
                converted[state_name] = layout.to_extra_state()
        elif _REGRESSION.fullmatch(name) and len(tensor) > 4:
            tensor = tensor[4:]
        elif _MASK_LOGITS.fullmatch(name) and len(tensor) > 1:
            tensor = tensor[1:]
        converted[new_name] = tensor
    return converted


def convert_to_torchvision(
    state_dict: Mapping[str, Any],
    *,
    layout: GroupLayout | None = None,
    num_categories: int | None = None,
) -> dict[str, Tensor]:
    """Return the state dict of torchvision's Faster or Mask R-CNN for one of the original.

    Background is first on both sides, so that only names change. A BAGS checkpoint fits a model
    converted by `adapters.torchvision`, and carries its layout. A box regression that is the same
    for all categories stays four rows, which the converted model takes and torchvision's own does
    not.

    Args:
        state_dict: as for `convert_to_mmdet`.
        layout: as for `convert_to_mmdet`.
        num_categories: as for `convert_to_mmdet`.

    Returns:
        Tensors by name, and for BAGS the layout.

    Raises:
        TypeError: an argument is of the wrong type.
        ValueError: as for `convert_to_mmdet`, or torchvision has no such detector: cascades,
            semantic branches, deformable convolutions.
    """
    original = _read(state_dict, layout, num_categories)
    layout = original.layout and replace(original.layout, background="first")
    converted: dict[str, Tensor] = {}
    for name, tensor in original.tensors.items():
        new_name = _torchvision_name(name, layout is not None)
        converted[new_name] = tensor
        if layout is not None and new_name.endswith("cls_score.fc.weight"):
            state_name = new_name.removesuffix("fc.weight") + "_extra_state"
            converted[state_name] = layout.to_extra_state()
    return converted


def convert_checkpoint(
    source: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    target: Target,
    layout: GroupLayout | None = None,
    num_categories: int | None = None,
) -> int:
    """Convert a checkpoint file of the original; nothing in it is run.

    Args:
        source: a `.pth` file of the original: its dict with `state_dict`, or that alone.
        out: where to write: for mmdet a dict with `state_dict` and `meta`, for torchvision a bare
            state dict. A file already there is replaced in one step.
        target: `"mmdet"` (3.x) or `"torchvision"`.
        layout: as for `convert_to_mmdet`.
        num_categories: as for `convert_to_mmdet`; by default as many as the checkpoint names.

    Returns:
        The number of tensors written.

    Raises:
        OSError: a file cannot be read or written.
        TypeError: an argument is of the wrong type.
        ValueError: the file is not a checkpoint of the original, or cannot be converted; the
            message names it.
    """
    source, out = Path(source), Path(out)
    if target not in ("mmdet", "torchvision"):
        raise ValueError(f"Expected `target` to be 'mmdet' or 'torchvision', got {target!r}")
    content = load_torch(source)
    if not isinstance(content, Mapping):
        raise ValueError(f"{source}: expected a checkpoint, got {type(content).__name__}")
    state_dict = content.get("state_dict", content)
    meta = content.get("meta")
    classes = meta.get("CLASSES") if isinstance(meta, Mapping) else None
    names = None
    if isinstance(classes, list | tuple) and all(isinstance(name, str) for name in classes):
        names = list(classes)
    if num_categories is None and layout is None and names:
        num_categories = len(names)
    convert = convert_to_mmdet if target == "mmdet" else convert_to_torchvision
    try:
        converted = convert(state_dict, layout=layout, num_categories=num_categories)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{source}: {error}") from None
    # Whole storages are written, so a slice would carry what was cut off.
    converted = {name: tensor.clone() for name, tensor in converted.items()}
    written: dict[str, Any] = converted
    if target == "mmdet":
        dataset = {"classes": names} if names else {}
        written = {"meta": {"dataset_meta": dataset}, "state_dict": converted}
    try:
        with written_whole(out) as partial, partial.open("wb") as file:
            torch.save(written, file)
    except RuntimeError as error:  # what torch makes of a full disk
        raise OSError(f"{out}: could not be written: {error}") from error
    return len(converted)


# --- reading -------------------------------------------------------------------------------------


def _read(
    state_dict: Mapping[str, Any], layout: GroupLayout | None, num_categories: int | None
) -> _Original:
    if not isinstance(state_dict, Mapping):
        raise TypeError(f"Expected `state_dict` to be a mapping, got {type(state_dict).__name__}")
    if layout is not None and not isinstance(layout, GroupLayout):
        raise TypeError(f"Expected `layout` to be a GroupLayout, got {type(layout).__name__}")
    if num_categories is not None:
        num_categories = as_int(num_categories, "num_categories", lowest=1)
    tensors: dict[str, Tensor] = {}
    for key, value in state_dict.items():
        if not isinstance(key, str) or not isinstance(value, Tensor):
            raise ValueError(
                f"Expected tensors by name, got {type(value).__name__} under {shown(key)}"
            )
        name = key.removeprefix("module.")
        if not is_plain(value):
            raise ValueError(f"Expected `{name}` of plain numbers, got layout {value.layout}")
        if name in tensors:
            raise ValueError(f"Expected `{name}` once, got it with and without `module.`")
        tensors[name] = value.detach()
    if any(name.startswith("roi_head.") for name in tensors):
        raise ValueError("Expected names of mmdetection 1, got `roi_head.` of mmdet 3")
    classifiers = _layers(tensors, _CLASSIFIER)
    if not classifiers:
        raise ValueError(
            "Expected a two-stage detector of mmdetection 1 with `bbox_head.fc_cls`, found none "
            f"among {len(tensors)} entries"
        )
    rows = _same_rows(classifiers)
    known = _numbers_of_categories(tensors, layout, num_categories)
    if len(set(known.values())) > 1:
        raise ValueError(f"Expected one number of categories, got different ones: {known}")
    if not known:
        raise ValueError(
            "Expected `num_categories` or `layout` (command: `--num-categories`, `--groups`): "
            f"{rows} rows of fc_cls may be so many labels, or group logits, and no other layer "
            "says how many categories there are"
        )
    categories = next(iter(known.values()))
    if layout is not None and rows == layout.num_logits:
        return _Original(tensors, categories, layout)
    if rows == categories + 1:
        return _Original(tensors, categories, None)
    if layout is not None:
        raise ValueError(
            f"Expected fc_cls of {layout.num_logits} rows, as many as the layout has logits "
            f"(or {categories + 1} of a softmax classifier), got {rows}"
        )
    raise ValueError(
        f"Expected fc_cls of {categories + 1} rows for {categories} categories and background, got "
        f"{rows}: give the `layout` of a BAGS checkpoint (`--groups` of the command)"
    )


def _layers(tensors: dict[str, Tensor], pattern: re.Pattern[str]) -> dict[str, int]:
    """Return the rows of each layer by name, weight and bias checked against each other."""
    rows: dict[str, int] = {}
    dimensions = {"weight": 4 if pattern is _MASK_LOGITS else 2, "bias": 1}
    for name, tensor in tensors.items():
        if pattern.fullmatch(name):
            layer, _, kind = name.rpartition(".")
            if tensor.ndim != dimensions[kind] or not tensor.is_floating_point():
                raise ValueError(
                    f"Expected `{name}` of {dimensions[kind]} dimensions, floating point, got "
                    f"shape {list(tensor.shape)} of {tensor.dtype}"
                )
            if rows.setdefault(layer, len(tensor)) != len(tensor):
                raise ValueError(
                    f"Expected weight and bias of `{layer}` with as many rows, got {rows[layer]} "
                    f"and {len(tensor)}"
                )
    for layer in rows:
        if f"{layer}.weight" not in tensors:
            raise ValueError(f"Expected `{layer}.weight` with `{layer}.bias`, found none")
    return rows


def _same_rows(layers: dict[str, int]) -> int:
    if len(set(layers.values())) > 1:
        raise ValueError(f"Expected as many rows in every stage, got {layers}")
    return next(iter(layers.values()))


def _numbers_of_categories(
    tensors: dict[str, Tensor], layout: GroupLayout | None, num_categories: int | None
) -> dict[str, int]:
    """Return every source that says how many categories there are, and what it says."""
    known = {}
    if num_categories is not None:
        known["num_categories"] = num_categories
    if layout is not None:
        known["layout"] = layout.num_categories
    for layer, rows in _layers(tensors, _REGRESSION).items():
        if rows % 4 or not rows:
            raise ValueError(f"Expected `{layer}` with four rows a box, got {rows}")
        if rows > 4:
            known[layer] = rows // 4 - 1
    for layer, rows in _layers(tensors, _MASK_LOGITS).items():
        if rows > 1:
            known[layer] = rows - 1
    return known


def _unknown(name: str) -> ValueError:
    return ValueError(
        "Expected backbone, neck, rpn_head, bbox_head, mask_head and semantic_head of "
        f"mmdetection 1, got {shown(name)}"
    )


# --- names of torchvision ------------------------------------------------------------------------

_TORCHVISION = [
    (re.compile(old), new)
    for old, new in (
        (r"backbone\.((?:conv1|bn1|layer[1-4])\..*)", r"backbone.body.\1"),
        (r"neck\.lateral_convs\.(\d+)\.conv\.(.*)", r"backbone.fpn.inner_blocks.\1.0.\2"),
        (r"neck\.fpn_convs\.([0-3])\.conv\.(.*)", r"backbone.fpn.layer_blocks.\1.0.\2"),
        (r"rpn_head\.rpn_conv\.(.*)", r"rpn.head.conv.0.0.\1"),
        (r"rpn_head\.rpn_cls\.(.*)", r"rpn.head.cls_logits.\1"),
        (r"rpn_head\.rpn_reg\.(.*)", r"rpn.head.bbox_pred.\1"),
        (r"bbox_head\.shared_fcs\.0\.(.*)", r"roi_heads.box_head.fc6.\1"),
        (r"bbox_head\.shared_fcs\.1\.(.*)", r"roi_heads.box_head.fc7.\1"),
        (r"bbox_head\.fc_reg\.(.*)", r"roi_heads.box_predictor.bbox_pred.\1"),
        (r"mask_head\.convs\.(\d+)\.conv\.(.*)", r"roi_heads.mask_head.\1.0.\2"),
        (r"mask_head\.upsample\.(.*)", r"roi_heads.mask_predictor.conv5_mask.\1"),
        (r"mask_head\.conv_logits\.(.*)", r"roi_heads.mask_predictor.mask_fcn_logits.\1"),
    )
]


def _torchvision_name(name: str, is_bags: bool) -> str:
    for pattern, what in (
        (r"(bbox|mask)_head\.\d+\..*", "cascade"),
        (r"semantic_head\..*", "semantic branch"),
        (r"backbone\..*\.conv2_offset\..*", "deformable convolution"),
    ):
        if re.fullmatch(pattern, name):
            raise ValueError(f"torchvision has no {what}, got {name!r}; convert to mmdet")
    if name.startswith("bbox_head.fc_cls."):
        layer = "roi_heads.box_predictor.cls_score." + ("fc." if is_bags else "")
        return layer + name.removeprefix("bbox_head.fc_cls.")
    for known, new in _TORCHVISION:
        if known.fullmatch(name):
            return known.sub(new, name)
    raise _unknown(name)
