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
        result = method.attribute(torch.randn(1, 3, 224, 224), target=3)
        assert result.shape[1:] in {(1, 7, 7), (1, 14, 14)}, name


def test_channels_are_known_where_all_widths_are_equal() -> None:
    """MobileViT's second stage at 256 pixels gives (B, 64, 64, 64)."""

    class Wrapped(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = timm.create_model("mobilevit_xxs", pretrained=False, num_classes=5)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.net(x)

    model, x = Wrapped().eval(), torch.randn(1, 3, 256, 256)
    assert LayerHiResCam(model, "net.stages.1").attribute(x, target=3).shape == (1, 1, 64, 64)
    tokens = "net.stages.2.1.transformer.0"
    with pytest.raises(ValueError, match="tokens or channels last"):
        LayerHiResCam(model, tokens).attribute(x, target=3)
