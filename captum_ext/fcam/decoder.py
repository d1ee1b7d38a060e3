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
from captum_ext._engine.modules import Forward, find_module, require_module
from captum_ext._engine.state import preserve_state

_POOLS = (nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool2d)


class FCAMDecoder(nn.Module):
    """From features at several resolutions to two logits for each pixel: background, foreground.

    The deepest features are brought to the size of the next, joined with them, and convolved twice;
    and so on to the shallowest. One more block doubles the size, a last convolution gives the
    logits, and these are resized to the image, bilinearly. Nothing must be divisible by anything.

    A block is: nearest x 2; where the skip is not of that size, bilinearly to it (of equal sizes:
    nothing); then two times a convolution 3 x 3, batch normalisation, ReLU. Convolutions start as
    Kaiming-uniform, the last one as Xavier-uniform.

    Args:
        channels: of the features, from the shallowest to the deepest, as `find_taps` lists them.
        widths: of the blocks, from the deepest, one for each of the features: the last of too few
            is repeated, too many are cut. (256, 128, 64, 32, 16) (official code).
        center: whether two more convolutions come before the first block (official code: for VGG).
        layers: the names of the classifier's layers with these features; not needed to decode.

    Raises:
        ValueError: no channels, no widths, a number below 1.

    Shape:
        - features: for each of `channels` (N, channels, h, w).
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
                raise ValueError(f"`{name}` must be one or more numbers, got none.")
            for number in numbers:
                check_count(name, number)
        if layers is not None and len(layers) != len(channels):
            raise ValueError(f"`layers` must be {len(channels)} names, got {layers!r}.")
        widths = [*widths, *[widths[-1]] * (len(channels) - len(widths))][: len(channels)]
        self.channels, self.widths, self.has_center = channels, widths, center
        self.layers = None if layers is None else list(layers)
        deepest = channels[-1]
        self.center = _convolutions(deepest, deepest) if center else nn.Identity()
        skips = [*channels[-2::-1], 0]
        above = [deepest, *widths[:-1]]
        self.blocks = nn.ModuleList(
            _convolutions(inputs + skip, width)
            for inputs, skip, width in zip(above, skips, widths, strict=True)
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
        """A decoder for the features of a classifier, of which one pass tells the channels.

        Args:
            classifier: the module, or its bound method.
            images: (N, C, H, W), some that it takes, of the size that will be explained.
            layers: names; None is `find_taps`.
            widths: of the blocks.
            center: see above.

        Raises:
            ValueError: layers that are unknown, or put out no maps.
        """
        named = find_taps(classifier, images) if layers is None else list(layers)
        modules = [find_module(classifier, name, "layers") for name in named]
        with preserve_state(classifier):
            per_layer, _ = LayerCapture(classifier, modules).activations(images)
            found = [tensors[0] for tensors in per_layer]
        for name, features in zip(named, found, strict=True):
            if features.dim() != 4:
                raise ValueError(
                    f"`layers` must put out maps (N, C, h, w), and {name} gives "
                    f"{tuple(features.shape)}."
                )
        return cls([f.shape[1] for f in found], widths, center, layers=named)

    def forward(self, features: Sequence[Tensor], size: tuple[int, int]) -> Tensor:
        """Logits (N, 2, *size).

        Raises:
            ValueError: other features than `channels` says.
        """
        found = [f.shape[1] if f.dim() == 4 else f.shape for f in features]
        if found != self.channels:
            raise ValueError(f"`features` must have {self.channels} channels, got {found}.")
        *skips, x = features
        x = self.center(x)
        for block, skip in zip(self.blocks, [*reversed(skips), None], strict=True):
            x = _enlarged(x, skip)
            x = block(x if skip is None else torch.cat((x, skip), 1))
        return _resized(self.head(x), size)


def _convolutions(inputs: int, outputs: int) -> nn.Sequential:
    layers: list[Module] = []
    for n in (inputs, outputs):
        layers += [nn.Conv2d(n, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs)]
        layers += [nn.ReLU()]
    return nn.Sequential(*layers)


def _enlarged(x: Tensor, skip: Tensor | None) -> Tensor:
    if skip is not None and skip.shape[2:] == x.shape[2:]:
        return x
    x = F.interpolate(x, scale_factor=2, mode="nearest")
    return x if skip is None else _resized(x, (skip.shape[2], skip.shape[3]))


def _resized(x: Tensor, size: tuple[int, int]) -> Tensor:
    if tuple(x.shape[2:]) == tuple(size):
        return x
    return F.interpolate(x, tuple(size), mode="bilinear", align_corners=True)


def find_taps(classifier: Forward, images: Tensor) -> list[str]:
    """The layers whose features a decoder may use: the last one of each resolution.

    The classifier runs once. Of the modules that put out maps, those are left out that run several
    times (one ReLU for all) and so have no output of their own, those that are part of a block
    whose own output has another size, those of another aspect ratio than the image (maps with their
    channels last), and adaptive pooling. Of each size that remains, the last module to run is
    taken; not the image's own size, not single pixels, and, from the deepest on, only sizes that
    are at least 1.5 times the one before.

    Args:
        classifier: the module, or its bound method.
        images: (N, C, H, W), of the size that will be explained.

    Returns:
        Names, from the shallowest to the deepest.

    Raises:
        ValueError: not a module, or fewer than two such layers.

    Example:
        >>> from torchvision.models import resnet18
        >>> find_taps(resnet18().eval(), torch.zeros(1, 3, 64, 64))
        ['relu', 'layer1', 'layer2', 'layer3', 'layer4']
    """
    root = require_module(classifier, "classifier")
    names, modules = zip(*root.named_modules(), strict=True)
    runs: Counter[str] = Counter()
    ran: list[tuple[str, tuple[int, int]]] = []
    sizes: dict[str, tuple[int, int] | None] = {}

    def see(index: int, args: Any, output: Any) -> None:
        name = names[index]
        runs[name] += 1
        is_map = isinstance(output, Tensor) and output.dim() == 4
        size = (output.shape[2], output.shape[3]) if is_map else None
        sizes[name] = size
        if size is not None and not isinstance(modules[index], _POOLS):
            ran.append((name, size))

    with torch.no_grad(), preserve_state(classifier), hooked(modules, after=see) as lock, lock:
        _run_forward(classifier, clone_tensors((images,)))

    def in_other_block(name: str, size: tuple[int, int]) -> bool:
        """Whether a module around it, not just a sequence of modules, puts out another size."""
        parts = name.split(".")
        around = (".".join(parts[:i]) for i in range(1, len(parts)))
        return any(
            sizes.get(outer, size) != size
            and not isinstance(root.get_submodule(outer), nn.Sequential)
            for outer in around
        )

    height, width = images.shape[2:]
    last: dict[tuple[int, int], str] = {}
    for name, size in ran:
        is_plain = size not in ((1, 1), (height, width))
        is_plain &= abs(size[0] * width - size[1] * height) <= 2 * max(height, width)
        if name and runs[name] == 1 and is_plain and not in_other_block(name, size):
            last.pop(size, None)
            last[size] = name
    taps: list[str] = []
    beneath = 0
    for (h, w), name in reversed(last.items()):
        if min(h, w) >= 1.5 * beneath:
            taps.insert(0, name)
            beneath = min(h, w)
    if len(taps) < 2:
        raise ValueError(
            f"`classifier` {type(root).__name__} has {len(taps)} layers of a resolution of their "
            f"own at {height} x {width} pixels ({taps}), and a decoder needs two: name them as "
            f"`layers`."
        )
    return taps
