"""The base class of the wrappers that explain views of an image and merge their maps.

`ImageWrapper` calls the wrapped method on pictures that were cropped or warped from the inputs, and
reduces each result to one map. Its subclasses make the pictures and merge the maps.
"""

import inspect
from collections.abc import Callable, Iterator, Sequence
from itertools import groupby
from typing import Any

import torch
from captum.attr import (
    Attribution,
    GradientAttribution,
    GradientShap,
    LayerAttribution,
    LayerGradientShap,
    NoiseTunnel,
    PerturbationAttribution,
)
from torch import Tensor
from torch.nn import Module
from torch.nn import functional as F

from captum_ext._checks import check_choice, image_tensor, is_finite
from captum_ext._compat import with_progress
from captum_ext._engine.capture import check_gradients_exist
from captum_ext._engine.modules import Tensors
from captum_ext._engine.precision import full_precision
from captum_ext._engine.receptive_field import receptive_field, unit_offset
from captum_ext._errors import ArgumentError
from captum_ext.attr._chain import call_attribute, chain, check_keywords, innermost
from captum_ext.attr.wrappers._base import BaseWrapper
from captum_ext.attr.wrappers._routing import Arguments, View
from captum_ext.attr.wrappers.upsample import UpsampleWrapper

Offset = tuple[float, float]

REDUCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "abs_sum": lambda a: a.abs().sum(1, keepdim=True),
    "sum": lambda a: a.sum(1, keepdim=True),
    "max_abs": lambda a: a.gather(1, a.abs().argmax(1, keepdim=True)),
}
SIGNS: dict[str, Callable[[Tensor], Tensor]] = {
    "positive": F.relu,
    "negative": lambda a: F.relu(-a),
    "absolute": torch.abs,
    "signed": lambda a: a,
}
_FLAGS = ("return_convergence_delta", "return_history", "return_coverage", "return_masks")


