"""The commands `groups` and `inspect`: what they print, write and refuse."""

import argparse
import builtins
import errno
import json
import os
import pickle
import runpy
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from balanced_group_softmax import BAGSHead, GroupLayout, __version__, cli_figures
from balanced_group_softmax.cli import main
from balanced_group_softmax.cli_program import aligned, count_range, line_of, one_line

COUNTS = [3, 2500, 40, 0, 600]
IDS = [2, 3, 5, 7, 11]
NAMES = ["newt", "person", "kite", "yak", "dog"]


@pytest.fixture
def lvis(tmp_path: Path) -> Path:
    rows = [
        {"id": id_, "name": name, "instance_count": count}
        for id_, name, count in zip(IDS, NAMES, COUNTS, strict=True)
    ]
    path = tmp_path / "train.json"
    path.write_text(json.dumps({"categories": rows[::-1]}))  # in any order
    return path


def fails(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    capsys.readouterr()
    assert main([str(argument) for argument in arguments]) == 2
    said = capsys.readouterr()
    assert said.err.startswith("error: ")
    assert said.err.count("\n") == 1
    assert "Traceback" not in said.err
    return said.err


# --- groups --------------------------------------------------------------------------------------


def test_groups_are_a_table(lvis: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["groups", str(lvis)]) == 0
    said = capsys.readouterr()
    cells = [line.split() for line in said.out.splitlines()]
    assert cells[1] == ["bg_fg", "2"]
    assert cells[2] == "0_10 0 to 9 2 3 3 0.10% yak: 0 newt: 3".split()
    assert cells[3] == "10_100 10 to 99 1 2 40 1.27% kite: 40 kite: 40".split()
    assert cells[4] == "100_1000 100 to 999 1 2 600 19.09% dog: 600 dog: 600".split()
    assert cells[5] == "1000_inf 1000 and more 1 2 2500 79.54% person: 2500 person: 2500".split()
    assert cells[6] == ["all", "5", "11", "3143"]
    assert said.out.splitlines()[7].startswith("never seen in training: 1 of 5 categories")
    assert said.out.endswith("yak\n")
    assert said.err == ""


@pytest.mark.parametrize("background", ["first", "last", "none"])
def test_the_layout_is_written_and_read(
    lvis: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], background: str
) -> None:
    out = tmp_path / "layout.json"
    arguments = ["groups", str(lvis), "--out", str(out), "--background", background]
    assert main([*arguments, "--thresholds", "5", "50"]) == 0
    expected = GroupLayout.from_counts(
        COUNTS,
        (5, 50),
        None if background == "none" else background,
        IDS,  # type: ignore[arg-type]
    )
    assert GroupLayout.load(out) == expected
    said = capsys.readouterr().out
    assert f"wrote {out}" in said
    assert ("bg_fg" in said) == (background != "none")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["layout.json", "train.json"]


def test_counts_and_coco_are_read(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, out = tmp_path / "counts.json", tmp_path / "layout.json"
    path.write_text(json.dumps(COUNTS))
    assert main(["groups", str(path), "--out", str(out)]) == 0
    assert GroupLayout.load(out) == GroupLayout.from_counts(COUNTS)
    assert "position 1: 2500" in capsys.readouterr().out

    rows = [{"id": i, "image_id": 1, "category_id": 4, "iscrowd": i == 0} for i in range(12)]
    data = {"images": [{"id": 1}], "annotations": rows, "categories": [{"id": 9}, {"id": 4}]}
    path.write_text(json.dumps(data))
    assert main(["groups", str(path)]) == 0
    said = capsys.readouterr()
    assert "id 4: 11" in said.out
    assert "never seen in training: 1 of 2 categories, all in group 0_10: id 9" in said.out


def test_warnings_are_one_line_each(
    lvis: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["groups", str(lvis), "--thresholds", "10", "100", "200"]) == 0
    message = "warning: group 100_200 (100 to 199) has no categories and is left out\n"
    assert capsys.readouterr().err == message

    data = json.loads(lvis.read_text())
    data["annotations"] = [{"category_id": 2}]
    lvis.write_text(json.dumps(data))
    assert main(["groups", str(lvis)]) == 0
    said = capsys.readouterr().err
    assert said.startswith(f"warning: {lvis}: `instance_count` of")
    assert said.count("\n") == 1


@pytest.mark.parametrize(("counts", "alone"), [([20, 90], True), ([5, 90], False)])
def test_one_group_for_all_is_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], counts: list[int], alone: bool
) -> None:
    path = tmp_path / "counts.json"
    path.write_text(json.dumps(counts))
    assert main(["groups", str(path)]) == 0
    assert ("warning: all 2 categories are in one group" in capsys.readouterr().err) == alone


