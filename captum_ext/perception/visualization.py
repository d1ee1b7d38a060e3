"""Perception Visualization (Giulivi, Carman, Boracchi, BMVC 2021)."""

from typing import Any, NamedTuple

import torch
from captum.attr import Attribution
from torch import Tensor
from torch.nn import Module

from captum_ext._checks import check_choice, check_images, check_range, check_size
from captum_ext._engine.precision import full_precision
from captum_ext._engine.state import preserve_state
from captum_ext.imaging import min_max, one_channel, resize
from captum_ext.perception.decoder import PerceptionDecoder
from captum_ext.perception.encoder import LayerEncoder
from captum_ext.perception.losses import deep_similarity, structural_similarity

SCALES = ("max", "min-max")


class Perception(NamedTuple):
    """What `PerceptionVisualization` shows of a batch, on its device, in float32 or better.

    Attributes:
        image: (N, C, H, W), in [0, 1]: the reconstruction where the mask is 1, the background where
            it is 0.
        mask: (N, 1, H, W), in [0, 1].
        reconstruction: (N, C, H, W), in [0, 1].
    """

    image: Tensor
    mask: Tensor
    reconstruction: Tensor


class PerceptionVisualization:
    r"""Where a classifier looks, and what it sees there.

    An attribution says where; it does not say what the classifier made of the place. A decoder D
    that was trained to invert the latents E of a layer shows what is left of the picture there, and
    the mask m of the attribution is laid over it:

    .. math:: PV = m \odot D(E(x)) + (1 - m) \, b

    It is a picture, not an attribution: colours are those of the reconstruction, and b is white.

    **The mask** is the attribution's map of the explained class: channels are summed (of equal ones
    one is taken), negative values are set to 0, the map is divided by its largest value and resized
    bilinearly. (Authors: Grad-CAM at the last convolution, quantised to 8 bits, which is left out
    here.) Any Captum attribution will do, and a finer one (a wrapper, `FIDO`, `FCAM`) gives a finer
    mask. `scale="min-max"` is for maps that
    are high everywhere, as RISE's are, and those of a layer with few cells. A map without
    positive values, and a flat one under "min-max", gives the background alone.

    **What it shows is the decoder's as well as the classifier's**: the reconstruction is the mean
    of what the decoder has learned to expect of such latents, and where it was not trained with
    such pictures it shows nothing of the classifier. `quality` tells how far to trust it.

    Args:
        attribution: any Captum attribution, of this classifier or another.
        encoder: the classifier up to a layer.
        decoder: a `PerceptionDecoder` that was trained for it, by `fit_perception` or from a file;
            or any module whose `decoder(latents, (H, W))` is pictures in [0, 1].
        scale: "max" or "min-max".
        threshold: values of the mask below it become 0. (Authors: 0; 0.3 is in their code, unused.)
        gamma: the mask to this power. (Authors: 1; 2/3 is in their code, unused.)
        background: b, in [0, 1]. 1 is white.

    Raises:
        TypeError: arguments of other kinds.
        ValueError: a number out of range; a decoder that was made for another encoder.

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
        for name, value, kind in (
            ("attribution", attribution, Attribution),
            ("encoder", encoder, LayerEncoder),
            ("decoder", decoder, Module),
        ):
            if not isinstance(value, kind):
                raise TypeError(
                    f"`{name}` must be an instance of {kind.__name__}, got {value!r:.80}."
                )
        if isinstance(decoder, PerceptionDecoder):
            decoder.check_encoder(encoder)
        check_choice("scale", scale, SCALES)
        check_range("threshold", threshold, 0, 1)
        check_size("gamma", gamma, positive=True)
        check_range("background", background, 0, 1)
        self.attribution, self.encoder, self.decoder = attribution, encoder, decoder
        self.scale, self.threshold, self.gamma = scale, threshold, gamma
        self.background = background

    def visualize(self, inputs: Tensor, **kwargs: Any) -> Perception:
        """The picture of each image.

        Args:
            inputs: images (N, C, H, W), as the classifier takes them.
            **kwargs: of the attribution's `attribute`, such as `target`.

        Raises:
            ValueError: inputs that are not images, or not finite; an attribution that gives no map;
                a decoder that does not fit the latents.
        """
        images = check_images(inputs)
        reconstruction = self.reconstruct(images)
        mask = self.mask(images, **kwargs)
        image = composite(reconstruction, mask, self.background)
        return Perception(image, mask, reconstruction)

    @torch.no_grad()
    def reconstruct(self, inputs: Tensor) -> Tensor:
        """D(E(x)), (N, C, H, W), in [0, 1]."""
        images = check_images(inputs)
        size = (images.shape[2], images.shape[3])
        with preserve_state(self.encoder.forward_func), preserve_state(self.decoder):
            latents = self.encoder(images)
            weights = next(self.decoder.parameters(), latents)
            found = self.decoder(latents.to(weights.dtype), size)
        expected = (len(images), self.encoder.channels, *size)
        if not isinstance(found, Tensor) or tuple(found.shape) != expected:
            shown = tuple(found.shape) if isinstance(found, Tensor) else type(found)
            raise ValueError(f"`decoder` must give pictures {expected}, and gives {shown}.")
        return full_precision(found)

    def mask(self, inputs: Tensor, **kwargs: Any) -> Tensor:
        """The mask of the attribution, (N, 1, H, W), in [0, 1].

        Args:
            inputs: images (N, C, H, W), as the classifier takes them.
            **kwargs: of the attribution's `attribute`.
        """
        found = self.attribution.attribute(inputs, **kwargs)
        found = found[0] if isinstance(found, tuple) else found
        if not isinstance(found, Tensor) or found.dim() != 4 or len(found) != len(inputs):
            shown = tuple(found.shape) if isinstance(found, Tensor) else type(found)
            raise ValueError(
                f"`attribution` must give a map (N, C, h, w) of each image, and "
                f"{self.attribution.get_name()} gives {shown}."
            )
        maps = one_channel(found.detach())
        if not bool(torch.isfinite(maps).all()):
            raise ValueError(f"`attribution` {self.attribution.get_name()} is not finite.")
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
        """How much of the images reconstructions keep: SSIM and distance of latents, (N,) each.

        The SSIM is the mean over channels, 1 where nothing is lost; the second is
        `deep_similarity`, 0 where the classifier sees no difference.
        """
        images = check_images(inputs)
        found = self.reconstruct(images)
        pictures = self.encoder.pictures(images)
        with preserve_state(self.encoder.forward_func):
            latents, again = self.encoder(images), self.encoder(self.encoder.images(found))
        return structural_similarity(pictures, found).mean(1), deep_similarity(latents, again)


def composite(pictures: Tensor, masks: Tensor, background: float = 1.0) -> Tensor:
    r"""Pictures where the mask is 1, and the background where it is 0.

    .. math:: m \odot x + (1 - m) \, b

    Of the pictures themselves instead of their reconstructions it is the panel that the authors
    show beside Perception Visualization.

    Args:
        pictures: (N, C, H, W), in [0, 1].
        masks: (N, 1, H, W), in [0, 1].
        background: b.

    Example:
        >>> import torch
        >>> from captum_ext.perception import composite
        >>> composite(torch.zeros(1, 3, 1, 2), torch.tensor([[[[0.0, 0.75]]]]))[0, 0]
        tensor([[1.0000, 0.2500]])
    """
    return masks * pictures + (1 - masks) * background
