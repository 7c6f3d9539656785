"""LVIS and COCO detection data for torchvision models, checked before training starts.

What is wrong with an annotation file or an image folder is said when the data set is made: bad
references, boxes or masks, names that leave the folder, missing images. What can only be seen in
an image raises :class:`ImageError`: its kind and size in `check_images`, the rest when it is
decoded. The text is one line, also when it comes from a worker process of a loader, so that a
training script ends with

    try:
        data.check_images()
        for images, targets in loader:
            ...
    except ImageError as error:
        raise SystemExit(f"error: {error}")
"""

from __future__ import annotations

import copy
import hashlib
import json
import os
import re
import reprlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import PureWindowsPath
from typing import Any

import numpy as np
import torch
from annotation_fields import (
    category_name,
    image_size,
    read_areas,
    read_boxes,
    source_name,
    verified_categories,
)
from coco_masks import Segment, check_segmentation, draw_mask, read_segmentation
from PIL import Image, ImageOps
from torch import Tensor
from torchvision import tv_tensors
from torchvision.transforms import v2
from tqdm import tqdm

from balanced_group_softmax.counts import Source, read_annotations

Target = dict[str, Any]
Transform = Callable[[Tensor, Target], tuple[Tensor, Target]]

EXIF_ORIENTATION = 0x0112
MIN_BOX_SIDE = 1.0  # pixels; the original skips thinner boxes too


class ImageError(ValueError):
    """An image file that cannot be used. Its text is one line: the file, then the reason."""

    def __init__(self, message: str) -> None:
        # A loader makes the exception of a worker anew, with the worker's whole stack trace as its
        # message. The last line of that is the text we raised.
        last = message.strip().rpartition("\n")[2]
        super().__init__(re.sub(r"^[\w.]*ImageError: ", "", last))


