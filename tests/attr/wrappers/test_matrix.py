"""Every base in every wrapper and nesting: results are finite, and a batch equals its images.

The usual run has every pair of the base, the outer and the inner wrapper; the nightly run has all
combinations (the marker `slow`).
"""

import inspect
import warnings
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from captum._utils.models.linear_model import SkLearnLasso
from captum.attr import (
    Attribution,
    Deconvolution,
    DeepLift,
    FeatureAblation,
    GradientShap,
    GuidedBackprop,
    InputXGradient,
    IntegratedGradients,
    KernelShap,
    LayerGradCam,
    Lime,
    NoiseTunnel,
    Occlusion,
    Saliency,
)
from torch import Tensor, nn

from captum_ext.attr import FCAM, FIDO, RISE, AugmentedSR, SESSWrapper, UpsampleWrapper
from captum_ext.fcam import FCAMDecoder
from tests.methods import CLASSES, METHODS
from tests.networks import named_net
from tests.sampling import cover_pairs

SIDE, CHANNELS = 16, 3
TARGETS = [1, 2]


def quadrants(x: Tensor) -> Tensor:
    """A feature mask of four squares."""
    high = (torch.arange(SIDE) >= SIDE // 2).long()
    return (2 * high[:, None] + high).expand(1, 1, SIDE, SIDE)


@cache
def decoder() -> FCAMDecoder:
    """One decoder for all calls: threads that seed and draw at once would get other weights."""
    torch.manual_seed(1)
    return FCAMDecoder([6, 6], [8, 4], layers=["relu1", "relu2"]).eval()


def fcam(net: nn.Module) -> FCAM:
    return FCAM(net, decoder())


class Base(NamedTuple):
    build: Callable[[nn.Module], Attribution]
    arguments: Callable[[Tensor], dict[str, Any]] = lambda x: {}
    is_random: bool = False


def masked(x: Tensor) -> dict[str, Any]:
    return {"feature_mask": quadrants(x)}


def sampled(x: Tensor) -> dict[str, Any]:
    return {**masked(x), "n_samples": 12}


INPUT = {
    "IntegratedGradients": Base(IntegratedGradients, lambda x: {"n_steps": 3, "baselines": x * 0}),
    "Saliency": Base(Saliency),
    "InputXGradient": Base(InputXGradient),
    "GuidedBackprop": Base(GuidedBackprop),
    "Deconvolution": Base(Deconvolution),
    "DeepLift": Base(DeepLift, lambda x: {"baselines": x * 0.5}),
    "GradientShap": Base(
        GradientShap, lambda x: {"baselines": torch.cat([x, -x]), "n_samples": 2}, True
    ),
    "Occlusion": Base(
        Occlusion,
        lambda x: {"sliding_window_shapes": (CHANNELS, 4, 4), "strides": (CHANNELS, 4, 4)},
    ),
    "FeatureAblation": Base(FeatureAblation, masked),
    "Lime": Base(lambda net: Lime(net, SkLearnLasso(alpha=1e-4)), sampled, True),
    "KernelShap": Base(KernelShap, sampled, True),
    "FIDO": Base(FIDO, lambda x: {"n_steps": 2, "n_masks": 2, "baselines": 0.0}, True),
    "FCAM": Base(fcam),
    "RISE": Base(RISE, lambda x: {"n_masks": 20, "grid": 4}, True),
}
LAYER = {"LayerGradCam": Base(lambda net: LayerGradCam(net, net.relu2))} | {
    name: Base(
        lambda net, method=method, name=name: method(
            net, "relu2", **({"head": "fc"} if name == "CAM" else {})
        ),
        is_random="generator" in inspect.signature(CLASSES[name]).parameters,
    )
    for name, method in METHODS.items()
}
BASES = INPUT | LAYER


def sess(base: Attribution) -> SESSWrapper:
    """SESS of absolute values: with random weights many maps have no positive part."""
    return SESSWrapper(base, scales=[12, 16], window=12, pre_filter_ratio=0.4, sign="absolute")


def augmented(base: Attribution) -> AugmentedSR:
    generator = torch.Generator().manual_seed(0)
    return AugmentedSR(base, n_augmentations=3, sign="absolute", generator=generator)


WRAPPED: dict[str, Callable[[Attribution], Attribution]] = {
    "SESS(x)": sess,
    "SR(x)": augmented,
    "SESS(SR(x))": lambda x: sess(augmented(x)),
    "SR(SESS(x))": lambda x: augmented(sess(x)),
    "Noise(SESS(x))": lambda x: NoiseTunnel(sess(x)),
    "SESS(Noise(x))": lambda x: sess(NoiseTunnel(x)),
    "Noise(SR(x))": lambda x: NoiseTunnel(augmented(x)),
    "SR(Noise(x))": lambda x: augmented(NoiseTunnel(x)),
    "SESS(Upsample(x))": lambda x: sess(UpsampleWrapper(x)),
    "SR(Upsample(x))": lambda x: augmented(UpsampleWrapper(x)),
    "Upsample(SESS(x))": lambda x: UpsampleWrapper(sess(x)),
    "Upsample(SR(x))": lambda x: UpsampleWrapper(augmented(x)),
}


def run(name: str, wrapping: str, x: Tensor, target: list[int]) -> Tensor:
    """One call on a new network and a new base, so that random bases start from the same state."""
    base = BASES[name]
    arguments = base.arguments(x)
    if "Noise" in wrapping:
        drawn = {"draw_baseline_from_distrib": True} if name == "GradientShap" else {}
        arguments = {**arguments, **drawn, "nt_samples": 2, "stdevs": 0.0}
    torch.manual_seed(7)
    np.random.seed(7)  # Captum's GradientShap and NoiseTunnel draw baselines with NumPy
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Captum's about hooks, and ours about maps of zeros
        method = WRAPPED[wrapping](base.build(named_net(CHANNELS)))
        result = method.attribute(x, target=target, **arguments)
    assert isinstance(result, Tensor)
    return result


def base_and_wrappers(name: str, wrapping: str) -> tuple[str, ...]:
    """The base, the outer and the inner wrapper; the latter is x where there is none."""
    outer, inner = wrapping.strip(")").split("(")[:2]
    return name, outer, inner


PRODUCT = {
    base_and_wrappers(name, wrapping): (name, wrapping) for name in BASES for wrapping in WRAPPED
}
SAMPLE = cover_pairs(list(PRODUCT))


def test_the_sample_has_every_pair_of_bases_and_wrappers() -> None:
    assert len(SAMPLE) < len(PRODUCT) / 2
    for columns in ((0, 1), (0, 2), (1, 2)):
        pairs = [{tuple(row[i] for i in columns) for row in rows} for rows in (SAMPLE, PRODUCT)]
        assert pairs[0] == pairs[1]


@pytest.mark.parametrize(
    ("name", "wrapping"),
    [
        pytest.param(*case, marks=() if row in SAMPLE else pytest.mark.slow)
        for row, case in PRODUCT.items()
    ],
)
def test_every_base_in_every_wrapper(name: str, wrapping: str) -> None:
    x = torch.rand(2, CHANNELS, SIDE, SIDE, generator=torch.Generator().manual_seed(5))
    result = run(name, wrapping, x, TARGETS)
    assert result.shape == x.shape
    assert result.dtype == x.dtype
    assert torch.isfinite(result).all()
    assert not result.requires_grad
    assert (result == result[:, :1]).all()
    assert (result.flatten(1).amax(1) > result.flatten(1).amin(1)).all(), "a map, not a constant"
    if not BASES[name].is_random:
        alone = [run(name, wrapping, x[i : i + 1], TARGETS[i : i + 1]) for i in range(2)]
        torch.testing.assert_close(result, torch.cat(alone), rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("wrapper", ["SESS", "SR"])
@pytest.mark.parametrize("name", BASES)
def test_upsampling_inside_or_outside_changes_nothing(name: str, wrapper: str) -> None:
    x = torch.rand(2, CHANNELS, SIDE, SIDE, generator=torch.Generator().manual_seed(5))
    bare = run(name, f"{wrapper}(x)", x, TARGETS)
    for wrapping in (f"{wrapper}(Upsample(x))", f"Upsample({wrapper}(x))"):
        assert torch.equal(run(name, wrapping, x, TARGETS), bare)


def matrix_table() -> str:
    """README's matrix: a row for bases with the same mark, and a column for each nesting."""
    is_random = {name: base.is_random for name, base in INPUT.items()} | {"LayerGradCam": False}
    for cls in sorted(CLASSES.values(), key=lambda cls: cls.__name__):
        is_random[cls.__name__] = "generator" in inspect.signature(cls).parameters
    inputs = [name for name in is_random if not is_random[name] and name in INPUT]
    layers = [name for name in is_random if not is_random[name] and name not in INPUT]
    drawing = [name for name in is_random if is_random[name]]
    lines = [["x", *(f"`{wrapping}`" for wrapping in WRAPPED)], ["---", *[":-:"] * len(WRAPPED)]]
    for names, mark in ((inputs, "✓"), (layers, "✓"), (drawing, "~")):
        lines.append([", ".join(f"`{name}`" for name in names), *[mark] * len(WRAPPED)])
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def test_the_matrix_of_the_readme_is_made_from_the_classes() -> None:
    readme = (Path(__file__).parents[3] / "README.md").read_text()
    table = readme.partition("<!-- matrix -->")[2].partition("<!-- end of matrix -->")[0]
    assert table.strip() == matrix_table(), "run `python -m tests.test_readme`"
    assert len(BASES) == len(INPUT) + len(METHODS) + 1
