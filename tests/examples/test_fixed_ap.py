"""AP fixed and pooled AP against a slow version of the definition, and the official code."""

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("lvis")
sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))

import detection_selection
import fixed_ap
import lvis_evaluation as evaluation
from detection_matching import box_iou
from detection_results import from_records
from evaluation_cases import detections_around
from ground_truth import read_ground_truth

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")

THRESHOLDS = [0.5 + 0.05 * i for i in range(10)]


# --- the definition, in words of its own -----------------------------------------------------


def slow_iou(a: list[float], b: list[float]) -> float:
    width = min(a[0] + a[2], b[0] + b[2]) - max(a[0], b[0])
    height = min(a[1] + a[3], b[1] + b[3]) - max(a[1], b[1])
    common = max(width, 0) * max(height, 0)
    return common / (a[2] * a[3] + b[2] * b[3] - common)


def slow_judgement(data: dict[str, Any], records: list[dict[str, Any]], threshold: float) -> Any:
    """Return (score, image, category, place, right) of all that counts."""
    judged = []
    for image in data["images"]:
        for category in [row["id"] for row in data["categories"]]:
            there = [
                row
                for row in data["annotations"]
                if (row["image_id"], row["category_id"]) == (image["id"], category)
            ]
            if not there and category not in image["neg_category_ids"]:
                continue
            found = [
                (row["score"], -place, row)
                for place, row in enumerate(records)
                if (row["image_id"], row["category_id"]) == (image["id"], category)
            ]
            free = list(there)
            for score, place, row in sorted(found, key=lambda item: item[:2], reverse=True):
                rights = [
                    (not other.get("iscrowd", 0), slow_iou(row["bbox"], other["bbox"]), n)
                    for n, other in enumerate(free)
                    if slow_iou(row["bbox"], other["bbox"]) >= threshold - 1e-12
                ]
                if rights:
                    is_object, _, n = max(rights)
                    free.pop(n)
                    if is_object:
                        judged.append((score, image["id"], category, -place, True))
                elif category not in image["not_exhaustive_category_ids"]:
                    judged.append((score, image["id"], category, -place, False))
    return judged


def slow_ap(judged: list[Any], to_find: int) -> float:
    """Return the mean over 101 recalls of the best precision at that recall or beyond."""
    ranked = sorted(judged, key=lambda item: (-item[0], *item[1:4]))
    points, right = [], 0
    for n, item in enumerate(ranked, start=1):
        right += item[-1]
        points.append((right / to_find, right / n))
    best = [
        max((p for recall, p in points if recall >= level / 100 - 1e-12), default=0)
        for level in range(101)
    ]
    return sum(best) / 101


def slow_fixed(data: dict[str, Any], records: list[dict[str, Any]], limit: int) -> Any:
    """Return AP fixed and pooled AP in percent."""
    kept: list[dict[str, Any]] = []
    for category in [row["id"] for row in data["categories"]]:
        own = [row for row in records if row["category_id"] == category]
        kept += sorted(own, key=lambda row: -row["score"])[:limit]
    places = {id(row): place for place, row in enumerate(records)}
    kept.sort(key=lambda row: places[id(row)])
    objects = [row for row in data["annotations"] if not row.get("iscrowd", 0)]
    by_category: list[float] = []
    pooled = []
    for threshold in THRESHOLDS:
        judged = slow_judgement(data, kept, threshold)
        for category in sorted({row["category_id"] for row in objects}):
            to_find = sum(row["category_id"] == category for row in objects)
            own = [item for item in judged if item[2] == category]
            by_category.append(slow_ap(own, to_find))
        pooled.append(slow_ap(judged, len(objects)) if objects else None)
    if not objects:
        return None, None
    return 100 * np.mean(by_category), 100 * np.mean(pooled)


CATEGORIES = (5, 9, 12)
COORDINATES = st.integers(0, 6).map(lambda n: 10.0 * n)
SIDES = st.integers(1, 5).map(lambda n: 10.0 * n)
BOXES = st.tuples(COORDINATES, COORDINATES, SIDES, SIDES).map(list)
IDS = st.lists(st.sampled_from(CATEGORIES), max_size=2, unique=True)


