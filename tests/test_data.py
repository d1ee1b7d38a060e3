"""Sizes, normalisation and boxes of pictures; tests of the classes that use them cover the rest."""

import subprocess
import sys

import numpy as np
import pytest
import torch

from captum_ext._data.pictures import scale_boxes
from captum_ext._data.pixels import Normalize
from captum_ext._data.sizes import height_width

ARRAYS = [np.array([7, 7]), torch.tensor([7, 7]), torch.tensor(7), [torch.tensor(7), 7]]


@pytest.mark.parametrize("value", [7, np.int64(7), (7, 7), [7, 7], (np.int32(7), 7), *ARRAYS])
def test_sizes_are_one_or_two_integers(value):
    sides = height_width("size", value)
    assert sides == (7, 7)
    assert [type(side) for side in sides] == [int, int]


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (0, "an integer of at least 1, got 0"),
        (True, "an integer of at least 1, got True"),
        (7.0, "an integer of at least 1, got 7.0"),
        ((7, -1), "an integer of at least 1, got -1"),
        ("7", "an integer of at least 1, got '7'"),
        (None, "an integer of at least 1, got None"),
        ((7,), r"one or two numbers of pixels, \(height, width\), got \(7,\)"),
        ([1, 2, 3], "one or two numbers"),
        (np.array([1, 2, 3]), "one or two numbers"),
        (torch.ones(2, 2), "one or two numbers"),
        (np.array([7.0, 7.0]), "an integer of at least 1, got 7.0"),
        (torch.tensor([7.5, 7]), "an integer of at least 1, got 7.5"),
        ([torch.tensor([7, 7]), 7], "one or two numbers"),
        (b"ab", "an integer of at least 1, got b'ab'"),
    ],
)
def test_other_sizes_are_errors(value, message):
    with pytest.raises(ValueError, match=f"^`window` must be {message}"):
        height_width("window", value)


@pytest.mark.parametrize("channels", [1, 3])
def test_normalize_has_an_inverse_and_takes_three_forms(channels):
    mean, std = [0.25, 0.5, 0.75][:channels], [0.5, 0.25, 2.0][:channels]
    pictures = torch.tensor([0.25, 0.5, 1.0], dtype=torch.float64).reshape(3, 1, 1)
    images = Normalize((mean, std))(pictures)
    if channels == 1:  # 0.299 R + 0.587 G + 0.114 B
        assert images.flatten().tolist() == pytest.approx([(0.48225 - 0.25) / 0.5])
    else:
        assert images.flatten().tolist() == [0.0, 0.0, 0.125]
        assert torch.equal(Normalize((mean, std)).inverse(images), pictures)
    assert Normalize((np.array(mean), torch.tensor(std))).to_lists() == [mean, std]
    preprocess = type("Preprocess", (), {"mean": mean, "std": std})()
    assert Normalize(preprocess).to_lists() == [mean, std]
    assert Normalize(torch.tensor([mean, std])).to_lists() == [mean, std]


def test_boxes_scale_with_pictures():
    boxes = torch.tensor([[1.0, 2.0, 3.0, 4.0]], dtype=torch.float64)
    assert scale_boxes(boxes, (4, 6), (8, 3)).tolist() == [[0.5, 4, 1.5, 8]]


def test_the_module_of_sizes_imports_neither_pillow_nor_torchvision():
    code = (
        "import sys, captum_ext._data.sizes; print([n for n in ('PIL', 'torchvision', 'kornia') "
        "if n in sys.modules])"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"
