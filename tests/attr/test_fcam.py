"""F-CAM as an attribution: its equation, that it is of no class, and what it is stored with."""

import copy
import warnings

import pytest
import torch
from captum.attr import NoiseTunnel
from captum.metrics import infidelity
from torch import nn

from captum_ext._model import layer_activations
from captum_ext.attr import FCAM, SESSWrapper, UpsampleWrapper
from captum_ext.fcam import FCAMDecoder


def network(seed=0):
    torch.manual_seed(seed)
    model = nn.Sequential(
        nn.Sequential(nn.Conv2d(3, 6, 3, 2, 1), nn.BatchNorm2d(6), nn.ReLU(inplace=True)),
        nn.Sequential(nn.Conv2d(6, 8, 3, 2, 1), nn.BatchNorm2d(8), nn.ReLU(inplace=True)),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(8, 4),
    )
    with torch.no_grad():
        model(torch.rand(16, 3, 32, 32))  # statistics
    return model.eval()


def fcam(model=None):
    model = network() if model is None else model
    torch.manual_seed(1)
    decoder = FCAMDecoder.reading(model, torch.rand(1, 3, 32, 32), widths=(8, 4))
    for _ in range(3):
        features = [torch.rand(8, 6, 16, 16), torch.rand(8, 8, 8, 8)]
        decoder(features, (32, 32))
    decoder.head.weight.data.mul_(20)  # else all is about 1/2
    return FCAM(model, decoder.eval())


def images(n=3, size=(32, 32), seed=0):
    return torch.rand(n, 3, *size, generator=torch.Generator().manual_seed(seed))


def state(module):
    return {name: value.clone() for name, value in module.state_dict().items()}


# --- the map -------------------------------------------------------------------------------------


def test_it_is_the_foreground_of_the_decoders_softmax():
    one, x = fcam(), images()
    features = [found[0] for found in layer_activations(one.forward_func, one.layers, (x,))[0]]
    assert [tuple(f.shape[1:]) for f in features] == [(6, 16, 16), (8, 8, 8)]
    logits = one.decoder(features, (32, 32))
    by_hand = logits[:, 1:].exp() / logits.exp().sum(1, keepdim=True)
    torch.testing.assert_close(one.foreground(x), by_hand)
    maps = one.attribute(x)
    assert maps.shape == x.shape
    assert all(torch.equal(maps[:, c : c + 1], one.foreground(x)) for c in range(3))
    assert maps.std() > 0.05


@pytest.mark.parametrize("size", [(33, 47), (97, 64), (9, 8)])
def test_sizes(size):
    x = images(2, size)
    assert fcam().attribute(x).shape == x.shape


@pytest.mark.parametrize(
    "target", [0, 3, [0, 1, 2], torch.tensor([3, 2, 1]), (1,), [(0,), (1,), (2,)], None]
)
def test_a_target_changes_nothing(target):
    one, x = fcam(), images()
    assert torch.equal(one.attribute(x, target=target), one.attribute(x, target=1))


@pytest.mark.parametrize("target", [[0, 1], torch.zeros(2).long()])
def test_targets_are_checked(target):
    with pytest.raises(AssertionError):
        fcam().attribute(images(), target=target)


def test_a_batch_is_its_images():
    one, x = fcam(), images()
    whole = one.attribute(x)
    for i in range(3):
        torch.testing.assert_close(whole[i : i + 1], one.attribute(x[i : i + 1]))


def test_tuples_and_dtypes():
    one, x = fcam(), images()
    (found,) = one.attribute((x,))
    assert torch.equal(found, one.attribute(x))
    double = fcam()
    double.forward_func.double()
    assert double.attribute(x.double()).dtype == torch.float64
    half = fcam()
    half.forward_func.bfloat16()
    assert half.attribute(x.bfloat16()).dtype == torch.bfloat16


def test_with_captum():
    """Under NoiseTunnel, in our wrappers, in Captum's metrics, and where there is no gradient."""
    one, x = fcam(), images()
    assert NoiseTunnel(one).attribute(x, nt_samples=2, target=1).shape == x.shape
    assert SESSWrapper(one, n_scales=2, window=24).attribute(x, target=1).shape == x.shape
    assert torch.equal(UpsampleWrapper(one).attribute(x), one.attribute(x))
    maps = one.attribute(x)

    def noise(inputs):
        return 0.1 * torch.ones_like(inputs), inputs - 0.1

    assert infidelity(one.forward_func, noise, x, maps, target=1).shape == (3,)
    with torch.inference_mode():
        torch.testing.assert_close(one.attribute(x), maps)


