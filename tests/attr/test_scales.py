"""Maps of wrappers, RISE and FIDO, and figures of Captum, over the range of floats."""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from captum.attr import LayerGradCam, Saliency
from torch import Tensor, nn

from captum_ext.attr import FIDO, RISE, AugmentedSR, SESSWrapper
from captum_ext.attr._masked_means import MaskedMeans
from captum_ext.evaluation.columns import (
    ExplainedBatch,
    infidelity_to_noise,
    sensitivity_to_noise,
)

pytestmark = [
    pytest.mark.filterwarnings("ignore:`inputs` are images with values from"),
    pytest.mark.filterwarnings("ignore:Input Tensor 0 did not already require gradients"),
]


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


PICTURES = torch.rand(2, 3, 20, 24, generator=seeded(7))


class ScaledNet(nn.Module):
    """A network with factors at its input and at its scores."""

    def __init__(self, at_input: float = 1.0, at_scores: float = 1.0) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.head = nn.Linear(4, 5)
        self.at_input, self.at_scores = at_input, at_scores
        draws = seeded(8)
        with torch.no_grad():
            for p in self.parameters():
                p.copy_(torch.randn(p.shape, generator=draws))

    def forward(self, x: Tensor) -> Tensor:
        features = torch.relu(self.conv(x * self.at_input)).mean((2, 3))
        scores: Tensor = self.head(features) * self.at_scores
        return scores


def constant_score(output: Tensor) -> Tensor:
    return torch.ones_like(output)


def sess(net: ScaledNet, x: Tensor) -> Tensor:
    cam = LayerGradCam(net, net.conv)
    wrapper = SESSWrapper(cam, n_scales=2, window=16, score=constant_score)
    return wrapper.attribute(x, target=1)


def augmented_sr(net: ScaledNet, x: Tensor, mode: str) -> Tensor:
    cam = LayerGradCam(net, net.conv)
    options = {"n_augmentations": 4, "downsample": 5, "generator": seeded(), "max_iterations": 5}
    return AugmentedSR(cam, mode=mode, **options).attribute(x, target=1)


def rise(net: ScaledNet, x: Tensor, estimator: str, errors: bool) -> Tensor:
    options = {"n_masks": 300, "grid": 4, "estimator": estimator, "generator": seeded()}
    result = RISE(net, score="logit").estimate(x, [1], **options)
    return result.standard_errors if errors else result.maps


METHODS: dict[str, Callable[[ScaledNet, Tensor], Tensor]] = {
    "SESS": sess,
    **{f"AugmentedSR {mode}": partial(augmented_sr, mode=mode) for mode in ("sr", "mean", "max")},
    **{
        f"RISE {estimator}{' errors' * errors}": partial(rise, estimator=estimator, errors=errors)
        for estimator in ("standard", "self-normalized")
        for errors in (False, True)
    },
    "FIDO": lambda net, x: FIDO(net).attribute(
        x, target=1, n_steps=3, n_masks=2, generator=seeded()
    ),
}


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("exponent", [-100, -60, 20, 60, 100])
def test_units_of_the_input_do_not_change_a_map(name: str, exponent: int) -> None:
    scale = 2.0**exponent
    result = METHODS[name](ScaledNet(at_input=1 / scale), PICTURES * scale)
    assert torch.equal(result, METHODS[name](ScaledNet(), PICTURES))


@pytest.mark.parametrize("name", [name for name in METHODS if name != "FIDO"])
@pytest.mark.parametrize("exponent", [-96, -70, -40, 40, 70, 100])
def test_maps_scale_with_the_scores(name: str, exponent: int) -> None:
    """SESS gives shares of the largest value."""
    scale = 2.0**exponent
    result = METHODS[name](ScaledNet(at_scores=scale), PICTURES)
    expected = METHODS[name](ScaledNet(), PICTURES) * (1 if name == "SESS" else scale)
    torch.testing.assert_close(result, expected, rtol=0, atol=2.0**-135 if exponent < -90 else 0)


@pytest.mark.parametrize("exponent", [-100, -70, 70, 100])
def test_rise_stops_at_its_tolerance_at_any_scale(exponent: int) -> None:
    """Standard errors that are too small for floats were 0, and the first masks enough."""

    def count(scale: float) -> Tensor:
        method = RISE(ScaledNet(at_scores=scale), score="logit")
        options = {"n_masks": 2000, "grid": 4, "tolerance": 0.05, "generator": seeded()}
        return method.estimate(PICTURES, [1], **options).n_masks

    assert bool((count(1.0) > 256).all())
    assert torch.equal(count(2.0**exponent), count(1.0))


@pytest.mark.parametrize("first", [0.0, 2.0**-100, 2.0**100])
def test_standard_errors_of_scores_that_grow_or_shrink_during_the_masks(first: float) -> None:
    scores = torch.rand(64, 2, generator=seeded())
    scores[:16] = first * scores[:16]
    masks = torch.rand(64, 30, generator=seeded(1))
    exact = MaskedMeans(True)
    exact.add(scores.double(), masks.double())
    for estimator in ("standard", "self-normalized"):
        for size in (16, 64):
            sums = MaskedMeans(True)
            for part, mask in zip(scores.split(size), masks.split(size), strict=True):
                sums.add(part, mask)
            for result, expected in zip(
                sums.estimates(0.5, estimator), exact.estimates(0.5, estimator), strict=True
            ):
                torch.testing.assert_close(result.double(), expected, rtol=1e-3, atol=1e-6 * first)


@pytest.mark.parametrize("figure", [sensitivity_to_noise, infidelity_to_noise])
@pytest.mark.parametrize("exponent", [-100, -70, 70, 100])
def test_figures_of_captum_do_not_depend_on_the_scale_of_the_maps(
    figure: Callable[..., Tensor], exponent: int
) -> None:
    """Captum squares the maps: a sensitivity was 0 or NaN."""

    def value(scale: float) -> Tensor:
        net = ScaledNet()
        method = Saliency(ScaledNet(at_scores=scale))
        target = torch.tensor([1, 2])
        maps = method.attribute(PICTURES.clone().requires_grad_(), target=target)
        torch.manual_seed(0)
        batch: Any = ExplainedBatch(
            net, PICTURES, maps.sum(1), target, [None] * 2, None, maps, method, {}
        )
        return figure(batch)

    expected = value(1.0)
    assert bool((expected > 0).all())
    assert torch.equal(value(2.0**exponent), expected)
