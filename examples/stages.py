"""The trainings of a run: plain softmax, and from there other methods, or more of the same.

Each ends in a checkpoint `<name>.pt` in the run folder; until then `<name>.training.pt` is what an
interrupted one goes on from.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import distributed
import torch
from checkpoints import Checkpoint, State
from detection_data import make_transforms
from detectors import CLASSIFIER, PREDICTOR, make_detector, place
from discriminant_start import start_with_discriminant, stored_rows
from feature_cache import (
    CachedBatches,
    CachedClassifier,
    CacheOptions,
    FeatureCache,
    contents_of,
    fill,
    rois_of,
    shared_batches,
)
from loading import TrainingBatches, epoch_batches, steps_of
from methods import METHODS, begin, training_data
from nearest_means import Features, gather_means
from pooled_class_mean import use_class_means
from recipe import Recipe
from resuming import check_same_run, note_broken, origin
from run_data import Data
from torch import Tensor, nn
from training import Job, train

from balanced_group_softmax.adapters.torchvision import freeze
from balanced_group_softmax.discriminant import DiscriminantHead

SOFTMAX, CONTINUED, BAGS = "softmax", "softmax_continued", "bags"
STAGE_NUMBER = {"softmax": 1, "bags": 2}
"""All methods of a stage see the same images, flips and RoIs."""
CLASS_MEANS: dict[str, Features] = {"ncm_fc": "fc", "ncm_conv": "conv"}
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
    after_epoch: Callable[[str, nn.Module, int], None] | None = None
    """Given a training's name, the detector, and how many epochs are over."""
    broken: dict[str, None] = field(default_factory=dict)
    """What was wrong with images."""
    start: Checkpoint | None = None
    """What the first training starts from."""
    cache: CacheOptions | None = None
    """The features that stage two trains from; None to run the detector."""

    def recipe(self, name: str) -> Recipe:
        """Return the recipe of a training."""
        return self.recipes[METHODS[name].stage]


def run_stage(setting: Setting, name: str, start: Checkpoint | None) -> Checkpoint:
    """Train, or go on, or return what an earlier run has finished; in every process.

    Args:
        setting: Of the run.
        name: Of the method.
        start: What it starts from, which all but those from scratch need.

    Raises:
        OSError: A checkpoint cannot be read or written.
        ValueError: What is to be resumed is another run.
        FloatingPointError: Training diverged.
        Interrupted: The process was asked to end.
    """
    done, partial = setting.folder / f"{name}.pt", setting.folder / f"{name}.training.pt"
    method, recipe = METHODS[name], setting.recipe(name)
    setting = on_its_data(setting, name)
    data = setting.data
    wanted = setting.cache if method.start == "softmax" and method.trains else None
    comes_from = origin(
        seed=setting.seed,
        data=data.train.fingerprint,
        start=start,
        cache=wanted,
    )
    found, resumed = _found(setting, done, partial), None
    if found is not None:
        path, resumed = found
        check_same_run(path, resumed, recipe, data.categories, comes_from)
        if resumed.training is None:
            if distributed.is_first():
                partial.unlink(missing_ok=True)  # of a run that was killed in between
            return resumed

    def content(model: nn.Module, training: State | None) -> Checkpoint:
        state = model.state_dict()
        return Checkpoint(
            name, recipe, data.categories, state, data.val_files, comes_from, training
        )

    torch.manual_seed(setting.seed)
    if method.trains:
        model = trained(setting, name, start, resumed, wanted, content)
    else:
        assert start is not None
        model = without_training(setting, name, start)
    stays = method.start == "softmax" and method.trains and recipe.train == "classifier"
    if start is not None and stays:
        check_frozen(start.model, model.state_dict())
    finished = content(model, None)
    if distributed.is_first():
        finished.save(done)
        partial.unlink(missing_ok=True)
    distributed.barrier()
    return finished


def on_its_data(setting: Setting, name: str) -> Setting:
    """Return the setting with what a method trains on."""
    data = setting.data
    own = training_data(name, data.train, data.categories.counts)
    return dataclasses.replace(setting, data=dataclasses.replace(data, train=own))


def trained(
    setting: Setting,
    name: str,
    start: Checkpoint | None,
    resumed: Checkpoint | None,
    wanted: CacheOptions | None,
    content: Callable[[nn.Module, State | None], Checkpoint],
) -> nn.Module:
    """Train a method's detector to the end, from its start or where it was interrupted.

    Args:
        setting: Of the run, with the method's data.
        name: Of the method.
        start: What it starts from.
        resumed: A checkpoint of its training to go on from.
        wanted: The features that it trains from; None to run the detector.
        content: Returns a checkpoint of the detector and the state of training.
    """
    method, recipe, data = METHODS[name], setting.recipe(name), setting.data
    data.train.transforms = make_transforms(flip=recipe.flip)
    model = make_model(setting, name, start) if resumed is None else resumed.make_model()
    place(model, recipe, setting.device)
    if method.start == "scratch":
        parameters = [p for p in model.parameters() if p.requires_grad]
    else:
        parameters = freeze(model, recipe.train)

    def save(state: State) -> None:
        note_broken(setting.folder, setting.broken, batches.broken)
        if distributed.is_first():
            checkpoint = content(model, {**state, "processes": distributed.world_size()})
            checkpoint.save(setting.folder / f"{name}.training.pt")

    cache, module = None, model
    if wanted is not None:
        assert start is not None
        cache = filled_cache(setting, wanted, start, recipe)
        module = CachedClassifier(model.get_submodule(PREDICTOR))
    if method.kind is DiscriminantHead and recipe.train != "classifier":
        raise ValueError(
            f"Expected `train` classifier with `--method {name}`, whose analysis is of features "
            f"that do not change, got {recipe.train}"
        )
    if method.discriminant and resumed is None:
        assert start is not None
        head: Any = model.get_submodule(PREDICTOR)
        rows = stored_rows(cache) if cache is not None else seen_rows(setting, start, recipe)
        start_with_discriminant(head, data.categories.counts, recipe, rows)
    job, batches = make_job(setting, name, module, parameters, save, cache)
    if setting.after_epoch is not None:
        job.after_epoch = functools.partial(setting.after_epoch, name, model)
    training = None if resumed is None else resumed.training
    job.log = setting.logger(name, 0 if training is None else training["step"])
    train(job, training)
    note_broken(setting.folder, setting.broken, batches.broken)
    return model


