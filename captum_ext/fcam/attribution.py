"""F-CAM (Belharbi et al., WACV 2022): a foreground map at full resolution, in one pass."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

import torch
from captum.attr import Attribution
from torch import Tensor
from torch.nn import Module

from captum_ext._checks import image_tensor
from captum_ext._compat import TargetType, TensorOrTupleOfTensors, _format_output, log_usage
from captum_ext._engine.capture import LayerCapture
from captum_ext._engine.modules import Forward, find_module, module_name, require_module
from captum_ext._engine.precision import full_precision
from captum_ext._engine.state import preserve_state
from captum_ext._errors import ArgumentError, ArgumentTypeError
from captum_ext._repr import options_repr
from captum_ext._tensor_files import SavedDecoder
from captum_ext.attr._arguments import checks_arguments
from captum_ext.attr._method_info import Paper
from captum_ext.attr._mixin import AttributionMixin
from captum_ext.fcam.decoder import FCAMDecoder

_DECODER_FILE = SavedDecoder("F-CAM", sizes=("channels", "widths"), options=("center", "layers"))


class FCAM(AttributionMixin, Attribution):
    r"""F-CAM: the foreground map of a decoder on the features of a frozen classifier.

    .. math:: M = \operatorname{softmax}(D(f_1(x), ..., f_L(x)))_1

    (Sec. 3 of the paper) with the features f of the classifier's layers and the decoder D, which
    `captum_ext.fcam.fit_fcam` trains. Values are probabilities in [0, 1], at the image's own
    resolution. They take one forward pass and no gradient, and are returned without min-max, ReLU
    or smoothing.

    **There is one map for each image, and it belongs to no class.** The decoder learned from maps
    of the true labels, on images with objects of one class. So `target` is checked as in Captum,
    but changes nothing. For an image with objects of several classes the map is not defined.

    Args:
        forward_func: the classifier that the decoder was trained with: a module, or its bound
            method. It runs in the mode that it is in; train mode gives a warning.
        decoder: the decoder, in eval mode.
        layers: the layers with the features that the decoder reads, as modules or names, from the
            shallowest to the deepest. None takes the layers that the decoder was made for.

    Raises:
        ValueError: a layer is unknown, or the decoder reads another number of layers.
        TypeError: `decoder` is not an `FCAMDecoder`.

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
            raise ArgumentTypeError(
                f"`decoder` must be an FCAMDecoder, got {type(decoder)}.", "decoder"
            )
        layers = decoder.layers if layers is None else layers
        if layers is None or len(layers) != len(decoder.channels):
            raise ArgumentError(
                f"`layers` must be {len(decoder.channels)}, as many as the decoder reads, got "
                f"{layers!r}.",
                "layers",
            )
        self.decoder = decoder
        self.layers = [find_module(forward_func, layer, "layers") for layer in layers]

    def __repr__(self) -> str:
        names = [module_name(self.forward_func, layer).strip("`") for layer in self.layers]
        return options_repr(self, layers=None if names == self.decoder.layers else names)

    @log_usage()
    @checks_arguments
    def attribute(
        self,
        inputs: TensorOrTupleOfTensors,
        target: TargetType = None,
        additional_forward_args: Any = None,
    ) -> TensorOrTupleOfTensors:
        """The probability of the foreground, equal in all channels.

        Args:
            inputs: images (N, C, H, W), as the classifier takes them, or a tuple of one such
                tensor. The size may differ from that of the training.
            target: checked as in Captum, and otherwise without effect; see above.
            additional_forward_args: as in Captum.

        Returns:
            A map of the inputs' shape and dtype.

        Raises:
            ValueError: `inputs` are not images, not floats or not finite.
            AssertionError: `target` does not select one class for each image.
        """
        images = image_tensor(inputs)
        maps = self.foreground(images, target, additional_forward_args).to(images.dtype)
        repeated = maps.repeat(1, images.shape[1], 1, 1)
        formatted: TensorOrTupleOfTensors = _format_output(isinstance(inputs, tuple), (repeated,))
        return formatted

    def foreground(
        self, images: Tensor, target: TargetType = None, additional_forward_args: Any = None
    ) -> Tensor:
        """The map with one channel, (N, 1, H, W), in float32 or float64; see `attribute`."""
        with torch.no_grad(), preserve_state(self.forward_func), preserve_state(self.decoder):
            capture = LayerCapture(self.forward_func, self.layers)
            activations, _ = capture.activations(images, target, additional_forward_args)
            dtype = next(self.decoder.parameters()).dtype
            features = [tensors[0].to(dtype) for tensors in activations]
            logits = self.decoder(features, (images.shape[2], images.shape[3]))
            return full_precision(logits).softmax(1)[:, 1:]

    def save(self, path: str | Path) -> None:
        """Write the decoder to a file, with a fingerprint of the classifier.

        The classifier itself is not stored. A missing folder is created.

        Args:
            path: the file.

        Raises:
            ValueError: the classifier is a plain function, whose weights are not known.
        """
        decoder, root = self.decoder, require_module(self.forward_func)
        names = {module: name for name, module in root.named_modules()}
        _DECODER_FILE.save(
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
        """Load a file of `save`, for the classifier that the decoder was trained with.

        Only tensors and plain values are read (`weights_only`), and checksums are compared.

        Args:
            path: the file.
            forward_func: the classifier. The decoder is moved to its device.

        Raises:
            ValueError: the file does not contain such a decoder, or a damaged one, or weights that
                are not finite; or the classifier is another one,
                has other weights, or has them in another dtype (convert it after loading).
            FileNotFoundError: the file does not exist.
        """

        def make(saved: dict[str, Any]) -> FCAMDecoder:
            sizes = (saved[name] for name in ("channels", "widths", "center"))
            for layer in saved["layers"]:
                find_module(forward_func, layer)
            return FCAMDecoder(*sizes, layers=saved["layers"])

        return cls(forward_func, _DECODER_FILE.load(path, forward_func, make))
