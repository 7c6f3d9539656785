"""The trainings of a run: plain softmax, Balanced Group Softmax from there, and its control.

Each ends in a checkpoint `<name>.pt` in the run folder; until then `<name>.training.pt` is what an
interrupted one goes on from.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import distributed
import torch
from checkpoints import Checkpoint, State, read_state
from detection_data import make_transforms
from detectors import CLASSIFIER, load_what_fits, make_detector
from feature_cache import (
    PREDICTOR,
    CachedBatches,
    CachedClassifier,
    FeatureCache,
    contents_of,
    fill,
)
from loading import TrainingBatches, epoch_batches, steps_of
from recipe import ARCHITECTURE, Recipe
from run_data import Data
from torch import nn
from training import Job, train

from balanced_group_softmax.adapters.torchvision import convert_to_bags, freeze

SOFTMAX, CONTINUED, BAGS = "softmax", "softmax_continued", "bags"
STAGE_NUMBER = {SOFTMAX: 1, CONTINUED: 2, BAGS: 2}
"""Both classifiers of stage two see the same images, flips and RoIs."""
Log = Callable[[int, dict[str, float]], None]


@dataclass
class Setting:
    """What all trainings of a run have in common."""

    folder: Path
    data: Data
    recipes: dict[str, Recipe]
    device: torch.device
    seed: int
    num_workers: int = 0
    save_every: int = 500
    skip_broken: bool = False
    resume: bool = False
    logger: Callable[[str, int], Log] = field(default=lambda name, step: lambda step, values: None)
    """Given a training's name and its first step."""
    after_epoch: Callable[[str, nn.Module, int], None] = field(
        default=lambda name, model, epoch: None
    )
    broken: dict[str, None] = field(default_factory=dict)
    """What was wrong with images."""
    start: Checkpoint | None = None
    """What the first training starts from."""
    cache: Path | None = None
    """Where stage two keeps the features that it trains from; None to run the detector."""
    cache_draws: int = 1

    def recipe(self, name: str) -> Recipe:
        """Return the recipe of a training."""
        return self.recipes["softmax" if name == SOFTMAX else "bags"]


def run_stage(setting: Setting, name: str, start: Checkpoint | None) -> Checkpoint:
    """Train, or go on, or return what an earlier run has finished; in every process.

    Args:
        setting: Of the run.
        name: Of the training.
        start: What it starts from, which stage two needs.

    Raises:
        OSError: A checkpoint cannot be read or written.
        ValueError: What is to be resumed is another run.
        FloatingPointError: Training diverged.
        Interrupted: The process was asked to end.
    """
    done, partial = setting.folder / f"{name}.pt", setting.folder / f"{name}.training.pt"
    recipe = setting.recipe(name)
    if setting.resume and done.exists():
        if distributed.is_first():
            partial.unlink(missing_ok=True)  # of a run that was killed in between
        return checked(Checkpoint.load(done), setting, recipe, done)
    resumed = None
    if setting.resume and partial.exists():
        resumed = checked(Checkpoint.load(partial), setting, recipe, partial)
    setting.data.train.transforms = make_transforms(flip=recipe.flip)
    torch.manual_seed(setting.seed)
    if resumed is not None:
        model = resumed.make_model()
    elif start is not None:
        model = start.make_model(recipe)
        if name == BAGS:
            layout = setting.data.categories.layout(recipe.thresholds)
            convert_to_bags(model, layout, recipe.others_ratio)
    else:
        model = make_detector(recipe, len(setting.data.categories.ids))
    model.to(setting.device)
    if recipe.channels_last:
        model.to(memory_format=torch.channels_last)
    if recipe.compile:
        model.backbone.compile(dynamic=True)
    if name == SOFTMAX:
        parameters = [p for p in model.parameters() if p.requires_grad]
    else:
        parameters = freeze(model, recipe.train)

    def content(training: State | None) -> Checkpoint:
        state = model.state_dict()
        data = setting.data
        return Checkpoint(name, recipe, data.categories, state, data.val_files, training)

    def save(state: State) -> None:
        if distributed.is_first():
            identity = {"seed": setting.seed, "world_size": distributed.world_size()}
            content({**state, **identity}).save(partial)

    training = None if resumed is None else resumed.training
    trained: nn.Module = model
    cache = None
    if start is not None and name != SOFTMAX and setting.cache is not None:
        cache = filled_cache(setting, start, recipe)
        trained = CachedClassifier(model.get_submodule(PREDICTOR))
    job, batches = make_job(setting, name, recipe, trained, parameters, save, cache)
    job.log = setting.logger(name, 0 if training is None else training["step"])
    train(job, training)
    for part in distributed.gathered(batches.broken):
        setting.broken.update(part)
    if start is not None and name != SOFTMAX and recipe.train == "classifier":
        check_frozen(start.model, model.state_dict())
    finished = content(None)
    if distributed.is_first():
        finished.save(done)
        partial.unlink(missing_ok=True)
    distributed.barrier()
    return finished


