"""Without background: BAGS on frozen features of a long-tailed classification task."""

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))

import classification

SEEDS = (0, 1, 2)


@pytest.fixture(scope="module")
def results() -> list[dict[str, dict[str, float]]]:
    return [classification.compare(seed) for seed in SEEDS]


def test_counts_fall_as_in_lvis() -> None:
    counts = torch.tensor(classification.draw_counts())
    assert len(counts) == classification.CLASSES
    assert (counts == 0).any()
    assert (counts < 10).sum() >= 30
    assert (counts >= 1000).sum() >= 10


@pytest.mark.parametrize("option", ["--epochs=0", "--seeds=-1", "--seeds=x"])
def test_absurd_options_are_refused(option: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        classification.main([option])
    assert left.value.code == 2
    assert f"argument {option.partition('=')[0]}: " in capsys.readouterr().err


@pytest.mark.parametrize("place", range(len(SEEDS)))
def test_bags_gains_on_the_tail_and_loses_nothing_over_all(
    results: list[dict[str, dict[str, float]]], place: int
) -> None:
    softmax, bags = results[place]["softmax"], results[place]["bags"]
    assert bags["0_10"] >= softmax["0_10"] + 5
    assert bags["all"] >= softmax["all"] - 0.5
    # Not won against a baseline that has learnt nothing.
    assert softmax["1000_inf"] > 90
    assert softmax["10_100"] > 40


def test_baseline_is_trained_to_convergence(
    results: list[dict[str, dict[str, float]]],
) -> None:
    """Three times as many epochs must not close the gap."""
    epochs = 3 * classification.EPOCHS
    longer = classification.compare(SEEDS[0], epochs, kinds=("softmax",))["softmax"]
    shorter = results[0]["softmax"]
    assert longer["all"] < shorter["all"] + 1
    assert results[0]["bags"]["0_10"] >= longer["0_10"] + 5


def test_discriminant_analysis_adds_to_that(results: list[dict[str, dict[str, float]]]) -> None:
    more = classification.compare(SEEDS[0], kinds=("bags_discriminant",))["bags_discriminant"]
    bags = results[0]["bags"]
    assert more["all"] > bags["all"] + 2
    assert more["0_10"] > bags["0_10"] + 4
