"""Weights of categories from their counts: the two re-weighting methods that BAGS is compared with.

Count 0 is taken as 1 here, as in everything that divides by counts.
"""

from typing import Any

import numpy as np

from balanced_group_softmax._arguments import as_float, as_int_array

__all__ = ["class_balanced_weights", "inverse_frequency_weights"]

LIMITS = (0.1, 5.0)


def inverse_frequency_weights(counts: Any, *, limits: tuple[float, float] = LIMITS) -> np.ndarray:
    r"""Return weights in inverse proportion to counts, of mean 1 before they are clipped.

    .. math:: w_c = \mathrm{clip}\big(n_c^{-1} / \mathrm{mean}_k(n_k^{-1}), a, b\big)

    Args:
        counts: training instances of each category, C integers.
        limits: (a, b), the least and the greatest weight.

    Returns:
        float64 [C].

    Raises:
        TypeError: the counts are not integers.
        ValueError: there are none, one is negative, or the limits are not positive and ordered.

    Example:
        >>> inverse_frequency_weights([1, 2, 1000]).round(3).tolist()
        [1.998, 0.999, 0.1]
    """
    return _normalised(1.0 / _positive_counts(counts), limits)


def class_balanced_weights(
    counts: Any, *, beta: float = 0.999, limits: tuple[float, float] = LIMITS
) -> np.ndarray:
    r"""Return weights by the effective number of samples, of mean 1 before they are clipped.

    .. math:: w_c \propto \frac{1 - \beta}{1 - \beta^{n_c}}

    Args:
        counts: training instances of each category, C integers.
        beta: in [0, 1).
        limits: the least and the greatest weight.

    Returns:
        float64 [C].

    Raises:
        TypeError: the counts are not integers, or `beta` is not a number.
        ValueError: there are no counts, one is negative, `beta` is out of range, or the limits are
            not positive and ordered.

    Source: Cui et al., *Class-Balanced Loss Based on Effective Number of Samples*, CVPR 2019,
    equation 2.

    Example:
        >>> class_balanced_weights([1, 2, 1000]).round(3).tolist()
        [1.998, 0.999, 0.1]
    """
    positive = _positive_counts(counts)
    beta = as_float(beta, "beta", lowest=0.0, highest=1.0)
    if beta == 1.0:
        raise ValueError("Expected `beta` below 1, got 1")
    return _normalised((1.0 - beta) / (1.0 - np.power(beta, positive)), limits)


def _positive_counts(counts: Any) -> np.ndarray:
    array = as_int_array(counts, "counts")
    if array.size == 0:
        raise ValueError("Expected `counts` of at least one category, got none")
    if (array < 0).any():
        at = int(np.argmax(array < 0))
        raise ValueError(f"Expected `counts` to be non-negative, got {array[at]} at position {at}")
    return np.maximum(array, 1).astype(np.float64)


def _normalised(weights: np.ndarray, limits: tuple[float, float]) -> np.ndarray:
    least, greatest = (as_float(limit, "limits", lowest=0.0) for limit in limits)
    if not 0 < least <= greatest:
        raise ValueError(f"Expected `limits` to be positive and ordered, got {limits}")
    return np.clip(weights / weights.mean(), least, greatest)
