"""Where trainings start from: stage two from a softmax detector, stage one from any weights."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import distributed
import torch
from checkpoints import Checkpoint, read_state
from detectors import load_what_fits, make_detector
from methods import METHODS
from recipe import ARCHITECTURE, Recipe
from run_data import Data
from torch import nn
from torchvision.ops.misc import FrozenBatchNorm2d


def start_of_stage_two(
    path: Path, start: Checkpoint, data: Data, recipe: Recipe, given: set[str]
) -> tuple[Checkpoint, Recipe]:
    """Return a trained softmax detector, and the recipe with its architecture.

    Args:
        path: Of the checkpoint, for messages.
        start: A checkpoint of stage one, or of its continuation.
        data: What is trained on.
        recipe: Of stage two.
        given: The options that somebody asked for, which must not contradict the checkpoint.

    Raises:
        ValueError: It does not fit.
    """
    if METHODS[start.stage].has_own_classifier:
        raise ValueError(
            f"{path}: Expected a detector with plain softmax to start from, got {start.stage}"
        )
    if start.training is not None:
        raise ValueError(
            f"{path}: Expected the checkpoint of a training that is over, got one of step "
            f"{start.training['step']}; end it with `--resume`"
        )
    if start.categories.ids != data.categories.ids:
        raise ValueError(
            f"{path}: Expected a detector of the {len(data.categories.ids)} categories of the "
            f"annotations, got one of {len(start.categories.ids)} with other ids"
        )
    own = {name: getattr(start.recipe, name) for name in ARCHITECTURE}
    for name, value in own.items():
        if name in given and getattr(recipe, name) != value:
            raise ValueError(
                f"{path}: Expected a detector with `{name}` {getattr(recipe, name)}, got {value}"
            )
    return start, dataclasses.replace(recipe, **own, weights="none")


def fixed_entries(model: nn.Module) -> set[str]:
    """Return the entries of a state dict that training does not move."""
    fixed = {name for name, value in model.named_parameters() if not value.requires_grad}
    for prefix, module in model.named_modules():
        if isinstance(module, FrozenBatchNorm2d):
            fixed |= {f"{prefix}.{name}" for name, _ in module.named_buffers()}
    return fixed


def with_weights_of(path: Path, recipe: Recipe, data: Data, seed: int) -> Checkpoint:
    """Return a fresh softmax detector with what fits of any local checkpoint's weights.

    Args:
        path: A state dict, a checkpoint of this example, or a dict that holds one as `model` or
            `state_dict`.
        recipe: Of stage one.
        data: What is trained on.
        seed: Of what does not fit.

    Raises:
        OSError: The file cannot be read.
        ValueError: It holds no weights, or none that fit.
    """
    content: dict[str, Any] = read_state(path)
    for key in ("model", "state_dict"):
        if isinstance(content.get(key), dict):
            content = content[key]
    torch.manual_seed(seed)
    model = make_detector(dataclasses.replace(recipe, weights="none"), len(data.categories.ids))
    try:
        fresh = load_what_fits(model, content)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    fixed = fixed_entries(model)
    random = [name for name in fresh if name in fixed]
    if recipe.backbone != "small" and random:
        raise ValueError(
            f"{path}: Expected weights of what does not train, got none for {len(random)} entries "
            f"such as {random[0]}, which would stay random; use a checkpoint that has them, or "
            "`--norm batch` and `--trainable-layers 5`"
        )
    if distributed.is_first():
        shown = ", ".join(fresh[:6]) + (", ..." if len(fresh) > 6 else "")
        print(f"Not in {path}, and so fresh: {shown or 'nothing'}")
    return Checkpoint("softmax", recipe, data.categories, model.state_dict(), data.val_files)
