"""A model in train mode is run as it stands: one warning, and its buffers are put back."""

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from captum.attr import LayerGradCam
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from torch.nn.utils import spectral_norm as old_spectral_norm

from captum_ext.attr import (
    FIDO,
    RISE,
    AugmentedSR,
    LayerClassActivationMap,
    LayerHiResCam,
    SESSWrapper,
    UpsampleWrapper,
)
from captum_ext.features import ActivationMaximization, maximally_activating_patches
from captum_ext.metrics import average_drop, deletion, increase_in_confidence, insertion, road
from tests.attr.wrappers.test_matrix import INPUT
from tests.methods import METHODS

SIDE = 16


def training_net(norm: Callable[[nn.Module], nn.Module] = parametrizations.spectral_norm) -> Any:
    """A network in train mode, with a batch norm and a head whose weight is computed."""
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        norm(nn.Linear(4, 3)),
    )
    return net.train()


NORMS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "spectral norm": parametrizations.spectral_norm,
    "old spectral norm": old_spectral_norm,
    "weight norm": parametrizations.weight_norm,
    "orthogonal": parametrizations.orthogonal,
}


def check_train_mode(net: nn.Module, run: Callable[[], Any]) -> None:
    """Check that a run warns once, and that parameters, buffers and flags stay."""
    before = {name: value.clone() for name, value in net.state_dict().items()}
    flags = [module.training for module in net.modules()]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        run()
    assert [str(w.message) for w in caught if "train mode" in str(w.message)] != []
    assert len([w for w in caught if "train mode" in str(w.message)]) == 1
    after = net.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], value) for name, value in before.items())
    assert [module.training for module in net.modules()] == flags


def images() -> Tensor:
    return torch.rand(2, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("norm", NORMS.values(), ids=NORMS)
@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
def test_layer_methods_leave_a_model_in_train_mode_as_it_was(
    method: Callable[..., Any], norm: Callable[[nn.Module], nn.Module]
) -> None:
    net = training_net(norm)
    check_train_mode(net, lambda: method(net, "2").attribute(images(), target=1))
    check_train_mode(net, lambda: UpsampleWrapper(method(net, "2")).attribute(images(), target=1))


@pytest.mark.parametrize("norm", NORMS.values(), ids=NORMS)
def test_the_constructor_of_cam_reads_no_weight(norm: Callable[[nn.Module], nn.Module]) -> None:
    net = training_net(norm)
    before = {name: value.clone() for name, value in net.state_dict().items()}
    LayerClassActivationMap(net, "2")
    assert all(torch.equal(net.state_dict()[name], value) for name, value in before.items())


@pytest.mark.parametrize("norm", NORMS.values(), ids=NORMS)
def test_cam_takes_the_weight_of_its_own_pass(norm: Callable[[nn.Module], nn.Module]) -> None:
    """CAM is the product of the cells and HiResCAM, also where each reading moves the weight."""
    net, x = training_net(norm), images()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        cam = LayerClassActivationMap(net, "2").attribute(x, target=1)
        hires = LayerHiResCam(net, "2").attribute(x, target=1)
    torch.testing.assert_close(cam, hires * SIDE * SIDE)


WRAPPERS: dict[str, Callable[[Any], Any]] = {
    "UpsampleWrapper": UpsampleWrapper,
    "SESS": lambda method: SESSWrapper(method, window=12, scales=(12, 16)),
    "AugmentedSR": lambda method: AugmentedSR(method, n_augmentations=2),
    "nested": lambda method: SESSWrapper(UpsampleWrapper(method), window=12, scales=(12,)),
}


@pytest.mark.parametrize("wrapper", WRAPPERS.values(), ids=WRAPPERS)
@pytest.mark.parametrize("name", ["LayerGradCam", "IntegratedGradients", "Saliency", "Occlusion",
                                  "GuidedBackprop"])  # fmt: skip
def test_wrappers_of_captums_methods_leave_a_model_in_train_mode_as_it_was(
    name: str, wrapper: Callable[[Any], Any]
) -> None:
    net, x = training_net(), images()
    if name == "LayerGradCam":
        method, arguments = LayerGradCam(net, net[2]), {}
    else:
        method, arguments = INPUT[name].build(net), INPUT[name].arguments(x)
    check_train_mode(net, lambda: wrapper(method).attribute(x, target=1, **arguments))


OTHERS: dict[str, Callable[[Any, Tensor], Any]] = {
    "RISE": lambda net, x: RISE(net).attribute(x, target=1, n_masks=5),
    "FIDO": lambda net, x: FIDO(net).attribute(x, target=1, n_steps=2),
    "insertion": lambda net, x: insertion(net, x, x, 1),
    "deletion": lambda net, x: deletion(net, x, x, 1),
    "road": lambda net, x: road(net, x, x, 1),
    "average_drop": lambda net, x: average_drop(net, x, x, 1),
    "increase_in_confidence": lambda net, x: increase_in_confidence(net, x, x, 1),
    "activation maximisation": lambda net, x: ActivationMaximization(net, "2").maximize(
        x, 1, n_steps=2
    ),
    "patches": lambda net, x: maximally_activating_patches(net, "2", list(x), size=SIDE),
}


@pytest.mark.parametrize("name", OTHERS)
def test_methods_and_metrics_leave_a_model_in_train_mode_as_it_was(name: str) -> None:
    net = training_net()
    check_train_mode(net, lambda: OTHERS[name](net, images()))
    function_of_net = training_net()
    if name not in ("activation maximisation", "patches"):
        check_train_mode(
            function_of_net, lambda: OTHERS[name](lambda x: function_of_net(x), images())
        )
