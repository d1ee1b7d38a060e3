"""Token layers read as maps, and which layer to explain."""

from functools import partial
from typing import Any

import pytest
import torch
from captum.attr import LayerGradCam
from torch import Tensor, nn
from torchvision import models

from captum_ext.attr import (
    LayerAblationCam,
    LayerClassActivationMap,
    LayerGradCamPlusPlus,
    LayerHiResCam,
    LayerScoreCam,
    channels_last_to_first,
    suggest_layer,
    suggest_reshape_transform,
    tokens_to_grid,
)
from tests.captures import layer_activations
from tests.methods import GRADIENT, METHODS
from tests.networks import VIT_LAYER, small_net, small_swin, small_vit, torchvision_net


def test_tokens_are_laid_out_row_by_row_behind_the_prefix() -> None:
    tokens = torch.arange(13.0).reshape(1, 13, 1).repeat(2, 1, 3)
    grid = tokens_to_grid(tokens)  # 3 x 3 and four prefix tokens
    assert grid.shape == (2, 3, 3, 3)
    assert grid[1, 2].flatten().tolist() == list(range(4, 13))
    wide = tokens_to_grid(tokens, grid=(3, 4))
    assert wide[0, 0].tolist() == [[1, 2, 3, 4], [5, 6, 7, 8], [9, 10, 11, 12]]
    assert tokens_to_grid(tokens[:, :9], prefix_tokens=0)[0, 0, 0].tolist() == [0, 1, 2]


@pytest.mark.parametrize(
    ("n", "prefix", "side"), [(197, 1, 14), (198, 2, 14), (201, 5, 14), (49, 0, 7), (257, 1, 16)]
)
def test_grids_are_inferred(n: int, prefix: int, side: int) -> None:
    grid = tokens_to_grid(torch.arange(float(n)).reshape(1, n, 1))
    assert grid.shape == (1, 1, side, side)
    assert grid[0, 0, 0, 0] == prefix


@pytest.mark.parametrize(
    ("options", "n"),
    [({}, 35), ({"grid": (5, 5)}, 24), ({"prefix_tokens": 1}, 12), ({"grid": (2, 2)}, 24)],
)
def test_a_number_of_tokens_that_fits_no_grid_is_an_error(options: dict[str, Any], n: int) -> None:
    with pytest.raises(ValueError, match=rf"{n} tokens \(shape \(2, {n}, 3\)\)"):
        tokens_to_grid(torch.zeros(2, n, 3), **options)


def test_tensors_that_are_no_tokens_are_an_error() -> None:
    with pytest.raises(ValueError, match=r"\(B, T, C\), got \(2, 3\)"):
        tokens_to_grid(torch.zeros(2, 3))
    with pytest.raises(ValueError, match=r"\(B, h, w, C\), got \(2, 3, 4\)"):
        channels_last_to_first(torch.zeros(2, 3, 4))


@pytest.mark.parametrize("name", METHODS)
def test_vit_maps_follow_the_patches(name: str) -> None:
    net, x = small_vit(), torch.randn(2, 3, 24, 24)
    options = {"head": "heads.head"} if name == "CAM" else {}
    method = METHODS[name](net, VIT_LAYER, reshape_transform=tokens_to_grid, **options)
    result = method.attribute(x, target=[1, 3])
    assert result.shape == (2, 1, 3, 3)
    assert result.abs().max() > 0
    alone = torch.cat([method.attribute(x[i : i + 1], target=2 * i + 1) for i in range(2)])
    if not name.startswith("Smooth"):  # its generator goes on from call to call
        torch.testing.assert_close(result, alone, rtol=1e-3, atol=1e-5)


def test_vit_map_by_hand() -> None:
    net, x = small_vit().double(), torch.randn(1, 3, 24, 24).double()
    layer = net.get_submodule(VIT_LAYER)
    kept: list[Tensor] = []

    def keep(module: Any, args: Any, y: Tensor) -> None:
        y.retain_grad()
        kept.append(y)

    handle = layer.register_forward_hook(keep)
    net(x.requires_grad_())[0, 3].backward()
    handle.remove()
    product = (kept[0] * kept[0].grad).sum(2)[:, 1:].reshape(1, 1, 3, 3).detach()
    result = LayerHiResCam(net, layer, reshape_transform=tokens_to_grid).attribute(x.detach(), 3)
    torch.testing.assert_close(result, product, rtol=1e-9, atol=1e-12)


