"""Inputs and targets that cannot be explained: each gets one error that says what to pass."""

import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from captum.attr import IntegratedGradients, LayerGradCam, NoiseTunnel, Saliency
from PIL import Image
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from captum_ext.attr import (
    FIDO,
    RISE,
    AugmentedSR,
    LayerCam,
    LayerEigenCam,
    LayerGroupCam,
    LayerScoreCam,
    LayerXGradCam,
    SESSWrapper,
    UpsampleWrapper,
)
from captum_ext.features import ActivationMaximization
from captum_ext.metrics import average_drop, deletion, insertion, road
from tests.methods import GRADIENT, METHODS
from tests.networks import FunctionsAroundLayer, Lambda, ReluTwiceNet, SmallNet, small_net

Explain = Callable[..., Any]


def rise(model: Any) -> Explain:
    return partial(RISE(model).attribute, n_masks=2, grid=2)


def fido(model: Any) -> Explain:
    return partial(FIDO(model).attribute, n_steps=1, n_masks=1)


def sess(base: Callable[[Any], Any]) -> Callable[[Any], Explain]:
    return lambda model: SESSWrapper(base(model), window=8, n_scales=1).attribute


def augmented(base: Callable[[Any], Any], **options: Any) -> Callable[[Any], Explain]:
    return lambda model: AugmentedSR(base(model), n_augmentations=2, **options).attribute


def metric(function: Callable[..., Any]) -> Callable[[Any], Explain]:
    def explain(model: Any) -> Explain:
        return lambda inputs, target=None: function(model, inputs, torch.rand(2, 8, 8), target)

    return explain


def layer_method(name: str) -> Callable[[Any], Explain]:
    return lambda model: METHODS[name](model, "relu2").attribute


LAYER_METHODS = {name: layer_method(name) for name in METHODS}
WRAPPERS: dict[str, Callable[[Any], Explain]] = {
    "Upsample of ours": lambda m: UpsampleWrapper(LayerCam(m, m.conv2)).attribute,
    "Upsample of Captum's": lambda m: UpsampleWrapper(LayerGradCam(m, m.conv2)).attribute,
    "SESS of ours": sess(lambda m: LayerXGradCam(m, m.conv2)),
    "SESS of Captum's": sess(IntegratedGradients),
    "AugmentedSR of ours": augmented(lambda m: LayerXGradCam(m, m.conv2), mode="mean"),
    "AugmentedSR, tta": augmented(Saliency, mode="tta"),
}
ON_IMAGES = {
    "FIDO": fido,
    "insertion": metric(insertion),
    "deletion": metric(deletion),
    "average_drop": metric(average_drop),
    "road": metric(road),
}
EXPLAINERS = {**LAYER_METHODS, "RISE": rise, **WRAPPERS, **ON_IMAGES}
every_explainer = pytest.mark.parametrize("name", EXPLAINERS)
X = torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def not_run(model: SmallNet) -> bool:
    return not bool(model.calls)


# --- inputs ---------------------------------------------------------------------------------------

NO_TENSORS = {
    "numpy": (X.numpy(), r"got <class 'numpy.ndarray'>: pass `torch.from_numpy"),
    "PIL": (Image.new("RGB", (8, 8)), r"Image'>: pass the tensor that the model's transform"),
    "list": ([X], r"got <class 'list'>: pass `torch.stack\(inputs\)` for a batch, or a tuple"),
}
BAD_VALUES = {
    "empty": (X[:0], r"at least one example, in dimension 0, got \[\(0, 3, 8, 8\)\]"),
    "number": (torch.tensor(1.0), r"at least one example, in dimension 0, got \[\(\)\]"),
    "NaN": (X.where(X > 0.1, torch.nan), "values that are not finite"),
    "inf": (X.where(X > 0.1, -torch.inf), "values that are not finite"),
    "half inf": (X.half().where(X > 0.1, torch.inf), "values that are not finite"),
}


@every_explainer
def test_inputs_that_are_no_tensors_or_not_finite_are_refused_before_the_model_runs(
    name: str,
) -> None:
    net = small_net()
    explain = EXPLAINERS[name](net)
    for inputs, message in NO_TENSORS.values():
        with pytest.raises(TypeError, match=f"^`inputs` must be a tensor.*{message}"):
            explain(inputs, target=1)
    for values, message in BAD_VALUES.values():
        with pytest.raises(ValueError, match=f"^`inputs` (must have|has) {message}"):
            explain(values, target=1)
    assert not_run(net)


