"""What `bench_loss.py` and `bench_scores.py` share as programs: options, set-up, report."""

import argparse
import math
import time
from collections.abc import Callable, Sequence
from functools import partial

import numpy as np
import torch
from arguments import counts_file, device_name, limit, output_file, whole
from cuda_measures import free_memory
from machine import environment
from profiles import PUBLISHED, Profile, named_profile, read_profile
from records import OURS, Case, Result, result_tables, write_json
from timing import CLOCKS, hold_memory

from balanced_group_softmax.cli_program import HelpFormatter

STATUS = """\
exit status: 0 if done; 1 if alternatives disagree or the same seed gives other bits, or if this
library could not be measured; 2 if the usage is wrong; 130 after Ctrl-C.
"""
DTYPES = ("float32", "bfloat16", "float16")
Measure = Callable[[Result], None]
MAX_SECONDS = "seconds after which a size gets no new round; it has three in any case"


def common_parser(description: str | None, rows: Sequence[int]) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=description, epilog=STATUS, formatter_class=HelpFormatter
    )
    parser.add_argument(
        "--device",
        type=device_name,
        default="cpu",
        metavar="NAME",
        help="cpu, cuda or cuda:N (default: cpu)",
    )
    parser.add_argument(
        "--dtype",
        nargs="+",
        default=["float32"],
        choices=DTYPES,
        metavar="DTYPE",
        help=f"types of the logits, of {', '.join(DTYPES)} (default: float32)",
    )
    parser.add_argument(
        "--impl",
        nargs="+",
        default=["auto"],
        metavar="NAME",
        help="implementations of ours: auto, triton, torch or reference (default: auto)",
    )
    parser.add_argument(
        "--layout",
        nargs="+",
        default=["lvis_v0.5"],
        choices=list(PUBLISHED),
        metavar="NAME",
        help=f"groups and counts of a data set, of {', '.join(PUBLISHED)} (default: lvis_v0.5)",
    )
    parser.add_argument(
        "--counts",
        type=counts_file,
        metavar="JSON",
        help="in place of --layout, the counts of a JSON list of LVIS categories",
    )
    parser.add_argument(
        "--rows",
        type=whole,
        nargs="+",
        default=list(rows),
        metavar="R",
        help=f"rows of logits, one size each (default: {' '.join(map(str, rows))})",
    )
    parser.add_argument(
        "--threads", type=whole, default=1, metavar="N", help="threads of torch (default: 1)"
    )
    parser.add_argument(
        "--clock",
        choices=list(CLOCKS),
        default="wall",
        help="on the CPU measure wall time, or processor time (cpu) on a machine that others use "
        "too (default: wall)",
    )
    parser.add_argument(
        "--memory",
        choices=["adaptive", "kept", "returned"],
        default="adaptive",
        help="freed memory: kept as in a long-running process, returned to the system as in a "
        "fresh one, or as the C library sees fit (default: adaptive)",
    )
    parser.add_argument(
        "--rounds",
        type=whole,
        default=40,
        metavar="N",
        help="timed rounds of each size (default: 40)",
    )
    parser.add_argument(
        "--burst",
        type=whole,
        default=8,
        metavar="N",
        help="runs in a row, of a round; 1: every run finds the caches full of another "
        "alternative's work (default: 8)",
    )
    parser.add_argument(
        "--max-seconds",
        type=limit,
        default=20.0,
        metavar="S",
        help=f"{MAX_SECONDS} (default: 20)",
    )
    parser.add_argument(
        "--minutes",
        type=limit,
        default=math.inf,
        metavar="M",
        help="minutes after which no new size is begun (default: no limit)",
    )
    parser.add_argument("--quick", action="store_true", help="fewer rounds, fewer sizes")
    parser.add_argument("--json", type=output_file, metavar="OUT", help="write the record here")
    return parser


