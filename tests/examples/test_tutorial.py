"""The tutorial runs, its output bears out its text, and its page has what the source has."""

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[2]
SOURCE = ROOT / "examples" / "tutorial.py"
PAGE = ROOT / "docs" / "tutorial.md"
TOOL = ROOT / "docs" / "tools" / "write_tutorial.py"
PICTURES = {"counts", "shares", "others", "pull_and_push", "ap_per_group", "detections"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("tutorial")


@pytest.fixture(scope="module")
def output(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """What the program prints, in an empty folder."""
    pytest.importorskip("torchvision")
    pytest.importorskip("lvis")
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    environment = {
        **os.environ,
        "PYTHONPATH": path,
        "MPLBACKEND": "Agg",
        "OMP_NUM_THREADS": "1",
        "MPLCONFIGDIR": str(tmp_path_factory.mktemp("matplotlib")),
    }
    # Fonts are looked for once, of which matplotlib may say something.
    fonts = [sys.executable, "-c", "import matplotlib.font_manager"]
    subprocess.run(fonts, env=environment, check=True, capture_output=True)
    done = subprocess.run(
        [sys.executable, str(SOURCE)], cwd=folder, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert not done.stderr
    return done.stdout


def rows(output: str, title: str) -> list[list[float]]:
    """The lines of tables with a title, with a number for each of the four groups."""
    found = re.findall(rf"^{re.escape(title)} +(.*)$", output, re.M)
    assert found, title
    numbers = [[float(cell.rstrip("%")) for cell in line.split()] for line in found]
    assert all(len(line) == 4 for line in numbers)
    return numbers


def test_plain_softmax_fails_on_rare_categories(output: str) -> None:
    (rare, few, some, many), again = rows(output, "AP, softmax")
    assert again == [rare, few, some, many]
    assert rare < few < some
    right = rows(output, "right category")[0]
    assert right == sorted(right)
    assert right[0] < 0.1


def test_pull_and_push_are_as_the_text_has_them(output: str) -> None:
    start = rows(output, "pull / push, at the start")[0]
    bags = rows(output, "pull / push, BAGS")[0]
    assert start == sorted(start)
    assert start[0] < start[-1] / 100
    assert bags[0] > bags[-1] / 3
    assert all(1 / 3 < ratio < 3 for ratio in rows(output, "pull / push, after training")[0])
    steps = rows(output, "steps with push alone")[0]
    assert steps[0] > 50 > steps[1] > steps[2] == steps[3] == 0


def test_others_that_count_are_eight_for_each_row_of_the_group(output: str) -> None:
    own, others = (
        [int(cell) for cell in re.findall(rf"^{title} +(.*)$", output, re.M)[0].split()]
        for title in ("of the group itself", "others that count")
    )
    total = own[0] + others[0]
    assert sum(own[1:]) == own[0]
    assert others[1:] == [min(8 * number, total - number) for number in own[1:]]


def test_bags_gains_on_rare_categories_over_the_control(output: str) -> None:
    softmax = rows(output, "AP, softmax")[0]
    control, faster = rows(output, "AP, softmax, continued")
    bags, _ = rows(output, "AP, balanced group softmax")
    assert bags[0] > control[0] + 1
    assert bags[0] > softmax[0] + 1
    assert faster[0] > control[0]  # with four times the learning rate


def test_nothing_but_the_classifier_changes_and_a_checkpoint_is_enough(output: str) -> None:
    changed, entries = re.findall(r"^(\d+) of (\d+) entries outside", output, re.M)[0]
    assert int(changed) == 0
    assert int(entries) > 50
    assert "same layout: True" in output
    assert "same detections: True" in output


def test_a_score_is_the_product(output: str) -> None:
    foreground, inside, product = re.findall(r"([\d.]+) \* ([\d.]+) = ([\d.]+)", output)[0]
    score, before = re.findall(r"head\.scores has ([\d.]+); softmax had ([\d.]+)", output)[0]
    assert float(foreground) * float(inside) == pytest.approx(float(product), abs=0.002)
    assert score == product
    assert float(before) < float(score)


def test_files_go_to_a_new_folder(output: str, folder: Path) -> None:
    assert [path.name for path in folder.iterdir()] == ["runs"]
    assert [path.name for path in (folder / "runs").iterdir()] == ["tutorial"]
    files = {path.name for path in (folder / "runs" / "tutorial").iterdir()}
    assert files == {"data", "bags.pt", *(f"{name}.png" for name in PICTURES)}


# --- the page -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tool() -> ModuleType:
    for name in ("jupytext", "nbclient"):
        if importlib.util.find_spec(name) is None:
            pytest.skip(f"{name} not installed; pip install -e '.[docs]'")
    spec = importlib.util.spec_from_file_location("write_tutorial", TOOL)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_page_has_the_cells_of_the_source(tool: ModuleType) -> None:
    cells = [tool.written(cell) for cell in tool.read().cells]
    page = PAGE.read_text(encoding="utf-8")
    page = re.sub(r"^```text\n.*?^```\n\n?", "", page, flags=re.M | re.S)  # printed
    page = re.sub(r"^!\[[^\]]*\]\(images/tutorial_\w+\.png\)\n\n?", "", page, flags=re.M)
    expected = "\n\n".join([tool.HEADER, *cells]) + "\n"
    assert page.rstrip("\n") == expected.rstrip("\n"), (
        "docs/tutorial.md is not what examples/tutorial.py says; "
        "write it anew: python docs/tools/write_tutorial.py"
    )


def test_the_page_has_outputs_and_pictures(tool: ModuleType) -> None:
    page = PAGE.read_text(encoding="utf-8")
    named = set(re.findall(r"^!\[[^\]]+\]\(images/tutorial_(\w+)\.png\)$", page, re.M))
    there = {path.stem.removeprefix("tutorial_") for path in tool.IMAGES.glob("tutorial_*.png")}
    assert named == there == PICTURES
    assert all(path.stat().st_size < 80_000 for path in tool.IMAGES.glob("tutorial_*.png"))
    printing = [
        cell for cell in tool.read().cells if re.search(r"^(print|line)\(", cell.source, re.M)
    ]
    assert page.count("```text\n") >= len(printing) > 5
    assert "%|" not in page  # a progress bar