@every_explainer
def test_inputs_that_the_first_layer_cannot_take_are_errors_with_the_line_to_write(
    name: str,
) -> None:
    explain = EXPLAINERS[name](small_net())
    is_image_method = name in ON_IMAGES or name.startswith(("SESS", "Augmented"))
    cases: dict[str, Any] = {
        r"takes \(B, 3, H, W\), and they are \(B, 1, 8, 8\): grey is repeated by "
        r"`inputs.repeat\(1, 3, 1, 1\)`": X[:, :1],
        r"torch.float16: pass `inputs.to\(torch.float32\)`": X.half(),
        r"torch.float64: pass `inputs.to\(torch.float32\)`": X.double(),
        r"pass `inputs.permute\(0, 3, 1, 2\)`": X.permute(0, 2, 3, 1),
        r"(`inputs.float\(\) / 255`|a tensor of floats)": (X * 255).byte(),
        r"\(3, 8, 8\).*ne (example|image) is `inputs\[None\]`": X[0],
    }
    for message, inputs in cases.items():
        if is_image_method or name == "RISE":
            start = r"`inputs` (do not fit|must be images|must have)"
        else:
            start = r"`inputs` do not fit the model: its layer `conv1` \(Conv2d\)"
        if name == "RISE" and inputs.dim() == 3:
            message = r"\(B, 3, H, W\).*\(\d, 8, 8\)"
        if "permute" in message and (name in {*ON_IMAGES} - {"FIDO"} or name.startswith("SESS")):
            continue  # the maps do not fit such images, and windows of them have another size
        with pytest.raises(ValueError, match=f"^{start}.*{message}"):
            explain(inputs, target=[1, 1] if inputs.dim() == 4 else 1)


@pytest.mark.parametrize("name", METHODS)
def test_one_example_without_a_batch_is_refused_where_a_convolution_takes_it(name: str) -> None:
    """Its K channels would be read as K examples."""
    net = nn.Sequential(nn.Conv2d(3, 3, 3, padding=1), nn.ReLU(), nn.Conv2d(3, 3, 1)).eval()
    message = r"takes \(B, 3, H, W\), and they are \(3, 8, 8\): one example is `inputs\[None\]`"
    for model in (net, net.forward) + (() if name == "CAM" else (lambda x: net(x),)):
        with pytest.raises(ValueError, match=message):
            METHODS[name](model, net[0]).attribute(X[0], target=(1, 1))
    assert not net[0]._forward_pre_hooks


def test_models_that_convert_their_inputs_are_explained() -> None:
    net = small_net()
    explain = LayerCam(net, "conv2").attribute
    expected = explain(X, target=1)
    for convert, inputs in (
        (lambda x: x.float(), X.double()),
        (lambda x: x[None], None),
        (lambda x: x.repeat(1, 3, 1, 1), X[:, :1]),
        (lambda x: x.unflatten(1, (3, 8)), X.flatten(1, 2)),
    ):
        model = nn.Sequential(Lambda(convert), net)
        example = X[0] if inputs is None else inputs
        maps = LayerCam(model, net.conv2).attribute(example, target=1)
        assert maps.shape[1:] == expected.shape[1:]
    torch.testing.assert_close(
        LayerCam(nn.Sequential(Lambda(lambda x: x.float()), net), net.conv2).attribute(
            X.double(), target=1
        ),
        expected,
    )
    with torch.autocast("cpu", torch.bfloat16):
        half = explain(X.bfloat16(), target=1)
    torch.testing.assert_close(half.float(), expected, rtol=0.1, atol=0.05)


def test_integers_and_floats_of_token_models_get_the_error_of_their_embedding() -> None:
    net = nn.Sequential(nn.Embedding(9, 4), Lambda(lambda x: x.mT), nn.Conv1d(4, 3, 1)).eval()
    head = nn.Sequential(net, nn.AdaptiveAvgPool1d(1), nn.Flatten()).eval()
    tokens = torch.randint(0, 9, (2, 5))
    assert LayerCam(head, net[2]).attribute(tokens, target=1).shape == (2, 1, 5)
    with pytest.raises(ValueError, match=r"`0.0` \(Embedding\) takes integers.*`inputs.long\(\)`"):
        LayerCam(head, net[2]).attribute(tokens.float(), target=1)


def test_images_of_another_size_than_a_linear_layer_takes_are_named() -> None:
    net = nn.Sequential(nn.Conv2d(3, 2, 3), nn.Flatten(), nn.Linear(72, 3)).eval()
    message = r"`2` \(Linear\) takes 72 features, and gets 128 of inputs of shape \(B, 3, 10, 10\)"
    for explain in (LayerCam(net, "0").attribute, rise(net)):
        with pytest.raises(ValueError, match=message):
            explain(torch.rand(2, 3, 10, 10), target=1)
    with pytest.raises(RuntimeError, match="in the middle"):
        LayerCam(nn.Sequential(net[0], Lambda(_raise)), "0").attribute(X, target=1)


