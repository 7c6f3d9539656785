"""Counts per category, read from LVIS or COCO annotations and checked on the way."""

import gc
import json
import os
import reprlib
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

__all__ = [
    "MAX_FILE_BYTES",
    "CountedCategory",
    "category_counts",
    "category_ids",
    "counted_categories",
    "image_counts",
    "read_annotations",
]

MAX_FILE_BYTES = 8 * 2**30
"""Largest annotation file that is read, in bytes; the largest public sets stay below 6 GB."""

_ID_LIMIT = 2**63  # ids and counts end up in int64 tensors

Source = str | os.PathLike[str] | dict[str, Any] | Sequence[Any]


def category_counts(annotations: Source) -> list[int]:
    r"""Return the training instances of each category, in ascending order of category id.

    LVIS states the counts of its training set in its categories (`instance_count`), and these
    are taken as they are: a subset or a validation file that keeps them still describes the
    training set. A file that also holds annotations which add up to something else gives a
    warning. Where no category states a count (COCO), :math:`n_c` is the number of annotations of
    category :math:`c` with `iscrowd` 0. A file in which only some categories state a count is an
    error, since the two kinds of numbers cannot be mixed.

    Args:
        annotations: Path of a JSON file, or its content: a whole LVIS or COCO annotation dict, a
            list of category rows with `id` and `instance_count`, or a list of counts, which is
            checked and returned.

    Returns:
        One integer >= 0 per category; 0 for a category that was never seen.

    Raises:
        OSError: The file is missing, a folder, or cannot be read.
        ValueError: The content is not valid; the message names file, entry, and value.
        TypeError: `annotations` is neither path, dict nor list.

    Example:
        >>> lvis = {"categories": [{"id": 7, "instance_count": 2}, {"id": 3, "instance_count": 9}]}
        >>> category_counts(lvis)
        [9, 2]
        >>> coco = {
        ...     "categories": [{"id": 3, "name": "cat"}, {"id": 7, "name": "dog"}],
        ...     "annotations": [{"category_id": 3, "iscrowd": 1}, {"category_id": 3}],
        ... }
        >>> category_counts(coco)
        [1, 0]
    """
    return _stated_or_counted(*_load(annotations), "instance_count", _count_instances)


def image_counts(annotations: Source) -> list[int]:
    r"""Return the training images that hold each category, in ascending order of category id.

    LVIS states them in its categories (`image_count`); they are taken as they are, with a warning
    where annotations in the same file say otherwise. Where no category states a count (COCO), it
    is the number of distinct images with an annotation of the category whose `iscrowd` is 0.

    Args:
        annotations: As for :func:`category_counts`, with `image_count` for `instance_count`.

    Returns:
        One integer >= 0 per category; 0 for a category that was never seen.

    Raises:
        OSError: The file is missing, a folder, or cannot be read.
        ValueError: The content is not valid; the message names file, entry, and value.
        TypeError: `annotations` is neither path, dict nor list.

    Example:
        >>> coco = {
        ...     "categories": [{"id": 3, "name": "cat"}, {"id": 7, "name": "dog"}],
        ...     "annotations": [
        ...         {"category_id": 3, "image_id": 1},
        ...         {"category_id": 3, "image_id": 1},
        ...         {"category_id": 3, "image_id": 2},
        ...     ],
        ... }
        >>> image_counts(coco)
        [2, 0]
    """
    return _stated_or_counted(*_load(annotations), "image_count", _count_images)


def category_ids(annotations: Source) -> list[int]:
    """Return the category ids in ascending order, the order of :func:`category_counts`.

    Args:
        annotations: As for :func:`category_counts`, but not a list of counts.

    Raises:
        OSError: The file is missing, a folder, or cannot be read.
        ValueError: The content is not valid; the message names file, entry, and value.
        TypeError: `annotations` is neither path, dict nor list.

    Example:
        >>> category_ids([{"id": 7, "instance_count": 2}, {"id": 3, "instance_count": 9}])
        [3, 7]
    """
    return sorted(int(row["id"]) for row in read_annotations(annotations)["categories"])


class CountedCategory(NamedTuple):
    """A category of a data set, and how often it occurs.

    Attributes:
        id: its id; None where only counts were given.
        name: its name, if it has one.
        instances: how many it has in training.
    """

    id: int | None
    name: str | None
    instances: int


