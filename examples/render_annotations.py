"""Draw plain images from the masks of an LVIS or COCO annotation file.

The programs can then be tried on real annotations without downloading any image:

    python examples/render_annotations.py lvis_v1_val.json --out rendered/

Each object is filled with the colours and stripes of its category, over a cloudy background. The
same annotations always give the same images. Images that are already there are kept, so a run that
was stopped goes on where it was.
"""

import argparse
import colorsys
import os
import sys
from collections import defaultdict
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from annotation_fields import image_size, read_boxes, source_name
from coco_masks import draw_mask, read_segmentation
from detection_data import image_names, leaves_folder
from PIL import Image
from run_folder import write
from tqdm import tqdm

from balanced_group_softmax._files import check_folder
from balanced_group_softmax.cli_program import FAILED, HelpFormatter, ended, line_of
from balanced_group_softmax.counts import Source, read_annotations

Objects = dict[int, list[dict[str, Any]]]

STATUS = """\
exit status: 0 if done; 2 with a line on standard error if the annotations or the folder are not
what they should be; 130 after Ctrl-C. No image is left half drawn.
"""
FORMATS = {".jpg": "JPEG", ".jpeg": "JPEG", ".png": "PNG"}


def render(annotations: Source, out: str | os.PathLike[str], *, progress: bool = False) -> int:
    """Draw every image of an annotation file that is not yet in the folder `out`.

    Args:
        annotations: Path of the annotation file, or its content.
        out: Folder for the images, made if needed; they keep their `file_name` (LVIS v1: split
            and name of `coco_url`).
        progress: Show a progress bar.

    Returns:
        The number of images drawn.

    Raises:
        OSError: The annotation file is missing, or the folder cannot be written.
        ValueError: The annotation file is not valid; nothing has been drawn then.
    """
    data = read_annotations(annotations, complete=True)
    try:
        plan, objects = make_plan(data)
    except ValueError as error:
        raise ValueError(f"{source_name(annotations)}: {error}") from None

    root = os.path.realpath(out)
    drawn = 0
    for name, row in tqdm(plan.items(), desc="Drawing", unit="image", disable=not progress):
        path = Path(root, name)
        if path.is_file():
            continue
        if leaves_folder(root, path.parent):
            raise ValueError(f"Expected {path} to stay in {root}, but a link leads elsewhere")
        path.parent.mkdir(parents=True, exist_ok=True)
        # Under its own name only when complete: a run that is stopped leaves no half image.
        image = Image.fromarray(draw_image(row, objects[row["id"]]))
        write(path, partial(image.save, format=FORMATS[path.suffix.lower()], quality=90))
        drawn += 1
    return drawn


def make_plan(data: dict[str, Any]) -> tuple[dict[str, dict[str, Any]], Objects]:
    """Return the image entry of each name and the annotations of each image, all checked."""
    objects: Objects = defaultdict(list)
    for row in data["annotations"]:
        objects[row["image_id"]].append(row)
    plan: dict[str, dict[str, Any]] = {}
    for row in data["images"]:
        width, height = image_size(row)
        if Image.MAX_IMAGE_PIXELS is not None and width * height > Image.MAX_IMAGE_PIXELS:
            raise ValueError(
                f"Expected image {row['id']} to have at most {Image.MAX_IMAGE_PIXELS} pixels, "
                f"got {width} x {height}"
            )
        name = image_names(row)[0]
        if Path(name).suffix.lower() not in FORMATS:
            raise ValueError(f"Expected image {row['id']} to be {', '.join(FORMATS)}, got {name}")
        if name in plan:
            raise ValueError(f"Expected images with names of their own, got {name} twice")
        plan[name] = row
        for annotation in objects[row["id"]]:
            if annotation.get("segmentation"):
                read_segmentation(annotation, width, height)
    read_boxes(data["annotations"])
    return plan, objects


def draw_image(row: dict[str, Any], annotations: list[dict[str, Any]]) -> np.ndarray:
    """Return the image of an entry with its objects, uint8 [H, W, 3]."""
    width, height = image_size(row)
    pixels = draw_background(width, height, np.random.default_rng(row["id"]))
    masks = [(object_mask(a, width, height), a["category_id"]) for a in annotations]
    for mask, category in sorted(masks, key=lambda m: -int(m[0].sum())):  # small ones on top
        ys, xs = np.nonzero(mask)
        pixels[ys, xs] = category_colours(category, xs, ys)
    return pixels.round().astype(np.uint8)


def draw_background(width: int, height: int, rng: np.random.Generator) -> np.ndarray:
    """Return grey clouds with a little grain, float32 [H, W, 3]."""
    clouds = Image.fromarray(rng.uniform(90, 170, (6, 6)).astype(np.float32))
    smooth = np.asarray(clouds.resize((width, height), Image.Resampling.BICUBIC))
    grain = rng.uniform(-12, 12, (height, width, 3)).astype(np.float32)
    return (smooth[..., None] + grain).clip(0, 255)


def category_colours(category: int, xs: np.ndarray, ys: np.ndarray) -> np.ndarray:
    """Return the colours of a category at pixels, float [N, 3].

    Two hues and the direction and width of stripes come from a generator seeded by the id alone,
    so that a category looks the same in every image and in every file.
    """
    rng = np.random.default_rng([category, 1])
    hue, saturation, angle = rng.random(), rng.uniform(0.5, 1), rng.uniform(0, np.pi)
    period = rng.uniform(4, 16)
    pair = [
        colorsys.hsv_to_rgb((hue + turn) % 1, saturation, value)
        for turn, value in ((0.0, 0.95), (rng.uniform(0.2, 0.8), 0.6))
    ]
    phase = (xs * np.cos(angle) + ys * np.sin(angle)) % period < period / 2
    return 255 * np.array(pair)[phase.astype(int)]


def object_mask(annotation: dict[str, Any], width: int, height: int) -> np.ndarray:
    """Return the mask of an annotation, uint8 [H, W]; of its box where it has no mask."""
    if annotation.get("segmentation"):
        return draw_mask(read_segmentation(annotation, width, height), width, height)
    x, y, w, h = read_boxes([annotation])[0]
    columns, rows = np.arange(width) + 0.5, np.arange(height) + 0.5
    inside = ((rows >= y) & (rows <= y + h))[:, None] & (columns >= x) & (columns <= x + w)
    return inside.astype(np.uint8)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=STATUS, formatter_class=HelpFormatter
    )
    parser.add_argument(
        "annotations",
        type=Path,
        metavar="ANNOTATIONS",
        help="LVIS or COCO annotations (JSON), with images and annotations",
    )
    parser.add_argument(
        "--out",
        type=Path,
        required=True,
        metavar="DIR",
        help="folder for the images, made if it is not there (required)",
    )
    args = parser.parse_args(argv)
    try:
        check_folder(args.out)
        drawn = render(args.annotations, args.out, progress=True)
    except (ValueError, OSError) as error:
        print(f"error: {line_of(error)}", file=sys.stderr)
        return FAILED
    print(f"Drew {drawn} images into {args.out}")
    return 0


if __name__ == "__main__":
    sys.exit(ended(main))
