"""All that decides how a detector is trained: options with their defaults, from TOML and argv.

A configuration file holds options, and tables of options that hold for one stage alone:

    detector = "faster_rcnn"
    backbone = "resnet50"

    [softmax]
    weights = "imagenet"

    [bags]
    learning_rate = 0.01

Every option is on the command line too, `--backbone resnet50` for all stages and
`--bags.learning-rate 0.01` for one, and wins over the file.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import os
import sys
import typing
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import tomli_w

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

STAGES = ("softmax", "bags")
"""Stage one, the whole detector with plain softmax; stage two, from there."""
STAGE_DEFAULTS: dict[str, dict[str, Any]] = {"softmax": {}, "bags": {"learning_rate": 0.01}}
"""Where they are not those of `Recipe`."""
RUN = "run"
"""A table of what is no option, such as the seed of a run; it is not read as a recipe."""
REFERENCE_BATCH = 16
"""Images a step that learning rates are stated for, as in the original's schedules."""


def option(
    default: Any,
    text: str,
    *,
    least: float = -math.inf,
    most: float = math.inf,
    above: float = -math.inf,
) -> Any:
    """A field of a recipe: its default, its help, and what values its numbers may have."""
    limits = {"least": least, "most": most, "above": above}
    return dataclasses.field(default=default, metadata={"help": text, **limits})


