"""What both training entries share: data sets of one's own, and the log."""

import argparse
from collections.abc import Sequence
from typing import Any

from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import register_coco_instances
from detectron2.utils import comm
from detectron2.utils.logger import setup_logger
from torch import nn


def add_data_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the option that registers data sets."""
    parser.add_argument(
        "--dataset",
        nargs=3,
        action="append",
        default=[],
        metavar=("NAME", "JSON", "IMAGES"),
        help="register a data set in COCO or LVIS format under a name, to be used in the config; "
        "images are found by `file_name`. May be given several times. LVIS itself is known to "
        "detectron2 (lvis_v1_train, ...) and found in $DETECTRON2_DATASETS",
    )


def register_datasets(datasets: Sequence[Sequence[str]]) -> None:
    """Register data sets given as (name, annotations, images); a second time does nothing.

    Raises:
        ValueError: Another data set is registered under a name.
    """
    for name, annotations, images in datasets:
        if name not in DatasetCatalog.list():
            register_coco_instances(name, {}, annotations, images)
            continue
        known = MetadataCatalog.get(name).get("json_file")
        if known != annotations:
            raise ValueError(f"Expected a new name for {annotations}, got {name!r} of {known}")


def annotations_of(name: str | Sequence[str]) -> str:
    """Return the annotation file of a registered data set; a list is of one.

    Raises:
        ValueError: It has none, or there are several data sets.
    """
    if not isinstance(name, str):
        if len(name) != 1:
            raise ValueError(f"Expected one data set whose annotations to read, got {list(name)}")
        name = name[0]
    path = MetadataCatalog.get(name).get("json_file")
    if path is None:
        raise ValueError(
            f"Expected a registered data set with an annotation file, got {name!r}; register it by "
            "--dataset NAME JSON IMAGES"
        )
    return str(path)


def check_categories(model: nn.Module, names: str | Sequence[str]) -> None:
    """Check a detector's categories against data sets, which have been read already.

    detectron2 would take a label too many for background, or never train a category too many; a
    layout of other data would put categories into wrong groups.

    Raises:
        ValueError: A data set has other categories.
    """
    heads: Any = model.get_submodule("roi_heads")
    predictor = heads.box_predictor
    first = predictor[0] if isinstance(predictor, nn.ModuleList) else predictor
    layout = getattr(first, "layout", None)
    for name in [names] if isinstance(names, str) else names:
        metadata = MetadataCatalog.get(name)
        found = len(metadata.get("thing_classes", ()))
        if found not in (0, heads.num_classes):
            raise ValueError(
                f"Expected MODEL.ROI_HEADS.NUM_CLASSES (model.roi_heads.num_classes) {found}, as "
                f"many categories as the data set {name!r} has, got {heads.num_classes}"
            )
        labels = metadata.get("thing_dataset_id_to_contiguous_id")
        if labels is None or layout is None or layout.category_ids is None:
            continue
        pairs = zip(sorted(labels, key=labels.get), layout.category_ids, strict=True)
        for label, (theirs, mine) in enumerate(pairs):
            if theirs != mine:
                raise ValueError(
                    f"Expected groups of the categories of the data set {name!r}, of which label "
                    f"{label} is category {theirs}, got groups of other data, of which it is "
                    f"category {mine}; see MODEL.BAGS.ANNOTATIONS and MODEL.BAGS.LAYOUT, or "
                    "`annotations` and `layout`"
                )


def show_messages(output_dir: str) -> None:
    """Log what the adapter has to say, as detectron2 does with its own messages."""
    setup_logger(output_dir, distributed_rank=comm.get_rank(), name="balanced_group_softmax")
