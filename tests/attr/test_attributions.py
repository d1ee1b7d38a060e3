"""What every attribution class of the package has, found by its public names."""

import copy
import inspect
import pickle
from typing import Any

import pytest
import torch
from captum.attr import Attribution, NoiseTunnel

import captum_ext.attr
from captum_ext.attr import GradientCam, LayerCam, LayerMap
from tests.methods import EVERY
from tests.networks import small_net

PUBLIC = {name: getattr(captum_ext.attr, name) for name in captum_ext.attr.__all__}
CLASSES = {
    name: found
    for name, found in PUBLIC.items()
    if isinstance(found, type) and issubclass(found, Attribution)
}


def test_the_walk_finds_them() -> None:
    assert {"FCAM", "FIDO", "RISE", "SESSWrapper", "LayerScoreCam"} <= CLASSES.keys()
    assert len(CLASSES) >= 20


@pytest.mark.parametrize("name", sorted(CLASSES.keys() - {"LayerMap"}))
def test_attribute_is_wrapped_once_as_noise_tunnel_wants_it(name: str) -> None:
    """And `inspect.signature` sees what it wraps: no argument is lost in a decorator."""
    attribute = CLASSES[name].attribute
    assert inspect.isfunction(attribute.__wrapped__)
    assert not hasattr(attribute.__wrapped__, "__wrapped__")
    assert "inputs" in inspect.signature(attribute).parameters


@pytest.mark.parametrize("name", EVERY)
def test_layer_methods_survive_pickle_and_copy(name: str) -> None:
    """Being generic in their layers, for type checkers, changes nothing at run time."""
    torch.manual_seed(0)
    x = torch.randn(2, 3, 9, 9)
    for layer in ("relu2", ["relu2"]):
        method = EVERY[name](small_net(), layer)
        expected = EVERY[name](small_net(), layer).attribute(x, target=1)
        for again in (pickle.loads(pickle.dumps(method)), copy.copy(method), copy.deepcopy(method)):
            assert type(again) is type(method)
            assert isinstance(again, LayerMap)
            if name != "Smooth Grad-CAM++":  # its generator goes on
                torch.testing.assert_close(again.attribute(x, target=1), expected, rtol=0, atol=0)


def test_subclasses_need_not_say_that_they_are_generic() -> None:
    class LayerMyCam(GradientCam):
        def weights(self, activations: Any, gradients: Any) -> Any:
            return gradients.clamp(min=0)

    net, x = small_net(), torch.randn(2, 3, 9, 9)
    expected = LayerCam(net, "relu2").attribute(x, target=1)
    assert torch.equal(LayerMyCam(net, "relu2").attribute(x, target=1), expected)
    assert torch.equal(LayerCam[str](net, "relu2").attribute(x, target=1), expected)
    noisy = NoiseTunnel(LayerMyCam(net, "relu2")).attribute(x, target=1, nt_samples=1, stdevs=0.0)
    torch.testing.assert_close(noisy, expected)
