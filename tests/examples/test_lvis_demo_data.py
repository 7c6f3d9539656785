"""The drawn data set: LVIS's format, exact counts, every group, and the same files for a seed."""

import json
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("torchvision")
pytest.importorskip("pycocotools")
sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))

import lvis_demo_data as demo
from detection_data import LVISDetection
from lvis_evaluation import frequency

from balanced_group_softmax import GroupLayout, category_counts

FEW = [
    demo.Category("star", "red", 12),
    demo.Category("disc", "blue", 5),
    demo.Category("bar", "cyan", 1),
]


@pytest.fixture(scope="module")
def few(tmp_path_factory):
    folder = tmp_path_factory.mktemp("demo") / "data"
    demo.write_demo_data(folder, 3, categories=FEW, val_instances=4)
    return folder


def test_demo_has_every_group_and_enough_rare_categories():
    counts = [category.train_instances for category in demo.demo_categories()]
    layout = GroupLayout.from_counts(counts)
    assert layout.names == ("0_10", "10_100", "100_1000", "1000_inf")
    # An image has a category at most as often as there are instances of it.
    assert sum(count <= 10 for count in counts) >= 15
    assert demo.VAL_INSTANCES >= 10
    names = [category.name for category in demo.demo_categories()]
    assert len(set(names)) == len(names)


def test_rare_categories_share_looks_with_others():
    categories = demo.demo_categories()
    often = [c for c in categories if c.train_instances > 10]
    rare = [c for c in categories if c.train_instances <= 10]
    assert {c.colour for c in rare} <= {c.colour for c in often}
    assert {c.shape for c in rare} <= {c.shape for c in often}


@pytest.mark.parametrize("num", [2, 3, 50, 1203], ids="C={}".format)
def test_zipf_counts_fall_from_most_to_least(num):
    counts = demo.zipf_counts(num, most=1500, least=3)
    assert counts == sorted(counts, reverse=True)
    assert (counts[0], counts[-1], len(counts)) == (1500, 3, num)


def test_outlines_lie_in_the_unit_circle_and_turn_one_way():
    for name, outline in demo.outlines().items():
        assert (np.hypot(*outline.T) <= 1.1).all(), name
        assert np.ptp(outline, axis=0).min() > 0.5, name


@pytest.mark.parametrize(("split", "wanted"), [("train", [12, 5, 1]), ("val", [4, 4, 4])])
def test_counts_in_the_file_are_those_of_the_annotations(few, split, wanted):
    data = json.loads((few / f"{split}.json").read_text())
    instances = Counter(row["category_id"] for row in data["annotations"])
    images = {i: set() for i in (1, 2, 3)}
    for row in data["annotations"]:
        images[row["category_id"]].add(row["image_id"])
    assert [instances[i] for i in (1, 2, 3)] == wanted
    assert [row["instance_count"] for row in data["categories"]] == wanted
    assert [row["image_count"] for row in data["categories"]] == [len(images[i]) for i in (1, 2, 3)]
    assert category_counts(few / f"{split}.json") == wanted


def test_frequencies_of_both_splits_are_those_of_training(few):
    train, val = (json.loads((few / f"{name}.json").read_text()) for name in ("train", "val"))
    letters = [frequency(row["image_count"]) for row in train["categories"]]
    for data in (train, val):
        assert [row["frequency"] for row in data["categories"]] == letters


def test_what_is_absent_is_listed_as_absent(few):
    data = json.loads((few / "val.json").read_text())
    for image in data["images"]:
        present = {r["category_id"] for r in data["annotations"] if r["image_id"] == image["id"]}
        assert set(image["neg_category_ids"]) == {1, 2, 3} - present
        assert image["not_exhaustive_category_ids"] == []


def test_boxes_and_areas_are_those_of_the_polygons_inside_the_image(few):
    data = json.loads((few / "train.json").read_text())
    assert len({row["id"] for row in data["annotations"]}) == len(data["annotations"])
    for row in data["annotations"]:
        points = np.array(row["segmentation"][0]).reshape(-1, 2)
        x, y, width, height = row["bbox"]
        np.testing.assert_allclose(points.min(axis=0), [x, y], atol=0.02)
        np.testing.assert_allclose(points.max(axis=0), [x + width, y + height], atol=0.02)
        assert points.min() >= 0
        assert points.max() <= demo.IMAGE_SIZE
        assert 0 < row["area"] <= width * height


def test_objects_are_where_the_boxes_say_and_of_their_colour(few):
    dataset = LVISDetection(few / "train.json", few / "train", masks=True)
    assert dataset.dropped == {"crowd": 0, "degenerate": 0}
    for image, target in (dataset[i] for i in range(len(dataset))):
        assert image.shape == (3, demo.IMAGE_SIZE, demo.IMAGE_SIZE)
        for label, mask in zip(target["labels"].tolist(), target["masks"], strict=True):
            red, green, blue = image[:, mask > 0].mean(dim=1).tolist()
            brightest = {1: red, 2: blue, 3: min(green, blue)}[label]
            assert brightest >= max(red if label != 1 else blue, 0), (label, red, green, blue)


def test_same_seed_same_files_other_seed_other_files(few, tmp_path):
    for name, seed in (("same", 3), ("other", 4)):
        demo.write_demo_data(tmp_path / name, seed, categories=FEW, val_instances=4)
    files = sorted(p.relative_to(few) for p in few.rglob("*") if p.is_file())
    assert (
        sorted(
            p.relative_to(tmp_path / "same") for p in (tmp_path / "same").rglob("*") if p.is_file()
        )
        == files
    )
    for file in files:
        assert (few / file).read_bytes() == (tmp_path / "same" / file).read_bytes(), file
    picture = Path("train", "000001.jpg")
    assert (few / picture).read_bytes() != (tmp_path / "other" / picture).read_bytes()
    assert (few / picture).read_bytes() != (few / "val" / picture.name).read_bytes()


def test_an_existing_folder_is_left_alone(tmp_path):
    with pytest.raises(FileExistsError, match="does not exist yet"):
        demo.write_demo_data(tmp_path)


def test_nothing_is_left_of_a_run_that_fails(tmp_path, monkeypatch):
    def fail(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(demo, "_annotation", fail)
    with pytest.raises(KeyboardInterrupt):
        demo.write_demo_data(tmp_path / "data", categories=FEW)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("categories", "val"),
    [([], 4), ([demo.Category("star", "red", 0)], 4), (FEW, 0)],
    ids=["no categories", "count 0", "no validation"],
)
def test_bad_counts(tmp_path, categories, val):
    with pytest.raises(ValueError, match="positive counts"):
        demo.write_demo_data(tmp_path / "data", categories=categories, val_instances=val)
