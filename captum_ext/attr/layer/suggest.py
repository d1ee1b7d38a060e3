"""Suggestions of the layer to explain, for the usual families of classifiers."""

from collections.abc import Callable

from torch import Tensor, nn
from torch.nn import Module

from captum_ext._engine.modules import Forward, require_module
from captum_ext.attr.layer.reshape import channels_last_to_first, tokens_to_grid

# For each family: modules by which it is recognised, its layer ("*": the last child), and the
# layer's `reshape_transform`. In a transformer's last block the score depends on the patch tokens
# only through the attention, so the layer in front of that attention is the last one with a map.
_FAMILIES: list[tuple[tuple[str, ...], str, Callable[[Tensor], Tensor] | None]] = [
    (("encoder.layers", "heads"), "encoder.layers.*.ln_1", tokens_to_grid),  # torchvision ViT
    (("patch_embed", "blocks"), "blocks.*.norm1", tokens_to_grid),  # timm ViT, DeiT, DINOv2
    (("patch_embed", "layers", "norm"), "norm", channels_last_to_first),  # timm Swin
    (("features", "norm", "permute"), "permute", None),  # torchvision Swin
    (("stem", "blocks", "classifier"), "blocks.*", None),  # MaxViT
    (("layer4",), "layer4", None),  # ResNet, ResNeXt, Wide ResNet
    (("Mixed_7c",), "Mixed_7c", None),  # Inception v3
    (("inception5b",), "inception5b", None),  # GoogLeNet
    (("stage4", "conv5"), "conv5", None),  # ShuffleNet v2
    (("trunk_output",), "trunk_output", None),  # RegNet
    (("layers", "classifier"), "layers", None),  # MNASNet
    (("conv_stem", "conv_head", "bn2"), "bn2", None),  # timm EfficientNet
    (("_conv_head", "_bn1"), "_bn1", None),  # EfficientNet-PyTorch
    (("stages",), "stages.*", None),  # timm ConvNeXt
    (("features",), "features", None),  # VGG, AlexNet, DenseNet, MobileNet, EfficientNet, ConvNeXt
]
_POOLS = (nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d, nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d)


def suggest_layer(model: Forward) -> str:
    """The name of the layer to explain: the last one that still has a map.

    The classifiers of torchvision, models in timm's style and vision transformers are recognised
    by the names of their modules. For other models it is the last convolution that is not the
    classifier. A pooling at the end of the layer (VGG) is left out, for a map of twice the
    resolution.

    Args:
        model: the module, or its bound method.

    Returns:
        A dotted name, for the `layer` of any layer method.

    Raises:
        ValueError: not a module, or a module of an unknown family without convolutions.

    Example:
        >>> from torchvision.models import resnet18
        >>> suggest_layer(resnet18())
        'layer4'
    """
    return _suggest(model)[0]


def suggest_reshape_transform(model: Forward) -> Callable[[Tensor], Tensor] | None:
    """The `reshape_transform` of the layer that `suggest_layer` names; None for convolutions.

    Args:
        model: the module, or its bound method.

    Raises:
        ValueError: as for `suggest_layer`.

    Example:
        >>> from torchvision.models import vit_b_32
        >>> suggest_reshape_transform(vit_b_32()).__name__
        'tokens_to_grid'
    """
    return _suggest(model)[1]


def _suggest(model: Forward) -> tuple[str, Callable[[Tensor], Tensor] | None]:
    root = require_module(model, "model")
    names = dict(root.named_modules())
    for signature, layer, reshape_transform in _FAMILIES:
        if all(name in names for name in signature):
            return _last_map(_last_child(layer, names), names), reshape_transform
    convolutions = [
        name for name, m in names.items() if isinstance(m, (nn.Conv1d, nn.Conv2d, nn.Conv3d))
    ]
    linear = [name for name, m in names.items() if isinstance(m, nn.Linear)]
    if not linear:  # the last convolution is the classifier
        convolutions = convolutions[:-1]
    if not convolutions:
        raise ValueError(
            f"No layer to suggest for {type(root).__name__}: its family is not known, and it has "
            f"no convolution in front of its classifier. Give the name of a layer with a map."
        )
    return convolutions[-1], None


def _last_child(pattern: str, names: dict[str, Module]) -> str:
    parent, star, rest = pattern.partition(".*")
    return f"{parent}.{list(names[parent]._modules)[-1]}{rest}" if star else parent


def _last_map(name: str, names: dict[str, Module]) -> str:
    """The layer's name; if it is a chain that ends in pooling, its last part before the pooling."""
    children = list(names[name]._modules.items())
    if len(children) > 1 and isinstance(children[-1][1], _POOLS):
        return f"{name}.{children[-2][0]}"
    return name
