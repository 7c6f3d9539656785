"""What a run that goes on has to have in common with the one that stopped, and what it inherits."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import distributed
from checkpoints import Categories, Checkpoint, fingerprint
from feature_cache import CacheOptions
from recipe import Recipe, read_identity, read_options, recipes_of
from run_folder import write_text

BROKEN_IMAGES = "broken_images.txt"


def origin(
    *, seed: int, data: str, start: Checkpoint | None, cache: CacheOptions | None
) -> dict[str, Any]:
    """Return what weights come from, beside the recipe.

    Args:
        seed: Of the run.
        data: Hash of what is trained on.
        start: What training starts from.
        cache: The features that training reads; None to train through the detector.
    """
    weights = "nothing" if start is None else fingerprint(start.model)[:16]
    return {
        "seed": seed,
        "data": data[:16],
        "start": weights,
        "cache_passes": 0 if cache is None else cache.passes,
        "cache_rois": 0 if cache is None else cache.rois,
    }


def check_folder(
    recipe_file: Path, recipes: Mapping[str, Recipe], identity: Mapping[str, Any]
) -> None:
    """Check that a run folder was begun by this run.

    Args:
        recipe_file: What the folder keeps of it.
        recipes: By stage.
        identity: Stage, seed, data and start.

    Raises:
        OSError: The file cannot be read.
        ValueError: It is of another run.
    """
    before, known = recipes_of(read_options(recipe_file)), read_identity(recipe_file)
    changed = changes(known, identity)
    for stage, recipe in recipes.items():
        changed += changes(asdict(before[stage]), asdict(recipe), f" of {stage}")
    refuse(recipe_file, changed)


def changes(before: Mapping[str, Any], now: Mapping[str, Any], of: str = "") -> list[str]:
    """Return what has changed, in words."""
    return [
        f"{key}{of} was {before.get(key)} and is {value}"
        for key, value in now.items()
        if before.get(key) != value
    ]


def refuse(path: Path, changed: list[str]) -> None:
    """Refuse to go on if anything has changed."""
    if changed:
        raise ValueError(f"{path}: Expected to resume the same run, but {', '.join(changed)}")


def check_same_run(
    path: Path,
    checkpoint: Checkpoint,
    recipe: Recipe,
    categories: Categories,
    origin: Mapping[str, Any],
) -> None:
    """Check that a checkpoint is one of this run.

    How many processes there are matters in the middle of a training alone.

    Raises:
        ValueError: It is of other options, categories, data, seed, start or number of processes.
    """
    before = {**asdict(checkpoint.recipe), **checkpoint.origin}
    now = {**asdict(recipe), **origin}
    if checkpoint.training is not None:
        before["processes"] = checkpoint.training["processes"]
        now["processes"] = distributed.world_size()
    changed = changes(before, now)
    if checkpoint.categories != categories:
        changed.append("categories were others")
    refuse(path, changed)


def note_broken(folder: Path, known: dict[str, None], noticed: Iterable[str]) -> None:
    """Add what every process noticed of images that cannot be read, and keep it in the run folder.

    Args:
        folder: Of the run.
        known: What is known of all processes; changed in place.
        noticed: By this process.
    """
    before = len(known)
    for part in distributed.gathered(list(noticed)):
        known.update(dict.fromkeys(part))
    if len(known) > before and distributed.is_first():
        write_text(folder / BROKEN_IMAGES, "\n".join(known) + "\n")


def noted_broken(folder: Path) -> dict[str, None]:
    """Return what an earlier part of the run has noticed; in the first process."""
    path = folder / BROKEN_IMAGES
    if not (distributed.is_first() and path.exists()):
        return {}
    return dict.fromkeys(path.read_text(encoding="utf-8").splitlines())
