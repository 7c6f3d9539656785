"""What becomes of the names and rows of the original's checkpoints, and what is refused."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from lvis_layouts import large_layout
from original_detector import Kind, random_state
from torch import Tensor

from balanced_group_softmax import GroupLayout
from balanced_group_softmax.cli import main
from balanced_group_softmax.legacy.checkpoints import (
    convert_checkpoint,
    convert_to_mmdet,
    convert_to_torchvision,
)
from balanced_group_softmax.legacy.files import write_original_files

LAYOUT = large_layout(7)
SOFTMAX = {
    "bbox_head.fc_cls.weight": torch.arange(8.0)[:, None].repeat(1, 3),
    "bbox_head.fc_cls.bias": torch.arange(8.0),
    "bbox_head.fc_reg.weight": torch.arange(32.0)[:, None].repeat(1, 3),
    "bbox_head.fc_reg.bias": torch.arange(32.0),
    "bbox_head.shared_fcs.0.weight": torch.zeros(3, 3),
    "mask_head.conv_logits.weight": torch.arange(8.0)[:, None, None, None],
    "mask_head.conv_logits.bias": torch.arange(8.0),
    "backbone.layer2.0.conv2_offset.weight": torch.zeros(18, 1),
    "neck.lateral_convs.0.conv.bias": torch.zeros(1),
    "rpn_head.rpn_cls.bias": torch.zeros(3),
}
BAGS = SOFTMAX | {
    "bbox_head.fc_cls.weight": torch.randn(LAYOUT.num_logits, 3),
    "bbox_head.fc_cls.bias": torch.randn(LAYOUT.num_logits),
}


def test_rows_of_background_move_or_go() -> None:
    converted = convert_to_mmdet({f"module.{name}": value for name, value in SOFTMAX.items()})
    assert converted["roi_head.bbox_head.fc_cls.bias"].tolist() == [1, 2, 3, 4, 5, 6, 7, 0]
    assert converted["roi_head.bbox_head.fc_cls.weight"][:, 1].tolist() == [*range(1, 8), 0]
    assert converted["roi_head.bbox_head.fc_reg.bias"].tolist() == list(range(4, 32))
    assert converted["roi_head.mask_head.conv_logits.bias"].tolist() == list(range(1, 8))
    assert {name for name in converted if not name.startswith("roi_head.")} == {
        "backbone.layer2.0.conv2.conv_offset.weight",
        "neck.lateral_convs.0.conv.bias",
        "rpn_head.rpn_cls.bias",
    }
    assert len(converted) == len(SOFTMAX)


def test_a_bags_classifier_stays_and_brings_its_layout() -> None:
    converted = convert_to_mmdet(BAGS, layout=LAYOUT)
    name = "roi_head.bbox_head.fc_cls.weight"
    assert torch.equal(converted[name], BAGS["bbox_head.fc_cls.weight"])
    assert GroupLayout.from_state_dict(converted) == replace(LAYOUT, background="last")
    assert convert_to_mmdet(SOFTMAX, layout=LAYOUT).keys() == convert_to_mmdet(SOFTMAX).keys()
    del (plain := dict(BAGS))["backbone.layer2.0.conv2_offset.weight"]
    assert GroupLayout.from_state_dict(convert_to_torchvision(plain, layout=LAYOUT)) == LAYOUT


def test_every_stage_of_a_cascade_is_converted() -> None:
    kind = Kind(8, LAYOUT.num_logits, stages=3, agnostic=True, mask=True, semantic=True, groups=2)
    state = random_state(kind)
    converted = convert_to_mmdet(state, layout=LAYOUT)
    states = [f"roi_head.bbox_head.{stage}.loss_cls._extra_state" for stage in range(3)]
    assert [name for name in converted if name.endswith("_extra_state")] == states
    assert converted["roi_head.bbox_head.2.fc_reg.weight"].shape == (4, 1024)
    assert converted["roi_head.mask_head.1.conv_logits.bias"].shape == (7,)
    assert converted["roi_head.semantic_head.conv_logits.bias"].shape == (183,)
    assert "roi_head.mask_head.0.conv_res.conv.weight" not in converted  # never used
    assert len(converted) == len(state) + 3 - 2


@pytest.mark.parametrize(
    ("state", "options", "message"),
    [
        ({}, {}, "with `bbox_head.fc_cls`, found none"),
        ({"bbox_head.fc_cls.weight": [1]}, {}, "tensors by name, got list"),
        ({"roi_head.bbox_head.fc_cls.weight": torch.zeros(2, 2)}, {}, "of mmdet 3"),
        ({"bbox_head.fc_cls.weight": torch.zeros(8, 2)}, {}, "Expected `num_categories`"),
        (BAGS, {}, "give the `layout` of a BAGS checkpoint"),
        (SOFTMAX | {"bbox_head.fc_cls.bias": torch.zeros(9)}, {}, "weight and bias"),
        (SOFTMAX | {"bbox_head.fc_cls.bias": torch.zeros(())}, {}, r"1 dimensions, .* shape \[\]"),
        (
            SOFTMAX | {"bbox_head.fc_cls.weight": torch.zeros(8)},
            {},
            r"2 dimensions, .* shape \[8\]",
        ),
        (SOFTMAX | {"bbox_head.fc_reg.weight": torch.zeros(32, 3, 1)}, {}, "2 dimensions"),
        (SOFTMAX | {"mask_head.conv_logits.weight": torch.zeros(8, 3)}, {}, "4 dimensions"),
        (SOFTMAX | {"bbox_head.fc_cls.bias": torch.arange(8)}, {}, "floating point, got .*int64"),
        (SOFTMAX | {"rpn_head.x": torch.eye(2).to_sparse()}, {}, "`rpn_head.x` of plain numbers"),
        (
            SOFTMAX | {"module.rpn_head.rpn_cls.bias": torch.zeros(3)},
            {},
            "with and without `module",
        ),
        (SOFTMAX | {"bbox_head.fc_reg.bias": torch.zeros(31)}, {}, "weight and bias"),
        (SOFTMAX | {"mask_head.conv_logits.bias": torch.zeros(5)}, {}, "weight and bias"),
        (SOFTMAX, {"num_categories": 8}, "one number of categories, got different ones"),
        (SOFTMAX, {"layout": large_layout(8)}, "one number of categories, got different ones"),
        (
            SOFTMAX | {"bbox_head.1.fc_cls.weight": torch.zeros(9, 4)},
            {},
            "as many rows in every stage",
        ),
        (SOFTMAX | {"bbox_head.1.fc_cls.bias": torch.zeros(8)}, {}, "1.fc_cls.weight` with"),
        (SOFTMAX | {"fancy_head.bias": torch.zeros(1)}, {}, "got 'fancy_head.bias'"),
        (
            BAGS,
            {"layout": GroupLayout.from_counts([5] * 7, ())},
            "as many as the layout has logits",
        ),
    ],
)
def test_what_cannot_be_converted_is_refused(
    state: dict[str, Any], options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        convert_to_mmdet(state, **options)


def test_wrong_types_are_refused() -> None:
    with pytest.raises(TypeError, match="mapping, got list"):
        convert_to_mmdet([])  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="GroupLayout, got str"):
        convert_to_mmdet(SOFTMAX, layout="x")  # type: ignore[arg-type]


def saved(folder: Path, state: dict[str, Tensor], **meta: Any) -> Path:
    path = folder / "epoch_12.pth"
    content = {"meta": meta, "state_dict": state, "optimizer": {"state": {}}}
    torch.save(content, path, _use_new_zipfile_serialization=False)
    return path


def test_the_command_converts_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, out = saved(tmp_path, BAGS, CLASSES=("a",) * 7), tmp_path / "out.pth"
    rows = [{"id": i, "image_id": 1, "category_id": i} for i in range(1, 8)]
    data = {
        "images": [{"id": 1}],
        "annotations": rows,
        "categories": [{"id": i} for i in range(1, 8)],
    }
    write_original_files(data, tmp_path / "one_group")
    LAYOUT.save(tmp_path / "layout.json")
    arguments = ["convert-checkpoint", str(source), "--out", str(out), "--to", "mmdet"]

    assert main([*arguments, "--groups", str(tmp_path / "layout.json")]) == 0
    content = torch.load(out, weights_only=True)
    assert content["meta"]["dataset_meta"]["classes"] == ["a"] * 7
    assert GroupLayout.from_state_dict(content["state_dict"]).names == LAYOUT.names
    # As many logits, other groups: only the layout tells them apart.
    assert main([*arguments, "--groups", str(tmp_path / "one_group")]) == 0
    found = GroupLayout.from_state_dict(torch.load(out, weights_only=True)["state_dict"])
    assert found.names == ("0_10", "10_100", "100_1000", "1000_inf")
    capsys.readouterr()

    out.unlink()
    assert main(arguments) == 2
    assert "give the `layout` of a BAGS checkpoint (`--groups` of the" in capsys.readouterr().err
    assert not out.exists()


def test_a_converted_file_is_no_larger_than_it_has_to_be(tmp_path: Path) -> None:
    state = {
        "bbox_head.fc_cls.weight": torch.zeros(2, 1),
        "mask_head.conv_logits.weight": torch.zeros(2, 50_000, 1, 1),
    }
    source = saved(tmp_path, state)
    assert convert_checkpoint(source, tmp_path / "out.pth", target="mmdet") == 2
    assert (tmp_path / "out.pth").stat().st_size < 250_000


def test_names_of_classes_tell_how_many_there_are(tmp_path: Path) -> None:
    source = saved(
        tmp_path, {"bbox_head.fc_cls.weight": torch.zeros(8, 2)}, CLASSES=list("abcdefg")
    )
    assert convert_checkpoint(source, tmp_path / "out.pth", target="torchvision") == 1
    assert list(torch.load(tmp_path / "out.pth", weights_only=True)) == [
        "roi_heads.box_predictor.cls_score.weight"
    ]
    with pytest.raises(ValueError, match=r"epoch_12\.pth: Expected fc_cls of 4 rows"):
        convert_checkpoint(source, tmp_path / "out.pth", target="mmdet", num_categories=3)
    with pytest.raises(ValueError, match="'mmdet' or 'torchvision'"):
        convert_checkpoint(source, tmp_path / "out.pth", target="x")  # type: ignore[arg-type]


def test_only_text_names_classes(tmp_path: Path) -> None:
    source = saved(tmp_path, SOFTMAX, CLASSES=[[1]] * 7)
    convert_checkpoint(source, tmp_path / "out.pth", target="mmdet")
    assert torch.load(tmp_path / "out.pth", weights_only=True)["meta"]["dataset_meta"] == {}


def test_a_parameter_becomes_a_tensor() -> None:
    name = "bbox_head.shared_fcs.0.weight"
    converted = convert_to_mmdet(SOFTMAX | {name: torch.nn.Parameter(torch.ones(3, 3))})
    assert not converted[f"roi_head.{name}"].requires_grad


@pytest.mark.parametrize("out", ["none/out.pth", "folder"])
def test_where_nothing_can_be_written_one_line_says_so(
    tmp_path: Path, out: str, capsys: pytest.CaptureFixture[str]
) -> None:
    source = saved(tmp_path, SOFTMAX)
    (tmp_path / "folder").mkdir()
    arguments = ["convert-checkpoint", str(source), "--out", str(tmp_path / out), "--to", "mmdet"]
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["epoch_12.pth", "folder"]


def test_a_full_disk_leaves_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, out = saved(tmp_path, SOFTMAX), tmp_path / "out.pth"
    out.write_text("before")

    def fail(_: Any, file: Any) -> None:
        file.write(b"half")
        raise RuntimeError("unexpected pos 10688 vs 10640")  # as torch says it

    monkeypatch.setattr(torch, "save", fail)
    with pytest.raises(OSError, match=r"out\.pth: could not be written"):
        convert_checkpoint(source, out, target="mmdet")
    assert out.read_text() == "before"
    assert len(list(tmp_path.iterdir())) == 2
