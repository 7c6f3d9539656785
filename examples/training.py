"""The loop that trains a detector: on one process or many, killed and resumed at any step.

All that is random in a step depends on the seed, the stage, the step and the process, and in an
image on its place in the epoch. So a run that goes on from a checkpoint computes what it would
have computed without the break, and two classifiers of stage two see the same images, flips and
RoIs whatever else they draw.
"""

from __future__ import annotations

import math
import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import distributed
import numpy as np
import torch
from checkpoints import State
from recipe import Recipe, learning_rate_factor, scaled_learning_rate
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from tqdm import tqdm

AUTOCAST = {"bfloat16": torch.bfloat16, "float16": torch.float16}
LOOK_EVERY = 20
"""Steps between looks at the loss on an accelerator, where each look waits for it."""

Place = tuple[int, int]
"""Epoch, and batch in it."""
Batch = tuple[list[Tensor], list[dict[str, Any]]]


@dataclass
class Job:
    """One training: a model, and what it is trained with."""

    name: str
    recipe: Recipe
    model: nn.Module
    parameters: list[nn.Parameter]
    batches: Callable[[Place], Iterator[tuple[Place, Batch]]]
    """From a place on, for ever: batches, each with the place after it."""
    steps: int
    seed: tuple[int, ...]
    """Of the run and the stage."""
    device: torch.device
    save: Callable[[State], None]
    """Called with what is to be kept beside the model's weights."""
    save_every: int
    log: Callable[[int, dict[str, float]], None] = field(default=lambda step, values: None)
    after_epoch: Callable[[int], None] | None = None
    """Called with how many epochs are over; `model` has the running mean of its weights then."""