@dataclass(frozen=True)
class Recipe:
    """The options of one stage.

    Defaults are those of the paper's Faster R-CNN, stage one, but for the learning rate, which is
    torchvision's, and the start, which is not from COCO.
    """

    # The detector.
    detector: Literal["faster_rcnn", "mask_rcnn"] = option("faster_rcnn", "kind of detector")
    backbone: str = option(
        "resnet50", "small (the demo's), or a ResNet of torchvision such as resnext101_64x4d"
    )
    weights: Literal["none", "imagenet", "coco"] = option(
        "none",
        "weights that stage one starts from, downloaded by torchvision: of the backbone "
        "(imagenet), or of a whole detector (coco); "
        "stage two starts from stage one",
    )
    norm: Literal["frozen", "batch"] = option(
        "frozen", "normalisation of a ResNet: with fixed statistics, or with those of the batch"
    )
    trainable_layers: int = option(
        3,
        "stages of a ResNet that train, from the last one on; in stage two with `train` all only",
        least=0,
        most=5,
    )
    box_regression: Literal["category", "shared"] = option(
        "category", "box deltas for each category, or the same ones for all (shared)"
    )
    rois_per_image: int = option(512, "RoIs of an image that the box head trains on", least=1)
    foreground_share: float = option(
        0.25, "share of foreground among these RoIs, at most", above=0, most=1
    )

    # Images.
    short_sides: tuple[int, ...] = option(
        (800,),
        "shorter side of an image, in pixels; training draws one of these, evaluation takes the "
        "last",
        least=32,
    )
    long_side: int = option(1333, "longer side of an image at most, in pixels", least=32)
    flip: float = option(0.5, "probability of a horizontal flip", least=0, most=1)

    # Stage two.
    train: Literal["classifier", "box_head", "box_and_mask_heads", "all"] = option(
        "classifier", "stage two only: which part trains; stage one trains the whole detector"
    )
    others_ratio: float = option(
        8.0,
        "stage two only, with BAGS: others that count for each foreground RoI of a group",
        least=0,
    )
    category_weights: Literal["none", "inverse_frequency", "class_balanced"] = option(
        "none", "stage two only, with BAGS: weights of categories within their group"
    )
    tau: float = option(
        0.5, "of `--method` tau_norm and tau_norm_select: power of the norms", least=0, most=10
    )
    discriminant: float = option(
        0.1,
        "of `--method` bags_discriminant and bags_discriminant_start: strength of the start",
        least=0,
        most=10,
    )
    thresholds: tuple[int, ...] = option(
        (10, 100, 1000),
        "stage two only: training instances at which the next group begins; these groups are in "
        "the tables of both stages",
        least=1,
    )

    # Steps.
    batch_size: int = option(2, "images of a batch, in each process", least=1)
    accumulate: int = option(1, "batches whose gradients make one step", least=1)
    epochs: float = option(12.0, "times through the training images", above=0)
    steps: int = option(0, "steps of the optimizer in place of epochs; 0: epochs decide", least=0)
    optimizer: Literal["sgd", "adamw"] = option("sgd", "how gradients move the weights")
    learning_rate: float = option(
        0.02,
        "learning rate for 16 images a step; scaled to what there are. In stage two the default is "
        "0.01",
        above=0,
    )
    scale_learning_rate: bool = option(True, "scale the learning rate to the images of a step")
    momentum: float = option(0.9, "momentum of SGD", least=0, most=1)
    weight_decay: float = option(1e-4, "weight decay, of every weight that trains", least=0)
    schedule: Literal["step", "cosine"] = option(
        "step", "how the learning rate falls: at `milestones`, or along a cosine"
    )
    milestones: tuple[float, ...] = option(
        (8 / 12, 11 / 12),
        "shares of training after which the learning rate falls to a tenth",
        above=0,
        most=1,
    )
    warmup_steps: int = option(500, "steps until the learning rate is whole", least=0)
    warmup_start: float = option(
        1 / 3, "share of the learning rate that warm-up begins with", above=0, most=1
    )
    max_gradient_norm: float = option(
        35.0, "L2 norm that gradients are clipped to; 0: they are not", least=0
    )
    ema: float = option(0.0, "decay of a running mean of the weights; 0: none", least=0, most=1)
    sampler: Literal["shuffle", "repeat_factor"] = option(
        "shuffle", "images of an epoch: each once, or those of rare categories several times"
    )
    repeat_threshold: float = option(
        1e-3,
        "with repeat_factor: share of images below which those of a category repeat",
        above=0,
        most=1,
    )
    aspect_groups: bool = option(True, "batches of either wide or tall images")

    # Arithmetic.
    amp: Literal["off", "bfloat16", "float16"] = option("off", "automatic mixed precision")
    channels_last: bool = option(False, "memory format of images and convolutions")
    compile: bool = option(False, "torch.compile the backbone")

    # Detections.
    score_threshold: float = option(0.0, "score that a detection has to exceed", least=0, most=1)
    nms_threshold: float = option(
        0.5,
        "IoU above which, of two detections of a category, the one of lower score is dropped",
        least=0,
        most=1,
    )
    detections_per_image: int = option(
        300, "detections that are kept of an image, at most", least=1
    )

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = checked(field, getattr(self, field.name))
            object.__setattr__(self, field.name, value)
        if list(self.thresholds) != sorted(set(self.thresholds)):
            raise ValueError(f"Expected `thresholds` that ascend, got {list(self.thresholds)}")
        if not self.short_sides:
            raise ValueError("Expected `short_sides` to hold a length, got none")
        if max(self.short_sides) > self.long_side:
            raise ValueError(
                f"Expected `long_side` of at least {max(self.short_sides)}, the largest of "
                f"`short_sides`, got {self.long_side}"
            )
        if self.weights == "coco" and self.backbone != "resnet50":
            raise ValueError(
                "Expected `backbone` resnet50 with `weights` coco, the only one that torchvision "
                f"has detectors of, got {self.backbone}"
            )
        if self.backbone == "small" and self.weights != "none":
            raise ValueError(f"Expected `weights` none with `backbone` small, got {self.weights}")

    def check_start(self, *, from_checkpoint: bool) -> None:
        """Check that nothing stays as it was drawn at random.

        Raises:
            ValueError: A ResNet starts from nothing, and a part of it does not train.
        """
        if self.backbone == "small" or self.weights != "none" or from_checkpoint:
            return
        if self.norm == "frozen" or self.trainable_layers < 5:
            raise ValueError(
                "Expected `weights` imagenet or coco, a `--checkpoint`, or `norm` batch and "
                f"`trainable_layers` 5 to start from nothing, got `weights` none, `norm` "
                f"{self.norm}, `trainable_layers` {self.trainable_layers}"
            )

    def to_toml(self) -> str:
        """All options as text that `from_toml` reads."""
        return tomli_w.dumps(self._values())

    def _values(self) -> dict[str, Any]:
        values = dataclasses.asdict(self)
        return {key: list(v) if isinstance(v, tuple) else v for key, v in values.items()}

    @classmethod
    def from_toml(cls, text: str) -> Recipe:
        """Read what `to_toml` wrote."""
        return cls(**tomllib.loads(text))


