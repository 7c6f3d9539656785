"""Every code block and command of README and docs runs, or says why it is not run."""

from pathlib import Path
from typing import Any

import document_blocks as documents
import pytest
from document_settings import SETTINGS, run_in_its_setting

pytest.importorskip("torchvision")
pytest.importorskip("lvis")
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


@pytest.mark.parametrize("block", documents.BLOCKS, ids=lambda block: block.place)
def test_every_block_says_what_it_is(block: documents.Block) -> None:
    assert block.language in documents.LANGUAGES, f"{block.place}: name the language of the block"
    if block.language not in documents.CODE:
        documents.parse_data(block)
        return
    assert block.runs is not None, f"{block.place}: no mark before the fence, but {block.mark!r}"
    assert block.framework in (None, *documents.FRAMEWORKS), block.place
    if not block.runs:
        assert block.text, f"{block.place}: say why it is not run"
    elif block.text != "continued":
        assert block.text in SETTINGS, f"{block.place}: no setting named {block.text!r}"


@pytest.mark.parametrize("chain", documents.chains(None), ids=documents.place_of_chain)
def test_blocks_run(
    chain: list[documents.Block], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_in_its_setting(chain, tmp_path, monkeypatch)


@pytest.mark.parametrize("block", documents.not_run(None), ids=lambda block: block.place)
def test_options_of_blocks_that_are_not_run(block: documents.Block, tmp_path: Path) -> None:
    documents.check_without_running(block, tmp_path)


# --- what README promises of itself --------------------------------------------------------------


def test_the_example_is_eight_lines_and_starts_in_the_first_ten() -> None:
    example = next(b for b in documents.BLOCKS if b.page.name == "README.md")
    code = [line for line in example.code.splitlines() if line.strip()]
    assert len(code) == 8 - 1  # and a blank line
    assert example.line <= 10


def test_the_two_commands_are_there() -> None:
    commands = [b for b in documents.BLOCKS if str(b.page) == "README.md" and b.language == "bash"]
    assert commands[0].code.rstrip().endswith("python examples/torchvision_lvis_train.py")
    tests = commands[1].code.strip()
    assert tests == 'python -m pip install -e ".[dev]" && python -m pytest -n auto --dist worksteal'
    script = documents.ROOT / ".ci" / "run"  # not in the source distribution
    if script.is_file():
        assert tests.replace("install", "install --quiet") in script.read_text()


# --- that wrong blocks are noticed ---------------------------------------------------------------


def block(code: str, language: str = "bash", **mark: Any) -> documents.Block:
    return documents.Block(Path("page.md"), 1, language, code, "", **mark)


@pytest.mark.parametrize(
    "code",
    [
        "python examples/torchvision_lvis_train.py --stage sofmax --output runs/x",
        "python examples/torchvision_lvis_train.py --output x --sampel repeat_factor",
        "torchrun --nproc-per-node 8 examples/torchvision_lvis_train.py --nothing ...",
        "python examples/torchvision_train.py",
        "python examples/torchvision_lvis_train.py --config examples/configs/r50.toml",
        "balanced-group-softmax group train.json",
        'python -m pip install -e ".[demo]"',
        'pip install "balanced-group-softmax[everything]"',
        "python -m pytest tests/test_nothing.py",
        "python -c 'import'",
    ],
)
def test_wrong_commands_are_refused_without_running(code: str, tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match=r"page\.md:1"):
        documents.check_without_running(block(code), tmp_path)


@pytest.mark.parametrize(
    "code", ["git clone nowhere\ncd nowhere", "python examples/classification.py --seeds 0 1"]
)
def test_right_ones_are_not_run(code: str, tmp_path: Path) -> None:
    documents.check_without_running(block(code), tmp_path)
    assert not (tmp_path / "nowhere").exists()


def test_a_command_that_fails_is_noticed(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="exit 2"):
        documents.run_commands(block("balanced-group-softmax groups none.json\ntrue"), tmp_path)


def test_marks_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bash = "\n\n<!-- not run in mmdet: why -->\n```bash\ntrue\n```\n"
    python = "\n  <!-- run -->\n  ```python\n  1\n  ```\n"
    page = bash + python + "```\nx\n```\n"
    monkeypatch.setattr(documents, "ROOT", tmp_path)
    (tmp_path / "page.md").write_text(page)
    one, two, three = documents.blocks_of(Path("page.md"))
    assert (one.runs, one.framework, one.text, one.line) == (False, "mmdet", "why", 4)
    assert (two.runs, two.framework, two.text, two.code) == (True, None, None, "1\n")
    assert (three.runs, three.language, three.mark) == (None, "", "```")
