"""What can be checked of the examples for mmdet without mmdet."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

MMDET = Path(__file__).parents[2] / "examples" / "mmdet"


def test_the_readme_names_every_config_and_only_those() -> None:
    text = (MMDET / "README.md").read_text(encoding="utf-8")
    stems = {path.stem for path in (MMDET / "configs").glob("[!_]*/*.py")}
    for stem in stems:
        base = (
            re.sub(r"_lvis-v.*", "", stem)
            .removeprefix("bags_faster-rcnn_r50_fpn_")
            .removeprefix("bags_")
        )
        assert f"{base}_lvis" in text or f"{stem}.py" in text, stem
    named = re.findall(r"`(?:baselines|bags|transferred)/([^`]*_lvis-v[\d.]+)`", text)
    named += [
        f"bags_faster-rcnn_r50_fpn_{name}"
        for name in re.findall(r"\| `([^`/]*_lvis-v0\.5)` \|$", text, re.M)
    ]
    assert len(named) > 30
    assert set(named) <= stems


@pytest.mark.parametrize("below", [2, 100])
def test_the_tail_keeps_labels_and_drops_the_rest(tmp_path: Path, below: int) -> None:
    rows = [(1, 1), (1, 2), (2, 2), (3, 2), (3, 3)]
    data = {
        "images": [{"id": i} for i in (1, 2, 3)],
        "annotations": [
            {"id": i, "image_id": image, "category_id": category}
            for i, (image, category) in enumerate(rows)
        ],
        "categories": [{"id": i} for i in (1, 2, 3)],
    }
    (tmp_path / "train.json").write_text(json.dumps(data))
    command = [sys.executable, str(MMDET / "tail_annotations.py"), "train.json", "tail.json"]
    command += ["--below", str(below)]
    result = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    tail = json.loads((tmp_path / "tail.json").read_text())
    assert tail["categories"] == data["categories"]
    if below == 2:
        assert [row["id"] for row in tail["annotations"]] == [0, 4]
        assert [image["id"] for image in tail["images"]] == [1, 3]
    else:
        assert tail == data


def test_the_tail_does_not_take_the_place_of_the_annotations(tmp_path: Path) -> None:
    path = tmp_path / "train.json"
    path.write_text('{"images": [], "annotations": [], "categories": [{"id": 1}]}')
    command = [sys.executable, str(MMDET / "tail_annotations.py"), "train.json", "./train.json"]
    result = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert result.returncode == 2
    assert result.stderr == "error: train.json: expected another file than the one that is read\n"
    assert len(path.read_text()) == 60
