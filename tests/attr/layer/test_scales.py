"""Maps follow the scale of activations and gradients over the range of float32."""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from captum_ext._engine.precision import divide_by_power
from captum_ext.attr import LayerClassActivationMap, LayerEigenCam, LayerEigenGradCam
from tests.methods import GRADIENT, METHODS
from tests.networks import FunctionsAroundLayer, Lambda, small_vit

NAMED: dict[str, Callable[..., Any]] = {
    **METHODS,
    "CAM": partial(LayerClassActivationMap, head="head"),
}
# Powers of two are exact: 1e-30, 1e-22, 1e-12, 1e6, 1e19, 1e20 and 1e30, about.
EXPONENTS = (-100, -73, -40, 20, 63, 67, 100)
# Grad-CAM++ compares the gradient with the activations, and is scaled by neither alone.
IN_ACTIVATIONS = (GRADIENT.keys() | {"CAM", "Eigen-CAM", "Ablation-CAM"}) - {
    "Grad-CAM++",
    "Smooth Grad-CAM++",
}
IN_SCORES = GRADIENT.keys() - {"Grad-CAM++", "Smooth Grad-CAM++"}


def scaled_net(activations: float = 1.0, behind: float = 1.0, scores: float = 1.0) -> nn.Sequential:
    """A network with factors at its layer, behind the layer, and at the scores."""
    torch.manual_seed(0)
    net = nn.Sequential()
    net.add_module("conv", nn.Conv2d(3, 5, 3))
    net.add_module("layer", Lambda(lambda x: x * activations))
    net.add_module("behind", Lambda(lambda x: nn.functional.relu(x * behind).mean((2, 3))))
    net.add_module("head", nn.Linear(5, 3, bias=False))
    net.add_module("scores", Lambda(lambda x: x * scores))
    return net.eval()


def cam(name: str, **scales: float) -> Tensor:
    net, x = (
        scaled_net(**scales),
        torch.rand(2, 3, 9, 9, generator=torch.Generator().manual_seed(1)),
    )
    result: Tensor = NAMED[name](net, "layer", reshape_transform=nn.Identity()).attribute(
        x, target=1
    )
    return result


def check_equal(result: Tensor, expected: Tensor) -> None:
    """Compare maps; small terms of the smallest maps are denormal numbers."""
    torch.testing.assert_close(result, expected, rtol=0, atol=1e-6 * float(expected.abs().max()))


@pytest.mark.parametrize("exponent", EXPONENTS)
@pytest.mark.parametrize("name", sorted(IN_ACTIVATIONS))
def test_maps_scale_with_the_activations(name: str, exponent: int) -> None:
    check_equal(cam(name, activations=2.0**exponent) / 2.0**exponent, cam(name))


@pytest.mark.parametrize("exponent", EXPONENTS)
@pytest.mark.parametrize("name", sorted(IN_SCORES))
def test_maps_scale_with_the_scores(name: str, exponent: int) -> None:
    check_equal(cam(name, scores=2.0**exponent) / 2.0**exponent, cam(name))


@pytest.mark.parametrize("exponent", EXPONENTS)
@pytest.mark.parametrize("name", sorted(NAMED))
def test_a_factor_that_the_model_takes_back_does_not_change_the_map(
    name: str, exponent: int
) -> None:
    """Gradient maps are the same, all others scale with the activations."""
    factor = 1.0 if name in GRADIENT or name == "Group-CAM" else 2.0**exponent
    result = cam(name, activations=2.0**exponent, behind=2.0**-exponent) / factor
    check_equal(result, cam(name))


@pytest.mark.parametrize("factor", [1e19, 1e20, 1e-22])
@pytest.mark.parametrize("channels", [2, 40])
@pytest.mark.parametrize("center", [False, True])
def test_eigen_cam_scales_with_large_and_small_activations(
    factor: float, channels: int, center: bool
) -> None:
    x = torch.randn(4, channels, 5, 6)

    def result_of(x: Tensor) -> Tensor:
        net = FunctionsAroundLayer(lambda y: y.sum((2, 3)))
        net.layer = nn.Identity()
        transform = nn.Identity()
        return LayerEigenCam(net, net.layer, reshape_transform=transform, center=center).attribute(
            x, target=0
        )

    expected = result_of(x.double())
    tolerance = 1e-4 * float(expected.abs().max())
    result = result_of(x * factor).double() / factor
    torch.testing.assert_close(result, expected, rtol=0, atol=tolerance)


def test_division_by_a_power_is_exact_and_by_example() -> None:
    x = torch.randn(300, 4) * torch.logspace(-44, 38, 300, dtype=torch.float64)[:, None].float()
    x[7] = 0
    divided, power = divide_by_power(x)
    assert torch.equal(divided * power, x)
    assert torch.equal(power, 2 ** power.double().log2().round().float())
    largest = divided.abs().amax(1)
    normal = (x.abs().amax(1) > 2.0**-126) & (x.abs().amax(1) < 2.0**126)
    assert bool(((largest >= 0.5) & (largest < 1))[normal].all())
    assert torch.equal(divide_by_power(x[5:6])[0][0], divided[5])


@pytest.mark.parametrize(
    ("method", "dtype"),
    [
        (LayerEigenCam, torch.float32),
        (LayerEigenCam, torch.float64),
        (LayerEigenCam, torch.bfloat16),
        (LayerEigenGradCam, torch.float32),
        (LayerEigenGradCam, torch.float64),
    ],
)
def test_a_zero_mean_over_the_channels_leaves_the_sign_to_the_farthest_value(
    method: Any, dtype: torch.dtype
) -> None:
    """After a layer norm the mean over the channels is rounding noise, and so was the sign."""
    x = torch.randn(16, 24, 5, 5).to(dtype)
    norm = nn.LayerNorm(24, dtype=dtype)
    centred = norm(x.movedim(1, 3)).movedim(3, 1).detach()
    net = FunctionsAroundLayer(lambda y: y.sum((1, 2, 3))[:, None])  # a gradient of ones
    cam = method(net, net.layer, reshape_transform=nn.Identity())
    for noise in (0.0, 1e-7, -1e-7):
        maps = cam.attribute(centred + noise, target=0).float().flatten(1)
        farthest = maps.gather(1, maps.abs().argmax(1, keepdim=True))
        assert bool((farthest > 0).all())
        for example in range(3):
            alone = cam.attribute((centred + noise)[example : example + 1], target=0)
            torch.testing.assert_close(alone.float().flatten(), maps[example])


def test_eigen_cam_of_a_normed_vision_transformer_is_the_same_in_a_batch() -> None:
    from captum_ext.attr import tokens_to_grid

    net, x = small_vit(), torch.randn(6, 3, 24, 24)
    layer = "encoder.layers.encoder_layer_1.ln_1"
    method = LayerEigenCam(net, layer, reshape_transform=tokens_to_grid)
    batch = method.attribute(x, target=1)
    for example in range(6):
        alone = method.attribute(x[example : example + 1], target=1)
        torch.testing.assert_close(alone[0], batch[example], rtol=1e-4, atol=1e-5)
