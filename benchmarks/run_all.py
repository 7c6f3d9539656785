"""Runs all benchmarks, and the GPU tests if asked to, and puts the outcome on one page.

Writes `<machine>.json`, `<machine>.md` and plots to `benchmarks/results`, each in one piece at the
end, so that a run that is stopped leaves older results as they were; after Ctrl-C the parts that
are done go to `<machine>-interrupted.*`. Every part runs in a process of its own: one that fails
is named on the page, and the others still count.

    python benchmarks/run_all.py
    python benchmarks/run_all.py --device cpu --quick
    python benchmarks/run_all.py --device cuda --tests

The first takes a GPU if there is one, and else the CPU. The last is the check of a GPU: tests,
goals and figures.
"""

import argparse
import json
import shlex
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any

import torch
from arguments import device_name, limit, output_folder
from children import Ended, run_child
from goals import BOTH, COLD, SCORES, Measurements, all_goals
from machine import environment, machine_name
from page import Outcome, Part, goals_table, make_page, measurements
from records import write_bytes, write_json

from balanced_group_softmax.cli_program import HelpFormatter, ended

STATUS = """\
exit status: 0 if done; 1 if a part or a test failed or the run was stopped by Ctrl-C (130 before
its first part was done), or the page could not be written; 2 if the usage is wrong.
"""
HERE = Path(__file__).resolve().parent
SHARES = ["0.05", "0.10", "0.25"]
SCALED = ["--loss-scale", "65536", "--dtype", "float32", "float16"]
PLOTS = {
    "loss-graph": ("Loss and gradient", COLD),
    "loss": ("Loss and gradient", BOTH),
    "scores-graph": ("Scores", COLD),
    "scores": ("Scores", SCORES),
}
"""Of each, what its file's name ends with: the title, and the kind of time."""
NO_TESTS = 5
"""How pytest says that no test was chosen."""
FAILED = "FAILED"
GRACE = 120
"""Seconds that a part may go on beyond its minutes, for the size that it is at."""
TEST_SECONDS = 30 * 60
"""For the tests that need a GPU; they take none of the benchmarks' minutes."""


def parts_to_run(device: str, quick: bool) -> list[list[str]]:
    """Programs and their arguments; what the goals need comes first."""
    if device == "cpu":
        return _quick_cpu_parts() if quick else _cpu_parts()
    parts = _quick_cuda_parts() if quick else _cuda_parts()
    return [[*part, "--device", device] for part in parts]


def _cpu_parts() -> list[list[str]]:
    loss = ["bench_loss.py", "--memory", "kept"]
    short = [*loss, "--max-seconds", "5"]
    scores = ["bench_scores.py", "--memory", "kept", "--max-seconds", "5"]
    wide = ["--layout", "v3det", "--burst", "1", "--max-seconds", "8"]
    return [
        [*loss, "--foreground", *SHARES, "--peaks", "8192", "--max-seconds", "10"],
        [*scores, "--layout", "lvis_v0.5", "lvis_v1"],
        ["bench_detections.py", "--quick", "--rounds", "3"],
        [*loss, *wide, "--foreground", *SHARES, "--rows", "512", "1024"],
        [*loss, *wide, "--foreground", "0.25", "--rows", "8192", "--rounds", "3"],
        [*short, "--foreground", "0", "all", "--rows", "1024", "8192", "--peaks", "8192"],
        [*short, "--foreground", "0.25", "--rows", "1024", "--passes", "forward", "backward"],
        [*short, "--layout", "lvis_v1", "--foreground", "0.10"],
        [*short, "--dtype", "bfloat16", "float16", "--foreground", "0.10", "--rows", "1024"],
        [*scores, *wide, "--rows", "1000"],
        [*short, *SCALED, "--foreground", "0.25", "--rows", "1024"],
        [*short, "--foreground", "0.25", "--rows", "2048", "--compile"],
    ]


def _quick_cpu_parts() -> list[list[str]]:
    loss = ["bench_loss.py", "--memory", "kept", "--quick"]
    return [
        [*loss, "--peaks", "8192", "--burst", "4", "--max-seconds", "3"],
        ["bench_scores.py", "--memory", "kept", "--quick", "--rows", "1000", "--max-seconds", "2"],
        ["bench_detections.py", "--quick", "--rounds", "1"],
        [*loss, "--layout", "v3det", "--rows", "512", "--burst", "1", "--max-seconds", "2"],
    ]


