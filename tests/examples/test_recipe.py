"""Recipes: defaults, files, command lines, and the schedules that they mean."""

import argparse
import dataclasses
import math
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("torchvision")
sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))

import recipe as module
from recipe import (
    Recipe,
    add_options,
    given_options,
    learning_rate_factor,
    read_options,
    recipes_of,
    run_toml,
    scaled_learning_rate,
)

CONFIGS = sorted((Path(module.__file__).parent / "configs").glob("*.toml"))


def parsed(*argv: str) -> dict[str, dict[str, object]]:
    parser = argparse.ArgumentParser()
    add_options(parser)
    return given_options(parser.parse_args(argv))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_effective_configuration_reads_back(path: Path, tmp_path: Path) -> None:
    recipes = recipes_of(read_options(path))
    (tmp_path / "again.toml").write_text(run_toml(recipes, {"seed": 3}))
    assert recipes_of(read_options(tmp_path / "again.toml")) == recipes
    for one in recipes.values():
        assert Recipe.from_toml(one.to_toml()) == one


def test_the_command_line_wins_and_a_stage_wins_over_all(tmp_path: Path) -> None:
    path = tmp_path / "a.toml"
    path.write_text("flip = 0.1\nsteps = 5\n[bags]\nsteps = 7\nema = 0.5\n")
    made = recipes_of(read_options(path), parsed("--flip", "0.2", "--bags.flip", "0.3"))
    assert (made["softmax"].flip, made["bags"].flip) == (0.2, 0.3)
    assert (made["softmax"].steps, made["bags"].steps) == (5, 7)
    made = recipes_of(read_options(path), parsed("--steps", "9"))
    assert (made["softmax"].steps, made["bags"].steps, made["bags"].ema) == (9, 9, 0.5)


def test_every_option_is_on_the_command_line() -> None:
    texts = {bool: [], int: ["3"], float: ["0.5"], str: ["small"]}
    for field in dataclasses.fields(Recipe):
        kind = module.TYPES[field.name]
        flag = f"--{field.name.replace('_', '-')}"
        value = field.default
        if isinstance(value, tuple):
            found = parsed(flag, *map(str, value))[""]
            assert tuple(found[field.name]) == value  # type: ignore[arg-type]
        elif kind in texts:
            assert field.name in parsed(flag, *texts[kind])[""]
        else:
            assert parsed(flag, str(value))[""] == {field.name: value}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("steps = ", "Expected TOML"),
        ("stepz = 3", "'stepz'"),
        ("[bagz]\nsteps = 3", r"\[bagz\]"),
        ("[bags]\nstepz = 3", r"'stepz' in \[bags\]"),
    ],
)
def test_a_bad_file_names_itself_and_the_option(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "bad.toml"
    path.write_text(text)
    with pytest.raises(ValueError, match=message) as caught:
        read_options(path)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("steps", -1, "at least 0, got -1"),
        ("steps", 1.5, "an integer, got 1.5"),
        ("steps", True, "an integer, got True"),
        ("learning_rate", math.nan, "above 0, got nan"),
        ("learning_rate", "1e-4", "a number, got '1e-4'"),
        ("flip", 1.1, "at most 1, got 1.1"),
        ("compile", 1, "true or false, got 1"),
        ("detector", "yolo", "one of faster_rcnn, mask_rcnn, got 'yolo'"),
        ("short_sides", 800, "a list, got 800"),
        ("short_sides", (), "to hold a length"),
        ("thresholds", (100, 10), "ascend"),
    ],
)
def test_a_bad_value_is_told(name: str, value: object, message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        Recipe(**{name: value})  # type: ignore[arg-type]
    assert f"`{name}`" in str(caught.value)


def test_options_that_do_not_go_together() -> None:
    with pytest.raises(ValueError, match="`long_side` of at least 800"):
        Recipe(long_side=700)
    with pytest.raises(ValueError, match="`backbone` resnet50 with `weights` coco"):
        Recipe(backbone="resnet101", weights="coco")


def test_learning_rate_is_that_of_the_images_of_a_step() -> None:
    one = Recipe(batch_size=2, accumulate=3, learning_rate=0.02)
    assert scaled_learning_rate(one, world_size=4) == pytest.approx(0.02 * 24 / 16)
    fixed = dataclasses.replace(one, scale_learning_rate=False)
    assert scaled_learning_rate(fixed, world_size=4) == 0.02


def test_the_original_schedule() -> None:
    """12 epochs with falls after 8 and 11, and a warm-up of 500 steps from a third."""
    steps = 12 * 1000
    factors = [learning_rate_factor(Recipe(), step, steps) for step in range(steps)]
    assert factors[0] == pytest.approx(1 / 3)
    assert factors[250] == pytest.approx(2 / 3)
    assert factors[500:8000] == [1.0] * 7500
    assert factors[8000:11000] == pytest.approx([0.1] * 3000)
    assert factors[11000:] == pytest.approx([0.01] * 1000)


@given(st.integers(1, 400), st.integers(0, 50), st.sampled_from(["step", "cosine"]))
def test_no_step_has_more_than_the_learning_rate(steps: int, warm: int, schedule: str) -> None:
    one = Recipe(warmup_steps=warm, schedule=schedule)  # type: ignore[arg-type]
    for step in range(steps):
        assert 0 < learning_rate_factor(one, step, steps) <= 1


def test_learning_rates_of_the_stages_are_the_originals() -> None:
    rates = [made.learning_rate for made in recipes_of().values()]
    assert rates == [0.02, 0.01]
    rates = [made.learning_rate for made in recipes_of({"": {"learning_rate": 0.5}}).values()]
    assert rates == [0.5, 0.5]