class LVISDetection(torch.utils.data.Dataset[tuple[Tensor, Target]]):
    """Images and boxes of an LVIS (v0.5, v1) or COCO annotation file.

    Item `i` is `(image, target)`: `image` float32 [3, H, W] in [0, 1] and `target` a dict of

    - `boxes` float32 [N, 4], (x1, y1, x2, y2) in pixels, cut to the image;
    - `labels` int64 [N], 1..C in ascending order of category id (0 is background);
    - `image_id` int, `area` float32 [N] as annotated, `iscrowd` int64 [N];
    - `masks` uint8 [N, H, W], with `masks=True`. Without, an annotation may have no mask, but a
      malformed one is an error still.

    Images without annotations are kept. Crowd annotations are left out unless `crowd=True`, and so
    are boxes that are thinner than one pixel inside the image; `dropped` counts both, and `cut`
    the boxes kept that reach out of the image by more than a pixel. With `transforms`, image and
    target go through it first, as uint8 and as `torchvision.tv_tensors`.

    An EXIF rotation is applied unless only the stored, unrotated size agrees with the annotation
    file; an image of any other size is an :class:`ImageError`. All image modes become RGB: palette
    and CMYK images are converted, greyscale repeated, 16 bits scaled to 8, transparency ignored.

    Random transforms draw from torch's generator: seed with `torch.manual_seed`, and give a loader
    with workers a seeded `generator`.

    Args:
        annotations: Path of the annotation file, or its content.
        images: Folder of the images. Each is looked for by its `file_name`, by the last two parts
            of its `coco_url` (`train2017/000000000009.jpg`), and by the bare name without a
            prefix such as `COCO_val2014_`; the first that exists is taken.
        transforms: Called with image and target, e.g. :func:`make_transforms`.
        masks: Read the masks as well.
        crowd: Keep crowd annotations, for evaluation.

    Raises:
        OSError: The annotation file, the folder or some images are missing.
        ValueError: The annotation file is not valid, or names an image outside the folder.
    """

    def __init__(
        self,
        annotations: Source,
        images: str | os.PathLike[str],
        *,
        transforms: Transform | None = None,
        masks: bool = False,
        crowd: bool = False,
    ) -> None:
        data = read_annotations(annotations, complete=True)
        self.transforms = transforms
        try:
            self._read(data, images, masks=masks, crowd=crowd)
        except ValueError as error:
            raise ValueError(f"{source_name(annotations)}: {error}") from None

    def _read(
        self, data: dict[str, Any], images: str | os.PathLike[str], *, masks: bool, crowd: bool
    ) -> None:
        self.categories: list[dict[str, Any]] = [
            {**row, "name": category_name(row)}
            for row in sorted(data["categories"], key=lambda row: row["id"])
        ]
        self.category_ids: list[int] = [row["id"] for row in self.categories]
        self.image_ids: list[int] = [row["id"] for row in data["images"]]
        self.sizes = np.array([image_size(row) for row in data["images"]], np.int64).reshape(-1, 2)
        known = set(self.category_ids)
        for row in data["images"]:
            verified_categories(row, known)  # evaluation needs them
        self.paths = find_images(data["images"], images)

        index_of = {image_id: i for i, image_id in enumerate(self.image_ids)}
        label_of = {category_id: i for i, category_id in enumerate(self.category_ids, 1)}
        rows: list[dict[str, Any]] = list(data["annotations"])
        image_of = np.array([index_of[row["image_id"]] for row in rows], np.int64)
        iscrowd = np.array([row.get("iscrowd", 0) for row in rows], np.int64)
        boxes = read_boxes(rows)
        area = read_areas(rows, boxes)
        limit = np.tile(self.sizes[image_of], (1, 2)).astype(np.float64)
        with np.errstate(over="ignore"):
            boxes[:, 2:] += boxes[:, :2]
        outside = np.maximum(-boxes, boxes - limit).max(axis=1, initial=0)
        boxes = np.clip(boxes, 0, limit).astype(np.float32)
        degenerate = ((boxes[:, 2:] - boxes[:, :2]) < MIN_BOX_SIDE).any(axis=1)
        left_out = (iscrowd == 1) & (not crowd)
        self.dropped: dict[str, int] = {
            "crowd": int(left_out.sum()),
            "degenerate": int((degenerate & ~left_out).sum()),
        }

        # Flat arrays sorted by image: small to send to worker processes, which a million dicts
        # would not be.
        keep = np.flatnonzero(~(degenerate | left_out))
        self.cut = int((outside[keep] > 1).sum())
        keep = keep[np.argsort(image_of[keep], kind="stable")]
        self._starts = np.searchsorted(image_of[keep], np.arange(len(self.image_ids) + 1))
        self._boxes = torch.from_numpy(boxes[keep])
        self._labels = torch.tensor([label_of[rows[i]["category_id"]] for i in keep]).long()
        self._area = torch.from_numpy(area[keep].astype(np.float32))
        self._iscrowd = torch.from_numpy(iscrowd[keep])
        sizes = self.sizes[image_of].tolist()
        for row, (width, height) in zip(rows, sizes, strict=True):
            if row.get("segmentation") not in (None, []):  # boxes alone do not need one
                check_segmentation(row, width, height)
        self._segments: list[Segment] | None = None
        if masks:
            self._segments = [read_segmentation(rows[i], *sizes[i]) for i in keep]

    def __len__(self) -> int:
        return len(self.image_ids)

    def __repr__(self) -> str:
        return (
            f"{type(self).__name__}({len(self)} images, {self.num_boxes} boxes, "
            f"{len(self.category_ids)} categories; left out: {self.dropped['crowd']} crowd, "
            f"{self.dropped['degenerate']} thinner than a pixel)"
        )

    @property
    def num_categories(self) -> int:
        """Number of categories, background not counted."""
        return len(self.category_ids)

    @property
    def num_boxes(self) -> int:
        """Number of boxes, without those that were left out."""
        return len(self._labels)

    def check_images(self, *, progress: bool = False) -> None:
        """Look at the header of every image, without decoding it.

        Args:
            progress: Show a progress bar if it takes long.

        Raises:
            ImageError: An image is missing, not an image, of another size, or too large.
        """
        files = zip(self.paths, self.sizes.tolist(), strict=True)
        for path, (width, height) in tqdm(
            files, "Checking images", len(self), unit="image", delay=2, disable=not progress
        ):
            with open_image(path, width, height):
                pass

    def labels(self, index: int) -> Tensor:
        """Return the labels of an image without reading it, e.g. for a sampler."""
        return self._labels[self._span(index)]

    def subset(self, images: Sequence[int], keep: Sequence[Tensor]) -> LVISDetection:
        """Return a data set of some images, and of some annotations in them.

        Args:
            images: Their indices.
            keep: For each of them bool [n]: which of its annotations stay.

        Raises:
            ValueError: A mask does not fit its image.
        """
        made = copy.copy(self)
        made.__dict__.pop("fingerprint", None)
        rows: list[Tensor] = []
        for index, mask in zip(images, keep, strict=True):
            span = self._span(index)
            if len(mask) != span.stop - span.start:
                raise ValueError(
                    f"Expected a mask over the {span.stop - span.start} annotations of image "
                    f"{self.image_ids[index]}, got {len(mask)}"
                )
            rows.append(span.start + mask.nonzero().flatten())
        kept = torch.cat([*rows, torch.zeros(0, dtype=torch.int64)])
        made.image_ids = [self.image_ids[index] for index in images]
        made.paths = [self.paths[index] for index in images]
        made.sizes = self.sizes[list(images)]
        made._starts = np.cumsum([0, *(len(row) for row in rows)])
        for name in ("_boxes", "_labels", "_area", "_iscrowd"):
            setattr(made, name, getattr(self, name)[kept])
        if self._segments is not None:
            made._segments = [self._segments[row] for row in kept.tolist()]
        return made

    @cached_property
    def fingerprint(self) -> str:
        """A hash of what is trained on: images (name, size, bytes of the file), boxes, masks.

        Folders may move; an image of other pixels has, but for a rare chance, a file of another
        length.
        """
        root = os.path.commonpath([os.path.dirname(path) for path in self.paths] or [""])
        names = [os.path.relpath(path, root) for path in self.paths]
        lengths = [os.path.getsize(path) if os.path.exists(path) else -1 for path in self.paths]
        digest = hashlib.sha256(json.dumps([self.image_ids, names, lengths]).encode())
        for values in (self.sizes, self._starts, self._boxes.numpy(), self._labels.numpy()):
            digest.update(np.ascontiguousarray(values).tobytes())
        for segment in self._segments or ():
            parts = segment if isinstance(segment, list) else [segment]
            for part in parts:
                digest.update(f"{part.shape}".encode() + np.ascontiguousarray(part).tobytes())
        return digest.hexdigest()

    def __getitem__(self, index: int) -> tuple[Tensor, Target]:
        span = self._span(index)
        width, height = self.sizes[index].tolist()
        image: Tensor = tv_tensors.Image(load_image(self.paths[index], width, height))
        target: Target = {
            # The clones keep a transform that works in place from changing the data set.
            "boxes": tv_tensors.BoundingBoxes(
                self._boxes[span].clone(),
                format=tv_tensors.BoundingBoxFormat.XYXY,
                canvas_size=(height, width),
            ),
            "labels": self._labels[span].clone(),
            "image_id": self.image_ids[index],
            "area": self._area[span].clone(),
            "iscrowd": self._iscrowd[span].clone(),
        }
        if self._segments is not None:
            masks = [draw_mask(part, width, height) for part in self._segments[span]]
            stacked = np.stack(masks) if masks else np.zeros((0, height, width), np.uint8)
            target["masks"] = tv_tensors.Mask(torch.from_numpy(stacked).contiguous())
        if self.transforms is not None:
            image, target = self.transforms(image, target)
        image = v2.functional.to_dtype(image, torch.float32, scale=True)
        return plain(image), {key: plain(value) for key, value in target.items()}

    def _span(self, index: int) -> slice:
        if not 0 <= index < len(self):
            raise IndexError(f"Expected `index` in [0, {len(self)}), got {index}")
        return slice(int(self._starts[index]), int(self._starts[index + 1]))


