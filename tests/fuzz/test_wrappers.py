"""The wrappers, nested as drawn, around our methods and Captum's, with drawn options."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from captum.attr import (
    Attribution,
    DeepLift,
    FeatureAblation,
    InputXGradient,
    IntegratedGradients,
    LayerGradCam,
    LayerGradientXActivation,
    NoiseTunnel,
    Saliency,
)
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import Generator, nn

from captum_ext.attr import (
    RISE,
    AugmentedSR,
    LayerAblationCam,
    LayerCam,
    LayerEigenCam,
    LayerScoreCam,
    LayerXGradCam,
    SESSWrapper,
    UpsampleWrapper,
)
from captum_ext.imaging import MODES
from tests.fuzz.calls import Call, check_call
from tests.fuzz.properties import RefusedError, attempt, fuzz, tensors_of
from tests.fuzz.strategies import Case, cases, example_rows, options_of

BASES: dict[str, Callable[[nn.Module, str], Attribution]] = {
    cls.__name__: lambda net, layer, cls=cls: cls(net, net.get_submodule(layer))
    for cls in (LayerAblationCam, LayerCam, LayerXGradCam, LayerScoreCam, LayerEigenCam)
}
BASES |= {
    cls.__name__: lambda net, layer, cls=cls: cls(net, net.get_submodule(layer))
    for cls in (LayerGradCam, LayerGradientXActivation)
}
BASES |= {
    cls.__name__: lambda net, layer, cls=cls: cls(net)
    for cls in (Saliency, InputXGradient, IntegratedGradients, FeatureAblation, DeepLift, RISE)
}
OURS = ("LayerAblationCam", "LayerCam", "LayerXGradCam", "LayerScoreCam", "LayerEigenCam", "RISE")
ARGUMENTS: dict[str, dict[str, Any]] = {
    "RISE": {"n_masks": 5, "grid": 2},
    "IntegratedGradients": {"n_steps": 2},
}

Option = Callable[[Case], st.SearchStrategy[Any]]


def choose(*values: Any) -> Option:
    return lambda case: st.sampled_from(values)


COMMON: dict[str, Option] = {
    "sign": choose("positive", "negative", "absolute", "signed"),
    "channel_reduction": choose("abs_sum", "sum", "max_abs"),
    "align": choose("cell", (1.5, -0.5), "cell", "rf"),
}
UPSAMPLE: dict[str, Option] = {
    "mode": choose(*MODES),
    "fuse": choose("max", "mean"),
    "align_corners": choose(False, True),
    "normalize": choose("none", "minmax", "tanh"),
}
SESS: dict[str, Option] = COMMON | {
    "n_scales": choose(1, 2),
    "scales": choose([3, 5], "sqrt2", [4]),
    "window": choose(2, 3, 4, (2, 3), (5, 2)),
    "step": choose(1, 2, (2, 1)),
    "pre_filter_ratio": choose(0.0, 0.5, 0.99),
    "theta": choose(0.0, 0.5),
    "pool": choose("mean", "max"),
    "fusion": choose("soft", "reference", "coverage", "weighted"),
    "percentile": choose(0, 99.0, 100),
    "smooth": choose(False, True),
    "smooth_kernel": choose(1, 3, 11),
    "smooth_sigma": choose(0.5, 5.0),
    "antialias": choose(False, True),
    "final_norm": choose(False, True),
    "max_patches": choose(4096, 8),
}
SR: dict[str, Option] = COMMON | {
    "n_augmentations": choose(1, 2, 4),
    "max_angle": choose(0, 0.3),
    "max_shift": choose(0, 0.13),
    "mode": choose("auto", "sr", "mean", "max", "single", "tta"),
    "solver": choose("mfista", "condat-vu", "adam"),
    "tv": choose(0, 2e-4),
    "l2": choose(0, 2e-5),
    "downsample": choose("area", "bilinear", "gaussian", "legacy", 2, (1, 2)),
    "normalize": choose("global", "per_map", "none"),
    "fill": choose("zeros", "border", "reflection", 0.5, torch.tensor(0.25)),
    "sr_size": choose(3, 6, (4, 5)),
    "max_iterations": choose(1, 3),
    "tolerance": choose(0, 1e-4),
    "preset": choose(None, "official"),
}


@st.composite
def wrappings(
    draw: Any, outer: str, case: Case, depth: int, has_noise: bool = True
) -> Callable[[Attribution], Any]:
    """A function that puts `outer`, and up to `depth` other wrappers, around a method."""
    inner: Callable[[Attribution], Any] = lambda method: method  # noqa: E731
    if depth and draw(st.booleans()):
        name = draw(st.sampled_from(["Upsample", "SESS", "SR", "Noise"][: 3 + has_noise]))
        inner = draw(wrappings(name, case, depth - 1, has_noise and name != "Noise"))
    if outer == "Upsample":
        options = draw(options_of(UpsampleWrapper, case, UPSAMPLE))
        return lambda method: UpsampleWrapper(inner(method), **options)
    if outer == "SESS":
        options = draw(options_of(SESSWrapper, case, SESS))
        options = {"window": 3, "n_scales": 2} | options
        return lambda method: SESSWrapper(inner(method), **options)
    if outer == "SR":
        options = {"n_augmentations": 3, "max_iterations": 2} | draw(
            options_of(AugmentedSR, case, SR)
        )
        return lambda method: AugmentedSR(
            inner(method), **options, generator=Generator().manual_seed(0)
        )
    return lambda method: NoiseTunnel(inner(method))


class Wrapping:
    """Builds a wrapped base; its repr shows the nesting."""

    def __init__(self, base: str, wrap: Callable[[Attribution], Any]) -> None:
        self.base, self.wrap = base, wrap

    def __call__(self, net: nn.Module, layer: str, **options: Any) -> Any:
        return self.wrap(BASES[self.base](net, layer))

    def __repr__(self) -> str:
        net = nn.Sequential(nn.Identity())
        try:
            return repr(self.wrap(BASES[self.base](net, "0")))
        except ValueError as error:
            return f"{self.base}, {error}"


@st.composite
def calls(draw: Any, outer: str) -> Call:
    dims = None if outer == "Upsample" else 2
    second = (None, "extra", "input") if outer == "Upsample" else (None, "extra")
    heads = ("linear", "map", "column", "vector")  # which take windows of any size
    case = draw(cases(dims=dims, heads=heads, second=second))
    assume("group norm" not in case.spec.blocks)  # torch has none of a window's single number
    base = draw(st.sampled_from(sorted(BASES)))
    build = Wrapping(base, draw(wrappings(outer, case, 2)))
    noisy = "NoiseTunnel" in repr(build)
    arguments = dict(ARGUMENTS.get(base, {}))
    if noisy:
        arguments |= {"nt_samples": 2, "stdevs": 0.0}
    if noisy or base not in OURS:  # Captum computes in float32 there
        dtype = draw(st.sampled_from([torch.float64, torch.float32]))
        case.spec = replace(case.spec, dtype=dtype)
    if case.values not in ("normal", "one pixel", "negative"):
        case.values = draw(st.sampled_from(["normal", case.values]))
    return Call(build, case, {}, arguments, "attribute" if base == "RISE" else "", not noisy)


@pytest.mark.parametrize("outer", ["Upsample", "SESS", "SR"])
@fuzz
@given(data=st.data())
def test_a_wrapped_method_is_right_or_says_why_not(outer: str, data: Any) -> None:
    call = data.draw(calls(outer))
    rows = data.draw(example_rows(call.case))
    result, _ = check_call(call, rows, is_stable=False)
    if result is not None:
        assert [t.shape for t in tensors_of(result)] == [x.shape for x in call.case.inputs()]


@pytest.mark.parametrize("outer", ["Upsample", "SESS", "SR"])
@fuzz
@given(data=st.data())
def test_no_examples_are_one_clear_error(outer: str, data: Any) -> None:
    call = data.draw(calls(outer))
    if outer != "Upsample":
        with pytest.raises(RefusedError):
            attempt(lambda: call.run([]))
        return
    try:
        result = attempt(lambda: call.run([]))
    except RefusedError:
        return
    assert [t.shape[0] for t in tensors_of(result)] == [0] * len(call.case.inputs())