def counted_categories(annotations: Source) -> list[CountedCategory]:
    """Return id, name and training instances of each category, in ascending order of id.

    The file is read once, where :func:`category_counts` and :func:`category_ids` read it twice.

    Args:
        annotations: As for :func:`category_counts`.

    Raises:
        OSError: The file is missing, a folder, or cannot be read.
        ValueError: The content is not valid; the message names file, entry, and value.
        TypeError: `annotations` is neither path, dict nor list.

    Example:
        >>> counted_categories([{"id": 7, "name": "dog", "instance_count": 2}])
        [CountedCategory(id=7, name='dog', instances=2)]
    """
    data, source = _load(annotations)
    counts = _stated_or_counted(data, source, "instance_count", _count_instances)
    rows = data if isinstance(data, list | tuple) else data["categories"]
    if not counts or not isinstance(rows[0], dict):
        return [CountedCategory(None, None, count) for count in counts]
    rows = sorted(rows, key=lambda row: row["id"])
    names = [row.get("name") for row in rows]
    return [
        CountedCategory(int(row["id"]), name if isinstance(name, str) else None, count)
        for row, name, count in zip(rows, names, counts, strict=True)
    ]


def read_annotations(annotations: Source, *, complete: bool = False) -> dict[str, Any]:
    """Read LVIS or COCO annotations and check that their ids and references hold.

    Checked: `categories` (ids unique, `instance_count` an integer >= 0 where stated), and where
    present `images` (ids unique) and `annotations` (ids unique, categories and images known,
    `iscrowd` 0 or 1). Ids are integers in [0, 2**63). Boxes and masks are not looked at.

    Args:
        annotations: Path of a JSON file of at most `MAX_FILE_BYTES`, or its content: a whole
            annotation dict, or a list of category rows.
        complete: Require `images` and `annotations`, and in each annotation `id` and `image_id`.

    Returns:
        The annotation dict, as it was given (not a copy); a list of category rows becomes
        `{"categories": rows}`.

    Raises:
        OSError: The file is missing, a folder, or cannot be read.
        ValueError: The content is not valid; the message names file, entry, and value.
        TypeError: `annotations` is neither path, dict nor list.

    Example:
        >>> read_annotations({"categories": [{"id": 1}, {"id": 1}]})
        Traceback (most recent call last):
        ...
        ValueError: annotations: Expected unique `id` in `categories`, got 1 twice, at 0 and 1
    """
    data, name = _load(annotations)
    return _validate(data, name, complete=complete)


def _stated_or_counted(
    data: Any, name: str, key: str, count: Callable[..., list[int]]
) -> list[int]:
    """Return what every category states under `key`, or else what `count` finds."""
    if isinstance(data, list | tuple) and data and not isinstance(data[0], dict):
        return _integers(data, name, "counts", "count")
    data = _validate(data, name, complete=False)
    rows = sorted(data["categories"], key=lambda row: row["id"])
    stated = [row for row in rows if key in row]
    if stated and len(stated) < len(rows):
        lacking = next(row["id"] for row in rows if key not in row)
        raise ValueError(
            f"{name}: Expected `{key}` in every category or in none, got it in "
            f"{len(stated)} of {len(rows)}; category {lacking} is the first without"
        )
    counted = count(data["annotations"], rows, name) if "annotations" in data else None
    if stated:
        # Checked in the order of the file, so that a message names the right entry.
        _integers(
            [row[key] for row in data["categories"]], name, "categories", key, data["categories"]
        )
        counts = [int(row[key]) for row in rows]
        if counted is not None and any(counted) and counted != counts:
            _warn_of_difference(counts, counted, rows, name, key)
        return counts
    if counted is None:
        raise ValueError(
            f"{name}: Expected categories with `{key}` or a list `annotations` to count, "
            "got neither"
        )
    return counted


def _warn_of_difference(
    stated: list[int], counted: list[int], rows: Sequence[dict[str, Any]], name: str, key: str
) -> None:
    differing = [i for i, (a, b) in enumerate(zip(stated, counted, strict=True)) if a != b]
    first = differing[0]
    warnings.warn(
        f"{name}: `{key}` of {len(differing)} of {len(rows)} categories differs "
        f"from the annotations in the same file (category {rows[first]['id']}: "
        f"{stated[first]} against {counted[first]}); `{key}` is used. To count "
        "the annotations instead, remove that key from the categories.",
        stacklevel=4,  # who called the public function
    )