def plain(value: Any) -> Any:
    """Return a tensor without its torchvision type; anything else as it is."""
    return value.as_subclass(Tensor) if isinstance(value, tv_tensors.TVTensor) else value


def collate(batch: Sequence[tuple[Tensor, Target]]) -> tuple[list[Tensor], list[Target]]:
    """Return the images and targets of a batch as two lists, as torchvision detectors take them."""
    images, targets = zip(*batch, strict=True)
    return list(images), list(targets)


def make_transforms(
    *, flip: float = 0.0, short_side: int | None = None, long_side: int | None = None
) -> Transform:
    """Return the usual augmentation: flip with a probability, resize keeping the aspect ratio.

    Args:
        flip: Probability of a horizontal flip.
        short_side: Length of the shorter side after resizing; `None` leaves the size alone, since
            torchvision's detectors resize on their own.
        long_side: What the longer side may not exceed.
    """
    steps: list[torch.nn.Module] = []
    if flip:
        steps.append(v2.RandomHorizontalFlip(flip))
    if short_side is not None:
        steps.append(v2.Resize(short_side, max_size=long_side, antialias=True))
    return v2.Compose(steps) if steps else v2.Identity()


# --- images -------------------------------------------------------------------------------------


def image_names(row: dict[str, Any]) -> list[str]:
    """Return the names under which an image may lie in its folder, the most likely first."""
    names = []
    for key in ("file_name", "coco_url"):
        value = row.get(key)
        if value is None:
            continue
        if not isinstance(value, str) or not value:
            raise ValueError(
                f"Expected `{key}` of image {row['id']} to be text, got {reprlib.repr(value)}"
            )
        if key == "coco_url":
            value = "/".join(value.split("?")[0].split("/")[-2:])
        names.append(value)
    # COCO 2014 put the split into the name, 2017 into the folder; LVIS v0.5 has the former.
    names += [re.sub(r"^COCO_[a-z]+\d{4}_", "", name.split("/")[-1]) for name in names]
    names = [name for name in names if name]
    if not names:
        raise ValueError(f"Expected `file_name` or `coco_url` in image {row['id']}, got neither")
    for name in names:
        windows = PureWindowsPath(name)  # knows both kinds of slashes, and drives
        if windows.drive or windows.root or ".." in windows.parts or "\0" in name:
            raise ValueError(
                f"Expected `file_name` of image {row['id']} to stay in the image folder, "
                f"got {reprlib.repr(name)}"
            )
    return list(dict.fromkeys(names))


