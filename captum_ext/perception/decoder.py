"""The decoder of Perception Visualization: from the latents of a layer back to pictures."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn import Module

from captum_ext._checks import check_count
from captum_ext._engine.state import preserve_state
from captum_ext._identity import SavedDecoder, describe_changes
from captum_ext.imaging import resize
from captum_ext.perception.encoder import LayerEncoder, fits, stride_of

WIDTHS = (512, 512, 256, 128, 64)  # of the paper's blocks, from the latent on
CONVOLUTIONS = (2, 2, 2, 1, 1)
_FILE = SavedDecoder(
    "Perception Visualization",
    ("channels", "stride", "widths", "convolutions", "colors", "encoder"),
)


class PerceptionDecoder(nn.Module):
    r"""From the latents of a layer to pictures in [0, 1].

    One block for each doubling of the size: a transposed convolution 2 x 2 of stride 2, batch
    normalisation, and so many convolutions 3 x 3 with a leaky ReLU of slope 0.2. A last convolution
    3 x 3 gives the colours, and a sigmoid brings them to [0, 1]. Where the picture's size is no
    multiple of the stride, the result is resized to it, bilinearly.

    Args:
        channels: of the latents.
        stride: pixels a side of one cell of the latents, a power of two.
        widths: channels of each block, from the latents on. None takes the last of the paper's
            (512, 512, 256, 128, 64), which are for a stride of 32, with more of 512 in front where
            there are more blocks.
        convolutions: of each block. None takes the last of the paper's (2, 2, 2, 1, 1).
        colors: 3, or 1 for grey pictures.

    Raises:
        ValueError: a stride that is no power of two; lists of another length than there are blocks.

    Shape:
        - latents: (N, channels, h, w).
        - pictures: (N, colors, H, W), of size `(h stride, w stride)` unless it is given.

    Example:
        >>> import torch
        >>> from captum_ext.perception import PerceptionDecoder
        >>> decoder = PerceptionDecoder(96, stride=8)
        >>> decoder.widths, decoder(torch.rand(2, 96, 8, 10)).shape
        ([256, 128, 64], torch.Size([2, 3, 64, 80]))
    """

    def __init__(
        self,
        channels: int,
        stride: int,
        widths: Sequence[int] | None = None,
        convolutions: Sequence[int] | None = None,
        *,
        colors: int = 3,
    ) -> None:
        super().__init__()
        for name, count in (("channels", channels), ("stride", stride), ("colors", colors)):
            check_count(name, count)
        n_blocks = stride.bit_length() - 1
        if 2**n_blocks != stride:
            raise ValueError(f"`stride` must be a power of two, got {stride}.")
        self.channels, self.stride, self.colors = channels, stride, colors
        self.made_for: dict[str, Any] = {}  # see `check_encoder`
        self.widths = _each("widths", widths, WIDTHS, n_blocks)
        self.convolutions = _each("convolutions", convolutions, CONVOLUTIONS, n_blocks)
        inputs = [channels, *self.widths]
        self.blocks = nn.Sequential(
            *(
                _block(*sizes)
                for sizes in zip(inputs[:-1], self.widths, self.convolutions, strict=True)
            )
        )
        self.head = nn.Conv2d(inputs[-1], colors, 3, padding=1)

    @classmethod
    def reading(
        cls,
        encoder: LayerEncoder,
        images: Tensor,
        widths: Sequence[int] | None = None,
        convolutions: Sequence[int] | None = None,
    ) -> Self:
        """A decoder for an encoder's latents, of which one pass tells the shape.

        Args:
            encoder: the classifier up to a layer.
            images: (N, C, H, W), some that it takes, of the size that will be explained.
            widths: of the blocks.
            convolutions: of each block.

        Raises:
            ValueError: a layer without height and width, or of which the cells are not a power of
                two of pixels wide.
        """
        with preserve_state(encoder.forward_func):
            channels, stride = stride_of(encoder, images)
        decoder = cls(channels, stride, widths, convolutions, colors=encoder.channels)
        decoder.made_for = encoder.fingerprint()
        return decoder

    def check_encoder(self, encoder: LayerEncoder) -> None:
        """Raise an error if the decoder was made for another encoder.

        Raises:
            TypeError: no encoder.
            ValueError: of another architecture, layer, normalisation or `reshape_transform`.
        """
        if not isinstance(encoder, LayerEncoder):
            raise TypeError(f"`encoder` must be a LayerEncoder, got {type(encoder)}.")
        found = encoder.fingerprint()
        shared = {k: v for k, v in found.items() if k in self.made_for}
        changed = describe_changes(self.made_for, shared)
        if changed:
            raise ValueError(f"`encoder` is not the one that the decoder was made for: {changed}.")

    def forward(self, latents: Tensor, size: tuple[int, int] | None = None) -> Tensor:
        """Pictures of `size`, (H, W).

        Raises:
            ValueError: latents of other channels, or a size that is not theirs.
        """
        if latents.dim() != 4 or latents.shape[1] != self.channels:
            raise ValueError(
                f"`latents` must be (N, {self.channels}, h, w), as the decoder was made for, got "
                f"{tuple(latents.shape)}."
            )
        cells = latents.shape[2:]
        if size is not None and not (
            len(size) == 2
            and all(fits(side, n, self.stride) for side, n in zip(size, cells, strict=True))
        ):
            raise ValueError(
                f"`latents` of {tuple(cells)} cells are not of pictures of {tuple(size)} pixels at "
                f"a stride of {self.stride}: the decoder does not fit this layer."
            )
        pictures = torch.sigmoid(self.head(self.blocks(latents)))
        if size is None:
            return pictures
        return resize(pictures, size).clamp(max=1)  # interpolation may round up

    def save(self, path: str | Path, encoder: LayerEncoder) -> None:
        """Write the weights and the architecture to a file, with the classifier's fingerprint.

        The folder is made where there is none.

        Raises:
            ValueError: the decoder was made for another encoder.
        """
        self.check_encoder(encoder)
        _FILE.save(
            path,
            self,
            encoder.root,
            channels=self.channels,
            stride=self.stride,
            widths=self.widths,
            convolutions=self.convolutions,
            colors=self.colors,
            encoder=encoder.fingerprint(),
        )

    @classmethod
    def load(cls, path: str | Path, encoder: LayerEncoder) -> Self:
        """What `save` wrote, for the same layer of the same classifier and on its device.

        Only tensors and plain values are read (`weights_only`).

        Raises:
            ValueError: the file is no decoder, or one of another architecture; the classifier is
                another one, or has other weights; the layer or the normalisation is another one.
            FileNotFoundError: there is no such file.
        """
        return _FILE.load(path, encoder.root, lambda saved: cls._without_weights(saved, encoder))

    @classmethod
    def _without_weights(cls, saved: Mapping[str, Any], encoder: LayerEncoder) -> Self:
        sizes = (saved[name] for name in ("channels", "stride", "widths", "convolutions"))
        decoder = cls(*sizes, colors=saved["colors"])
        decoder.made_for = saved["encoder"]
        decoder.check_encoder(encoder)
        return decoder


def _each(name: str, given: Sequence[int] | None, last: Sequence[int], n: int) -> list[int]:
    """A number for each of n blocks."""
    if given is None:
        return [*[last[0]] * (n - len(last)), *last[max(len(last) - n, 0) :]]
    numbers = list(given)
    if len(numbers) != n:
        raise ValueError(f"`{name}` must be {n} numbers, one for each block, got {numbers}.")
    for number in numbers:
        check_count(name, number)
    return numbers


def _block(inputs: int, width: int, convolutions: int) -> nn.Sequential:
    layers: list[Module] = [nn.ConvTranspose2d(inputs, width, 2, stride=2), nn.BatchNorm2d(width)]
    for _ in range(convolutions):
        layers += [nn.Conv2d(width, width, 3, padding=1), nn.LeakyReLU(0.2)]
    return nn.Sequential(*layers)
