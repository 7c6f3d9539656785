"""Evaluation by the official LVIS code: perfect and empty detections, cases solved by hand."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("lvis")
EXAMPLES = Path(__file__).parents[2] / "examples"
sys.path.insert(0, str(EXAMPLES))

import lvis_evaluation as evaluation  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


def truth(boxes: list[tuple[int, int, tuple[float, ...]]], **image_entries: Any) -> dict[str, Any]:
    """Two images and two categories; `boxes` are (image, category, box)."""
    return {
        "images": [
            {"id": i, "width": 200, "height": 200, "file_name": f"{i}.jpg", **image_entries}
            for i in (1, 2)
        ],
        "categories": [{"id": 5, "name": "a", "frequency": "r"}, {"id": 9, "name": "b"}],
        "annotations": [
            {"id": n, "image_id": image, "category_id": category, "bbox": list(box)}
            for n, (image, category, box) in enumerate(boxes, start=1)
        ],
    }


def found(image: int, category: int, box: tuple[float, ...], score: float) -> dict[str, Any]:
    return {"image_id": image, "category_id": category, "bbox": list(box), "score": score}


BOX, FAR = (10.0, 10.0, 40.0, 40.0), (120.0, 120.0, 40.0, 40.0)


def perfect(annotations: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [found(a["image_id"], a["category_id"], a["bbox"], 1.0) for a in annotations]


def test_perfect_detections_of_real_annotations_have_ap_1_for_every_category(lvis_data):
    path = lvis_data / "lvis_val_100.json"
    data = json.loads(path.read_text())
    present = sorted({row["category_id"] for row in data["annotations"]})
    groups = {str(i): [i] for i in present}
    metrics = evaluation.evaluate_boxes(path, perfect(data["annotations"]), groups=groups)
    assert len(present) == 190
    for key in ("AP", "AP50", "AP75", "APr", "APc", "APf", "AR", *(f"AP_{i}" for i in present)):
        assert metrics[key] == pytest.approx(100, abs=1e-9), key


def test_no_detections_are_worth_nothing():
    metrics = evaluation.evaluate_boxes(truth([(1, 5, BOX)]), [], groups={"g": [5], "h": [9]})
    assert metrics["AP"] == metrics["APr"] == metrics["AR"] == metrics["AP_g"] == 0
    assert metrics["APf"] is metrics["AP_h"] is None


def test_no_annotations_leave_nothing_to_measure():
    metrics = evaluation.evaluate_boxes(truth([]), [found(1, 5, BOX, 0.5)], groups={"g": [5]})
    assert set(metrics.values()) == {None}
    assert {"AP", "APr", "AR", "AP_g"} <= metrics.keys()


# With one annotation, AP at an IoU threshold is the precision at the first match.
@pytest.mark.parametrize(
    ("detections", "ap"),
    [
        ([found(1, 5, BOX, 0.9)], 100),
        ([found(1, 5, BOX, 0.9), found(1, 5, FAR, 0.8)], 100),
        ([found(1, 5, BOX, 0.8), found(1, 5, FAR, 0.9)], 50),
        ([found(1, 5, BOX, 0.8), found(2, 5, BOX, 0.9)], 50),
        ([found(1, 9, BOX, 0.9)], 0),
        # IoU 36 / 40 = 0.9: 9 of the 10 thresholds 0.50, 0.55, ..., 0.95.
        ([found(1, 5, (10, 10, 40, 36), 0.9)], 90),
        # IoU 0.6: 0.50, 0.55 and 0.60.
        ([found(1, 5, (10, 10, 40, 24), 0.9)], 30),
    ],
    ids=["right", "false later", "false first", "false elsewhere", "category", "0.9", "0.6"],
)
def test_one_annotation_by_hand(detections, ap):
    metrics = evaluation.evaluate_boxes(truth([(1, 5, BOX)]), detections)
    assert metrics["AP"] == pytest.approx(ap, abs=1e-6)
    assert metrics["APr"] == metrics["AP"]


def test_half_of_the_recall_is_half_of_the_ap():
    # Recalls 0, 0.01, ..., 0.50 are reached: 51 of 101 points.
    metrics = evaluation.evaluate_boxes(truth([(1, 5, BOX), (2, 5, BOX)]), [found(1, 5, BOX, 0.9)])
    assert metrics["AP"] == pytest.approx(100 * 51 / 101)
    assert metrics["AR"] == pytest.approx(50)


def test_groups_and_frequencies_average_their_categories():
    data = truth([(1, 5, BOX), (1, 9, FAR)])
    metrics = evaluation.evaluate_boxes(
        data,
        [found(1, 5, BOX, 0.9)],
        groups={"few": [5], "many": [9], "both": [9, 5], "none": [77]},
        frequencies={5: "r", 9: "f"},
    )
    wanted = {"few": 100, "many": 0, "both": 50, "none": None}
    assert {name: metrics[f"AP_{name}"] for name in wanted} == pytest.approx(wanted)
    assert [metrics[k] for k in ("APr", "APc", "APf")] == pytest.approx([100, None, 0])


def test_detections_of_unverified_categories_do_not_count():
    missed = [found(1, 5, BOX, 0.8), found(2, 5, BOX, 0.9)]
    verified = truth([(1, 5, BOX)], neg_category_ids=[5])
    unknown = truth([(1, 5, BOX)], neg_category_ids=[])
    assert evaluation.evaluate_boxes(verified, missed)["AP"] == pytest.approx(50)
    assert evaluation.evaluate_boxes(unknown, missed)["AP"] == pytest.approx(100)


def test_crowds_are_ignored():
    data = truth([(1, 5, BOX), (1, 5, FAR)])
    data["annotations"][1]["iscrowd"] = 1
    both = [found(1, 5, FAR, 0.9), found(1, 5, BOX, 0.8)]
    assert evaluation.evaluate_boxes(data, both)["AP"] == pytest.approx(100)


def test_leaving_out_absent_categories_changes_nothing(lvis_data):
    # The whole official run, over all 1230 categories.
    path = lvis_data / "lvis_val_100.json"
    data = json.loads(path.read_text())
    rows = perfect(data["annotations"][::2])
    for i, row in enumerate(rows):
        row["score"] = (i * 7919 % 100) / 100
        row["bbox"] = [row["bbox"][0] + i % 9, *row["bbox"][1:]]
    ours = evaluation.evaluate_boxes(path, rows)
    run, truths, results = evaluation.official_classes()
    official_truth = truths(str(path))
    official = run(official_truth, results(official_truth, rows), iou_type="bbox")
    official.run()
    for key, value in official.results.items():
        assert ours[key.partition("@")[0]] == pytest.approx(100 * value), key


def test_frequencies_come_from_the_file_else_from_counting_images():
    boxes = [(1, 9, BOX), (1, 9, FAR), (2, 9, BOX)]
    data = truth(boxes)
    assert evaluation.read_frequencies(data) == {5: "r", 9: "r"}
    data["images"] += [{"id": i, "width": 9, "height": 9} for i in range(3, 12)]
    data["annotations"] += [
        {"id": i + 90, "image_id": i, "category_id": 9, "bbox": [0, 0, 5, 5]} for i in range(3, 12)
    ]
    data["categories"][0]["frequency"] = "f"
    assert evaluation.read_frequencies(data) == {5: "f", 9: "c"}


@pytest.mark.parametrize(
    ("count", "letter"), [(0, "r"), (10, "r"), (11, "c"), (100, "c"), (101, "f")]
)
def test_frequency(count, letter):
    assert evaluation.frequency(count) == letter


@pytest.mark.parametrize(("image", "category"), [(3, 5), (1, 6)], ids=["image", "category"])
def test_detections_of_unknown_images_or_categories(image, category):
    with pytest.raises(ValueError, match=f"image {image}, category {category}"):
        evaluation.evaluate_boxes(truth([(1, 5, BOX)]), [found(image, category, BOX, 1.0)])


NAN = float("nan")


@pytest.mark.parametrize(
    ("section", "changes", "message"),
    [
        ("annotations", {"bbox": None}, "`bbox` of annotation 1 .* got None"),
        ("annotations", {"bbox": [1, 2, 3]}, r"`bbox` of annotation 1 .* got \[1, 2, 3\]"),
        ("annotations", {"bbox": [1, 2, NAN, 3]}, "`bbox` of annotation 1 .* nan"),
        ("annotations", {"bbox": [1, 2, "3", 3]}, "`bbox` of annotation 1 .* '3'"),
        ("annotations", {"area": "big"}, "`area` of annotation 1 .* got 'big'"),
        ("images", {"neg_category_ids": 5}, "`neg_category_ids` of image 1 .* got 5"),
        ("images", {"neg_category_ids": [6]}, r"`neg_category_ids` of image 1 .* got \[6\]"),
        ("images", {"not_exhaustive_category_ids": "5"}, "`not_exhaustive_.*` of image 1"),
    ],
    ids=str,
)
def test_annotations_that_are_not_valid(tmp_path, section, changes, message):
    data = truth([(1, 5, BOX)])
    data[section][0].update(changes)
    path = tmp_path / "bad.json"
    path.write_text(json.dumps(data))
    with pytest.raises(ValueError, match=rf"bad\.json: Expected {message}"):
        evaluation.evaluate_boxes(path, [])


def test_a_box_that_is_missing_is_told():
    data = truth([(1, 5, BOX)])
    del data["annotations"][0]["bbox"]
    with pytest.raises(ValueError, match=r"`bbox` of annotation 1 .* got None"):
        evaluation.evaluate_boxes(data, [])


def test_null_is_as_good_as_absent():
    data = truth([(1, 5, BOX)], neg_category_ids=None, not_exhaustive_category_ids=None)
    data["annotations"][0]["area"] = None
    missed = [found(1, 5, BOX, 0.8), found(2, 5, BOX, 0.9)]
    assert evaluation.evaluate_boxes(data, missed)["AP"] == pytest.approx(50)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"bbox": [1, 2, NAN, 3]}, "`bbox` of detection 1 .* nan"),
        ({"bbox": [1, 2, 3]}, "`bbox` of detection 1"),
        ({"score": NAN}, "`score` of detection 1 to be finite, got nan"),
        ({"score": None}, "`score` of detection 1 to be finite, got None"),
        ({"image_id": None}, "`image_id` of detection 1 to be an integer .* got None"),
    ],
    ids=str,
)
def test_detections_that_are_not_valid(changes, message):
    rows = [found(1, 5, BOX, np.float32(1)), {**found(1, 5, BOX, 1.0), **changes}]
    with pytest.raises(ValueError, match=message):
        evaluation.evaluate_boxes(truth([(1, 5, BOX)]), rows)


def test_inputs_stay_as_they_are():
    data = truth([(1, 5, BOX)])
    rows = [found(1, 5, BOX, 0.5)]
    before = json.dumps([data, rows])
    evaluation.evaluate_boxes(data, rows)
    assert json.dumps([data, rows]) == before


def test_a_detectors_output_in_the_format_of_results():
    output = {
        "boxes": torch.tensor([[1.0, 2.0, 4.0, 8.0]]),
        "scores": torch.tensor([0.5]),
        "labels": torch.tensor([2]),
    }
    assert evaluation.as_results(7, output, [5, 9]) == [found(7, 9, (1.0, 2.0, 3.0, 6.0), 0.5)]
    assert output["boxes"].tolist() == [[1.0, 2.0, 4.0, 8.0]]
    assert evaluation.as_results(7, {k: v[:0] for k, v in output.items()}, [5, 9]) == []


def test_neither_numpy_nor_lvis_is_touched_and_opencv_is_not_needed():
    program = """
import sys
sys.modules["cv2"] = None  # importing it fails
import numpy
before = dict(vars(numpy))
from lvis_evaluation import evaluate_boxes
box = {"id": 1, "image_id": 1, "category_id": 1, "bbox": [0, 0, 9, 9]}
data = {"images": [{"id": 1, "width": 9, "height": 9}], "categories": [{"id": 1, "name": "a"}],
        "annotations": [box]}
print(evaluate_boxes(data, [{**box, "score": 1.0}])["AP"])
assert not [name for name in sys.modules if name.partition(".")[0] == "lvis"]
assert {name: value for name, value in vars(numpy).items() if name in before} == before
assert not hasattr(numpy, "float")
"""
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=EXAMPLES, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) == pytest.approx(100)