class Interrupted(Exception):
    """The process was asked to end by a signal; a checkpoint was written."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.status = 128 + number
        """How a shell says that the signal ended a command."""


def train(job: Job, resume: State | None = None) -> None:
    """Train `job.model`, from the beginning or from what `job.save` was called with.

    Raises:
        FloatingPointError: A loss is not finite. What was saved last is from before.
        Interrupted: By SIGTERM or Ctrl-C, after a checkpoint.
    """
    mean = None
    if job.recipe.ema:
        mean = AveragedModel(job.model, multi_avg_fn=get_ema_multi_avg_fn(job.recipe.ema))
    optimizer = make_optimizer(job)
    scaler = torch.amp.GradScaler(job.device.type, enabled=job.recipe.amp == "float16")
    step, place = 0, (0, 0)
    if resume is not None:
        step, place = resume["step"], (resume["epoch"], resume["batch"])
        optimizer.load_state_dict(resume["optimizer"])
        scaler.load_state_dict(resume["scaler"])
        if mean is not None:
            mean.load_state_dict(resume["mean"])
    watch = Watch(job)
    take_step = Stepper(job, optimizer, scaler, watch)

    def save() -> None:
        watch.look(step)  # nothing that is not finite is kept
        check_weights(job, step)
        job.save(
            {
                "step": step,
                "epoch": place[0],
                "batch": place[1],
                "optimizer": optimizer.state_dict(),
                "scaler": scaler.state_dict(),
                "mean": None if mean is None else mean.state_dict(),
            }
        )

    batches = job.batches(place)
    look_every = 1 if job.device.type == "cpu" else LOOK_EVERY
    bar = tqdm(
        total=job.steps,
        initial=step,
        desc=f"Training {job.name}",
        unit="step",
        disable=not distributed.is_first(),
    )
    job.model.train()
    with bar, asked_to_end() as asked:
        while step < job.steps:
            epoch = place[0]
            place = take_step(step, batches)
            if mean is not None:
                mean.update_parameters(job.model)
            step += 1
            if step % look_every == 0 or step == job.steps:
                watch.look(step)
                if distributed.agree(bool(asked), job.device):
                    save()
                    raise Interrupted(asked[0] if asked else signal.SIGTERM)
            if step % job.save_every == 0 and step < job.steps:
                save()
            if job.after_epoch is not None and place[0] > epoch and step < job.steps:
                distributed.share_buffers(job.model)
                save()  # what comes may take long
                with averaged(job.model, mean):
                    job.after_epoch(place[0])
            bar.update()
            bar.set_postfix(loss=f"{watch.last:.3f}", refresh=False)
    check_weights(job, step)
    if mean is not None:
        job.model.load_state_dict(mean.module.state_dict())
    distributed.share_buffers(job.model)


@contextmanager
def averaged(model: nn.Module, mean: AveragedModel | None) -> Iterator[None]:
    """Give a model the running mean of its weights for a while."""
    if mean is None:
        yield
        return
    own = {name: value.clone() for name, value in model.state_dict().items()}
    model.load_state_dict(mean.module.state_dict())
    distributed.share_buffers(model)  # a mean has those of its process
    try:
        yield
    finally:
        model.load_state_dict(own)


class Stepper:
    """Takes one step of training, of one batch or several."""

    def __init__(
        self,
        job: Job,
        optimizer: torch.optim.Optimizer,
        scaler: torch.amp.GradScaler,
        watch: Watch,
    ) -> None:
        self.job, self.optimizer, self.scaler, self.watch = job, optimizer, scaler, watch
        self.model = distributed.parallel(job.model, job.device)

    def __call__(self, step: int, batches: Iterator[tuple[Place, Batch]]) -> Place:
        """Take the step; return the place after its last batch."""
        recipe = self.job.recipe
        set_learning_rate(self.optimizer, recipe, step, self.job.steps)
        for part in range(recipe.accumulate):
            place, (images, targets) = next(batches)
            if part == 0:
                seed_step(self.job.seed, step)
            with self._gradients_stay_here(part < recipe.accumulate - 1):
                losses = forward(self.model, images, targets, self.job)
                loss = torch.stack(list(losses.values())).sum() / recipe.accumulate
                self.scaler.scale(loss).backward()
            self.watch.add(losses)
        self.scaler.unscale_(self.optimizer)
        if recipe.max_gradient_norm:
            nn.utils.clip_grad_norm_(self.job.parameters, recipe.max_gradient_norm)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        return place

    def _gradients_stay_here(self, stay: bool) -> Any:
        """Until the last batch of a step, processes need not exchange gradients."""
        if stay and isinstance(self.model, nn.parallel.DistributedDataParallel):
            return self.model.no_sync()
        return nullcontext()


def forward(
    model: nn.Module, images: list[Tensor], targets: list[dict[str, Any]], job: Job
) -> dict[str, Tensor]:
    """Return the losses of a batch."""
    recipe, device = job.recipe, job.device
    images = [image.to(device, non_blocking=True) for image in images]
    on_device = [
        {
            key: value.to(device, non_blocking=True) if isinstance(value, Tensor) else value
            for key, value in target.items()
        }
        for target in targets
    ]
    with torch.autocast(device.type, AUTOCAST.get(recipe.amp), enabled=recipe.amp != "off"):
        losses: dict[str, Tensor] = model(images, on_device)
    return losses


def check_weights(job: Job, step: int) -> None:
    """Look at what trains: a finite loss can have a gradient that is not.

    Raises:
        FloatingPointError: A weight is not finite, in any process.
    """
    finite = torch.stack([parameter.isfinite().all() for parameter in job.parameters]).all()
    if distributed.agree(not bool(finite), job.device):
        raise FloatingPointError(
            f"Training {job.name} diverged before step {step + 1}: weights are not finite; "
            "try a lower --learning-rate"
        )


def make_optimizer(job: Job) -> torch.optim.Optimizer:
    """Return the optimiser of a recipe for what trains."""
    recipe = job.recipe
    rate = scaled_learning_rate(recipe, distributed.world_size())
    options: dict[str, Any] = {"lr": rate, "weight_decay": recipe.weight_decay}
    if recipe.optimizer == "adamw":
        optimizer: torch.optim.Optimizer = torch.optim.AdamW(job.parameters, **options)
    else:
        optimizer = torch.optim.SGD(job.parameters, momentum=recipe.momentum, **options)
    for group in optimizer.param_groups:
        group["initial_lr"] = rate
    return optimizer


def set_learning_rate(
    optimizer: torch.optim.Optimizer, recipe: Recipe, step: int, steps: int
) -> None:
    """Set the learning rate of a step."""
    factor = learning_rate_factor(recipe, step, steps)
    for group in optimizer.param_groups:
        group["lr"] = group["initial_lr"] * factor


def seed_step(seed: tuple[int, ...], step: int) -> None:
    """Seed what a step draws: RoIs, anchors, and which others count. Each process draws its own."""
    sequence = np.random.SeedSequence([*seed, step, distributed.rank()])
    torch.manual_seed(int(sequence.generate_state(1, np.uint64)[0]))


class Watch:
    """Means of the losses, added up where they are and looked at from time to time."""

    def __init__(self, job: Job) -> None:
        self.job = job
        self.sums: dict[str, Tensor] = {}
        self.number = 0
        self.last = math.nan

    def add(self, losses: dict[str, Tensor]) -> None:
        """Take the losses of a batch."""
        for name, loss in losses.items():
            value = loss.detach().float()
            self.sums[name] = self.sums[name] + value if name in self.sums else value
        self.number += 1

    def look(self, step: int) -> None:
        """Log the means since the last look.

        Raises:
            FloatingPointError: One of them is not finite, in any process.
        """
        if not self.number:
            return
        values = torch.stack(list(self.sums.values())).tolist()
        means = {name: value / self.number for name, value in zip(self.sums, values, strict=True)}
        self.sums, self.number = {}, 0
        self.last = sum(means.values())
        if distributed.agree(not math.isfinite(self.last), self.job.device):
            parts = ", ".join(f"{name} {value:g}" for name, value in means.items())
            raise FloatingPointError(
                f"Training {self.job.name} diverged at step {step} ({parts}); "
                "try a lower --learning-rate"
            )
        if distributed.is_first():
            self.job.log(step, {"loss": self.last, **means})


@contextmanager
def asked_to_end() -> Iterator[list[int]]:
    """Take note of SIGTERM and Ctrl-C instead of ending at once; a second Ctrl-C does end it.

    Yields:
        The numbers of the signals that came.
    """
    asked: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield asked
        return

    def note(number: int, frame: Any) -> None:
        asked.append(number)
        # torchrun passes Ctrl-C on to processes that the terminal has told of it already.
        if number == signal.SIGINT and distributed.world_size() == 1:
            os.write(2, b"\nEnding after this step, with a checkpoint; Ctrl-C again: at once\n")
            signal.signal(number, before[number])

    before: dict[int, Any] = {
        number: signal.signal(number, note)
        for number in (signal.SIGTERM, signal.SIGINT)
        # A shell's background job ignores Ctrl-C, which is meant for another.
        if signal.getsignal(number) is not signal.SIG_IGN
    }
    try:
        yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
