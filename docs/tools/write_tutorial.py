"""Write docs/tutorial.md and its pictures: examples/tutorial.py, run as a notebook.

Needs `pip install -e ".[docs,examples]"`, and takes as long as the tutorial itself.

    python docs/tools/write_tutorial.py

Text cells and code cells become the page as they are, but for links, which are written for the
folder of the notebook. After each code cell come what it printed and the picture that it made.
"""

import argparse
import ast
import io
import os
import re
import sys
import tempfile
from base64 import b64decode
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jupytext
from nbclient import NotebookClient
from PIL import Image

from balanced_group_softmax.cli_program import HelpFormatter, ended

STATUS = "exit status: 0 if done; 2 if the usage is wrong; 130 after Ctrl-C."
ROOT = Path(__file__).parents[2]
SOURCE = ROOT / "examples" / "tutorial.py"
PAGE = ROOT / "docs" / "tutorial.md"
IMAGES = ROOT / "docs" / "images"
HEADER = "<!-- Made from examples/tutorial.py by docs/tools/write_tutorial.py: edit the former. -->"
MARKER = "<!-- not run: tests/examples/test_tutorial.py runs all of it -->"
COLOURS = 64  # enough for charts, and for photographs of this kind
MAX_BYTES = 80_000


def main(argv: Sequence[str] | None = None) -> int:
    """Run the notebook and write the page and its pictures; return the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=STATUS, formatter_class=HelpFormatter
    )
    parser.parse_args(argv)
    notebook = read()
    execute(notebook)
    parts = [HEADER]
    pictures = {}
    for cell in notebook.cells:
        parts.append(written(cell))
        if cell.cell_type == "code":
            printed, drawn = outputs_of(cell)
            if printed:
                parts.append(f"```text\n{printed}```")
            if drawn is not None:
                name, caption = named(cell.source)
                pictures[f"tutorial_{name}.png"] = drawn
                parts.append(f"![{caption}](images/tutorial_{name}.png)")
    for old in IMAGES.glob("tutorial_*.png"):
        old.unlink()
    for name, content in pictures.items():
        (IMAGES / name).write_bytes(content)
        print(f"{IMAGES / name}: {len(content)} bytes")
    PAGE.write_text("\n\n".join(parts) + "\n", encoding="utf-8")
    print(PAGE)
    return 0


def read() -> Any:
    """Return the notebook, without outputs."""
    return jupytext.read(SOURCE)


def execute(notebook: Any) -> None:
    """Run all cells in an empty folder, with the modules that stand beside the source."""
    path = os.pathsep.join([str(SOURCE.parent), str(ROOT)])
    os.environ["PYTHONPATH"] = path  # of the kernel
    os.environ["OMP_NUM_THREADS"] = "1"  # another order of sums leads training elsewhere
    with tempfile.TemporaryDirectory() as folder:
        NotebookClient(
            notebook,
            timeout=None,
            kernel_name="python3",
            resources={"metadata": {"path": folder}},
        ).execute()


def written(cell: Any) -> str:
    """Return a cell as it stands in the page."""
    if cell.cell_type == "code":
        return f"{MARKER}\n```python\n{cell.source}\n```"
    return re.sub(r"\]\((?!https?:)([^)]+)\)", _link, cell.source)


def _link(found: re.Match[str]) -> str:
    """Turn a link from examples/ into one from docs/."""
    path, hash_, anchor = found[1].partition("#")
    target = os.path.relpath(SOURCE.parent / path, PAGE.parent)
    return f"]({Path(target).as_posix()}{hash_}{anchor})"


def outputs_of(cell: Any) -> tuple[str, bytes | None]:
    """Return what a cell printed, and its picture if it made one.

    Raises:
        RuntimeError: It wrote a warning or a progress bar, or there is more than one picture.
    """
    printed, drawn = "", []
    for output in cell.outputs:
        if output.output_type == "stream" and output.name == "stdout":
            printed += output.text
        elif output.output_type == "execute_result" and "image/png" in output.data:
            drawn.append(compressed(b64decode(output.data["image/png"])))
        else:
            raise RuntimeError(f"Expected text or a picture, got {output} of\n{cell.source}")
    if len(drawn) > 1:
        raise RuntimeError(f"Expected one picture, got {len(drawn)} of\n{cell.source}")
    return printed, drawn[0] if drawn else None


def named(source: str) -> tuple[str, str]:
    """Return name and caption of a cell's picture, from the call in its last line."""
    match ast.parse(source).body[-1]:
        case ast.Expr(ast.Call(ast.Name("picture"), [_, ast.Constant(name), ast.Constant(text)])):
            return str(name), str(text)
    raise RuntimeError(f"Expected picture(figure, name, caption) in the last line of\n{source}")


def compressed(picture: bytes) -> bytes:
    """Return a PNG file with fewer colours.

    Raises:
        RuntimeError: It is large nevertheless.
    """
    file = io.BytesIO()
    image = Image.open(io.BytesIO(picture)).convert("RGB")
    image.quantize(COLOURS, dither=Image.Dither.NONE).save(file, "PNG", optimize=True)
    if len(file.getvalue()) > MAX_BYTES:
        raise RuntimeError(f"Expected at most {MAX_BYTES} bytes, got {len(file.getvalue())}")
    return file.getvalue()


if __name__ == "__main__":
    sys.exit(ended(main))