def _cuda_parts() -> list[list[str]]:
    loss = ["bench_loss.py", "--max-seconds", "3", "--rounds", "20"]
    scores = ["bench_scores.py", "--max-seconds", "3", "--rounds", "20"]
    both = ["--dtype", "float32", "bfloat16"]
    small, large = ["512", "1024"], ["8192", "65536"]
    passes = ["--passes", "forward", "backward"]
    main = [*loss, *both, "--foreground", "0.10", "all"]
    return [
        [*main, "--rows", *small, *large, "--compile", *small],
        [*scores, *both, "--rows", "300", "1000", *large],
        [*loss, "--foreground", "0", "0.05", "0.25", "--rows", *small, "--compile"],
        ["bench_detections.py", "--quick", "--rounds", "3"],
        [*main, "--layout", "v3det", "--rows", "512", *large],
        [*loss, "--foreground", "0", "0.05", "0.25", "--rows", *large],
        [*loss, *both, "--layout", "lvis_v1", "--foreground", "0.10", "--rows", "1024", *large],
        [*loss, "--dtype", "float16", "--foreground", "0.10", "--rows", "1024", *large],
        [*loss, *passes, "--foreground", "0.10", "--rows", "1024", "8192"],
        [*scores, *both, "--layout", "lvis_v1", "v3det", "--rows", "1000", "8192"],
        [*scores, "--dtype", "float16", "--rows", "1000", "8192"],
        [*loss, *SCALED, "--foreground", "0.10", "--rows", "1024", "8192"],
    ]


def _quick_cuda_parts() -> list[list[str]]:
    loss = ["bench_loss.py", "--max-seconds", "2", "--rounds", "10"]
    return [
        [*loss, "--rows", "1024", "8192", "--foreground", "0.10", "all"],
        ["bench_scores.py", "--max-seconds", "2", "--rounds", "10", "--rows", "1000", "8192"],
        ["bench_detections.py", "--quick", "--rounds", "3"],
    ]


def run_part(arguments: Sequence[str], seconds: float) -> Part:
    """Run one program, show its progress, and read the record that it wrote."""
    command = shlex.join(["python", f"benchmarks/{arguments[0]}", *arguments[1:]])
    print(f"\n{command}", flush=True)
    if seconds <= 0:
        return Part(command, None, late="not started, the time was over")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "record.json"
        limits = [] if "detections" in arguments[0] else ["--minutes", f"{seconds / 60:.2f}"]
        full = [sys.executable, str(HERE / arguments[0]), *arguments[1:], *limits]
        ended = run_child([*full, "--json", str(path)], seconds + GRACE, _show_progress)
        record = json.loads(path.read_text(encoding="utf-8")) if path.exists() else None
    return Part(command, record, **_how_it_ended(ended, record, seconds + GRACE))


def _how_it_ended(ended: Ended, record: Mapping[str, Any] | None, seconds: float) -> dict[str, str]:
    """What a part is to be blamed for, or that it was late; nothing if all went well."""
    if ended.stopped:
        stopped = f"stopped after {seconds:.0f} seconds"
        # One that has measured nothing in that time hangs.
        return {"late": stopped} if record else {"problem": f"{stopped}, without a result"}
    if ended.status != 0 and not (record or {}).get("faults"):
        last_words = ended.errors.splitlines()[-1:]
        return {"problem": " ".join(last_words) or f"exit status {ended.status}"}
    return {}


def _show_progress(output: IO[str]) -> None:
    """Echo lines as they come, up to the tables, which are left to the page."""
    tables = False
    for number, line in enumerate(output):
        tables = tables or not line.strip()
        if number and (not tables or line.startswith("FAULT")):
            print("  " + line.rstrip(), flush=True)


def run_tests() -> str:
    """Run the tests that need a GPU: what pytest says at the end, for the page."""
    print("\npython -m pytest -m gpu", flush=True)
    command = [sys.executable, "-m", "pytest", "-m", "gpu", "-q", "--color=no"]
    # The project's own options would list durations after the outcome.
    command += ["-o", "addopts=-ra --strict-markers", "-p", "no:cacheprovider"]
    said: list[str] = []

    def echo(output: IO[str]) -> None:
        while piece := output.read(1):
            print(piece, end="", flush=True)
            said.append(piece)

    ended = run_child(command, TEST_SECONDS, echo, HERE.parent)
    lines = ("".join(said).strip() or ended.errors or "no output").splitlines()
    marks = ("FAILED", "ERROR", "SKIPPED", "XFAIL", "XPASS")
    summary = [line for line in lines[:-1] if line.startswith(marks)]
    if ended.stopped:
        verdict = f"{FAILED} (stopped after {TEST_SECONDS / 60:.0f} minutes)"
    elif ended.status not in (0, NO_TESTS):
        verdict = f"{FAILED} (exit status {ended.status})"
    else:
        verdict = "passed" if " passed" in lines[-1] else "none ran"
    text = "\n".join([*summary, lines[-1]])
    return f"`python -m pytest -m gpu`: {verdict}.\n\n```text\n{text}\n```"


