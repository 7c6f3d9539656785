"""The draw of others, and the normalizers of a loss."""

import triton
import triton.language as tl

from balanced_group_softmax.ops.triton_kernels.rows import label_columns_of, weights_of


@triton.jit(do_not_specialize=["num_rows", "num_labels", "ignore_index", "ratio_bits"])
def sample_kernel(
    labels,  # int64 [R]
    label_columns,  # int32 [num_labels]
    keys,  # int32 [groups of categories, R]
    active,  # bool [G, R], written
    normalizers,  # float [G], written
    num_rows,
    num_labels,
    ignore_index,
    ratio_bits,  # others_ratio as the bits of a float64: a float argument would be float32
    STARTS: tl.constexpr,
    NUM_GROUPS: tl.constexpr,
    HAS_BACKGROUND: tl.constexpr,
    BLOCK: tl.constexpr,
    ONE_BLOCK: tl.constexpr,  # whether it holds all rows
):
    """Which rows count in which group, one program a group."""
    group = tl.program_id(0)
    start = 0
    end = 0
    for index in tl.static_range(NUM_GROUPS):
        start = tl.where(group == index, (STARTS >> (24 * index)) & 0xFFFFFF, start)
        end = tl.where(group == index, (STARTS >> (24 * index + 24)) & 0xFFFFFF, end)
    # Group 0 has the foreground column for all that is not background, and no others.
    is_group_zero = HAS_BACKGROUND & (group == 0)
    keys += tl.maximum(group - HAS_BACKGROUND, 0) * num_rows.to(tl.int64)
    active += group * num_rows.to(tl.int64)

    # Read here, and again in every loop where they are too many to be kept.
    columns, row_keys = _columns_and_keys(
        labels, label_columns, keys, 0, num_rows, num_labels, ignore_index, BLOCK
    )
    num_valid = 0
    num_own = 0
    for first in range(0, num_rows, BLOCK):
        column = columns
        if not ONE_BLOCK:
            column, _ = _columns_and_keys(
                labels, label_columns, keys, first, num_rows, num_labels, ignore_index, BLOCK
            )
        own = ((column > start) & (column < end)) | ((column >= 0) & is_group_zero)
        num_valid += tl.sum((column >= 0).to(tl.int32), 0)
        num_own += tl.sum(own.to(tl.int32), 0)
    num_others = num_valid - num_own
    # In float64 and clamped there: float32 truncates some products to one less.
    wanted = num_own.to(tl.float64) * ratio_bits.to(tl.int64).to(tl.float64, bitcast=True)
    kept = num_others
    if num_own == 0:
        kept = 0
    elif wanted < num_others.to(tl.float64):
        kept = wanted.to(tl.int32)

    largest, ties = _largest_key_that_counts(
        labels,
        label_columns,
        keys,
        num_rows,
        num_labels,
        ignore_index,
        start,
        end,
        kept,
        num_others,
        columns,
        row_keys,
        BLOCK,
        ONE_BLOCK,
    )
    seen = 0
    for first in range(0, num_rows, BLOCK):
        rows = first + tl.arange(0, BLOCK)
        column, key = columns, row_keys
        if not ONE_BLOCK:
            column, key = _columns_and_keys(
                labels, label_columns, keys, first, num_rows, num_labels, ignore_index, BLOCK
            )
        own = ((column > start) & (column < end)) | ((column >= 0) & is_group_zero)
        other = (column >= 0) & (own == 0) & (kept > 0)
        equal = (other & (key == largest)).to(tl.int32)
        rank = seen + tl.cumsum(equal, 0)
        seen += tl.sum(equal, 0)
        drawn = (key < largest) | ((equal > 0) & (rank <= ties)) | (kept == num_others)
        tl.store(active + rows, own | (other & drawn), mask=rows < num_rows)
    tl.store(normalizers + group, tl.maximum(num_own + kept, 1).to(tl.float32))


