"""What only a GPU has: graphs, launches, waits of the host, its own memory.

A step is a function of the round number, which picks the input buffers; it returns what it made,
so that the caller decides how long that lives.
"""

import bisect
import contextlib
import gc
import json
import math
import statistics
import tempfile
import warnings
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from records import Result
from timing import Call, Timing, summarize

STEPS_IN_A_GRAPH = 32
LAUNCHING = 1_000_000
"""Cycles of the GPU, about half a millisecond, in which the host launches a graph."""
TRACED = 10
"""Steps that the profiler sees of each alternative."""
STEP = "one step"
WAIT = "called a synchronizing"
DEFAULT_L2 = 50 << 20
BUSY = "GPU busy, one step"
"""The sum over kernels, which leaves out the gaps between them and all waiting."""


def measure_steps(
    result: Result,
    steps: Mapping[str, Call],
    *,
    buffers: int,
    bytes_of_logits: int,
    rounds: int,
    device: torch.device,
) -> None:
    """Adds to a result all that can be measured without a profiler, for each alternative.

    A step in which the host waits is never captured: on older versions of PyTorch a capture that
    fails leaves its traces in the whole process.
    """
    graphs = {"graph, cold": buffers, "graph, warm": 1}
    for name, step in steps.items():
        waits = result.attempt(f"{name}, waits", partial(host_waits, step, device))
        result.count("waits of the host", name, waits)
        peak = result.attempt(f"{name}, peak memory", partial(peak_bytes, step, device))
        if peak is not None:
            result.count("peak memory / logits", name, peak / bytes_of_logits)
        if waits:
            result.problems.append(f"{name}, graph: cannot be captured, as the host waits in it")
        for kind, turns in graphs.items() if waits == 0 else ():
            time_it = partial(graph_time, step, device, buffers=turns, rounds=rounds)
            timing = result.attempt(f"{name}, {kind}", time_it)
            if timing is not None:
                result.times.setdefault(kind, {})[name] = timing
        free_memory()


def measure_launches(result: Result, steps: Mapping[str, Call], device: torch.device) -> None:
    """Adds to a result what a profiler sees of each alternative.

    Comes after all that is timed: what the profiler has attached to the driver stays there.
    """
    for name, step in steps.items():
        seen = result.attempt(f"{name}, launches", partial(launches, step, device))
        if seen is not None:
            number, busy = seen
            result.count("launches", name, number)
            result.times.setdefault(BUSY, {})[name] = busy


def free_memory() -> None:
    """Hand back what nobody holds any more, so that a large size leaves room for the next."""
    gc.collect()
    with contextlib.suppress(RuntimeError):  # older versions refuse after a capture that failed
        torch.cuda.empty_cache()


def buffers_that_exceed_the_cache(buffer_bytes: int, device: torch.device) -> int:
    """How many buffers to take in turns so that none is still in L2 when its turn comes.

    At most 128: of a buffer below 0.6 MB (with 50 MB of L2) some still is.
    """
    cache = getattr(torch.cuda.get_device_properties(device), "L2_cache_size", 0) or DEFAULT_L2
    return max(2, min(128, math.ceil(1.5 * cache / max(buffer_bytes, 1))))


def graph_time(step: Call, device: torch.device, *, buffers: int, rounds: int) -> Timing:
    """Milliseconds of a step inside a CUDA graph of many.

    The graph holds at least `STEPS_IN_A_GRAPH` steps one after the other, and is launched while
    the GPU is held up, so that neither the host nor the launch is part of the time. What a step
    made lives until its buffer's next turn: with one buffer everything stays in the same place and
    so in L2 (warm), with enough of them neither inputs nor outputs are there (cold).

    A step that makes the host wait cannot be captured: count its waits first.
    """
    steps = buffers * math.ceil(STEPS_IN_A_GRAPH / buffers)
    aside = torch.cuda.Stream(device)
    aside.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(aside):
        for turn in range(3):
            step(turn % buffers)
    torch.cuda.current_stream(device).wait_stream(aside)
    torch.cuda.synchronize(device)

    graph = torch.cuda.CUDAGraph()
    made: list[object] = [None] * buffers
    stream = torch.cuda.current_stream(device)
    try:
        with torch.cuda.graph(graph):
            for turn in range(steps):
                made[turn % buffers] = None
                made[turn % buffers] = step(turn % buffers)
    except Exception:
        torch.cuda.set_stream(stream)  # older versions of PyTorch leave the capture's own
        _forget_failed_capture(device)
        raise
    for _ in range(2):
        graph.replay()
    torch.cuda.synchronize(device)

    milliseconds = []
    for _ in range(rounds):
        start = torch.cuda.Event(enable_timing=True)
        end = torch.cuda.Event(enable_timing=True)
        torch.cuda._sleep(LAUNCHING)
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        milliseconds.append(start.elapsed_time(end) / steps)
    made.clear()
    graph.reset()
    return summarize(milliseconds)


def _forget_failed_capture(device: torch.device) -> None:
    """Let random numbers be drawn again: a failed capture leaves their state within it."""
    with contextlib.suppress(Exception):
        torch.cuda.synchronize(device)
        ones = torch.ones(1, device=device)
        with torch.cuda.graph(torch.cuda.CUDAGraph()):
            ones.add_(1)


def launches(step: Call, device: torch.device) -> tuple[float, Timing]:
    """Kernels, copies and fills of a step, and the milliseconds that they keep the GPU busy."""
    step(0)
    torch.cuda.synchronize(device)
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profiler:
        for turn in range(TRACED):
            with torch.profiler.record_function(STEP):
                step(turn)
                torch.cuda.synchronize(device)
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(trace))
        events = json.loads(trace.read_text(encoding="utf-8"))["traceEvents"]
    return median_step(events)


def median_step(events: Sequence[Mapping[str, Any]]) -> tuple[float, Timing]:
    """Number and milliseconds of the work on the GPU in a step, of the events of a trace."""
    marks = [e["ts"] for e in events if e.get("cat") == "user_annotation" and e["name"] == STEP]
    marks.sort()
    durations: list[list[float]] = [[] for _ in marks]
    for event in events:
        if event.get("cat") in ("kernel", "gpu_memcpy", "gpu_memset"):
            step = max(bisect.bisect(marks, event["ts"]) - 1, 0)
            durations[step].append(float(event["dur"]) / 1000)
    if not any(durations):
        raise RuntimeError("the profiler saw no work on the GPU")
    return statistics.median(map(len, durations)), summarize([sum(each) for each in durations])


def host_waits(step: Call, device: torch.device) -> int:
    """How often the host waits for the GPU within a step."""
    step(0)
    torch.cuda.synchronize(device)
    before = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            step(1)
        finally:
            torch.cuda.set_sync_debug_mode(before)
    return sum(WAIT in str(warning.message) for warning in caught)


def peak_bytes(step: Call, device: torch.device) -> int:
    """Most memory that a step asks for at once, its results included, before any rounding."""
    step(0)
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_stats(device)["requested_bytes.all.current"]
    step(0)
    torch.cuda.synchronize(device)
    peak: int = torch.cuda.memory_stats(device)["requested_bytes.all.peak"]
    return peak - before