def draw_pictures(outcome: Outcome, found: Measurements, folder: Path) -> dict[str, str]:
    """Write the plots; the title of each, by file name."""
    try:
        from plots import plot_over_copy
    except ImportError as error:
        outcome.skipped["plots"] = f"{error}: pip install matplotlib"
        return {}
    pictures = {}
    for suffix, (title, kind) in PLOTS.items():
        results = found.loss if suffix.startswith("loss") else found.scores
        png = plot_over_copy(results, kind, title)
        if png is not None:
            file = f"{outcome.name}-{suffix}.png"
            write_bytes(folder / file, png)
            pictures[file] = f"{title}, time over copy time against rows, {kind}"
    return pictures


def write(outcome: Outcome, folder: Path) -> None:
    """Write plots, page and record, and print the goals."""
    found = measurements(outcome)
    goals = all_goals(found)
    print(f"\n{goals_table(goals)}", flush=True)
    record = {
        "machine": outcome.machine,
        "command": outcome.command,
        "environment": outcome.facts,
        "tests": outcome.tests or "not asked for (--tests)",
        "goals": goals,
        "skipped": outcome.skipped,
        "parts": outcome.parts,
    }
    page = folder / f"{outcome.name}.md"
    try:
        pictures = draw_pictures(outcome, found, folder)
        write_bytes(page, make_page(outcome, found, pictures).encode())
        write_json(folder / f"{outcome.name}.json", record)
        for file in (f"{outcome.name}-{suffix}.png" for suffix in PLOTS):
            if file not in pictures:  # one of an earlier run
                (folder / file).unlink(missing_ok=True)
    except OSError as error:
        print(f"\n{make_page(outcome, found, {})}", flush=True)
        raise SystemExit(f"The page could not be written: {error}") from error
    print(f"\nThe page: {page}")


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=STATUS, formatter_class=HelpFormatter
    )
    parser.add_argument(
        "--device",
        type=device_name,
        metavar="NAME",
        help="cpu, cuda or cuda:N (default: cuda if there is a GPU, else cpu)",
    )
    parser.add_argument(
        "--quick", action="store_true", help="only what the main goals need, in fewer rounds"
    )
    parser.add_argument("--tests", action="store_true", help="first run the tests that need a GPU")
    parser.add_argument(
        "--minutes",
        type=limit,
        default=15,
        metavar="M",
        help="minutes after which no new size is begun, the tests not counted (default: 15)",
    )
    parser.add_argument(
        "--output",
        type=output_folder,
        default=str(HERE / "results"),
        metavar="DIR",
        help="folder for page, record and plots, made if it is not there (default: "
        "benchmarks/results)",
    )
    options = parser.parse_args(arguments)
    if options.device is None:
        options.device = "cuda" if torch.cuda.is_available() else "cpu"
    return options


def main(arguments: list[str] | None = None, parts: list[list[str]] | None = None) -> int:
    """Run and write everything.

    Args:
        arguments: of the command line.
        parts: programs and their arguments in place of `parts_to_run`.
    """
    options = parse(arguments)
    given = sys.argv[1:] if arguments is None else arguments
    outcome = new_outcome(options, shlex.join(["python", "benchmarks/run_all.py", *given]))
    if options.tests:
        outcome.tests = run_tests()
    deadline = time.monotonic() + 60 * options.minutes
    try:
        for part in parts if parts is not None else parts_to_run(options.device, options.quick):
            outcome.parts.append(run_part(part, deadline - time.monotonic()))
    except KeyboardInterrupt:
        if not outcome.parts:
            raise
        outcome.interrupted = True
    write(outcome, options.output)
    failed = any(part.problem or (part.record or {}).get("faults") for part in outcome.parts)
    return 1 if failed or outcome.interrupted or FAILED in outcome.tests else 0


def new_outcome(options: argparse.Namespace, command: str) -> Outcome:
    """What is known before anything has run."""
    device = torch.device(options.device)
    outcome = Outcome(
        machine=machine_name(device),
        device=device.type,
        facts={name: fact for name, fact in environment(device).items() if name != "threads"},
        command=command,
        parts=[],
    )
    if device.type != "cuda":
        outcome.skipped["everything on a GPU"] = (
            "--device cpu" if torch.cuda.is_available() else "PyTorch finds no GPU here"
        )
    if options.quick:
        outcome.skipped["most sizes and rounds"] = "--quick"
    outcome.skipped["detections of other kinds of scores"] = "bench_detections.py without --quick"
    return outcome


if __name__ == "__main__":
    raise SystemExit(ended(main))
