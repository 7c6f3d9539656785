"""The loss of each group, and its gradient."""

import triton
import triton.language as tl

from balanced_group_softmax.ops.triton_kernels.rows import label_columns_of, weights_of


@triton.jit(
    do_not_specialize=[
        "num_rows",
        "num_labels",
        "ignore_index",
        "row_vectors",
        "weight_group_stride",  # the number of rows, after a draw
    ]
)
def loss_kernel(
    logits,  # [R, L]
    labels,  # int64 [R]
    label_columns,  # int32 [num_labels]
    row_weights,  # bool or float [R, G]
    category_weights,  # float [C], or anything
    normalizers,  # float [G]
    factors,  # float [G], or anything
    partials,  # float [G, programs], written, or anything
    gradient,  # [R, L], contiguous, written, or anything
    num_rows,
    num_labels,
    ignore_index,
    row_vectors,  # from one row of logits to the next, in vectors
    column_stride,
    weight_row_stride,
    weight_group_stride,
    factor_stride,
    STARTS: tl.constexpr,
    BLOCKS: tl.constexpr,
    TILE_ROWS: tl.constexpr,
    NUM_GROUPS: tl.constexpr,
    NUM_LOGITS: tl.constexpr,
    HAS_BACKGROUND: tl.constexpr,
    FOREGROUND_START: tl.constexpr,
    WITH_CATEGORY_WEIGHTS: tl.constexpr,
    WITH_LOSSES: tl.constexpr,
    WITH_GRADIENT: tl.constexpr,
    WITH_FACTORS: tl.constexpr,
    ROWS_PER_PROGRAM: tl.constexpr,
    VECTOR: tl.constexpr,  # logits that one aligned load takes
    ACC: tl.constexpr,
):
    """Each program's part of each group's loss, and the gradient of the sum over groups.

    With factors the gradient is that of the sum of factor times loss. Where a row does not count
    its logits are not looked at; the gradient there is 0.
    """
    this_group = tl.program_id(0)  # the groups of a row at about the same time
    program = tl.program_id(1)
    for group in tl.static_range(NUM_GROUPS):
        if this_group == group:
            scale = 1.0 / tl.load(normalizers + group).to(ACC)
            factor = scale
            if WITH_FACTORS:
                factor = scale * tl.load(factors + group * factor_stride).to(ACC)
            part = _loss_of_program(
                logits,
                labels,
                label_columns,
                row_weights + group * weight_group_stride,
                category_weights,
                scale,
                factor,
                gradient,
                program * ROWS_PER_PROGRAM,
                num_rows,
                num_labels,
                ignore_index,
                row_vectors,
                column_stride,
                weight_row_stride,
                (STARTS >> (24 * group)) & 0xFFFFFF,
                (STARTS >> (24 * group + 24)) & 0xFFFFFF,
                (BLOCKS >> (24 * group)) & 0xFFFFFF,
                (TILE_ROWS >> (24 * group)) & 0xFFFFFF,
                NUM_LOGITS,
                HAS_BACKGROUND and group == 0,
                FOREGROUND_START,
                WITH_CATEGORY_WEIGHTS and (group > 0 or not HAS_BACKGROUND),
                WITH_GRADIENT,
                ROWS_PER_PROGRAM,
                VECTOR,
                ACC,
            )
            if WITH_LOSSES:
                tl.store(partials + group * tl.num_programs(1) + program, part)


@triton.jit
def _loss_of_program(
    logits,
    labels,
    label_columns,
    row_weights,
    category_weights,
    scale,
    factor,
    gradient,
    first_row,
    num_rows,
    num_labels,
    ignore_index,
    row_vectors,
    column_stride,
    weight_row_stride,
    START: tl.constexpr,
    END: tl.constexpr,
    BLOCK: tl.constexpr,
    TILE_ROWS: tl.constexpr,
    NUM_LOGITS: tl.constexpr,
    IS_GROUP_ZERO: tl.constexpr,
    FOREGROUND_START: tl.constexpr,
    WITH_CATEGORY_WEIGHTS: tl.constexpr,
    WITH_GRADIENT: tl.constexpr,
    ROWS_PER_PROGRAM: tl.constexpr,
    VECTOR: tl.constexpr,
    ACC: tl.constexpr,
):
    """One group's part of the loss over `ROWS_PER_PROGRAM` rows, a tile of them at a time."""
    total = tl.zeros([TILE_ROWS], ACC)
    for first in range(first_row, first_row + ROWS_PER_PROGRAM, TILE_ROWS):
        rows = first + tl.arange(0, TILE_ROWS)
        column, bad = label_columns_of(
            labels, label_columns, rows, num_rows, num_labels, ignore_index
        )
        weight = weights_of(
            row_weights,
            category_weights,
            labels,
            column,
            rows,
            num_rows,
            weight_row_stride,
            START,
            END,
            FOREGROUND_START,
            WITH_CATEGORY_WEIGHTS,
            ACC,
        )
        if IS_GROUP_ZERO:
            target = tl.where(column == 0, 0, 1)
        else:
            target = tl.where((column > START) & (column < END), column, START)
        row_logits = logits + rows.to(tl.int64) * row_vectors * VECTOR
        row_gradient = gradient + rows.to(tl.int64) * NUM_LOGITS
        counts = weight > 0
        cross_entropy = tl.zeros([TILE_ROWS], ACC)
        if tl.max(counts.to(tl.int32), 0) > 0:
            if END - START + START % VECTOR <= BLOCK:
                cross_entropy = _narrow_rows(
                    row_logits,
                    column_stride,
                    row_gradient,
                    target,
                    counts,
                    weight * factor,
                    rows < num_rows,
                    START,
                    END,
                    BLOCK,
                    WITH_GRADIENT,
                    VECTOR,
                    ACC,
                )
            else:
                cross_entropy = _wide_rows(
                    row_logits,
                    column_stride,
                    row_gradient,
                    target,
                    counts,
                    weight * factor,
                    rows < num_rows,
                    START,
                    END,
                    BLOCK,
                    WITH_GRADIENT,
                    VECTOR,
                    ACC,
                )
        elif WITH_GRADIENT:
            for base in tl.static_range(START - START % VECTOR, END, BLOCK):
                columns = base + tl.arange(0, BLOCK)
                zeros = tl.zeros([TILE_ROWS, BLOCK], ACC)
                _store(row_gradient, columns, zeros, rows < num_rows, START, END, VECTOR)
        total += tl.where(bad, float("nan"), tl.where(counts, weight * scale * cross_entropy, 0.0))
    return tl.sum(total, 0)


