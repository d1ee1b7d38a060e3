"""Boxes of units: receptive fields, clipping at the image's border, and effective fields."""

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from captum_ext._engine.receptive_field import FieldAxis, ReceptiveField
from captum_ext.features import maximally_activating_patches as top_patches
from captum_ext.features._fields import clip_boxes, energy_boxes, field_boxes
from tests.features.test_patches import PLAIN, noise
from tests.networks import Lambda, NoGradConv, SqueezeExcitation, net_with_ties, small_net


def test_field_boxes_equal_those_made_by_hand() -> None:
    # conv5_3 of VGG-16: r = 196, j = 16, c = 7.5
    vgg = FieldAxis(196, 16, 7.5)
    resnet = FieldAxis(435, 32, 0)
    result = field_boxes(ReceptiveField(vgg, resnet), torch.tensor([[0, 0], [13, 6]]))
    assert result.tolist() == [[-217, -90, 218, 106], [192 - 217, 208 - 90, 192 + 218, 208 + 106]]


def test_clipped_boxes_equal_those_made_by_hand() -> None:
    boxes = torch.tensor([[-5, 2, 3, 4], [7, -9, 30, 30], [-4, -4, -2, 9], [12, 3, 14, 20]])
    result = clip_boxes(boxes, (8, 10))
    assert result.tolist() == [[0, 2, 3, 4], [7, 0, 10, 8], [0, 0, 1, 8], [9, 3, 10, 8]]


def test_energy_boxes_equal_those_made_by_hand() -> None:
    rows = torch.tensor([1.0, 0.0, 2.0, 94.0, 0.0, 3.0])
    columns = torch.tensor([0.0, 50.0, 50.0, 0.0])
    energy = (rows[:, None] * columns / 100)[None]
    # columns end where the energy does; of 100 a tail of (1 - share) / 4 is cut off the rows
    expected = {1.0: (0, 6), 0.97: (0, 6), 0.95: (2, 6), 0.89: (2, 6), 0.87: (3, 4), 0.0: (3, 4)}
    for share, (top, bottom) in expected.items():
        assert energy_boxes(energy, share).tolist() == [[1, top, 3, bottom]], share
    nothing = torch.zeros(1, 6, 4)
    both = energy_boxes(torch.cat([nothing, energy]), 0.95)
    assert both.tolist() == [[0, 0, 4, 6], [1, 2, 3, 6]]


