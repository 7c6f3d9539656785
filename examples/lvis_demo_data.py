"""A small long-tailed detection data set in the format of LVIS v1, drawn rather than downloaded.

Seventy-two categories, each a shape in a colour ("red star"), on cloudy backgrounds. How often each
occurs in training follows a Zipf law from 2000 instances down to 3, so that every count group of
Balanced Group Softmax has categories, while the validation set has as many of each. Rare and
frequent categories share shapes and colours: what the detector learns from frequent ones would
serve for rare ones, were it not for the classifier. The categories and their counts are the same
for every seed; the images are not.

    folder/train.json  folder/train/*.jpg  folder/val.json  folder/val/*.jpg
"""

import colorsys
import json
import math
import os
import shutil
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from lvis_evaluation import frequency
from PIL import Image, ImageDraw
from run_folder import partial_path
from tqdm import tqdm

IMAGE_SIZE = 128  # pixels, both sides
OBJECTS_PER_IMAGE = 5
RADIUS = (10.0, 26.0)  # pixels
TILT = 0.4  # radians, to either side
HUE_DEVIATION = 0.03  # of the circle of hues; colours are 1/6 apart
NOISE = 0.05  # standard deviation of a pixel, of the full range
MAX_OVERLAP = 0.15  # of the smaller box
VAL_INSTANCES = 40  # of each category

COLOURS = {  # hues
    name: i / 6 for i, name in enumerate(("red", "yellow", "green", "cyan", "blue", "magenta"))
}


@dataclass(frozen=True)
class Category:
    """What the objects of a category look like, and how many there are to train on."""

    shape: str
    colour: str
    train_instances: int

    @property
    def name(self) -> str:
        """Such as "red star"."""
        return f"{self.colour} {self.shape}"


@cache
def outlines() -> dict[str, np.ndarray]:
    """Return the outline of each shape by name: polygons [N, 2] inside the unit circle."""

    def polygon(*radii: float, corners: int) -> np.ndarray:
        angles = 2 * np.pi * np.arange(corners) / corners
        radius = np.resize(radii, corners)
        return np.stack([radius * np.cos(angles), radius * np.sin(angles)], axis=1)

    angles = np.linspace(0, 2 * np.pi, 32, endpoint=False)
    heart_x = 16 * np.sin(angles) ** 3
    heart_y = sum(a * np.cos(k * angles) for k, a in enumerate((-13, 5, 2, 1), start=1))
    drop_x = np.cos(angles) * np.where(np.cos(angles) > 0, 1, 0.7)
    outside = np.linspace(-0.65 * np.pi, 0.65 * np.pi, 18)
    inside = np.linspace(0.5 * np.pi, -0.5 * np.pi, 12)
    arm = 0.33
    return {
        "disc": polygon(1, corners=28),
        "triangle": polygon(1, corners=3),
        "square": polygon(1, corners=4),
        "pentagon": polygon(1, corners=5),
        "star": polygon(1, 0.42, corners=10),
        "cross": np.array(
            [
                *[(-arm, -1), (arm, -1), (arm, -arm), (1, -arm), (1, arm), (arm, arm)],
                *[(arm, 1), (-arm, 1), (-arm, arm), (-1, arm), (-1, -arm), (-arm, -arm)],
            ]
        ),
        "heart": np.stack([heart_x, heart_y], axis=1) / 17,
        "crescent": np.concatenate(
            [
                np.stack([np.cos(outside), np.sin(outside)], axis=1),
                np.stack([0.75 * np.cos(inside) - 0.35, 0.8 * np.sin(inside)], axis=1),
            ]
        ),
        "arrow": np.array(
            [(-1, -0.25), (0.1, -0.25), (0.1, -0.75), (1, 0), (0.1, 0.75), (0.1, 0.25), (-1, 0.25)]
        ),
        "bar": np.array([(-1, -0.3), (1, -0.3), (1, 0.3), (-1, 0.3)]),
        "gear": polygon(1, 1, 0.7, 0.7, corners=24),
        "drop": np.stack([drop_x, 0.6 * np.sin(angles) * np.sin(angles / 2)], axis=1),
    }


def zipf_counts(num: int, most: int = 2000, least: int = 3, shift: float = 2.0) -> list[int]:
    """Return `num` counts that fall from `most` to `least` as a power of rank + `shift`."""
    ranks = np.arange(1, num + 1) + shift
    exponent = math.log(most / least) / math.log(ranks[-1] / ranks[0])
    counts: list[int] = np.round(most * (ranks / ranks[0]) ** -exponent).astype(int).tolist()
    return counts


