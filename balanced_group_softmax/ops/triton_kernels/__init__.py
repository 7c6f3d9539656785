"""The Triton kernels: the draw, the loss with its gradient, and the scores.

A layout reaches a kernel as constants, so each group's columns, its block and the rows of a tile
are known when it is compiled. Lists of constants come packed, 24 bits an entry, in one integer,
since Triton before 3.4 takes no tuples. Labels come as they are: where one is neither a label nor
`ignore_index`, its row counts nowhere and every group's loss is NaN.
"""

from balanced_group_softmax.ops.triton_kernels.loss import (
    finish_kernel,
    loss_kernel,
    scale_kernel,
)
from balanced_group_softmax.ops.triton_kernels.sampling import normalizer_kernel, sample_kernel
from balanced_group_softmax.ops.triton_kernels.scores import joint_scores_kernel, scores_kernel

__all__ = [
    "finish_kernel",
    "joint_scores_kernel",
    "loss_kernel",
    "normalizer_kernel",
    "sample_kernel",
    "scale_kernel",
    "scores_kernel",
]