@given(st.integers(0, 2**20), st.sampled_from([0.5, 0.8, 0.95, 1.0]))
def test_energy_boxes_contain_their_share(seed: int, share: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    energy = torch.rand(4, 7, 5, generator=generator).pow(8)
    for image_energy, (x1, y1, x2, y2) in zip(
        energy, energy_boxes(energy, share).tolist(), strict=True
    ):
        assert image_energy[y1:y2, x1:x2].sum() >= (share - 1e-6) * image_energy.sum()


def positive(net: nn.Module) -> nn.Module:
    for parameter in net.parameters():
        nn.init.uniform_(parameter, 0.5, 1.5)
    return net.double().eval()


def test_a_box_with_all_of_the_energy_is_the_receptive_field() -> None:
    parts = [nn.Conv2d(3, 4, 5, 2, 2), nn.AvgPool2d(3, 2, 1), nn.Conv2d(4, 2, 3, padding=1)]
    net, data = positive(nn.Sequential(*parts)), noise(12, 40, 40)
    options: dict[str, Any] = {"n": 12, "size": (40, 36), "normalize": PLAIN}
    analytic = top_patches(net, "2", data, **options)
    for batch_size in (5, 32):
        effective = top_patches(
            net, "2", data, receptive_field="effective", energy=1, batch_size=batch_size, **options
        )
        assert torch.equal(effective.boxes, analytic.boxes)
        assert torch.equal(effective.unclipped_boxes, analytic.unclipped_boxes)
    smaller = top_patches(net, "2", data, receptive_field="effective", energy=0.5, **options)
    assert torch.equal(smaller.indices, analytic.indices)
    low, high = smaller.boxes[..., :2], smaller.boxes[..., 2:]
    assert (low >= analytic.boxes[..., :2]).all()
    assert (high <= analytic.boxes[..., 2:]).all()
    areas = (high - low).prod(-1) / (analytic.boxes[..., 2:] - analytic.boxes[..., :2]).prod(-1)
    assert areas.max() < 0.8


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("layer", ["norm", "relu2"])
def test_effective_boxes_come_from_each_units_own_gradient(dtype: torch.dtype, layer: str) -> None:
    net, data = small_net(dtype=dtype), noise(15, 12, 12)
    options: dict[str, Any] = {"n": 4, "size": 12, "normalize": PLAIN, "units": [3, 1, 2]}
    result = top_patches(
        net, layer, data, receptive_field="effective", energy=0.7, batch_size=5, **options
    )
    analytic = top_patches(net, layer, data, **options).boxes
    for row, unit in enumerate(result.units):
        for i, index in enumerate(result.indices[row].tolist()):
            x = (data[index][0] / 255).to(dtype)[None].requires_grad_()
            y = net.norm(net.conv1(x))
            y = net.relu2(net.conv2(net.relu1(y))) if layer == "relu2" else y
            r, c = result.positions[row, i].tolist()
            gradient: Tensor
            (gradient,) = torch.autograd.grad(y[0, unit, r, c], x)
            x1, y1, x2, y2 = energy_boxes(gradient.double().square().sum(1), 0.7)[0].tolist()
            a1, b1, a2, b2 = analytic[row, i].tolist()
            expected = [max(x1, a1), max(y1, b1), min(x2, a2), min(y2, b2)]
            assert result.boxes[row, i].tolist() == expected


def test_a_unit_without_a_gradient_keeps_its_receptive_field() -> None:
    net, data = net_with_ties(), noise(6)  # a step function has no gradient
    options: dict[str, Any] = {"n": 3, "size": 8, "normalize": PLAIN}
    analytic = top_patches(net, "1", data, **options)
    assert analytic.boxes[..., 0].max() > 0
    result = top_patches(net, "1", data, receptive_field="effective", **options)
    assert torch.equal(result.boxes, analytic.boxes)


def test_squares_of_gradients_do_not_underflow() -> None:
    net = positive(nn.Conv2d(3, 1, 3, bias=False)).float()
    with torch.no_grad():
        net.weight *= 1e-30
    options: dict[str, Any] = {"n": 3, "size": 8, "receptive_field": "effective", "energy": 1}
    result = top_patches(net, net, noise(6), normalize=PLAIN, **options)
    assert (result.boxes[..., 2:] - result.boxes[..., :2] == 3).all()


def test_a_later_step_in_place_does_not_change_effective_boxes() -> None:
    conv, data = nn.Conv2d(3, 2, 5, padding=2), noise(6)
    options: dict[str, Any] = {"n": 3, "size": 8, "receptive_field": "effective", "energy": 0.3}
    expected = top_patches(conv, conv, data, **options)
    result = top_patches(nn.Sequential(conv, Lambda(lambda x: x.zero_())), conv, data, **options)
    assert torch.equal(result.values, expected.values)
    assert torch.equal(result.boxes, expected.boxes)


def test_effective_boxes_work_where_units_see_the_whole_image() -> None:
    """With squeeze and excitation, the gate's gradient is small and covers the whole image."""
    net, data = SqueezeExcitation().double(), noise(6, 20, 20)
    options: dict[str, Any] = {"n": 3, "size": 20, "normalize": PLAIN}
    plain = top_patches(net, net, data, **options)
    assert (plain.boxes == torch.tensor([0, 0, 20, 20])).all()
    result = top_patches(net, net, data, receptive_field="effective", **options)
    assert result.reason == plain.reason is not None
    at = result.positions.flip(-1)
    for i in (0, 1):  # the part of the gradient without the gate
        assert (result.boxes[..., i] <= at[..., i]).all()
        assert (result.boxes[..., 2 + i] > at[..., i]).all()
    assert (result.boxes[..., 2:] - result.boxes[..., :2]).max() <= 3


def test_layers_without_gradients_are_refused() -> None:
    net = NoGradConv(3)
    with pytest.raises(ValueError, match="`conv` has no gradient with respect to the images"):
        top_patches(net, "conv", noise(3), size=8, receptive_field="effective")
