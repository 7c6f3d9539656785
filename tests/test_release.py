"""What a release uploads: contents, metadata, and a wheel that works and has types by itself."""

import ast
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import venv
import zipfile
from importlib.metadata import Distribution, PackageNotFoundError, distribution, distributions
from pathlib import Path

import numpy
import pytest
import torch
from packaging.metadata import Metadata
from packaging.requirements import Requirement
from readme_renderer import markdown
from trove_classifiers import classifiers as known_classifiers
from trove_classifiers import deprecated_classifiers

from balanced_group_softmax import __version__

ROOT = Path(__file__).parents[1]
PACKAGE = "balanced_group_softmax"
MAX_WHEEL_BYTES = 200_000
FENCES = re.compile(r"^```.*?^```", re.M | re.S)

# Adapters need their framework. The rest is the core.
NEEDS = {
    "adapters.torchvision": "torchvision",
    "adapters.torchvision_legacy": "torchvision",
    "adapters.detectron2": "detectron2",
    "adapters.detectron2_detections": "detectron2",
    "adapters.detectron2_layouts": "detectron2",
    "adapters.detectron2_predictors": "detectron2",
    "adapters.mmdet": "mmdet",
}


def run(*command: object, cwd: Path, fails: bool = False) -> str:
    """Run a program that does not see the source tree; return what it prints."""
    hidden = ("PYTHON", "MYPY")
    environment = {k: v for k, v in os.environ.items() if not k.startswith(hidden)}
    words = [str(word) for word in command]
    done = subprocess.run(words, cwd=cwd, env=environment, capture_output=True, text=True)
    assert (done.returncode != 0) == fails, done.stdout + done.stderr
    return done.stdout + done.stderr


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the source distribution, and the wheel that is made from it."""
    folder = tmp_path_factory.mktemp("dist")
    # Without isolation: what the build needs is in the extra `dev`, and nothing is downloaded.
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", folder, ROOT, cwd=folder)
    return folder


@pytest.fixture(scope="module")
def wheel(built: Path) -> Path:
    (path,) = built.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def metadata(wheel: Path) -> Metadata:
    with zipfile.ZipFile(wheel) as archive:
        text = archive.read(f"{PACKAGE}-{__version__}.dist-info/METADATA")
    return Metadata.from_email(text, validate=True)


@pytest.fixture(scope="module")
def page(metadata: Metadata) -> str:
    """What PyPI shows, in Markdown."""
    assert metadata.description_content_type == "text/markdown"
    return metadata.description or ""


# --- contents ------------------------------------------------------------------------------------


def sources() -> set[str]:
    """The files of the repository, or of the source distribution that the tests were unpacked from.

    Those that git ignores are left out; those that are new and not added yet are not.
    """
    if (ROOT / ".git").exists() and shutil.which("git"):
        # Whoever runs the tests need not be the one who cloned it.
        git = ["git", "-c", f"safe.directory={ROOT}", "-C", ROOT]
        listing = [*git, "ls-files", "--cached", "--others", "--exclude-standard"]
        names = run(*listing, cwd=ROOT).splitlines()
        return {name for name in names if (ROOT / name).is_file()}
    files = (path.relative_to(ROOT) for path in ROOT.rglob("*") if path.is_file())
    made = re.compile(r"(^|/)(__pycache__|\.\w+)/")  # by tests and linters
    return {path.as_posix() for path in files if not made.search(path.as_posix())}


def test_there_is_one_wheel_for_all_and_it_is_small(wheel: Path) -> None:
    assert wheel.name == f"{PACKAGE}-{__version__}-py3-none-any.whl"
    assert wheel.stat().st_size < MAX_WHEEL_BYTES


def test_the_wheel_holds_the_package_and_nothing_else(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    info = f"{PACKAGE}-{__version__}.dist-info"
    about = {name for name in names if name.startswith(info)}
    files = ("METADATA", "WHEEL", "RECORD", "entry_points.txt", "licenses/LICENSE")
    assert about == {f"{info}/{name}" for name in files}
    assert names - about == {name for name in sources() if name.startswith(f"{PACKAGE}/")}
    assert f"{PACKAGE}/py.typed" in names
    assert {Path(name).suffix for name in names - about} == {".py", ".typed"}


def test_the_source_distribution_holds_what_tests_and_examples_need(built: Path) -> None:
    (path,) = built.glob("*.tar.gz")
    with tarfile.open(path) as archive:
        inside = {name.partition("/")[2] for name in archive.getnames()}
    not_released = (".ci/", ".github/", ".pre-commit-config.yaml")
    wanted = {name for name in sources() if not name.startswith(not_released)} - {"PKG-INFO"}
    assert inside == {*wanted, "PKG-INFO"}
    assert {"LICENSE", "CHANGELOG.md", "pyproject.toml", "tests/conftest.py"} <= inside


# --- metadata ------------------------------------------------------------------------------------


def test_the_core_requires_torch_and_numpy_alone(metadata: Metadata) -> None:
    core = [one for one in metadata.requires_dist or () if "extra ==" not in str(one.marker)]
    assert {one.name for one in core} == {"torch", "numpy"}
    extras = {"torchvision", "lvis", "examples", "dev", "docs"}
    assert set(metadata.provides_extra or ()) == extras


def test_metadata_is_complete(metadata: Metadata) -> None:
    assert metadata.name == "balanced-group-softmax"
    assert str(metadata.requires_python) == ">=3.10"
    assert metadata.license_expression == "Apache-2.0"
    assert metadata.license_files == ["LICENSE"]
    assert metadata.summary
    assert metadata.keywords
    given = metadata.classifiers or []
    assert set(given) <= known_classifiers - deprecated_classifiers.keys()
    assert "Typing :: Typed" in given


def test_a_python_version_that_is_named_is_one_that_ci_runs(metadata: Metadata) -> None:
    workflow = ROOT / ".github" / "workflows" / "ci.yml"
    if not workflow.exists():
        pytest.skip("the source distribution has no CI")
    tried = set(re.findall(r'python: "(3\.\d+)"', workflow.read_text(encoding="utf-8")))
    named = re.findall(r":: Python :: (3\.\d+)$", "\n".join(metadata.classifiers or ()), re.M)
    assert set(named) == tried


def test_the_version_is_the_same_everywhere(metadata: Metadata) -> None:
    assert str(metadata.version) == __version__
    newest = re.search(r"^## (.+)$", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.M)
    assert newest
    # `## 0.1.0 - unreleased`, and at the release the day in its place.
    assert re.fullmatch(
        rf"{re.escape(__version__)} - (unreleased|20\d\d-\d\d-\d\d)", newest.group(1)
    )
    citation = (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    assert re.findall(r"^version: (.+)$", citation, re.M) == [__version__]


def test_the_page_on_pypi_has_no_link_that_leads_nowhere(page: str) -> None:
    html = markdown.render(page)
    assert html
    targets = re.findall(r'(?:href|src)="([^"]*)"', html)
    assert [one for one in targets if not one.startswith(("https://", "#"))] == []
    assert "](" not in FENCES.sub("", page)
    assert "<!--" not in page


def test_the_page_on_pypi_has_the_readme(page: str) -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    for start, end in (  # what needs a clone
        ("\n## Try it", "\n## In your own detector"),
        ("Or take the script", "**detectron2.**"),
        ("## Documentation", "## Source"),
    ):
        assert start not in page
        readme = readme[: readme.index(start)] + readme[readme.index(end) :]
    assert [fence for fence in FENCES.findall(readme) if fence not in page] == []
    assert re.findall(r"^## .*", readme, re.M) == [
        heading for heading in re.findall(r"^## .*", page, re.M) if heading != "## Install"
    ]
    assert "clone" not in page  # it has no address to clone from


def test_twine_finds_nothing_wrong(built: Path) -> None:
    files = sorted(built.iterdir())
    said = run(sys.executable, "-m", "twine", "check", "--strict", *files, cwd=built)
    assert said.count("PASSED") == len(files) == 2


# --- the wheel by itself -------------------------------------------------------------------------

# Put before all else in the user's interpreter: what is installed beside torch's and NumPy's own
# requirements looks as if it were not there, to `import` and to `importlib.util.find_spec`.
ABSENT = """
import sys
from importlib.machinery import PathFinder