def test_nobody_was_seen(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "counts.json"
    path.write_text("[0, 0, 0, 0, 0, 0, 0]")
    assert main(["groups", str(path), "--plot", str(tmp_path / "groups.png")]) == 0
    said = capsys.readouterr()
    assert "7 of 7 categories" in said.out
    assert "2 more" in said.out
    assert said.err.count("warning: group") == 3


@pytest.mark.parametrize(
    ("thresholds", "message"),
    [
        (["-5", "10"], "positive, got -5"),
        (["0"], "positive, got 0"),
        (["100", "10"], "ascending, got 10 after 100"),
        (["10", "10"], "ascending, got 10 after 10"),
        (["10", str(10**30)], "64-bit"),
    ],
)
def test_absurd_thresholds_are_refused(
    lvis: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    thresholds: list[str],
    message: str,
) -> None:
    out = tmp_path / "layout.json"
    said = fails(capsys, "groups", lvis, "--out", out, "--thresholds", *thresholds)
    assert message in said
    assert not out.exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "found nothing there"),
        ("", "got an empty file"),
        ("annotations", "Expected JSON"),
        ('{"categories": [{"id": 1', "truncated"),
        ("[]", "at least one"),
        ("{}", "`categories`"),
        ("[1, -2]", "counts[1]"),
        ('{"categories": [{"id": 1, "name": "a"}]}', "got neither"),
    ],
)
def test_bad_annotations_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], content: str | None, message: str
) -> None:
    path, out = tmp_path / "train.json", tmp_path / "layout.json"
    if content is not None:
        path.write_text(content)
    said = fails(capsys, "groups", path, "--out", out)
    assert message in said
    assert str(path) in said
    assert not out.exists()


