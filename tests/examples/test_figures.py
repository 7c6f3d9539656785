"""What pictures of a run show, whatever the images and categories are."""

import sys
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("torchvision")
pytest.importorskip("matplotlib")
pytest.importorskip("lvis")
sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))

from figures import plot_detections, plot_weight_norms
from matplotlib.backends.backend_agg import FigureCanvasAgg

NAMES = ["red pentagon", "a category with a long name"]


@pytest.mark.parametrize(("height", "width"), [(128, 128), (480, 640), (200, 120)])
def test_labels_are_inside_the_pictures_and_rows_fit(height: int, width: int) -> None:
    boxes = torch.tensor([[0, 0, 20, 20], [width - 20, height - 20, width, height]]).float()
    target = {"boxes": boxes, "labels": torch.tensor([1, 2])}
    found = {**target, "labels": torch.tensor([2, 2]), "scores": torch.tensor([0.9, 0.8])}
    items = [(torch.zeros(3, height, width), target)] * 2
    figure = plot_detections(items, {"softmax": [found] * 2}, NAMES, [True, False])
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    pictures = [axes for axes in figure.axes if axes.texts]
    assert len(pictures) == 4
    for axes in pictures:
        inside = axes.get_window_extent()
        for text in axes.texts:
            box = text.get_window_extent()
            assert inside.x0 - 1 <= box.x0 < box.x1 <= inside.x1 + 1, text.get_text()
            assert inside.y0 - 1 <= box.y0 < box.y1 <= inside.y1 + 1, text.get_text()
    taken = sum(axes.get_window_extent().height for axes in pictures[::2])
    assert taken > 0.8 * canvas.get_width_height()[1]  # no gaps


def test_each_category_has_a_step_and_a_whole_number() -> None:
    norms = {"softmax": np.array([1.0, 2.0, 3.0]), "bags": np.array([1.0, 2.0, 3.0])}
    figure = plot_weight_norms(norms, [16, 40, 2], [[2], [0, 1]])
    axes, instances = figure.axes
    assert all(tick == int(tick) for tick in axes.get_xticks())
    area = instances.collections[0].get_datalim(instances.transData)
    assert (area.x0, area.x1) == (0.5, 3.5)
