"""Class weights against independent formulas, on the real counts of LVIS."""

import json
from pathlib import Path

import numpy as np
import pytest

from balanced_group_softmax.rebalance.class_weights import (
    class_balanced_weights,
    inverse_frequency_weights,
)


@pytest.mark.parametrize("version", ["v0.5", "v1"])
def test_weights_of_real_counts(lvis_data: Path, version: str) -> None:
    rows = json.loads((lvis_data / f"lvis_{version}_train_categories.json").read_text())
    counts = [row["instance_count"] for row in rows]
    positive = [max(count, 1) for count in counts]
    mean = sum(1 / n for n in positive) / len(positive)
    expected = [min(max(1 / n / mean, 0.1), 5) for n in positive]
    np.testing.assert_allclose(inverse_frequency_weights(counts), expected, rtol=1e-12)
    effective = [sum(0.999**i for i in range(min(n, 40_000))) for n in positive[:200]]
    ours = class_balanced_weights(counts, limits=(1e-9, 1e9))[:200] * np.array(effective)
    np.testing.assert_allclose(ours, ours[0], rtol=1e-9)  # 1 / (1 + b + ... + b^(n - 1))
    clipped = class_balanced_weights(counts)
    assert clipped.min() == 0.1
    assert clipped.max() <= 5


@pytest.mark.parametrize("weights", [inverse_frequency_weights, class_balanced_weights])
def test_bad_arguments_are_refused(weights: type) -> None:
    with pytest.raises(ValueError, match="at least one"):
        weights([])
    with pytest.raises(ValueError, match="-1 at position 1"):
        weights([1, -1])
    with pytest.raises(TypeError, match="integers"):
        weights([0.5])
    with pytest.raises(ValueError, match="positive and ordered"):
        weights([1], limits=(5, 0.1))
    with pytest.raises(ValueError, match="`beta` below 1"):
        class_balanced_weights([1], beta=1.0)
