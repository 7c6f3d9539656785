"""The program that evaluates a results file: its table, its files, its errors, its memory."""

import json
import os
import pickle
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("lvis")
pytest.importorskip("faster_coco_eval")
sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))

import evaluation_report
import fast_lvis
import official_lvis
import torchvision_lvis_eval as program
from detection_results import from_records
from evaluation_cases import detections_around
from ground_truth import read_ground_truth
from lvis_evaluation import FIXED, METRICS, RECALLS, evaluate

EXAMPLES = Path(__file__).parents[2] / "examples"

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


@pytest.fixture(scope="module")
def small(lvis_data) -> dict[str, Any]:
    """Real annotations of ten images."""
    data = json.loads((lvis_data / "lvis_val_100.json").read_text())
    images = data["images"][:10]
    ids = {row["id"] for row in images}
    rows = [row for row in data["annotations"] if row["image_id"] in ids]
    return {"images": images, "annotations": rows, "categories": data["categories"]}


@pytest.fixture
def files(tmp_path, small) -> list[str]:
    """Arguments with results of ten images, boxes and masks."""
    (tmp_path / "val.json").write_text(json.dumps(small))
    records = detections_around(small, each=9, masks=True)
    (tmp_path / "results.json").write_text(json.dumps(records))
    return [str(tmp_path / "results.json"), "--annotations", str(tmp_path / "val.json")]


def train_file(folder: Path, lvis_data: Path) -> Path:
    """A file of categories with their counts in training."""
    rows = json.loads((lvis_data / "lvis_v0.5_train_categories.json").read_text())
    path = folder / "train.json"
    path.write_text(json.dumps({"images": [], "annotations": [], "categories": rows}))
    return path


def fails(arguments: list[str], capsys) -> str:
    """Run, check that the error takes one line and status 2, and return it."""
    assert program.main([*arguments, "--no-progress"]) == 2
    captured = capsys.readouterr()
    assert captured.err.count("\n") == 1
    assert "|" not in captured.out
    return captured.err.strip()


ORIGINAL_TABLE = """\
| Type | IoU | Area | MaxDets | CatIds | Result |
| :---: | :---: | :---: | :---: | :---: | :---: |
|  (AP)  | 0.50:0.95 |    all | 300 |          all | 1.00% |
|  (AP)  | 0.50      |    all | 300 |          all | 2.00% |
|  (AP)  | 0.75      |    all | 300 |          all | 3.00% |
|  (AP)  | 0.50:0.95 |      s | 300 |          all | 4.00% |
|  (AP)  | 0.50:0.95 |      m | 300 |          all | 5.00% |
|  (AP)  | 0.50:0.95 |      l | 300 |          all | 6.00% |
|  (AP)  | 0.50:0.95 |    all | 300 |            r | 7.00% |
|  (AP)  | 0.50:0.95 |    all | 300 |            c | 8.00% |
|  (AP)  | 0.50:0.95 |    all | 300 |            f | 9.00% |
|  (AR)  | 0.50:0.95 |    all | 300 |          all | 10.00% |
|  (AR)  | 0.50:0.95 |      s | 300 |          all | 11.00% |
|  (AR)  | 0.50:0.95 |      m | 300 |          all | 12.00% |
|  (AR)  | 0.50:0.95 |      l | 300 |          all | - |"""


def test_the_table_is_that_of_the_original_and_more():
    metrics: dict[str, float | None] = {
        name: float(i) for i, name in enumerate((*METRICS, *RECALLS), start=1)
    }
    metrics["ARl"] = None
    assert evaluation_report.make_table(metrics, "bbox") == f"bbox:\n\n{ORIGINAL_TABLE}"
    metrics |= {"AP_0_10": 20.0, **{name: 30.0 for name in FIXED}}
    more = evaluation_report.make_table(metrics, "bbox", ["0_10"]).splitlines()
    assert more[: len(ORIGINAL_TABLE.splitlines()) + 2] == f"bbox:\n\n{ORIGINAL_TABLE}".splitlines()
    assert more[-6] == "|  (AP)  | 0.50:0.95 |    all | 300 |         0_10 | 20.00% |"
    fixed = "| 0.50:0.95 |    all | 10000 a category |          all | 30.00% |"
    assert more[-5] == f"| (AP fixed) {fixed}"
    assert more[-1] == f"| (AP pooled) {fixed}"


