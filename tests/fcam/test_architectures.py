"""F-CAM on torchvision's classifiers with random weights: maps, and one step of training."""

import warnings

import pytest
import torch
from captum.attr import LayerGradCam

from captum_ext._engine.modules import find_module
from captum_ext.attr import FCAM
from captum_ext.fcam import FCAMDecoder, SeedSampler, find_feature_layers, fit_fcam
from tests.networks import torchvision_net

# Classifiers and sizes of the pictures that they learn from. Inception takes at least 75 pixels.
CLASSIFIERS = {
    "vgg11_bn": [64],
    "resnet18": [(97, 65)],
    "inception_v3": [75, 97],
    "googlenet": [64],
    "densenet121": [64],
    "mobilenet_v3_small": [(64, 96)],
    "efficientnet_b0": [65],
    "convnext_tiny": [64],
    "shufflenet_v2_x0_5": [97],
    "squeezenet1_1": [(65, 80)],
}
CASES = [(name, size) for name, sizes in CLASSIFIERS.items() for size in sizes]


@pytest.fixture(autouse=True)
def quiet():
    """Ignore Lightning's advice about workers and devices, and the warning after a single step."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module="lightning")
        warnings.filterwarnings("ignore", "The decoder has learned nothing")
        yield


def classifier(name):
    torch.manual_seed(0)
    return torchvision_net(name, num_classes=4)


def state(module):
    return {name: value.clone() for name, value in module.state_dict().items()}


@pytest.mark.parametrize(("name", "size"), CASES)
def test_a_training_step_changes_the_decoder_only(name, size, monkeypatch):
    """The decoder changes, the classifier does not, and maps of other sizes have these sizes."""
    height, width = size if isinstance(size, tuple) else (size, size)
    model, start, read = classifier(name), {}, FCAMDecoder.reading

    def noted(*args, **kwargs):
        decoder = read(*args, **kwargs)
        start.update(state(decoder))
        return decoder

    monkeypatch.setattr(FCAMDecoder, "reading", noted)
    before, flags = state(model), [m.training for m in model.modules()]
    deepest = find_feature_layers(model, torch.zeros(1, 3, height, width))[-1]
    fcam = fit_fcam(
        model,
        [(torch.randint(0, 256, (3, height, width), dtype=torch.uint8), k) for k in (1, 3)],
        LayerGradCam(model, find_module(model, deepest)),
        size=(height, width),
        widths=(8, 8, 4),
        n_epochs=1,
        batch_size=2,
        seeds=SeedSampler(4, 4),
        warmup=0,
        rectify=False,  # with random weights, all values may be negative
        show_progress=False,
    )
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert [m.training for m in model.modules()] == flags
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert fcam.decoder.layers[-1] == deepest
    for key, value in fcam.decoder.state_dict().items():
        assert torch.isfinite(value).all()
        assert not torch.equal(value, start[key]), key
    for x in (torch.rand(2, 3, height, width), torch.rand(1, 3, height + 13, width + 32)):
        maps = fcam.attribute(x, target=1)
        assert maps.shape == x.shape
        assert ((maps >= 0) & (maps <= 1)).all()
        assert maps.std() > 0


@pytest.mark.parametrize(
    ("name", "size"),
    [
        *((name, s) for name in ("resnet18", "mobilenet_v3_small") for s in (224, 225, 299)),
        ("resnet18", (130, 75)),
        ("mobilenet_v3_small", (130, 75)),
        ("inception_v3", (75, 75)),
        ("inception_v3", (75, 130)),
        ("inception_v3", (76, 299)),
    ],
)
def test_decoders_take_images_of_any_size(name, size):
    """No size need be divisible by a stride; the decoder is made at this size or at another."""
    height, width = size if isinstance(size, tuple) else (size, size)
    model, x = classifier(name), torch.rand(1, 3, height, width)
    for made_at in (x, torch.rand(1, 3, 107, 96)):
        decoder = FCAMDecoder.reading(model, made_at, widths=(8, 4)).eval()
        maps = FCAM(model, decoder).foreground(x)
        assert maps.shape == (1, 1, height, width)
        assert maps.std() > 0
