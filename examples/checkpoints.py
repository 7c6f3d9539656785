"""Checkpoints: what training goes on from, and what a trained detector is for everyone else.

One file format for both. It holds the recipe, what is known of the categories, and the weights,
and while training goes on the optimiser's state and the place in the data; so it needs neither the
configuration nor the annotations again. Files are read with `weights_only=True`: no code is run.
"""

from __future__ import annotations

import dataclasses
import hashlib
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from detectors import make_detector
from methods import METHODS, restore
from recipe import ARCHITECTURE, Recipe
from run_folder import write
from torchvision.models.detection import FasterRCNN

from balanced_group_softmax import GroupLayout
from balanced_group_softmax.legacy.torch_files import load_torch

FORMAT = "balanced-group-softmax torchvision example 1"
State = dict[str, Any]


@dataclass(frozen=True)
class Categories:
    """The categories of the training data, in ascending order of id."""

    ids: tuple[int, ...]
    names: tuple[str, ...]
    counts: tuple[int, ...]
    """Training instances."""
    frequencies: str
    """A letter each: r, c or f."""

    def layout(self, thresholds: Sequence[int]) -> GroupLayout:
        """Return the groups."""
        return GroupLayout.from_counts(
            self.counts, thresholds=tuple(thresholds), category_ids=self.ids
        )


@dataclass
class Checkpoint:
    """A detector in training, or after it."""

    stage: str
    """The method, by its name in `METHODS`."""
    recipe: Recipe
    categories: Categories
    model: State
    val_files: tuple[str, str]
    """Annotations and image folder that the run evaluates on."""
    origin: dict[str, Any] = field(default_factory=dict)
    """What its weights come from beside the recipe; a run that goes on compares it."""
    training: State | None = None
    """Optimiser, scaler, running mean and place in the data; None when training is over."""

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the file under a temporary name, to the disk, and move it."""
        content = {
            "format": FORMAT,
            "stage": self.stage,
            "recipe": self.recipe.to_toml(),
            "categories": asdict(self.categories),
            "model": self.model,
            "val_files": self.val_files,
            "origin": self.origin,
            "training": self.training,
        }

        def save_to_disk(partial: Path) -> None:
            with partial.open("wb") as file:
                try:
                    torch.save(content, file)
                except RuntimeError as error:  # what its zip writer makes of a full disk
                    if isinstance(error.__context__, OSError):
                        raise error.__context__ from None
                    raise
                file.flush()
                os.fsync(file.fileno())

        write(Path(path), save_to_disk)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Checkpoint:
        """Read a file.

        Raises:
            OSError: It cannot be read.
            ValueError: It is not such a file, or is damaged.
        """
        content = read_state(path)
        if content.get("format") != FORMAT:
            raise ValueError(
                f"{path}: Expected a checkpoint of torchvision_lvis_train.py, got a file with "
                f"{', '.join(map(str, list(content)[:3])) or 'nothing'}"
            )
        try:
            if content["stage"] not in METHODS:
                raise ValueError(f"method {content['stage']}")
            return cls(
                content["stage"],
                Recipe.from_toml(content["recipe"]),
                Categories(**content["categories"]),
                content["model"],
                tuple(content["val_files"]),
                content["origin"],
                content["training"],
            )
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(
                f"{path}: Expected a checkpoint of this version of the example, got one in which "
                f"something is missing or new: {error}"
            ) from None

    def make_model(self, recipe: Recipe | None = None) -> FasterRCNN:
        """Build the detector with its weights, on the CPU.

        Args:
            recipe: What is not of the architecture is taken from here, if given: how many RoIs
                train, how images are resized, which detections are kept.
        """
        own = {name: getattr(self.recipe, name) for name in ARCHITECTURE}
        recipe = dataclasses.replace(recipe or self.recipe, **own, weights="none")
        model = make_detector(recipe, len(self.categories.ids))
        layout = self.categories.layout(recipe.thresholds)
        restore(model, self.stage, layout, self.categories.counts, recipe, self.model)
        model.load_state_dict(self.model)
        return model


def fingerprint(state: State, *, without: str | None = None) -> str:
    """Return a hash of the weights, but for those whose name begins with `without`."""
    digest = hashlib.sha256()
    for name, value in state.items():
        if without is None or not name.startswith(without):
            digest.update(name.encode())
            digest.update(value.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def read_state(path: str | os.PathLike[str]) -> State:
    """Read a dict that torch saved, running no code of it.

    Raises:
        OSError: It cannot be read.
        ValueError: It is something else, or damaged.
    """
    # torchvision's training scripts keep their arguments beside the weights.
    content = load_torch(Path(path), skip_records=True)
    if not isinstance(content, dict):
        raise ValueError(f"{path}: Expected a dict, got {type(content).__name__}")
    return content
