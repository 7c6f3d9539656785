"""Steps of training against the arithmetic that they stand for."""

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("torchvision")
pytest.importorskip("lvis")
sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))

from recipe import Recipe
from training import Job, train

IMAGES = torch.arange(24, dtype=torch.float64).reshape(8, 3).sin()


class Squares(nn.Module):
    """A loss that is the mean over a batch."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64))

    def forward(self, images: list[Tensor], targets: list[dict[str, Any]]) -> dict[str, Tensor]:
        return {"loss": (torch.stack(images) @ self.weight).square().mean()}


def trained(size: int, **options: Any) -> Tensor:
    """The weights after a step of SGD at a rate of 0.1."""
    model = Squares()

    def batches(place: tuple[int, int]) -> Iterator[Any]:
        for number in range(place[1], len(IMAGES) // size):
            images = list(IMAGES[number * size : (number + 1) * size])
            yield (0, number + 1), (images, [{} for _ in images])

    recipe = Recipe(
        learning_rate=0.1,
        scale_learning_rate=False,
        warmup_steps=0,
        momentum=0,
        weight_decay=0,
        **options,
    )
    job = Job(
        name="squares",
        recipe=recipe,
        model=model,
        parameters=[model.weight],
        batches=batches,
        steps=1,
        seed=(0,),
        device=torch.device("cpu"),
        save=lambda state: None,
        save_every=1,
    )
    train(job)
    return model.weight.detach()


def gradient() -> Tensor:
    """Of the mean over the first four images."""
    start = Squares().weight.detach()
    return 2 * (IMAGES[:4] * (IMAGES[:4] @ start)[:, None]).mean(0)


def test_batches_of_a_step_count_as_one() -> None:
    wanted = Squares().weight.detach() - 0.1 * gradient()
    for size, parts in ((4, 1), (2, 2), (1, 4)):
        found = trained(size, accumulate=parts, max_gradient_norm=0.0)
        torch.testing.assert_close(found, wanted, rtol=1e-12, atol=0)


def test_gradients_are_clipped_to_a_norm() -> None:
    start, full = Squares().weight.detach(), gradient()
    for limit in (1e-3, 1e9):
        moved = start - trained(4, max_gradient_norm=limit)
        wanted = 0.1 * full * min(1.0, limit / float(full.norm()))
        torch.testing.assert_close(moved, wanted, rtol=1e-5, atol=0)
