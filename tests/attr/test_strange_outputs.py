"""Outputs, tensors and functions of users that cannot work: each gets one sentence."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from captum.attr import IntegratedGradients, LayerGradCam
from torch import Tensor

from captum_ext.attr import (
    FIDO,
    RISE,
    AugmentedSR,
    LayerAblationCam,
    LayerCam,
    LayerGroupCam,
    LayerScoreCam,
    LayerSmoothGradCamPlusPlus,
    SESSWrapper,
    UpsampleWrapper,
)
from captum_ext.features import ActivationMaximization, maximally_activating_patches
from captum_ext.imaging import blur, resize, warp
from captum_ext.metrics import average_drop, deletion, insertion, road
from captum_ext.perception import LayerEncoder
from captum_ext.tta import crop_tta
from tests.methods import METHODS
from tests.networks import SmallNet, small_net

X = torch.rand(2, 3, 9, 9, generator=torch.Generator().manual_seed(0))
MAPS = torch.rand(2, 9, 9, generator=torch.Generator().manual_seed(1))
Output = Callable[[Tensor], Any]


def calls(net: SmallNet, model: Any, x: Tensor = X) -> dict[str, Callable[[], Any]]:
    """Calls of each method, wrapper and metric, with `model` as a function around `net`."""
    layer = net.relu2
    sess = {"window": 9, "n_scales": 1}
    base = {"target": 1}
    return {
        **{
            name: lambda method=method: method(model, layer).attribute(x, target=1)
            for name, method in METHODS.items()
            if name not in ("CAM", "Eigen-CAM")
        },
        "RISE": lambda: RISE(model).attribute(x, target=1, n_masks=2, grid=2),
        "FIDO": lambda: FIDO(model).attribute(x, target=1, n_steps=1, n_masks=1),
        "SESS": lambda: SESSWrapper(IntegratedGradients(model), **sess).attribute(x, **base),
        "upsampled": lambda: UpsampleWrapper(LayerGradCam(model, layer)).attribute(x, **base),
        "maximization": lambda: ActivationMaximization(model).maximize((3, 9, 9), 1, n_steps=1),
        "insertion": lambda: insertion(model, x, MAPS, target=1),
        "road": lambda: road(model, x, MAPS, target=1),
        "average drop": lambda: average_drop(model, x, MAPS, target=1),
        "crops": lambda: crop_tta(model, x, MAPS[:, None]),
    }


CALLS = list(calls(small_net(), None))
WRAPPED = ("SESS", "upsampled")  # around methods of Captum


@pytest.mark.parametrize(
    "output",
    [lambda y: {"logits": y}, lambda y: (y,), lambda y: None, lambda y: "cat"],
    ids=["dict", "tuple", "None", "str"],
)
@pytest.mark.parametrize("name", CALLS)
def test_an_output_that_is_no_tensor_is_a_type_error_of_one_sentence(
    name: str, output: Output
) -> None:
    """Ablation-CAM, the maximization and wrappers around Captum's methods said AttributeError."""
    net = small_net()
    with pytest.raises(TypeError, match=r"^`(forward_func|model)` must give a .*tensor of"):
        calls(net, lambda x: output(net(x)))[name]()


@pytest.mark.parametrize("name", [name for name in CALLS if name not in WRAPPED])
def test_scores_are_real_numbers_in_a_dense_tensor(name: str) -> None:
    net = small_net()
    for output in (lambda y: y + 0j, lambda y: y.to_sparse(), lambda y: y > 0):
        with pytest.raises(
            (TypeError, ValueError), match=r"must give a .*tensor of|gradient|depend"
        ) as caught:
            calls(net, lambda x, output=output: output(net(x)))[name]()
        assert len(str(caught.value)) < 400


@pytest.mark.parametrize("name", WRAPPED)
def test_methods_of_captum_in_wrappers_say_that_the_gradient_is_stopped(name: str) -> None:
    net = small_net()
    with pytest.raises(ValueError, match=r"^`forward_func` gives a score without a gradient"):
        calls(net, lambda x: net(x).detach())[name]()


def test_ablation_cam_needs_a_score_for_each_example() -> None:
    net = small_net()
    for output in (lambda y: y[:1], lambda y: torch.cat([y, y])):
        model = lambda x, output=output: output(net(x))  # noqa: E731
        with pytest.raises(ValueError, match=r"^`forward_func` must give one score for each of 2"):
            LayerAblationCam(model, net.relu2).attribute(X, target=1)


def test_an_output_without_classes_is_refused() -> None:
    net = small_net()
    with pytest.raises(ValueError, match=r"scores for each of 4 examples, got \(4, 0\)"):
        FIDO(lambda x: net(x)[:, :0]).attribute(X, target=0, n_steps=1, n_masks=1)


@pytest.mark.parametrize("make", [Tensor.to_sparse, lambda x: x.to("meta")], ids=["sparse", "meta"])
def test_images_and_maps_are_dense_and_have_values(make: Callable[[Tensor], Tensor]) -> None:
    """Torch said so in up to 14,000 characters."""
    net, x = small_net(), make(X)
    sess = SESSWrapper(IntegratedGradients(net), window=9, n_scales=1)
    explanations = [
        lambda: sess.attribute(x, target=1),
        lambda: AugmentedSR(LayerCam(net, "relu2"), n_augmentations=2).attribute(x, target=1),
        lambda: FIDO(net).attribute(x, target=1, n_steps=1, n_masks=1),
        lambda: road(net, x, MAPS, target=1),
        lambda: average_drop(net, X, x, target=1),
        lambda: deletion(net, X, x, target=1),
        lambda: crop_tta(net, x, MAPS[:, None]),
        lambda: crop_tta(net, X, x[:, :1] if x.is_meta else x),
    ]
    for explain in explanations:
        with pytest.raises(TypeError, match="must be a dense tensor with values"):
            explain()


