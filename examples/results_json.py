"""The format of LVIS results: a JSON list of detections, written and read as a stream.

Each detection is {"image_id", "category_id", "bbox" as [x, y, width, height], "score"}, with
"segmentation" where there are masks. A file that is written here has one to a line. Any JSON list
is read, and never more of it than a block at a time.
"""

import io
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

from detection_results import CHUNK, Detections, Gatherer, ImageDetections, ResultsWriter
from tqdm import tqdm

BLOCK = 2**20  # characters that are read at once
MAX_RECORD = 2**26  # characters of one detection; a mask of an image takes thousands

_SPACE = re.compile(r"[ \t\n\r]*")


class JsonWriter(ResultsWriter):
    """Writes the format of LVIS results, one detection to a line."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self._encode = json.JSONEncoder(allow_nan=False).encode
        self._next = "[\n"

    def _write(self, image: ImageDetections) -> None:
        lines = []
        for record in image.records():
            lines += [self._next, self._encode(record)]
            self._next = ",\n"
        self._file.write("".join(lines).encode("ascii"))

    def _end(self) -> None:
        self._file.write(b"[\n]\n" if self._next == "[\n" else b"\n]\n")


def read_json(path: Path, *, progress: bool = False) -> Detections:
    """Read a file in the format of LVIS results.

    Raises:
        OSError: The file cannot be read.
        ValueError: It is not a JSON list of valid detections; the message names the file and the
            first bad detection, counted from 0.
    """
    gatherer = Gatherer(str(path))
    chunk: list[Any] = []
    size = path.stat().st_size
    try:
        with (
            path.open("rb") as raw,
            io.TextIOWrapper(raw, encoding="utf-8-sig") as file,
            tqdm(
                total=size,
                desc=f"Reading {path.name}",
                unit="B",
                unit_scale=True,
                disable=not progress,
            ) as bar,
        ):
            for record in iterate_list(file):
                chunk.append(record)
                if len(chunk) == CHUNK:
                    gatherer.add_records(chunk)
                    chunk.clear()
                    bar.update(raw.tell() - bar.n)
            gatherer.add_records(chunk)
            bar.update(size - bar.n)
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: Expected JSON in UTF-8, got {error}") from None
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    except RecursionError:
        raise ValueError(f"{path}: Expected detections, got JSON nested too deeply") from None
    return gatherer.finish()


def iterate_list(file: TextIO) -> Iterator[Any]:
    """Yield the objects of a JSON list, reading a block at a time.

    Raises:
        ValueError: The content is not one list of objects; the message numbers them from 0.
    """
    reader = _Reader(file)
    if reader.peek() != "[":
        raise ValueError(f"Expected a JSON list of detections, got {reader.excerpt()}")
    reader.take()
    number = 0
    while (mark := reader.peek()) != "]":
        if number:
            if mark != ",":
                raise ValueError(
                    f"Expected `,` or `]` after detection {number - 1}, got {reader.excerpt()}"
                )
            reader.take()
        yield reader.take_object(number)
        number += 1
    reader.take()
    if reader.peek():
        raise ValueError(f"Expected nothing after the list, got {reader.excerpt()}")


class _Reader:
    """A window onto a text, and a place in it."""

    def __init__(self, file: TextIO) -> None:
        self._file = file
        self._text, self._at = "", 0
        self._decode = json.JSONDecoder().raw_decode

    def peek(self) -> str:
        """Return the next character that is not white space; nothing at the end."""
        while True:
            space = _SPACE.match(self._text, self._at)
            self._at = space.end() if space else self._at
            if self._at < len(self._text):
                return self._text[self._at]
            if not self._read_on():
                return ""

    def take(self) -> None:
        """Go over the character that :meth:`peek` returned."""
        self._at += 1

    def take_object(self, number: int) -> Any:
        mark = self.peek()
        if mark and mark != "{":
            raise ValueError(f"Expected detection {number} to be an object, got {self.excerpt()}")
        while True:
            try:
                value, self._at = self._decode(self._text, self._at)
                return value
            except json.JSONDecodeError as error:
                # It may go on in the next block.
                too_long = len(self._text) - self._at > MAX_RECORD
                if too_long or not self._read_on():
                    cut = error.msg.startswith("Unterminated") or error.pos >= len(self._text) - 1
                    end = "; the file may be truncated" if cut and not too_long else ""
                    raise ValueError(
                        f"Expected detection {number} as JSON, got {error.msg} in "
                        f"{self.excerpt()}{end}"
                    ) from None

    def excerpt(self) -> str:
        """Return what stands at the place, for a message."""
        found = self._text[self._at : self._at + 60]
        return repr(found) if found else "the end of the file"

    def _read_on(self) -> bool:
        left = len(self._text) - self._at
        more = self._file.read(max(BLOCK, left))  # as much again: a long record is read in O(n)
        if more:
            self._text, self._at = self._text[self._at :] + more, 0
        return bool(more)
