"""One process or many: those that torchrun starts, on one node or several.

    torchrun --nproc-per-node 8 examples/torchvision_lvis_train.py ...

Without torchrun there is one process, and every function here does what that needs: nothing.
"""

from __future__ import annotations

import gc
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import nn

_T = TypeVar("_T")


class FailedElsewhere(Exception):
    """The first process failed, and tells why."""


TIMEOUT = timedelta(hours=2)
"""Others wait that long while the first process draws data or evaluates."""


@contextmanager
def process_group(device: torch.device) -> Iterator[None]:
    """Join the other processes, if torchrun started any, and leave them at the end."""
    launched = {"RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"} <= os.environ.keys()
    if not launched or dist.is_initialized():
        yield
        return
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=TIMEOUT)
    try:
        yield
    finally:
        # A wrapped model that outlives the group keeps gloo's threads up to the interpreter's own
        # end, which they do not always survive: the process aborts after its work is done.
        gc.collect()
        dist.destroy_process_group()


def rank() -> int:
    """Return the number of this process, from 0."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """Return how many processes there are."""
    return dist.get_world_size() if dist.is_initialized() else 1


def is_first() -> bool:
    """Return whether this process is the one that writes and prints."""
    return rank() == 0


def is_loss_of_a_process(error: RuntimeError) -> bool:
    """Return whether a collective failed since another process has ended."""
    told = ("Connection closed by peer", "Connection reset by peer", "Broken pipe")
    return dist.is_initialized() and any(text in str(error) for text in told)


def local_device(name: str | None) -> torch.device:
    """Return the device of this process: the one named, else its own GPU, else the CPU.

    Raises:
        ValueError: The device cannot be used, or is named for several processes.
    """
    if name is None:
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        if device.type == "cuda" and device.index is None:
            device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        elif device.type == "cuda" and int(os.environ.get("LOCAL_WORLD_SIZE", 1)) > 1:
            raise ValueError(
                f"Expected `--device` cuda with several processes, each of which takes a GPU of "
                f"its own, got {name}"
            )
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise ValueError(f"Expected `--device` to be usable, got {name!r}: {reason}") from None
    return device


def barrier() -> None:
    """Wait until every process is here."""
    if dist.is_initialized():
        dist.barrier()


def agree(flag: bool, device: torch.device) -> bool:
    """Return whether any process says so; all get the same answer."""
    if not dist.is_initialized():
        return flag
    flags = torch.tensor(float(flag), device=device)
    dist.all_reduce(flags, dist.ReduceOp.MAX)
    return bool(flags.item())


def from_first(value: Any) -> Any:
    """Return the first process's value in every process."""
    if not dist.is_initialized():
        return value
    values = [value]
    dist.broadcast_object_list(values, src=0)
    return values[0]


def gathered(value: Any) -> list[Any]:
    """Return every process's value, in the order of ranks, in every process."""
    if not dist.is_initialized():
        return [value]
    values: list[Any] = [None] * world_size()
    dist.all_gather_object(values, value)
    return values


def share_buffers(model: nn.Module) -> None:
    """Give every process the first one's running statistics, which training leaves different."""
    if dist.is_initialized():
        for buffer in model.buffers():
            dist.broadcast(buffer, src=0)


def parallel(model: nn.Module, device: torch.device) -> nn.Module:
    """Return the model with gradients averaged over processes; itself where there is one."""
    if not dist.is_initialized():
        return model
    devices = [device] if device.type == "cuda" else None
    return nn.parallel.DistributedDataParallel(model, device_ids=devices)


def first_does(work: Callable[[], _T]) -> _T:
    """Let the first process do something; return its result in all.

    Raises:
        OSError, ValueError, ImportError: What `work` raised, in the first process.
        FailedElsewhere: It raised one of these, in the others.
    """
    outcome: tuple[bool, Any] = True, None
    if is_first():
        try:
            outcome = True, work()
        except (OSError, ValueError, ImportError) as error:
            outcome = False, error
    succeeded, value = from_first(outcome)
    if not succeeded:
        raise value if is_first() else FailedElsewhere
    result: _T = value
    return result