def test_a_fault_of_the_model_itself_is_raised_as_it_is() -> None:
    """The second layer gets as many channels as the inputs have, and needs others."""
    net = nn.Sequential(nn.Conv2d(3, 3, 1), nn.Conv2d(4, 4, 1), nn.Flatten()).eval()
    for explain in (LayerCam(net, "0").attribute, rise(net), sess(Saliency)(net)):
        with pytest.raises(RuntimeError, match="to have 4 channels, but got 3 channels instead"):
            explain(X, target=1)


def test_tensors_of_other_kinds_reach_the_model_as_before() -> None:
    for inputs in (X.to_sparse(), X.to("meta")):
        with pytest.raises(RuntimeError):
            LayerCam(small_net(), "conv2").attribute(inputs, target=1)
    expected = LayerCam(small_net(), "conv2").attribute(X, target=1)
    for same in (nn.Parameter(X), X.clone(memory_format=torch.channels_last)):
        maps = LayerCam(small_net(), "conv2").attribute(same, target=1)
        torch.testing.assert_close(maps, expected)


def test_upsample_restores_the_flags_of_inputs_where_captums_method_fails() -> None:
    x = X.clone()
    with pytest.raises(AssertionError):
        UpsampleWrapper(Saliency(small_net())).attribute(x)
    assert not x.requires_grad


def _raise(x: Tensor) -> Tensor:
    raise RuntimeError("in the middle")


def test_the_start_of_an_ascent_is_checked_alike() -> None:
    with pytest.raises(ValueError, match=r"^`start` do not fit.*`conv1` \(Conv2d\) takes \(B, 3"):
        ActivationMaximization(small_net()).maximize((1, 8, 8), target=1, n_steps=1)


@every_explainer
def test_images_of_0_to_255_get_a_warning(name: str) -> None:
    with pytest.warns(UserWarning, match=r"images with values from 0.* to 25\d.* - mean\) / std"):
        EXPLAINERS[name](small_net())(X * 255, target=1)


def test_the_warning_is_for_images_only_and_comes_once() -> None:
    volumes = METHODS["LayerCAM"](small_net(3), "conv2")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        volumes.attribute(torch.randn(1, 3, 4, 4, 4) * 1000, target=1)
        LayerCam(small_net(), "conv2").attribute(X * 9, target=1)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")
        for _ in range(3):
            UpsampleWrapper(LayerCam(small_net(), "conv2")).attribute(X * 255, target=1)
    assert len(caught) == 1


@pytest.mark.parametrize("make", [sess, augmented, lambda base: lambda net: base(net).attribute])
def test_wrappers_warn_of_pixel_values_once_and_not_for_each_crop(make: Any) -> None:
    explain = make(lambda net: UpsampleWrapper(LayerCam(net, "conv2")))(small_net())
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        explain(X * 255, target=1)
    assert [w for w in caught if "values from" in str(w.message)] == caught
    assert len(caught) == 1


# --- targets --------------------------------------------------------------------------------------

NO_TARGETS = [
    "espresso",
    1.0,
    True,
    [],
    [True, False],
    [1.0, 2.0],
    [object(), object()],
    (0.5,),
    np.int64(1),
    torch.tensor([1.0, 2.0]),
    torch.tensor([True, False]),
    torch.tensor(1.0),
    torch.ones(2, 2, dtype=torch.long),
    torch.tensor([1, 2], dtype=torch.uint8),
]
OUT_OF_RANGE = [
    4,
    10,
    -5,
    (10,),
    [4, 1],
    [1, -1],
    [(0,), (4,)],
    torch.tensor([0, 4]),
    torch.tensor(4),
    (1, 2),
]


@every_explainer
def test_values_that_are_no_target_are_refused_before_the_model_runs(name: str) -> None:
    net = small_net()
    explain = EXPLAINERS[name](net)
    for target in NO_TARGETS:
        with pytest.raises(AssertionError, match=r"^`target` is .* but a target is the index of a"):
            explain(X, target=target)
    assert not_run(net)


@every_explainer
def test_targets_out_of_range_raise_captums_assertion_error(name: str) -> None:
    explain = EXPLAINERS[name](small_net())
    for target in OUT_OF_RANGE:
        with pytest.raises(AssertionError, match=r"^`target` .* out of range .* class from 0 to 3"):
            explain(X, target=target)
    with pytest.raises(AssertionError, match=r"^`target` has 3 entries for 2 examples"):
        explain(X, target=[1, 2, 3])


