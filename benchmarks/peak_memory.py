"""Peak memory of a loss and its gradient on the CPU, over the logits themselves.

Counts pages that are really taken from the system, whoever asks for them (torch, NumPy, a math
library), which no hook into one allocator sees. A fresh process hands every freed block straight
back to the system (`hold_memory`), so that its resident size follows what is alive; the kernel
keeps the highest value since the last reset. Linux only. A page that was asked for and never
written is not counted, as it takes no memory.

    python benchmarks/peak_memory.py --rows 8192 --foreground 0.25
"""

import argparse
import gc
import json
import math
import statistics
import subprocess
import sys
from pathlib import Path

import torch
from arguments import counts_file, share, whole
from peers import Peer, loss_peers
from profiles import OTHERS_RATIO, PUBLISHED, Profile, draw_labels, named_profile, read_profile
from timing import hold_memory

from balanced_group_softmax.cli_program import HelpFormatter, ended

EXIT_STATUS = """\
output: a JSON object, of each loss the peak over the bytes of the logits.

exit status: 0 if done; 2 if the usage is wrong; 130 after Ctrl-C.
"""
REPEATS = 3
RESET = Path("/proc/self/clear_refs")
STATUS = Path("/proc/self/status")


def peak_ratios(options: argparse.Namespace) -> dict[str, float]:
    """Of each loss, the peak over the logits' bytes: the gradient alone is 1 if all is written."""
    profile = read_profile(options.counts) if options.counts else named_profile(options.layout)
    ratio = math.inf if options.all_active else OTHERS_RATIO
    cpu = torch.device("cpu")
    peers, _ = loss_peers(profile, ratio, cpu, options.impl, compiled=False)
    return {peer.name: _peak_ratio(peer, profile, options) for peer in peers}


def _peak_ratio(peer: Peer, profile: Profile, options: argparse.Namespace) -> float:
    labels = draw_labels(
        options.rows, options.foreground, profile, 0, every_group=options.all_active
    )
    logits = torch.randn(
        options.rows, profile.num_logits, generator=torch.Generator().manual_seed(0)
    )
    logits = logits.to(getattr(torch, options.dtype)).requires_grad_()
    few = logits.detach()[:32].clone().requires_grad_()
    # Code, thread pools and the like are loaded once and are no part of a step.
    peer.loss(few, labels[:32]).backward()
    ratios = []
    for _ in range(REPEATS):
        logits.grad = None
        gc.collect()
        RESET.write_text("5")
        before = _kilobytes("VmRSS")
        peer.loss(logits, labels).backward()
        peak = _kilobytes("VmHWM") - before
        ratios.append(peak * 1024 / (logits.numel() * logits.element_size()))
    return statistics.median(ratios)


def _kilobytes(name: str) -> int:
    for line in STATUS.read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1])
    raise RuntimeError(f"{STATUS} has no {name}")


def in_fresh_process(arguments: list[str]) -> dict[str, float]:
    """The ratios as another process measures them.

    Raises:
        RuntimeError: with the reason, if it cannot.
    """
    if not RESET.exists():
        raise RuntimeError(f"the peak cannot be reset here, there is no {RESET}")
    done = subprocess.run(
        [sys.executable, __file__, *arguments], capture_output=True, text=True, check=False
    )
    if done.returncode != 0:
        raise RuntimeError((done.stderr.strip() or "no message").splitlines()[-1])
    ratios: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return ratios


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXIT_STATUS, formatter_class=HelpFormatter
    )
    add = parser.add_argument
    add(
        "--layout",
        choices=list(PUBLISHED),
        default="lvis_v0.5",
        help="groups and counts of a data set (default: lvis_v0.5)",
    )
    add(
        "--counts",
        type=counts_file,
        metavar="JSON",
        help="in place of --layout, the counts of a JSON list of LVIS categories",
    )
    add(
        "--dtype",
        default="float32",
        choices=["float32", "bfloat16", "float16"],
        help="type of the logits (default: float32)",
    )
    add("--rows", type=whole, default=8192, metavar="R", help="rows of logits (default: 8192)")
    add(
        "--foreground",
        type=share,
        default=0.25,
        metavar="SHARE",
        help="share of foreground rows (default: 0.25)",
    )
    add("--all-active", action="store_true", help="every row counts in every group")
    add(
        "--impl",
        nargs="+",
        default=["auto"],
        metavar="NAME",
        help="implementations of ours: auto, triton, torch or reference (default: auto)",
    )
    add("--threads", type=whole, default=1, metavar="N", help="threads of torch (default: 1)")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    torch.set_num_threads(options.threads)
    hold_memory("returned")
    print(json.dumps(peak_ratios(options)))
    return 0


if __name__ == "__main__":
    sys.exit(ended(main))
