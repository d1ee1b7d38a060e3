"""What the wrappers of image attributions share.

`ImageWrapper` calls the wrapped method on pictures cut or warped from the inputs, and reduces what
it gives to one map for each. `Following` lets every argument of the wrapped method follow its image
there. Both know nothing of where the pictures come from.
"""

import copy
import inspect
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Generic, TypeVar

import torch
from captum.attr import (
    Attribution,
    DeepLiftShap,
    GradientAttribution,
    GradientShap,
    GuidedGradCam,
    LayerAttribution,
    LayerDeepLiftShap,
    LayerGradientShap,
    NeuronAttribution,
    NoiseTunnel,
    PerturbationAttribution,
)
from torch import Tensor
from torch.nn import Module
from torch.nn import functional as F

from captum_ext._compat import _format_callable_baseline
from captum_ext._model import Forward, Tensors, full_precision
from captum_ext._receptive_field import receptive_field, unit_offset
from captum_ext.attr.wrappers.upsample import UpsampleWrapper

Place = TypeVar("Place")
Arguments = dict[str, Any]
Offset = tuple[float, float]

_DRAW_BASELINES = (GradientShap, DeepLiftShap, LayerGradientShap, LayerDeepLiftShap)

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


class ImageWrapper(Attribution):
    """Base of the wrappers that have an image's attribution made of those of other pictures.

    Args:
        attribution_method: an instance of any attribution class of Captum or of this package.
        channel_reduction: how input attributions (B, C, H, W) become one map: "abs_sum", "sum",
            "max_abs" (the channel that is farthest from 0), or a callable to (B, 1, H, W). The
            channels of a layer are always summed, and of attributions that are equal in all
            channels one is taken, so that signed maps stay signed.
    """

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

    @classmethod
    def get_name(cls) -> str:
        return cls.__name__

    def attribute_future(self) -> None:
        raise NotImplementedError(f"attribute_future is not implemented for {self.get_name()}.")

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
        if isinstance(inputs, tuple) and len(inputs) != 1:
            raise ValueError(
                f"`inputs` must be one tensor of images, got a tuple of {len(inputs)}: hand what "
                f"else the model takes to `additional_forward_args`."
            )
        x = inputs[0] if isinstance(inputs, tuple) else inputs
        if not isinstance(x, Tensor) or x.dim() != 4 or not x.is_floating_point() or not x.numel():
            shown = f"{tuple(x.shape)}, {x.dtype}" if isinstance(x, Tensor) else repr(type(x))
            raise ValueError(f"`inputs` must be images (B, C, H, W) of floats, got {shown}.")
        for flag in ("return_convergence_delta", "return_history", "return_coverage"):
            if arguments.get(flag):
                raise ValueError(f"`{flag}`: {self.get_name()} has none to return.")
        if torch.is_inference_mode_enabled() and self._needs_gradients:
            raise RuntimeError(
                "Gradients do not exist inside torch.inference_mode(): use torch.no_grad() around "
                "a gradient-based attribution, or none."
            )
        if not bool(torch.isfinite(x).all()):
            raise ValueError("`inputs` are not finite.")
        return x.detach()

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

    def _completed(self, arguments: Arguments, size: int) -> Arguments:
        """The arguments for the wrapped method: without a target, if it takes none; in batches."""
        method = list(chain(self._base))[-1]
        known = inspect.signature(type(method).attribute).parameters
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