def _load(source: Source) -> tuple[Any, str]:
    """Return parsed content and the name that error messages give it."""
    if isinstance(source, dict | list | tuple):
        return source, "annotations"
    if not isinstance(source, str | os.PathLike):
        raise TypeError(
            "Expected `annotations` to be a path, a dict or a list, "
            f"got {type(source).__name__}: {reprlib.repr(source)}"
        )
    path = Path(source)
    if path.is_dir():
        raise IsADirectoryError(f"{path}: Expected an annotation file, got a folder")
    if not path.exists():
        raise FileNotFoundError(f"{path}: Expected an annotation file, found nothing there")
    if not path.is_file():
        raise ValueError(f"{path}: Expected an annotation file, got a device or pipe")
    size = path.stat().st_size
    if size > MAX_FILE_BYTES:
        raise ValueError(
            f"{path}: Expected an annotation file of at most {MAX_FILE_BYTES} bytes, got {size}"
        )
    with path.open("rb") as file:
        beginning = file.read(1024).removeprefix(b"\xef\xbb\xbf").lstrip()
    if not beginning and size < 1024:
        raise ValueError(f"{path}: Expected JSON, got an empty file, perhaps a truncated one")
    if beginning and beginning[:1] not in b"{[":
        # Said before gigabytes of something else are read.
        raise ValueError(f"{path}: Expected JSON, got a file that starts {beginning[:20]!r}")
    # The garbage collector walks the growing millions of objects again and again, none of which it
    # can free: parsing is 2.7 times faster without it.
    collecting = gc.isenabled()
    gc.disable()
    try:
        return json.loads(path.read_text(encoding="utf-8-sig")), str(path)
    except json.JSONDecodeError as error:
        cut = error.msg.startswith("Unterminated") or (
            error.pos >= len(error.doc.rstrip()) - 1 and not error.msg.startswith("Extra data")
        )
        end = "; the file may be truncated" if cut else ""
        raise ValueError(
            f"{path}: Expected JSON, got {error.msg} at line {error.lineno} "
            f"column {error.colno}{end}"
        ) from None
    except ValueError as error:  # not UTF-8, or an integer of thousands of digits
        raise ValueError(f"{path}: Expected JSON in UTF-8, got {error}") from None
    except RecursionError:
        raise ValueError(f"{path}: Expected annotations, got JSON nested too deeply") from None
    except MemoryError:
        raise ValueError(
            f"{path}: Expected annotations that fit in memory, got {size} bytes of JSON"
        ) from None
    finally:
        if collecting:
            gc.enable()


def _validate(data: Any, name: str, *, complete: bool) -> dict[str, Any]:
    if isinstance(data, list | tuple):
        data = {"categories": data}
    if not isinstance(data, dict):
        raise ValueError(f"{name}: Expected a JSON object, got {type(data).__name__}")
    wanted = ("categories", "images", "annotations") if complete else ("categories",)
    for section in wanted:
        if section not in data:
            raise ValueError(f"{name}: Expected `{section}`, got only {reprlib.repr(list(data))}")
    for section in ("categories", "images", "annotations"):
        if section in data:
            _check_rows(data[section], name, section)
    if not data["categories"]:
        raise ValueError(f"{name}: Expected at least one entry in `categories`, got none")

    known = set(_unique_ids(data["categories"], name, "categories"))
    stated = [row.get("instance_count", 0) for row in data["categories"]]
    _integers(stated, name, "categories", "instance_count", data["categories"])
    images = set(_unique_ids(data["images"], name, "images")) if "images" in data else None
    if "annotations" in data:
        _check_annotations(data["annotations"], name, known, images, complete=complete)
    return data


def _check_rows(rows: Any, name: str, section: str) -> None:
    if not isinstance(rows, list | tuple):
        raise ValueError(f"{name}: Expected `{section}` to be a list, got {type(rows).__name__}")
    if set(map(type, rows)) <= {dict}:
        return
    for i, row in enumerate(rows):
        if not isinstance(row, dict):
            raise ValueError(f"{name}: Expected {section}[{i}] to be an object, got {_show(row)}")


