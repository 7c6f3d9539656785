"""Time of the grouped softmax loss and its gradient, against what one would write instead.

All alternatives run in one process on the same logits and labels, interleaved:

- `bags`: `grouped_softmax_loss` of this library, one column per `--impl`;
- `original`: a loop over groups that picks its rows as the method's first implementation did:
  boolean weights, `nonzero`, a NumPy draw without replacement on the host, cross-entropy of the
  whole slice, weighted afterwards;
- `loop`: the same loss as a loop over `F.cross_entropy` that never waits for the host;
- `dense`: plain `F.cross_entropy` over the same columns (another loss: what softmax costs);
- `copy`: a copy of the logits, the floor that memory sets.

    python benchmarks/bench_loss.py --quick
    python benchmarks/bench_loss.py --json results/loss.json
    python benchmarks/bench_loss.py --device cuda --dtype bfloat16
"""

import argparse
import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from timing import CLOCKS, Timing, environment, hold_memory, interleave, markdown_table, write_json
from torch import Tensor

from balanced_group_softmax import GroupLayout, grouped_softmax_loss

GROUP_SIZES = (294, 453, 302, 181)
"""Categories of LVIS v0.5 by training instances: under 10, 100, 1000, and the rest."""
TOTAL_INSTANCES = 693_958
"""Training instances of LVIS v0.5."""
THRESHOLDS = (10, 100, 1000)
ROWS = (128, 512, 1024, 8192)
FOREGROUND = (0.05, 0.10, 0.25)
OTHERS_RATIO = 8.0
BUFFERS = 4


def profile_counts() -> list[int]:
    """Instance counts with the published group sizes and total of LVIS v0.5.

    Counts fall geometrically through the lower three groups; through the highest they follow a
    power law of the rank whose exponent makes the total right.
    """
    low: list[int] = []
    for size, start, end in zip(GROUP_SIZES[:3], (1, 10, 100), THRESHOLDS, strict=True):
        low += np.geomspace(start, end - 1, size).astype(int).tolist()
    ranks = np.arange(1, GROUP_SIZES[3] + 1)
    wanted = TOTAL_INSTANCES - sum(low)
    below, above = 0.0, 2.0
    for _ in range(60):
        exponent = (below + above) / 2
        head = np.floor(THRESHOLDS[-1] * (ranks[-1] / ranks) ** exponent)
        below, above = (exponent, above) if head.sum() < wanted else (below, exponent)
    head[0] += wanted - head.sum()
    return [*low, *(int(count) for count in head[::-1])]


def read_counts(path: Path) -> list[int]:
    """Instance counts by ascending category id, from a JSON list of LVIS categories."""
    with path.open(encoding="utf-8") as stream:
        categories = json.load(stream)
    ordered = sorted(categories, key=lambda category: int(category["id"]))
    return [int(category["instance_count"]) for category in ordered]


def draw_labels(rows: int, foreground: float, counts: list[int], seed: int) -> Tensor:
    """Labels, background 0: an exact share of foreground rows, drawn by instance counts."""
    draw = np.random.default_rng(seed)
    shares = np.asarray(counts, dtype=np.float64)
    labels = np.zeros(rows, dtype=np.int64)
    number = round(rows * foreground)
    labels[:number] = 1 + draw.choice(len(counts), number, p=shares / shares.sum())
    return torch.from_numpy(draw.permutation(labels))


@dataclass(frozen=True)
class Columns:
    """What the loops read: group starts and sizes, and the table label -> place in the group."""

    starts: tuple[int, ...]
    sizes: tuple[int, ...]
    bin_labels: Tensor


def original_loss(logits: Tensor, labels: Tensor, columns: Columns, ratio: float) -> Tensor:
    """The loss as the original computes it, with its waits for the host."""
    losses = []
    for group, (start, size) in enumerate(zip(columns.starts, columns.sizes, strict=True)):
        target = columns.bin_labels[group][labels]
        if group == 0:
            weight = torch.ones_like(target)
        else:
            weight = (target > 0).long()
            found = weight.nonzero(as_tuple=True)[0].shape[0]
            if found:
                others = (1 - weight).nonzero(as_tuple=True)[0]
                keep = int(ratio * found) if math.isfinite(ratio) else len(others)
                if keep >= len(others):
                    weight = torch.ones_like(target)
                else:
                    drawn = np.random.choice(others.cpu().numpy(), keep, replace=False)
                    weight[torch.from_numpy(drawn).to(weight.device)] = 1
        normalizer = max(weight.sum().float().item(), 1.0)
        every = F.cross_entropy(logits.narrow(1, start, size), target, reduction="none")
        losses.append((every * weight.float()).sum() / normalizer)
    return torch.stack(losses).sum()


