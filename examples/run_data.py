"""What a run trains and evaluates on: the user's data, or a small data set drawn on the spot."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path

import distributed
from checkpoints import Categories
from detection_data import LVISDetection
from lvis_evaluation import read_frequencies

from balanced_group_softmax import category_counts


@dataclass
class Files:
    """Annotations and image folders of both parts."""

    annotations: Path
    images: Path
    val_annotations: Path
    val_images: Path


@dataclass
class Data:
    """What is trained and evaluated on."""

    train: LVISDetection
    val: LVISDetection
    val_annotations: Path
    categories: Categories
    val_files: tuple[str, str]
    """Annotations and image folder of `val`, as absolute paths."""


def named_files(
    annotations: str | None,
    images: str | None,
    val_annotations: str | None,
    val_images: str | None,
) -> Files | None:
    """Return the files that were named; None if none was.

    Raises:
        ValueError: A part of them is missing.
    """
    if bool(annotations) != bool(images):
        raise ValueError("Expected `--annotations` and `--images` together, got only one of them")
    if bool(val_annotations) != bool(val_images):
        raise ValueError(
            "Expected `--val-annotations` and `--val-images` together, got only one of them"
        )
    if not (annotations and images):
        if val_annotations:
            raise ValueError("Expected `--annotations` and `--images` with `--val-annotations`")
        return None
    return Files(
        Path(annotations),
        Path(images),
        Path(val_annotations or annotations),
        Path(val_images or images),
    )


def load_data(files: Files, *, masks: bool, skip_broken: bool, progress: bool) -> Data:
    """Read annotations, and look at the header of every image.

    Args:
        files: Where things are.
        masks: Read the masks of training images.
        skip_broken: Leave images to the loaders, which go past those that are broken.
        progress: Show bars.

    Raises:
        OSError: A file is missing.
        ValueError: Annotations are not valid, do not fit together, or have no images.
    """
    train = LVISDetection(files.annotations, files.images, masks=masks)
    val = LVISDetection(files.val_annotations, files.val_images)
    if masks:  # evaluation needs those of all, and is far away
        LVISDetection(files.val_annotations, files.val_images, masks=True, crowd=True)
    if len(train) == 0 or len(val) == 0:
        raise ValueError(
            f"Expected images to train and evaluate on, got {len(train)} in {files.annotations} "
            f"and {len(val)} in {files.val_annotations}"
        )
    if train.num_boxes == 0:
        raise ValueError(
            f"{files.annotations}: Expected boxes in pixels to train on, got none; left out: "
            f"{left_out(train)}"
        )
    if val.category_ids != train.category_ids:
        missing, added = (
            sorted(set(a) - set(b))[:5]
            for a, b in (
                (train.category_ids, val.category_ids),
                (val.category_ids, train.category_ids),
            )
        )
        raise ValueError(
            f"Expected the category ids of {files.annotations} in {files.val_annotations}; ids "
            f"only in the former: {missing}, only in the latter: {added} (the first five of each)"
        )
    if not skip_broken:
        for dataset in (train, val):
            distributed.first_does(partial(dataset.check_images, progress=progress))
    frequencies = read_frequencies(files.annotations)
    categories = Categories(
        ids=tuple(train.category_ids),
        names=tuple(row["name"] for row in train.categories),
        counts=tuple(category_counts(files.annotations)),
        frequencies="".join(frequencies[i] for i in train.category_ids),
    )
    val_files = str(files.val_annotations.resolve()), str(files.val_images.resolve())
    return Data(train, val, files.val_annotations, categories, val_files)


def describe(data: Data) -> str:
    """Return what there is to train and evaluate on, in a few lines."""
    letters = data.categories.frequencies
    lines = [
        f"{len(data.train)} training and {len(data.val)} validation images, "
        f"{len(letters)} categories ({letters.count('r')} rare, {letters.count('c')} common, "
        f"{letters.count('f')} frequent)",
        f"Left out of training: {left_out(data.train)}",
    ]
    if data.train.cut:
        lines.append(
            f"Cut to their image: {data.train.cut} of {data.train.num_boxes} boxes that "
            "reach out of it by more than a pixel; `bbox` is x, y, width, height"
        )
    return "\n".join(lines)


def left_out(dataset: LVISDetection) -> str:
    """Return in words which annotations are not trained on."""
    return (
        f"{dataset.dropped['crowd']} crowd annotations, "
        f"{dataset.dropped['degenerate']} boxes thinner than a pixel"
    )