@pytest.mark.parametrize("cls", [LayerScoreCam, LayerGroupCam, RISE])
@pytest.mark.parametrize("baselines", [torch.tensor(2.0), torch.ones(2, 2)], ids=["0-d", "(2, 2)"])
def test_baselines_that_do_not_fit_are_shown_by_their_shape(cls: Any, baselines: Tensor) -> None:
    """Captum's error shows all values; for a tensor without dimensions it is an IndexError."""
    net = small_net()
    method = cls(net) if cls is RISE else cls(net, "relu2")
    with pytest.raises(AssertionError, match=r"^`baselines` must be a number") as caught:
        method.attribute(X, baselines, target=1)
    assert str(tuple(baselines.shape)) in str(caught.value)


def test_a_reshape_transform_returns_a_tensor() -> None:
    net, options = small_net(), {"reshape_transform": lambda x: None}
    for explain in (
        lambda: LayerCam(net, "relu2", **options).attribute(X, target=1),
        lambda: UpsampleWrapper(LayerCam(net, "relu2"), **options).attribute(X, target=1),
        lambda: LayerEncoder(net, "relu2", **options)(X),
        lambda: ActivationMaximization(net, "relu2", **options).maximize((3, 9, 9), 1, n_steps=1),
    ):
        with pytest.raises(
            TypeError, match=r"^`reshape_transform` must return a tensor, got <class"
        ):
            explain()


@pytest.mark.parametrize("value", [0, 1.0, "x", None, torch.tensor(True)])
def test_flags_of_resizing_are_bools(value: Any) -> None:
    """Torch said "invalid combination of arguments"."""
    net = small_net()
    with pytest.raises(TypeError, match=r"^`align_corners` must be True or False"):
        UpsampleWrapper(LayerCam(net, "relu2"), align_corners=value)
    for name in ("align_corners", "antialias"):
        with pytest.raises(TypeError, match=f"^`{name}` must be True or False"):
            resize(X, (4, 4), **{name: value})


def test_options_of_image_operations() -> None:
    """Kornia's and torch's errors named neither the argument nor the allowed values."""
    for sigma in (float("nan"), -1.0, None, "x", True, torch.tensor(2)):
        with pytest.raises(ValueError, match=r"^`sigma` must be a number, greater than 0"):
            blur(X, 3, sigma)  # type: ignore[arg-type]
    for kernel_size in (float("nan"), 2, 3.0, torch.tensor(float("nan"))):
        with pytest.raises(ValueError, match=r"^`kernel_size` must be odd and positive"):
            blur(X, kernel_size)  # type: ignore[arg-type]
    assert torch.isfinite(blur(X, 3, float("inf"))).all()
    with pytest.raises(ValueError, match=r"^`mode` must be one of"):
        warp(X, torch.eye(3).repeat(2, 1, 1), mode="area")


def test_other_options_out_of_range() -> None:
    net = small_net()
    with pytest.raises(ValueError, match=r"^`n_augmentations` must be an integer"):
        AugmentedSR(LayerCam(net, "relu2"), n_augmentations=10**30)
    with pytest.raises(ValueError, match=r"^`scales` must be integers"):
        SESSWrapper(LayerCam(net, "relu2"), scales=torch.tensor(2))
    enhanced = AugmentedSR(
        LayerCam(net, "relu2"), n_augmentations=2, downsample=lambda x: None, solver="adam"
    )
    with pytest.raises(ValueError, match=r"^`downsample` must return a tensor"):
        enhanced.attribute(X, target=1)
    with pytest.raises(TypeError, match=r"^`generator` must be a torch.Generator"):
        LayerSmoothGradCamPlusPlus(net, "relu2", generator=0)  # type: ignore[arg-type]
    for percentiles in (torch.tensor(20.0), 20, [], "20"):
        with pytest.raises(ValueError, match=r"^`percentiles` must be numbers above 0"):
            road(net, X, MAPS, target=1, percentiles=percentiles)
    with pytest.raises(ValueError, match=r"^`originals` must be one for each image"):
        crop_tta(net, X, MAPS[:, None], originals=torch.tensor(1.0))
    for num_workers in (-1, 1.5, None, "2", True):
        with pytest.raises(ValueError, match=r"^`num_workers` must be an integer of at least 0"):
            maximally_activating_patches(net, "relu2", [X[0]], size=9, num_workers=num_workers)


def test_a_model_that_writes_to_its_input_writes_to_a_copy() -> None:
    """Captum's methods hand the caller's tensor on, so wrappers around them copy it."""
    net, x = small_net(), X.clone()
    model = lambda x: net(x.mul_(2))  # noqa: E731
    UpsampleWrapper(LayerGradCam(model, net.relu2)).attribute(x, target=1)
    assert torch.equal(x, X)
