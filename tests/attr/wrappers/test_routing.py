"""SESS and AugmentedSR hand arguments and batches to the wrapped method."""

import threading
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from captum.attr import (
    Attribution,
    GradientShap,
    IntegratedGradients,
    LayerActivation,
    LayerGradCam,
    NeuronDeepLift,
    NeuronGradient,
    NoiseTunnel,
    Occlusion,
    Saliency,
)
from captum.log import log_usage
from torch import Tensor, nn

from captum_ext.attr import AugmentedSR, LayerCam, SESSWrapper
from captum_ext.imaging import resize
from tests.networks import BatchSizeRecorder, pooled_net, small_net

D = torch.float64


def sess(base: Attribution, **options: Any) -> SESSWrapper:
    return SESSWrapper(base, **{"n_scales": 2, "window": 12, **options})


def augmented(base: Attribution, **options: Any) -> AugmentedSR:
    generator = torch.Generator().manual_seed(0)
    return AugmentedSR(base, **{"n_augmentations": 4, "generator": generator, **options})


BOTH = pytest.mark.parametrize("wrap", [sess, augmented])
Wrap = Callable[..., Any]


@BOTH
def test_extra_arguments_of_the_images_size_follow_in_every_shape(wrap: Wrap) -> None:
    """(B, 1, H, W), (1, 1, H, W), (B, H, W) and (1, H, W) are the same gate."""
    net, x = pooled_net(), torch.rand(2, 3, 20, 28, dtype=D)
    gate = torch.rand(1, 1, 20, 28, dtype=D)

    def model(x: Tensor, gate: Tensor) -> Tensor:
        return net(x * (gate[:, None] if gate.dim() == 3 else gate))

    method = wrap(Saliency(model))
    gates = gate.expand(2, -1, -1, -1)
    expected = method.attribute(x, target=1, additional_forward_args=gates)
    plain = method.attribute(x, target=1, additional_forward_args=torch.ones_like(gates))
    assert (expected - plain).abs().max() > 1e-4
    for extra in (gate, gates[:, 0], gate[:, 0]):
        result = method.attribute(x, target=1, additional_forward_args=extra)
        torch.testing.assert_close(result, expected)
    several = method.attribute(x, target=1, additional_forward_args=(gate,))
    torch.testing.assert_close(several, expected)


@BOTH
def test_a_callable_for_baselines_is_called_once(wrap: Wrap) -> None:
    net, x = pooled_net(torch.float32), torch.rand(2, 3, 20, 28)
    calls = []

    def draw() -> Tensor:
        calls.append(1)
        return torch.ones(3, 3, 20, 28)

    method = wrap(GradientShap(net))
    result = method.attribute(x, baselines=draw, target=1, stdevs=0.0)
    assert result.shape == x.shape
    assert len(calls) == 1


@BOTH
@pytest.mark.parametrize("dtype", [torch.uint8, torch.bool, torch.int32, torch.float32])
def test_feature_masks_of_every_dtype_are_the_same(wrap: Wrap, dtype: torch.dtype) -> None:
    from captum.attr import FeatureAblation

    net, x = pooled_net(), torch.rand(1, 3, 20, 28, dtype=D)
    mask = torch.zeros(1, 1, 20, 28, dtype=torch.long)
    mask[..., 14:] = 1 if dtype == torch.bool else 255
    method = wrap(FeatureAblation(net))
    expected = method.attribute(x, target=1, feature_mask=mask)
    result = method.attribute(x, target=1, feature_mask=mask.to(dtype))
    assert torch.equal(result, expected)


@BOTH
def test_only_the_image_is_positional(wrap: Wrap) -> None:
    net, x = pooled_net(torch.float32), torch.rand(1, 3, 20, 28)
    with pytest.raises(TypeError, match="positional"):
        wrap(Saliency(net)).attribute(x, 1)


@BOTH
def test_flags_of_the_inner_wrapper_are_refused(wrap: Wrap) -> None:
    net, x = pooled_net(torch.float32), torch.rand(1, 3, 20, 28)
    for flag, inner in (("return_history", augmented), ("return_coverage", sess)):
        if inner is not wrap:
            with pytest.raises(ValueError, match=f"`{flag}`"):
                wrap(inner(Saliency(net))).attribute(x, target=1, **{flag: True})


