"""The decoder of Perception Visualization, from the latents of a layer back to pictures."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn import Module

from captum_ext._checks import check_count
from captum_ext._engine.state import preserve_state
from captum_ext._errors import ArgumentError, ArgumentTypeError
from captum_ext._identity import describe_changes
from captum_ext._tensor_files import SavedDecoder
from captum_ext.imaging import resize
from captum_ext.perception.encoder import LayerEncoder, channels_and_stride, stride_fits

WIDTHS = (512, 512, 256, 128, 64)  # of the paper's blocks, from the latents on
CONVOLUTIONS = (2, 2, 2, 1, 1)
_DECODER_FILE = SavedDecoder(
    "Perception Visualization",
    sizes=("channels", "widths", "convolutions", "colors"),
    options=("stride", "encoder"),
)


class PerceptionDecoder(nn.Module):
    r"""Decodes the latents of a layer to pictures in [0, 1].

    Each block doubles the size. It is a transposed convolution 2 x 2 of stride 2, batch
    normalisation, and a number of convolutions 3 x 3 with a leaky ReLU of slope 0.2. A last
    convolution 3 x 3 gives the colours, and a sigmoid maps them to [0, 1]. If the picture's size is
    no multiple of the stride, the result is resized to it bilinearly.

    Args:
        channels: the channels of the latents.
        stride: the side of one cell of the latents in pixels, a power of two.
        widths: the channels of each block, from the latents on. None takes those of the paper,
            (512, 512, 256, 128, 64), which are for a stride of 32 and five blocks. Fewer blocks
            take the last ones; more blocks repeat the first.
        convolutions: the number of convolutions in each block. None takes those of the paper,
            (2, 2, 2, 1, 1), cut or extended in the same way.
        colors: the channels of the pictures, 3, or 1 for grey pictures.

    Raises:
        ValueError: `stride` is no power of two, a number is below 1, or `widths` or `convolutions`
            do not have one number for each block.

    Shape:
        - latents: (N, channels, h, w).
        - pictures: (N, colors, H, W). (H, W) is `(h * stride, w * stride)` unless it is passed.

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
            raise ArgumentError(f"`stride` must be a power of two, got {stride}.", "stride")
        self.channels, self.stride, self.colors = channels, stride, colors
        self.encoder_fingerprint: dict[str, Any] = {}
        self.widths = _per_block("widths", widths, WIDTHS, n_blocks)
        self.convolutions = _per_block("convolutions", convolutions, CONVOLUTIONS, n_blocks)
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
        """A decoder for an encoder's latents. One forward pass measures their shape.

        Args:
            encoder: the classifier up to a layer.
            images: example inputs (N, C, H, W), of the size that will be explained.
            widths: the channels of each block; see `PerceptionDecoder`.
            convolutions: the number of convolutions in each block; see `PerceptionDecoder`.

        Raises:
            ValueError: the layer has no height and width, or its stride is no power of two.
        """
        with preserve_state(encoder.forward_func):
            channels, stride = channels_and_stride(encoder, images)
        decoder = cls(channels, stride, widths, convolutions, colors=encoder.channels)
        decoder.encoder_fingerprint = encoder.fingerprint()
        return decoder

    def check_encoder(self, encoder: LayerEncoder) -> None:
        """Raise an error if the decoder was made for another encoder.

        Raises:
            TypeError: `encoder` is no `LayerEncoder`.
            ValueError: `encoder` has another architecture, layer, normalisation or
                `reshape_transform`.
        """
        if not isinstance(encoder, LayerEncoder):
            raise ArgumentTypeError(
                f"`encoder` must be a LayerEncoder, got {type(encoder)}.", "encoder"
            )
        fingerprint = encoder.fingerprint()
        shared = {k: v for k, v in fingerprint.items() if k in self.encoder_fingerprint}
        changed = describe_changes(self.encoder_fingerprint, shared)
        if changed:
            raise ArgumentError(
                f"`encoder` is not the one that the decoder was made for: {changed}.", "encoder"
            )

    def forward(self, latents: Tensor, size: tuple[int, int] | None = None) -> Tensor:
        """The pictures of latents.

        Args:
            latents: (N, channels, h, w).
            size: (H, W) of the pictures. None is `(h * stride, w * stride)`.

        Raises:
            ValueError: `latents` have another number of channels, or `size` does not fit them.
        """
        if latents.dim() != 4 or latents.shape[1] != self.channels:
            raise ArgumentError(
                f"`latents` must be (N, {self.channels}, h, w), as the decoder was made for, got "
                f"{tuple(latents.shape)}.",
                "latents",
            )
        cells = latents.shape[2:]
        if size is not None and not (
            len(size) == 2
            and all(stride_fits(side, n, self.stride) for side, n in zip(size, cells, strict=True))
        ):
            raise ArgumentError(
                f"`latents` of {tuple(cells)} cells do not fit pictures of {tuple(size)} pixels at "
                f"a stride of {self.stride}: the decoder does not fit this layer.",
                "latents",
            )
        pictures = torch.sigmoid(self.head(self.blocks(latents)))
        if size is None:
            return pictures
        return resize(pictures, size).clamp(max=1)  # interpolation may round up

    def save(self, path: str | Path, encoder: LayerEncoder) -> None:
        """Write the decoder to a file, with a fingerprint of the classifier and the encoder.

        The classifier itself is not stored. A missing folder is created.

        Args:
            path: the file.
            encoder: the encoder that the decoder was trained with.

        Raises:
            ValueError: the decoder was made for another encoder.
        """
        self.check_encoder(encoder)
        _DECODER_FILE.save(
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
        """Load a file of `save`, for the same layer of the same classifier.

        Only tensors and plain values are read (`weights_only`), and checksums are compared.

        Args:
            path: the file.
            encoder: the encoder. The decoder is moved to the classifier's device.

        Raises:
            ValueError: the file does not contain such a decoder, or a damaged one, or weights that
                are not finite; the classifier is another one, or has other weights; or the layer or
                the normalisation is another one.
            FileNotFoundError: the file does not exist.
        """

        def make(saved: dict[str, Any]) -> Any:
            sizes = (saved[name] for name in ("channels", "stride", "widths", "convolutions"))
            decoder = cls(*sizes, colors=saved["colors"])
            decoder.encoder_fingerprint = dict(saved["encoder"])
            return decoder

        decoder: Self = _DECODER_FILE.load(path, encoder.root, make)
        decoder.check_encoder(encoder)
        return decoder


def _per_block(
    name: str, values: Sequence[int] | None, defaults: Sequence[int], n: int
) -> list[int]:
    """One number for each of n blocks; `defaults` end with the last block."""
    if values is None:
        return [*[defaults[0]] * (n - len(defaults)), *defaults[max(len(defaults) - n, 0) :]]
    numbers = list(values)
    if len(numbers) != n:
        raise ArgumentError(
            f"`{name}` must be {n} numbers, one for each block, got {numbers}.", name
        )
    for number in numbers:
        check_count(name, number)
    return numbers


def _block(in_channels: int, width: int, convolutions: int) -> nn.Sequential:
    layers: list[Module] = [
        nn.ConvTranspose2d(in_channels, width, 2, stride=2),
        nn.BatchNorm2d(width),
    ]
    for _ in range(convolutions):
        layers += [nn.Conv2d(width, width, 3, padding=1), nn.LeakyReLU(0.2)]
    return nn.Sequential(*layers)
