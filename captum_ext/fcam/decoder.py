"""F-CAM's decoder: a U-Net's right half on the features of a frozen classifier (Sec. 3, Fig. 2)."""

from collections import Counter
from collections.abc import Sequence
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn import Module
from torch.nn import functional as F

from captum_ext._checks import check_count
from captum_ext._compat import _run_forward
from captum_ext._engine.capture import LayerCapture, clone_tensors
from captum_ext._engine.hooks import hooked
from captum_ext._engine.modules import Forward, check_eager, find_module, require_module
from captum_ext._engine.state import preserve_state
from captum_ext._errors import ArgumentError

_POOLS = (nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool2d)


class FCAMDecoder(nn.Module):
    """Decodes features of several resolutions to two logits per pixel: background, foreground.

    The first block resizes the deepest features to the size of the next ones, joins both, and
    convolves them twice. The further blocks go on to the shallowest features. One more block
    doubles the size, a last convolution gives the logits, and these are resized bilinearly to the
    image. Images and features of any size will do.

    A block upsamples by 2 (nearest), then bilinearly to the size of the skip connection, if that
    differs. (Features that have this size already are not resized.) Then follow two times a
    convolution 3 x 3, batch normalisation and ReLU. Convolutions are initialised Kaiming-uniform,
    the last one Xavier-uniform.

    Args:
        channels: channels of the features, from the shallowest to the deepest, in the order of
            `find_feature_layers`.
        widths: channels of each block, from the deepest, one for each of the features. If there are
            too few, the last is repeated; if too many, the rest is dropped.
            (256, 128, 64, 32, 16) (official code).
        center: whether two more convolutions come before the first block. False (official code:
            True for VGG).
        layers: names of the classifier's layers with these features, which `FCAM` looks up.

    Raises:
        ValueError: `channels` or `widths` are empty or have a number below 1, or `layers` has
            another length than `channels`.

    Shape:
        - features: one tensor (N, channels, h, w) for each of `channels`.
        - logits: (N, 2, H, W).

    Example:
        >>> decoder = FCAMDecoder([16, 32], widths=[8, 4])
        >>> features = [torch.rand(1, 16, 24, 32), torch.rand(1, 32, 12, 16)]
        >>> decoder(features, (97, 130)).shape
        torch.Size([1, 2, 97, 130])
    """

    def __init__(
        self,
        channels: Sequence[int],
        widths: Sequence[int] = (256, 128, 64, 32, 16),
        center: bool = False,
        *,
        layers: Sequence[str] | None = None,
    ) -> None:
        super().__init__()
        channels, widths = list(channels), list(widths)
        for name, numbers in (("channels", channels), ("widths", widths)):
            if not numbers:
                raise ArgumentError(f"`{name}` must be one or more numbers, got none.", name)
            for number in numbers:
                check_count(name, number)
        if layers is not None and len(layers) != len(channels):
            raise ArgumentError(
                f"`layers` must be {len(channels)} names, got {layers!r}.", "layers"
            )
        widths = [*widths, *[widths[-1]] * (len(channels) - len(widths))][: len(channels)]
        self.channels, self.widths, self.has_center = channels, widths, center
        self.layers = None if layers is None else list(layers)
        deepest = channels[-1]
        self.center = _double_convolution(deepest, deepest) if center else nn.Identity()
        skips = [*channels[-2::-1], 0]
        inputs = [deepest, *widths[:-1]]
        self.blocks = nn.ModuleList(
            _double_convolution(n_inputs + skip, width)
            for n_inputs, skip, width in zip(inputs, skips, widths, strict=True)
        )
        self.head = nn.Conv2d(widths[-1], 2, 3, padding=1)
        for module in self.modules():
            if isinstance(module, nn.Conv2d) and module is not self.head:
                nn.init.kaiming_uniform_(module.weight, nonlinearity="relu")
        nn.init.xavier_uniform_(self.head.weight)
        assert self.head.bias is not None
        nn.init.zeros_(self.head.bias)

    @classmethod
    def reading(
        cls,
        classifier: Forward,
        images: Tensor,
        layers: Sequence[str] | None = None,
        widths: Sequence[int] = (256, 128, 64, 32, 16),
        center: bool = False,
    ) -> Self:
        """A decoder for a classifier's features. One forward pass counts their channels.

        Args:
            classifier: the module, or its bound method.
            images: example inputs (N, C, H, W), of the size that will be explained.
            layers: names of the layers to read, from the shallowest to the deepest. None takes
                those of `find_feature_layers`.
            widths: channels of each block; see `FCAMDecoder`.
            center: whether there is a centre block; see `FCAMDecoder`.

        Raises:
            ValueError: a layer is unknown, or its output is no map.
        """
        names = find_feature_layers(classifier, images) if layers is None else list(layers)
        modules = [find_module(classifier, name, "layers") for name in names]
        with preserve_state(classifier):
            activations, _ = LayerCapture(classifier, modules).activations(images)
        features = [tensors[0] for tensors in activations]
        for name, maps in zip(names, features, strict=True):
            if maps.dim() != 4:
                raise ArgumentError(
                    f"`layers` must put out maps (N, C, h, w), but {name} puts out "
                    f"{tuple(maps.shape)}.",
                    "layers",
                )
        return cls([maps.shape[1] for maps in features], widths, center, layers=names)

    def forward(self, features: Sequence[Tensor], size: tuple[int, int]) -> Tensor:
        """Logits (N, 2, *size).

        Args:
            features: from the shallowest to the deepest, (N, channels, h, w) each.
            size: (H, W) of the image.

        Raises:
            ValueError: the numbers of channels are not `channels`.
        """
        channels = [f.shape[1] if f.dim() == 4 else f.shape for f in features]
        if channels != self.channels:
            raise ArgumentError(
                f"`features` must have {self.channels} channels, got {channels}.", "features"
            )
        *skips, x = features
        x = self.center(x)
        for block, skip in zip(self.blocks, [*reversed(skips), None], strict=True):
            x = _upsample(x, skip)
            x = block(x if skip is None else torch.cat((x, skip), 1))
        return _resize_bilinear(self.head(x), size)


