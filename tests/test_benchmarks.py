"""The benchmarks run, at sizes that measure nothing, and say truly what they found."""

import argparse
import json
import math
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from balanced_group_softmax import grouped_softmax_loss, grouped_softmax_scores

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
sys.path.append(str(BENCHMARKS))

import arguments as option_types  # noqa: E402
import bench_detections  # noqa: E402
import bench_loss  # noqa: E402
import bench_scores  # noqa: E402
import children  # noqa: E402
import cuda_measures  # noqa: E402
import goals  # noqa: E402
import matrix  # noqa: E402
import peak_memory  # noqa: E402
import peers  # noqa: E402
import profiles  # noqa: E402
import records  # noqa: E402
import run_all  # noqa: E402
import timing  # noqa: E402
from page import Outcome, Part, make_page, measurements  # noqa: E402
from records import Case, Result  # noqa: E402
from timing import Timing  # noqa: E402

CPU = torch.device("cpu")
TINY = ["--rounds", "1", "--burst", "1"]
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@pytest.fixture(autouse=True)
def _keep_threads() -> Iterator[None]:
    """The programs set the number of threads of their process, which here is that of all tests."""
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def run(script: str, *options: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, BENCHMARKS / script, *options]
    return subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False)


def fixed(milliseconds: float) -> Timing:
    return Timing(milliseconds, milliseconds, milliseconds, milliseconds, 1)


@pytest.fixture(scope="module")
def small() -> profiles.Profile:
    """Groups of 4, 2, 3 and 2 categories that are not in order of their counts."""
    return profiles.make_profile("small", [5000, 3, 40, 900, 7, 2, 60, 150, 9, 800, 2000])


# --- the programs --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("script", "options"),
    [
        ("bench_loss.py", ["--rows", "16", "--foreground", "0.25", "--rounds", "1"]),
        (
            "bench_loss.py",
            ["--rows", "16", *TINY, "--memory", "kept", "--clock", "cpu", "--impl", "torch"],
        ),
        ("bench_scores.py", ["--rows", "8", *TINY, "--dtype", "float32", "float16", "--quick"]),
        ("bench_detections.py", ["--rows", "20", "--categories", "30", "--rounds", "1", "--quick"]),
        ("bench_evaluation.py", ["--images", "5", "--detections", "20", "--fixed"]),
    ],
    ids=["loss", "loss-other-options", "scores", "detections", "evaluation"],
)
def test_benchmark_runs(script: str, options: list[str], tmp_path: Path) -> None:
    record = tmp_path / "record.json"
    done = run(script, *options, "--json", record)
    assert done.returncode == 0, done.stdout + done.stderr
    assert any(f"| {title} |" in done.stdout for title in ("rows", "scores", "method"))
    written = json.loads(record.read_text())
    assert written["results"]
    assert {"commit", "torch", "triton", "liger-kernel"} <= written["environment"].keys()


def test_loss_measures_every_alternative_pass_and_kind_of_labels(tmp_path: Path) -> None:
    record = tmp_path / "record.json"
    options = ["--rows", "16", "--foreground", "0.25", "all", "--dtype", "float32", "bfloat16"]
    passes = ["forward", "backward", "both"]
    assert bench_loss.main([*options, *TINY, "--passes", *passes, "--json", str(record)]) == 0
    written = json.loads(record.read_text())
    results = records.read_results(written["results"])
    assert [(r.case.dtype, r.case.labels) for r in results] == [
        ("float32", "25%"),
        ("float32", "all active"),
        ("bfloat16", "25%"),
        ("bfloat16", "all active"),
    ]
    assert [r.live == 1 for r in results] == [False, True, False, True]
    for result in results:
        assert list(result.times) == [f"{name}, wall" for name in passes]
        for times in result.times.values():
            assert list(times) == ["bags (auto)", "original", "loop", "dense", "copy"]
            assert all(timing.median > 0 for timing in times.values())
        assert result.problems == []
    found = written["agreement"]["lvis_v0.5"]
    assert {name: facts["agrees"] for name, facts in found.items()} == {
        "bags (auto)": True,
        "loop": True,
    }
    assert written["reproducible"] == {"lvis_v0.5": {"bags (auto)": True}}


def test_what_cannot_run_is_skipped_with_the_reason(tmp_path: Path) -> None:
    record = tmp_path / "record.json"
    arguments = ["--rows", "16", "--foreground", "0.25", *TINY, "--impl", "auto", "triton"]
    assert bench_loss.main([*arguments, "--json", str(record)]) == 0
    skipped = json.loads(record.read_text())["skipped"]
    assert "GPU" in skipped["dense, Liger"]
    assert "GPU" in skipped["dense, QuACK"]
    assert "--compile" in skipped["loop, compiled"]
    assert "GPU" in skipped["bags (triton)"]


def test_the_compiled_loop_runs_at_the_rows_that_are_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Traced as it would be, without the code generation that takes most of the time.
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    record = tmp_path / "record.json"
    arguments = ["--rows", "16", "32", "--foreground", "0.25", *TINY, "--compile", "32"]
    assert bench_loss.main([*arguments, "--json", str(record)]) == 0
    written = json.loads(record.read_text())
    timed = {
        result.case.rows: "loop, compiled" in result.times["both, wall"]
        for result in records.read_results(written["results"])
    }
    assert timed == {16: False, 32: True}
    assert written["agreement"]["lvis_v0.5"]["loop, compiled"]["agrees"] is True


def test_a_run_without_our_own_loss_fails(
    capsys: pytest.CaptureFixture[str],
) -> None:
    arguments = ["--rows", "16", "--foreground", "0.25", *TINY, "--impl", "triton"]
    assert bench_loss.main(arguments) == 1
    assert "FAULT: this library was not measured" in capsys.readouterr().out


