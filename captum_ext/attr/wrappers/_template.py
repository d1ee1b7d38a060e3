"""What the wrappers of image attributions share.

`ImageWrapper` calls the wrapped method on pictures cut or warped from the inputs, and reduces what
it gives to one map for each. It knows nothing of where the pictures come from.
"""

import copy
import inspect
from collections.abc import Callable, Iterator, Sequence
from itertools import groupby
from typing import Any

import torch
from captum.attr import (
    Attribution,
    GradientAttribution,
    GradientShap,
    GuidedGradCam,
    LayerAttribution,
    LayerGradientShap,
    NeuronAttribution,
    NoiseTunnel,
    PerturbationAttribution,
)
from torch import Tensor
from torch.nn import Module
from torch.nn import functional as F

from captum_ext._checks import check_choice, check_images, is_finite
from captum_ext._compat import with_progress
from captum_ext._engine.capture import check_gradients_exist
from captum_ext._engine.modules import Forward, Tensors
from captum_ext._engine.precision import full_precision
from captum_ext._engine.receptive_field import receptive_field, unit_offset
from captum_ext.attr._chain import chain, check_keywords, innermost, wrapped
from captum_ext.attr._named import Named
from captum_ext.attr.wrappers._following import Arguments, Place
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


class ImageWrapper(Named, Attribution):
    """Base of the wrappers that have an image's attribution made of those of other pictures.

    Args:
        attribution_method: an instance of any attribution class of Captum or of this package.
        channel_reduction: how input attributions (B, C, H, W) become one map: "abs_sum", "sum",
            "max_abs" (the channel that is farthest from 0), or a callable to (B, 1, H, W). The
            channels of a layer are always summed, and of attributions that are equal in all
            channels one is taken, so that signed maps stay signed.
    """

    show_progress = False

    def __init__(
        self, attribution_method: Attribution, channel_reduction: str | Callable[[Tensor], Tensor]
    ) -> None:
        if not isinstance(attribution_method, Attribution):
            raise TypeError(
                f"`attribution_method` must be an instance of a Captum attribution class, got "
                f"{attribution_method!r}."
            )
        if not callable(channel_reduction):
            check_choice("channel_reduction", channel_reduction, REDUCTIONS)
        super().__init__(attribution_method.forward_func)
        self.attribution_method = attribution_method
        self.channel_reduction = channel_reduction

    @property
    def gives_maps(self) -> bool:
        """Whether the result is a map that is repeated over the channels."""
        return True

    @property
    def multiplies_by_inputs(self) -> bool:
        return bool(self.attribution_method.multiplies_by_inputs)

    def has_convergence_delta(self) -> bool:
        return False

    @property
    def _base(self) -> Attribution:
        """The wrapped method, without an `UpsampleWrapper` that does what is done here anyway."""
        method = self.attribution_method
        while isinstance(method, UpsampleWrapper) and method.only_resizes:
            method = method.attribution_method
        return method

    @property
    def _is_spatial(self) -> bool:
        """Whether the wrapped method's channels are those of a map, not of the input."""
        return any(
            isinstance(m, LayerAttribution) or (isinstance(m, ImageWrapper) and m.gives_maps)
            for m in chain(self._base)
        )

    def _check(self, inputs: Tensor | Tensors, arguments: Arguments) -> Tensor:
        """The images (B, C, H, W), if all is well."""
        x = check_images(inputs)
        for flag in (
            "return_convergence_delta",
            "return_history",
            "return_coverage",
            "return_masks",
        ):
            if arguments.get(flag):
                raise ValueError(f"`{flag}`: {self.get_name()} has none to return.")
        # A target is left out in `_completed` where the wrapped method takes none.
        names = [name for name in arguments if name != "target"]
        check_keywords(self.attribution_method, names)
        if self._needs_gradients:
            check_gradients_exist()
        return x

    @property
    def _needs_gradients(self) -> bool:
        return any(isinstance(method, GradientAttribution) for method in chain(self._base))

    def _at_once(self, images: Tensor, arguments: Arguments, size: int) -> int:
        """How many pictures the wrapped method gets in one call, of the `size` that the user wants.

        A CPU gains nothing from larger graphs than 16, and loses much to the kernel, which has to
        clear their memory: Grad-CAM of 39 windows by a ResNet-50 takes 3.5 s by 16 and 14 s at
        once. A method that makes several samples of each picture gets as many fewer.
        """
        if self._needs_gradients and images.device.type == "cpu":
            size = min(size, 16)
        samples = 1
        for method in chain(self._base):
            if isinstance(method, ImageWrapper):
                break
            if isinstance(method, NoiseTunnel):
                at_once = arguments.get("nt_samples_batch_size")
                samples *= at_once or arguments.get("nt_samples", 5)
            elif isinstance(method, GradientShap | LayerGradientShap):
                samples *= arguments.get("n_samples", 5)
        return max(1, size // samples)

    def _chunks(
        self, pairs: list[tuple[int, Place]], size: int, one_place: bool, what: str
    ) -> Iterator[tuple[list[int], list[Place]]]:
        """The pairs (example, place), some at a time, as examples and places."""
        chunks = [
            run[start : start + size]
            for _, group in groupby(pairs, lambda pair: pair[1] if one_place else None)
            for run in [list(group)]
            for start in range(0, len(run), size)
        ]
        for chunk in with_progress(chunks, self.show_progress, f"{self.get_name()} {what}"):
            yield [example for example, _ in chunk], [place for _, place in chunk]

    def _completed(self, arguments: Arguments, size: int) -> Arguments:
        """The arguments for the wrapped method: without a target, if it takes none; in batches."""
        known = inspect.signature(type(innermost(self._base)).attribute).parameters
        inner = any(isinstance(m, ImageWrapper) for m in chain(self._base))
        if inner or any(p.kind is p.VAR_KEYWORD for p in known.values()):
            return arguments
        if "target" not in known:
            arguments = {k: v for k, v in arguments.items() if k != "target"}
        if "internal_batch_size" in known:
            arguments = {"internal_batch_size": size, **arguments}
        return arguments

    def _maps(
        self, pictures: Tensor, images: Tensor, arguments: Arguments, size: int
    ) -> tuple[Tensor, Tensor]:
        """The wrapped method's maps of `pictures` (n, C, h, w), made of `images`.

        Returns:
            The maps (n, 1, h', w'), raw, and which of them (n, 1, 1, 1) were maps already, rather
            than attributions of an input's channels.
        """
        if self._needs_gradients and not self._is_spatial:
            pictures = pictures.requires_grad_()
        try:
            completed = self._completed(arguments, max(size, len(pictures)))
            result = self._base.attribute(pictures, **completed)
        except Exception as error:
            self._check_the_model_takes(pictures.detach(), images, arguments, error)
            raise
        while isinstance(result, tuple | list) and len(result) == 1:
            result = result[0]
        name = type(self.attribution_method).__name__
        if not isinstance(result, Tensor) and isinstance(self.attribution_method, UpsampleWrapper):
            result = self.attribution_method.upsample(result, pictures)
        if not isinstance(result, Tensor | tuple | list):
            raise ValueError(f"`attribution_method` {name} gave {type(result)} instead of a map.")
        if not isinstance(result, Tensor):
            raise ValueError(
                f"`attribution_method` {name} gave {len(result)} maps for one image: fuse them, "
                f"UpsampleWrapper({name}(...), fuse='mean')."
            )
        if result.dim() != 4 or len(result) != len(pictures):
            raise ValueError(
                f"`attribution_method` {name} gave {tuple(result.shape)} for pictures of shape "
                f"{tuple(pictures.shape)}, which cannot be laid over them. Tokens are turned into "
                f"a map by UpsampleWrapper's `reshape_transform`."
            )
        result = full_precision(result.detach())
        if not bool(torch.isfinite(result).all()):
            raise ValueError(f"`attribution_method` {name} gave attributions that are not finite.")
        if isinstance(self._base, LayerAttribution):
            return result.sum(1, keepdim=True), torch.ones_like(result[:, :1, :1, :1]).bool()
        one = result[:, :1]
        equal = (result == one).flatten(1).all(1)[:, None, None, None]
        if self._is_spatial:
            return torch.where(equal, one, result.sum(1, keepdim=True)), torch.ones_like(equal)
        if result.shape[2:] != pictures.shape[2:]:
            raise ValueError(
                f"`attribution_method` {name} gave {tuple(result.shape)} for pictures of shape "
                f"{tuple(pictures.shape)}: an attribution of the input has its shape."
            )
        # One channel is a map if it says what a region of the input does, and not its values.
        perturbs = any(isinstance(m, PerturbationAttribution) for m in chain(self._base))
        is_map = equal & (perturbs or result.shape[1] > 1)
        return torch.where(is_map, one, self._reduce(result)), is_map

    def _check_align(self, align: Any) -> None:
        pair = isinstance(align, tuple) and len(align) == 2 and all(is_finite(a) for a in align)
        if not pair and (isinstance(align, tuple) or align not in ("cell", "rf")):
            raise ValueError(f"`align` must be 'cell', 'rf' or an offset (y, x), got {align!r}.")
        layers = [m.layer for m in chain(self._base) if isinstance(m, LayerAttribution)]
        if align == "rf" and not (layers and isinstance(layers[0], Module)):
            raise ValueError(
                "`align`='rf' is of the units of one layer, and `attribution_method` has none."
            )

    def _offset(
        self, align: str | Offset, picture: Tensor, cells: Sequence[int], arguments: Arguments
    ) -> Offset:
        """How far the units of a map of `cells` over `picture` (1, C, h, w) are off their cells."""
        if isinstance(align, tuple):
            return align
        if align == "cell":
            return (0.0, 0.0)
        if arguments.get("attribute_to_layer_input"):
            raise ValueError("`align`='rf' is of a layer's output, not of its input.")
        (method,) = (m for m in chain(self._base) if isinstance(m, LayerAttribution))
        extra = arguments.get("additional_forward_args")
        field = receptive_field(method.forward_func, method.layer, picture, extra)
        height, width = picture.shape[2:]
        return unit_offset(field, (height, width), (cells[0], cells[1]))

    def _reduce(self, result: Tensor) -> Tensor:
        reduction = self.channel_reduction
        reduced = (reduction if callable(reduction) else REDUCTIONS[reduction])(result)
        if reduced.shape != result[:, :1].shape:
            raise ValueError(
                f"`channel_reduction` must turn {tuple(result.shape)} into "
                f"{tuple(result[:, :1].shape)}, got {tuple(reduced.shape)}."
            )
        return reduced

    def _check_the_model_takes(
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
                raise ValueError(
                    f"`attribution_method` explains a model that needs whole images: it takes "
                    f"{tuple(images.shape[1:])}, but not {tuple(pictures.shape[1:])}."
                ) from error

    def _shaped(self, maps: Tensor, x: Tensor) -> Tensor:
        """The maps (B, 1, H, W) in the input's shape and dtype; halves end at their largest."""
        if x.dtype == torch.float16:
            largest = torch.finfo(x.dtype).max
            maps = maps.clamp(-largest, largest)
        return maps.to(x.dtype).expand(x.shape).contiguous()


def with_forward(method: Attribution, forward_func: Forward) -> Attribution:
    """A shallow copy of `method`, and of all that it wraps, that explains `forward_func`.

    Raises:
        ValueError: a method of a layer or a neuron, or one that needs the module itself.
    """
    needs_module = LayerAttribution | NeuronAttribution | GuidedGradCam
    if isinstance(method, needs_module) or hasattr(method, "model"):
        raise ValueError(
            f"`attribution_method` {type(method).__name__} needs the module itself, so it cannot "
            f"explain a function of it."
        )
    copied = copy.copy(method)
    copied.forward_func = forward_func
    inner = wrapped(method)
    if inner is not None:
        copied.attribution_method = with_forward(inner, forward_func)
    return copied
