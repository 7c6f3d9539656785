"""The fast method gives what the official code gives, in portions of any size."""

import copy
import gc
import json
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("lvis")
pytest.importorskip("faster_coco_eval")
sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))

import fast_lvis
import lvis_evaluation as evaluation
from detection_results import from_records
from detection_selection import best_of_images
from evaluation_cases import detections_around, rectangle
from ground_truth import read_ground_truth

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")

FIGURES = [*evaluation.METRICS, *evaluation.RECALLS]


def official_figures(
    folder: Path, data: dict[str, Any], records: list[dict[str, Any]], kind: str
) -> dict[str, float]:
    """The figures of the official code on files, with nothing of ours in between."""
    run, truths, results = evaluation.official_classes()
    data = copy.deepcopy(data)
    for row in data["annotations"]:
        row["ignore"] = row.get("iscrowd", 0)  # it does not know crowds
    (folder / "annotations.json").write_text(json.dumps(data))
    truth = truths(str(folder / "annotations.json"))
    official = run(truth, results(truth, copy.deepcopy(records)), iou_type=kind)
    official.run()
    return {key.partition("@")[0]: 100 * value for key, value in official.results.items()}


@pytest.fixture(scope="module")
def real(lvis_data) -> dict[str, Any]:
    """Real annotations of a hundred images, some of them crowds."""
    data = json.loads((lvis_data / "lvis_val_100.json").read_text())
    for row in data["annotations"][::17]:
        row["iscrowd"] = 1
    return data


@pytest.fixture(scope="module")
def records(real) -> list[dict[str, Any]]:
    return detections_around(real, each=60, masks=True)


def test_the_cases_are_hard(real, records):
    images = [row["image_id"] for row in records]
    counts = [images.count(row["id"]) for row in real["images"]]
    assert max(counts) > 700
    assert sum(count > 300 for count in counts) >= 10
    assert min(counts) == 0
    found = {row["category_id"] for row in records}
    assert len({row["category_id"] for row in real["annotations"]} - found) > 20
    # Ties at the cut: the last score that is taken is also that of one which is not.
    crowded = [row["id"] for row, count in zip(real["images"], counts, strict=True) if count > 300]
    scores = [sorted(-r["score"] for r in records if r["image_id"] == i) for i in crowded]
    assert sum(some[299] == some[300] for some in scores) >= 5
    assert any(row["bbox"][2] == 0 for row in records)


@pytest.mark.parametrize("kind", ["bbox", "segm"])
def test_all_figures_equal_those_of_the_official_code(tmp_path, real, records, kind):
    expected = official_figures(tmp_path, real, records, kind)
    truth = read_ground_truth(real, masks=True)
    detections = from_records(records)
    groups = {"some": [row["id"] for row in real["categories"]][:500]}
    for method in evaluation.METHODS:
        found = evaluation.evaluate(
            truth, detections, kind, groups=groups, method=method, fixed=False
        )
        for key in FIGURES:
            assert found[key] == pytest.approx(expected[key], abs=1e-6), (method, key)
        assert 1 < found["AP_some"] < 99


@pytest.mark.parametrize(("chunk", "pairs"), [(1, 1), (500, 10**9), (10**9, 700)])
def test_portions_change_nothing(monkeypatch, real, records, chunk, pairs):
    truth = read_ground_truth(real)
    detections = from_records(_boxes(records))
    whole = evaluation.evaluate(truth, detections, fixed=False)
    monkeypatch.setattr(fast_lvis, "CHUNK", chunk)
    monkeypatch.setattr(fast_lvis, "MAX_PAIRS", pairs)
    assert evaluation.evaluate(truth, detections, fixed=False) == pytest.approx(whole, abs=1e-12)


def _boxes(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{k: v for k, v in row.items() if k != "segmentation"} for row in records]


