"""What both training entries share: how they start, data sets of one's own, and the log."""

import argparse
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import register_coco_instances
from detectron2.engine import default_argument_parser, launch
from detectron2.utils import comm
from detectron2.utils.logger import setup_logger
from torch import nn

from balanced_group_softmax.cli_program import FAILED, HelpFormatter, line_of

STATUS = """\
exit status: 0 if done; 2 if a file, an option or the config is not what it should be, with a line
on standard error; 130 after Ctrl-C.
"""


def run(main: Callable[[argparse.Namespace], Any], description: str | None) -> int:
    """Read detectron2's usual options, and run an entry in as many processes as they ask for.

    Args:
        main: Called with the options in each process.
        description: For `--help`.

    Returns:
        The exit status.
    """
    parser = default_argument_parser(STATUS)
    parser.description, parser.formatter_class = description, HelpFormatter
    add_data_arguments(parser)
    args = parser.parse_args()
    try:
        if not Path(args.config_file).is_file():
            found = "found nothing there" if args.config_file else "got none"
            raise ValueError(f"Expected `--config-file {args.config_file or 'FILE'}`, {found}")
        launch(
            main,
            args.num_gpus,
            num_machines=args.num_machines,
            machine_rank=args.machine_rank,
            dist_url=args.dist_url,
            args=(args,),
        )
    except (OSError, ValueError) as error:
        print(f"error: {line_of(error)}", file=sys.stderr)
        return FAILED
    return 0


@contextmanager
def errors_of_config(path: str) -> Iterator[None]:
    """Let what a config or its changes are blamed for be a ValueError that names the file."""
    try:
        yield
    except Exception as error:  # yacs asserts, hydra has its own, and a config may be a program
        text = error.args[0] if isinstance(error, KeyError) and error.args else error
        raise ValueError(f"{path}: {text}") from error


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