# --- no trace ------------------------------------------------------------------------------------


def test_no_trace():
    one, x = fcam(), images().requires_grad_()
    model = one.forward_func
    before, flags = (state(model), state(one.decoder)), [m.training for m in model.modules()]
    kept = x.detach().clone()
    found = one.attribute(x)
    assert not found.requires_grad
    assert torch.is_grad_enabled()
    assert torch.equal(x.detach(), kept)
    assert x.grad is None
    for module, values in zip((model, one.decoder), before, strict=True):
        assert all(torch.equal(v, values[k]) for k, v in module.state_dict().items())
        assert all(p.grad is None and p.requires_grad for p in module.parameters())
    assert [m.training for m in model.modules()] == flags
    assert not any(m._forward_hooks for m in model.modules())
    with pytest.raises(RuntimeError):
        one.attribute(torch.rand(1, 4, 32, 32))
    assert not any(m._forward_hooks for m in model.modules())


@pytest.mark.parametrize("part", ["forward_func", "decoder"])
def test_train_mode_is_warned_of_and_its_buffers_are_put_back(part):
    one = fcam()
    module = getattr(one, part).train()
    before = state(module)
    with pytest.warns(UserWarning, match="train mode"):
        one.attribute(images())
    assert module.training
    assert all(torch.equal(v, before[k]) for k, v in module.state_dict().items())


# --- files ---------------------------------------------------------------------------------------


def test_what_is_saved_is_loaded(tmp_path):
    one, x = fcam(), images()
    one.save(tmp_path / "decoder.pt")
    saved = torch.load(tmp_path / "decoder.pt", weights_only=True)
    assert saved["layers"] == ["0", "1"]
    again = FCAM.load(tmp_path / "decoder.pt", copy.deepcopy(one.forward_func))
    assert torch.equal(again.attribute(x), one.attribute(x))
    assert not again.decoder.training
    assert (tmp_path / "decoder.pt").stat().st_size < 60_000  # not the classifier


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda m: m[4].weight.data.mul_(1 + 1e-6), "4.weight"),
        (lambda m: m[0][1].running_mean.add_(1), "0.1.running_mean"),
        (lambda m: m.append(nn.Linear(4, 2)), "5.bias"),
        (lambda m: m.__delitem__(4), "4.bias"),
    ],
)
def test_another_classifier_is_refused(change, named, tmp_path):
    one = fcam()
    one.save(tmp_path / "decoder.pt")
    with torch.no_grad():
        change(one.forward_func)
    with pytest.raises(ValueError, match=rf"decoder.pt.*{named}"):
        FCAM.load(tmp_path / "decoder.pt", one.forward_func)


def test_other_files_are_refused(tmp_path):
    torch.save({"a": 1}, tmp_path / "a.pt")
    with pytest.raises(ValueError, match=r"a\.pt"):
        FCAM.load(tmp_path / "a.pt", network())


# --- bad input -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("inputs", "named"),
    [
        (torch.zeros(1, 3, 8, 8).long(), "inputs"),
        (torch.full((1, 3, 8, 8), float("nan")), "inputs"),
        ((torch.zeros(1, 3, 8, 8),) * 2, "inputs"),
        (torch.zeros(3, 8, 8), "inputs"),
    ],
)
def test_wrong_inputs(inputs, named):
    with pytest.raises(ValueError, match=named):
        fcam().attribute(inputs)


def test_wrong_decoders_and_layers():
    model = network()
    with pytest.raises(TypeError, match="decoder"):
        FCAM(model, nn.Conv2d(3, 2, 1))
    nameless = FCAMDecoder([6, 8], [4, 4]).eval()
    with pytest.raises(ValueError, match="layers"):
        FCAM(model, nameless)
    with pytest.raises(ValueError, match="layers"):
        FCAM(model, nameless, ["0"])
    with pytest.raises(ValueError, match="nowhere"):
        FCAM(model, nameless, ["0", "nowhere"])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = FCAM(model, nameless, ["0", model[1]]).attribute(images())
    assert found.shape == (3, 3, 32, 32)
    with pytest.raises(ValueError, match="features"):
        FCAM(model, nameless, ["1", "0"]).attribute(images())