@BOTH
@pytest.mark.parametrize(
    ("build", "arguments"),
    [
        (IntegratedGradients, {"n_steps": 20}),
        (lambda net: NoiseTunnel(IntegratedGradients(net)), {"n_steps": 20, "nt_samples": 4}),
        (lambda net: NoiseTunnel(Saliency(net)), {"nt_samples": 4, "stdevs": 0.1}),
        (lambda net: GradientShap(net), {"n_samples": 4}),
    ],
)
def test_batches_are_at_most_internal_batch_size(
    wrap: Wrap, build: Any, arguments: dict[str, Any]
) -> None:
    net, x = BatchSizeRecorder(pooled_net(torch.float32)), torch.rand(1, 3, 20, 28)
    if "n_samples" in arguments:
        arguments = {**arguments, "baselines": torch.zeros_like(x)}
    wrap(build(net), internal_batch_size=8).attribute(x, target=1, **arguments)
    assert max(net.batch_sizes) <= 8


def test_a_passed_internal_batch_size_has_priority() -> None:
    net, x = BatchSizeRecorder(pooled_net(torch.float32)), torch.rand(1, 3, 20, 28)
    options = {"n_steps": 20, "internal_batch_size": 40}
    sess(IntegratedGradients(net), internal_batch_size=8).attribute(x, target=1, **options)
    assert 8 < max(net.batch_sizes) <= 40


def test_tta_inside_sess_warps_the_windows() -> None:
    """On a single window of the image's size, mode "tta" gives the same inside and outside SESS."""
    net, x = pooled_net(), torch.rand(1, 3, 16, 16, dtype=D)
    ig = IntegratedGradients(net)
    tta = augmented(ig, mode="tta", n_augmentations=5)
    options: Any = {"scales": [16], "window": 16, "smooth": False, "sign": "absolute"}
    inside = augmented(sess(ig, **options), mode="tta", n_augmentations=5)
    around = sess(tta, **options).attribute(x, target=1, n_steps=3)
    torch.testing.assert_close(inside.attribute(x, target=1, n_steps=3), around)
    assert (around - sess(ig, **options).attribute(x, target=1, n_steps=3)).abs().max() > 0.01
    windows = augmented(sess(ig, scales=[16], window=8), mode="tta", n_augmentations=5)
    plain = sess(ig, scales=[16], window=8).attribute(x, target=1, n_steps=3)
    assert (windows.attribute(x, target=1, n_steps=3) - plain).abs().max() > 0.01


def test_tta_refuses_neurons() -> None:
    net = pooled_net()
    for base in (NeuronGradient(net, net[4]), NeuronDeepLift(net, net[4])):
        with pytest.raises(ValueError, match="needs the module itself"):
            augmented(base, mode="tta")


@BOTH
def test_methods_without_a_target_get_none(wrap: Wrap) -> None:
    """The target selects the windows' scores. A wrapped method without a target gets none."""
    net, x = pooled_net(), torch.rand(2, 3, 20, 28, dtype=D)
    method = wrap(LayerActivation(net, net[4]))
    result = method.attribute(x, target=[1, 2])
    assert (result.flatten(1).amax(1) > result.flatten(1).amin(1)).all()
    neuron = wrap(NeuronGradient(net, net[4])).attribute(x, target=1, neuron_selector=(2, 1, 1))
    assert neuron.shape == x.shape


def test_maps_of_grey_images_keep_their_sign() -> None:
    """Occlusion of a grey image is that of its copy in three channels: a map, with its sign."""
    net = pooled_net()
    grey = torch.rand(1, 1, 20, 28, dtype=D)
    spread = nn.Conv2d(1, 3, 1, bias=False).to(D)
    nn.init.ones_(spread.weight)
    of_grey = nn.Sequential(spread, net)
    options: Any = {"fusion": "coverage", "sign": "signed"}
    grey_map = sess(Occlusion(of_grey), **options).attribute(
        grey, target=1, sliding_window_shapes=(1, 4, 4), strides=(1, 4, 4)
    )
    colour_map = sess(Occlusion(net), **options).attribute(
        grey.expand(1, 3, 20, 28), target=1, sliding_window_shapes=(3, 4, 4), strides=(3, 4, 4)
    )
    assert (grey_map < 0).any()
    torch.testing.assert_close(grey_map, colour_map[:, :1])