@every_explainer
def test_forms_that_captum_accepts_are_accepted(name: str) -> None:
    explain = EXPLAINERS[name](small_net())
    for target in (1, -1, (1,), [1, 3], [(1,), (3,)], torch.tensor([1, 3]), torch.tensor(2)):
        explain(X, target=target)


def test_a_model_of_one_score_takes_no_target() -> None:
    net = FunctionsAroundLayer(lambda a: a.sum((1, 2, 3)), layer=nn.Conv2d(3, 2, 1))
    with pytest.raises(AssertionError, match="one score for each example, so pass target=None"):
        LayerCam(net, "layer").attribute(X, target=0)
    with pytest.raises(TypeError, match="must give a tensor of scores, got <class 'dict'>"):
        LayerCam(lambda x: {"out": net(x)}, net.layer).attribute(X, target=0)


# --- scores ---------------------------------------------------------------------------------------

SOFTMAX = {
    "Group-CAM": lambda m: LayerGroupCam(m, "0").attribute,
    "Score-CAM": lambda m: LayerScoreCam(m, "0", score="softmax").attribute,
    "Ablation-CAM": lambda m: METHODS["Ablation-CAM"](m, "0", score="softmax").attribute,
    "RISE": rise,
    "SESS": sess(lambda m: LayerGradCam(m, m[0])),
    "SESS, scores first": lambda m: (
        SESSWrapper(LayerGradCam(m, m[0]), window=8, n_scales=2, pre_filter_ratio=0.5).attribute
    ),
    **{k: v for k, v in ON_IMAGES.items() if k != "FIDO"},
}