ARCHITECTURE = ("detector", "backbone", "norm", "box_regression")
"""Options that decide what weights a detector has; a checkpoint brings its own."""
FIELDS = {field.name: field for field in dataclasses.fields(Recipe)}
TYPES: dict[str, Any] = typing.get_type_hints(Recipe)


def checked(field: dataclasses.Field[Any], value: Any) -> Any:
    """The value of an option in the type of its field.

    Raises:
        ValueError: It is of another type, not among the choices, or out of range.
    """
    kind = TYPES[field.name]
    if typing.get_origin(kind) is tuple:
        if not isinstance(value, list | tuple):
            raise ValueError(f"Expected `{field.name}` to be a list, got {value!r}")
        return tuple(_scalar(field, typing.get_args(kind)[0], each) for each in value)
    return _scalar(field, kind, value)


def _scalar(field: dataclasses.Field[Any], kind: Any, value: Any) -> Any:
    name = field.name
    choices = typing.get_args(kind)
    if choices:
        if value not in choices:
            raise ValueError(f"Expected `{name}` to be one of {', '.join(choices)}, got {value!r}")
        return value
    fits = isinstance(value, kind) or (kind is float and isinstance(value, int))
    if not fits or (isinstance(value, bool) and kind is not bool):
        word = {"int": "an integer", "float": "a number", "str": "text", "bool": "true or false"}
        raise ValueError(f"Expected `{name}` to be {word[kind.__name__]}, got {value!r}")
    if kind in (int, float):
        limits = field.metadata
        # A NaN fails each comparison.
        if not (limits["least"] <= value <= limits["most"] and value > limits["above"]):
            raise ValueError(f"Expected `{name}` {_range(limits)}, got {value}")
    return kind(value)


def _range(limits: Mapping[str, Any]) -> str:
    words = [
        f"{word} {limits[key]:g}"
        for key, word in (("above", "above"), ("least", "of at least"), ("most", "at most"))
        if math.isfinite(limits[key])
    ]
    return " and ".join(words) or "a number"


# --- files ------------------------------------------------------------------------------------