@triton.jit
def _largest_key_that_counts(
    labels,
    label_columns,
    keys,
    num_rows,
    num_labels,
    ignore_index,
    start,
    end,
    kept,
    num_others,
    columns,
    row_keys,
    BLOCK: tl.constexpr,
    ONE_BLOCK: tl.constexpr,
):
    """The largest among the `kept` smallest keys of others, and how many rows with it count.

    A radix select: each of four histograms settles eight more bits. Not looked for where it does
    not matter, none or all of the others being kept.
    """
    largest = 0  # its leading bits, as far as they are settled
    ties = kept  # how many keys with these leading bits count
    if (kept > 0) & (kept < num_others):
        for digit in range(4):
            shift = 24 - 8 * digit
            histogram = tl.zeros([512], tl.int32)
            for first in range(0, num_rows, BLOCK):
                column, key = columns, row_keys
                if not ONE_BLOCK:
                    column, key = _columns_and_keys(
                        labels,
                        label_columns,
                        keys,
                        first,
                        num_rows,
                        num_labels,
                        ignore_index,
                        BLOCK,
                    )
                candidate = (column >= 0) & ((column <= start) | (column >= end))
                if digit > 0:
                    candidate = candidate & ((key >> (shift + 8)) == largest)
                bits = (key >> shift) & 255
                if digit == 0:
                    bits = bits ^ 128  # negative keys come first
                histogram += tl.histogram(tl.where(candidate, bits, 256), 512)
            bins = tl.arange(0, 512)
            below = (bins < 256) & (tl.cumsum(histogram, 0) < ties)
            found = tl.sum(below.to(tl.int32), 0)
            ties -= tl.sum(tl.where(below, histogram, 0), 0)
            if digit == 0:
                largest = found - 128
            else:
                largest = largest * 256 + found
    return largest, ties


@triton.jit
def _columns_and_keys(
    labels, label_columns, keys, first, num_rows, num_labels, ignore_index, BLOCK: tl.constexpr
):
    """The logit column of each row's label, -1 where it has none, and the row's key."""
    rows = first + tl.arange(0, BLOCK)
    column, _ = label_columns_of(labels, label_columns, rows, num_rows, num_labels, ignore_index)
    return column, tl.load(keys + rows, mask=rows < num_rows, other=0)


@triton.jit(do_not_specialize=["num_rows", "num_labels", "ignore_index", "group_stride"])
def normalizer_kernel(
    labels,  # int64 [R]
    label_columns,  # int32 [num_labels]
    row_weights,  # bool or float [R, G]
    category_weights,  # float [C], or anything
    normalizers,  # float [G], written
    num_rows,
    num_labels,
    ignore_index,
    row_stride,
    group_stride,
    STARTS: tl.constexpr,
    NUM_GROUPS: tl.constexpr,
    HAS_BACKGROUND: tl.constexpr,
    FOREGROUND_START: tl.constexpr,
    WITH_CATEGORY_WEIGHTS: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The sum of the weights in each group, at least 1; one program a group."""
    this_group = tl.program_id(0)
    for group in tl.static_range(NUM_GROUPS):
        if this_group == group:
            total = tl.zeros([BLOCK], ACC)
            for first in range(0, num_rows, BLOCK):
                rows = first + tl.arange(0, BLOCK)
                column, _ = label_columns_of(
                    labels, label_columns, rows, num_rows, num_labels, ignore_index
                )
                total += weights_of(
                    row_weights + group * group_stride,
                    category_weights,
                    labels,
                    column,
                    rows,
                    num_rows,
                    row_stride,
                    (STARTS >> (24 * group)) & 0xFFFFFF,
                    (STARTS >> (24 * group + 24)) & 0xFFFFFF,
                    FOREGROUND_START,
                    WITH_CATEGORY_WEIGHTS and (group > 0 or not HAS_BACKGROUND),
                    ACC,
                )
            tl.store(normalizers + group, tl.maximum(tl.sum(total, 0), 1.0))
