"""What a run that goes on has to have in common with the one that stopped, and what it inherits."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import distributed
from checkpoints import Categories, Checkpoint, fingerprint
from recipe import Recipe
from run_folder import write_text

BROKEN_IMAGES = "broken_images.txt"


def origin(*, seed: int, data: str, start: Checkpoint | None, cache_draws: int) -> dict[str, Any]:
    """Return what weights come from, beside the recipe.

    Args:
        seed: Of the run.
        data: Hash of what is trained on.
        start: What training starts from.
        cache_draws: Draws of the feature cache; 0 to train through the detector.
    """
    weights = "nothing" if start is None else fingerprint(start.model)[:16]
    return {"seed": seed, "data": data[:16], "start": weights, "cache_draws": cache_draws}


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
    changed = [
        f"{key} was {before.get(key)} and is {now[key]}"
        for key in now
        if before.get(key) != now[key]
    ]
    if checkpoint.categories != categories:
        changed.append("categories were others")
    if changed:
        raise ValueError(f"{path}: Expected to resume the same run, but {', '.join(changed)}")


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
