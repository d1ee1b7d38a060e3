"""F-CAM (Belharbi et al., WACV 2022): the foreground at full resolution, in one forward pass."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

import torch
from captum.attr import Attribution
from torch import Tensor
from torch.nn import Module

from captum_ext._checks import one_batch_of_images
from captum_ext._compat import TargetType, TensorOrTupleOfTensors, _format_output, log_usage
from captum_ext._engine.capture import LayerCapture
from captum_ext._engine.modules import Forward, find_module, require_module
from captum_ext._engine.precision import full_precision
from captum_ext._engine.state import preserve_state
from captum_ext._identity import SavedDecoder
from captum_ext.attr._method_info import Paper
from captum_ext.attr._named import Named
from captum_ext.fcam.decoder import FCAMDecoder

_FILE = SavedDecoder("F-CAM", ("channels", "widths", "center", "layers"))


class FCAM(Named, Attribution):
    r"""F-CAM: a decoder on the features of a frozen classifier says what is foreground.

    .. math:: M = \operatorname{softmax}(D(f_1(x), ..., f_L(x)))_1

    with the features f of the classifier's layers and the decoder D, which `captum_ext.fcam`
    trains: values are probabilities in [0, 1], at the image's own resolution, from one forward pass
    and without a gradient. They are taken as they are, without min-max, ReLU or smoothing.

    **There is one map for each image, and it belongs to no class.** The decoder learned from maps
    of the true labels, of images with one kind of object: `target` is checked as in Captum, and
    changes nothing. For an image with objects of several classes the map is not defined.

    Args:
        forward_func: the classifier that the decoder was trained with: a module, or its bound
            method. It is run as it stands; in train mode that is warned of.
        decoder: the decoder, in eval mode.
        layers: whose features it reads, as modules or names, from the shallowest to the deepest.
            None is what the decoder was made for.

    Raises:
        ValueError: layers that are unknown, or other in number than the decoder reads.
        TypeError: another decoder.

    Reference:
        Belharbi et al., "F-CAM: Full Resolution Class Activation Maps via Guided Parametric
        Upscaling", https://arxiv.org/abs/2109.07069

    Example:
        >>> import torch
        >>> from torchvision.models import resnet18
        >>> from captum_ext.attr import FCAM
        >>> from captum_ext.fcam import FCAMDecoder
        >>> model, x = resnet18().eval(), torch.rand(2, 3, 64, 65)
        >>> decoder = FCAMDecoder.reading(model, x).eval()  # not trained
        >>> FCAM(model, decoder).attribute(x, target=3).shape
        torch.Size([2, 3, 64, 65])
    """

    title = "F-CAM"
    paper = Paper("Belharbi et al.", 2022, "https://arxiv.org/abs/2109.07069")
    family = "learned"

    def __init__(
        self,
        forward_func: Forward,
        decoder: FCAMDecoder,
        layers: Sequence[Module | str] | None = None,
    ) -> None:
        super().__init__(forward_func)
        if not isinstance(decoder, FCAMDecoder):
            raise TypeError(f"`decoder` must be an FCAMDecoder, got {type(decoder)}.")
        named = decoder.layers if layers is None else layers
        if named is None or len(named) != len(decoder.channels):
            raise ValueError(
                f"`layers` must be {len(decoder.channels)}, as many as the decoder reads, got "
                f"{named!r}."
            )
        self.decoder = decoder
        self.layers = [find_module(forward_func, layer, "layers") for layer in named]

    @log_usage()
    def attribute(
        self,
        inputs: TensorOrTupleOfTensors,
        target: TargetType = None,
        additional_forward_args: Any = None,
    ) -> TensorOrTupleOfTensors:
        """The probability of the foreground, equal in all channels.

        Args:
            inputs: images (N, C, H, W), as the classifier takes them, or a tuple of one such
                tensor. Sizes other than those of the training are possible.
            target: checked as in Captum, and otherwise without effect; see above.
            additional_forward_args: as in Captum.

        Returns:
            A map of the inputs' shape and dtype.

        Raises:
            ValueError: inputs that are not images, not of floats or not finite.
            AssertionError: a target that does not select one class for each image.
        """
        images = one_batch_of_images(inputs)
        maps = self.foreground(images, target, additional_forward_args).to(images.dtype)
        whole = maps.repeat(1, images.shape[1], 1, 1)
        formatted: TensorOrTupleOfTensors = _format_output(isinstance(inputs, tuple), (whole,))
        return formatted

    def foreground(
        self, images: Tensor, target: TargetType = None, additional_forward_args: Any = None
    ) -> Tensor:
        """The map in one channel: (N, 1, H, W), in float32 or better."""
        with torch.no_grad(), preserve_state(self.forward_func), preserve_state(self.decoder):
            capture = LayerCapture(self.forward_func, self.layers)
            found, _ = capture.activations(images, target, additional_forward_args)
            kind = next(self.decoder.parameters()).dtype
            features = [tensors[0].to(kind) for tensors in found]
            logits = self.decoder(features, (images.shape[2], images.shape[3]))
            return full_precision(logits).softmax(1)[:, 1:]

    def save(self, path: str | Path) -> None:
        """Write the decoder to a file, with the classifier's fingerprint, not the classifier.

        The folder is made where there is none.

        Raises:
            ValueError: the classifier is a plain function, see `tensor_digests`.
        """
        decoder, root = self.decoder, require_module(self.forward_func)
        names = {module: name for name, module in root.named_modules()}
        _FILE.save(
            path,
            decoder,
            root,
            channels=decoder.channels,
            widths=decoder.widths,
            center=decoder.has_center,
            layers=[names[layer] for layer in self.layers],
        )

    @classmethod
    def load(cls, path: str | Path, forward_func: Forward) -> Self:
        """What `save` wrote, on the classifier that it was trained with and on its device.

        Only tensors and plain values are read (`weights_only`).

        Raises:
            ValueError: the classifier is another one, or has other weights, or these in another
                dtype: convert it after loading. The file is no decoder.
            FileNotFoundError: there is no such file.
        """

        def make(saved: dict[str, Any]) -> FCAMDecoder:
            sizes = (saved[name] for name in ("channels", "widths", "center"))
            return FCAMDecoder(*sizes, layers=saved["layers"])

        return cls(forward_func, _FILE.load(path, forward_func, make))
