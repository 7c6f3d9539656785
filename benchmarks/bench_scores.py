"""Time of `grouped_softmax_scores`, against the original's merge of its groups.

- `bags`: this library, one column per `--impl`;
- `original`: the merge of the method's first implementation, with its way of working: a softmax of
  each group, written into one zero matrix at the group's categories, multiplied by the probability
  of foreground, and copied into another;
- `dense`: a softmax over all logits and a slice of it (other scores: what a softmax costs);
- `copy`: a `copy_` of the logits into memory that is there already.

All run in one process on the same logits, interleaved, without gradient. On a GPU also the time
within a CUDA graph, launches, waits of the host and peak memory, as in `bench_loss.py`.

    python benchmarks/bench_scores.py --quick
    python benchmarks/bench_scores.py --json results/scores.json
    python benchmarks/bench_scores.py --device cuda --dtype float32 bfloat16
"""

import argparse
import itertools
from collections.abc import Callable, Iterator
from functools import partial

import torch
from buffers import BUFFERS, Copies, bytes_of_logits, make_logits, number_of_buffers
from cuda_measures import measure_launches, measure_steps
from peers import merge_as_original, score_arguments, why_not_timed
from profiles import Profile
from program import Run, common_parser, parse
from records import OURS, Case, Result, brief
from timing import Call, interleave
from torch import Tensor

from balanced_group_softmax import grouped_softmax_scores
from balanced_group_softmax.cli_program import ended
from balanced_group_softmax.ops.dispatch import Impl

ROWS = (300, 1000, 8192)
TOLERANCE = 1e-6

Scores = Callable[[Tensor], Tensor]


def score_peers(
    profile: Profile, device: torch.device, impls: list[Impl]
) -> tuple[dict[str, Scores], dict[str, str]]:
    """Ours and the alternatives, each a function of the logits; of ours that fail, the reason."""
    peers: dict[str, Scores] = {}
    skipped: dict[str, str] = {}
    for impl in impls:
        if why_not := why_not_timed(impl, device):
            skipped[f"{OURS} ({impl})"] = why_not
            continue
        ours = partial(grouped_softmax_scores, layout=profile.layout, impl=impl)
        try:
            ours(torch.zeros(2, profile.num_logits, device=device))
        except Exception as error:
            skipped[f"{OURS} ({impl})"] = brief(error)
        else:
            peers[f"{OURS} ({impl})"] = ours
    peers["original"] = partial(merge_as_original, **score_arguments(profile, device))
    num_labels = profile.layout.num_labels
    peers["dense"] = lambda logits: logits.softmax(1, dtype=torch.float32)[:, :num_labels]
    return peers, skipped


def check_agreement(
    peers: dict[str, Scores], profile: Profile, device: torch.device
) -> dict[str, dict[str, object]]:
    """Whether our scores are those of the original."""
    case = Case(profile.name, profile.num_logits, "float32", 64)
    logits = 4 * make_logits(case, 1, device)[0]
    expected = peers["original"](logits)
    found: dict[str, dict[str, object]] = {}
    for name, scores in peers.items():
        if name.startswith(OURS):
            error = float((scores(logits) - expected).abs().max())
            found[name] = {"with": "original", "agrees": error <= TOLERANCE, "scores": error}
    return found


def set_up(result: Result, peers: dict[str, Scores], device: torch.device) -> dict[str, Call]:
    """Every alternative that works at one size, and a copy, on the same buffers."""
    buffers = number_of_buffers(result.case, device)
    logits = make_logits(result.case, buffers, device)

    def step(scores: Scores, turn: int) -> Tensor:
        return scores(logits[turn % buffers])

    steps: dict[str, Call] = {}
    for name, scores in peers.items():
        if result.attempt(name, partial(step, scores, 0)) is not None:
            steps[name] = partial(step, scores)
    steps["copy"] = Copies(logits).step
    return steps


def measure(result: Result, peers: dict[str, Scores], options: argparse.Namespace) -> None:
    """All but what a profiler sees. What fails is noted, and the rest is measured."""
    device = torch.device(options.device)
    buffers = number_of_buffers(result.case, device)
    steps = set_up(result, peers, device)
    timed = partial(
        interleave,
        steps,
        rounds=options.rounds,
        burst=options.burst,
        warmup=min(BUFFERS, buffers),
        device=device,
        clock=options.clock,
        max_seconds=options.max_seconds,
    )
    result.times[f"scores, {options.clock}"] = result.attempt("scores", timed) or {}
    if device.type == "cuda":
        measure_steps(
            result,
            steps,
            buffers=buffers,
            bytes_of_logits=bytes_of_logits(result.case),
            rounds=options.rounds,
            device=device,
        )


def launches(result: Result, peers: dict[str, Scores], device: torch.device) -> None:
    measure_launches(result, set_up(result, peers, device), device)


def cases(profile: Profile, options: argparse.Namespace) -> Iterator[Case]:
    for dtype, rows in itertools.product(options.dtype, options.rows):
        yield Case(profile.name, profile.num_logits, dtype, rows)


def main(arguments: list[str] | None = None) -> int:
    options = parse(common_parser(__doc__, ROWS), arguments)
    run = Run("scores", options)
    with torch.no_grad():
        for profile in run.profiles():
            peers, reasons = score_peers(profile, run.device, options.impl)
            run.skipped |= reasons
            run.agreement[profile.name] = check_agreement(peers, profile, run.device)
            for case in cases(profile, options):
                run.measure(
                    case,
                    partial(measure, peers=peers, options=options),
                    partial(launches, peers=peers, device=run.device),
                )
        return run.finish(relative_to="original")


if __name__ == "__main__":
    raise SystemExit(ended(main))