@triton.jit
def _narrow_rows(
    row_logits,
    column_stride,
    row_gradient,
    target,
    counts,
    share,
    in_rows,
    START: tl.constexpr,
    END: tl.constexpr,
    BLOCK: tl.constexpr,
    WITH_GRADIENT: tl.constexpr,
    VECTOR: tl.constexpr,
    ACC: tl.constexpr,
):
    """Cross-entropy of rows whose group fits one block, which is read once and kept."""
    columns = START - START % VECTOR + tl.arange(0, BLOCK)
    values = _load(row_logits, columns, column_stride, counts, START, END, VECTOR, ACC)
    largest = tl.max(values, 1)
    largest = tl.where(counts, largest, 0.0)
    exponentials = tl.exp(values - largest[:, None])
    total = tl.sum(exponentials, 1)
    is_target = columns[None, :] == target[:, None]
    of_target = tl.sum(tl.where(is_target, values, 0.0), 1)
    if WITH_GRADIENT:
        probabilities = exponentials / total[:, None]
        slope = (probabilities - tl.where(is_target, 1.0, 0.0)) * share[:, None]
        slope = tl.where(counts[:, None], slope, 0.0)
        _store(row_gradient, columns, slope, in_rows, START, END, VECTOR)
    return tl.log(total) - (of_target - largest)


@triton.jit
def _wide_rows(
    row_logits,
    column_stride,
    row_gradient,
    target,
    counts,
    share,
    in_rows,
    START: tl.constexpr,
    END: tl.constexpr,
    BLOCK: tl.constexpr,
    WITH_GRADIENT: tl.constexpr,
    VECTOR: tl.constexpr,
    ACC: tl.constexpr,
):
    """Cross-entropy of rows whose group takes several blocks; a second pass writes the gradient."""
    largest = tl.where(counts, float("-inf"), 0.0).to(ACC)
    total = tl.zeros_like(largest)
    of_target = tl.zeros_like(largest)
    for base in range(START - START % VECTOR, END, BLOCK):
        columns = base + tl.arange(0, BLOCK)
        values = _load(row_logits, columns, column_stride, counts, START, END, VECTOR, ACC)
        larger = tl.maximum(largest, tl.max(values, 1))
        # Nothing but -inf so far: no shift, which would be a NaN.
        shift = tl.where(larger == float("-inf"), 0.0, larger)
        total = total * tl.exp(largest - shift)
        total += tl.sum(tl.exp(values - shift[:, None]), 1)
        largest = larger
        is_target = columns[None, :] == target[:, None]
        of_target += tl.sum(tl.where(is_target, values, 0.0), 1)
    if WITH_GRADIENT:
        for base in range(START - START % VECTOR, END, BLOCK):
            columns = base + tl.arange(0, BLOCK)
            values = _load(row_logits, columns, column_stride, counts, START, END, VECTOR, ACC)
            probabilities = tl.exp(values - largest[:, None]) / total[:, None]
            is_target = columns[None, :] == target[:, None]
            slope = (probabilities - tl.where(is_target, 1.0, 0.0)) * share[:, None]
            slope = tl.where(counts[:, None], slope, 0.0)
            _store(row_gradient, columns, slope, in_rows, START, END, VECTOR)
    return tl.log(total) - (of_target - largest)


