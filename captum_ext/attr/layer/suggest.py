"""Which layer to explain: names for the usual families of classifiers."""

from collections.abc import Callable

from torch import Tensor, nn
from torch.nn import Module

from captum_ext._engine.modules import Forward, require_module
from captum_ext.attr.layer.reshape import channels_last_to_first, tokens_to_grid

# Modules that tell a family, the layer to use ("*": the last child), and how to read it as a map.
# A transformer's last block passes the patch tokens' gradients only through its attention, so the
# layer in front of that attention is the last one at which every patch counts.
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

    Knows the torchvision classifiers, timm-style models and vision transformers by the modules they
    are made of. Of other models it gives the last convolution that is not the classifier. A pooling
    at the end of that part (VGG) is left off, for a map of twice the resolution.

    Args:
        model: the module, or its bound method.

    Returns:
        A dotted name, for the `layer` of any layer method.

    Raises:
        ValueError: not a module, or a module without convolutions whose family is not known.

    Example:
        >>> from torchvision.models import resnet18
        >>> suggest_layer(resnet18())
        'layer4'
    """
    return _suggest(model)[0]


def suggest_reshape_transform(model: Forward) -> Callable[[Tensor], Tensor] | None:
    """The `reshape_transform` that goes with `suggest_layer(model)`: None for convolutional nets.

    Example:
        >>> from torchvision.models import vit_b_32
        >>> suggest_reshape_transform(vit_b_32()).__name__
        'tokens_to_grid'
    """
    return _suggest(model)[1]


def _suggest(model: Forward) -> tuple[str, Callable[[Tensor], Tensor] | None]:
    root = require_module(model, "model")
    names = dict(root.named_modules())
    for needed, layer, reshape_transform in _FAMILIES:
        if all(name in names for name in needed):
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
            f"no convolution in front of its classifier. Name a layer that has a map."
        )
    return convolutions[-1], None


def _last_child(pattern: str, names: dict[str, Module]) -> str:
    parent, star, rest = pattern.partition(".*")
    return f"{parent}.{list(names[parent]._modules)[-1]}{rest}" if star else parent


def _last_map(name: str, names: dict[str, Module]) -> str:
    """`name`, or where that is a chain that ends in pooling, the part in front of the pooling."""
    children = list(names[name]._modules.items())
    if len(children) > 1 and isinstance(children[-1][1], _POOLS):
        return f"{name}.{children[-2][0]}"
    return name