@st.composite
def cases(draw: st.DrawFn) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    images = [
        {"id": i, "neg_category_ids": draw(IDS), "not_exhaustive_category_ids": draw(IDS)}
        for i in (1, 2)
    ]
    place = st.tuples(st.sampled_from((1, 2)), st.sampled_from(CATEGORIES), BOXES)
    annotations = [
        {"id": n, "image_id": image, "category_id": category, "bbox": box, "iscrowd": crowd}
        for n, ((image, category, box), crowd) in enumerate(
            draw(st.lists(st.tuples(place, st.sampled_from((0, 0, 1))), max_size=8))
        )
    ]
    records = [
        {"image_id": image, "category_id": category, "bbox": box, "score": score}
        for (image, category, box), score in draw(
            st.lists(st.tuples(place, st.sampled_from((0.1, 0.3, 0.5, 0.9))), max_size=14)
        )
    ]
    categories = [{"id": i, "frequency": "r"} for i in CATEGORIES]
    return {"images": images, "annotations": annotations, "categories": categories}, records


@given(cases(), st.sampled_from([2, 10_000]), st.sampled_from([1, 200_000]))
@settings(max_examples=150)
def test_fixed_and_pooled_equal_the_definition(case, limit, chunk):
    data, records = case
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(detection_selection, "MAX_DETECTIONS_FIXED", limit)
        patch.setattr(fixed_ap, "CHUNK", chunk)
        found = evaluation.evaluate(
            read_ground_truth(data), from_records(records), method="official"
        )
    expected = slow_fixed(data, records, limit)
    assert (found["APfixed"], found["APpooled"]) == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize("kind", ["bbox", "segm"])
def test_fixed_is_the_official_ap_without_a_limit_for_images(lvis_data, kind):
    data = json.loads((lvis_data / "lvis_val_100.json").read_text())
    records = detections_around(data, each=30, masks=True)
    truth, detections = read_ground_truth(data, masks=True), from_records(records)
    found = evaluation.evaluate(truth, detections, kind, method="official")
    run, truths, results = evaluation.official_classes()
    official_truth = truths(str(lvis_data / "lvis_val_100.json"))
    official = run(official_truth, results(official_truth, records, max_dets=-1), iou_type=kind)
    official.run()
    names = {"APfixed": "AP", "APfixed_r": "APr", "APfixed_c": "APc", "APfixed_f": "APf"}
    for ours, theirs in names.items():
        assert found[ours] == pytest.approx(100 * official.results[theirs], abs=1e-6)
    assert found["APfixed"] > found["AP"]


def truth_of(*boxes: tuple[int, int, list[float]]) -> dict[str, Any]:
    return {
        "images": [{"id": i} for i in (1, 2)],
        "categories": [{"id": i, "frequency": "r"} for i in CATEGORIES],
        "annotations": [
            {"id": n, "image_id": image, "category_id": category, "bbox": box}
            for n, (image, category, box) in enumerate(boxes)
        ],
    }


BOX, FAR = [10.0, 10.0, 40.0, 40.0], [120.0, 120.0, 40.0, 40.0]


def found_at(image: int, category: int, box: list[float], score: float) -> dict[str, Any]:
    return {"image_id": image, "category_id": category, "bbox": box, "score": score}


def test_pooled_ap_compares_scores_across_categories():
    data = truth_of((1, 5, BOX), (1, 9, FAR))
    low = [found_at(1, 5, BOX, 0.9), found_at(1, 9, FAR, 0.2)]
    wrong = found_at(2, 5, FAR, 0.5)
    metrics = evaluation.evaluate(
        read_ground_truth(data), from_records([*low, wrong]), method="official"
    )
    # Within its category each object comes first. In one list: right, wrong, right.
    assert metrics["APfixed"] == pytest.approx(100)
    assert metrics["APpooled"] == pytest.approx(100 * (51 + 50 * 2 / 3) / 101)


