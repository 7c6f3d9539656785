r"""Write the annotations of rare categories alone, for "finetune tail".

    python examples/mmdet/tail_annotations.py data/lvis_v0.5/annotations/lvis_v0.5_train.json \
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

from balanced_group_softmax.counts import category_counts, category_ids, read_annotations

sys.path.insert(1, str(Path(__file__).resolve().parents[1]))
from run_folder import write_text


def main(argv: Sequence[str] | None = None) -> int:
    args = parse_arguments(argv)
    try:
        data = tail_of(read_annotations(str(args.source), complete=True), args.below)
        write_text(args.out, json.dumps(data))
    except (OSError, TypeError, ValueError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
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
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("source", type=Path, help="LVIS or COCO training annotations")
    add("out", type=Path, help="where to write")
    add("--below", type=int, default=100, help="instances of a category (default: 100)")
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main())