def test_outputs_are_checked_first(
    lvis: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = lvis.read_bytes()
    assert "another file" in fails(capsys, "groups", lvis, "--out", lvis)
    lvis.with_name("link.json").symlink_to(lvis)
    assert "another file" in fails(capsys, "groups", lvis, "--out", lvis.with_name("link.json"))
    assert "a folder to write in" in fails(capsys, "groups", lvis, "--out", tmp_path / "no" / "l")
    assert "got a folder" in fails(capsys, "groups", lvis, "--out", tmp_path)
    both = tmp_path / "a.png"
    assert "different files" in fails(capsys, "groups", lvis, "--out", both, "--plot", both)
    (tmp_path / "sub").mkdir()
    again = tmp_path / "sub" / ".." / "a.png"
    assert "different files" in fails(capsys, "groups", lvis, "--out", both, "--plot", again)
    nowhere = tmp_path / "nowhere.json"
    nowhere.symlink_to(tmp_path / "gone" / "a.json")
    assert "a folder to write in" in fails(capsys, "groups", lvis, "--out", nowhere)
    assert lvis.read_bytes() == before


def test_options_are_checked_before_files_are_read(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    missing = tmp_path / "large.json"  # would take minutes
    assert "ascending" in fails(capsys, "groups", missing, "--thresholds", 9, 5)
    assert "positive" in fails(
        capsys, "export-legacy", missing, "--out", tmp_path / "o", "--thresholds", 0
    )
    assert "ends in one of" in fails(capsys, "groups", missing, "--plot", tmp_path / "a.xyz")
    assert "found none at" in fails(capsys, "inspect", missing, "--plot", tmp_path / "no" / "a.png")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="has no named pipes")
def test_devices_and_pipes_are_left_alone(
    lvis: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pipe = tmp_path / "pipe.png"  # as /dev/stdout may be one, or /dev/null
    os.mkfifo(pipe)
    for option in ("--out", "--plot"):
        assert "got a device or pipe" in fails(capsys, "groups", lvis, option, pipe)
    with pytest.raises(ValueError, match="device or pipe"):
        LAYOUT.save(pipe)
    assert pipe.is_fifo()
    assert "got a device or pipe" in fails(capsys, "inspect", pipe)  # and does not wait for it
    assert "got a device or pipe" in fails(capsys, "groups", pipe)


def test_what_cannot_be_written_is_named(
    lvis: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def refuse(source: object, target: object) -> None:
        raise PermissionError(errno.EACCES, "Permission denied", str(source), None, str(target))

    out, picture = tmp_path / "layout.json", tmp_path / "groups.png"
    with monkeypatch.context() as patched:
        patched.setattr(os, "replace", refuse)
        assert fails(capsys, "groups", lvis, "--out", out) == f"error: {out}: Permission denied\n"
        said = fails(capsys, "groups", lvis, "--plot", picture)
        assert said == f"error: {picture}: Permission denied\n"
    with monkeypatch.context() as patched:
        patched.setattr(os, "access", lambda path, mode: False)
        assert "read-only" in fails(capsys, "groups", lvis, "--out", out)
        assert "read-only" in fails(capsys, "export-legacy", lvis, "--out", tmp_path / "new")
    assert list(tmp_path.iterdir()) == [lvis]


def test_a_link_stays_and_so_do_permissions(lvis: Path, tmp_path: Path) -> None:
    (tmp_path / "shared").mkdir()
    target, link = tmp_path / "shared" / "layout.json", tmp_path / "link.json"
    link.symlink_to(target)
    for _ in range(2):  # not there yet, and there
        assert main(["groups", str(lvis), "--out", str(link)]) == 0
        assert link.is_symlink()
        assert GroupLayout.load(target).num_categories == len(COUNTS)
        target.chmod(0o640)
    assert target.stat().st_mode & 0o777 == 0o640
    assert list(target.parent.iterdir()) == [target]


def test_ctrl_c_leaves_nothing_half_written(
    lvis: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from matplotlib.figure import Figure

    def half(figure: Figure, path: Path, **how: object) -> None:
        path.write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(Figure, "savefig", half)
    picture = tmp_path / "groups.png"
    picture.write_text("what was there")
    assert main(["groups", str(lvis), "--plot", str(picture)]) == 130
    assert capsys.readouterr().err == "interrupted\n"
    assert picture.read_text() == "what was there"
    assert sorted(tmp_path.iterdir()) == [picture, lvis]


def test_names_from_files_are_shown_safely(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, picture = tmp_path / "train.json", tmp_path / "groups.png"
    names = ["\x1b[31mred\n", "$x^{", "猫", "a" * 99]
    rows = [{"id": i, "name": name, "instance_count": 9} for i, name in enumerate(names)]
    path.write_text(json.dumps(rows))
    assert main(["groups", str(path), "--plot", str(picture)]) == 0
    said = capsys.readouterr()
    assert "\x1b" not in said.out
    assert "warning: Glyph" not in said.err
    assert picture.exists()

    odd = tmp_path / os.fsdecode(b"not-\xff-utf-8.json")
    path.rename(odd)
    picture.unlink()
    assert main(["groups", str(odd), "--plot", str(picture)]) == 0
    assert picture.exists()
    bad = saved(tmp_path, {"\x1b[31mred.fc._extra_state": extra_state("{}")})
    assert "?[31mred" in fails(capsys, "inspect", bad)


# --- inspect -------------------------------------------------------------------------------------


def extra_state(text: str) -> torch.Tensor:
    """What a head keeps under that name, but with another text."""
    told = f'{{"format": "balanced_group_softmax.layout"}} {text}'
    return torch.tensor(list(told.encode()), dtype=torch.uint8)


LAYOUT = GroupLayout.from_counts(COUNTS, background="last", category_ids=IDS)


def head(layout: GroupLayout = LAYOUT, features: int = 3) -> BAGSHead:
    """A head whose row of logit k has norm k + 1."""
    made = BAGSHead(features, layout)
    with torch.no_grad():
        made.fc.weight.zero_()
        made.fc.weight[:, 0] = -torch.arange(1.0, layout.num_logits + 1)
    return made


def under(prefix: str, state: dict[str, Any]) -> dict[str, Any]:
    return {prefix + key: value for key, value in state.items()}


STATE = head().state_dict()
MMDET = {
    "roi_head.bbox_head.fc_cls.weight": STATE["fc.weight"],
    "roi_head.bbox_head.loss_cls._extra_state": STATE["_extra_state"],
}
PREDICTOR = "roi_heads.box_predictor."


def saved(folder: Path, content: Any, **how: Any) -> Path:
    path = folder / "bags.pth"
    torch.save(content, path, **how)
    return path


@pytest.mark.parametrize(
    ("content", "titles"),
    [
        (STATE, ["the head"]),
        (under("head.", STATE), ["head"]),
        (under(f"module.{PREDICTOR}cls_score.", STATE), [f"module.{PREDICTOR}cls_score"]),
        (
            {
                "model": under(f"{PREDICTOR}cls_score.", STATE)
                | {f"{PREDICTOR}_extra_state": torch.zeros(64, dtype=torch.uint8)},
                "optimizer": {"state": {0: {"momentum_buffer": torch.ones(2)}}},
                "iteration": 9,
            },
            [f"{PREDICTOR}cls_score (in `model`)"],
        ),
        (
            {
                "model": under(f"{PREDICTOR}0.cls_score.", STATE)
                | under(f"{PREDICTOR}1.cls_score.", STATE)
            },
            [f"{PREDICTOR}{stage}.cls_score (in `model`)" for stage in (0, 1)],
        ),
        ({"state_dict": MMDET}, ["roi_head.bbox_head.fc_cls (in `state_dict`)"]),
        (
            {"training": {"mean": under("module.", STATE)}, "model": STATE},
            ["module (in `training.mean`)", "the head (in `model`)"],
        ),
    ],
    ids=["head", "prefix", "wrapped", "detectron2", "cascade", "mmdet", "running mean"],
)
def test_heads_are_found_wherever_they_are(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], content: Any, titles: list[str]
) -> None:
    assert main(["inspect", str(saved(tmp_path, content))]) == 0
    said = capsys.readouterr().out
    blocks = said.split("\n\n")
    assert [block.splitlines()[0] for block in blocks] == titles
    for block in blocks:
        lines = block.splitlines()
        assert lines[1] == (
            "5 categories, background last, 11 logits of 3 features, category ids known"
        )
        # Columns: background, foreground, then others and the categories of each group.
        assert lines[4].split() == "0_10 0 to 9 2 3 4.5000 4.0000 5.0000 3.0000".split()
        assert lines[7].split()[-4:] == ["11.0000", "11.0000", "11.0000", "10.0000"]
        assert lines[8].strip() == "bg_fg: background 1.0000, foreground 2.0000"


@pytest.mark.timeout(60)
def test_dicts_that_hold_each_other_are_looked_at_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    web: dict[str, Any] = {"model": STATE}
    for i in range(30):
        web[str(i)] = web
    assert main(["inspect", str(saved(tmp_path, web))]) == 0
    assert capsys.readouterr().out.count("(in `model`)") == 1


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_a_state_dict_that_was_cast_keeps_its_layout(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], dtype: torch.dtype
) -> None:
    path = saved(tmp_path, {name: value.to(dtype) for name, value in STATE.items()})
    assert main(["inspect", str(path)]) == 0
    assert "0_10" in capsys.readouterr().out
    assert GroupLayout.from_state_dict(torch.load(path, weights_only=True)) == LAYOUT


def test_a_head_without_background_and_an_empty_group(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    layout = GroupLayout(((0, 1), ()), ("bin1", "bin2"), background=None)
    path = saved(tmp_path, head(layout).half().state_dict())
    assert main(["inspect", str(path), "--plot", str(tmp_path / "norms.png")]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].startswith("2 categories, background none, 4 logits")
    assert lines[3].split() == ["bin1", "2", "3", "2.5000", "2.0000", "3.0000", "1.0000"]
    assert lines[4].split() == ["bin2", "0", "1", "4.0000"]


def test_a_layout_without_weights_and_weights_that_are_not_finite(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    alone = {"_extra_state": STATE["_extra_state"]}
    path = saved(tmp_path, alone)
    assert main(["inspect", str(path)]) == 0
    assert "the layout alone" in capsys.readouterr().out
    assert "layouts alone" in fails(capsys, "inspect", path, "--plot", tmp_path / "norms.png")

    broken = head()
    with torch.no_grad():
        broken.fc.weight[4] = float("nan")
    path = saved(tmp_path, broken.state_dict())
    assert main(["inspect", str(path), "--plot", str(tmp_path / "norms.png")]) == 0
    assert "1 of 11 rows of weights are not finite" in capsys.readouterr().out


def test_a_softmax_classifier_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    state = under(f"{PREDICTOR}cls_score.", nn.Linear(4, 6).state_dict())
    path = saved(tmp_path, {"model": state})
    assert main(["inspect", str(path)]) == 0
    said = capsys.readouterr().out
    assert said.startswith("no layout of Balanced Group Softmax")
    assert f"model: {PREDICTOR}cls_score.weight: a classifier without groups, 6 rows" in said
    assert "6 classes, or 5 and background" in said
    picture = tmp_path / "norms.png"
    assert "found no layout" in fails(capsys, "inspect", path, "--plot", picture)
    assert not picture.exists()

    path = saved(tmp_path, {"state_dict": {"bbox_head.fc_cls.weight": torch.ones(6, 4)}})
    assert main(["inspect", str(path)]) == 0
    assert "convert-checkpoint --groups" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"backbone.weight": torch.ones(2, 2)}, "found neither a BAGSHead"),
        ({}, "among 0 entries"),
        ([torch.ones(2)], "a dict of weights, got list"),
        (STATE | {"fc.weight": torch.ones(9, 3)}, "shape [11, features]"),
        (STATE | {"fc.weight": torch.ones(11)}, "shape [11, features]"),
        ({"model": {"_extra_state": STATE["_extra_state"][:-9]}}, "model: _extra_state: Expected"),
    ],
)
def test_what_is_no_such_checkpoint_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], content: Any, message: str
) -> None:
    said = fails(capsys, "inspect", saved(tmp_path, content))
    assert message in said
    assert "bags.pth" in said


