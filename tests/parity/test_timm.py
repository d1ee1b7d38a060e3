"""Models of timm: the suggested layer has a map."""

import pytest
import torch

from captum_ext.attr import LayerHiResCam, suggest_layer, suggest_reshape_transform

timm = pytest.importorskip("timm")


def test_suggested_layers_of_timm_models_have_a_map() -> None:
    expected = {
        "resnet18": "layer4",
        "vit_tiny_patch16_224": "blocks.11.norm1",
        "deit_tiny_distilled_patch16_224": "blocks.11.norm1",
        "swin_tiny_patch4_window7_224": "norm",
        "efficientnet_b0": "bn2",
        "convnext_atto": "stages.3",
    }
    for name, layer in expected.items():
        model = timm.create_model(name, pretrained=False, num_classes=5).eval()
        assert suggest_layer(model) == layer, name
        method = LayerHiResCam(model, layer, reshape_transform=suggest_reshape_transform(model))
        found = method.attribute(torch.randn(1, 3, 224, 224), target=3)
        assert found.shape[1:] in {(1, 7, 7), (1, 14, 14)}, name
