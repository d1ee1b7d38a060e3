"""Pictures of maps over the image that they explain."""

import numpy as np
import pytest
import torch
from PIL import Image

from captum_ext import gallery


@pytest.mark.parametrize(("n", "columns"), [(1, 2), (3, 4), (5, 3), (7, 4), (12, 5)])
def test_gallery_has_a_panel_for_each_map(n, columns):
    image = Image.fromarray(np.zeros((20, 20, 3), np.uint8))
    maps = {f"method {i}": torch.rand(20, 20) for i in range(n)}
    figure = gallery.gallery(image, maps, "tabby: 40.0 %", "net, layer x")
    panels = [axes for axes in figure.axes if axes.get_title()]
    assert [axes.get_title() for axes in panels] == ["Image", *maps]
    boxes = np.array([axes.get_position().bounds for axes in panels])
    inches = boxes[:, 2:] * figure.get_size_inches()
    assert np.allclose(inches, inches[0, 0])
    assert len(np.unique(boxes[:, 0].round(6))) == columns
    assert [text.get_text() for text in figure.texts] == ["tabby: 40.0 %", "net, layer x"]
    assert ((boxes >= 0) & (boxes <= 1)).all()


def test_gallery_keeps_the_shape_of_the_image():
    image = Image.fromarray(np.zeros((30, 60, 3), np.uint8))
    figure = gallery.gallery(image, {f"method {i}": torch.rand(30, 60) for i in range(6)})
    boxes = np.array([axes.get_position().bounds for axes in figure.axes if axes.get_title()])
    wide, high = (boxes[:, 2:] * figure.get_size_inches()).T
    assert np.allclose(wide, 2 * high)
    assert ((boxes >= 0) & (boxes <= 1)).all()


def test_overlay_shows_the_positive_part():
    white = np.ones((1, 4, 3))
    colours = gallery.overlay(white, torch.tensor([[-5.0, 0.0, 1.0, 2.0]]))[0]
    assert np.allclose(colours[0], colours[1])
    assert (np.diff(colours[1:].sum(1)) > 0).all()
    scaled = gallery.overlay(white, torch.tensor([[-1.0, 0.0, 10.0, 20.0]]))[0]
    assert np.allclose(colours, scaled)
    flat = gallery.overlay(white, torch.zeros(1, 4))[0]
    assert np.isfinite(flat).all()
    assert np.allclose(flat, colours[0])
