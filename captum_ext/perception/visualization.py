"""Perception Visualization (Giulivi, Carman, Boracchi, BMVC 2021)."""

from typing import Any, NamedTuple

import torch
from captum.attr import Attribution
from torch import Tensor
from torch.nn import Module

from captum_ext._checks import check_choice, check_images, check_positive, check_range
from captum_ext._engine.precision import full_precision
from captum_ext._engine.state import preserve_state
from captum_ext._errors import ArgumentError, ArgumentTypeError
from captum_ext._repr import fields_repr, options_repr
from captum_ext.attr._chain import call_attribute
from captum_ext.imaging import min_max, one_channel, resize
from captum_ext.perception.decoder import PerceptionDecoder
from captum_ext.perception.encoder import LayerEncoder
from captum_ext.perception.losses import deep_similarity, structural_similarity

SCALES = ("max", "min-max")


class Perception(NamedTuple):
    """The result of `PerceptionVisualization`, on the images' device, in float32 or float64.

    Attributes:
        image: (N, C, H, W), in [0, 1]: the reconstruction where the mask is 1, the background where
            the mask is 0.
        mask: (N, 1, H, W), in [0, 1].
        reconstruction: (N, C, H, W), in [0, 1].
    """

    image: Tensor
    mask: Tensor
    reconstruction: Tensor

    def __repr__(self) -> str:
        return fields_repr(self)