@triton.jit
def _load(
    row_logits,
    columns,
    column_stride,
    counts,
    START: tl.constexpr,
    END: tl.constexpr,
    VECTOR: tl.constexpr,
    ACC: tl.constexpr,
):
    """A group's logits of the rows that count, -inf elsewhere.

    Whole vectors are read: up to `VECTOR - 1` logits of the neighbouring groups, not looked at.
    """
    end: tl.constexpr = END + (VECTOR - END % VECTOR) % VECTOR
    values = tl.load(
        row_logits[:, None] + columns[None, :] * column_stride,
        mask=counts[:, None] & (columns < end)[None, :],
        other=0.0,
    ).to(ACC)
    inside = (columns >= START) & (columns < END)
    return tl.where(counts[:, None] & inside[None, :], values, float("-inf"))


@triton.jit
def _store(
    row_gradient,
    columns,
    values,
    in_rows,
    START: tl.constexpr,
    END: tl.constexpr,
    VECTOR: tl.constexpr,
):
    """A group's gradient: whole vectors first, then what of the group lies outside of them."""
    first: tl.constexpr = START + (VECTOR - START % VECTOR) % VECTOR
    last: tl.constexpr = END - END % VECTOR
    pointers = row_gradient[:, None] + columns[None, :]
    values = values.to(row_gradient.dtype.element_ty)
    whole = (columns >= first) & (columns < last)
    if first < last:
        tl.store(pointers, values, mask=in_rows[:, None] & whole[None, :])
    if first > START or last < END:
        edges = (columns >= START) & (columns < END) & ((columns < first) | (columns >= last))
        tl.store(pointers, values, mask=in_rows[:, None] & edges[None, :])


@triton.jit(do_not_specialize=["length"])
def finish_kernel(
    partials,  # float [sums, length]
    losses,  # float [sums] or, of one, [], written
    length,
    BLOCK: tl.constexpr,
):
    """Adds up the programs' parts, each sum in one program and so in a fixed order."""
    this_sum = tl.program_id(0)
    total = tl.zeros([BLOCK], losses.dtype.element_ty)
    for first in range(0, length, BLOCK):
        parts = first + tl.arange(0, BLOCK)
        total += tl.load(partials + this_sum * length + parts, mask=parts < length, other=0.0)
    tl.store(losses + this_sum, tl.sum(total, 0))


@triton.jit(do_not_specialize=["num_rows", "weight_group_stride"])
def scale_kernel(
    gradient,  # [R, L], contiguous, changed in place
    row_weights,  # bool or float [R, G]
    factors,  # float [G]
    num_rows,
    weight_row_stride,
    weight_group_stride,
    factor_stride,
    STARTS: tl.constexpr,
    BLOCKS: tl.constexpr,
    TILE_ROWS: tl.constexpr,
    NUM_GROUPS: tl.constexpr,
    NUM_LOGITS: tl.constexpr,
    ROWS_PER_PROGRAM: tl.constexpr,
    VECTOR: tl.constexpr,
    ACC: tl.constexpr,
):
    """Multiplies each group's gradient by its factor; a factor of 1 costs no more than its read."""
    this_group = tl.program_id(0)
    first_row = tl.program_id(1) * ROWS_PER_PROGRAM
    for group in tl.static_range(NUM_GROUPS):
        if this_group == group:
            factor = tl.load(factors + group * factor_stride).to(ACC)
            if factor != 1.0:
                for first in range(
                    first_row,
                    first_row + ROWS_PER_PROGRAM,
                    (TILE_ROWS >> (24 * group)) & 0xFFFFFF,
                ):
                    _scale_rows(
                        gradient,
                        row_weights + group * weight_group_stride,
                        factor,
                        first,
                        num_rows,
                        weight_row_stride,
                        (STARTS >> (24 * group)) & 0xFFFFFF,
                        (STARTS >> (24 * group + 24)) & 0xFFFFFF,
                        (BLOCKS >> (24 * group)) & 0xFFFFFF,
                        (TILE_ROWS >> (24 * group)) & 0xFFFFFF,
                        NUM_LOGITS,
                        VECTOR,
                        ACC,
                    )


@triton.jit
def _scale_rows(
    gradient,
    row_weights,
    factor,
    first_row,
    num_rows,
    weight_row_stride,
    START: tl.constexpr,
    END: tl.constexpr,
    BLOCK: tl.constexpr,
    TILE_ROWS: tl.constexpr,
    NUM_LOGITS: tl.constexpr,
    VECTOR: tl.constexpr,
    ACC: tl.constexpr,
):
    rows = first_row + tl.arange(0, TILE_ROWS)
    offsets = rows.to(tl.int64) * weight_row_stride
    counts = tl.load(row_weights + offsets, mask=rows < num_rows, other=0) > 0
    row_gradient = gradient + rows.to(tl.int64) * NUM_LOGITS
    if tl.max(counts.to(tl.int32), 0) > 0:
        for base in range(START - START % VECTOR, END, BLOCK):
            columns = base + tl.arange(0, BLOCK)
            values = _load(row_gradient, columns, 1, counts, START, END, VECTOR, ACC)
            # An overflowing loss scale must not meet the zeros of a row that does not count.
            scaled = tl.where(values == 0, 0.0, values * factor)
            _store(row_gradient, columns, scaled, counts, START, END, VECTOR)