def test_autocast_does_not_affect_the_maps() -> None:
    """The base gives the same maps in any precision, and so does the wrapper."""

    class PreciseMaps(LayerGradCam):
        @log_usage()
        def attribute(self, inputs: Tensor, **kwargs: Any) -> Tensor:
            return inputs.float().mean(1, keepdim=True)[:, :, ::4, ::4]

    net, x = pooled_net(torch.float32), torch.rand(1, 3, 24, 32)
    base = PreciseMaps(lambda x: x[:, :2].flatten(2).mean(2), net[4])
    for method in (augmented(base), augmented(base, mode="mean"), sess(base)):
        expected = method.attribute(x, target=1)
        with torch.autocast("cpu", torch.bfloat16):
            torch.testing.assert_close(method.attribute(x, target=1), expected)


@BOTH
@pytest.mark.parametrize("align", ["cell", "rf"])
def test_threads_share_a_wrapper(wrap: Wrap, align: str) -> None:
    net, x = small_net(), torch.rand(2, 3, 16, 16)
    method = wrap(LayerCam(net, "relu2"), align=align)
    expected = method.attribute(x, target=[1, 2])
    result: list[Any] = []

    def call() -> None:
        try:
            result.extend(method.attribute(x, target=[1, 2]) for _ in range(5))
        except Exception as error:
            result.append(error)

    threads = [threading.Thread(target=call) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(result) == 40, result
    for attributions in result:
        assert torch.equal(attributions, expected)


@BOTH
def test_values_beyond_float16_are_clipped(wrap: Wrap) -> None:
    class LargeMaps(LayerGradCam):
        @log_usage()
        def attribute(self, inputs: Tensor, **kwargs: Any) -> Tensor:
            return inputs.float().mean(1, keepdim=True)[:, :, ::4, ::4] * 1e6

    net = pooled_net(torch.float32)
    base = LargeMaps(lambda x: x[:, :2].float().flatten(2).mean(2), net[4])
    result = wrap(base).attribute(torch.rand(1, 3, 24, 32).half(), target=1)
    assert result.dtype == torch.float16
    assert torch.isfinite(result).all()


def test_half_precision_is_antialiased_on_a_cpu() -> None:
    x = torch.rand(1, 3, 40, 30)
    result = resize(x.bfloat16(), (13, 11), antialias=True)
    torch.testing.assert_close(
        result, resize(x, (13, 11), antialias=True).bfloat16(), rtol=0.02, atol=0
    )


@BOTH
def test_get_name_is_the_class_name(wrap: Wrap) -> None:
    method = wrap(Saliency(small_net()))
    assert method.get_name() == type(method).__name__


def test_unusable_results_and_options_raise() -> None:
    x = torch.rand(1, 3, 20, 28)

    class FunctionAttribution(Attribution):
        def __init__(self, model: Any, give: Any) -> None:
            super().__init__(model)
            self.give = give

        @log_usage()
        def attribute(self, inputs: Tensor, **kwargs: Any) -> Any:
            return self.give(inputs)

    def logits(x: Tensor) -> Tensor:
        return x[:, :2, 0, 0]

    with pytest.raises(ValueError, match="gave <class 'NoneType'> instead of a map"):
        sess(FunctionAttribution(logits, lambda x: None)).attribute(x, target=0)
    for model, error in ((lambda x: (logits(x), x), TypeError), (lambda x: x.sum(), ValueError)):
        with pytest.raises(error, match=r"`forward_func` must give (a tensor|scores for each)"):
            sess(FunctionAttribution(model, lambda x: x), pre_filter_ratio=0.5).attribute(
                x, target=0
            )
    net = pooled_net(torch.float32)
    with pytest.raises(ValueError, match=r"`downsample` asks for 20 x 28 cells, but the maps have"):
        augmented(LayerGradCam(net, net[4]), downsample=1).attribute(x, target=0)
    for options in ({"sr_size": 20.0}, {"fill": None}, {"fill": [0.1]}, {"fill": float("nan")}):
        with pytest.raises(ValueError, match=f"`{next(iter(options))}` must be"):
            augmented(Saliency(small_net()), **options)
    with pytest.raises(TypeError, match="`generator` must be"):
        AugmentedSR(Saliency(small_net()), generator=3)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="`tv` must be"):
        augmented(Saliency(small_net()), tv="a")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        scales = torch.tensor([12, 20])
        assert sess(Saliency(small_net()), scales=scales).scales == [12, 20]
