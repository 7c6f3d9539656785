"""Run by torchrun in `test_training_on_two_ranks.py`: what each process trains on, and from what.

    two_ranks_training.py FOLDER OPTIONS...

trains, writes to FOLDER/RANK.json a line for every batch (epoch, images, seed of the step), and the
sum of the buffers of the detector that is evaluated after each epoch.
"""

import json
import sys
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))

import distributed
import torchvision_lvis_train as example
import training


def main() -> int:
    folder, options = Path(sys.argv[1]), sys.argv[2:]
    batches: list[Any] = []
    buffers: list[Any] = []
    forward = training.forward

    def recorded(model: Any, images: Any, targets: Any, job: Any) -> Any:
        batches.append([[target["image_id"] for target in targets], torch.initial_seed()])
        return forward(model, images, targets, job)

    def looked_at(setting: Any, name: str, model: Any, epoch: int) -> None:
        buffers.append([float(value.double().sum()) for value in model.buffers()])

    def end() -> None:
        content = {"batches": batches, "buffers": buffers}
        (folder / f"{distributed.rank()}.json").write_text(json.dumps(content))

    training.forward = recorded
    example.report_epoch = looked_at
    barrier = distributed.barrier
    distributed.barrier = lambda: (end(), barrier())[1]
    return example.main(options)


if __name__ == "__main__":
    sys.exit(main())
