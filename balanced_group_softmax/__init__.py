"""Balanced Group Softmax (BAGS): a classifier head for long-tailed detection and classification."""

from balanced_group_softmax._version import __version__

__all__ = ["__version__"]