def test_coco_annotations_without_lists_of_absence(tmp_path, real, records):
    data = copy.deepcopy(real)
    for row in data["images"]:
        del row["neg_category_ids"], row["not_exhaustive_category_ids"]
    truth, detections = read_ground_truth(data), from_records(_boxes(records))
    official = evaluation.evaluate(truth, detections, method="official", fixed=False)
    assert evaluation.evaluate(truth, detections, fixed=False) == pytest.approx(official, abs=1e-6)
    federated = evaluation.evaluate(read_ground_truth(real), detections, fixed=False)
    assert official["AP"] < federated["AP"]


# --- cases by hand -------------------------------------------------------------------------------


def truth_of(boxes: list[tuple[int, int, list[float]]], **changes: Any) -> dict[str, Any]:
    return {
        "images": [{"id": i, "width": 200, "height": 200, **changes} for i in (1, 2)],
        "categories": [{"id": 5, "frequency": "r"}, {"id": 9, "frequency": "f"}],
        "annotations": [
            {
                "id": n,  # from 0 on, which the official code would take for no match
                "image_id": image,
                "category_id": category,
                "bbox": box,
                "segmentation": rectangle(box, 200, 200),
            }
            for n, (image, category, box) in enumerate(boxes)
        ],
    }


def found_at(image: int, category: int, box: list[float], score: float) -> dict[str, Any]:
    return {
        "image_id": image,
        "category_id": category,
        "bbox": box,
        "score": score,
        "segmentation": rectangle(box, 200, 200),
    }


BOX, FAR = [10.0, 10.0, 40.0, 40.0], [120.0, 120.0, 40.0, 40.0]
EVERY_WAY = pytest.mark.parametrize(
    ("method", "kind"), [(m, k) for m in evaluation.METHODS for k in ("bbox", "segm")]
)


def ap(data: dict[str, Any], records: list[dict[str, Any]], method: str, kind: str) -> Any:
    truth = read_ground_truth(data, masks=True)
    return evaluation.evaluate(truth, from_records(records), kind, method=method)


@EVERY_WAY
def test_annotation_number_zero_is_matched(method, kind):
    assert ap(truth_of([(1, 5, BOX)]), [found_at(1, 5, BOX, 0.9)], method, kind)[
        "AP"
    ] == pytest.approx(100)


@EVERY_WAY
def test_annotations_without_area_do_not_count(method, kind):
    data = truth_of([(1, 5, BOX), (1, 5, [1.0, 1.0, 0.0, 5.0])])
    metrics = ap(data, [found_at(1, 5, BOX, 0.9)], method, kind)
    assert [metrics[k] for k in ("AP", "APfixed", "APpooled")] == pytest.approx([100] * 3)


@EVERY_WAY
def test_a_crowd_is_matched_once(method, kind):
    data = truth_of([(1, 5, BOX), (1, 5, FAR)])
    data["annotations"][1]["iscrowd"] = 1
    crowd, right = found_at(1, 5, FAR, 0.9), found_at(1, 5, BOX, 0.7)
    assert ap(data, [crowd, right], method, kind)["AP"] == pytest.approx(100)
    again = found_at(1, 5, FAR, 0.8)
    assert ap(data, [crowd, again, right], method, kind)["AP"] == pytest.approx(50)


@EVERY_WAY
def test_a_part_of_a_crowd_is_not_ignored(method, kind):
    data = truth_of([(1, 5, BOX), (1, 5, [100.0, 100.0, 80.0, 80.0])])
    data["annotations"][1]["iscrowd"] = 1
    records = [found_at(1, 5, FAR, 0.9), found_at(1, 5, BOX, 0.7)]
    assert ap(data, records, method, kind)["AP"] == pytest.approx(50)


@EVERY_WAY
def test_what_is_not_annotated_exhaustively_is_not_wrong(method, kind):
    data = truth_of([(1, 5, BOX)], not_exhaustive_category_ids=[5], neg_category_ids=[])
    records = [found_at(1, 5, FAR, 0.9), found_at(1, 5, BOX, 0.7)]
    assert ap(data, records, method, kind)["AP"] == pytest.approx(100)