class Following(Generic[Place]):
    """The arguments of an attribution method, each of which follows its image to other places.

    Targets and tensors with one entry for each example are picked by example. What has the images'
    height and width (`baselines`, `feature_mask`, and `additional_forward_args` of three or four
    dimensions) is moved as they are: masks and whatever is not of floats by nearest neighbour, and
    the features of a mask are numbered anew for each picture, from 0 and without gaps. Everything
    else stays as it is.

    A method that draws its baselines from a distribution (`GradientShap`) has one for the whole
    call: then each call may hold pictures of only one place (`one_place`).

    Args:
        method: the method that is called.
        images: (B, C, H, W).
        arguments: those of `method.attribute`.
        move: gives, of a tensor (N, C, H, W) of the images' size, the entries of these numbers at
            these places; bilinear, or by nearest neighbour.
    """

    def __init__(
        self,
        method: Attribution,
        images: Tensor,
        arguments: Arguments,
        move: Callable[[Tensor, Sequence[int], Sequence[Place], bool], Tensor],
    ) -> None:
        self.images, self.move, self.arguments = images, move, dict(arguments)
        for name in ("baselines", "feature_mask"):
            value = self.arguments.get(name)
            if isinstance(value, tuple) and len(value) == 1:
                self.arguments[name] = value[0]
        self._check_target(self.arguments.get("target"))
        baselines = self.arguments.get("baselines")
        draws = any(isinstance(m, _DRAW_BASELINES) for m in chain(method))
        if draws and callable(baselines):
            (baselines,) = _format_callable_baseline(baselines, images)
            self.arguments["baselines"] = baselines
        draws = draws or bool(self.arguments.get("draw_baseline_from_distrib"))
        self.one_place = isinstance(baselines, Tensor) and draws
        if isinstance(baselines, Tensor):
            self.arguments["baselines"] = self._like_images("baselines", baselines)
        mask = self.arguments.get("feature_mask")
        if isinstance(mask, Tensor):
            if mask.dim() < 4:
                mask = mask.reshape((1,) * (4 - mask.dim()) + tuple(mask.shape))
            # What lies outside of the image becomes 0, a feature of its own.
            mask = mask.long()
            mask = self._like_images("feature_mask", mask - mask.min() + 1).float()
            self.arguments["feature_mask"] = mask

    def at(
        self, examples: Sequence[int], places: Sequence[Place], names: Sequence[str] | None = None
    ) -> Arguments:
        """The arguments, or those of `names`, for `examples` at `places`, picture by picture."""
        found = {k: v for k, v in self.arguments.items() if names is None or k in names}
        if isinstance(found.get("target"), list | Tensor):
            found["target"] = self._pick(found["target"], examples)
        extra = found.get("additional_forward_args")
        if isinstance(extra, tuple):
            moved = tuple(self._extra(value, examples, places) for value in extra)
            found["additional_forward_args"] = moved
        elif extra is not None:
            found["additional_forward_args"] = self._extra(extra, examples, places)
        baselines, mask = found.get("baselines"), found.get("feature_mask")
        if isinstance(baselines, Tensor):
            if self.one_place:
                n = len(baselines)
                found["baselines"] = self.move(baselines, range(n), [places[0]] * n, False)
            else:
                found["baselines"] = self._moved(baselines, examples, places, False)
        if isinstance(mask, Tensor):
            features = self._moved(mask, examples, places, True)
            found["feature_mask"] = _numbered_anew(features.round().long())
        return found

    def _moved(
        self, tensor: Tensor, examples: Sequence[int], places: Sequence[Place], nearest: bool
    ) -> Tensor:
        if len(tensor) == 1:
            examples = [0] * len(examples)
        return self.move(tensor, examples, places, nearest)

    def _extra(self, value: Any, examples: Sequence[int], places: Sequence[Place]) -> Any:
        if not isinstance(value, Tensor) or not value.dim():
            return value
        if is_image_like(value, self.images):
            nearest = not value.is_floating_point()
            floats = value.float() if nearest else value
            floats = floats[:, None] if value.dim() == 3 else floats
            moved = self._moved(floats, examples, places, nearest)
            moved = moved[:, 0] if value.dim() == 3 else moved
            return moved.round().to(value.dtype) if nearest else moved
        return self._pick(value, examples) if len(value) == len(self.images) else value

    def _pick(self, value: Any, examples: Sequence[int]) -> Any:
        if isinstance(value, Tensor):
            if value.numel() == 1 and value.dim() < 2:
                return value.reshape(1).expand(len(examples))
            return value[torch.as_tensor(examples, device=value.device)]
        return [value[i] for i in examples]

    def _check_target(self, target: Any) -> None:
        n = len(self.images)
        if isinstance(target, list):
            assert len(target) == n, (
                f"Target list length {len(target)} is not that of the inputs, {n}."
            )
        elif isinstance(target, Tensor):
            fits = target.numel() == 1 or (target.dim() == 1 and len(target) == n)
            assert fits, f"Tensor target dimension {tuple(target.shape)} is not valid."

    def _like_images(self, name: str, value: Tensor) -> Tensor:
        n, channels, *size = self.images.shape
        counts = (len(value),) if self.one_place and name == "baselines" else (1, n)
        widths = (1, channels) if name == "feature_mask" else (channels,)
        fits = value.dim() == 4 and list(value.shape[2:]) == size and value.shape[1] in widths
        if not fits or len(value) not in counts:
            raise ValueError(
                f"`{name}` must have the shape of the images {tuple(self.images.shape)}, or that "
                f"of one of them, got {tuple(value.shape)}."
            )
        return value.detach()


def is_image_like(value: Tensor, images: Tensor) -> bool:
    """Whether `value`, (B or 1, C, H, W) or (B or 1, H, W), has the height and width of images."""
    is_one_each = value.dim() in (3, 4) and len(value) in (1, len(images))
    return is_one_each and value.shape[-2:] == images.shape[-2:]


def chain(method: Any) -> Iterator[Attribution]:
    """A method, and what it wraps, and what that wraps."""
    while isinstance(method, Attribution):
        yield method
        method = getattr(method, "attribution_method", None)


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
    inner = getattr(method, "attribution_method", None)
    if isinstance(inner, Attribution):
        copied.attribution_method = with_forward(inner, forward_func)
    return copied


def is_finite(value: Any) -> bool:
    """Whether `value` is a number, and neither infinite nor NaN."""
    return isinstance(value, int | float) and math.isfinite(value)


def check_range(name: str, value: Any, low: float, high: float, *, below: bool = False) -> None:
    """Raise a ValueError unless the argument called `name` is a number from `low` to `high`."""
    if not is_finite(value) or not low <= value <= high or (below and value == high):
        end = "below" if below else "at most"
        raise ValueError(
            f"`{name}` must be a number, at least {low:g} and {end} {high:g}, got {value!r}."
        )


def check_choice(name: str, value: Any, choices: Any) -> None:
    """Raise a ValueError unless the argument called `name` is one of the choices."""
    if not isinstance(value, str | None) or value not in tuple(choices):
        raise ValueError(f"`{name}` must be one of {list(choices)}, got {value!r}.")


def _numbered_anew(masks: Tensor) -> Tensor:
    """The features of each mask (n, C, h, w) numbered from 0, in order and without gaps."""
    flat = masks.flatten(1)
    present = torch.zeros(len(flat), int(flat.max()) + 1, dtype=torch.long, device=flat.device)
    number = present.scatter(1, flat, 1).cumsum(1) - 1
    return number.gather(1, flat).reshape(masks.shape)