def test_ablating_a_channel_of_tokens_leaves_the_class_token_alone() -> None:
    net, x = small_vit().double(), torch.randn(1, 3, 24, 24).double()
    layer = net.get_submodule(VIT_LAYER)
    ((tokens,),), score = layer_activations(net, [layer], (x,), 2)
    lost = []
    for k in range(32):
        edited = tokens.clone()
        edited[:, 1:, k] = 0
        handle = layer.register_forward_hook(lambda m, a, y, e=edited: e)
        with torch.no_grad():
            lost.append(score - net(x)[:, 2])
        handle.remove()
    expected = torch.stack(lost, 1)[..., None, None] * tokens_to_grid(tokens)
    method = LayerAblationCam(net, layer, reshape_transform=tokens_to_grid, divide_by_score=False)
    result = method.attribute(x, target=2)
    torch.testing.assert_close(result, expected.sum(1, keepdim=True), rtol=1e-8, atol=1e-11)


def test_swin_channels_last_and_its_class_activation_map() -> None:
    net, x = small_swin(), torch.randn(2, 3, 32, 32)
    last = LayerClassActivationMap(net, "norm", reshape_transform=channels_last_to_first)
    first = LayerClassActivationMap(net, "permute")
    torch.testing.assert_close(last.attribute(x, 1), first.attribute(x, 1))


def test_tokens_without_a_transform_are_an_error_that_names_the_shape() -> None:
    vit, swin, x = small_vit(), small_swin(), torch.randn(2, 3, 24, 24)
    assert LayerGradCam(vit, vit.get_submodule(VIT_LAYER)).attribute(x, 1).shape == (2, 1, 32), (
        "Captum sums over the tokens and keeps the channels"
    )
    for method in METHODS.values():
        options = {"head": "heads.head"} if method is METHODS["CAM"] else {}
        with pytest.raises(ValueError, match=r"of shape \(2, 10, 32\)"):
            method(vit, VIT_LAYER, **options).attribute(x, target=1)
    with pytest.raises(ValueError, match=r"of shape \(2, 4, 4, 32\).*channels_last_to_first"):
        LayerGradCamPlusPlus(swin, "norm").attribute(torch.randn(2, 3, 32, 32), target=1)
    with pytest.raises(ValueError, match="tokens"):
        LayerGradCamPlusPlus(vit, "encoder.layers.encoder_layer_0.self_attention").attribute(x, 1)


@pytest.mark.parametrize("name", ["features.1.0.attn", "features.1.0.mlp", "features.0.1"])
def test_channels_last_without_a_normalisation_in_the_layer(name: str) -> None:
    with pytest.raises(ValueError, match=r"of shape \(2, 8, 8, 16\)"):
        LayerHiResCam(small_swin(), name).attribute(torch.randn(2, 3, 32, 32), 1)


def test_signals_and_wide_maps_are_not_taken_for_tokens() -> None:
    signal = small_net(1)
    assert LayerHiResCam(signal, "conv2").attribute(torch.randn(2, 3, 6), 1).shape == (2, 1, 6)
    next_net = models.convnext_tiny().eval()
    result = LayerHiResCam(next_net, "features.0").attribute(torch.randn(1, 3, 64, 64), 1)
    assert result.shape == (1, 1, 16, 16)


def test_transforms_with_options() -> None:
    net, x = small_vit(), torch.randn(1, 3, 24, 24)
    options = partial(tokens_to_grid, grid=(3, 3), prefix_tokens=1)
    expected = LayerScoreCam(net, VIT_LAYER, reshape_transform=tokens_to_grid).attribute(x, 0.0, 1)
    result = LayerScoreCam(net, VIT_LAYER, reshape_transform=options).attribute(x, 0.0, 1)
    torch.testing.assert_close(result, expected)


# --- suggest_layer --------------------------------------------------------------------------------

SUGGESTED = {
    "alexnet": "features.11",
    "vgg16_bn": "features.42",
    "resnet50": "layer4",
    "resnext50_32x4d": "layer4",
    "wide_resnet50_2": "layer4",
    "densenet121": "features",
    "squeezenet1_1": "features",
    "googlenet": "inception5b",
    "inception_v3": "Mixed_7c",
    "mobilenet_v2": "features",
    "mobilenet_v3_large": "features",
    "mnasnet1_0": "layers",
    "shufflenet_v2_x1_0": "conv5",
    "regnet_y_400mf": "trunk_output",
    "efficientnet_b0": "features",
    "efficientnet_v2_s": "features",
    "convnext_tiny": "features",
    "vit_b_16": "encoder.layers.encoder_layer_11.ln_1",
    "swin_t": "permute",
    "swin_v2_t": "permute",
    "maxvit_t": "blocks.3",
}


