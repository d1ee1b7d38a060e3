"""Properties of all public attribution classes of the package."""

import copy
import inspect
import pickle
from contextlib import nullcontext
from typing import Any, get_args

import pytest
import torch
from captum.attr import Attribution, LayerGradCam, NoiseTunnel

import captum_ext.attr
from captum_ext._repr import short_repr
from captum_ext.attr import (
    BaseGradientCam,
    BaseLayerCam,
    LayerCam,
    LayerGroupCam,
    LayerSmoothGradCamPlusPlus,
)
from captum_ext.attr._method_info import Family
from tests.methods import METHODS
from tests.networks import small_net

PUBLIC = {name: getattr(captum_ext.attr, name) for name in captum_ext.attr.__all__}
CLASSES = {
    name: value
    for name, value in PUBLIC.items()
    if isinstance(value, type) and issubclass(value, Attribution)
}


def test_all_attribution_classes_are_looked_at() -> None:
    assert {"FCAM", "FIDO", "RISE", "SESSWrapper", "LayerScoreCam"} <= CLASSES.keys()
    assert len(CLASSES) >= 20


@pytest.mark.parametrize("name", sorted(CLASSES.keys() - {"BaseLayerCam"}))
def test_attribute_is_wrapped_once_as_noise_tunnel_wants_it(name: str) -> None:
    """Its decorator loses no argument: `inspect.signature` sees the wrapped function."""
    attribute = CLASSES[name].attribute
    assert inspect.isfunction(attribute.__wrapped__)
    assert inspect.isfunction(attribute.__wrapped__.__wrapped__), "the checks are in between"
    assert not hasattr(attribute.__wrapped__.__wrapped__, "__wrapped__")
    assert "inputs" in inspect.signature(attribute).parameters


@pytest.mark.parametrize("name", METHODS)
def test_layer_methods_survive_pickle_and_copy(name: str) -> None:
    """Being generic in their layers, for type checkers, changes nothing at run time."""
    torch.manual_seed(0)
    x = torch.randn(2, 3, 9, 9)
    for layer in ("relu2", ["relu2"]):
        method = METHODS[name](small_net(), layer)
        expected = METHODS[name](small_net(), layer).attribute(x, target=1)
        for again in (pickle.loads(pickle.dumps(method)), copy.copy(method), copy.deepcopy(method)):
            assert type(again) is type(method)
            assert isinstance(again, BaseLayerCam)
            if name != "Smooth Grad-CAM++":  # its generator goes on
                torch.testing.assert_close(again.attribute(x, target=1), expected, rtol=0, atol=0)


def test_subclasses_need_not_say_that_they_are_generic() -> None:
    class LayerMyCam(BaseGradientCam):
        def weights(self, activations: Any, gradients: Any) -> Any:
            return gradients.clamp(min=0)

    net, x = small_net(), torch.randn(2, 3, 9, 9)
    expected = LayerCam(net, "relu2").attribute(x, target=1)
    assert torch.equal(LayerMyCam(net, "relu2").attribute(x, target=1), expected)
    assert torch.equal(LayerCam[str](net, "relu2").attribute(x, target=1), expected)
    noisy = NoiseTunnel(LayerMyCam(net, "relu2")).attribute(x, target=1, nt_samples=1, stdevs=0.0)
    torch.testing.assert_close(noisy, expected)


CONCRETE = sorted(name for name, cls in CLASSES.items() if hasattr(cls, "title"))


@pytest.mark.parametrize("name", CONCRETE)
def test_a_method_knows_its_title_paper_and_cost(name: str) -> None:
    cls = CLASSES[name]
    assert cls.paper.url in str(cls.__doc__)
    assert cls.paper.authors.split()[0] in str(cls.__doc__)
    if not name.endswith(("SR", "Wrapper")):  # these cost what their base costs
        assert cls.family in get_args(Family)
        assert cls.passes


@pytest.mark.parametrize("name", sorted(n for n in CONCRETE if n.startswith("Layer")))
def test_inference_mode_serves_the_methods_that_need_no_gradients(name: str) -> None:
    net, x = small_net(), torch.randn(1, 3, 9, 9)
    refused = pytest.raises(RuntimeError, match="inference_mode")
    with torch.inference_mode(), refused if CLASSES[name].needs_gradients else nullcontext():
        CLASSES[name](net, "relu2").attribute(x, target=1)


def test_a_layer_cam_is_shown_as_the_call_that_makes_it() -> None:
    net = small_net()
    assert repr(LayerCam(net, "relu2")) == "LayerCam(SmallNet, layer='relu2')"
    assert repr(LayerCam(net.forward, [net.relu1])) == "LayerCam(SmallNet.forward, layer=['relu1'])"
    smooth = LayerSmoothGradCamPlusPlus(net, "relu2", n_samples=3, generator=torch.Generator())
    assert repr(smooth) == (
        "LayerSmoothGradCamPlusPlus(SmallNet, layer='relu2', n_samples=3, generator=Generator)"
    )
    grouped = LayerGroupCam(net, net.relu2, groups=torch.tensor([0, 0, 0, 1, 1, 1]))
    assert repr(grouped) == "LayerGroupCam(SmallNet, layer='relu2', groups=Tensor((6,), int64))"
    noisy = NoiseTunnel(LayerGradCam(net, net.relu2))
    assert short_repr(noisy) == "NoiseTunnel(LayerGradCam(SmallNet, layer='relu2'))"


@pytest.mark.parametrize(
    ("old", "new"), [("LayerMap", BaseLayerCam), ("GradientCam", BaseGradientCam)]
)
@pytest.mark.parametrize("module", [captum_ext.attr, captum_ext.attr.layer])
def test_old_names_work_with_a_warning(module: Any, old: str, new: type) -> None:
    with pytest.warns(DeprecationWarning, match=f"{old} is now {module.__name__}.{new.__name__}"):
        assert getattr(module, old) is new
    with pytest.raises(AttributeError, match="LayerNoCam"):
        _ = module.LayerNoCam