def read_options(path: str | os.PathLike[str]) -> dict[str, dict[str, Any]]:
    """Return what a configuration file says: options for all stages under "", then by stage.

    A table `run`, as in the files of `run_toml`, is passed over.

    Raises:
        OSError: The file cannot be read.
        ValueError: It is not TOML, or has an unknown option or table.
    """
    try:
        content = tomllib.loads(Path(path).read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: Expected TOML, got an error: {error}") from None
    options: dict[str, dict[str, Any]] = {"": {}, **{stage: {} for stage in STAGES}}
    for key, value in content.items():
        if key == RUN and isinstance(value, dict):
            continue
        table, values = (key, value) if isinstance(value, dict) else ("", {key: value})
        if table not in options:
            raise ValueError(f"{path}: Expected tables {', '.join(STAGES)}, got [{table}]")
        for name in values:
            if name not in FIELDS:
                where = f" in [{table}]" if table else ""
                raise ValueError(f"{path}: Expected options that exist, got {name!r}{where}")
        options[table].update(values)
    return options


def recipes_of(*sources: Mapping[str, Mapping[str, Any]]) -> dict[str, Recipe]:
    """Return the recipe of each stage; later sources win, and a stage's own option wins in each."""
    made = {}
    for stage in STAGES:
        values: dict[str, Any] = dict(STAGE_DEFAULTS[stage])
        for source in sources:
            for table in ("", stage):
                own = source.get(table, {})
                if "epochs" in own and "steps" not in own:
                    values["steps"] = 0  # the later word
                values.update(own)
        made[stage] = Recipe(**values)
    return made


def run_toml(
    recipes: Mapping[str, Recipe], run: Mapping[str, Any], identity: Mapping[str, Any]
) -> str:
    """Return all that a run does: a configuration file, and what is no option in a table `run`.

    Args:
        recipes: By stage.
        run: The other arguments.
        identity: What makes it this run and no other; `read_identity` returns it.
    """
    values = {stage: recipe._values() for stage, recipe in recipes.items()}
    same = {
        name: value
        for name, value in values[STAGES[0]].items()
        if all(values[stage][name] == value for stage in STAGES)
    }
    if not {"steps", "epochs"} <= same.keys():  # the one means nothing without the other
        same = {name: value for name, value in same.items() if name not in ("steps", "epochs")}
    own: dict[str, Any] = {
        stage: {name: value for name, value in values[stage].items() if name not in same}
        for stage in STAGES
    }
    return tomli_w.dumps({**same, **own, RUN: {**run, "identity": dict(identity)}})


def read_identity(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Return the identity in a file of `run_toml`.

    Raises:
        OSError: The file cannot be read.
        ValueError: It is another file.
    """
    try:
        content = tomllib.loads(Path(path).read_text(encoding="utf-8"))
        identity: dict[str, Any] = content[RUN]["identity"]
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, KeyError, TypeError) as error:
        raise ValueError(f"{path}: Expected the recipe of a run, got an error: {error!r}") from None
    return identity


# --- command line -----------------------------------------------------------------------------


def add_options(parser: argparse.ArgumentParser) -> None:
    """Give a parser every option, for all stages and, unlisted, for one."""
    group = parser.add_argument_group(
        "recipe",
        "Each option is for all stages, or with the name of a stage for that one, such as "
        "--bags.learning-rate (softmax: stage one; bags: stage two, whatever its method). What "
        "is not given is taken from the file of --config (without one, the demo's), or else is as "
        "said here.",
    )
    for name, field in FIELDS.items():
        for stage in ("", *STAGES):
            flag = "--" + ".".join(filter(None, [stage, name.replace("_", "-")]))
            group.add_argument(
                flag,
                dest=f"{stage}.{name}",
                default=argparse.SUPPRESS,
                help=argparse.SUPPRESS if stage else _help(name, field),
                **_argument(name),
            )


def given_options(arguments: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """Return the options that were given, as `read_options` does."""
    options: dict[str, dict[str, Any]] = {"": {}, **{stage: {} for stage in STAGES}}
    for key, value in vars(arguments).items():
        stage, dot, name = key.partition(".")
        if dot:
            options[stage][name] = value
    return options


def _argument(name: str) -> dict[str, Any]:
    kind = TYPES[name]
    if kind is bool:
        return {"action": argparse.BooleanOptionalAction}
    if typing.get_origin(kind) is tuple:
        return {"nargs": "+", "type": typing.get_args(kind)[0], "metavar": "N"}
    if typing.get_args(kind):
        return {"choices": typing.get_args(kind)}
    return {"type": kind, "metavar": {int: "N", float: "X", str: "NAME"}[kind]}


def _help(name: str, field: dataclasses.Field[Any]) -> str:
    default = field.default
    if isinstance(default, bool):
        shown = "on" if default else "off"
    elif isinstance(default, str):
        shown = default
    else:
        values = default if isinstance(default, tuple) else (default,)
        shown = " ".join(f"{value:.3g}" if value < 1 else f"{value:g}" for value in values)
    return f"{field.metadata['help']} (default: {shown})".replace("%", "%%")


def images_a_step(recipe: Recipe, world_size: int) -> int:
    """Return how many images a step takes, over all processes."""
    return recipe.batch_size * recipe.accumulate * world_size


def scaled_learning_rate(recipe: Recipe, world_size: int) -> float:
    """Return the learning rate for the images that a step takes."""
    if not recipe.scale_learning_rate:
        return recipe.learning_rate
    return recipe.learning_rate * images_a_step(recipe, world_size) / REFERENCE_BATCH


def learning_rate_factor(recipe: Recipe, step: int, steps: int) -> float:
    """Return the part of the learning rate that a step has.

    Args:
        recipe: The schedule.
        step: Counted from 0.
        steps: All there will be.
    """
    warm = 1.0
    if step < recipe.warmup_steps:
        warm = recipe.warmup_start + (1 - recipe.warmup_start) * step / recipe.warmup_steps
    if recipe.schedule == "cosine":
        return warm * (1 + math.cos(math.pi * step / steps)) / 2
    fallen = sum(step >= round(part * steps) for part in recipe.milestones)
    return warm * 0.1**fallen