@EVERY_WAY
def test_no_detections_and_no_annotations(method, kind):
    nothing_found = ap(truth_of([(1, 5, BOX)]), [], method, kind)
    assert nothing_found["AP"] == nothing_found["APfixed"] == nothing_found["APpooled"] == 0
    assert nothing_found["APf"] is None
    nothing_there = ap(truth_of([]), [found_at(1, 5, BOX, 0.9)], method, kind)
    assert set(nothing_there.values()) == {None}
    assert nothing_there.keys() == nothing_found.keys()


@EVERY_WAY
def test_only_crowds_leave_nothing_to_measure(method, kind):
    data = truth_of([(1, 5, BOX)])
    data["annotations"][0]["iscrowd"] = 1
    assert set(ap(data, [found_at(1, 5, BOX, 0.9)], method, kind).values()) == {None}


def test_the_best_300_of_an_image_are_the_first_of_equal_scores():
    data = truth_of([(1, 5, BOX)])
    wrong = [found_at(1, 9, FAR, 0.5)] * 299
    right = found_at(1, 5, BOX, 0.5)
    last = [found_at(1, 9, FAR, 0.5)]
    for rows, expected in (([*wrong, right, *last], 100), ([*wrong, *last, right], 0)):
        for method in evaluation.METHODS:
            assert ap(data, rows, method, "bbox")["AP"] == pytest.approx(expected)
        assert ap(data, rows, "fast", "bbox")["APfixed"] == pytest.approx(100)


def test_the_best_come_first_within_a_category_and_an_image():
    records = [found_at(1 + i % 2, 5, BOX, score) for i, score in enumerate((0.1, 0.9, 0.5, 0.9))]
    truth, detections = read_ground_truth(truth_of([])), from_records(records)
    images, categories = truth.locate(detections, "bbox")
    selection = best_of_images(truth, detections, images, categories)
    assert selection.rows.tolist() == [2, 0, 1, 3]
    assert selection.counts(2).tolist() == [4, 0]


def test_masks_of_other_sizes_are_named():
    record = {**found_at(2, 5, BOX, 0.9), "segmentation": rectangle(BOX, 200, 201)}
    with pytest.raises(ValueError, match=r"mask of detection 1 .* \[200, 200\] of image 2, got"):
        ap(truth_of([(1, 5, BOX)]), [found_at(1, 5, BOX, 0.9), record], "fast", "segm")


def test_masks_that_are_missing_are_told():
    record = found_at(1, 5, BOX, 0.9)
    del record["segmentation"]
    with pytest.raises(ValueError, match="Expected detections with masks, got none"):
        ap(truth_of([(1, 5, BOX)]), [record], "fast", "segm")
    truth = read_ground_truth(truth_of([(1, 5, BOX)]))
    detections = from_records([found_at(1, 5, BOX, 0.9)])
    with pytest.raises(ValueError, match="Expected masks to have been read, got boxes only"):
        evaluation.evaluate(truth, detections, "segm")


@pytest.mark.parametrize(
    ("options", "message"), [({"kind": "boxes"}, "`kind`"), ({"method": "both"}, "`method`")]
)
def test_other_kinds_and_methods(options, message):
    truth = read_ground_truth(truth_of([]))
    with pytest.raises(ValueError, match=f"Expected {message}"):
        evaluation.evaluate(truth, from_records([]), **options)


def test_without_the_package_the_official_method_is_chosen(monkeypatch):
    assert evaluation.choose_method("fast") == "fast"
    monkeypatch.setattr(fast_lvis.importlib.util, "find_spec", lambda name: None)
    with pytest.warns(UserWarning, match="faster-coco-eval is not installed .* official code"):
        assert evaluation.choose_method("fast") == "official"
    truth = read_ground_truth(truth_of([(1, 5, BOX)]))
    with pytest.raises(ImportError, match="pip install faster-coco-eval"):
        evaluation.evaluate(truth, from_records([found_at(1, 5, BOX, 0.9)]), method="fast")


def test_collection_of_garbage_goes_on_afterwards():
    assert gc.isenabled()
    ap(truth_of([(1, 5, BOX)]), [found_at(1, 5, BOX, 0.9)], "fast", "bbox")
    assert gc.isenabled()