class PerceptionVisualization:
    r"""Shows where a classifier looks and, in a reconstruction, which features it sees there.

    An attribution shows which region matters, but not which features the classifier found in it. A
    decoder D that inverts the latents E of a layer reconstructs the picture from these features.
    The mask m of the attribution selects the region that is shown:

    .. math:: PV = m \odot D(E(x)) + (1 - m) \, b

    The result is a picture, not an attribution. It has the reconstruction's colours on a white
    background b.

    **The mask** is made of the attribution's map for the explained class. Channels are summed (if
    all are equal, one is taken), negative values are set to 0, and the map is divided by its
    maximum and resized bilinearly. (The authors use Grad-CAM at the last convolution, and quantise
    the mask to 8 bits, which is left out here.) Any Captum attribution works. Finer ones (wrappers,
    `FIDO`, `FCAM`) give finer masks. `scale="min-max"` is for maps that are high everywhere, such
    as those of RISE and of layers with few cells. A map without positive values gives the
    background alone, and with "min-max" so does a flat map.

    **The reconstruction depends on the decoder, too.** It is the mean picture that the decoder
    expects for such latents. For pictures unlike those of its training it tells nothing about the
    classifier. `quality` measures how far to trust it.

    Args:
        attribution: any Captum attribution, of this classifier or another.
        encoder: the classifier up to a layer.
        decoder: a `PerceptionDecoder` that was trained for the encoder, by `fit_perception` or from
            a file; or any module whose `decoder(latents, (H, W))` gives pictures in [0, 1].
        scale: "max" (the paper's division by the maximum) or "min-max".
        threshold: values of the mask below it become 0. 0 (authors; their code has an unused 0.3).
        gamma: the power that the mask is raised to. 1 (authors; their code has an unused 2/3).
        background: b, in [0, 1]. 1 (white).

    Raises:
        TypeError: `attribution`, `encoder` or `decoder` has the wrong type.
        ValueError: a number is out of range, or the decoder was made for another encoder.

    Reference:
        Giulivi, Carman, Boracchi, "Perception Visualization: Seeing Through the Eyes of a DNN",
        BMVC 2021

    Example:
        >>> import torch
        >>> from captum.attr import LayerGradCam
        >>> from captum_ext.perception import (
        ...     LayerEncoder, PerceptionDecoder, PerceptionVisualization,
        ... )
        >>> from torchvision.models import resnet18
        >>> model, x = resnet18().eval(), torch.rand(2, 3, 64, 64)
        >>> encoder = LayerEncoder(model, "layer4")
        >>> decoder = PerceptionDecoder.reading(encoder, x).eval()  # not trained
        >>> pv = PerceptionVisualization(LayerGradCam(model, model.layer4), encoder, decoder)
        >>> image, mask, reconstruction = pv.visualize(x, target=[3, 5])
        >>> image.shape, mask.shape, reconstruction.shape
        (torch.Size([2, 3, 64, 64]), torch.Size([2, 1, 64, 64]), torch.Size([2, 3, 64, 64]))
    """

    def __init__(
        self,
        attribution: Attribution,
        encoder: LayerEncoder,
        decoder: Module,
        *,
        scale: str = "max",
        threshold: float = 0.0,
        gamma: float = 1.0,
        background: float = 1.0,
    ) -> None:
        for name, value, expected in (
            ("attribution", attribution, Attribution),
            ("encoder", encoder, LayerEncoder),
            ("decoder", decoder, Module),
        ):
            if not isinstance(value, expected):
                raise ArgumentTypeError(
                    f"`{name}` must be an instance of {expected.__name__}, got {value!r:.80}.", name
                )
        if isinstance(decoder, PerceptionDecoder):
            decoder.check_encoder(encoder)
        check_choice("scale", scale, SCALES)
        check_range("threshold", threshold, 0, 1)
        check_positive("gamma", gamma)
        check_range("background", background, 0, 1)
        self.attribution, self.encoder, self.decoder = attribution, encoder, decoder
        self.scale, self.threshold, self.gamma = scale, threshold, gamma
        self.background = background

    def __repr__(self) -> str:
        return options_repr(self)

    def visualize(self, inputs: Tensor, **kwargs: Any) -> Perception:
        """The picture of each image, with its mask and reconstruction.

        Args:
            inputs: images (N, C, H, W), as the classifier takes them.
            **kwargs: arguments of the attribution's `attribute`, such as `target`.

        Raises:
            ValueError: `inputs` are not images or not finite, the attribution gives no map, or the
                decoder does not fit the latents.
        """
        images = check_images(inputs)
        reconstruction = self.reconstruct(images)
        mask = self.mask(images, **kwargs)
        image = composite(reconstruction, mask, self.background)
        return Perception(image, mask, reconstruction)

    @torch.no_grad()
    def reconstruct(self, inputs: Tensor) -> Tensor:
        """The reconstructions D(E(x)) of images, (N, C, H, W), in [0, 1].

        Args:
            inputs: images (N, C, H, W), as the classifier takes them.

        Raises:
            ValueError: `inputs` are not images or not finite, or the decoder does not fit the
                latents.
        """
        images = check_images(inputs)
        size = (images.shape[2], images.shape[3])
        with preserve_state(self.encoder.forward_func), preserve_state(self.decoder):
            latents = self.encoder(images)
            weights = next(self.decoder.parameters(), latents)
            pictures = self.decoder(latents.to(weights.dtype), size)
        expected = (len(images), self.encoder.channels, *size)
        if not isinstance(pictures, Tensor) or tuple(pictures.shape) != expected:
            result = tuple(pictures.shape) if isinstance(pictures, Tensor) else type(pictures)
            raise ArgumentError(
                f"`decoder` must give pictures {expected}, and gives {result}.", "decoder"
            )
        return full_precision(pictures)

    def mask(self, inputs: Tensor, **kwargs: Any) -> Tensor:
        """The mask m of each image, (N, 1, H, W), in [0, 1].

        Args:
            inputs: images (N, C, H, W), as the classifier takes them.
            **kwargs: arguments of the attribution's `attribute`.

        Raises:
            ValueError: the attribution gives no map, or a map that is not finite.
        """
        maps = call_attribute(self.attribution, inputs, **kwargs)
        maps = maps[0] if isinstance(maps, tuple) else maps
        if not isinstance(maps, Tensor) or maps.dim() != 4 or len(maps) != len(inputs):
            result = tuple(maps.shape) if isinstance(maps, Tensor) else type(maps)
            raise ArgumentError(
                f"`attribution` must give a map (N, C, h, w) of each image, and "
                f"{self.attribution.get_name()} gives {result}.",
                "attribution",
            )
        maps = one_channel(maps.detach())
        if not bool(torch.isfinite(maps).all()):
            raise ArgumentError(
                f"`attribution` {self.attribution.get_name()} is not finite.", "attribution"
            )
        maps = maps.clamp(min=0)
        if self.scale == "max":
            largest = maps.amax((2, 3), keepdim=True)
            maps = maps / torch.where(largest > 0, largest, 1)
        else:
            maps = min_max(maps)
        maps = resize(maps, inputs.shape[2:]).clamp(max=1)  # interpolation may round up
        return torch.where(maps < self.threshold, 0, maps) ** self.gamma

    @torch.no_grad()
    def quality(self, inputs: Tensor) -> tuple[Tensor, Tensor]:
        """Two measures of how well reconstructions keep the images.

        Args:
            inputs: images (N, C, H, W), as the classifier takes them.

        Returns:
            The SSIM of images and reconstructions, (N,), a mean over channels, which is 1 for equal
            pictures; and the `deep_similarity` of their latents, (N,), which is 0 if the classifier
            sees no difference.

        Raises:
            ValueError: `inputs` are not images, not finite or smaller than 11 x 11, or the decoder
                does not fit the latents.
        """
        images = check_images(inputs)
        decoded = self.reconstruct(images)
        pictures = self.encoder.pictures(images)
        with preserve_state(self.encoder.forward_func):
            latents = self.encoder(images)
            latents_of_decoded = self.encoder(self.encoder.images(decoded))
        ssims = structural_similarity(pictures, decoded).mean(1)
        return ssims, deep_similarity(latents, latents_of_decoded)


def composite(pictures: Tensor, masks: Tensor, background: float = 1.0) -> Tensor:
    r"""Pictures where the mask is 1, and the background where it is 0.

    .. math:: m \odot x + (1 - m) \, b

    `PerceptionVisualization` applies it to reconstructions. The authors also show it for the
    pictures themselves, for comparison.

    Args:
        pictures: x, (N, C, H, W), in [0, 1].
        masks: m, (N, 1, H, W), in [0, 1].
        background: b, in [0, 1]. 1 (white).

    Returns:
        (N, C, H, W), in [0, 1].

    Example:
        >>> import torch
        >>> from captum_ext.perception import composite
        >>> composite(torch.zeros(1, 3, 1, 2), torch.tensor([[[[0.0, 0.75]]]]))[0, 0]
        tensor([[1.0000, 0.2500]])
    """
    return masks * pictures + (1 - masks) * background