class Present(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        if name.partition(".")[0] in NAMES:
            return None
        return super().find_spec(name, path, target)

sys.meta_path[sys.meta_path.index(PathFinder)] = Present
"""


def modules_of(installed: Distribution) -> set[str]:
    return {file.parts[0].partition(".")[0] for file in installed.files or ()}


def required(name: str, found: dict[str, Distribution]) -> dict[str, Distribution]:
    """A distribution and all that it requires, added to what is found already."""
    try:
        found[name] = distribution(name)
    except PackageNotFoundError:  # one that another system needs, or a stand-in for another name
        return found
    for line in found[name].requires or ():
        one = Requirement(line)
        wanted = one.marker is None or one.marker.evaluate({"extra": ""})
        if wanted and one.name not in found:
            required(one.name, found)
    return found


@pytest.fixture(scope="module")
def user(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A virtual environment of the wheel, torch, NumPy and what these two require."""
    folder = tmp_path_factory.mktemp("user") / "env"
    venv.create(folder, with_pip=False, symlinks=os.name != "nt")
    programs = folder / ("Scripts" if os.name == "nt" else "bin")
    install = ["install", "--quiet", "--no-deps", "--no-index", "--disable-pip-version-check"]
    python = programs / "python"
    run(sys.executable, "-m", "pip", "--python", python, *install, wheel, cwd=folder)
    needed = required("torch", required("numpy", {}))
    present = {PACKAGE}.union(*map(modules_of, needed.values()))
    others = set().union(*map(modules_of, distributions())) - present
    (packages,) = (path.parent for path in folder.rglob(PACKAGE) if path.is_dir())
    (packages / "absent.py").write_text(f"NAMES = {sorted(others)}\n{ABSENT}")
    homes = {str(Path(str(module.__file__)).parents[1]) for module in (torch, numpy)}
    (packages / "of_the_tests.pth").write_text("\n".join(["import absent", *sorted(homes)]))
    return programs


# Prints, as JSON, what could not be imported and for want of what.
IMPORT_ALL = f"""
import importlib, json, pkgutil
import {PACKAGE} as package
lacking = {{}}
for module in pkgutil.walk_packages(package.__path__, "{PACKAGE}."):
    try:
        importlib.import_module(module.name)
    except ModuleNotFoundError as error:
        lacking[module.name.partition(".")[2]] = error.name
print(json.dumps([package.__file__, package.__version__, lacking]))
"""


def test_the_wheel_imports_alone(user: Path, tmp_path: Path) -> None:
    file, version, lacking = json.loads(run(user / "python", "-c", IMPORT_ALL, cwd=tmp_path))
    assert Path(file).is_relative_to(user.parent)
    assert version == __version__
    # Triton is not everywhere, and some versions of it lack what they need themselves.
    core = {name: lacks for name, lacks in lacking.items() if not name.startswith("ops.triton")}
    assert core == NEEDS


@pytest.mark.parametrize("name", ["torchvision", "PIL", "matplotlib", "scipy", "tqdm"])
def test_nothing_else_is_in_reach_of_that_interpreter(
    user: Path, tmp_path: Path, name: str
) -> None:
    said = run(user / "python", "-c", f"import {name}", cwd=tmp_path, fails=True)
    assert f"ModuleNotFoundError: No module named '{name}'" in said


@pytest.fixture(scope="module")
def left_by_the_example(user: Path, page: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder where the first example of the page on PyPI has run and saved what it made."""
    folder = tmp_path_factory.mktemp("example")
    (example, *_) = re.findall(r"^```python\n(.*?)^```", page, re.M | re.S)
    after = """
assert loss.isfinite() and scores.shape == (8, 6)
loss.backward()
torch.save(head.state_dict(), "bags.pt")
"""
    run(user / "python", "-W", "error", "-c", example + after, cwd=folder)
    return folder


def test_the_first_example_runs(left_by_the_example: Path) -> None:
    assert (left_by_the_example / "bags.pt").is_file()


def test_the_command_works(user: Path, left_by_the_example: Path) -> None:
    folder, command = left_by_the_example, user / "balanced-group-softmax"
    assert "convert-checkpoint" in run(command, "--help", cwd=folder)
    coco = {
        "images": [{"id": 1}],
        "annotations": [
            {"id": id_, "image_id": 1, "category_id": 3, "bbox": [0, 0, 4, 4], "area": 16}
            for id_ in range(1, 13)
        ],
        "categories": [{"id": 3, "name": "cat"}, {"id": 7, "name": "dog"}],
    }
    (folder / "coco.json").write_text(json.dumps(coco))
    said = run(command, "groups", "coco.json", "--out", "layout.json", cwd=folder)
    assert "never seen in training: 1 of 2 categories, all in group 0_10: dog" in said
    assert json.loads((folder / "layout.json").read_text())["category_ids"] == [3, 7]
    assert "5 categories, background first" in run(command, "inspect", "bags.pt", cwd=folder)


def test_a_plot_says_what_it_lacks(user: Path, left_by_the_example: Path) -> None:
    words = ["inspect", "bags.pt", "--plot", "norms.png"]
    said = run(user / "balanced-group-softmax", *words, cwd=left_by_the_example, fails=True)
    assert "pip install matplotlib" in said


# --- types ---------------------------------------------------------------------------------------

PROGRAMS = Path(__file__).parent / "typed"

# As strict as mypy is. torch has no types for `Tensor.backward`, and torchvision none at all.
MYPY = """
[mypy]
strict = true
warn_unreachable = true
untyped_calls_exclude = torch
[mypy-torchvision.*]
ignore_missing_imports = true
"""


@pytest.fixture(scope="module")
def errors(user: Path, tmp_path_factory: pytest.TempPathFactory) -> set[tuple[str, int, str]]:
    """File, line and kind of each error that mypy finds with the installed wheel."""
    folder = tmp_path_factory.mktemp("typed")
    (folder / "mypy.ini").write_text(MYPY)
    programs = [shutil.copy(path, folder) for path in sorted(PROGRAMS.glob("*.py"))]
    options = ["--python-executable", user / "python", "--cache-dir", folder / "cache"]
    mypy = [sys.executable, "-m", "mypy", "--config-file", "mypy.ini", "--no-pretty"]
    said = run(*mypy, *options, *programs, cwd=folder, fails=True)
    found = re.findall(r"^(?:.*[\\/])?(\w+\.py):(\d+): error: .*\[([\w-]+)\]$", said, re.M)
    assert len(found) == said.count(": error: ") > 0, said
    return {(file, int(line), kind) for file, line, kind in found}


def test_a_user_needs_no_cast(errors: set[tuple[str, int, str]]) -> None:
    text = (PROGRAMS / "uses.py").read_text(encoding="utf-8")
    assert "# type:" not in text
    names = {node.id for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Name)}
    assert not {"cast", "Any"} & names
    assert {error for error in errors if error[0] == "uses.py"} == set()


def test_a_users_mistakes_are_found(errors: set[tuple[str, int, str]]) -> None:
    lines = (PROGRAMS / "mistakes.py").read_text(encoding="utf-8").splitlines()
    marked = {
        ("mistakes.py", number, line.partition("# E: ")[2])
        for number, line in enumerate(lines, 1)
        if "# E: " in line
    }
    assert len(marked) > 20
    assert {error for error in errors if error[0] == "mistakes.py"} == marked