def demo_categories() -> list[Category]:
    """Return the categories, the most frequent first, in a fixed random order."""
    looks = [(shape, colour) for shape in outlines() for colour in COLOURS]
    order = np.random.default_rng(100).permutation(len(looks))
    shuffled = [looks[i] for i in order]
    return [
        Category(shape, colour, count)
        for (shape, colour), count in zip(shuffled, zipf_counts(len(looks)), strict=True)
    ]


def write_demo_data(
    folder: str | os.PathLike[str],
    seed: int = 0,
    *,
    categories: Sequence[Category] | None = None,
    val_instances: int = VAL_INSTANCES,
    progress: bool = False,
) -> None:
    """Draw the data set into a new folder; the same seed gives the same files.

    The folder appears under its name when it is complete, not before.

    Args:
        folder: Must not exist.
        seed: Of the images.
        categories: What to draw, at least one with at least one training instance each.
        val_instances: Of each category in the validation set.
        progress: Show progress bars.

    Raises:
        FileExistsError: The folder exists.
        ValueError: There are no categories, or counts are not positive.
    """
    folder = Path(folder)
    if folder.exists():
        raise FileExistsError(f"{folder}: Expected a folder that does not exist yet")
    categories = demo_categories() if categories is None else categories
    counts = [category.train_instances for category in categories]
    if not counts or min(counts) < 1 or val_instances < 1:
        raise ValueError(
            "Expected `categories` with positive counts and positive `val_instances`, "
            f"got {counts} and {val_instances}"
        )
    folder.parent.mkdir(parents=True, exist_ok=True)
    partial = partial_path(folder)
    partial.mkdir()
    try:
        train = _write_split(partial, "train", categories, counts, seed, progress)
        # Frequencies are those of training, as in LVIS; counts are of the file they stand in.
        frequencies = [frequency(row["image_count"]) for row in train["categories"]]
        val = _write_split(
            partial, "val", categories, [val_instances] * len(counts), seed, progress
        )
        for name, data in (("train", train), ("val", val)):
            for row, letter in zip(data["categories"], frequencies, strict=True):
                row["frequency"] = letter
            (partial / f"{name}.json").write_text(json.dumps(data), encoding="utf-8")
        partial.rename(folder)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def seed_of(folder: Path) -> int | None:
    """Return the seed that a data set was drawn with; None if it does not say.

    Raises:
        OSError: There is no data set.
        ValueError: It is not one.
    """
    try:
        info = json.loads((folder / "train.json").read_text(encoding="utf-8")).get("info", {})
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{folder / 'train.json'}: Expected annotations, got {error}") from None
    seed: int | None = info.get("seed")
    return seed


def _write_split(
    folder: Path,
    split: str,
    categories: Sequence[Category],
    counts: Sequence[int],
    seed: int,
    progress: bool,
) -> dict[str, Any]:
    """Draw the images of a split; return its annotation file."""
    (folder / split).mkdir()
    rng = np.random.default_rng([seed, {"train": 0, "val": 1}[split]])
    waiting = deque(rng.permutation(np.repeat(np.arange(len(counts)), counts)).tolist())
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    every_id = range(1, len(categories) + 1)
    with tqdm(total=len(waiting), desc=f"Drawing {split}", unit="obj", disable=not progress) as bar:
        while waiting:
            some = [waiting.popleft() for _ in range(min(OBJECTS_PER_IMAGE, len(waiting)))]
            picture, placed, left = _draw_image([categories[i] for i in some], rng)
            waiting.extend(some[i] for i in left)  # the first object always finds its place
            image_id = len(images) + 1
            file_name = f"{image_id:06d}.jpg"
            picture.save(folder / split / file_name, quality=92)
            present = set()
            for i, outline in placed.items():
                annotations.append(_annotation(len(annotations) + 1, image_id, some[i], outline))
                present.add(some[i] + 1)
            images.append(
                {
                    "id": image_id,
                    "file_name": file_name,
                    "width": IMAGE_SIZE,
                    "height": IMAGE_SIZE,
                    # All is known of these images: whatever is not there is verified absent.
                    "neg_category_ids": [i for i in every_id if i not in present],
                    "not_exhaustive_category_ids": [],
                }
            )
            bar.update(len(placed))
    image_sets: list[set[int]] = [set() for _ in categories]
    for row in annotations:
        image_sets[row["category_id"] - 1].add(row["image_id"])
    return {
        "info": {
            "description": "Shapes and colours with a long tail",
            "version": "v1",
            "seed": seed,
        },
        "licenses": [],
        "images": images,
        "annotations": annotations,
        "categories": [
            {
                "id": i,
                "name": category.name.replace(" ", "_"),
                "synset": f"{category.name.replace(' ', '_')}.n.01",
                "synonyms": [category.name],
                "def": f"a {category.shape} of the colour {category.colour}",
                "image_count": len(image_sets[i - 1]),
                "instance_count": int(count),
            }
            for i, category, count in zip(every_id, categories, counts, strict=True)
        ],
    }