def find_images(rows: Sequence[dict[str, Any]], folder: str | os.PathLike[str]) -> list[str]:
    """Return the path of each image, after a look at the folder only; no image is opened."""
    if not os.path.isdir(folder):
        found = "a file" if os.path.exists(folder) else "nothing"
        raise FileNotFoundError(
            f"{os.fspath(folder)}: Expected the folder of the images, found {found} there"
        )
    root = os.path.realpath(folder)
    folders: dict[str, bool] = {}  # folder -> does it leave; few folders, many images
    paths, missing = [], []
    for row in rows:
        names = image_names(row)
        name = next((n for n in names if os.path.isfile(os.path.join(root, n))), None)
        if name is None:
            missing.append(f"{names[0]} (image {row['id']})")
            continue
        path = os.path.join(root, name)
        parent = os.path.dirname(path)
        if parent not in folders:
            folders[parent] = leaves_folder(root, parent)
        if folders[parent] or (os.path.islink(path) and leaves_folder(root, path)):
            raise ValueError(
                f"Expected `file_name` of image {row['id']} to stay in the image folder {root}, "
                f"got {name}, a link to {os.path.realpath(path)}"
            )
        paths.append(path)
    if missing:
        shown = ", ".join(missing[:3]) + (", ..." if len(missing) > 3 else "")
        raise FileNotFoundError(
            f"{root}: {len(missing)} of {len(rows)} images are not there: {shown}"
        )
    return paths


def leaves_folder(root: str, path: str | os.PathLike[str]) -> bool:
    """Return whether a path leads out of the folder `root`, a real path, through links or dots."""
    real = os.path.realpath(path)
    return real != root and not real.startswith(os.path.join(root, ""))


@contextmanager
def open_image(path: str | os.PathLike[str], width: int, height: int) -> Iterator[Image.Image]:
    """Open an image and look at its header; any error inside the block is an :class:`ImageError`.

    Raises:
        ImageError: The file is missing, corrupt, of another size than annotated, of pixels without
            a range, or larger than `PIL.Image.MAX_IMAGE_PIXELS`.
    """
    name = str(path).replace("\n", "\\n")
    try:
        with Image.open(path) as image:
            limit = Image.MAX_IMAGE_PIXELS
            if limit is not None and image.width * image.height > limit:
                raise Image.DecompressionBombError(
                    f"{image.width} x {image.height} pixels are more than the limit of {limit}"
                )
            if image.mode == "F":
                raise ValueError("images of floating-point pixels have no defined range")
            # Asking a PNG for its orientation may decode it, so the stored size comes first.
            if image.size != (width, height) and upright_size(image) != (width, height):
                wide, high = upright_size(image)
                raise ImageError(
                    f"{name}: the image is {wide} x {high} pixels, "
                    f"the annotations say {width} x {height}"
                )
            yield image
    except ImageError:
        raise
    except FileNotFoundError:
        raise ImageError(f"{name}: no such file") from None
    except Exception as error:  # a corrupt file makes Pillow raise almost anything
        reason = " ".join(str(error).replace(f" {str(path)!r}", "").split()).rstrip(":")
        raise ImageError(f"{name}: {reason or type(error).__name__}") from None


def upright_size(image: Image.Image) -> tuple[int, int]:
    """Return (width, height) after the rotation in EXIF."""
    turned = image.getexif().get(EXIF_ORIENTATION, 1) in (5, 6, 7, 8)
    return (image.height, image.width) if turned else image.size


def load_image(path: str | os.PathLike[str], width: int, height: int) -> Tensor:
    """Return an image as uint8 [3, height, width]; `width` and `height` are those annotated.

    Raises:
        ImageError: As :func:`open_image`, or the pixels are corrupt.
    """
    with open_image(path, width, height) as image:
        if upright_size(image) == (width, height):
            image = ImageOps.exif_transpose(image)
        pixels = to_rgb(image)
    return torch.from_numpy(pixels).permute(2, 0, 1).contiguous()


def to_rgb(image: Image.Image) -> np.ndarray:
    """Return uint8 [H, W, 3]."""
    if image.mode.startswith("I"):  # 16 bits; converting would cut everything above 255
        grey = np.asarray(image).astype(np.int64).clip(0, 2**16 - 1) >> 8
        return np.repeat(grey.astype(np.uint8)[..., None], 3, axis=2)
    if image.mode == "P":  # through RGBA, or Pillow warns about transparency in the palette
        image = image.convert("RGBA")
    return np.array(image.convert("RGB"))
