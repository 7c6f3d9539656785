"""The comparison of methods: what it runs, what it holds against what, and that it goes on."""

import json
import subprocess
import sys
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import pytest
import torch.distributed as dist

pytest.importorskip("torchvision")
pytest.importorskip("lvis")
sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))

import compare_methods as compare
import torchvision_lvis_train
import two_ranks_late
from checkpoints import Checkpoint
from methods import METHODS
from pipeline_cases import data_arguments, environment

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")
SHORT = ["--steps", "2", "--batch-size", "2", "--short-sides", "64", "--long-side", "128"]


def arguments(few: Path, output: Path, *methods: str, seeds: str = "0") -> list[str]:
    return [
        *("--output", str(output), "--methods", *methods, "--seeds", *seeds.split()),
        *(*data_arguments(few), *SHORT),
    ]


def test_a_comparison_and_more_of_it(
    few: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "comparison"
    assert compare.main(arguments(few, folder, "bags", "tau_norm", seeds="0 1")) == 0
    results = json.loads((folder / "results.json").read_text())
    names = {"softmax", "softmax_continued", "bags", "tau_norm"}
    assert set(results) == {"0", "1"}
    assert all(set(found) == names for found in results.values())
    assert (folder / "comparison.png").stat().st_size > 10_000

    table = (folder / "table.md").read_text().splitlines()
    cells = {row.split("|")[1].strip(): row.split("|")[2:] for row in table[2:]}
    bags = [found["bags"]["AP"] for found in results.values()]
    control = [found["softmax_continued"]["AP"] for found in results.values()]
    assert cells["balanced group softmax"][0].strip() == f"{mean(bags):.1f} ± {stdev(bags):.1f}"
    gains = [a - b for a, b in zip(bags, control, strict=True)]
    gain = f"{mean(gains):+.1f} ± {stdev(gains):.1f}".replace("-0.0", "+0.0")
    assert cells["balanced group softmax"][6].strip() == gain
    assert cells["balanced group softmax"][8].strip() == "softmax, continued"
    assert cells["tau-norm"][8].strip() == "softmax"

    # What is there is not run again; a further method and seed are.
    ran: list[str] = []
    main = torchvision_lvis_train.main

    def record(argv: list[str]) -> int:
        ran.append(f"{argv[argv.index('--seed') + 1]} {argv[argv.index('--method') + 1]}")
        return main(argv)

    monkeypatch.setattr(torchvision_lvis_train, "main", record)
    assert compare.main(arguments(few, folder, "bags", "x2", seeds="0 2")) == 0
    assert ran == ["0 x2", "2 softmax", "2 x2", "2 bags", "2 softmax_continued"]
    # With another recipe it is another comparison.
    assert compare.main([*arguments(few, folder, "bags"), "--others-ratio", "2"]) == 2


def test_one_detector_and_one_store_of_features(few: Path, tmp_path: Path) -> None:
    folder = tmp_path / "comparison"
    assert compare.main(arguments(few, folder, "bags_ratio_1", "balanced_softmax", "x2")) == 0
    place = folder / "seed-0"
    softmax = Checkpoint.load(place / "softmax" / "softmax.pt")
    for name in ("bags_ratio_1", "balanced_softmax", "x2", "softmax_continued"):
        method = compare.ENTRIES[name].method
        checkpoint = Checkpoint.load(place / name / f"{method}.pt")
        assert checkpoint.origin["start"] == Checkpoint.load(place / "x2" / "x2.pt").origin["start"]
        assert (checkpoint.origin["cache_passes"] > 0) == (name != "x2")
    assert Checkpoint.load(place / "bags_ratio_1" / "bags.pt").recipe.others_ratio == 1
    assert softmax.origin["cache_passes"] == 0


def test_a_comparison_that_was_stopped_goes_on(
    few: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    folder = tmp_path / "comparison"
    with monkeypatch.context() as patch:
        save = Checkpoint.save

        def fail(self: Checkpoint, path: Any) -> None:
            if self.stage == "bags":
                raise OSError("the disk is full")
            save(self, path)

        patch.setattr(Checkpoint, "save", fail)
        assert compare.main(arguments(few, folder, "bags")) == 2
    assert "the disk is full" in capsys.readouterr().err
    assert compare.main(arguments(few, folder, "bags")) == 0
    assert "bags" in json.loads((folder / "results.json").read_text())["0"]


def test_others_go_on_without_a_method_that_fails(
    few: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    import stages

    def no_tail(name: str, data: Any, counts: Any) -> Any:
        if name == "finetune_tail":
            raise ValueError("nothing is rare")
        return data

    monkeypatch.setattr(stages, "training_data", no_tail)
    folder = tmp_path / "comparison"
    assert compare.main(arguments(few, folder, "finetune_tail", "tau_norm")) == 2
    told = capsys.readouterr().err
    assert "nothing is rare" in told
    assert "without finetune_tail (seed 0)" in told
    results = json.loads((folder / "results.json").read_text())["0"]
    assert set(results) == {"softmax", "x2", "tau_norm"}
    table = (folder / "table.md").read_text().splitlines()
    (row,) = [line for line in table if line.startswith("| finetune tail |")]
    assert not any(cell.strip() for cell in row.split("|")[2:-2])


@pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="no gloo")
def test_two_processes_agree_on_what_is_there_already(few: Path, tmp_path: Path) -> None:
    """Also if one is late, and finds files that the other has just written."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    launcher += ["--nproc-per-node", "2", two_ranks_late.__file__]
    process = subprocess.Popen(
        [*launcher, *arguments(few, tmp_path / "comparison", "tau_norm", "ncm_fc")],
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        printed, _ = process.communicate(timeout=200)
    finally:
        process.terminate()  # the launcher, which ends its processes, if they wait for ever
    assert process.returncode == 0, printed[-3000:]
    results = json.loads((tmp_path / "comparison" / "results.json").read_text())
    assert set(results["0"]) == {"softmax", "tau_norm", "ncm_fc"}


def test_every_line_has_a_control_that_is_run() -> None:
    names = compare.chosen(["all"], SHORT)
    assert set(names) == set(compare.ENTRIES)
    for name in names:
        assert compare.control_of(name, SHORT) in names
    controls = {name: compare.control_of(name, SHORT) for name in names}
    assert controls["bags"] == controls["seesaw"] == controls["reweight_cls"] == "softmax_continued"
    assert controls["finetune_tail"] == controls["focal"] == controls["bags_all"] == "x2"
    assert controls["rfs"] == controls["ncm_fc"] == controls["tau_norm"] == "softmax"
    assert controls["bags_longer"] == "softmax_continued_longer"


def test_sets_hold_what_they_say() -> None:
    assert len(compare.SETS["paper"]) == 14
    assert {"balanced_softmax", "seesaw", "eql_v2", "federated"} <= set(compare.SETS["newer"])
    assert set(compare.SETS["all"]) >= set(METHODS)


def test_longer_and_slower_follow_the_recipe(tmp_path: Path) -> None:
    assert "20" in compare.own_options("bags_longer", ["--steps", "12"])
    config = Path(torchvision_lvis_train.__file__).parent / "configs" / "faster_rcnn_r50.toml"
    assert "20.0" in compare.own_options("bags_longer", ["--config", str(config)])
    tail = compare.own_options("finetune_tail", ["--steps", "12", "--learning-rate", "0.5"])
    assert tail[2:] == ["--bags.learning-rate", "0.005", "--bags.steps", "10"]
    tail = compare.own_options("finetune_tail", ["--config", str(config), "--epochs", "6"])
    assert tail[2:] == ["--bags.learning-rate", "0.0001", "--bags.epochs", "5.0"]
    small = compare.own_options("bags_all_small_rate", ["--learning-rate", "0.5"])
    assert small[-2:] == ["--bags.learning-rate", "0.05"]


@pytest.mark.parametrize(
    ("extra", "said"),
    [
        (["--seed", "3"], "Expected no `--seed`"),
        (["--stage", "softmax"], "Expected no `--stage`"),
        (["--config", "nowhere.toml"], "nowhere.toml"),
        (["--annotations", "a.json"], "together"),
    ],
)
def test_options_that_do_not_go(tmp_path: Path, capsys: Any, extra: list[str], said: str) -> None:
    assert compare.main(["--output", str(tmp_path / "new"), *extra]) == 2
    assert said in capsys.readouterr().err


def test_a_part_of_a_name_is_no_option(tmp_path: Path) -> None:
    """It would be passed over: each method has its own."""
    with pytest.raises(SystemExit):
        compare.main(["--output", str(tmp_path / "new"), "--see", "3"])


def test_a_folder_with_other_files_is_left_alone(few: Path, tmp_path: Path, capsys: Any) -> None:
    (tmp_path / "mine").write_text("")
    assert compare.main(arguments(few, tmp_path, "bags")) == 2
    assert "got other files" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]


def test_it_is_a_program() -> None:
    done = subprocess.run(
        [sys.executable, str(Path(compare.__file__)), "--help"],
        capture_output=True,
        text=True,
        check=False,
        env=environment(),
    )
    assert done.returncode == 0, done.stderr
    for name in compare.ENTRIES:
        assert f"  {name} " in done.stdout


def test_a_mean_that_rounds_to_zero_has_no_minus() -> None:
    assert compare.spread([-0.03, 0.01], "+") == "+0.0 ± 0.0"
    assert compare.spread([-0.06], "+") == "-0.1"
    assert compare.spread([None]) == "-"