def loop_loss(logits: Tensor, labels: Tensor, columns: Columns, ratio: float) -> Tensor:
    """The loss as a loop over groups that leaves every number on the device."""
    total = logits.new_zeros((), dtype=torch.float32)
    for group, (start, size) in enumerate(zip(columns.starts, columns.sizes, strict=True)):
        target = columns.bin_labels[group][labels]
        if group == 0:
            weight = torch.ones_like(target, dtype=torch.float32)
        else:
            inside = target > 0
            found = inside.sum()
            keep = (found.double() * ratio).nan_to_num(0.0).clamp(max=len(labels)).long()
            # Sorting puts the group's own rows last, so ranks below `keep` are drawn others.
            keys = torch.rand(len(labels), device=labels.device) + 2 * inside
            ranks = torch.empty_like(target)
            ranks[keys.argsort()] = torch.arange(len(labels), device=labels.device)
            weight = ((inside | (ranks < keep)) & (found > 0)).float()
        every = F.cross_entropy(logits[:, start : start + size].float(), target, reduction="none")
        total = total + (every * weight).sum() / weight.sum().clamp(min=1)
    return total


def live_fraction(labels: Tensor, columns: Columns, ratio: float) -> float:
    """Share of the logits matrix in (row, group) pairs that count in the loss."""
    live = 0
    rows = len(labels)
    for group, size in enumerate(columns.sizes):
        found = int((columns.bin_labels[group][labels] > 0).sum())
        counted = min(found + ratio * found, rows) if group else rows
        live += int(counted) * size
    return live / (rows * sum(columns.sizes))


@dataclass(frozen=True)
class Result:
    """Times of all alternatives at one size; `live` is the share of the matrix that counts."""

    rows: int
    foreground: float
    live: float
    milliseconds: dict[str, Timing]


Loss = Callable[[Tensor, Tensor], Tensor]


def alternatives(
    layout: GroupLayout, columns: Columns, impls: list[str], compiled: bool, device: torch.device
) -> tuple[dict[str, Loss], list[str]]:
    """The losses to time, each a function of logits and labels, and what had to be left out."""
    losses: dict[str, Loss] = {}
    skipped: list[str] = []
    probe = torch.zeros(2, layout.num_logits, device=device)
    for impl in impls:
        ours = partial(grouped_softmax_loss, layout=layout, others_ratio=OTHERS_RATIO, impl=impl)
        try:
            ours(probe, torch.zeros(2, dtype=torch.int64, device=device))
        except (NotImplementedError, RuntimeError, ValueError) as error:
            skipped.append(f"bags ({impl}): {error}")
        else:
            losses[f"bags ({impl})"] = ours
    losses["original"] = partial(original_loss, columns=columns, ratio=OTHERS_RATIO)
    losses["loop"] = partial(loop_loss, columns=columns, ratio=OTHERS_RATIO)
    if compiled:
        losses["loop, compiled"] = torch.compile(losses["loop"])
    else:
        skipped.append("loop, compiled: takes minutes to compile; ask for it with --compile")
    losses["dense"] = F.cross_entropy
    return losses, skipped


def check_agreement(layout: GroupLayout, columns: Columns, counts: list[int]) -> None:
    """Ours and both loops must be the same loss where nothing is drawn at random."""
    labels = draw_labels(256, 0.25, counts, seed=1)
    logits = torch.randn(256, layout.num_logits, generator=torch.Generator().manual_seed(1))
    columns = Columns(columns.starts, columns.sizes, columns.bin_labels.cpu())
    ours = grouped_softmax_loss(logits, labels, layout, others_ratio=math.inf)
    for loss in (original_loss, loop_loss):
        theirs = loss(logits, labels, columns, math.inf)
        if not torch.allclose(ours, theirs, rtol=1e-5):
            raise RuntimeError(f"{loss.__name__} gives {theirs:.6f}, the library {ours:.6f}")


def measure(
    losses: dict[str, Loss],
    rows: int,
    foreground: float,
    counts: list[int],
    columns: Columns,
    options: argparse.Namespace,
) -> Result:
    """Times loss + backward of every alternative at one size."""
    device = torch.device(options.device)
    width = sum(columns.sizes)
    draw = torch.Generator().manual_seed(rows)
    labels = [draw_labels(rows, foreground, counts, seed).to(device) for seed in range(BUFFERS)]
    logits = [
        torch.randn(rows, width, generator=draw)
        .to(device, getattr(torch, options.dtype))
        .requires_grad_()
        for _ in range(BUFFERS)
    ]

    def step(loss: Loss, turn: int) -> None:
        loss(logits[turn % BUFFERS], labels[turn % BUFFERS]).backward()

    def forget(turn: int) -> None:
        logits[turn % BUFFERS].grad = None

    calls: dict[str, Callable[[int], object]] = {
        name: partial(step, loss) for name, loss in losses.items()
    }
    calls["copy"] = lambda turn: logits[turn % BUFFERS].detach().clone()
    timings = interleave(
        calls,
        rounds=options.rounds,
        burst=options.burst,
        warmup=BUFFERS,
        device=device,
        after=forget,
        clock=options.clock,
        max_seconds=options.max_seconds,
    )
    live = [live_fraction(label.cpu(), columns, OTHERS_RATIO) for label in labels]
    return Result(rows, foreground, sum(live) / BUFFERS, timings)


