"""Balanced Group Softmax (BAGS): a classifier head for long-tailed detection and classification."""

from balanced_group_softmax._version import __version__
from balanced_group_softmax.counts import category_counts
from balanced_group_softmax.detections import Detections, select_detections
from balanced_group_softmax.functional import grouped_softmax_loss, grouped_softmax_scores
from balanced_group_softmax.head import BAGSHead, BAGSLoss
from balanced_group_softmax.layout import GroupLayout
from balanced_group_softmax.sampling import sample_others

__all__ = [
    "BAGSHead",
    "BAGSLoss",
    "Detections",
    "GroupLayout",
    "__version__",
    "category_counts",
    "grouped_softmax_loss",
    "grouped_softmax_scores",
    "sample_others",
    "select_detections",
]
