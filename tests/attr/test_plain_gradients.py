"""A warning, once for each object, where Captum leaves the gradient at activations unchanged."""

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from captum.attr import (
    Attribution,
    Deconvolution,
    DeepLift,
    GuidedBackprop,
    GuidedGradCam,
    IntegratedGradients,
    LayerGradCam,
    NoiseTunnel,
    Saliency,
)
from torch import Tensor, nn
from torch.nn import functional as F

from captum_ext.attr import AugmentedSR, SESSWrapper, UpsampleWrapper
from captum_ext.evaluation import evaluate
from captum_ext.evaluation.methods import configured_methods
from tests.networks import Lambda

WRAPPERS = {
    "UpsampleWrapper": UpsampleWrapper,
    "SESSWrapper": lambda method: SESSWrapper(method, window=8, scales=(8, 12)),
    "AugmentedSR": lambda method: AugmentedSR(method, n_augmentations=2),
    "nested": lambda method: SESSWrapper(UpsampleWrapper(NoiseTunnel(method)), window=8),
    "evaluate": lambda method: configured_methods({"it": method})[0].attribution,
}


def net_with(activation: nn.Module) -> nn.Sequential:
    torch.manual_seed(0)
    convs = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 4, 3)
    head = nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3)
    return nn.Sequential(convs[0], activation, nn.MaxPool2d(2), convs[1], *head).eval()


def warnings_of(run: Callable[[], Any]) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        run()
    return [str(w.message) for w in caught if "acts at modules" in str(w.message)]


@pytest.mark.parametrize("wrapper", WRAPPERS.values(), ids=WRAPPERS)
@pytest.mark.parametrize("method", [GuidedBackprop, Deconvolution])
def test_a_wrapper_warns_once_that_the_gradient_is_the_plain_one(
    method: Any, wrapper: Callable[[Attribution], Attribution]
) -> None:
    inner = method(net_with(nn.ReLU6()))

    def run() -> None:
        wrapped = wrapper(inner)
        if not isinstance(inner, NoiseTunnel):
            for _ in range(2):
                wrapped.attribute(torch.rand(2, 3, 12, 12), target=1)
        wrapper(inner)

    (message,) = warnings_of(run)
    assert message == (
        f"Captum's {method.__name__} acts at modules of nn.ReLU only: at ReLU6 the gradient is the "
        f"plain one."
    )


@pytest.mark.parametrize("method", [GuidedBackprop, Deconvolution])
@pytest.mark.parametrize(
    ("activation", "text"),
    [
        (nn.ReLU6(), "at ReLU6 the"),
        (nn.SiLU(), "at SiLU the"),
        (nn.GELU(), "at GELU the"),
        (nn.Hardswish(), "at Hardswish the"),
        (nn.Sequential(nn.ReLU(), nn.ELU(), nn.LeakyReLU()), "at ELU, LeakyReLU the"),
        (Lambda(F.relu), "the model has none"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_the_warning_is_true(method: Any, activation: nn.Module, text: str) -> None:
    net, x = net_with(activation), torch.rand(1, 3, 12, 12)
    (message,) = warnings_of(lambda: UpsampleWrapper(method(net)))
    assert text in message
    if not isinstance(activation, nn.Sequential):
        plain = Saliency(net).attribute(x, target=1, abs=False)
        assert torch.equal(method(net).attribute(x, target=1), plain)


def test_other_methods_and_models_of_relus_have_no_warning() -> None:
    relu, other = net_with(nn.ReLU()), net_with(nn.SiLU())
    assert not warnings_of(lambda: UpsampleWrapper(GuidedBackprop(relu)))
    assert not warnings_of(lambda: UpsampleWrapper(GuidedGradCam(relu, relu[3])))
    assert not warnings_of(lambda: UpsampleWrapper(IntegratedGradients(other)))
    assert not warnings_of(lambda: UpsampleWrapper(LayerGradCam(other, other[3])))
    assert not warnings_of(lambda: UpsampleWrapper(DeepLift(net_with(nn.ELU()))))
    assert warnings_of(lambda: UpsampleWrapper(GuidedGradCam(other, other[3])))
    (message,) = warnings_of(lambda: UpsampleWrapper(DeepLift(other)))
    assert "DeepLift acts at modules of nn.ReLU, nn.ELU, nn.Softplus and others only" in message
    (message,) = warnings_of(lambda: UpsampleWrapper(DeepLift(net_with(Lambda(F.relu)))))
    assert "the model has none" in message


def test_evaluate_warns_once(tmp_path: Path) -> None:
    net = net_with(nn.ReLU6())
    data: list[tuple[Tensor, int]] = [(torch.rand(3, 12, 12), 1) for _ in range(3)]
    methods = {"guided": GuidedBackprop(net), "saliency": Saliency(net)}
    messages = warnings_of(lambda: evaluate(methods, data, metrics=["insertion"], output=tmp_path))
    assert len(messages) == 1