def make_job(
    setting: Setting,
    name: str,
    recipe: Recipe,
    model: nn.Module,
    parameters: list[nn.Parameter],
    save: Callable[[State], None],
    cache: FeatureCache | None,
) -> tuple[Job, TrainingBatches | CachedBatches]:
    """Return a training and where its batches come from."""
    number = STAGE_NUMBER[name]
    order = epoch_batches(
        setting.data.train,
        recipe,
        seed=10 * setting.seed + number,
        num_replicas=distributed.world_size(),
        rank=distributed.rank(),
    )
    batches: TrainingBatches | CachedBatches
    if cache is not None:
        batches = CachedBatches(cache, order)
    else:
        batches = TrainingBatches(
            setting.data.train,
            order,
            num_workers=setting.num_workers,
            skip_broken=setting.skip_broken,
        )
    job = Job(
        name=name,
        recipe=recipe,
        model=model,
        parameters=parameters,
        batches=batches,
        steps=steps_of(recipe, order),
        seed=(setting.seed, number),
        device=setting.device,
        save=save,
        save_every=setting.save_every,
        after_epoch=lambda epoch: setting.after_epoch(name, model, epoch),
    )
    return job, batches


def filled_cache(setting: Setting, start: Checkpoint, recipe: Recipe) -> FeatureCache:
    """Return the features of a softmax detector, stored as far as they are not yet.

    Raises:
        OSError: There is no room for them.
        ValueError: More than the classifier is to train, or the folder holds something else.
    """
    if recipe.train != "classifier":
        raise ValueError(
            "Expected `train` classifier with `--cache-features`, which holds what the classifier "
            f"reads, got {recipe.train}"
        )
    assert setting.cache is not None
    model, data = start.make_model(recipe), setting.data.train
    contents = contents_of(model, data, recipe, draws=setting.cache_draws, seed=setting.seed)
    cache = FeatureCache(setting.cache, contents)
    broken = fill(
        cache,
        model,
        data,
        recipe,
        device=setting.device,
        num_workers=setting.num_workers,
        skip_broken=setting.skip_broken,
    )
    setting.broken.update(dict.fromkeys(broken))
    return cache


def checked(checkpoint: Checkpoint, setting: Setting, recipe: Recipe, path: Path) -> Checkpoint:
    """Return a checkpoint of this run.

    Raises:
        ValueError: It is of other options, categories, seed or number of processes.
    """
    before, now = dataclasses.asdict(checkpoint.recipe), dataclasses.asdict(recipe)
    changed = {key: (before[key], now[key]) for key in now if before[key] != now[key]}
    if checkpoint.training is not None:
        for key, value in (("seed", setting.seed), ("world_size", distributed.world_size())):
            if checkpoint.training[key] != value:
                changed[key] = (checkpoint.training[key], value)
    if checkpoint.categories != setting.data.categories:
        changed["categories"] = ("others", "those of the annotations")
    if changed:
        text = ", ".join(f"{key} was {old} and is {new}" for key, (old, new) in changed.items())
        raise ValueError(f"{path}: Expected to resume the same run, but {text}")
    return checkpoint


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
    if start.stage == BAGS:
        raise ValueError(f"{path}: Expected a detector with plain softmax to start from, got bags")
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


def with_weights_of(path: Path, recipe: Recipe, data: Data) -> Checkpoint:
    """Return a fresh softmax detector with what fits of any local checkpoint's weights.

    Args:
        path: A state dict, a checkpoint of this example, or a dict that holds one as `model` or
            `state_dict`.
        recipe: Of stage one.
        data: What is trained on.

    Raises:
        OSError: The file cannot be read.
        ValueError: It holds no weights, or none that fit.
    """
    content: dict[str, Any] = read_state(path)
    for key in ("model", "state_dict"):
        if isinstance(content.get(key), dict):
            content = content[key]
    model = make_detector(dataclasses.replace(recipe, weights="none"), len(data.categories.ids))
    try:
        fresh = load_what_fits(model, content)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    if distributed.is_first():
        shown = ", ".join(fresh[:6]) + (", ..." if len(fresh) > 6 else "")
        print(f"Not in {path}, and so fresh: {shown or 'nothing'}")
    return Checkpoint(SOFTMAX, recipe, data.categories, model.state_dict(), data.val_files)


def check_frozen(before: State, after: State) -> None:
    """Check that stage two changed nothing but the classifier, running statistics included."""
    old, new = (
        {key: value.cpu() for key, value in state.items() if not key.startswith(CLASSIFIER)}
        for state in (before, after)
    )
    changed = sorted(old.keys() ^ new.keys())
    changed += [key for key in old.keys() & new.keys() if not torch.equal(old[key], new[key])]
    if changed:
        raise RuntimeError(f"Stage two changed frozen entries: {', '.join(changed)}")
