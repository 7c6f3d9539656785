"""What a row counts for: the column of its label, and its weight in a group."""

import triton
import triton.language as tl


@triton.jit
def label_columns_of(labels, label_columns, rows, num_rows, num_labels, ignore_index):
    """The logit column of each row's label, and -1 where it has none; which labels are none."""
    in_rows = rows < num_rows
    label = tl.load(labels + rows, mask=in_rows, other=0)
    counts = in_rows & (label != ignore_index)
    known = counts & (label >= 0) & (label < num_labels)
    column = tl.load(label_columns + label, mask=known, other=-1)
    return column, counts & (known == 0)


@triton.jit
def weights_of(
    row_weights,
    category_weights,
    labels,
    column,
    rows,
    num_rows,
    row_stride,
    START: tl.constexpr,
    END: tl.constexpr,
    FOREGROUND_START: tl.constexpr,
    WITH_CATEGORY_WEIGHTS: tl.constexpr,
    ACC: tl.constexpr,
):
    """Weight of each row in a group; 0 where it does not count."""
    offsets = rows.to(tl.int64) * row_stride
    weight = tl.load(row_weights + offsets, mask=rows < num_rows, other=0).to(ACC)
    if WITH_CATEGORY_WEIGHTS:
        own = (column > START) & (column < END)
        label = tl.load(labels + rows, mask=own, other=0)
        category_weight = tl.load(category_weights + label - FOREGROUND_START, mask=own, other=1)
        weight *= category_weight.to(ACC)
    # Neither a negative weight nor a NaN counts.
    return tl.where((column >= 0) & (weight > 0), weight, 0.0)
