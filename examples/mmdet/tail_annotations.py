r"""Write the annotations of rare categories alone, for the method "finetune tail".

    python examples/mmdet/tail_annotations.py \
        data/lvis_v0.5/annotations/lvis_v0.5_train.json \
        data/lvis_v0.5/annotations/lvis_v0.5_train_tail.json

All categories stay in the file, so that labels stay what they were; annotations of the others go,
and images that have none left.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from balanced_group_softmax._files import check_output
from balanced_group_softmax.cli_program import FAILED, HelpFormatter, ended, line_of
from balanced_group_softmax.counts import category_counts, category_ids, read_annotations

sys.path.insert(1, str(Path(__file__).resolve().parents[1]))
from option_types import whole
from run_folder import write_text

STATUS = """\
exit status: 0 if done; 2 with a line on standard error if the annotations or the output are not
what they should be; 130 after Ctrl-C.
"""


def main(argv: Sequence[str] | None = None) -> int:
    args = parse_arguments(argv)
    try:
        check_output(args.out, [args.source])
        data = tail_of(read_annotations(str(args.source), complete=True), args.below)
        write_text(args.out, json.dumps(data))
    except (OSError, TypeError, ValueError) as error:
        print(f"error: {line_of(error)}", file=sys.stderr)
        return FAILED
    print(f"{args.out}: {len(data['annotations'])} annotations in {len(data['images'])} images")
    return 0


def tail_of(data: dict[str, Any], below: int) -> dict[str, Any]:
    """Return annotations of the categories with fewer than `below` instances.

    Raises:
        ValueError: None is left.
    """
    counts = dict(zip(category_ids(data), category_counts(data), strict=True))
    rows = [row for row in data["annotations"] if counts[row["category_id"]] < below]
    if not rows:
        raise ValueError(f"Expected categories with fewer than {below} instances, found none")
    left = {row["image_id"] for row in rows}
    images = [image for image in data["images"] if image["id"] in left]
    return {**data, "images": images, "annotations": rows}


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=STATUS, formatter_class=HelpFormatter
    )
    add = parser.add_argument
    add("source", type=Path, metavar="SOURCE", help="training annotations, LVIS or COCO")
    add("out", type=Path, metavar="OUT", help="write the annotations of the tail here")
    add(
        "--below",
        type=whole(1),
        default=100,
        metavar="N",
        help="a category is rare with fewer than N training instances (default: 100)",
    )
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(ended(main))
