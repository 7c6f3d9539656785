"""The code in the README runs as it stands."""

import json
import re
from pathlib import Path

import pytest
import torch

from balanced_group_softmax import GroupLayout

README = Path(__file__).parents[1] / "README.md"
BLOCKS = re.findall(r"^```python\n(.*?)^```", README.read_text(encoding="utf-8"), re.M | re.S)


def test_the_example_is_eight_lines_and_starts_in_the_first_ten() -> None:
    code = [line for line in BLOCKS[0].splitlines() if line.strip()]
    assert len(code) == 8 - 1  # and a blank line
    before = README.read_text(encoding="utf-8").split("```python")[0]
    assert before.count("\n") < 10


def test_blocks_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    detection = pytest.importorskip("torchvision.models.detection")
    counts = [3, 2500, 40, 7, 600]
    rows = [{"id": index, "instance_count": count} for index, count in enumerate(counts)]
    (tmp_path / "annotations.json").write_text(json.dumps({"categories": rows}))
    model = detection.fasterrcnn_resnet50_fpn(weights=None, weights_backbone=None, num_classes=6)
    torch.save(model.state_dict(), tmp_path / "softmax.pth")
    layout = GroupLayout.from_counts(counts, category_ids=range(5))
    adapter = pytest.importorskip("balanced_group_softmax.adapters.torchvision")
    bags = adapter.convert_to_bags(model, layout)
    torch.save(bags.state_dict(), tmp_path / "bags.pth")
    monkeypatch.chdir(tmp_path)
    assert len(BLOCKS) == 4
    first, detector, classification, checkpoint = ({} for _ in BLOCKS)  # each runs alone
    for block, names in zip(BLOCKS, (first, detector, classification, checkpoint), strict=True):
        exec(compile(block, str(README), "exec"), names)
    assert first["scores"].shape == (8, 6)
    assert sum(p.numel() for p in detector["parameters"]) == 1024 * 11 + 11
    assert detector["layout"] == checkpoint["layout"] == layout
    assert classification["head"].layout.background is None
    loaded = checkpoint["model"].roi_heads.box_predictor.cls_score
    assert torch.equal(loaded.fc.weight, bags.roi_heads.box_predictor.cls_score.fc.weight)


def test_the_two_commands_are_there() -> None:
    commands = re.findall(r"^```bash\n(.*?)^```", README.read_text(encoding="utf-8"), re.M | re.S)
    assert commands[0].rstrip().endswith("python examples/torchvision_lvis_train.py")
    assert commands[1].rstrip().endswith("python -m pytest")