def _double_convolution(in_channels: int, out_channels: int) -> nn.Sequential:
    layers: list[Module] = []
    for n in (in_channels, out_channels):
        layers += [nn.Conv2d(n, out_channels, 3, padding=1, bias=False)]
        layers += [nn.BatchNorm2d(out_channels), nn.ReLU()]
    return nn.Sequential(*layers)


def _upsample(x: Tensor, skip: Tensor | None) -> Tensor:
    if skip is not None and skip.shape[2:] == x.shape[2:]:
        return x
    x = F.interpolate(x, scale_factor=2, mode="nearest")
    return x if skip is None else _resize_bilinear(x, (skip.shape[2], skip.shape[3]))


def _resize_bilinear(x: Tensor, size: tuple[int, int]) -> Tensor:
    if tuple(x.shape[2:]) == tuple(size):
        return x
    return F.interpolate(x, tuple(size), mode="bilinear", align_corners=True)


def find_feature_layers(classifier: Forward, images: Tensor) -> list[str]:
    """The layers that a decoder reads: the last layer of each resolution.

    The classifier runs once. A layer is a candidate if it puts out maps, unless

    - it runs several times (one ReLU for all), so that it has no output of its own;
    - it is part of a block whose own output has another size;
    - its maps have another aspect ratio than the image, as maps with their channels last have;
    - it is adaptive pooling;
    - its maps have the image's own size, or are a single pixel.

    The last candidate of each size is taken. From the deepest on, sizes that are less than 1.5
    times the size before are skipped.

    Args:
        classifier: the module, or its bound method.
        images: example inputs (N, C, H, W), of the size that will be explained.

    Returns:
        The layers' names, from the shallowest to the deepest.

    Raises:
        ValueError: `classifier` is no module, or has fewer than two such layers.

    Example:
        >>> from torchvision.models import resnet18
        >>> find_feature_layers(resnet18().eval(), torch.zeros(1, 3, 64, 64))
        ['relu', 'layer1', 'layer2', 'layer3', 'layer4']
    """
    root = require_module(classifier, "classifier", ": name the `layers`")
    names, modules = zip(*root.named_modules(), strict=True)
    check_eager(classifier, modules[-1], "classifier")
    runs: Counter[str] = Counter()
    ran: list[tuple[str, tuple[int, int]]] = []
    sizes: dict[str, tuple[int, int] | None] = {}

    def record(index: int, args: Any, output: Any) -> None:
        name = names[index]
        runs[name] += 1
        is_map = isinstance(output, Tensor) and output.dim() == 4
        size = (output.shape[2], output.shape[3]) if is_map else None
        sizes[name] = size
        if size is not None and not isinstance(modules[index], _POOLS):
            ran.append((name, size))

    hooks = hooked(modules, after=record)
    with torch.no_grad(), preserve_state(classifier), hooks as lock, lock:
        _run_forward(classifier, clone_tensors((images,)))

    def is_resized_by_parent(name: str, size: tuple[int, int]) -> bool:
        """Return whether a block around the layer, other than a Sequential, has another size."""
        parts = name.split(".")
        parents = (".".join(parts[:i]) for i in range(1, len(parts)))
        return any(
            sizes.get(parent, size) != size
            and not isinstance(root.get_submodule(parent), nn.Sequential)
            for parent in parents
        )

    height, width = images.shape[2:]
    last: dict[tuple[int, int], str] = {}
    for name, size in ran:
        is_map = size not in ((1, 1), (height, width))
        is_map &= abs(size[0] * width - size[1] * height) <= 2 * max(height, width)
        if name and runs[name] == 1 and is_map and not is_resized_by_parent(name, size):
            last.pop(size, None)  # keeps the order in which layers ran
            last[size] = name
    layers: list[str] = []
    deeper_side = 0
    for (h, w), name in reversed(last.items()):
        if min(h, w) >= 1.5 * deeper_side:
            layers.insert(0, name)
            deeper_side = min(h, w)
    if len(layers) < 2:
        raise ArgumentError(
            f"`classifier` {type(root).__name__} has {len(layers)} layers of different resolutions "
            f"at {height} x {width} pixels ({layers}), and a decoder needs two: name them as "
            f"`layers`.",
            "classifier",
        )
    return layers