def tables(results: list[Result], ours: list[str], options: argparse.Namespace) -> str:
    """Medians in milliseconds, then how ours compares with each alternative."""
    names = list(results[0].milliseconds)
    peers = [name for name in names if name not in ours]
    absolute, relative = [], []
    for result in results:
        median = {name: timing.median for name, timing in result.milliseconds.items()}
        place = [str(result.rows), f"{result.foreground:.0%}", f"{result.live:.2f}"]
        absolute.append([*place, *(f"{median[name]:.3f}" for name in names)])
        for own in ours:
            cells = [f"{median[own] / median[peer]:.2f}" for peer in peers]
            relative.append([own, *place, *cells, f"{median['original'] / median[own]:.1f}"])
    head = ["rows", "foreground", "live"]
    settings = f"{options.clock} clock, memory {options.memory}, bursts of {options.burst}"
    return "\n\n".join(
        [
            f"Loss + backward, median milliseconds ({settings}):",
            markdown_table([*head, *names], absolute),
            "Time of ours / time of the alternative; last: how many times faster than `original`:",
            markdown_table(["", *head, *peers, "x original"], relative),
        ]
    )


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--impl", nargs="+", default=["auto"], help="implementations of ours")
    parser.add_argument("--rows", type=int, nargs="+", default=list(ROWS))
    parser.add_argument("--foreground", type=float, nargs="+", default=list(FOREGROUND))
    parser.add_argument("--counts", type=Path, help="JSON list of LVIS categories, for real counts")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads")
    parser.add_argument(
        "--clock",
        choices=list(CLOCKS),
        default="wall",
        help="cpu: processor time, for a machine that others use too",
    )
    parser.add_argument(
        "--memory",
        choices=["adaptive", "kept", "returned"],
        default="adaptive",
        help="freed memory: kept as in a long-running process, returned to the system as in a "
        "fresh one, or as the C library sees fit",
    )
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument(
        "--burst",
        type=int,
        default=8,
        help="runs in a row; 1: every run finds the caches full of another alternative's work",
    )
    parser.add_argument("--max-seconds", type=float, default=20.0, help="per size")
    parser.add_argument("--compile", action="store_true", help="also time torch.compile")
    parser.add_argument("--quick", action="store_true", help="fewer rounds, 25 %% foreground only")
    parser.add_argument("--json", type=Path, help="write the record here")
    options = parser.parse_args(arguments)
    if options.quick:
        options.rounds, options.max_seconds = min(options.rounds, 10), 5.0
        options.foreground = [0.25]
    return options


def main(arguments: list[str] | None = None) -> dict[str, object]:
    options = parse(arguments)
    torch.set_num_threads(options.threads)
    hold_memory(options.memory)
    device = torch.device(options.device)
    np.random.seed(0)
    torch.manual_seed(0)
    counts = read_counts(options.counts) if options.counts else profile_counts()
    layout = GroupLayout.from_counts(counts, thresholds=THRESHOLDS, background="first")
    columns = Columns(layout.group_starts, layout.group_sizes, layout.bin_labels.to(device))
    check_agreement(layout, columns, counts)
    losses, skipped = alternatives(layout, columns, options.impl, options.compile, device)
    if options.quick:
        skipped.append("5 % and 10 % foreground, and most rounds: --quick")
    if device.type != "cuda":
        skipped.append("GPU: --device cuda")
    facts = environment(device)
    print(f"L = {layout.num_logits}, {options.dtype}, others_ratio {OTHERS_RATIO:g}")
    print(", ".join(f"{name} {value}" for name, value in facts.items()), flush=True)
    results = [
        measure(losses, rows, foreground, counts, columns, options)
        for foreground in options.foreground
        for rows in options.rows
    ]
    ours = [name for name in losses if name.startswith("bags")]
    print("\n" + tables(results, ours, options))
    print("\nSkipped: " + "; ".join(skipped))
    record: dict[str, object] = {
        "benchmark": "loss + backward",
        "logits": layout.num_logits,
        "dtype": options.dtype,
        "others_ratio": OTHERS_RATIO,
        "clock": options.clock,
        "memory": options.memory,
        "burst": options.burst,
        "environment": facts,
        "results": results,
        "skipped": skipped,
    }
    if options.json:
        write_json(options.json, record)
    return record


if __name__ == "__main__":
    main()
