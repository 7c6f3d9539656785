"""Scores in the order of the labels."""

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["row_vectors"])
def scores_kernel(
    logits,  # [R, L]
    label_columns,  # int32 [num_labels]
    scores,  # float [R, num_labels], contiguous, written
    row_vectors,
    column_stride,
    STARTS: tl.constexpr,
    BLOCKS: tl.constexpr,
    NUM_GROUPS: tl.constexpr,
    GROUPS_BLOCK: tl.constexpr,  # power of two from `NUM_GROUPS`
    NUM_LABELS: tl.constexpr,
    LABELS_BLOCK: tl.constexpr,
    VECTOR: tl.constexpr,
    ACC: tl.constexpr,
):
    """Scores of one row, with background, in the order of the labels.

    First a look at each group: its largest logit and, times the probability of foreground, the
    inverse of its sum of exponentials. Then each label's logit is fetched from the cache.
    """
    row = tl.program_id(0).to(tl.int64)
    row_logits = logits + row * row_vectors * VECTOR
    group_index = tl.arange(0, GROUPS_BLOCK)
    maxima = tl.zeros([GROUPS_BLOCK], ACC)
    inverses = tl.zeros([GROUPS_BLOCK], ACC)
    for group in tl.static_range(NUM_GROUPS):
        largest, total = _group_statistics(
            row_logits,
            column_stride,
            (STARTS >> (24 * group)) & 0xFFFFFF,
            (STARTS >> (24 * group + 24)) & 0xFFFFFF,
            (BLOCKS >> (24 * group)) & 0xFFFFFF,
            VECTOR,
            ACC,
        )
        inverse = 1.0 / total
        if group == 0:
            foreground = tl.load(row_logits + column_stride).to(ACC)
            foreground_probability = tl.exp(foreground - largest) * inverse
        else:
            inverse *= foreground_probability
        maxima = tl.where(group_index == group, largest, maxima)
        inverses = tl.where(group_index == group, inverse, inverses)
    for first in range(0, NUM_LABELS, LABELS_BLOCK):
        label = first + tl.arange(0, LABELS_BLOCK)
        column = tl.load(label_columns + label, mask=label < NUM_LABELS, other=0)
        value = tl.load(row_logits + column * column_stride, mask=label < NUM_LABELS, other=0.0)
        largest_of_label = tl.zeros([LABELS_BLOCK], ACC)
        inverse_of_label = tl.zeros([LABELS_BLOCK], ACC)
        for group in tl.static_range(NUM_GROUPS):
            inside = column >= ((STARTS >> (24 * group)) & 0xFFFFFF)
            largest = tl.sum(tl.where(group_index == group, maxima, 0.0), 0)
            inverse = tl.sum(tl.where(group_index == group, inverses, 0.0), 0)
            largest_of_label = tl.where(inside, largest, largest_of_label)
            inverse_of_label = tl.where(inside, inverse, inverse_of_label)
        score = tl.exp(value.to(ACC) - largest_of_label) * inverse_of_label
        tl.store(scores + row * NUM_LABELS + label, score, mask=label < NUM_LABELS)


@triton.jit
def _group_statistics(
    row_logits,
    column_stride,
    START: tl.constexpr,
    END: tl.constexpr,
    BLOCK: tl.constexpr,
    VECTOR: tl.constexpr,
    ACC: tl.constexpr,
):
    """The largest logit of a group of one row, and the sum of exponentials from there."""
    if END - START + START % VECTOR <= BLOCK:
        columns = START - START % VECTOR + tl.arange(0, BLOCK)
        values = _load_row(row_logits, columns, column_stride, START, END, VECTOR, ACC)
        largest = tl.max(values, 0)
        total = tl.sum(tl.exp(values - largest), 0)
    else:
        largest = tl.full([], float("-inf"), ACC)
        total = tl.full([], 0.0, ACC)
        for base in range(START - START % VECTOR, END, BLOCK):
            columns = base + tl.arange(0, BLOCK)
            values = _load_row(row_logits, columns, column_stride, START, END, VECTOR, ACC)
            larger = tl.maximum(largest, tl.max(values, 0))
            shift = tl.where(larger == float("-inf"), 0.0, larger)
            total = total * tl.exp(largest - shift) + tl.sum(tl.exp(values - shift), 0)
            largest = larger
    return largest, total


@triton.jit
def _load_row(
    row_logits,
    columns,
    column_stride,
    START: tl.constexpr,
    END: tl.constexpr,
    VECTOR: tl.constexpr,
    ACC: tl.constexpr,
):
    """A group's logits of one row, -inf elsewhere; whole vectors are read."""
    end: tl.constexpr = END + (VECTOR - END % VECTOR) % VECTOR
    values = tl.load(row_logits + columns * column_stride, mask=columns < end, other=0.0).to(ACC)
    return tl.where((columns >= START) & (columns < END), values, float("-inf"))


@triton.jit(do_not_specialize=["row_vectors"])
def joint_scores_kernel(
    logits,  # [R, L]
    label_columns,  # int32 [C]
    scores,  # float [R, C], contiguous, written
    row_vectors,
    column_stride,
    STARTS: tl.constexpr,
    NUM_GROUPS: tl.constexpr,
    NUM_LABELS: tl.constexpr,
    LABELS_BLOCK: tl.constexpr,
    VECTOR: tl.constexpr,
    ACC: tl.constexpr,
):
    """Scores of one row without background: the softmax of each logit less its group's `others`."""
    row = tl.program_id(0).to(tl.int64)
    row_logits = logits + row * row_vectors * VECTOR
    largest = tl.full([], float("-inf"), ACC)
    total = tl.full([], 0.0, ACC)
    for first in range(0, NUM_LABELS, LABELS_BLOCK):
        label = first + tl.arange(0, LABELS_BLOCK)
        margin = _margins(
            row_logits, column_stride, label_columns, label, STARTS, NUM_GROUPS, NUM_LABELS, ACC
        )
        larger = tl.maximum(largest, tl.max(margin, 0))
        shift = tl.where(larger == float("-inf"), 0.0, larger)
        total = total * tl.exp(largest - shift) + tl.sum(tl.exp(margin - shift), 0)
        largest = larger
    for first in range(0, NUM_LABELS, LABELS_BLOCK):
        label = first + tl.arange(0, LABELS_BLOCK)
        margin = _margins(
            row_logits, column_stride, label_columns, label, STARTS, NUM_GROUPS, NUM_LABELS, ACC
        )
        score = tl.exp(margin - largest) / total
        tl.store(scores + row * NUM_LABELS + label, score, mask=label < NUM_LABELS)


@triton.jit
def _margins(
    row_logits,
    column_stride,
    label_columns,
    label,
    STARTS: tl.constexpr,
    NUM_GROUPS: tl.constexpr,
    NUM_LABELS: tl.constexpr,
    ACC: tl.constexpr,
):
    """By how much each category's logit exceeds its group's `others`; -inf after the last one."""
    in_labels = label < NUM_LABELS
    column = tl.load(label_columns + label, mask=in_labels, other=0)
    start = tl.zeros_like(column)
    for group in tl.static_range(NUM_GROUPS):
        first = (STARTS >> (24 * group)) & 0xFFFFFF
        start = tl.where(column >= first, first, start)
    own = tl.load(row_logits + column * column_stride, mask=in_labels, other=0.0).to(ACC)
    others = tl.load(row_logits + start * column_stride, mask=in_labels, other=0.0).to(ACC)
    return tl.where(in_labels, own - others, float("-inf"))