def parse(parser: argparse.ArgumentParser, arguments: list[str] | None) -> argparse.Namespace:
    options = parser.parse_args(arguments)
    if options.quick:
        options.rounds, options.max_seconds = min(options.rounds, 10), min(options.max_seconds, 5.0)
    return options


class Run:
    """One run of a program: what it has measured so far, and what is to be said of it."""

    def __init__(self, benchmark: str, options: argparse.Namespace) -> None:
        torch.set_num_threads(options.threads)
        hold_memory(options.memory)
        np.random.seed(0)
        torch.manual_seed(0)
        self.benchmark, self.options = benchmark, options
        self.device = torch.device(options.device)
        self.facts = environment(self.device)
        self.deadline = time.monotonic() + 60 * options.minutes
        self.results: list[Result] = []
        self.skipped: dict[str, str] = {}
        self.agreement: dict[str, dict[str, dict[str, object]]] = {}
        self.reproducible: dict[str, dict[str, bool]] = {}
        self.untraced: list[tuple[Result, Measure]] = []
        self.more: dict[str, object] = {}
        print(", ".join(f"{name} {value}" for name, value in self.facts.items()), flush=True)

    def profiles(self) -> list[Profile]:
        if self.options.counts:
            return [read_profile(self.options.counts)]
        return [named_profile(name) for name in self.options.layout]

    def measure(self, case: Case, measure: Measure, launches: Measure) -> None:
        """Measure one size, if there is time, and write the record so far.

        What fails is noted. On a GPU `launches` comes when every size has been timed, as a profiler
        that has run slows what follows.
        """
        if not self._has_time_for(str(case)):
            return
        result = Result(case)
        self.results.append(result)
        result.attempt("this size", partial(measure, result))
        free_memory()
        print(result.progress(), flush=True)
        if self.device.type == "cuda":
            self.untraced.append((result, launches))
        self._write()

    def _has_time_for(self, what: str) -> bool:
        if time.monotonic() <= self.deadline:
            return True
        self.skipped[what] = f"{self.options.minutes:g} minutes were over"
        return False

    def finish(self, *, relative_to: str) -> int:
        """Count launches, print tables and what is missing, write the record; the exit status."""
        for result, launches in self.untraced:
            if self._has_time_for(f"launches, {result.case}"):
                result.attempt("launches", partial(launches, result))
                free_memory()
        print(f"\n{result_tables(self.results, relative_to=relative_to)}\n")
        for result in self.results:
            for problem in result.problems:
                print(f"Not measured: {result.case}: {problem}")
        reasons = [f"{name} ({reason})" for name, reason in self.skipped.items()]
        print(f"Skipped: {'; '.join(reasons) or 'nothing'}")
        faults = self.faults()
        for fault in faults:
            print(f"FAULT: {fault}")
        self._write()
        return 1 if faults else 0

    def _write(self) -> None:
        if self.options.json is None:
            return
        settings = vars(self.options).items()
        record = {
            "benchmark": self.benchmark,
            "environment": self.facts,
            "options": {name: str(value) for name, value in settings if name != "json"},
            "agreement": self.agreement,
            "reproducible": self.reproducible,
            **self.more,
            "results": self.results,
            "skipped": self.skipped,
            "faults": self.faults(),
        }
        write_json(self.options.json, record)

    def faults(self) -> list[str]:
        """What must not happen: losses that disagree or vary, or none of ours."""
        faults = [
            f"{name} disagrees, {layout}: {facts}"
            for layout, found in self.agreement.items()
            for name, facts in found.items()
            if facts["agrees"] is not True
        ]
        faults += [
            f"{name} differs for the same seed, {layout}"
            for layout, found in self.reproducible.items()
            for name, same in found.items()
            if not same
        ]
        names = {name for r in self.results for times in r.times.values() for name in times}
        if self.results and not any(name.startswith(OURS) for name in names):
            faults.append("this library was not measured")
        return faults
