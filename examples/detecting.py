"""A detector over a data set: detections to a file, figures from the file. One process or many."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import distributed
import torch
from detection_data import LVISDetection
from detection_results import from_torchvision
from detectors import with_same_postprocessing
from loading import BROKEN, evaluation_loader
from results_files import ShardWriter, merge_shards, open_writer
from run_folder import partial_path
from torch import Tensor, nn
from tqdm import tqdm

NOTHING = {"boxes": torch.zeros(0, 4), "scores": torch.zeros(0), "labels": torch.zeros(0).long()}


@torch.inference_mode()
def detect(
    model: nn.Module,
    dataset: LVISDetection,
    path: Path,
    *,
    batch_size: int,
    device: torch.device,
    num_workers: int = 0,
    autocast: torch.dtype | None = None,
    skip_broken: bool = False,
    title: str = "Evaluating",
    progress: bool = True,
) -> list[str]:
    """Write the detections of all images to a file; the first process writes it.

    Images are put into batches as one process would do it, and each process takes whole batches:
    how far an image is padded, and so what is found in it, depends on its batch.

    Args:
        model: A detector, converted or not; its mode is left as it is found.
        dataset: The images.
        path: Ends in .json or .pkl.
        batch_size: Images of a batch.
        device: Where the model is.
        num_workers: Processes that load images, of each process.
        autocast: The dtype of automatic mixed precision; None for none.
        skip_broken: Go past images that cannot be read, which have no detections then.
        title: Of the bar.
        progress: Show it.

    Returns:
        What was wrong with images, in their order; in every process.

    Raises:
        ImageError: An image cannot be read, without `skip_broken`.
        OSError: The file cannot be written.
    """
    rank, world_size = distributed.rank(), distributed.world_size()
    batches = [
        range(first, min(first + batch_size, len(dataset)))
        for first in range(0, len(dataset), batch_size)
    ][rank::world_size]
    folder = Path(distributed.from_first(str(partial_path(path.with_suffix("")))))
    folder.mkdir(exist_ok=True)
    broken: list[str] = []
    was_training = model.training
    detector = with_same_postprocessing(model).eval()
    try:
        loader = evaluation_loader(
            dataset, batches, num_workers=num_workers, skip_broken=skip_broken
        )
        with ShardWriter(folder, rank, world_size) as shard:
            for images, targets in tqdm(
                loader, title, unit="batch", disable=rank > 0 or not progress
            ):
                outputs = iter(_outputs(detector, images, device, autocast))
                for image, target in zip(images, targets, strict=True):
                    broken += target.get(BROKEN, [])
                    output = NOTHING if image is None else next(outputs)
                    shard.append(from_torchvision(target["image_id"], output, dataset.category_ids))
        distributed.barrier()
        if rank == 0:
            with open_writer(path, dataset.image_ids, dataset.category_ids) as writer:
                merge_shards(folder, world_size, dataset.image_ids, writer)
        distributed.barrier()
    finally:
        model.train(was_training)
        if rank == 0:
            shutil.rmtree(folder, ignore_errors=True)
    return [reason for part in distributed.gathered(broken) for reason in part]


def _outputs(
    model: nn.Module,
    images: Sequence[Tensor | None],
    device: torch.device,
    autocast: torch.dtype | None,
) -> list[dict[str, Any]]:
    readable = [image.to(device) for image in images if image is not None]
    if not readable:
        return []
    with torch.autocast(device.type, autocast, enabled=autocast is not None):
        outputs: list[dict[str, Any]] = model(readable)
    return outputs
