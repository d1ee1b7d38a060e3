"""What both wrappers hand to the wrapped method: arguments, batches, and the model as it is."""

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
def test_extras_of_the_images_size_follow_in_every_shape(wrap: Wrap) -> None:
    """(B, 1, H, W), (1, 1, H, W), (B, H, W) and (1, H, W) are the same gate."""
    net, x = pooled_net(), torch.rand(2, 3, 20, 28, dtype=D)
    gate = torch.rand(1, 1, 20, 28, dtype=D)

    def model(x: Tensor, gate: Tensor) -> Tensor:
        return net(x * (gate[:, None] if gate.dim() == 3 else gate))

    method = wrap(Saliency(model))
    each = gate.expand(2, -1, -1, -1)
    expected = method.attribute(x, target=1, additional_forward_args=each)
    plain = method.attribute(x, target=1, additional_forward_args=torch.ones_like(each))
    assert (expected - plain).abs().max() > 1e-4
    for extra in (gate, each[:, 0], gate[:, 0]):
        found = method.attribute(x, target=1, additional_forward_args=extra)
        torch.testing.assert_close(found, expected)
    several = method.attribute(x, target=1, additional_forward_args=(gate,))
    torch.testing.assert_close(several, expected)


@BOTH
def test_a_callable_that_gives_baselines_is_called_once(wrap: Wrap) -> None:
    net, x = pooled_net(torch.float32), torch.rand(2, 3, 20, 28)
    calls = []

    def draw() -> Tensor:
        calls.append(1)
        return torch.ones(3, 3, 20, 28)

    method = wrap(GradientShap(net))
    found = method.attribute(x, baselines=draw, target=1, stdevs=0.0)
    assert found.shape == x.shape
    assert len(calls) == 1


@BOTH
@pytest.mark.parametrize("dtype", [torch.uint8, torch.bool, torch.int32, torch.float32])
def test_feature_masks_of_every_dtype(wrap: Wrap, dtype: torch.dtype) -> None:
    from captum.attr import FeatureAblation

    net, x = pooled_net(), torch.rand(1, 3, 20, 28, dtype=D)
    mask = torch.zeros(1, 1, 20, 28, dtype=torch.long)
    mask[..., 14:] = 1 if dtype == torch.bool else 255
    method = wrap(FeatureAblation(net))
    expected = method.attribute(x, target=1, feature_mask=mask)
    found = method.attribute(x, target=1, feature_mask=mask.to(dtype))
    assert torch.equal(found, expected)


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
def test_the_model_sees_no_larger_batches_than_asked_for(
    wrap: Wrap, build: Any, arguments: dict[str, Any]
) -> None:
    net, x = BatchSizeRecorder(pooled_net(torch.float32)), torch.rand(1, 3, 20, 28)
    if "n_samples" in arguments:
        arguments = {**arguments, "baselines": torch.zeros_like(x)}
    wrap(build(net), internal_batch_size=8).attribute(x, target=1, **arguments)
    assert max(net.batch_sizes) <= 8


def test_the_callers_own_batch_size_goes_before() -> None:
    net, x = BatchSizeRecorder(pooled_net(torch.float32)), torch.rand(1, 3, 20, 28)
    options = {"n_steps": 20, "internal_batch_size": 40}
    sess(IntegratedGradients(net), internal_batch_size=8).attribute(x, target=1, **options)
    assert 8 < max(net.batch_sizes) <= 40


def test_tta_inside_of_sess_moves_the_windows() -> None:
    """And is, on one window of the image's size, what it is by itself."""
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
def test_methods_without_a_target(wrap: Wrap) -> None:
    """The target is of the windows' scores; the wrapped method, which takes none, gets none."""
    net, x = pooled_net(), torch.rand(2, 3, 20, 28, dtype=D)
    method = wrap(LayerActivation(net, net[4]))
    found = method.attribute(x, target=[1, 2])
    assert (found.flatten(1).amax(1) > found.flatten(1).amin(1)).all()
    neuron = wrap(NeuronGradient(net, net[4])).attribute(x, target=1, neuron_selector=(2, 1, 1))
    assert neuron.shape == x.shape


