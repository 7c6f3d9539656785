"""Launches the Triton kernels: shapes and strides in, constants and grids out.

Nothing here waits for the device, so a CUDA graph can capture it.
"""

from __future__ import annotations

import functools
import struct
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from balanced_group_softmax.ops import autograd, torch_ops, triton_kernels
from balanced_group_softmax.tables import GroupTables

PACKED_BITS = 24
MOST_PROGRAMS = 2048
"""Programs along the rows; more of them would cost more to add up than they gain."""
WIDEST_BLOCK = 4096
"""Columns that a program keeps in registers; wider groups are read in several blocks."""
TILE_SIZE = 512
"""Logits that one turn of a program handles, where a group is narrower than that."""
LOGITS_PER_WARP = 512
KEYS_PER_WARP = 128
"""Four a thread: with more, ptxas spills registers."""
MOST_WARPS = 16 if torch.version.hip else 32
"""A program has at most 1024 threads; a warp of some AMD GPUs has 64."""
TUNING: dict[str, int] = {} if torch.version.hip else {"maxnreg": 128}
"""For the loss. Told of a limit ptxas keeps to it; left alone it aims lower still, and spills."""


def sample_others(
    labels: Tensor, keys: Tensor, tables: GroupTables, *, others_ratio: float, ignore_index: int
) -> tuple[Tensor, Tensor | None]:
    """Which rows count in which group, as `reference.sample_others`; [R, G], stored by group."""
    num_rows, num_groups = labels.shape[0], tables.num_groups
    active = torch.empty((num_groups, num_rows), dtype=torch.bool, device=labels.device)
    if num_rows == 0:
        return active.T, torch.ones(num_groups, dtype=torch.float32, device=labels.device)
    normalizers = torch.empty(num_groups, dtype=torch.float32, device=labels.device)
    block = min(WIDEST_BLOCK, max(KEYS_PER_WARP, triton.next_power_of_2(num_rows)))
    with _device_of(labels):
        triton_kernels.sample_kernel[(num_groups,)](
            labels.contiguous(),
            tables.label_columns,
            keys.contiguous(),
            active,
            normalizers,
            num_rows,
            tables.num_labels,
            ignore_index,
            _bits_of(others_ratio),
            STARTS=_bounds(tables),
            NUM_GROUPS=num_groups,
            HAS_BACKGROUND=tables.has_background,
            BLOCK=block,
            ONE_BLOCK=num_rows <= block,
            num_warps=min(MOST_WARPS, max(4, block // KEYS_PER_WARP)),
        )
    return active.T, normalizers


def losses_and_gradient(
    logits: Tensor,
    labels: Tensor,
    row_weights: Tensor,
    tables: GroupTables,
    *,
    category_weights: Tensor | None,
    normalizers: Tensor | None,
    ignore_index: int,
    reduction: str,
    with_gradient: bool,
    factors: Tensor | None = None,
    with_losses: bool = True,
) -> tuple[Tensor, Tensor | None]:
    """The losses, and the gradient of their sum; see `autograd.Kernels`."""
    logits = _with_near_columns(logits.resolve_neg())
    row_weights = row_weights.resolve_neg()
    num_rows, num_logits = logits.shape
    dtype = torch.promote_types(logits.dtype, torch.float32)
    shape = () if reduction == "sum" else (tables.num_groups,)
    losses = (
        logits.new_zeros(shape, dtype=dtype)
        if num_rows == 0
        else logits.new_empty(shape, dtype=dtype)
    )
    gradient = logits.new_empty((num_rows, num_logits)) if with_gradient else None
    if num_rows == 0:
        return losses, gradient
    labels = labels.contiguous()
    if category_weights is not None:
        category_weights = category_weights.resolve_neg().contiguous()
    plan = _plan(tables.starts, tables.sizes, num_rows, _vector(logits))
    partials = logits.new_empty((tables.num_groups, plan.num_programs), dtype=dtype)
    with _device_of(logits):
        if normalizers is None:
            normalizers = _normalizers(
                labels, row_weights, category_weights, tables, ignore_index, dtype
            )
        triton_kernels.loss_kernel[(tables.num_groups, plan.num_programs)](
            logits,
            labels,
            tables.label_columns,
            row_weights,
            labels if category_weights is None else category_weights,
            normalizers,
            normalizers if factors is None else factors,
            partials,
            partials if gradient is None else gradient,
            num_rows,
            tables.num_labels,
            ignore_index,
            logits.stride(0) // plan.vector,
            logits.stride(1),
            row_weights.stride(0),
            row_weights.stride(1),
            0 if factors is None else factors.stride(0),
            STARTS=_bounds(tables),
            BLOCKS=plan.blocks,
            TILE_ROWS=plan.tile_rows,
            NUM_GROUPS=tables.num_groups,
            NUM_LOGITS=num_logits,
            HAS_BACKGROUND=tables.has_background,
            FOREGROUND_START=tables.foreground_start,
            WITH_CATEGORY_WEIGHTS=category_weights is not None,
            WITH_LOSSES=with_losses,
            WITH_GRADIENT=with_gradient,
            WITH_FACTORS=factors is not None,
            ROWS_PER_PROGRAM=plan.rows_per_program,
            VECTOR=plan.vector,
            ACC=_accumulator(dtype),
            num_warps=plan.num_warps,
            **TUNING,
        )
        if with_losses:
            # The parts of all groups lie in a row: their sum is that of one long group.
            sums = 1 if reduction == "sum" else tables.num_groups
            length = partials.numel() // sums
            block = min(4096, max(512, triton.next_power_of_2(length)))
            triton_kernels.finish_kernel[(sums,)](
                partials, losses, length, BLOCK=block, num_warps=block // 256
            )
    return losses, gradient


def scale_gradient(
    gradient: Tensor, factors: Tensor, row_weights: Tensor, tables: GroupTables
) -> bool:
    """Multiply by each group's factor in place; see `autograd.Kernels`."""
    row_weights = row_weights.resolve_neg()
    num_rows, num_logits = gradient.shape
    if num_rows == 0:
        return True
    plan = _plan(tables.starts, tables.sizes, num_rows, _vector(gradient))
    dtype = torch.promote_types(gradient.dtype, torch.float32)
    with _device_of(gradient):
        triton_kernels.scale_kernel[(tables.num_groups, plan.num_programs)](
            gradient,
            row_weights,
            factors,
            num_rows,
            row_weights.stride(0),
            row_weights.stride(1),
            factors.stride(0),
            STARTS=_bounds(tables),
            BLOCKS=plan.blocks,
            TILE_ROWS=plan.tile_rows,
            NUM_GROUPS=tables.num_groups,
            NUM_LOGITS=num_logits,
            ROWS_PER_PROGRAM=plan.rows_per_program,
            VECTOR=plan.vector,
            ACC=_accumulator(dtype),
            num_warps=plan.num_warps,
        )
    return True


group_losses = functools.partial(
    autograd.group_losses, autograd.Kernels(losses_and_gradient, scale_gradient)
)


def group_scores(logits: Tensor, tables: GroupTables) -> Tensor:
    """Scores in the label convention, [R, num_labels], as `reference.group_scores`.

    Where a gradient is wanted, which no detector does, they are PyTorch's affair.
    """
    if logits.requires_grad and torch.is_grad_enabled():
        return torch_ops.group_scores(logits, tables)
    logits = _with_near_columns(logits.resolve_neg())
    num_rows = logits.shape[0]
    dtype = torch.promote_types(logits.dtype, torch.float32)
    scores = logits.new_empty((num_rows, tables.num_labels), dtype=dtype)
    if num_rows == 0:
        return scores
    vector = _vector(logits)
    plan = _plan(tables.starts, tables.sizes, num_rows, vector)
    # In narrow groups one warp loads all of a row before it waits for any of it.
    narrow = tables.has_background and plan.num_warps == 1
    widest = 256 if narrow else 2048
    constants: dict[str, Any] = {
        "STARTS": _bounds(tables),
        "NUM_GROUPS": tables.num_groups,
        "NUM_LABELS": tables.num_labels,
        "LABELS_BLOCK": min(widest, triton.next_power_of_2(tables.num_labels)),
        "VECTOR": vector,
        "ACC": _accumulator(dtype),
        "num_warps": 1 if narrow else 4,
    }
    if tables.has_background:
        kernel = triton_kernels.scores_kernel
        constants["BLOCKS"] = plan.blocks
        constants["GROUPS_BLOCK"] = triton.next_power_of_2(tables.num_groups)
    else:
        kernel = triton_kernels.joint_scores_kernel
    with _device_of(logits):
        kernel[(num_rows,)](
            logits,
            tables.label_columns,
            scores,
            logits.stride(0) // vector,
            logits.stride(1),
            **constants,
        )
    return scores


def _normalizers(
    labels: Tensor,
    row_weights: Tensor,
    category_weights: Tensor | None,
    tables: GroupTables,
    ignore_index: int,
    dtype: torch.dtype,
) -> Tensor:
    normalizers = torch.empty(tables.num_groups, dtype=dtype, device=labels.device)
    triton_kernels.normalizer_kernel[(tables.num_groups,)](
        labels,
        tables.label_columns,
        row_weights,
        labels if category_weights is None else category_weights,
        normalizers,
        labels.shape[0],
        tables.num_labels,
        ignore_index,
        row_weights.stride(0),
        row_weights.stride(1),
        STARTS=_bounds(tables),
        NUM_GROUPS=tables.num_groups,
        HAS_BACKGROUND=tables.has_background,
        FOREGROUND_START=tables.foreground_start,
        WITH_CATEGORY_WEIGHTS=category_weights is not None,
        ACC=_accumulator(dtype),
        BLOCK=min(2048, max(32, triton.next_power_of_2(labels.shape[0]))),
        num_warps=4,
    )
    return normalizers


class _Plan(NamedTuple):
    """How the rows and columns are cut."""

    vector: int  # logits of one aligned load
    blocks: int  # packed: columns of each group's block
    tile_rows: int  # packed: rows that one turn of a program takes, in each group
    rows_per_program: int
    num_programs: int  # along the rows
    num_warps: int


@functools.lru_cache(maxsize=1024)
def _plan(starts: tuple[int, ...], sizes: tuple[int, ...], num_rows: int, vector: int) -> _Plan:
    rows_per_program = triton.next_power_of_2(triton.cdiv(num_rows, MOST_PROGRAMS))
    blocks = [
        min(WIDEST_BLOCK, triton.next_power_of_2(start % vector + size))
        for start, size in zip(starts, sizes, strict=True)
    ]
    tile_rows = [min(rows_per_program, max(1, TILE_SIZE // block)) for block in blocks]
    return _Plan(
        vector=vector,
        blocks=_pack(blocks),
        tile_rows=_pack(tile_rows),
        rows_per_program=rows_per_program,
        num_programs=triton.cdiv(num_rows, rows_per_program),
        num_warps=min(8, max(1, max(blocks) // LOGITS_PER_WARP)),
    )


def _bounds(tables: GroupTables) -> int:
    return _pack((*tables.starts, tables.starts[-1] + tables.sizes[-1]))


def _pack(values: Any) -> int:
    """Small integers in one large one; see `triton_kernels`."""
    return sum(value << (PACKED_BITS * index) for index, value in enumerate(values))


def _with_near_columns(logits: Tensor) -> Tensor:
    """The logits; a copy where 32 bits do not hold the way from a row's first to its last one.

    As in a transposed matrix of many rows. The kernels count rows with 64 bits, and columns not.
    """
    if (logits.shape[1] - 1) * logits.stride(1) < 2**31:
        return logits
    return logits.contiguous()


def _vector(logits: Tensor) -> int:
    """How many logits an aligned load of at most 16 bytes can take, in any row."""
    if logits.stride(1) != 1 or logits.data_ptr() % 16 != 0:
        return 1
    vector = 16 // logits.element_size()
    while logits.stride(0) % vector or logits.shape[1] % vector:
        vector //= 2
    return vector


def _bits_of(value: float) -> int:
    """A float64 as the integer with the same bits."""
    return int(struct.unpack("<q", struct.pack("<d", value))[0])


def _accumulator(dtype: torch.dtype) -> Any:
    return tl.float64 if dtype == torch.float64 else tl.float32


def _device_of(tensor: Tensor) -> AbstractContextManager[Any]:
    """Triton launches on the current device, which need not be that of the tensor."""
    return torch.cuda.device_of(tensor) if tensor.is_cuda else nullcontext()
