"""Run by torchrun in `test_training_on_two_ranks.py`: losses and gradients of each rank's rows."""

import sys
from pathlib import Path

import torch

from balanced_group_softmax import BAGSHead, GroupLayout

sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))

import distributed

COUNTS = [3, 2500, 40, 7, 600, 12, 90]
FEATURES = 5
ROWS = 24


def rows() -> tuple[torch.Tensor, torch.Tensor]:
    """Features and labels; each half has the same labels, and so the same normalisers."""
    generator = torch.Generator().manual_seed(1)
    half = torch.tensor([0, 0, 0, 0, 0, 1, 2, 3, 4, 5, 6, 7])
    return torch.randn(ROWS, FEATURES, generator=generator), torch.cat([half, half])


def head(others_ratio: float) -> BAGSHead:
    torch.manual_seed(0)
    made = BAGSHead(FEATURES, GroupLayout.from_counts(COUNTS), others_ratio=others_ratio)
    torch.nn.init.normal_(made.fc.weight)
    return made


def of_this_rank(rank: int, size: int) -> dict[str, dict[str, torch.Tensor]]:
    features, labels = (part.chunk(size)[rank] for part in rows())
    found = {}
    for ratio in (float("inf"), 1.0):
        model = torch.nn.parallel.DistributedDataParallel(head(ratio))
        torch.manual_seed(100 + rank)  # a rank draws its own others
        logits = model(features)
        loss = model.module.loss(logits, labels)
        loss.backward()
        counted = model.module.fc.weight.grad
        found[str(ratio)] = {"loss": loss.detach(), "gradient": counted, "logits": logits.detach()}
    return found


def main() -> None:
    with distributed.process_group(torch.device("cpu")):
        rank = distributed.rank()
        found = of_this_rank(rank, distributed.world_size())
    torch.save(found, Path(sys.argv[1]) / f"{rank}.pt")


if __name__ == "__main__":
    main()