def on_meta(name: str) -> nn.Module:
    """A torchvision network, without values where it can be built without."""
    return torchvision_net(name, device="cpu" if name.startswith("regnet") else "meta")


@pytest.mark.parametrize("name", SUGGESTED)
def test_suggested_layers_of_torchvision_models(name: str) -> None:
    model = on_meta(name)
    assert suggest_layer(model) == SUGGESTED[name]
    is_vit = name.startswith("vit")
    assert suggest_reshape_transform(model) is (tokens_to_grid if is_vit else None)


@pytest.mark.slow
def test_every_torchvision_classifier_has_a_suggestion() -> None:
    for name in models.list_models(module=models):
        if not name.startswith("regnet") or name == "regnet_x_400mf":  # the others are large
            model = on_meta(name)
            model.get_submodule(suggest_layer(model))


SMALL_MODELS = {
    "squeezenet1_1": 64,
    "mobilenet_v3_small": 64,
    "shufflenet_v2_x0_5": 64,
    "regnet_y_400mf": 64,
    "mnasnet0_5": 64,
    "googlenet": 64,
    "densenet121": 64,
    "efficientnet_b0": 64,
}
LARGE_MODELS = {
    "alexnet": 64,
    "vgg11_bn": 64,
    "resnet50": 64,
    "resnext50_32x4d": 64,
    "inception_v3": 75,
    "mobilenet_v2": 64,
    "efficientnet_v2_s": 64,
    "convnext_tiny": 64,
    "swin_t": 64,
    "swin_v2_t": 64,
    "vit_b_16": 64,
}


@pytest.mark.parametrize("name", SMALL_MODELS)
def test_suggested_layers_have_a_map(name: str) -> None:
    model, size = torchvision_net(name), SMALL_MODELS[name]
    method = LayerGradCamPlusPlus(model, suggest_layer(model))
    result = method.attribute(torch.randn(1, 3, size, size), target=3)
    assert result.dim() == 4
    assert result.shape[1] == 1
    assert result.shape[2] == result.shape[3]


@pytest.mark.slow
@pytest.mark.parametrize("architecture", SMALL_MODELS | LARGE_MODELS)
@pytest.mark.parametrize("name", GRADIENT)
def test_a_batch_equals_its_examples_on_every_architecture(name: str, architecture: str) -> None:
    torch.manual_seed(0)
    size = (SMALL_MODELS | LARGE_MODELS)[architecture]
    options = {"image_size": size} if architecture.startswith("vit") else {}
    model = torchvision_net(architecture, **options)
    head = [module for module in model.modules() if isinstance(module, nn.Linear | nn.Conv2d)][-1]
    nn.init.normal_(head.weight)  # some begin with zeros
    model, x, targets = model.double(), torch.randn(2, 3, size, size).double(), [3, 5]

    def maps(images: Tensor, target: list[int]) -> Tensor:
        transform = suggest_reshape_transform(model)
        method = GRADIENT[name](model, suggest_layer(model), reshape_transform=transform)
        return method.attribute(images, target=target)

    result = maps(x, targets)
    assert result.shape[1] == 1
    assert torch.isfinite(result).all()
    assert (result.flatten(1).amax(1) > result.flatten(1).amin(1)).all()
    alone = torch.cat([maps(x[i : i + 1], targets[i : i + 1]) for i in range(2)])
    torch.testing.assert_close(result / result.abs().max(), alone / result.abs().max())


def test_the_last_resort_is_the_last_convolution() -> None:
    assert suggest_layer(small_net()) == "conv2"
    headless = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 5, 1), nn.AdaptiveAvgPool2d(1))
    assert suggest_layer(headless) == "0"
    with pytest.raises(ValueError, match="No layer to suggest for Sequential"):
        suggest_layer(nn.Sequential(nn.Flatten(), nn.Linear(3, 4)))
    with pytest.raises(ValueError, match=r"must be a torch\.nn\.Module"):
        suggest_layer(lambda x: x)