class Evil:
    """Runs a command when it is unpickled by a careless reader."""

    def __init__(self, function: Callable[..., Any], *arguments: Any) -> None:
        self.call = function, arguments

    def __reduce__(self) -> Any:
        return self.call


@pytest.mark.parametrize("is_zip", [True, False], ids=["zip", "before zip"])
def test_code_is_refused_and_not_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], is_zip: bool
) -> None:
    trap = tmp_path / "ran"
    for evil in (
        Evil(os.system, f"touch {trap}"),
        Evil(builtins.eval, f"open({str(trap)!r}, 'w')"),
        # getattr is passed over, so that what it would find is not there to be called.
        Evil(Evil, Evil(getattr, Evil(os.system, f"touch {trap}"), "x")),
    ):
        path = saved(tmp_path, STATE | {"x": evil}, _use_new_zipfile_serialization=is_zip)
        assert "nothing of it was run" in fails(capsys, "inspect", path)
        assert not trap.exists()


def test_converting_does_not_replace_what_is_read(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, folder = tmp_path / "original.pth", tmp_path / "files"
    weights = {"bbox_head.fc_cls.weight": torch.ones(3, 4), "bbox_head.fc_cls.bias": torch.ones(3)}
    torch.save({"state_dict": weights}, source)
    arguments = ["convert-checkpoint", source, "--to", "mmdet", "--num-categories", 2]
    before = source.read_bytes()
    assert "another file" in fails(capsys, *arguments, "--out", source)
    assert source.read_bytes() == before

    rows = [{"id": i, "image_id": 1, "category_id": 1 + i // 3} for i in range(6)]
    data = {"images": [{"id": 1}], "annotations": rows, "categories": [{"id": 1}, {"id": 2}]}
    annotations = tmp_path / "train.json"
    annotations.write_text(json.dumps(data))
    assert main(["export-legacy", str(annotations), "--out", str(folder)]) == 0
    table = folder / "label2binlabel.pt"
    before = table.read_bytes()
    assert "another file" in fails(capsys, "import-groups", folder, "--out", table)
    assert "another file" in fails(capsys, *arguments, "--groups", folder, "--out", table)
    assert table.read_bytes() == before
    assert "got a file" in fails(capsys, "export-legacy", annotations, "--out", annotations)
    (folder / "valsplit.pkl").unlink()
    (folder / "valsplit.pkl").mkdir()
    assert "got a folder" in fails(capsys, "export-legacy", annotations, "--out", folder)
    assert main([*map(str, arguments), "--out", str(tmp_path / "softmax.pth")]) == 0


def test_bad_files_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = saved(tmp_path, STATE)
    content = path.read_bytes()
    for bad, message in (
        (content[: len(content) // 2], "truncated"),
        (b"", "an empty file"),
        (b"\xff\xd8\xff\xe0", "one that starts b'\\xff\\xd8"),
        (pickle.dumps({"model": list(range(99))}), "a plain pickle"),  # as detectron2 has them
    ):
        path.write_bytes(bad)
        said = fails(capsys, "inspect", path)
        assert said.startswith(f"error: {path}: ")
        assert message in said
        assert "http" not in said  # of torch's advice
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("readme.txt", "something else")
    assert "an archive of something else" in fails(capsys, "inspect", path)
    assert "none.pth: expected" in fails(capsys, "inspect", tmp_path / "none.pth")
    assert "got a folder" in fails(capsys, "inspect", tmp_path)


@pytest.mark.skipif(not hasattr(torch.serialization, "safe_globals"), reason="since torch 2.5")
def test_records_of_training_are_passed_over(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    # As mmengine has it: arrays, and methods of the class found by getattr.
    class HistoryBuffer:
        def __init__(self) -> None:
            self.history = np.arange(3.0)
            self.methods = {"mean": HistoryBuffer.mean}

        def mean(self) -> None: ...

    HistoryBuffer.__module__ = "mmengine.logging.history_buffer"
    HistoryBuffer.__qualname__ = "HistoryBuffer"
    HistoryBuffer.mean.__qualname__ = "HistoryBuffer.mean"
    HistoryBuffer.mean.__module__ = HistoryBuffer.__module__
    module = type(sys)(HistoryBuffer.__module__)
    module.HistoryBuffer = HistoryBuffer  # type: ignore[attr-defined]
    for name in ("mmengine", "mmengine.logging"):
        monkeypatch.setitem(sys.modules, name, type(sys)(name))
    monkeypatch.setitem(sys.modules, module.__name__, module)
    record = {"loss": HistoryBuffer(), "lr": np.float64(0.1)}
    content = {"state_dict": MMDET, "message_hub": record, "args": argparse.Namespace(lr=1)}
    path = saved(tmp_path, content)
    assert main(["inspect", str(path)]) == 0
    assert capsys.readouterr().out.startswith("roi_head.bbox_head.fc_cls (in `state_dict`)")


# --- pictures ------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", ["png", "svg"])
def test_pictures_are_written(
    lvis: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], suffix: str
) -> None:
    picture = tmp_path / f"picture.{suffix}"
    start = b"\x89PNG" if suffix == "png" else b"<?xml"
    assert main(["groups", str(lvis), "--plot", str(picture)]) == 0
    assert picture.read_bytes().startswith(start)
    assert f"wrote {picture}" in capsys.readouterr().out
    picture.unlink()
    cascade = under("a.0.", STATE) | under("a.1.", STATE)
    path = saved(tmp_path, cascade)
    assert main(["inspect", str(path), "--plot", str(picture)]) == 0
    assert picture.read_bytes().startswith(start)
    assert len(list(tmp_path.iterdir())) == 3  # no temporary file is left


def labels_of(figure: Any) -> dict[str, Any]:
    """What the legend of a picture says, and the colour beside it."""
    (axes,) = figure.axes
    legend = axes.get_legend()
    texts = [text.get_text() for text in legend.get_texts()]
    return dict(zip(texts, legend.legend_handles, strict=True))


def test_a_range_of_counts_has_one_colour_whatever_else_there_is() -> None:
    def colour(groups: list[cli_figures.CountGroup]) -> Any:
        handles = labels_of(cli_figures.draw_counts(groups, (10, 100, 1000), "data"))
        (found,) = (one for text, one in handles.items() if text.startswith("10 to 99"))
        return found.get_facecolor()

    middle = cli_figures.CountGroup("10 to 99", ["kite"], [40])
    rare = cli_figures.CountGroup("0 to 9", ["newt", "yak"], [3, 0])
    assert colour([middle]) == colour([rare, middle])


def test_a_picture_of_counts_reads_well() -> None:
    groups = [
        cli_figures.CountGroup("0 to 9", ["yak", "newt"], [0, 3]),
        cli_figures.CountGroup("1000 and more", ["a name that is rather long"], [4 * 10**6]),
    ]
    figure = cli_figures.draw_counts(groups, (10, 100, 1000), "data.json")
    assert figure.get_suptitle() == "data.json: 3 categories, 4,000,003 training instances"
    assert list(labels_of(figure)) == [
        "1000 and more: 1 category, more than 99% of instances",
        "0 to 9: 2 categories, less than 0.01% of instances",
        "never seen: 1 category",
        "boundaries between groups",
    ]
    (axes,) = figure.axes
    assert axes.yaxis.get_major_formatter()(1000, None) == "1,000"
    assert axes.get_ylim()[1] > 2 * 4 * 10**6
    assert axes.get_xticklabels()[0].get_rotation() == 0
    many = [cli_figures.CountGroup("0 to 9", ["a name that is rather long"] * 8, [3] * 8)]
    (axes,) = cli_figures.draw_counts(many, (10,), "data").axes
    assert axes.get_xticklabels()[0].get_rotation() == 90
    assert labels_of(axes.figure)["0 to 9: 8 categories, 100% of instances"]


def test_a_picture_of_norms_has_room_for_all_that_is_in_it() -> None:
    group = cli_figures.NormGroup("10 to 99", np.array([0.03, np.nan]), 0.05)
    (axes,) = cli_figures.draw_norms([("head", [group])], "bags.pth").axes
    bottom, top = axes.get_ylim()
    assert bottom == 0
    assert 0.055 < top < 0.07


def test_what_cannot_be_drawn_is_refused(
    lvis: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    picture, out = tmp_path / "picture.xyz", tmp_path / "layout.json"
    said = fails(capsys, "groups", lvis, "--plot", picture, "--out", out)
    assert "ends in one of" in said
    assert "png" in said
    for suffix in ("pgf", "rgba"):  # matplotlib writes them: with LaTeX, and without a size
        assert suffix not in said
        assert "ends in one of" in fails(capsys, "groups", lvis, "--plot", tmp_path / f"a.{suffix}")
    assert not picture.exists()
    assert not out.exists()
    many: dict[str, Any] = {}
    for stage in range(13):
        many |= under(f"{stage}.", STATE)
    path = saved(tmp_path, many)
    said = fails(capsys, "inspect", path, "--plot", tmp_path / "norms.png")
    assert "at most 12 heads" in said


def test_matplotlib_is_asked_for_only_by_plot(
    lvis: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name in [name for name in sys.modules if name.startswith("matplotlib.")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert main(["groups", str(lvis)]) == 0
    picture, out = tmp_path / "groups.png", tmp_path / "layout.json"
    said = fails(capsys, "groups", lvis, "--plot", picture, "--out", out)
    assert "python -m pip install matplotlib" in said
    assert "matplotlib" in fails(capsys, "inspect", saved(tmp_path, STATE), "--plot", picture)
    assert not picture.exists()
    assert not out.exists()


@pytest.mark.parametrize("version", ["v0.5", "v1"])
def test_real_counts(
    lvis_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], version: str
) -> None:
    path = lvis_data / f"lvis_{version}_train_categories.json"
    assert main(["groups", str(path), "--plot", str(tmp_path / "groups.png")]) == 0
    lines = capsys.readouterr().out.splitlines()
    expected = {"v0.5": ["1230", "1236", "693958"], "v1": ["1203", "1209", "1270141"]}
    assert lines[6].split() == ["all", *expected[version]]


# --- help and text -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "command", ["groups", "inspect", "import-groups", "export-legacy", "convert-checkpoint"]
)
def test_help_has_an_example_and_says_what_the_output_means(
    command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as left:
        main([command, "--help"])
    assert left.value.code == 0
    said = capsys.readouterr().out
    assert f"  balanced-group-softmax {command} " in said
    assert "output" in said
    with pytest.raises(SystemExit):
        main(["--help"])
    assert command in capsys.readouterr().out


def test_wrong_usage_is_status_2(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in ([], ["groups"], ["groups", "a.json", "--thresholds", "ten"]):
        with pytest.raises(SystemExit) as left:
            main(arguments)
        assert left.value.code == 2


def test_the_package_runs_as_the_command(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["balanced_group_softmax", "--version"])
    with pytest.raises(SystemExit) as left:
        runpy.run_module("balanced_group_softmax", run_name="__main__")
    assert left.value.code == 0
    assert capsys.readouterr().out == f"{__version__}\n"


@pytest.mark.parametrize("buffered", [True, False])
def test_nobody_reads_what_is_printed(
    lvis: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    buffered: bool,
) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    with open(writing, "w", buffering=-1 if buffered else 1) as out:  # `groups ... | head -0`
        monkeypatch.setattr(sys, "stdout", out)
        assert main(["groups", str(lvis)]) == 141
        monkeypatch.undo()
    assert capsys.readouterr().err == ""


@pytest.mark.skipif(not Path("/dev/full").is_char_device(), reason="has no /dev/full")
def test_what_is_printed_cannot_be_written(
    lvis: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with open("/dev/full", "w") as out:
        monkeypatch.setattr(sys, "stdout", out)
        said = fails(capsys, "groups", lvis)
        monkeypatch.undo()
    assert said == "error: standard output: No space left on device\n"


def test_standard_output_is_closed(lvis: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = lvis.with_name("layout.json")
    monkeypatch.setattr(sys, "stdout", None)  # what Python makes of `>&-`
    assert main(["groups", str(lvis), "--out", str(out)]) == 0
    assert GroupLayout.load(out).num_categories == len(COUNTS)


def test_standard_error_is_closed(
    lvis: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    lvis.write_text("[1, 2, 3]]")
    with monkeypatch.context() as patched:
        patched.setattr(sys, "stderr", None)
        assert main(["groups", str(lvis)]) == 2
    assert capsys.readouterr().out == ""
    said = fails(capsys, "groups", lvis)
    assert "Extra data" in said
    assert "truncated" not in said


def test_errors_as_one_line() -> None:
    assert line_of(FileNotFoundError(2, "No such file", "a.json")) == "a.json: No such file"
    assert line_of(OSError(28, "No space left on device")) == "No space left on device"
    assert line_of(OSError("a.pth: could not\nbe written")) == "a.pth: could not be written"
    assert line_of(MemoryError()) == "MemoryError"


def test_letters_that_the_terminal_lacks(lvis: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lvis.write_text(json.dumps([{"id": 1, "name": "猫", "instance_count": 3}]))
    read = lvis.with_name("said.txt")
    with read.open("w", encoding="ascii") as file:
        monkeypatch.setattr(sys, "stdout", file)
        assert main(["groups", str(lvis), "--thresholds", "10"]) == 0
    assert "?: 3" in read.read_text()


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("10_100", "10 to 99"),
        ("0_1", "0"),
        ("1000_inf", "1000 and more"),
        ("0_inf", "any number"),
        ("bin1", "bin1"),
    ],
)
def test_count_ranges(name: str, expected: str) -> None:
    assert count_range(name) == expected


def test_text_of_tables() -> None:
    assert aligned([["a", "bb"], ["ccc", "d"]]) == ["a    bb", "ccc   d"]
    assert one_line("a\tb\u202e") == "a?b?"
    assert len(one_line("x" * 99)) == 40
