"""Layer maps as attributions of the input's shape."""

from typing import Any

import numpy as np
import pytest
import torch
from captum.attr import (
    Attribution,
    IntegratedGradients,
    LayerActivation,
    LayerGradCam,
    LayerGradientXActivation,
    LayerIntegratedGradients,
    NoiseTunnel,
)
from captum.attr import visualization as viz
from captum.metrics import infidelity, sensitivity_max
from torch import Tensor, nn
from torch.nn import functional as F

from captum_ext.attr import LayerCam, LayerGradCamPlusPlus, UpsampleWrapper, tokens_to_grid
from captum_ext.imaging import min_max
from tests.methods import METHODS
from tests.networks import VIT_LAYER, TwoPictureNet, small_net, small_vit


def test_a_map_of_captum_is_resized_and_repeated_over_the_channels() -> None:
    net, x = small_net(), torch.randn(2, 3, 12, 10)
    pooled = nn.Sequential(net.conv1, nn.MaxPool2d(2), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    base = LayerGradCam(pooled, pooled[1])
    small = base.attribute(x, 4).detach()
    for mode in ("bilinear", "bicubic"):
        expected = F.interpolate(small, (12, 10), mode=mode, align_corners=False)
        result = UpsampleWrapper(base, mode).attribute(x, target=4)
        assert result.shape == x.shape
        assert result.is_contiguous()
        torch.testing.assert_close(result, expected.expand_as(x))
        assert (result < 0).any(), "raw and signed"
    corners = UpsampleWrapper(base, align_corners=True).attribute(x, target=4)
    expected = F.interpolate(small, (12, 10), mode="bilinear", align_corners=True)
    torch.testing.assert_close(corners, expected.expand_as(x))
    nearest = UpsampleWrapper(base, "nearest").attribute(x, target=4)
    torch.testing.assert_close(nearest[:, :1, ::2, ::2], small)


@pytest.mark.parametrize("dims", [1, 2, 3])
def test_signals_images_and_volumes_are_upsampled(dims: int) -> None:
    net, x = small_net(dims), torch.randn(2, 3, *[8, 6, 4][:dims])
    result = UpsampleWrapper(LayerGradCamPlusPlus(net, "pool")).attribute(x, target=1)
    single = LayerGradCamPlusPlus(net, "pool").attribute(x, target=1)
    torch.testing.assert_close(result, single.expand_as(x))


def test_channels_are_summed() -> None:
    net, x = small_net(), torch.randn(2, 3, 8, 8)
    product = LayerGradientXActivation(net, net.relu2)
    expected = product.attribute(x, 1).sum(1, keepdim=True).expand_as(x)
    torch.testing.assert_close(UpsampleWrapper(product).attribute(x, target=1), expected)
    act = LayerActivation(net, net.relu2)
    assert UpsampleWrapper(act).attribute(x).shape == x.shape


def test_maps_of_a_list_of_layers_are_fused() -> None:
    net, x = small_net(), torch.randn(2, 3, 8, 8)
    net = nn.Sequential(
        net.conv1, nn.MaxPool2d(2), net.conv2, nn.AdaptiveAvgPool2d(1), nn.Flatten()
    )
    base = LayerCam(net, ["0", "1", "2"])
    maps = [F.interpolate(m, (8, 8), mode="bilinear") for m in base.attribute(x, [1, 3])]
    low, high = (torch.stack([f(m.flatten(1), 1) for m in maps]) for f in (torch.amin, torch.amax))
    scaled = [
        (m - lo[:, None, None, None]) / (hi - lo)[:, None, None, None]
        for m, lo, hi in zip(maps, low, high, strict=True)
    ]
    for options, expected in (
        ({}, torch.stack(maps).amax(0)),
        ({"fuse": "mean"}, torch.stack(maps).mean(0)),
        ({"normalize": "minmax"}, torch.stack(scaled).amax(0)),
        ({"normalize": "tanh"}, torch.tanh(2 * torch.stack(scaled)).amax(0)),
    ):
        result = UpsampleWrapper(base, **options).attribute(x, target=[1, 3])
        torch.testing.assert_close(result, expected.expand_as(x), rtol=1e-5, atol=1e-6)


def test_attributions_of_the_inputs_shape_are_unchanged_and_wrappers_nest() -> None:
    net, x = small_net(), torch.randn(2, 3, 8, 8)
    ig = IntegratedGradients(net)
    expected, delta = ig.attribute(x, target=1, return_convergence_delta=True)
    wrapped = UpsampleWrapper(UpsampleWrapper(ig))
    assert wrapped.has_convergence_delta()
    assert wrapped.multiplies_by_inputs
    result, found_delta = wrapped.attribute(x, target=1, return_convergence_delta=True)
    torch.testing.assert_close((result, found_delta), (expected, delta))
    layer_ig = UpsampleWrapper(LayerIntegratedGradients(net, net.relu2))
    result, delta = layer_ig.attribute(x, target=1, return_convergence_delta=True)
    assert result.shape == x.shape
    assert delta.shape == (2,)


def test_tuples_of_inputs_give_tuples() -> None:
    net, x, grey = TwoPictureNet().eval(), torch.randn(2, 3, 8, 8), torch.randn(2, 1, 4, 4)
    base = LayerGradCam(net, net.net.relu2)
    maps = UpsampleWrapper(base).attribute((x, grey), target=[1, 3])
    small = base.attribute((x, grey), [1, 3]).detach()
    torch.testing.assert_close(maps[0], small.expand_as(x))
    torch.testing.assert_close(maps[1], F.interpolate(small, (4, 4), mode="bilinear"))
    (alone,) = UpsampleWrapper(LayerGradCam(net.net, net.net.relu2)).attribute((x,), target=1)
    assert alone.shape == x.shape


@pytest.mark.parametrize("name", METHODS)
def test_captums_metrics_noise_tunnel_and_visualiser_work(name: str) -> None:
    net, x = small_net(), torch.randn(2, 3, 9, 9)
    options = {"head": "fc"} if name == "CAM" else {}
    cam = UpsampleWrapper(METHODS[name](net, "relu2", **options))
    maps = cam.attribute(x, target=[1, 2])
    assert isinstance(cam, Attribution)

    def perturb(inputs: Any) -> Any:
        noise = torch.ones_like(inputs) * 0.1
        return noise, inputs - noise

    assert torch.isfinite(infidelity(net, perturb, x, maps, target=[1, 2])).all()
    worst = sensitivity_max(cam.attribute, x, target=[1, 2], n_perturb_samples=2)
    assert worst.shape == (2,)
    tunnel = NoiseTunnel(cam).attribute(x, stdevs=0.0, nt_samples=2, target=[1, 2])
    if not name.startswith("Smooth"):  # its generator continues from call to call
        torch.testing.assert_close(tunnel, maps, rtol=1e-4, atol=1e-6)
    image = maps[0].abs().add(1e-3).numpy().transpose(1, 2, 0)
    figure, _ = viz.visualize_image_attr(image, np.zeros((9, 9, 3)), use_pyplot=False)
    assert figure.axes


def test_layers_of_the_inputs_shape_are_still_layers() -> None:
    net, x = nn.Sequential(nn.Conv2d(1, 1, 1), nn.Flatten()), torch.randn(2, 1, 4, 4)
    base = LayerCam(net, ["0"])
    result = UpsampleWrapper(base, normalize="minmax").attribute(x, target=1)
    assert isinstance(result, Tensor)
    torch.testing.assert_close(result, min_max(base.attribute(x, 1)[0]))


def test_tokens_become_maps_by_reshape_transform() -> None:
    net, x = small_vit(), torch.randn(2, 3, 24, 24)
    product = LayerGradientXActivation(net, net.get_submodule(VIT_LAYER))
    with pytest.raises(ValueError, match=r"\(2, 10, 32\) cannot be laid over .*reshape_transform"):
        UpsampleWrapper(product).attribute(x, target=1)
    result = UpsampleWrapper(product, reshape_transform=tokens_to_grid).attribute(x, target=1)
    expected = tokens_to_grid(product.attribute(x, 1)).sum(1, keepdim=True)
    expected = F.interpolate(expected, (24, 24), mode="bilinear").expand_as(x)
    torch.testing.assert_close(result, expected)


def test_wrong_arguments_raise() -> None:
    net = small_net()
    base = LayerGradCam(net, net.relu2)
    with pytest.raises(TypeError, match="`attribution_method` must be an instance"):
        UpsampleWrapper(LayerGradCam)  # type: ignore[arg-type]
    for name, value in (("mode", "cubic"), ("fuse", "sum"), ("normalize", "max")):
        with pytest.raises(ValueError, match=f"`{name}` must be one of .*{value!r}"):
            UpsampleWrapper(base, **{name: value})
    with pytest.raises(ValueError, match="cannot be laid over"):
        UpsampleWrapper(LayerGradCam(net, net.fc)).attribute(torch.randn(2, 3, 8, 8), target=1)


def test_errors_of_the_wrapped_method_are_raised(trace_free: Any) -> None:
    net, x = small_net(), torch.randn(2, 3, 8, 8)
    wrapped = UpsampleWrapper(LayerGradCamPlusPlus(net, "relu2"))
    with trace_free(net, x), pytest.raises(AssertionError):
        wrapped.attribute(x, target=(1, 2, 3))
    result: Tensor = wrapped.attribute(x, target=1)
    assert not result.requires_grad