def without_training(setting: Setting, name: str, start: Checkpoint) -> nn.Module:
    """Return a softmax detector with the classifier of a method that does not train."""
    recipe, data = setting.recipe(name), setting.data
    if name not in CLASS_MEANS:
        return make_model(setting, name, start)
    data.train.transforms = make_transforms()
    model = start.make_model(recipe)
    classifier, broken = gather_means(
        place(model, recipe, setting.device),
        data.train,
        recipe,
        CLASS_MEANS[name],
        device=setting.device,
        num_workers=setting.num_workers,
        skip_broken=setting.skip_broken,
    )
    note_broken(setting.folder, setting.broken, broken)
    return use_class_means(model, classifier)


def _found(setting: Setting, done: Path, partial: Path) -> tuple[Path, Checkpoint] | None:
    """Return the checkpoint to go on from, if there is one and it is asked for."""
    if not setting.resume:
        return None
    # One process looks for all: a method that does not train ends without waiting for the others.
    there = distributed.from_first([path.exists() for path in (done, partial)])
    if not any(there):
        return None
    path = done if there[0] else partial
    return path, Checkpoint.load(path)


def make_model(setting: Setting, name: str, start: Checkpoint | None) -> nn.Module:
    """Return the detector that a training begins with."""
    recipe, data = setting.recipe(name), setting.data
    if start is None:
        return make_detector(recipe, len(data.categories.ids))
    layout, counts = data.categories.layout(recipe.thresholds), data.categories.counts
    return begin(start.make_model(recipe), name, layout, counts, recipe, data.train)


def make_job(
    setting: Setting,
    name: str,
    model: nn.Module,
    parameters: list[nn.Parameter],
    save: Callable[[State], None],
    cache: FeatureCache | None,
) -> tuple[Job, TrainingBatches | CachedBatches]:
    """Return a training and where its batches come from."""
    recipe, number = setting.recipe(name), STAGE_NUMBER[METHODS[name].stage]
    order = epoch_batches(
        setting.data.train,
        recipe,
        seed=10 * setting.seed + number,
        num_replicas=distributed.world_size(),
        rank=distributed.rank(),
    )
    batches: TrainingBatches | CachedBatches
    if cache is not None:
        batches = CachedBatches(cache, order, recipe)
    else:
        batches = TrainingBatches(
            setting.data.train,
            order,
            num_workers=setting.num_workers,
            skip_broken=setting.skip_broken,
        )
    steps = steps_of(recipe, order)
    if 2 * recipe.warmup_steps > steps and distributed.is_first():
        print(
            f"{name}: warm-up takes {recipe.warmup_steps} steps, and training {steps}; give less "
            "by `--warmup-steps`, or more by `--epochs` or `--steps`"
        )
    job = Job(
        name=name,
        recipe=recipe,
        model=model,
        parameters=parameters,
        batches=batches,
        steps=steps,
        seed=(setting.seed, number),
        device=setting.device,
        save=save,
        save_every=setting.save_every,
    )
    return job, batches


def seen_rows(
    setting: Setting, start: Checkpoint, recipe: Recipe
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield features and labels of one pass of a softmax detector over the data."""
    data, broken = setting.data.train, dict[str, None]()
    rows = rois_of(
        start.make_model(recipe),
        data,
        recipe,
        shared_batches(1, len(data), recipe.batch_size),
        rois=2 * recipe.rois_per_image,
        seed=setting.seed,
        device=setting.device,
        num_workers=setting.num_workers,
        skip_broken=setting.skip_broken,
        note_broken=lambda reason: broken.update({reason: None}),
    )
    for _, _, features, labels in rows:
        yield features, labels
    note_broken(setting.folder, setting.broken, broken)


def filled_cache(
    setting: Setting, wanted: CacheOptions, start: Checkpoint, recipe: Recipe
) -> FeatureCache:
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
    model, data = start.make_model(recipe), setting.data.train
    cache = FeatureCache(wanted.folder, contents_of(model, data, recipe, wanted, seed=setting.seed))
    fill(
        cache,
        model,
        data,
        recipe,
        device=setting.device,
        num_workers=setting.num_workers,
        skip_broken=setting.skip_broken,
    )
    note_broken(setting.folder, setting.broken, cache.broken)
    return cache


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