class ImageWrapper(BaseWrapper):
    """Base of the wrappers that make the map of an image from those of views of it.

    Args:
        attribution_method: an instance of any attribution class of Captum or of this package.
        channel_reduction: how input attributions (B, C, H, W) become one map: "abs_sum", "sum",
            "max_abs" (the channel that is farthest from 0), or a callable to (B, 1, H, W). The
            channels of a layer are always summed. Of attributions that are equal in all channels
            one channel is taken, so that signed maps stay signed.

    Raises:
        TypeError: `attribution_method` is not an attribution.
        ValueError: an unknown `channel_reduction`.
    """

    show_progress = False

    def __init__(
        self, attribution_method: Attribution, channel_reduction: str | Callable[[Tensor], Tensor]
    ) -> None:
        super().__init__(attribution_method)
        if not callable(channel_reduction):
            check_choice("channel_reduction", channel_reduction, REDUCTIONS)
        self.channel_reduction = channel_reduction

    @property
    def returns_maps(self) -> bool:
        """True if the result is one map, repeated over the channels."""
        return True

    def has_convergence_delta(self) -> bool:
        return False

    @property
    def _method(self) -> Attribution:
        """The wrapped method. Any `UpsampleWrapper` around it that only resizes is left out."""
        method = self.attribution_method
        while isinstance(method, UpsampleWrapper) and method.is_plain_resize:
            method = method.attribution_method
        return method

    @property
    def _method_returns_maps(self) -> bool:
        """True if the wrapped method gives the channels of a map, and not those of the input."""
        return any(
            isinstance(m, LayerAttribution) or (isinstance(m, ImageWrapper) and m.returns_maps)
            for m in chain(self._method)
        )

    @property
    def _needs_gradients(self) -> bool:
        return any(isinstance(m, GradientAttribution) for m in chain(self._method))

    # --- arguments -------------------------------------------------------------------------------

    def _checked_images(self, inputs: Tensor | Tensors, arguments: Arguments) -> Tensor:
        """The images (B, C, H, W), once they and the names of the arguments are checked."""
        x = image_tensor(inputs)
        for flag in _FLAGS:
            if arguments.get(flag):
                raise ArgumentError(f"`{flag}`: {self.get_name()} has none to return.")
        # `_complete_arguments` leaves out the target where the wrapped method takes none.
        names = [name for name in arguments if name != "target"]
        check_keywords(self, names)
        if self._needs_gradients:
            check_gradients_exist()
        return x

    def _complete_arguments(self, arguments: Arguments, batch_size: int) -> Arguments:
        """The arguments for the wrapped method.

        A target is left out if the method takes none. An `internal_batch_size` is added if it takes
        one.
        """
        known = inspect.signature(type(innermost(self._method)).attribute).parameters
        inner = any(isinstance(m, ImageWrapper) for m in chain(self._method))
        if inner or any(p.kind is p.VAR_KEYWORD for p in known.values()):
            return arguments
        if "target" not in known:
            arguments = {k: v for k, v in arguments.items() if k != "target"}
        if "internal_batch_size" in known:
            arguments = {"internal_batch_size": batch_size, **arguments}
        return arguments

    def _batch_size(self, images: Tensor, arguments: Arguments, requested: int) -> int:
        """The number of pictures for one call of the wrapped method, at most `requested`.

        A CPU gains nothing from graphs of more than 16 pictures, and loses much time to the kernel,
        which has to clear their memory: Grad-CAM of 39 windows by a ResNet-50 takes 3.5 s in calls
        of 16, and 14 s in one call. A method that draws several samples of each picture gets fewer
        pictures in proportion.
        """
        if self._needs_gradients and images.device.type == "cpu":
            requested = min(requested, 16)
        samples = 1
        for method in chain(self._method):
            if isinstance(method, ImageWrapper):
                break
            if isinstance(method, NoiseTunnel):
                batch = arguments.get("nt_samples_batch_size")
                samples *= batch or arguments.get("nt_samples", 5)
            elif isinstance(method, GradientShap | LayerGradientShap):
                samples *= arguments.get("n_samples", 5)
        return max(1, requested // samples)

    def _chunks(
        self, pairs: list[tuple[int, View]], size: int, one_view_per_chunk: bool, desc: str
    ) -> Iterator[tuple[list[int], list[View]]]:
        """The pairs (example, view) in chunks of at most `size`, as examples and views.

        Args:
            pairs: in their order.
            size: the most pairs in a chunk.
            one_view_per_chunk: whether a new chunk begins with each new view.
            desc: the label of the progress bar.
        """
        chunks = [
            run[start : start + size]
            for _, group in groupby(pairs, lambda pair: pair[1] if one_view_per_chunk else None)
            for run in [list(group)]
            for start in range(0, len(run), size)
        ]
        for chunk in with_progress(chunks, self.show_progress, f"{self.get_name()} {desc}"):
            yield [example for example, _ in chunk], [view for _, view in chunk]

    # --- maps of pictures ------------------------------------------------------------------------

    def _explain(
        self, pictures: Tensor, images: Tensor, arguments: Arguments, batch_size: int
    ) -> tuple[Tensor, Tensor]:
        """The wrapped method's maps of `pictures` (n, C, h, w), which are views of `images`.

        Returns:
            The raw maps (n, 1, h', w'), and a bool (n, 1, 1, 1): whether the method gave a map,
            rather than attributions of an input's channels.
        """
        if self._needs_gradients and not self._method_returns_maps:
            pictures = pictures.requires_grad_()
        completed = self._complete_arguments(arguments, max(batch_size, len(pictures)))
        try:
            result = call_attribute(self._method, pictures, **completed)
        except Exception as error:
            self._check_input_size(pictures.detach(), images, arguments, error)
            raise
        return self._one_channel(self._checked_result(result, pictures), pictures)

    def _checked_result(self, result: Any, pictures: Tensor) -> Tensor:
        """Check the result of the wrapped method; return it as one tensor (n, C', h', w')."""
        while isinstance(result, tuple | list) and len(result) == 1:
            result = result[0]
        name = type(self.attribution_method).__name__
        if not isinstance(result, Tensor) and isinstance(self.attribution_method, UpsampleWrapper):
            result = self.attribution_method.upsample(result, pictures)
        if not isinstance(result, Tensor | tuple | list):
            raise ArgumentError(
                f"`attribution_method` {name} gave {type(result)} instead of a map."
            )
        if not isinstance(result, Tensor):
            raise ArgumentError(
                f"`attribution_method` {name} gave {len(result)} maps for one image: fuse them, "
                f"UpsampleWrapper({name}(...), fuse='mean')."
            )
        if result.dim() != 4 or len(result) != len(pictures):
            raise ArgumentError(
                f"`attribution_method` {name} gave {tuple(result.shape)} for pictures of shape "
                f"{tuple(pictures.shape)}, which cannot be laid over them. Tokens are turned into "
                f"a map by UpsampleWrapper's `reshape_transform`."
            )
        values: Tensor = full_precision(result.detach())
        if not bool(torch.isfinite(values).all()):
            raise ArgumentError(
                f"`attribution_method` {name} gave attributions that are not finite."
            )
        return values

    def _one_channel(self, result: Tensor, pictures: Tensor) -> tuple[Tensor, Tensor]:
        """The result reduced to one channel, and whether it was a map; see `_explain`."""
        if isinstance(self._method, LayerAttribution):
            return result.sum(1, keepdim=True), torch.ones_like(result[:, :1, :1, :1]).bool()
        first = result[:, :1]
        is_equal = (result == first).flatten(1).all(1)[:, None, None, None]
        if self._method_returns_maps:
            maps = torch.where(is_equal, first, result.sum(1, keepdim=True))
            return maps, torch.ones_like(is_equal)
        if result.shape[2:] != pictures.shape[2:]:
            raise ArgumentError(
                f"`attribution_method` {type(self.attribution_method).__name__} gave "
                f"{tuple(result.shape)} for pictures of shape {tuple(pictures.shape)}: an "
                f"attribution of the input has its shape."
            )
        # A single channel is a map only if it tells the effect of regions, not of single values.
        perturbs = any(isinstance(m, PerturbationAttribution) for m in chain(self._method))
        is_map = is_equal & (perturbs or result.shape[1] > 1)
        return torch.where(is_map, first, self._reduce_channels(result)), is_map

    def _reduce_channels(self, result: Tensor) -> Tensor:
        reduction = self.channel_reduction
        reduced = (reduction if callable(reduction) else REDUCTIONS[reduction])(result)
        if reduced.shape != result[:, :1].shape:
            raise ArgumentError(
                f"`channel_reduction` must turn {tuple(result.shape)} into "
                f"{tuple(result[:, :1].shape)}, got {tuple(reduced.shape)}."
            )
        return reduced

    def _check_input_size(
        self, pictures: Tensor, images: Tensor, arguments: Arguments, error: Exception
    ) -> None:
        """Raise a ValueError if the model takes the images, but not pictures of this size."""
        extra = arguments.get("additional_forward_args")
        if pictures.shape[2:] == images.shape[2:] or extra is not None:
            return
        with torch.no_grad():
            try:
                self.forward_func(images[:1].clone())
            except Exception:
                return
            try:
                self.forward_func(pictures[:1].clone())
            except Exception:
                raise ArgumentError(
                    f"`attribution_method` explains a model that needs whole images: it takes "
                    f"{tuple(images.shape[1:])}, but not {tuple(pictures.shape[1:])}."
                ) from error

    # --- where maps lie --------------------------------------------------------------------------

    def _check_align(self, align: Any) -> None:
        is_pair = isinstance(align, tuple) and len(align) == 2 and all(is_finite(a) for a in align)
        if not is_pair and (isinstance(align, tuple) or align not in ("cell", "rf")):
            raise ArgumentError(f"`align` must be 'cell', 'rf' or an offset (y, x), got {align!r}.")
        layers = [m.layer for m in chain(self._method) if isinstance(m, LayerAttribution)]
        if align == "rf" and not (layers and isinstance(layers[0], Module)):
            raise ArgumentError(
                "`align`='rf' is for the units of one layer, but `attribution_method` has no "
                "single layer: use 'cell' or an offset (y, x)."
            )

    def _unit_offset(
        self, align: str | Offset, picture: Tensor, cells: Sequence[int], arguments: Arguments
    ) -> Offset:
        """The offset (y, x), in pixels, of the units of a map from the centres of its cells.

        Args:
            align: "cell", "rf" or the offset itself.
            picture: (1, C, h, w).
            cells: the height and width of the map of that picture.
            arguments: of the wrapped method.
        """
        if isinstance(align, tuple):
            return align
        if align == "cell":
            return (0.0, 0.0)
        if arguments.get("attribute_to_layer_input"):
            raise ArgumentError(
                "`align`='rf' is for a layer's output, not its input: use 'cell' or an offset."
            )
        (method,) = (m for m in chain(self._method) if isinstance(m, LayerAttribution))
        extra = arguments.get("additional_forward_args")
        transform = getattr(method, "reshape_transform", None)
        field = receptive_field(
            method.forward_func, method.layer, picture, extra, reshape_transform=transform
        )
        height, width = picture.shape[2:]
        return unit_offset(field, (height, width), (cells[0], cells[1]))

    def _expand_to_inputs(self, maps: Tensor, x: Tensor) -> Tensor:
        """The maps (B, 1, H, W) in the input's shape and dtype. In fp16 they are clipped."""
        if x.dtype == torch.float16:
            largest = torch.finfo(x.dtype).max
            maps = maps.clamp(-largest, largest)
        return maps.to(x.dtype).expand(x.shape).contiguous()