def test_boxes_and_masks_by_both_methods(files, tmp_path, lvis_data, capsys):
    out = tmp_path / "metrics.json"
    train = train_file(tmp_path, lvis_data)
    options = ["--train-annotations", str(train), "--eval", "bbox", "segm", "--metrics", str(out)]
    assert program.main([*files, *options, "--method", "both", "--no-progress"]) == 0
    printed = capsys.readouterr().out
    assert printed.count("Both methods agree: the largest difference is ") == 2
    metrics = json.loads(out.read_text())
    assert metrics["method"] == "fast"
    groups = ["0_10", "10_100", "100_1000", "1000_inf"]
    for kind in ("bbox", "segm"):
        names = [*METRICS, *RECALLS, *(f"AP_{name}" for name in groups), *FIXED]
        assert list(metrics[kind]) == names
        assert f"| {metrics[kind]['AP']:.2f}% |" in printed
        assert f"| {metrics[kind]['APpooled']:.2f}% |" in printed
    # Frequencies and counts are those of the training set: its file says so, not the other.
    truth = read_ground_truth(
        json.loads(Path(files[2]).read_text()),
        frequencies=evaluation_report.read_training(str(train)).frequencies,
    )
    expected = evaluate(truth, from_records(json.loads(Path(files[0]).read_text())))
    assert metrics["bbox"]["APf"] == pytest.approx(expected["APf"])


def test_a_pickle_of_the_original_gives_what_its_json_gives(files, tmp_path, small):
    categories = [row["id"] for row in small["categories"]]
    records = json.loads(Path(files[0]).read_text())
    items = []
    for image in small["images"]:
        found: list[list[list[float]]] = [[] for _ in categories]
        for row in records:
            if row["image_id"] == image["id"]:
                x, y, w, h = row["bbox"]
                corners = [x, y, x + w - 1, y + h - 1, row["score"]]
                found[categories.index(row["category_id"])].append(corners)
        items.append([np.array(rows, np.float64).reshape(-1, 5) for rows in found])
    path = tmp_path / "results.pkl"
    path.write_bytes(pickle.dumps(items, 2))
    outs = [tmp_path / "json.out", tmp_path / "pkl.out", tmp_path / "plain.out"]
    for results, out, more in (
        (files[0], outs[0], []),
        (str(path), outs[1], []),
        (str(path), outs[2], ["--no-legacy-widths"]),
    ):
        arguments = [results, *files[1:], "--metrics", str(out), "--no-progress", *more]
        assert program.main(arguments) == 0
    of_json, of_pickle, plain = (json.loads(out.read_text())["bbox"] for out in outs)
    # Of equal scores in a category of an image, the order of the file is kept.
    assert of_pickle == pytest.approx(of_json, abs=1e-9)
    assert plain["AP"] != pytest.approx(of_json["AP"], abs=1e-3)


def test_the_report_takes_detections_too(small, capsys):
    detections = from_records(detections_around(small, each=2))
    metrics = evaluation_report.report(detections, small, progress=False)
    assert metrics["bbox"]["AP"] > 0
    assert "|  (AP)  |" in capsys.readouterr().out


# --- what goes wrong -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("results", "message"),
    [
        ("missing.json", r"missing\.json: Expected a file of results, found nothing there"),
        (
            "results.txt",
            r"results\.txt: Expected a checkpoint \(\.pt, \.pth\) or",
        ),
        (".", r"Expected a checkpoint \(\.pt, \.pth\) or detections"),
    ],
)
def test_results_that_are_not_there(files, tmp_path, capsys, results, message):
    line = fails([str(tmp_path / results), *files[1:]], capsys)
    assert line.startswith("error: ")
    assert re.search(message, line)


def test_bad_records_leave_nothing_behind(files, tmp_path, capsys):
    records = json.loads(Path(files[0]).read_text())
    records[3]["bbox"] = [1, 2]
    Path(files[0]).write_text(json.dumps(records))
    out = tmp_path / "metrics.json"
    line = fails([*files, "--metrics", str(out)], capsys)
    assert line.endswith(
        "results.json: Expected `bbox` of detection 3 to be 4 finite numbers, got [1, 2]"
    )
    assert not out.exists()


def test_an_evil_pickle(files, tmp_path, capsys):
    class Evil:
        def __reduce__(self) -> Any:
            return os.system, (f"touch {tmp_path / 'ran'}",)

    path = tmp_path / "results.pkl"
    path.write_bytes(pickle.dumps([[Evil()]]))
    line = fails([str(path), *files[1:]], capsys)
    assert "posix.system; nothing of it was run" in line
    assert not (tmp_path / "ran").exists()


def test_other_images(files, capsys):
    records = json.loads(Path(files[0]).read_text())
    records[2]["image_id"] = 1
    Path(files[0]).write_text(json.dumps(records))
    assert "of images and categories in the annotations, got image 1" in fails(files, capsys)