def test_pooled_ap_counts_what_is_wrong_in_categories_without_annotations():
    data = truth_of((1, 5, BOX))
    records = [found_at(1, 12, FAR, 0.9), found_at(1, 5, BOX, 0.5)]
    metrics = evaluation.evaluate(read_ground_truth(data), from_records(records), method="official")
    assert metrics["APfixed"] == pytest.approx(100)
    assert metrics["APpooled"] == pytest.approx(50)


def test_pooled_ap_counts_annotations_not_categories():
    data = truth_of(*[(1, 5, [x, y, 8.0, 8.0]) for x in (0, 20, 40) for y in (0, 20, 40)])
    data["annotations"].append({"id": 99, "image_id": 1, "category_id": 9, "bbox": FAR})
    metrics = evaluation.evaluate(
        read_ground_truth(data), from_records([found_at(1, 9, FAR, 0.5)]), method="official"
    )
    assert metrics["APfixed"] == pytest.approx(50)
    assert metrics["APpooled"] == pytest.approx(100 * 11 / 101)


@pytest.mark.parametrize(("order", "ap50"), [((0, 1), 100), ((1, 0), 100 * 51 / 101)])
def test_of_equal_overlaps_the_later_annotation_is_taken(order, ap50):
    # The first detection overlaps both by 0.6; the second one only that at the left.
    left, right = (1, 5, [0.0, 0.0, 40.0, 10.0]), (1, 5, [20.0, 0.0, 40.0, 10.0])
    data = truth_of(*[(left, right)[i] for i in order])
    records = [found_at(1, 5, [10.0, 0.0, 40.0, 10.0], 0.9), found_at(1, 5, left[2], 0.8)]
    metrics = evaluation.evaluate(read_ground_truth(data), from_records(records), method="official")
    assert metrics["AP50"] == pytest.approx(ap50)
    assert metrics["APfixed"] == pytest.approx(metrics["AP"])


def test_an_annotation_to_ignore_is_taken_only_if_no_other_is_left():
    data = truth_of((1, 5, [0.0, 0.0, 40.0, 10.0]), (1, 5, [10.0, 0.0, 40.0, 10.0]))
    data["annotations"][0]["iscrowd"] = 1
    records = [found_at(1, 5, [0.0, 0.0, 40.0, 10.0], 0.9)]
    metrics = evaluation.evaluate(read_ground_truth(data), from_records(records), method="official")
    # Overlap 0.6 with the object: right at 3 of 10 thresholds, ignored at the others.
    assert [metrics[k] for k in ("AP", "APfixed", "APpooled")] == pytest.approx([30] * 3)


def test_of_equal_scores_in_the_pool_the_first_image_comes_first():
    data = truth_of((1, 9, BOX))
    records = [found_at(2, 5, FAR, 0.5), found_at(1, 9, BOX, 0.5)]
    metrics = evaluation.evaluate(read_ground_truth(data), from_records(records), method="official")
    assert metrics["APpooled"] == pytest.approx(100)


def test_the_limit_of_a_category_is_over_all_images(monkeypatch):
    monkeypatch.setattr(detection_selection, "MAX_DETECTIONS_FIXED", 2)
    data = truth_of((1, 5, BOX), (2, 5, BOX), (1, 9, FAR))
    records = [found_at(1, 5, FAR, 0.9), found_at(2, 5, BOX, 0.5), found_at(1, 5, BOX, 0.5)]
    metrics = evaluation.evaluate(
        read_ground_truth(data),
        from_records([*records, found_at(1, 9, FAR, 0.1)]),
        method="official",
    )
    # Wrong, right, and the last one, of an equal score, is cut off: recall 1/2 at precision 1/2.
    assert metrics["APfixed"] == pytest.approx((100 + 50 * 51 / 101) / 2)


@given(st.lists(st.tuples(BOXES, BOXES), min_size=1, max_size=5))
def test_overlaps_are_those_of_pycocotools(pairs):
    from pycocotools import mask as coco_mask

    boxes, others = (np.array(side) for side in zip(*pairs, strict=True))
    expected = [
        coco_mask.iou(one[None], other[None], [0])[0, 0]
        for one, other in zip(boxes, others, strict=True)
    ]
    np.testing.assert_array_equal(box_iou(boxes, others), expected)
