"""Fair timing of alternatives: interleaved rounds and medians.

Every round runs each alternative, once or in a burst, in an order shuffled anew, so that a slow
spell of the machine falls on all of them alike. What a caller does between calls (preparing a
graph, dropping a gradient) is not timed.
"""

import ctypes
import gc
import random
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

Call = Callable[[int], object]
CLOCKS = {"wall": time.perf_counter_ns, "cpu": time.process_time_ns}


@dataclass(frozen=True)
class Timing:
    """Time of one call, in milliseconds."""

    median: float
    lower_quartile: float
    upper_quartile: float
    minimum: float
    runs: int


def hold_memory(how: str) -> None:
    """Settles what glibc does with freed memory, which otherwise depends on what ran before.

    A block above a threshold is handed back to the system when it is freed, and its pages fault
    anew at the next allocation. The threshold adapts: it rises to the size of the largest block
    freed so far, up to 32 MB. So the same cross-entropy can take three times as long in a process
    that has only just begun as in one that has freed larger tensors, as training always has.

    Args:
        how: "kept": the threshold is 32 MB, as it comes to be in a training process; "returned":
            128 KB, as in a fresh process; "adaptive": left alone, so that figures depend on the
            order of the sizes.
    """
    if how == "adaptive":
        return
    library = ctypes.CDLL(None)
    if not hasattr(library, "gnu_get_libc_version"):
        return
    mmap_threshold, trim_threshold = -3, -1  # M_MMAP_THRESHOLD, M_TRIM_THRESHOLD
    size = {"kept": 32 << 20, "returned": 128 << 10}[how]
    library.mallopt(mmap_threshold, size)
    library.mallopt(trim_threshold, 2 * size)


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def interleave(
    calls: Mapping[str, Call],
    *,
    rounds: int,
    burst: int = 1,
    warmup: int = 3,
    device: torch.device | None = None,
    before: Mapping[str, Call] | None = None,
    after: Call | None = None,
    seed: int = 0,
    clock: str = "wall",
    max_seconds: float = float("inf"),
) -> dict[str, Timing]:
    """Times every call `rounds` times `burst`, in interleaved and shuffled order.

    Args:
        calls: Name of each alternative -> a function of the round number, which picks the input
            buffer; every alternative sees the same numbers.
        rounds: Turns of each alternative.
        burst: Timed runs in each turn, one after the other. With 1 every run starts with caches
            full of another alternative's code and data; with more, the median is that of a loop.
        warmup: Untimed runs of each alternative before the first timed one.
        device: Where the work happens; a CUDA device is waited for on both sides of a call.
        before: Of some alternatives, what is called untimed with the round number before a call.
        after: Called, untimed, with the round number after every call.
        seed: Of the shuffles.
        clock: "wall", or "cpu" for the processor time of all threads, which does not grow when
            other programs share the machine; with one thread the two agree on an idle one.
        max_seconds: Stop after the round in which this much time has passed (at least 3 rounds).
    """
    where = device or torch.device("cpu")
    now = CLOCKS[clock]
    for turn in range(warmup):
        for name, call in calls.items():
            if before and name in before:
                before[name](turn)
            call(turn)
            if after is not None:
                after(turn)
    shuffle = random.Random(seed).shuffle
    times: dict[str, list[float]] = {name: [] for name in calls}
    names = list(calls)
    collecting = gc.isenabled()
    gc.disable()
    began = time.perf_counter()
    try:
        for turn in range(rounds):
            shuffle(names)
            for name in names:
                for run in range(turn * burst, (turn + 1) * burst):
                    if before and name in before:
                        before[name](run)
                    _synchronize(where)
                    start = now()
                    result = calls[name](run)
                    _synchronize(where)
                    times[name].append((now() - start) / 1e6)
                    del result
                    if after is not None:
                        after(run)
            if turn >= 2 and time.perf_counter() - began > max_seconds:
                break
    finally:
        if collecting:
            gc.enable()
    return {name: summarize(values) for name, values in times.items()}


def summarize(milliseconds: Sequence[float]) -> Timing:
    """Median, quartiles and minimum of measured times."""
    if len(milliseconds) > 1:
        lower, median, upper = statistics.quantiles(milliseconds, n=4, method="inclusive")
    else:
        lower = median = upper = milliseconds[0]
    return Timing(median, lower, upper, min(milliseconds), len(milliseconds))