def _annotation(
    annotation_id: int, image_id: int, category: int, outline: np.ndarray
) -> dict[str, Any]:
    (left, top), (right, bottom) = outline.min(axis=0), outline.max(axis=0)
    x, y = outline.T
    area = abs(np.dot(x, np.roll(y, 1)) - np.dot(y, np.roll(x, 1))) / 2
    return {
        "id": annotation_id,
        "image_id": image_id,
        "category_id": category + 1,
        "bbox": [round(float(v), 2) for v in (left, top, right - left, bottom - top)],
        "area": round(float(area), 2),
        "segmentation": [[round(float(v), 2) for v in outline.flatten()]],
    }


def _draw_image(
    objects: Sequence[Category], rng: np.random.Generator
) -> tuple[Image.Image, dict[int, np.ndarray], list[int]]:
    """Draw objects on a background.

    Returns:
        The image; the outlines of the objects that found a place, by position in `objects`; and
        the positions of those that did not.
    """
    scale = 2  # drawn larger and averaged down, for smooth edges
    clouds = 0.5 + rng.uniform(0.15, 0.5) * rng.uniform(-0.35, 0.35, (5, 5, 3))
    clouds = np.clip(clouds + rng.uniform(-0.2, 0.2), 0, 1) * 255
    picture = Image.fromarray(clouds.astype(np.uint8)).resize(
        (IMAGE_SIZE * scale, IMAGE_SIZE * scale), Image.Resampling.BICUBIC
    )
    draw = ImageDraw.Draw(picture)
    placed: dict[int, np.ndarray] = {}
    left = []
    for i, category in enumerate(objects):
        outline = _place(category.shape, list(placed.values()), rng)
        if outline is None:
            left.append(i)
            continue
        hue = (COLOURS[category.colour] + rng.normal(0, HUE_DEVIATION)) % 1
        colour = colorsys.hsv_to_rgb(hue, rng.uniform(0.55, 0.95), rng.uniform(0.55, 0.95))
        draw.polygon(
            [(x * scale, y * scale) for x, y in outline.tolist()],
            fill=tuple(int(255 * part) for part in colour),
        )
        placed[i] = outline
    picture = picture.resize((IMAGE_SIZE, IMAGE_SIZE), Image.Resampling.BOX)
    pixels = np.asarray(picture, np.float64) + rng.normal(0, 255 * NOISE, (*picture.size, 3))
    return Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8)), placed, left


def _place(
    shape: str, others: Sequence[np.ndarray], rng: np.random.Generator, tries: int = 40
) -> np.ndarray | None:
    """Return an outline in the image that hardly overlaps `others`, or None if none was found."""
    for _ in range(tries):
        radius = math.exp(rng.uniform(*np.log(RADIUS)))
        angle = rng.uniform(-TILT, TILT)
        turn = np.array([[math.cos(angle), math.sin(angle)], [-math.sin(angle), math.cos(angle)]])
        outline = outlines()[shape] * [1, rng.uniform(0.8, 1)] @ turn * radius
        size = outline.max(axis=0) - outline.min(axis=0)
        outline += rng.uniform(0, IMAGE_SIZE - size) - outline.min(axis=0)
        if all(_overlap(outline, other) <= MAX_OVERLAP for other in others):
            return outline
    return None


def _overlap(a: np.ndarray, b: np.ndarray) -> float:
    """Return how much of the smaller of two bounding boxes is in the other."""
    low, high = np.maximum(a.min(axis=0), b.min(axis=0)), np.minimum(a.max(axis=0), b.max(axis=0))
    shared = np.clip(high - low, 0, None).prod()
    return float(shared / min(np.ptp(a, axis=0).prod(), np.ptp(b, axis=0).prod()))