@pytest.mark.parametrize("name", SOFTMAX)
def test_the_softmax_of_a_single_logit_is_refused(name: str) -> None:
    layers = [nn.Conv2d(3, 2, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    column = nn.Sequential(*layers, nn.Linear(2, 1)).eval()
    for net, target in ((column, 0), (nn.Sequential(*column, nn.Flatten(0)), None)):
        with pytest.raises(ValueError, match="'softmax' needs two classes or more"):
            SOFTMAX[name](net)(X, target=target)


@pytest.mark.parametrize("name", [*SOFTMAX, "FIDO"])
def test_a_softmax_over_the_boxes_of_a_detector_is_refused(name: str) -> None:
    """Outputs (B, boxes, 5 + classes) have their classes last; those of a segmentation do not."""
    detector = nn.Sequential(nn.Conv2d(3, 7, 2, 2), nn.Flatten(2), Lambda(lambda a: a.mT)).eval()
    make = {**SOFTMAX, "FIDO": fido}[name]
    message = r"needs classes in dimension 1, which is not known of outputs of shape \(\d+, 16, 7\)"
    with pytest.raises(ValueError, match=message):
        make(detector)(X, target=(3, 5))
    make(nn.Sequential(*detector, Lambda(lambda a: a[:, 3])))(X, target=5)
    segmentation = nn.Sequential(nn.Conv2d(3, 7, 2, 2)).eval()
    make(segmentation)(X, target=(5, 1, 2))


def test_a_softmax_over_the_classes_of_a_box_is_a_callable() -> None:
    detector = nn.Sequential(nn.Conv2d(3, 7, 2, 2), nn.Flatten(2), Lambda(lambda a: a.mT)).eval()
    torch.manual_seed(0)
    box = RISE(detector, lambda out: out.softmax(-1)).attribute(X, target=(3, 5), n_masks=4)
    torch.manual_seed(0)
    of_box = RISE(lambda x: detector(x)[:, 3]).attribute(X, target=5, n_masks=4)
    torch.testing.assert_close(box, of_box)


# --- layers ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", METHODS)
def test_a_layer_without_spatial_dimensions_has_no_map_of_an_image(name: str) -> None:
    with pytest.raises(ValueError, match=r"`layer` `fc` has the shape \(2, 4\), so its map is one"):
        METHODS[name](small_net(), "fc").attribute(X, target=1)
    with pytest.warns(UserWarning, match="`layer` `pool` has the shape .* is one number"):
        METHODS[name](small_net(), "pool").attribute(X, target=1)


def test_scripted_models_are_refused_by_layer_methods_and_taken_by_others() -> None:
    scripted = torch.jit.script(small_net())
    for name in METHODS:
        for layer in ("conv2", scripted.conv2):
            with pytest.raises(ValueError, match=r"is a ScriptModule.*RISE, FIDO and the metrics"):
                METHODS[name](scripted, layer)
    for make in ({"RISE": rise} | ON_IMAGES).values():
        make(scripted)(X, target=1)


def test_the_error_for_a_siamese_net_says_how_to_explain_it() -> None:
    with pytest.raises(
        ValueError, match=r"runs more than once.*Siamese.*`additional_forward_args`"
    ):
        LayerCam(ReluTwiceNet(), "relu").attribute(X, target=1)


def test_eigen_cam_needs_no_target_of_a_model_without_a_single_score() -> None:
    net = small_net()
    expected = LayerEigenCam(net, "conv2").attribute(X, target=1)
    for head in (lambda y: {"embedding": y}, lambda y: (y, y), lambda y: y[:, :, None, None]):
        model = Lambda(lambda x, head=head: head(net(x)))
        assert torch.equal(LayerEigenCam(model, net.conv2).attribute(X), expected)
    with pytest.raises(AssertionError, match="out of range"):
        LayerEigenCam(net, "conv2").attribute(X, target=9)


class CheckpointedNet(nn.Module):
    """A convolution inside of a reentrant checkpoint."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.fc = nn.Conv2d(3, 4, 3), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(checkpoint(self.conv, x, use_reentrant=True).mean((2, 3)))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", GRADIENT)
def test_a_missing_gradient_has_its_cause_in_the_error(name: str) -> None:
    layers = [nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3)]
    quantised = torch.ao.quantization.quantize_dynamic(nn.Sequential(*layers).eval(), {nn.Linear})
    with pytest.raises(ValueError, match=r"`4` \(Linear\) is quantised"):
        GRADIENT[name](quantised, "0").attribute(X, target=1)
    with pytest.raises(ValueError, match=r"reentrant checkpoint.*use_reentrant=False"):
        GRADIENT[name](CheckpointedNet().eval(), "conv").attribute(X, target=1)
    detached = FunctionsAroundLayer(lambda a: a.detach().mean((2, 3)), layer=nn.Conv2d(3, 4, 3))
    with pytest.raises(ValueError, match=r"does not depend on `layer`.*stops gradients"):
        GRADIENT[name](detached, "layer").attribute(X, target=1)


# --- habits ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", METHODS)
def test_keywords_of_grad_cam_get_the_line_to_write(name: str) -> None:
    net = small_net()
    line = r"has no argument '{}'.*{}.attribute\(x, target=3\)"
    for habit in ({"model": net}, {"target_layers": [net.conv2]}, {"target_layer": net.conv2}):
        with pytest.raises(TypeError, match=line.format(*habit, r"\(model, model.layer4\)")):
            METHODS[name](**({"forward_func": net, "layer": net.conv2} | habit))
    for habit in ("input_tensor", "targets"):
        with pytest.raises(TypeError, match=rf"no argument '{habit}'.*attribute\(x, target=3\)"):
            METHODS[name](net, "conv2").attribute(**{habit: X})


def test_keywords_of_grad_cam_get_the_line_to_write_for_other_methods() -> None:
    net = small_net()
    for cls in (RISE, FIDO):
        with pytest.raises(TypeError, match=rf"{cls.__name__}\(model\).attribute\(x, target=3\)"):
            cls(model=net)  # type: ignore[call-arg]
        with pytest.raises(TypeError, match="no argument 'input_tensor'"):
            cls(net).attribute(input_tensor=X)  # type: ignore[call-arg]
    for cls in (UpsampleWrapper, SESSWrapper, AugmentedSR):
        with pytest.raises(TypeError, match=rf"{cls.__name__}\(method\).attribute\(x, target=3\)"):
            cls(model=net)
        with pytest.raises(TypeError, match="no argument 'targets'"):
            cls(Saliency(net)).attribute(X, targets=[1, 1])


def test_errors_do_not_print_a_network() -> None:
    net = small_net()
    for cls in (UpsampleWrapper, SESSWrapper, AugmentedSR):
        with pytest.raises(TypeError, match=r"got a SmallNet: such as .*LayerGradCam") as caught:
            cls(net)
        assert len(str(caught.value)) < 200
    with pytest.raises(ValueError, match="got a SmallNet"):
        LayerScoreCam(net, "conv2", weighting=net)  # type: ignore[arg-type]


def test_noise_tunnel_calls_the_checks() -> None:
    with pytest.raises(AssertionError, match="out of range"):
        NoiseTunnel(LayerCam(small_net(), "conv2")).attribute(X, target=9, nt_samples=2)
