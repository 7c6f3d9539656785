"""Time and memory of the grouped softmax loss and its gradient, against the alternatives.

All of them (`peers.py` says what they are) run in one process on the same logits and labels,
interleaved; `copy` is a `copy_` of the logits into memory that is there already, the floor that
memory sets. Labels are drawn by instance counts (`profiles.py`); `live` is the share of the matrix
that counts in the loss.

On the CPU: wall time, and the peak of memory in a process of its own (`peak_memory.py`). On a GPU
also the time within a CUDA graph, with buffers that rotate through more than the L2 cache holds
("cold") and with one buffer ("warm"); launches, waits of the host and peak memory of a step.

    python benchmarks/bench_loss.py --quick
    python benchmarks/bench_loss.py --memory kept --json results/loss.json
    python benchmarks/bench_loss.py --layout v3det --rows 1024 --peaks 1024
    python benchmarks/bench_loss.py --device cuda --dtype bfloat16 --compile
"""

import argparse
import itertools
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial

import torch
from arguments import factor, share_of_rows, whole
from buffers import BUFFERS, Copies, LossSteps, bytes_of_logits, make_logits, number_of_buffers
from cuda_measures import measure_launches, measure_steps
from peak_memory import in_fresh_process
from peers import Peer, agreement, loss_peers
from profiles import OTHERS_RATIO, Profile, draw_labels, live_fraction
from program import Run, common_parser, parse
from records import ALL, ALL_ACTIVE_FOREGROUND, OURS, Case, Result, brief
from timing import Call, Timing, interleave

from balanced_group_softmax.cli_program import ended

ROWS = (128, 512, 1024, 8192)
FOREGROUND = ("0.05", "0.10", "0.25")
LOSS_TOLERANCE, GRADIENT_TOLERANCE = 1e-5, 1e-4


@dataclass(frozen=True)
class Bench:
    """What is measured alike at all sizes of a layout."""

    peers: list[Peer]
    profile: Profile
    ratio: float
    options: argparse.Namespace

    @property
    def device(self) -> torch.device:
        return torch.device(self.options.device)

    def set_up(self, result: Result) -> tuple[dict[str, LossSteps], Copies]:
        """Every alternative that works at one size, and a copy, on the same buffers."""
        case = result.case
        buffers = number_of_buffers(case, self.device)
        labels = [
            draw_labels(
                case.rows, case.foreground or 0.0, self.profile, seed, every_group=case.all_active
            )
            for seed in range(buffers)
        ]
        result.live = sum(live_fraction(v, self.profile, self.ratio) for v in labels) / buffers
        labels = [each.to(self.device) for each in labels]
        logits = make_logits(case, buffers, self.device)

        def tried(peer: Peer) -> LossSteps:
            own = make_logits(case, buffers, self.device) if peer.overwrites else logits
            steps = LossSteps(peer.loss, own, labels, case.loss_scale)
            steps.gradient(0)
            return steps

        steps: dict[str, LossSteps] = {}
        for peer in self.peers:
            if peer.compiled:
                if self.options.compile and case.rows not in self.options.compile:
                    continue
                # Compiled for this size alone; the second size would make the sizes variable.
                torch.compiler.reset()
            works = result.attempt(peer.name, partial(tried, peer))
            if works is not None:
                steps[peer.name] = works
        return steps, Copies(logits)

    def measure(self, result: Result) -> None:
        """All but what a profiler sees. What fails is noted, and the rest is measured."""
        steps, copies = self.set_up(result)
        for one_pass in self.options.passes:
            timed = partial(wall_times, one_pass, steps, copies, self.options)
            kind = f"{one_pass}, {self.options.clock}"
            result.times[kind] = result.attempt(one_pass, timed) or {}
        if self.device.type == "cuda":
            measure_steps(
                result,
                gradients(steps, copies),
                buffers=len(copies.sources),
                bytes_of_logits=bytes_of_logits(result.case),
                rounds=self.options.rounds,
                device=self.device,
            )
        elif result.case.rows in self.options.peaks:
            peaks = result.attempt("peak memory", partial(peak_memory, result.case, self.options))
            result.counts["peak memory / logits"] = peaks or {}

    def measure_launches(self, result: Result) -> None:
        measure_launches(result, gradients(*self.set_up(result)), self.device)


def gradients(steps: Mapping[str, LossSteps], copies: Copies) -> dict[str, Call]:
    """The step of each alternative of which a GPU's measures are taken."""
    calls: dict[str, Call] = {name: step.gradient for name, step in steps.items()}
    return calls | {"copy": copies.step}


def wall_times(
    one_pass: str, steps: Mapping[str, LossSteps], copies: Copies, options: argparse.Namespace
) -> dict[str, Timing]:
    """Time of one pass (forward, backward or both) of every alternative, and of a copy."""

    def forget(turn: int) -> None:
        for step in steps.values():
            step.forget()

    calls: dict[str, Call] = {name: getattr(step, one_pass) for name, step in steps.items()}
    calls["copy"] = copies.step
    return interleave(
        calls,
        rounds=options.rounds,
        burst=options.burst,
        warmup=min(BUFFERS, len(copies.sources)),
        device=torch.device(options.device),
        before={name: step.prepare for name, step in steps.items()}
        if one_pass == "backward"
        else None,
        after=forget,
        clock=options.clock,
        max_seconds=options.max_seconds,
    )


