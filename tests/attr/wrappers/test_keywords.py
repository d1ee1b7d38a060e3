"""Wrappers hand on only arguments that were passed and that a wrapped method has."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from captum.attr import (
    Attribution,
    IntegratedGradients,
    LayerActivation,
    LayerGradCam,
    NoiseTunnel,
    Occlusion,
)
from captum.log import log_usage
from torch import Tensor

from captum_ext.attr import AugmentedSR, LayerCam, LayerScoreCam, SESSWrapper, UpsampleWrapper
from captum_ext.attr._chain import chain, drop_unset, innermost, keywords_of
from tests.networks import BatchSizeRecorder, pooled_net

WRAPPERS: dict[str, Callable[[Any], Any]] = {
    "Upsample": UpsampleWrapper,
    "SESS": lambda base: SESSWrapper(base, n_scales=1, window=20),
    "AugmentedSR": lambda base: AugmentedSR(base, n_augmentations=2),
    "tta": lambda base: AugmentedSR(base, n_augmentations=2, mode="tta"),
}
OF_LAYERS = {name: wrap for name, wrap in WRAPPERS.items() if name != "tta"}
every_wrapper = pytest.mark.parametrize("wrap", WRAPPERS.values(), ids=WRAPPERS)
layer_wrapper = pytest.mark.parametrize("wrap", OF_LAYERS.values(), ids=OF_LAYERS)


def recorder() -> BatchSizeRecorder:
    return BatchSizeRecorder(pooled_net(torch.float32))


class ArgumentRecorder(Attribution):
    """Records the arguments of each call."""

    def __init__(self, forward_func: Any) -> None:
        super().__init__(forward_func)
        self.seen: list[dict[str, Any]] = []

    @log_usage()
    def attribute(self, inputs: Tensor, **kwargs: Any) -> Tensor:
        self.seen.append(kwargs)
        return inputs.detach().abs()


X = torch.rand(1, 3, 20, 20)


@layer_wrapper
@pytest.mark.parametrize("through", [None, "Noise", *OF_LAYERS])
@pytest.mark.parametrize(
    ("base", "owner"),
    [
        (lambda net: LayerCam(net, net.net[2]), "LayerCam"),
        (lambda net: LayerGradCam(net, net.net[2]), "LayerGradCam"),
        (lambda net: LayerScoreCam(net, net.net[2]), "LayerScoreCam"),
        (IntegratedGradients, "IntegratedGradients"),
    ],
)
def test_misspelled_arguments_raise_before_the_model_runs(
    wrap: Any, through: str | None, base: Any, owner: str
) -> None:
    net = recorder()
    between = {None: lambda base: base, "Noise": NoiseTunnel, **OF_LAYERS}[through]
    method = wrap(between(base(net)))
    message = r"\.attribute\(\) got an unexpected keyword argument 'taget'. Closest: target, "
    with pytest.raises(TypeError, match=f"^{type(method).__name__} of .*{owner}{message}"):
        method.attribute(X, taget=1)
    with pytest.raises(TypeError, match="'taget'"):
        NoiseTunnel(method).attribute(X, taget=1, nt_samples=2)
    assert not net.batch_sizes


def test_misspelled_arguments_raise_in_mode_tta() -> None:
    net = recorder()
    with pytest.raises(TypeError, match=r"unexpected keyword argument 'n_step'\. Closest: n_steps"):
        WRAPPERS["tta"](IntegratedGradients(net)).attribute(X, target=1, n_step=3)
    assert not net.batch_sizes


@layer_wrapper
def test_the_first_of_several_misspelled_arguments_is_named(wrap: Any) -> None:
    with pytest.raises(TypeError, match=r"'stride'\. Closest: strides"):
        wrap(Occlusion(recorder())).attribute(X, target=1, stride=2, sliding_window=3)


@every_wrapper
def test_arguments_of_noise_tunnel_are_known(wrap: Any) -> None:
    method = wrap(NoiseTunnel(IntegratedGradients(recorder())))
    torch.manual_seed(0)
    result = method.attribute(X, target=1, n_steps=2, nt_samples=2, stdevs=0.1, nt_type="vargrad")
    assert result.shape == X.shape
    with pytest.raises(TypeError, match=r"'nt_sample'\. Closest: nt_samples"):
        method.attribute(X, target=1, nt_sample=2)


@every_wrapper
def test_a_method_with_var_keywords_takes_any_argument(wrap: Any) -> None:
    base = ArgumentRecorder(pooled_net(torch.float32))
    wrap(base).attribute(X, target=1, whatever=3)
    assert all(seen == {"target": 1, "whatever": 3} for seen in base.seen)
    assert keywords_of(UpsampleWrapper(NoiseTunnel(base))) is None


@pytest.mark.parametrize("wrap", [UpsampleWrapper, WRAPPERS["AugmentedSR"], WRAPPERS["tta"]])
def test_arguments_that_are_not_passed_are_not_handed_on(wrap: Any) -> None:
    base = ArgumentRecorder(pooled_net(torch.float32))
    method = wrap(base)
    method.attribute(X)
    assert all(seen == {} for seen in base.seen)
    base.seen.clear()
    method.attribute(X, target=None, additional_forward_args=None)
    assert base.seen
    assert all(s == {"target": None, "additional_forward_args": None} for s in base.seen)
    assert drop_unset(target=None, other=...) == {"target": None}


def test_a_target_raises_for_a_method_without_one() -> None:
    net = pooled_net(torch.float32)
    method = UpsampleWrapper(LayerActivation(net, net[2]))
    assert method.attribute(X).shape == X.shape
    with pytest.raises(TypeError, match=r"LayerActivation\.attribute\(\) got .* 'target'"):
        method.attribute(X, target=1)
    for wrap in (WRAPPERS["SESS"], WRAPPERS["AugmentedSR"]):  # see test_routing.py
        assert wrap(LayerActivation(net, net[2])).attribute(X, target=1).shape == X.shape


def test_the_chain_has_all_wrapped_methods() -> None:
    base = LayerCam(pooled_net(), "2")
    upsampled = UpsampleWrapper(base)
    noisy = NoiseTunnel(upsampled)
    sess = WRAPPERS["SESS"](noisy)
    assert list(chain(sess)) == [sess, noisy, upsampled, base]
    assert innermost(sess) is innermost(base) is base
    known = keywords_of(sess)
    assert known is not None
    assert {"return_coverage", "nt_samples", "relu_attributions", "target"} <= known
    assert not {"self", "kwargs"} & known
