"""Small classifiers as `captum_ext.zoo.load_model` gives them, and a file of weights."""

import pytest
import torch
import torchvision.models

from captum_ext import zoo
from captum_ext.attr import suggest_layer, suggest_reshape_transform
from tests.networks import vision_transformer


def explainable(module, name="net", n=10, crop=32, layer=None):
    return zoo.LoadedModel(
        name,
        module,
        zoo.Preprocess(crop, crop, (0.5,) * 3, (0.5,) * 3),
        tuple(str(i) for i in range(n)),
        layer or suggest_layer(module),
        suggest_reshape_transform(module),
    )


def small_vit():
    return explainable(vision_transformer(width=16), "vit")


@pytest.fixture(scope="module")
def squeezenet(tmp_path_factory):
    """A small network of 10 classes and its file of weights."""
    torch.manual_seed(0)
    net = torchvision.models.squeezenet1_1(num_classes=10).eval()
    path = tmp_path_factory.mktemp("weights") / "squeezenet.pt"
    torch.save(net.state_dict(), path)
    return net, path