def test_grey_images_keep_the_sign_of_what_regions_do() -> None:
    """Occlusion of a grey image is that of its copies in three channels: a map, with its sign."""
    net = pooled_net()
    grey = torch.rand(1, 1, 20, 28, dtype=D)
    spread = nn.Conv2d(1, 3, 1, bias=False).to(D)
    nn.init.ones_(spread.weight)
    of_grey = nn.Sequential(spread, net)
    options: Any = {"fusion": "coverage", "sign": "signed"}
    one = sess(Occlusion(of_grey), **options).attribute(
        grey, target=1, sliding_window_shapes=(1, 4, 4), strides=(1, 4, 4)
    )
    three = sess(Occlusion(net), **options).attribute(
        grey.expand(1, 3, 20, 28), target=1, sliding_window_shapes=(3, 4, 4), strides=(3, 4, 4)
    )
    assert (one < 0).any()
    torch.testing.assert_close(one, three[:, :1])


def test_autocast_does_not_reach_the_maps() -> None:
    """A base that gives the same in any precision: so does what is made of it."""

    class Fixed(LayerGradCam):
        @log_usage()
        def attribute(self, inputs: Tensor, **kwargs: Any) -> Tensor:
            return inputs.float().mean(1, keepdim=True)[:, :, ::4, ::4]

    net, x = pooled_net(torch.float32), torch.rand(1, 3, 24, 32)
    base = Fixed(lambda x: x[:, :2].flatten(2).mean(2), net[4])
    for method in (augmented(base), augmented(base, mode="mean"), sess(base)):
        expected = method.attribute(x, target=1)
        with torch.autocast("cpu", torch.bfloat16):
            torch.testing.assert_close(method.attribute(x, target=1), expected)


@BOTH
@pytest.mark.parametrize("align", ["cell", "rf"])
def test_threads(wrap: Wrap, align: str) -> None:
    net, x = small_net(), torch.rand(2, 3, 16, 16)
    method = wrap(LayerCam(net, "relu2"), align=align)
    expected = method.attribute(x, target=[1, 2])
    found: list[Any] = []

    def call() -> None:
        try:
            found.extend(method.attribute(x, target=[1, 2]) for _ in range(5))
        except Exception as error:
            found.append(error)

    threads = [threading.Thread(target=call) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 40, found
    for one in found:
        assert torch.equal(one, expected)


@BOTH
def test_half_precision_saturates(wrap: Wrap) -> None:
    class Large(LayerGradCam):
        @log_usage()
        def attribute(self, inputs: Tensor, **kwargs: Any) -> Tensor:
            return inputs.float().mean(1, keepdim=True)[:, :, ::4, ::4] * 1e6

    net = pooled_net(torch.float32)
    base = Large(lambda x: x[:, :2].float().flatten(2).mean(2), net[4])
    found = wrap(base).attribute(torch.rand(1, 3, 24, 32).half(), target=1)
    assert found.dtype == torch.float16
    assert torch.isfinite(found).all()


def test_halves_are_antialiased_on_a_cpu() -> None:
    x = torch.rand(1, 3, 40, 30)
    found = resize(x.bfloat16(), (13, 11), antialias=True)
    torch.testing.assert_close(
        found, resize(x, (13, 11), antialias=True).bfloat16(), rtol=0.02, atol=0
    )


@BOTH
def test_names_are_as_they_are_written(wrap: Wrap) -> None:
    method = wrap(Saliency(small_net()))
    assert method.get_name() == type(method).__name__


def test_what_cannot_be_scored_or_laid_out() -> None:
    x = torch.rand(1, 3, 20, 28)

    class Gives(Attribution):
        def __init__(self, model: Any, give: Any) -> None:
            super().__init__(model)
            self.give = give

        @log_usage()
        def attribute(self, inputs: Tensor, **kwargs: Any) -> Any:
            return self.give(inputs)

    def logits(x: Tensor) -> Tensor:
        return x[:, :2, 0, 0]

    with pytest.raises(ValueError, match="gave <class 'NoneType'> instead of a map"):
        sess(Gives(logits, lambda x: None)).attribute(x, target=0)
    for model, error in ((lambda x: (logits(x), x), TypeError), (lambda x: x.sum(), ValueError)):
        with pytest.raises(error, match=r"`forward_func` must give (a tensor|scores for each)"):
            sess(Gives(model, lambda x: x), pre_filter_ratio=0.5).attribute(x, target=0)
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