def _check_annotations(
    rows: Sequence[dict[str, Any]],
    name: str,
    categories: set[int],
    images: set[int] | None,
    *,
    complete: bool,
) -> None:
    section = "annotations"
    if complete or any("id" in row for row in rows):
        _unique_ids(rows, name, section)
    references = [("category_id", categories, "categories")]
    if images is not None and (complete or any("image_id" in row for row in rows)):
        references.append(("image_id", images, "images"))
    for key, known, target in references:
        values = _column(rows, key, name, section)
        unknown = set(values) - known
        if unknown:
            i = next(i for i, value in enumerate(values) if value in unknown)
            raise ValueError(
                f"{name}: Expected `{key}` of {_entry(rows, section, i)} to be in `{target}`, "
                f"got {values[i]}"
            )
    crowd = [row.get("iscrowd", 0) for row in rows]
    if not (set(map(type, crowd)) <= {int, bool} and set(crowd) <= {0, 1}):
        for i, value in enumerate(crowd):
            if not (isinstance(value, int) and value in (0, 1)):
                raise ValueError(
                    f"{name}: Expected `iscrowd` of {_entry(rows, section, i)} to be 0 or 1, "
                    f"got {_show(value)}"
                )


def _count_instances(
    rows: Sequence[dict[str, Any]], categories: Sequence[dict[str, Any]], name: str
) -> list[int]:
    counter = Counter(row["category_id"] for row in rows if not row.get("iscrowd", 0))
    return [counter[row["id"]] for row in categories]


def _count_images(
    rows: Sequence[dict[str, Any]], categories: Sequence[dict[str, Any]], name: str
) -> list[int]:
    images = _column(rows, "image_id", name, "annotations")
    pairs = {
        (row["category_id"], image)
        for row, image in zip(rows, images, strict=True)
        if not row.get("iscrowd", 0)
    }
    counter = Counter(category for category, _ in pairs)
    return [counter[row["id"]] for row in categories]


def _unique_ids(rows: Sequence[dict[str, Any]], name: str, section: str) -> list[int]:
    values = _column(rows, "id", name, section)
    if len(set(values)) < len(values):
        first: dict[int, int] = {}
        for i, value in enumerate(values):
            if value in first:
                raise ValueError(
                    f"{name}: Expected unique `id` in `{section}`, got {value} twice, "
                    f"at {first[value]} and {i}"
                )
            first[value] = i
    return values


def _column(rows: Sequence[dict[str, Any]], key: str, name: str, section: str) -> list[int]:
    """Return `key` of the rows, each an integer in [0, 2**63)."""
    try:
        values = [row[key] for row in rows]
    except KeyError:
        i = next(i for i, row in enumerate(rows) if key not in row)
        raise ValueError(
            f"{name}: Expected `{key}` in {_entry(rows, section, i)}, got {_show(rows[i])}"
        ) from None
    return _integers(values, name, section, key, rows)


def _integers(
    values: Sequence[Any],
    name: str,
    section: str,
    key: str,
    rows: Sequence[dict[str, Any]] | None = None,
) -> list[int]:
    # The common case is decided without a step of Python per value: there may be millions.
    if set(map(type, values)) <= {int} and (
        not values or (min(values) >= 0 and max(values) < _ID_LIMIT)
    ):
        return list(values)
    integers = []
    for i, value in enumerate(values):
        if isinstance(value, bool) or not hasattr(value, "__index__"):
            valid = False
        else:
            valid = 0 <= value < _ID_LIMIT
        if not valid:
            entry = f"{section}[{i}]" if rows is None else _entry(rows, section, i)
            raise ValueError(
                f"{name}: Expected `{key}` of {entry} to be an integer in [0, 2**63), "
                f"got {_show(value)}"
            )
        integers.append(int(value))
    return integers


def _entry(rows: Sequence[dict[str, Any]], section: str, i: int) -> str:
    found = rows[i].get("id")
    return f"{section}[{i}]" + (f" (id {found})" if type(found) is int else "")


def _show(value: Any) -> str:
    return f"{type(value).__name__} {reprlib.repr(value)}"