def peak_memory(case: Case, options: argparse.Namespace) -> dict[str, float]:
    arguments = ["--rows", str(case.rows), "--dtype", case.dtype]
    arguments += ["--foreground", str(case.foreground), "--threads", str(options.threads)]
    arguments += ["--all-active"] if case.all_active else []
    arguments += ["--counts", str(options.counts)] if options.counts else ["--layout", case.layout]
    return in_fresh_process([*arguments, "--impl", *options.impl])


def check_agreement(
    peers: list[Peer], profile: Profile, device: torch.device
) -> dict[str, dict[str, object]]:
    """Whether losses and gradients agree where nothing is drawn at random.

    The grouped losses must agree with the original's loop, the dense ones with PyTorch's.
    """
    labels = draw_labels(256, 0.25, profile, seed=1, every_group=True).to(device)
    case = Case(profile.name, profile.num_logits, "float32", 256)
    logits = make_logits(case, 1, device)[0]
    found: dict[str, dict[str, object]] = {}
    for peer in peers:
        first = "original" if peer.grouped else "dense"
        model = next((other for other in peers if other.name == first), None)
        if model is None or peer is model:
            continue
        try:
            loss_error, gradient_error = agreement(peer, model, logits, labels)
        except Exception as error:
            found[peer.name] = {"with": first, "agrees": None, "reason": brief(error)}
            continue
        found[peer.name] = {
            "with": first,
            # Written so that NaN does not agree.
            "agrees": loss_error <= LOSS_TOLERANCE and gradient_error <= GRADIENT_TOLERANCE,
            "loss": loss_error,
            "gradient": gradient_error,
        }
    return found


def check_reproducible(
    peers: list[Peer], profile: Profile, device: torch.device
) -> dict[str, bool]:
    """Whether loss and gradient of ours are the same bit by bit for the same seed."""
    labels = draw_labels(1024, 0.10, profile, seed=2).to(device)
    logits = make_logits(Case(profile.name, profile.num_logits, "float32", 1024), 1, device)[0]
    logits.requires_grad_()
    same = {}
    for peer in peers:
        if not peer.name.startswith(OURS):
            continue
        runs = []
        for _ in range(2):
            torch.manual_seed(3)
            loss = peer.loss(logits, labels)
            runs.append((loss.detach(), torch.autograd.grad(loss, logits)[0]))
        same[peer.name] = all(torch.equal(a, b) for a, b in zip(*runs, strict=True))
    return same


def parse_loss(arguments: list[str] | None) -> argparse.Namespace:
    parser = common_parser(__doc__, ROWS)
    parser.add_argument(
        "--foreground",
        type=share_of_rows,
        nargs="+",
        default=list(FOREGROUND),
        metavar="SHARE",
        help=f"shares of foreground rows, from 0 to 1, and `{ALL}`: every row counts in every "
        f"group (default: {' '.join(FOREGROUND)})",
    )
    parser.add_argument(
        "--passes",
        nargs="+",
        default=["both"],
        choices=["forward", "backward", "both"],
        metavar="PASS",
        help="what to time: forward, backward, or both as one (default: both)",
    )
    parser.add_argument(
        "--loss-scale",
        type=factor,
        default=1.0,
        metavar="X",
        help="multiply every loss by this, as AMP does (default: 1)",
    )
    parser.add_argument(
        "--compile",
        type=whole,
        nargs="*",
        metavar="R",
        help="time torch.compile too; with sizes R, at these alone",
    )
    parser.add_argument(
        "--peaks",
        type=whole,
        nargs="*",
        default=[],
        metavar="R",
        help="rows at which peak memory is measured on the CPU too (default: none); on a GPU it "
        "always is",
    )
    options = parse(parser, arguments)
    if options.quick:
        options.foreground = ["0.25"]
    return options


def main(arguments: list[str] | None = None) -> int:
    options = parse_loss(arguments)
    run = Run("loss", options)
    compiled = options.compile is not None
    for profile in run.profiles():
        benches = {}
        for ratio in (OTHERS_RATIO, math.inf):
            peers, reasons = loss_peers(profile, ratio, run.device, options.impl, compiled=compiled)
            benches[ratio] = Bench(peers, profile, ratio, options)
            run.skipped |= reasons
        certain, drawn = benches[math.inf].peers, benches[OTHERS_RATIO].peers
        run.agreement[profile.name] = check_agreement(certain, profile, run.device)
        run.reproducible[profile.name] = check_reproducible(drawn, profile, run.device)
        for case in cases(profile, options):
            bench = benches[math.inf if case.all_active else OTHERS_RATIO]
            run.measure(case, bench.measure, bench.measure_launches)
    if options.quick:
        run.skipped["other shares of foreground, most rounds"] = "--quick"
    run.more = {"others_ratio": OTHERS_RATIO}
    return run.finish(relative_to="original")


def cases(profile: Profile, options: argparse.Namespace) -> Iterator[Case]:
    for dtype, share, rows in itertools.product(options.dtype, options.foreground, options.rows):
        foreground = ALL_ACTIVE_FOREGROUND if share == ALL else float(share)
        size = (profile.name, profile.num_logits, dtype, rows)
        yield Case(*size, foreground, share == ALL, options.loss_scale)


if __name__ == "__main__":
    raise SystemExit(ended(main))
