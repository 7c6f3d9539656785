"""Files of detections: which format a name stands for, and shards of several processes.

One process writes with :func:`open_writer`. In a distributed evaluation each rank writes its
images, in the order of the annotation file, with :class:`ShardWriter`; when all are done, rank 0
calls :func:`merge_shards`, and the file is byte for byte the one that a single process would write.
"""

import heapq
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from detection_results import Detections, ImageDetections, ResultsWriter
from mask_codes import Code
from results_json import JsonWriter, read_json
from results_pickle import PickleWriter, read_pickle

SUFFIXES = (".json", ".pkl")


def check_suffix(path: Path) -> None:
    """Check that the name says the format.

    Raises:
        ValueError: It ends in neither .json nor .pkl.
    """
    if path.suffix not in SUFFIXES:
        raise ValueError(f"Expected results to end in .json or .pkl, got {str(path)!r}")


def open_writer(
    path: Path,
    image_ids: Sequence[int],
    category_ids: Sequence[int],
    *,
    legacy_widths: bool = True,
) -> ResultsWriter:
    """Return a writer of the format that the name stands for, to be used with `with`.

    Args:
        path: Ends in .json (LVIS results) or .pkl (the original's).
        image_ids: All images in the order of the annotation file. Their detections come in this
            order.
        category_ids: All categories in the order of the annotation file.
        legacy_widths: Of .pkl: see `results_pickle`.

    Raises:
        OSError: There can be no such file.
        ValueError: The name stands for no format.
    """
    check_suffix(path)
    if path.suffix == ".json":
        return JsonWriter(path)
    return PickleWriter(path, image_ids, category_ids, legacy_widths=legacy_widths)


def read_results(
    path: Path,
    image_ids: Sequence[int],
    category_ids: Sequence[int],
    *,
    legacy_widths: bool = True,
    progress: bool = False,
) -> Detections:
    """Read a file of detections; the arguments are those of :func:`open_writer`.

    Raises:
        OSError: The file cannot be read.
        ValueError: It is not valid; the message says what was expected, what came, and where.
    """
    check_suffix(path)
    if path.suffix == ".json":
        return read_json(path, progress=progress)
    return read_pickle(
        path, image_ids, category_ids, legacy_widths=legacy_widths, progress=progress
    )


# --- shards --------------------------------------------------------------------------------------


def shard_path(folder: Path, rank: int, world_size: int) -> Path:
    return folder / f"shard-{rank}-of-{world_size}.jsonl"


class ShardWriter(ResultsWriter):
    """Writes the detections of one rank, an image to a line, images without any included.

    Raises:
        ValueError: There is no such rank.
    """

    def __init__(self, folder: Path, rank: int, world_size: int) -> None:
        if not 0 <= rank < world_size:
            raise ValueError(f"Expected `rank` in [0, {world_size}), got {rank}")
        super().__init__(shard_path(folder, rank, world_size))

    def _write(self, image: ImageDetections) -> None:
        masks = None
        if image.masks is not None:
            masks = [[height, width, counts.decode()] for height, width, counts in image.masks]
        columns = (image.category_ids.tolist(), image.boxes.tolist(), image.scores.tolist())
        self._write_line([image.image_id, *columns, masks])

    def _end(self) -> None:
        self._write_line({"images": len(self._seen)})

    def _write_line(self, value: Any) -> None:
        self._file.write(json.dumps(value).encode("ascii") + b"\n")


def merge_shards(
    folder: Path, world_size: int, image_ids: Sequence[int], writer: ResultsWriter
) -> None:
    """Write the detections of all ranks in the order of the annotation file, an image at a time.

    Args:
        folder: Where each rank has written its shard.
        world_size: The number of ranks.
        image_ids: All images in the order of the annotation file.
        writer: An open writer; the caller closes it.

    Raises:
        OSError: A shard is missing.
        ValueError: A shard is not complete, or the shards do not have each image once.
    """
    places = {image_id: i for i, image_id in enumerate(image_ids)}
    shards = [
        _read_shard(shard_path(folder, rank, world_size), places) for rank in range(world_size)
    ]
    expected = 0
    for place, image in heapq.merge(*shards, key=lambda pair: pair[0]):
        if place <= expected:  # after a gap the shards are still checked to their ends
            writer.append(image)  # which refuses an image that comes twice
            expected += 1
    if expected < len(image_ids):
        raise ValueError(
            f"{folder}: Expected results of all {len(image_ids)} images in the shards, "
            f"got none of image {image_ids[expected]}"
        )


def _read_shard(path: Path, places: dict[int, int]) -> Iterator[tuple[int, ImageDetections]]:
    """Yield (place in the annotation file, detections), ascending."""
    if not path.is_file():
        raise FileNotFoundError(f"{path}: Expected the results of a rank, found nothing there")
    count, before = 0, -1
    with path.open(encoding="ascii") as file:
        for line in file:
            try:
                value = json.loads(line)
            except json.JSONDecodeError:
                break
            if isinstance(value, dict):
                if value != {"images": count} or file.readline():
                    break
                return
            image_id, categories, boxes, scores, masks = value
            place = places.get(image_id, -1)
            if place <= before:
                raise ValueError(
                    f"{path}: Expected images of the annotations in their order, got {image_id}"
                )
            count, before = count + 1, place
            codes = None if masks is None else [Code(h, w, text.encode()) for h, w, text in masks]
            yield (
                place,
                ImageDetections(
                    image_id,
                    np.array(categories, np.int64),
                    np.array(boxes, np.float64).reshape(-1, 4),
                    np.array(scores, np.float64),
                    codes,
                ),
            )
    raise ValueError(f"{path}: Expected {count} images and an end, got a file that is not complete")