@pytest.mark.parametrize("program", [bench_loss, bench_scores])
def test_a_size_that_does_not_fit_leaves_the_others(
    program: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make = program.make_logits

    def make_few(case: Case, *rest: Any) -> list[Tensor]:
        if case.rows == 999:
            raise RuntimeError("can't allocate memory\nand more")
        return make(case, *rest)

    monkeypatch.setattr(program, "make_logits", make_few)
    record = tmp_path / "record.json"
    assert program.main(["--rows", "16", "999", "8", *TINY, "--json", str(record)]) == 0
    results = records.read_results(json.loads(record.read_text())["results"])
    failed = [result for result in results if result.case.rows == 999]
    assert failed
    for result in failed:
        assert result.times == {}
        assert result.problems == ["this size: can't allocate memory"]
    assert all(result.times for result in results if result not in failed)


def test_rows_too_few_for_every_group_leave_the_others(tmp_path: Path) -> None:
    record = tmp_path / "record.json"
    arguments = ["--rows", "8", "64", "--foreground", "all", *TINY, "--json", str(record)]
    assert bench_loss.main(arguments) == 0
    few, enough = records.read_results(json.loads(record.read_text())["results"])
    assert "foreground row for each of 4 groups" in few.problems[0]
    assert enough.times["both, wall"]["bags (auto)"].median > 0


@pytest.mark.parametrize("program", [bench_loss, bench_scores, bench_detections])
def test_the_record_grows_with_every_size(
    program: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So that a program that is killed leaves what it had measured."""
    lengths = []

    def write(path: Path, record: dict[str, Any]) -> None:
        lengths.append(len(record["results"]))

    place = bench_detections if program is bench_detections else sys.modules["program"]
    monkeypatch.setattr(place, "write_json", write)
    options = ["--rows", "20"]
    if program is bench_detections:
        options += ["--categories", "30", "--rounds", "1", "--quick"]
    else:
        options += ["16", *TINY]
    program.main([*options, "--json", str(tmp_path / "record.json")])
    assert lengths[:2] == [1, 2]


def test_a_loss_that_varies_is_a_fault(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(bench_loss, "check_reproducible", lambda *rest: {"bags (auto)": False})
    assert bench_loss.main(["--rows", "16", "--foreground", "0.25", *TINY]) == 1
    assert "FAULT: bags (auto) differs for the same seed" in capsys.readouterr().out


def test_detections_that_differ_or_fail_are_faults(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*rest: object) -> None:
        raise RuntimeError("no kernel image")

    record = tmp_path / "record.json"
    options = ["--rows", "20", "--categories", "30", "--rounds", "1", "--quick"]
    monkeypatch.setattr(bench_detections, "identical", lambda one, two: False)
    monkeypatch.setattr(bench_detections, "measure_whole", fails)
    assert bench_detections.main([*options, "--json", str(record)]) == 1
    written = json.loads(record.read_text())
    assert len(written["results"]) == 2
    assert written["faults"] == [
        "trained, one box a row, threshold 0: other detections than expected",
        "trained, boxes per category, threshold 0: other detections than expected",
        "whole, boxes per category, threshold 0: RuntimeError: no kernel image",
    ]


def test_sizes_that_there_is_no_time_for_are_skipped(tmp_path: Path) -> None:
    record = tmp_path / "record.json"
    bench_loss.main(["--rows", "16", *TINY, "--minutes", "0", "--json", str(record)])
    written = json.loads(record.read_text())
    assert written["results"] == []
    assert sum("minutes were over" in reason for reason in written["skipped"].values()) == 3


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("program", [bench_loss, bench_scores, bench_detections, run_all])
def test_a_gpu_that_is_not_there_is_said_so(
    program: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        program.main(["--device", "cuda"])
    assert stopped.value.code == 2
    assert "finds no GPU" in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize(
    ("program", "arguments", "words"),
    [
        (bench_loss, ["--device", "foo"], "expected cpu, cuda or cuda:N, got 'foo'"),
        (bench_scores, ["--device", "mps"], "expected cpu, cuda or cuda:N, got 'mps'"),
        (bench_loss, ["--foreground", "0.1", "1.5"], "a share from 0 to 1 or `all`, got '1.5'"),
        (bench_loss, ["--foreground", "many"], "a share from 0 to 1 or `all`, got 'many'"),
        (bench_loss, ["--rows", "8", "0"], "--rows: expected a whole number above 0, got '0'"),
        (bench_scores, ["--threads", "0"], "--threads: expected a whole number above 0"),
        (bench_scores, ["--rounds", "0"], "--rounds: expected a whole number above 0"),
        (bench_detections, ["--rows", "0"], "--rows: expected a whole number above 0"),
        (bench_loss, ["--peaks", "-1"], "--peaks: expected a whole number above 0"),
        (bench_loss, ["--loss-scale", "inf"], "a finite number above 0, got 'inf'"),
        (bench_loss, ["--counts", "nofile.json"], "No such file"),
        (bench_loss, ["--counts", __file__], "JSONDecodeError"),
        (bench_loss, ["--minutes", "nan"], "a number from 0 to inf, got 'nan'"),
        (run_all, ["--minutes", "nan"], "a number from 0 to inf, got 'nan'"),
        (run_all, ["--minutes", "-1"], "a number from 0 to inf, got '-1'"),
        (run_all, ["--output", f"{__file__}/results"], "expected a folder to write to"),
        (bench_loss, ["--json", f"{__file__}/a.json"], "expected a folder to write to"),
        (bench_detections, ["--json", str(BENCHMARKS)], "expected a file to write"),
    ],
    ids=lambda value: " ".join(value)[-30:] if isinstance(value, list) else None,
)
def test_an_argument_that_cannot_be_is_named(
    program: Any, arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        program.main(arguments)
    assert stopped.value.code == 2
    assert words in capsys.readouterr().err.splitlines()[-1]


# --- profiles ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "sizes", "total", "logits"),
    [
        ("lvis_v0.5", (2, 295, 454, 303, 182), 693_958, 1236),
        ("lvis_v1", (2, 201, 413, 335, 258), 1_270_141, 1209),
        ("v3det", (2, 4001, 6401, 2601, 205), 1_750_000, 13210),
    ],
)
def test_profiles_have_the_published_groups_and_totals(
    name: str, sizes: tuple[int, ...], total: int, logits: int
) -> None:
    profile = profiles.named_profile(name)
    assert profile.layout.group_sizes == sizes
    assert profile.num_logits == logits
    assert sum(profile.counts) == total
    assert min(profile.counts) >= 1


def test_real_counts_take_the_place_of_a_profile(tmp_path: Path) -> None:
    file = tmp_path / "mine.json"
    counts = [{"id": 7, "instance_count": 20}, {"id": 3, "instance_count": 5000}]
    file.write_text(json.dumps(counts))
    profile = profiles.read_profile(file)
    assert (profile.name, profile.counts) == ("mine", (5000, 20))
    record = tmp_path / "record.json"
    arguments = ["--rows", "8", "--foreground", "0.5", "--counts", str(file), *TINY]
    assert bench_loss.main([*arguments, "--json", str(record)]) == 0
    assert json.loads(record.read_text())["results"][0]["case"]["logits"] == 2 + 2 + 2


@pytest.mark.parametrize("share", [0.0, 0.05, 0.25, 1.0])
def test_labels_have_exactly_the_share_of_foreground(share: float, small: profiles.Profile) -> None:
    labels = profiles.draw_labels(200, share, small, seed=3)
    assert int((labels > 0).sum()) == round(200 * share)
    assert int(labels.max()) <= len(small.counts)


def test_labels_follow_the_counts(small: profiles.Profile) -> None:
    labels = profiles.draw_labels(20_000, 1.0, small, seed=0)
    drawn = torch.bincount(labels, minlength=12)[1:] / 20_000
    expected = torch.tensor(small.counts) / sum(small.counts)
    torch.testing.assert_close(drawn, expected, rtol=0, atol=0.02)


def test_every_row_is_live_in_every_group_if_all_are_asked_for(small: profiles.Profile) -> None:
    labels = profiles.draw_labels(64, 0.25, small, seed=0, every_group=True)
    assert int((labels > 0).sum()) == 16
    assert profiles.live_fraction(labels, small, math.inf) == 1
    with pytest.raises(ValueError, match="got 2"):
        profiles.draw_labels(8, 0.25, small, seed=0, every_group=True)


@pytest.mark.parametrize("ratio", [0.0, 2.0, math.inf])
@pytest.mark.parametrize("share", [0.0, 0.1, 0.5])
def test_live_fraction_is_that_of_the_rows_that_the_library_draws(
    share: float, ratio: float, small: profiles.Profile
) -> None:
    from balanced_group_softmax import sample_others

    labels = profiles.draw_labels(50, share, small, seed=1)
    active = sample_others(labels, small.layout, others_ratio=ratio)
    sizes = torch.tensor(small.layout.group_sizes, dtype=torch.float64)
    expected = float((active.double() @ sizes).sum()) / (50 * small.num_logits)
    assert profiles.live_fraction(labels, small, ratio) == pytest.approx(expected)


# --- peers ---------------------------------------------------------------------------------------


def test_peers_agree_where_nothing_is_drawn(small: profiles.Profile) -> None:
    found, _ = peers.loss_peers(small, math.inf, CPU, ["auto", "torch"], compiled=False)
    names = [peer.name for peer in found]
    assert names == ["bags (auto)", "bags (torch)", "original", "loop", "dense"]
    agreement = bench_loss.check_agreement(found, small, CPU)
    assert set(agreement) == {"bags (auto)", "bags (torch)", "loop"}
    for facts in agreement.values():
        assert facts["agrees"] is True, facts


def test_a_peer_that_disagrees_is_noticed(small: profiles.Profile) -> None:
    found, _ = peers.loss_peers(small, math.inf, CPU, ["auto"], compiled=False)
    ours = partial(grouped_softmax_loss, layout=small.layout, others_ratio=math.inf)

    def off(logits: Tensor, labels: Tensor) -> Tensor:
        return ours(logits, labels) * 1.001

    def nan(logits: Tensor, labels: Tensor) -> Tensor:
        return ours(logits, labels) * math.nan

    def fails(logits: Tensor, labels: Tensor) -> Tensor:
        raise RuntimeError("no kernel image")

    wrong = [peers.Peer(f.__name__, f, grouped=True) for f in (off, nan, fails)]
    agreement = bench_loss.check_agreement([*found, *wrong], small, CPU)
    assert agreement["bags (auto)"]["agrees"] is True
    assert agreement["off"]["agrees"] is False
    assert agreement["nan"]["agrees"] is False
    assert agreement["fails"]["agrees"] is None
    assert "no kernel image" in str(agreement["fails"]["reason"])


def test_a_loss_that_varies_is_not_reproducible(small: profiles.Profile) -> None:
    turns = iter(range(100))

    def varies(logits: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(logits, labels) + next(turns)

    found = [
        peers.Peer("bags (good)", F.cross_entropy, grouped=True),
        peers.Peer("bags (bad)", varies, grouped=True),
        peers.Peer("original", varies, grouped=True),
    ]
    same = bench_loss.check_reproducible(found, small, CPU)
    assert same == {"bags (good)": True, "bags (bad)": False}


@pytest.mark.parametrize("ratio", [0.0, 2.0, 8.0])
def test_both_loops_draw_the_method_s_number_of_others(
    ratio: float, small: profiles.Profile
) -> None:
    """With equal logits the loss depends on how many rows count, not on which."""
    labels = profiles.draw_labels(100, 0.3, small, seed=2)
    logits = torch.zeros(100, small.num_logits)
    # One column raised makes others and foreground differ in their loss.
    for start in small.layout.group_starts:
        logits[:, start] = 3.0
    ours = grouped_softmax_loss(logits, labels, small.layout, others_ratio=ratio)
    found, _ = peers.loss_peers(small, ratio, CPU, [], compiled=False)
    for peer in found:
        if peer.grouped:
            torch.testing.assert_close(peer.loss(logits, labels), ours, rtol=1e-5, atol=1e-6)


def test_the_merge_of_the_original_is_ours(small: profiles.Profile) -> None:
    logits = 5 * torch.randn(7, small.num_logits)
    merged = peers.merge_as_original(logits, **peers.score_arguments(small, CPU))
    expected = grouped_softmax_scores(logits, small.layout)
    torch.testing.assert_close(merged, expected, rtol=0, atol=1e-6)


# --- measuring -----------------------------------------------------------------------------------


def test_what_is_done_before_and_after_a_call_is_not_timed() -> None:
    order: list[str] = []
    timings = timing.interleave(
        {"one": lambda turn: order.append("one"), "two": lambda turn: order.append("two")},
        rounds=1,
        warmup=0,
        before={"one": lambda turn: order.append("before one")},
        after=lambda turn: order.append("after"),
    )
    assert set(timings) == {"one", "two"}
    first = order.index("one")
    assert order[first - 1] == "before one"
    assert order.count("before one") == 1
    assert order[first + 1] == "after"


@pytest.mark.skipif(not peak_memory.RESET.exists(), reason="needs Linux's /proc")
def test_peak_memory_is_that_of_all_pages_taken() -> None:
    ratios = peak_memory.in_fresh_process(["--rows", "2048"])
    # Log-probabilities, their gradient, the gradient of the logits.
    assert 2.5 < ratios["dense"] < 3.5
    assert 0.5 < ratios["bags (auto)"] < ratios["dense"]


def test_peak_memory_that_cannot_be_measured_is_an_error() -> None:
    with pytest.raises(RuntimeError, match="foreground row"):
        peak_memory.in_fresh_process(["--rows", "8", "--foreground", "0.1", "--all-active"])


def test_one_failure_leaves_the_other_measurements(small: profiles.Profile) -> None:
    def fails(logits: Tensor, labels: Tensor) -> Tensor:
        raise RuntimeError("out of memory\nand more")

    found = [
        peers.Peer("bags (fails)", fails, grouped=True),
        peers.Peer("dense", F.cross_entropy, grouped=False),
    ]
    options = bench_loss.parse_loss(TINY)
    result = Result(Case("small", small.num_logits, "float32", 16, 0.25))
    bench_loss.Bench(found, small, 8.0, options).measure(result)
    assert list(result.times["both, wall"]) == ["dense", "copy"]
    assert result.problems == ["bags (fails): out of memory"]


def test_a_gpu_s_measurements_are_kept_and_its_failures_noted(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def sometimes_out_of_memory(step: timing.Call, *rest: object, **more: object) -> Timing:
        if step(0) == "large":
            raise RuntimeError("CUDA out of memory")
        return fixed(3.0)

    waits = {"small": 0, "large": 0, "waits": 2}
    monkeypatch.setattr(cuda_measures, "host_waits", lambda step, device: waits[step(0)])
    monkeypatch.setattr(cuda_measures, "peak_bytes", lambda step, device: 50)
    monkeypatch.setattr(cuda_measures, "launches", lambda step, device: (7, fixed(0.5)))
    monkeypatch.setattr(cuda_measures, "graph_time", sometimes_out_of_memory)
    steps = {name: (lambda turn, name=name: name) for name in waits}
    result = Result(Case("lvis_v1", 1209, "float32", 8, 0.1))
    cuda_measures.measure_steps(result, steps, buffers=3, bytes_of_logits=100, rounds=1, device=CPU)
    assert cuda_measures.BUSY not in result.times  # a profiler would slow what is timed later
    cuda_measures.measure_launches(result, steps, CPU)
    assert result.counts == {
        "waits of the host": waits,
        "peak memory / logits": dict.fromkeys(waits, 0.5),
        "launches": dict.fromkeys(waits, 7),
    }
    assert {kind: list(times) for kind, times in result.times.items()} == {
        "graph, cold": ["small"],
        "graph, warm": ["small"],
        cuda_measures.BUSY: ["small", "large", "waits"],
    }
    assert result.problems == [
        "large, graph, cold: CUDA out of memory",
        "large, graph, warm: CUDA out of memory",
        "waits, graph: cannot be captured, as the host waits in it",
    ]


def test_work_on_a_gpu_belongs_to_the_step_that_began_last() -> None:
    def event(category: str, start: float, microseconds: float, name: str = "") -> dict[str, Any]:
        return {"cat": category, "ts": start, "dur": microseconds, "name": name}

    trace = [event("user_annotation", start, 90, cuda_measures.STEP) for start in (300, 100, 200)]
    trace += [event("user_annotation", 250, 5, "another"), {"name": "an event without a category"}]
    trace += [event("kernel", 110, 1), event("kernel", 120, 1)]
    trace += [event("kernel", 210, 3), event("gpu_memset", 220, 2)]
    trace += [event("kernel", 310, 4), event("gpu_memcpy", 320, 5), event("kernel", 330, 40)]
    number, busy = cuda_measures.median_step(trace)
    assert number == 2
    assert (busy.minimum, busy.median, busy.runs) == (0.002, 0.005, 3)
    with pytest.raises(RuntimeError, match="saw no work"):
        cuda_measures.median_step(trace[:3])


def test_a_trace_has_the_marks_of_its_steps(tmp_path: Path) -> None:
    with torch.profiler.profile() as profiler:
        for _ in range(3):
            with torch.profiler.record_function(cuda_measures.STEP):
                torch.ones(3).add_(1)
    profiler.export_chrome_trace(str(tmp_path / "trace.json"))
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    work = [event | {"cat": "kernel"} for event in events if event["name"] == "aten::add_"]
    number, busy = cuda_measures.median_step([*events, *work])
    assert (number, busy.runs) == (1, 3)


@pytest.mark.gpu
@needs_gpu
def test_measures_of_a_gpu() -> None:
    device = torch.device("cuda")
    values = [torch.randn(1 << 20, device=device) for _ in range(3)]

    def double(turn: int) -> Tensor:
        return values[turn % 3] * 2

    def waits(turn: int) -> float:
        return values[turn % 3].sum().item()

    number, busy = cuda_measures.launches(double, device)
    assert number == 1
    assert 0 < busy.median < 1
    assert busy.runs == cuda_measures.TRACED
    assert cuda_measures.host_waits(double, device) == 0
    assert cuda_measures.host_waits(waits, device) == 1
    assert cuda_measures.peak_bytes(double, device) == 4 << 20
    for buffers in (1, 3):
        graphed = cuda_measures.graph_time(double, device, buffers=buffers, rounds=3)
        assert 0 < graphed.median < 1
    values.append(torch.randn(1000, device=device))
    assert cuda_measures.peak_bytes(lambda turn: values[3] * 2, device) == 4000


CAPTURE_THAT_FAILS = """
import torch
from cuda_measures import free_memory, graph_time

device = torch.device("cuda")
value = torch.ones(3, device=device)
try:
    graph_time(lambda turn: value.sum().item(), device, buffers=1, rounds=1)
except RuntimeError:
    free_memory()
    assert torch.rand(3, device=device).min() >= 0
    print("drawing still works")
"""


@pytest.mark.gpu
@needs_gpu
def test_a_capture_that_fails_leaves_the_rest() -> None:
    """In a process of its own, as older versions of PyTorch keep traces of it."""
    command = [sys.executable, "-c", CAPTURE_THAT_FAILS]
    done = subprocess.run(command, cwd=BENCHMARKS, capture_output=True, text=True, check=False)
    assert done.stdout == "drawing still works\n", done.stderr


@pytest.mark.gpu
@needs_gpu
def test_benchmarks_run_on_a_gpu(tmp_path: Path) -> None:
    record = tmp_path / "record.json"
    arguments = ["--device", "cuda", "--rows", "64", "--foreground", "0.25", *TINY]
    assert bench_loss.main([*arguments, "--json", str(record)]) == 0
    result = records.read_results(json.loads(record.read_text())["results"])[0]
    for kind in ("both, wall", "graph, cold", "graph, warm"):
        assert {"bags (auto)", "loop", "dense", "copy"} <= set(result.times[kind])
    assert result.counts["waits of the host"]["loop"] == 0
    assert result.counts["waits of the host"]["original"] > 10


# --- records and goals ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "text"),
    [(None, "-"), (0, "0"), (0.01234, "0.0123"), (1.234, "1.23"), (12.34, "12.3"), (1235, "1235")],
)
def test_numbers_have_three_digits(value: float | None, text: str) -> None:
    assert records.number(value) == text


def test_results_survive_json() -> None:
    case = Case("lvis_v1", 1209, "float16", 300)
    result = Result(case, None, {"scores, wall": {"copy": fixed(2)}}, {"launches": {"copy": 1}})
    result.attempt("ours", lambda: 1 / 0)
    written = json.dumps([result], default=records.asdict)
    assert records.read_results(json.loads(written)) == [result]
    assert result.problems == ["ours: division by zero"]


def test_a_file_is_replaced_whole_or_not_at_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "new" / "file.json"
    records.write_json(file, {"a": 1})
    assert json.loads(file.read_text()) == {"a": 1}

    def stopped(*paths: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(records.os, "replace", stopped)
    with pytest.raises(KeyboardInterrupt):
        records.write_json(file, {"a": 2})
    assert json.loads(file.read_text()) == {"a": 1}
    assert list(file.parent.iterdir()) == [file]


def measured_loss(
    rows: int, original: float, dense: float, peak: float, foreground: float = 0.25
) -> Result:
    times = {"bags (auto)": fixed(2.0), "original": fixed(original), "dense": fixed(dense)}
    case = Case("lvis_v0.5", 1236, "float32", rows, foreground)
    return Result(case, 0.3, {goals.BOTH: times}, {goals.MEMORY: {"bags (auto)": peak}})


def verdicts(measured: goals.Measurements, start: str) -> dict[str, str]:
    found = goals.all_goals(measured)
    return {goal.what: goal.verdict for goal in found if goal.what.startswith(start)}


def test_goals_are_judged_by_the_worst_size() -> None:
    good = [
        measured_loss(rows, 30.0, 30.0, 1.1, share)
        for rows in (1024, 8192)
        for share in goals.SHARES
    ]
    bad = measured_loss(2048, 5.0, 1.0, 5.0)
    measured = goals.Measurements("cpu", loss=good)
    faster = "CPU, L = 1236, R >= 1024: original / loss + backward"
    assert verdicts(measured, faster) == {faster: "met"}
    assert verdicts(measured, "CPU, L = 1236, R = 8192: loss").popitem()[1] == "met"
    assert verdicts(measured, "CPU, L = 1236, R = 8192: peak").popitem()[1] == "met"
    measured.loss.append(bad)
    assert verdicts(measured, faster) == {faster: "missed"}
    assert verdicts(measured, "CPU, L = 1236, R = 8192: loss").popitem()[1] == "met"
    assert verdicts(measured, "CPU, L = 1236, R = 128").popitem()[1] == "not measured"
    assert set(verdicts(measured, "GPU").values()) == {"not measured"}


def test_a_goal_is_not_met_where_a_size_that_it_needs_was_not_measured() -> None:
    faster = "CPU, L = 1236, R >= 1024: original / loss + backward"
    quick = [measured_loss(rows, 30.0, 30.0, 1.1) for rows in (1024, 8192)]
    measured = goals.Measurements("cpu", loss=quick)
    (goal,) = (goal for goal in goals.all_goals(measured) if goal.what == faster)
    assert goal.verdict == "incomplete"
    missing = "float32, L = 1236, R = 1024, 10% and 3 more"
    assert goal.found.endswith(f"; not measured: {missing}")
    quick[0].times[goals.BOTH]["original"] = fixed(5.0)
    assert verdicts(measured, faster) == {faster: "missed"}
    # One that is not needed, but was tried and failed, is missing too.
    every = [measured_loss(r, 30.0, 30.0, 1.1, s) for r in (1024, 8192) for s in goals.SHARES]
    failed = Result(Case("lvis_v0.5", 1236, "float32", 2048, 0.25))
    measured = goals.Measurements("cpu", loss=[*every, failed])
    assert verdicts(measured, faster) == {faster: "incomplete"}
    only_failed = goals.Measurements("cpu", loss=[failed])
    (goal,) = (goal for goal in goals.all_goals(only_failed) if goal.what == faster)
    assert (goal.verdict, goal.found) == ("not measured", "a measurement failed or was skipped")


def test_a_scaled_loss_is_not_judged() -> None:
    every = [measured_loss(r, 30.0, 30.0, 1.1, s) for r in (1024, 8192) for s in goals.SHARES]
    slow = measured_loss(1024, 1.0, 1.0, 1.1)
    slow.case = replace(slow.case, loss_scale=65536.0)
    measured = goals.Measurements("cpu", loss=[*every, slow])
    faster = "CPU, L = 1236, R >= 1024: original / loss + backward"
    assert verdicts(measured, faster) == {faster: "met"}
    assert slow.case.labels == "25%, loss x 65536"


def detections(**changes: Any) -> list[dict[str, Any]]:
    cases = [("trained", False), ("trained", True), ("whole", True)]
    size = {"score_threshold": 0.0, "rows": 1000, "categories": 1203} | changes
    return [
        {"case": {"kind": kind, "per_class": each, **size}, "ratio": 100.0, "identical": True}
        for kind, each in cases
    ]


def test_the_goal_of_detections_needs_its_size_and_every_kind() -> None:
    def verdict(entries: list[dict[str, Any]]) -> str:
        measured = goals.Measurements("cpu", detections=entries)
        return verdicts(measured, "CPU, detections").popitem()[1]

    assert verdict(detections()) == "met"
    assert verdict(detections()[:2]) == "incomplete"
    assert verdict(detections(rows=20)) == "not measured"
    slow = detections()
    slow[1]["ratio"] = 49.0
    assert verdict(slow) == "missed"


def test_a_full_run_measures_what_the_goals_need() -> None:
    for device, programs in (
        ("cpu", ((bench_loss, goals.CPU_LOSS), (bench_scores, goals.CPU_SCORES))),
        ("cuda", ((bench_loss, goals.GPU_LOSS), (bench_scores, goals.GPU_SCORES))),
    ):
        for program, rules in programs:
            needed = {case for rule in rules for case in rule.needs}
            assert needed
            assert needed <= {case for case, _ in cases_of(program, device)}


def cases_of(program: Any, device: str) -> Iterator[tuple[Case, argparse.Namespace]]:
    """The sizes that a full run measures with a program, and the options with which it does."""
    for script, *arguments in run_all.parts_to_run(device, quick=False):
        if script != f"{program.__name__}.py":
            continue
        arguments = ["cpu" if a == "cuda" else a for a in arguments]
        if program is bench_loss:
            options = bench_loss.parse_loss(arguments)
        else:
            parser = bench_scores.common_parser("", bench_scores.ROWS)
            options = bench_scores.parse(parser, arguments)
        for name in options.layout:
            for case in program.cases(profiles.named_profile(name), options):
                yield case, options


def test_goals_of_a_gpu() -> None:
    def result(rows: int, all_active: bool, ours: float) -> Result:
        case = Case("lvis_v0.5", 1236, "float32", rows, 0.10, all_active)
        times = {"bags (auto)": ours, "copy": 1.0, "dense": 3.0, "dense, QuACK": 2.0}
        cold = {name: fixed(value) for name, value in times.items()}
        cold["loop, compiled"] = fixed(2.1 * ours)
        busy = cold | {"dense, Liger": fixed(1.5)}
        wall = {"original": fixed(200 * ours)}
        counts = {goals.MEMORY: {"bags (auto)": 1.0}, goals.WAITS: {"bags (auto)": 0}}
        times_of = {goals.COLD: cold, goals.BUSY: busy, goals.BOTH: wall}
        return Result(case, 0.15, times_of, counts)

    loss = [result(8192, True, 1.05), result(8192, False, 0.6), result(512, False, 0.008)]
    same = {"lvis_v0.5": {"bags (auto)": True}}
    measured = goals.Measurements("cuda", loss=loss, reproducible=same)
    found = {goal.what: goal for goal in goals.all_goals(measured)}
    missed = {what for what, goal in found.items() if goal.verdict == "missed"}
    assert missed == set()
    assert {w for w, g in found.items() if g.verdict == "not measured" and w[0] == "G"} == {
        what for what in found if what.startswith("GPU, scores")
    }
    # The best dense one is Liger's: 1.5 / 0.6, as no graph can hold it.
    dense = "GPU, 10 % foreground, R >= 8192: best dense cross-entropy / ours"
    assert found[dense].found.startswith("2.50 ")
    assert "10%; best: dense, Liger)" in found[dense].found
    for times in loss[1].times.values():
        times.pop("dense, Liger", None)
    found = {goal.what: goal for goal in goals.all_goals(measured)}
    assert "10%; best: dense, QuACK; without dense, Liger)" in found[dense].found
    loss[1].counts[goals.WAITS]["bags (auto)"] = 1
    same["lvis_v0.5"]["bags (auto)"] = False
    found = {goal.what: goal for goal in goals.all_goals(measured)}
    missed = {what for what, goal in found.items() if goal.verdict == "missed"}
    assert missed == {
        "GPU, loss: waits of the host",
        "GPU, loss and gradient for the same seed",
    }


def test_scores_of_16_bits_are_not_held_against_a_copy_of_fewer_bytes() -> None:
    def result(dtype: str, rows: int, ours: float) -> Result:
        times = {"bags (auto)": fixed(ours), "copy": fixed(1.0)}
        return Result(Case("lvis_v0.5", 1236, dtype, rows), None, {goals.COLD: times})

    wide = [result("float32", rows, 1.1) for rows in (8192, 65536)]
    measured = goals.Measurements("cuda", scores=[wide[0], result("bfloat16", 8192, 1.5)])
    goal = "GPU, scores, float32, R >= 8192: ours / copy"
    assert verdicts(measured, goal).popitem()[1] == "incomplete"
    measured.scores.append(wide[1])
    assert verdicts(measured, goal).popitem()[1] == "met"


def test_a_value_that_rounds_to_the_limit_shows_why_it_missed() -> None:
    measured = goals.Measurements("cpu", loss=[measured_loss(1024, 5.998, 9.0, 1.0)])
    name = "CPU, L = 1236, R >= 1024: original / loss + backward"
    goal = next(goal for goal in goals.all_goals(measured) if goal.what == name)
    assert goal.verdict == "missed"
    assert goal.found.startswith("2.999 ")


# --- one command, one page -----------------------------------------------------------------------

LOSS_PART = ["bench_loss.py", "--rows", "16", "32", "--foreground", "0.25", *TINY]


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a run of small parts writes; one of the parts fails."""
    folder = tmp_path_factory.mktemp("results")
    detections = ["bench_detections.py", "--rows", "20", "--categories", "30", "--rounds", "1"]
    parts = [
        LOSS_PART,
        ["bench_scores.py", "--rows", "8", "16", *TINY],
        [*detections, "--quick"],
        ["bench_loss.py", "--rows", "many"],
    ]
    for suffix in run_all.PLOTS:
        (folder / f"{run_all.machine_name(CPU)}-{suffix}.png").write_text("an earlier run's")
    (folder / "another-machine-loss-graph.png").write_text("another machine's")
    arguments = ["--device", "cpu", "--quick", "--minutes", "inf", "--output", str(folder)]
    assert run_all.main(arguments, parts) == 1
    return folder


def test_the_page_says_everything(results: Path) -> None:
    (page_file,) = results.glob("*.md")
    page = page_file.read_text()
    for heading in ("Goals", "Faults", "Agreement", "Loss and gradient", "Scores", "Detections"):
        assert f"\n## {heading}\n" in page
    assert "| GPU, all active, R >= 8192: loss + gradient / copy | <= 1.10 |" in page
    assert "both, wall, median milliseconds" in page
    # The part that failed, with its own words; the others are there all the same.
    assert "`python benchmarks/bench_loss.py --rows many`: bench_loss.py: error" in page
    assert "dense, Liger: liger-kernel needs a GPU" in page
    assert "most sizes and rounds: --quick" in page
    assert "\n- loss, lvis_v1, float16: R = 512, R = 1024, R = 8192, R = 65536\n" in page
    assert "Out of time" not in page
    names = {file.name for file in results.iterdir()}
    stem = page_file.stem
    written = {f"{stem}.md", f"{stem}.json", f"{stem}-loss.png", f"{stem}-scores.png"}
    assert names == written | {"another-machine-loss-graph.png"}
    assert f"]({stem}-loss.png)" in page
    assert (results / f"{stem}-loss.png").read_bytes().startswith(b"\x89PNG")


def test_the_record_says_how_it_was_made(results: Path) -> None:
    (file,) = results.glob("*.json")
    record = json.loads(file.read_text())
    assert record["machine"] == file.stem
    assert {"commit", "torch", "numpy", "python", "processor"} <= record["environment"].keys()
    assert len(record["parts"]) == 4
    assert record["parts"][0]["command"].startswith("python benchmarks/bench_loss.py --rows 16 32")
    assert {goal["verdict"] for goal in record["goals"]} <= {
        "met",
        "missed",
        "incomplete",
        "not measured",
    }


def test_a_run_that_is_stopped_leaves_older_results(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    older = {}
    for suffix in (".md", ".json", "-loss.png"):
        file = tmp_path / f"{run_all.machine_name(CPU)}{suffix}"
        file.write_text("older")
        older[file] = "older"

    def stopped(*arguments: object) -> Part:
        raise KeyboardInterrupt

    monkeypatch.setattr(run_all, "run_part", stopped)
    with pytest.raises(KeyboardInterrupt):
        run_all.main(["--device", "cpu", "--output", str(tmp_path)], [LOSS_PART])
    assert {file: file.read_text() for file in tmp_path.iterdir()} == older


def test_ctrl_c_keeps_the_parts_that_are_done_beside_older_results(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stem = run_all.machine_name(CPU)
    (tmp_path / f"{stem}.md").write_text("older")
    parts = iter([Part("python first.py", None, "no kernel image")])

    def run_part(*arguments: object) -> Part:
        for part in parts:
            return part
        raise KeyboardInterrupt

    monkeypatch.setattr(run_all, "run_part", run_part)
    arguments = ["--device", "cpu", "--output", str(tmp_path)]
    assert run_all.main(arguments, [LOSS_PART, LOSS_PART]) == 1
    page = (tmp_path / f"{stem}-interrupted.md").read_text()
    assert "Interrupted" in page
    assert "`python first.py`: no kernel image" in page
    assert (tmp_path / f"{stem}-interrupted.json").exists()
    assert (tmp_path / f"{stem}.md").read_text() == "older"


def test_a_page_that_cannot_be_written_is_shown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(path: Path, content: bytes) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr(run_all, "write_bytes", full)
    with pytest.raises(SystemExit, match="No space left"):
        run_all.main(["--device", "cpu", "--output", str(tmp_path)], [])
    assert "## Skipped and not measured" in capsys.readouterr().out


def test_parts_without_time_are_no_fault(tmp_path: Path) -> None:
    arguments = ["--device", "cpu", "--minutes", "0", "--output", str(tmp_path)]
    assert run_all.main(arguments, [LOSS_PART]) == 0
    (page_file,) = tmp_path.glob("*.md")
    page = page_file.read_text()
    assert "## Faults" not in page
    late = page.split("\n## Out of time\n")[1].split("\n## ")[0]
    assert "--rows 16 32" in late
    assert "not started, the time was over" in late


def test_how_a_part_ended() -> None:
    def blame(status: int, stopped: bool, record: dict[str, Any] | None) -> dict[str, str]:
        ended = children.Ended(status, stopped, "Traceback\nValueError: no")
        return run_all._how_it_ended(ended, record, 90.0)

    assert blame(0, False, {"faults": []}) == {}
    assert blame(1, False, {"faults": ["it disagrees"]}) == {}
    assert blame(1, False, {"faults": []}) == {"problem": "ValueError: no"}
    assert blame(1, False, None) == {"problem": "ValueError: no"}
    assert blame(-9, True, {"faults": []}) == {"late": "stopped after 90 seconds"}
    assert "without a result" in blame(-9, True, None)["problem"]


def test_a_child_is_stopped_when_its_time_is_over() -> None:
    said: list[str] = []
    code = "import time; print('begun', flush=True); time.sleep(100)"
    ended = children.run_child([sys.executable, "-c", code], 5.0, said.extend)
    assert (said, ended.stopped) == (["begun\n"], True)


@pytest.mark.filterwarnings("error::pytest.PytestUnhandledThreadExceptionWarning")
@pytest.mark.parametrize("seconds", [60.0, math.inf])
def test_a_child_has_its_time(seconds: float) -> None:
    said: list[str] = []
    code = "import sys; print('done'); sys.exit('no more')"
    ended = children.run_child([sys.executable, "-c", code], seconds, said.extend)
    assert said == ["done\n"]
    assert ended == children.Ended(1, False, "no more")


def test_the_gpu_tests_take_none_of_the_benchmarks_minutes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [1000.0]

    def run_tests() -> str:
        now[0] += 3600
        return "passed"

    given = []

    def run_part(arguments: list[str], seconds: float) -> Part:
        given.append(seconds)
        return Part("", None)

    monkeypatch.setattr(run_all.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(run_all, "run_tests", run_tests)
    monkeypatch.setattr(run_all, "run_part", run_part)
    arguments = ["--device", "cpu", "--tests", "--minutes", "8", "--output", str(tmp_path)]
    assert run_all.main(arguments, [LOSS_PART]) == 0
    assert given == [480.0]


def test_sizes_of_one_table_are_measured_alike() -> None:
    """And losses are scaled at some of them."""
    for device in ("cpu", "cuda"):
        for program in (bench_loss, bench_scores):
            bursts: dict[tuple[str, str], set[int]] = {}
            for case, options in cases_of(program, device):
                bursts.setdefault((case.layout, case.dtype), set()).add(options.burst)
            assert all(len(different) == 1 for different in bursts.values())
        assert any(case.loss_scale > 1 for case, _ in cases_of(bench_loss, device))


def test_sizes_that_are_left_open_are_listed() -> None:
    def result(rows: int, share: float, *, all_active: bool = False) -> Result:
        case = Case("lvis_v0.5", 1236, "float32", rows, share, all_active)
        return Result(case, times={"both, wall": {"copy": fixed(1)}})

    shares = (0.0, 0.05, 0.10, 0.25)
    results = [result(rows, share) for rows in matrix.ROWS for share in shares]
    results += [result(rows, 0.25, all_active=True) for rows in matrix.ROWS[1:]]
    failed = result(8192, 0.10)
    failed.times = {"both, wall": {}}
    results[results.index(result(8192, 0.10))] = failed
    lines = matrix.unmeasured(results)
    assert lines[0] == "loss, lvis_v0.5, float32: R = 512 (all active), R = 8192 (10%)"
    assert len(lines) == 3 * 3


def test_parts_of_the_same_size_are_put_together() -> None:
    case: dict[str, Any] = {"layout": "lvis_v0.5", "logits": 1236, "dtype": "float32", "rows": 8}
    case |= {"foreground": 0.1, "all_active": False}

    def part(kind: str, milliseconds: float) -> Part:
        times = {kind: {"copy": records.asdict(fixed(milliseconds))}}
        entry = {"case": case, "live": 0.2, "times": times, "counts": {}, "problems": [kind]}
        return Part("", {"benchmark": "loss", "results": [entry]})

    parts = [part("both, wall", 1), part("forward, wall", 2), part("both, wall", 3)]
    found = measurements(Outcome("m", "cpu", {}, "", parts))
    assert len(found.loss) == 1
    medians = {kind: times["copy"].median for kind, times in found.loss[0].times.items()}
    assert medians == {"both, wall": 1, "forward, wall": 2}
    page = make_page(Outcome("m", "cpu", {}, "", parts, tests="3 passed"), found, {})
    assert page.index("## GPU tests\n\n3 passed") < page.index("## Goals")


def test_every_part_of_every_run_can_be_parsed() -> None:
    """A slip in the arguments of a part that needs a GPU shows here."""
    for device in ("cpu", "cuda"):
        for quick in (False, True):
            for script, *arguments in run_all.parts_to_run(device, quick):
                arguments = ["cpu" if a == "cuda" else a for a in arguments]
                if script == "bench_loss.py":
                    options = bench_loss.parse_loss(arguments)
                    assert options.compile is None or set(options.compile) <= set(options.rows)
                elif script == "bench_scores.py":
                    bench_scores.parse(bench_scores.common_parser("", bench_scores.ROWS), arguments)
                else:
                    bench_detections.parse(arguments)


@pytest.mark.parametrize(
    ("kind", "text"),
    [
        (option_types.whole, "0"),
        (option_types.whole, "1.5"),
        (option_types.seed, "-1"),
        (option_types.share, "1.1"),
        (option_types.share, "x"),
        (option_types.output_file, "."),
        (option_types.output_file, "pipe"),
        (option_types.output_folder, "pipe"),
        (option_types.counts_file, "none.json"),
        (option_types.counts_file, "other.json"),
    ],
    ids=lambda value: value if isinstance(value, str) else value.__name__,
)
def test_options_that_may_not_be(
    kind: Any, text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    os.mkfifo("pipe")  # a device must not be replaced either
    Path("other.json").write_text('{"categories": []}')
    with pytest.raises(argparse.ArgumentTypeError, match=r"^expected") as error:
        kind(text)
    assert "Errno" not in str(error.value)
    assert Path("pipe").is_fifo()


def test_the_gpu_tests_are_run_and_summed_up(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def pytest_says(status: int, text: str, stopped: bool = False) -> None:
        def run_child(command: list[str], seconds: float, show: Any, folder: Path) -> Any:
            show(StringIO(text))
            return children.Ended(status, stopped, "")

        monkeypatch.setattr(run_all, "run_child", run_child)

    pytest_says(0, "...\nSKIPPED [1] tests/a.py: because\n3 passed, 1 skipped in 0.1s")
    text = run_all.run_tests()
    assert "gpu`: passed." in text
    assert "because" in text
    assert "...\nSKIPPED" in capsys.readouterr().out
    pytest_says(0, "sss\nSKIPPED [3] tests/a.py: needs a GPU\n3 skipped in 0.1s")
    assert "gpu`: none ran." in run_all.run_tests()
    pytest_says(5, "100 deselected in 0.1s")
    assert "gpu`: none ran." in run_all.run_tests()
    pytest_says(1, "F\nFAILED tests/a.py::b - no\n1 failed in 0.1s")
    assert "gpu`: FAILED (exit status 1)." in run_all.run_tests()
    pytest_says(-9, "...", stopped=True)
    assert "gpu`: FAILED (stopped after 30 minutes)." in run_all.run_tests()