def test_other_categories_in_training(files, tmp_path, lvis_data, capsys):
    train = tmp_path / "train.json"
    content = {
        "images": [],
        "annotations": [],
        "categories": json.loads((lvis_data / "lvis_v1_train_categories.json").read_text()),
    }
    train.write_text(json.dumps(content))
    line = fails([*files, "--train-annotations", str(train)], capsys)
    assert "ids only in the latter: [], only in the former: [1204, " in line


@pytest.mark.parametrize("name", ["missing/metrics.json", "."])
def test_an_output_that_cannot_be(files, tmp_path, capsys, name):
    line = fails([*files, "--metrics", str(tmp_path / name)], capsys)
    assert "got a folder" in line or "expected a folder to write in, found none" in line


@pytest.mark.parametrize("place", [0, 2])
def test_no_input_is_replaced(files, capsys, place):
    before = Path(files[place]).read_bytes()
    assert "another file" in fails([*files, "--metrics", files[place]], capsys)
    assert Path(files[place]).read_bytes() == before


def test_annotations_that_are_not_there(files, tmp_path, capsys):
    line = fails([files[0], "--annotations", str(tmp_path / "none.json")], capsys)
    assert "none.json: Expected an annotation file, found nothing there" in line
    more = [*files, "--train-annotations", str(tmp_path / "none.json")]
    assert "none.json: Expected an annotation file" in fails(more, capsys)


def test_without_the_fast_package_the_official_code_is_used(files, tmp_path, monkeypatch):
    monkeypatch.setattr(fast_lvis, "is_installed", lambda: False)
    out = tmp_path / "metrics.json"
    with pytest.warns(UserWarning, match="faster-coco-eval is not installed"):
        assert program.main([*files, "--metrics", str(out), "--no-progress"]) == 0
    assert json.loads(out.read_text())["method"] == "official"


def test_without_any_package(files, monkeypatch, capsys):
    official_lvis.official_classes.cache_clear()
    monkeypatch.setattr(official_lvis.importlib.util, "find_spec", lambda name: None)
    line = fails([*files, "--method", "official"], capsys)
    assert line == "error: Evaluation needs the package lvis: pip install lvis pycocotools"
    assert "faster-coco-eval" in fails([*files, "--method", "both"], capsys)


def test_methods_that_disagree_have_a_status_of_their_own(files, monkeypatch, capsys):
    true = evaluation_report.evaluate

    def shifted(*args: Any, method: str, **options: Any) -> Any:
        metrics = true(*args, method=method, **options)
        return metrics if method == "fast" else {**metrics, "APm": (metrics["APm"] or 0) + 1e-3}

    monkeypatch.setattr(evaluation_report, "evaluate", shifted)
    assert program.main([*files, "--method", "both", "--no-progress"]) == 1
    assert "Expected both methods to agree to 1e-06" in capsys.readouterr().err


def test_help_says_what_is_out_of_scope(capsys):
    with pytest.raises(SystemExit) as stopped:
        program.main(["--help"])
    assert stopped.value.code == 0
    assert "Soft-NMS and test-time augmentation are out of scope" in capsys.readouterr().out


# --- memory --------------------------------------------------------------------------------------

STREAM = """
import json, resource, sys
from pathlib import Path
import numpy as np
import results_json
from detection_results import ImageDetections
from results_files import open_writer, read_results

results_json.CHUNK = 2000

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024

path, images = Path(sys.argv[1]), int(sys.argv[2])
ids = list(range(images))
generator = np.random.default_rng(0)
before = peak()
with open_writer(path, ids, list(range(50))) as writer:
    for image_id in ids:
        writer.append(ImageDetections(
            image_id,
            generator.integers(0, 50, 300),
            generator.uniform(1, 100, (300, 4)),
            generator.random(300),
        ))
written = peak()
detections = read_results(path, ids, list(range(50)))
assert len(detections) == 300 * images
print(json.dumps([written - before, peak() - written]))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="measures as Linux counts")
@pytest.mark.parametrize("suffix", [".json", ".pkl"])
def test_memory_of_writing_is_bounded_and_of_reading_that_of_the_columns(tmp_path, suffix):
    path, images = tmp_path / f"r{suffix}", 200
    done = subprocess.run(
        [sys.executable, "-c", STREAM, str(path), str(images)],
        cwd=EXAMPLES,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    writing, reading = json.loads(done.stdout)  # what the peak gains, megabytes
    assert path.stat().st_size > 2_000_000
    assert writing < 5
    # 56 bytes a detection, twice while they are joined, and a few thousand records at a time; all
    # records at once would take more than 60.
    assert reading < 2 * 300 * images * 56 / 2**20 + 15
