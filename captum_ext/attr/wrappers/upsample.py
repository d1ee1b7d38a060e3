"""Layer maps at the size of the input."""

from collections.abc import Callable
from typing import Any, Literal, overload

import torch
from captum.attr import Attribution, LayerAttribution
from torch import Tensor

from captum_ext._checks import check_choice, check_flag, reshaped
from captum_ext._compat import (
    TargetType,
    TensorOrTupleOfTensors,
    _format_output,
    _format_tensor_into_tuples,
    _is_tuple,
    log_usage,
)
from captum_ext._engine.modules import Tensors
from captum_ext._engine.state import preserve_state
from captum_ext.attr._arguments import checks_arguments
from captum_ext.attr._chain import UNSET, call_attribute, check_keywords, drop_unset
from captum_ext.attr.wrappers._base import BaseWrapper
from captum_ext.imaging import MODES, min_max, resize

_FUSIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "max": lambda maps: maps.amax(0),
    "mean": lambda maps: maps.mean(0),
}
_NORMALIZATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "none": lambda x: x,
    "minmax": min_max,
    "tanh": lambda x: torch.tanh(2 * min_max(x)),
}


class UpsampleWrapper(BaseWrapper):
    r"""Turn the layer maps of any Captum attribution into attributions of the input's shape.

    Each map (B, C, h, w) is summed over its channels, resized to the input's spatial size, and
    repeated over the input's channels. Several maps (of a list of layers, or of a layer with
    several tensors) are fused into one. Attributions that have the input's shape already are
    returned unchanged. In this wrapper, a CAM works with Captum's `infidelity`, `sensitivity_max`,
    `NoiseTunnel` and `visualize_image_attr`.

    Args:
        attribution_method: an instance of any attribution class of Captum or of this package.
        mode: "bilinear" (linear for signals, trilinear for volumes), "bicubic", "nearest",
            "nearest-exact" or "area".
        fuse: "max" or "mean" over several maps, pixel by pixel.
        align_corners: see `captum_ext.imaging.resize`.
        normalize: the normalisation of each map before the fusion. "none" keeps values raw and
            signed, in the different scales of the layers. "minmax" scales each map to [0, 1].
            "tanh" is LayerCAM's, tanh(2 minmax).
        reshape_transform: turns the result of a method that returns tokens (Captum's
            `LayerGradientXActivation` of a ViT) into (B, C, h, w).

    Raises:
        TypeError: `attribution_method` is not an attribution.
        ValueError: an unknown option.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from captum.attr import LayerGradCam, NoiseTunnel
        >>> conv = nn.Conv2d(3, 4, 3)
        >>> net = nn.Sequential(conv, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 10))
        >>> cam = UpsampleWrapper(LayerGradCam(net, conv))
        >>> NoiseTunnel(cam).attribute(torch.rand(2, 3, 8, 8), nt_samples=2, target=5).shape
        torch.Size([2, 3, 8, 8])
    """

    def __init__(
        self,
        attribution_method: Attribution,
        mode: str = "bilinear",
        fuse: str = "max",
        *,
        align_corners: bool = False,
        normalize: str = "none",
        reshape_transform: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        super().__init__(attribution_method)
        check_choice("fuse", fuse, _FUSIONS)
        check_choice("normalize", normalize, _NORMALIZATIONS)
        check_choice("mode", mode, MODES)
        check_flag("align_corners", align_corners)
        self.mode, self.fuse, self.align_corners = mode, fuse, align_corners
        self.normalize, self.reshape_transform = normalize, reshape_transform

    def has_convergence_delta(self) -> bool:
        return bool(self.attribution_method.has_convergence_delta())

    @property
    def is_plain_resize(self) -> bool:
        """True if maps are only resized, bilinearly, which other wrappers do by themselves."""
        plain = (self.mode, self.align_corners, self.normalize) == ("bilinear", False, "none")
        return plain and self.reshape_transform is None

    @overload
    def attribute(
        self,
        inputs: TensorOrTupleOfTensors,
        *,
        target: TargetType = ...,
        return_convergence_delta: Literal[False] = ...,
        **kwargs: Any,
    ) -> TensorOrTupleOfTensors: ...
    @overload
    def attribute(
        self,
        inputs: TensorOrTupleOfTensors,
        *,
        return_convergence_delta: Literal[True],
        **kwargs: Any,
    ) -> tuple[TensorOrTupleOfTensors, Tensor]: ...
    @log_usage()
    @checks_arguments
    def attribute(
        self,
        inputs: Tensor | Tensors,
        *,
        target: TargetType = UNSET,
        additional_forward_args: Any = UNSET,
        **kwargs: Any,
    ) -> Any:
        """Attributions of exactly the input's shape.

        Args:
            inputs: a tensor or tuple of tensors, examples in dimension 0.
            target: as in Captum. It reaches the wrapped method only if it is passed.
            additional_forward_args: as in Captum. They reach the wrapped method only if passed.
            **kwargs: all other arguments of the wrapped method.

        Returns:
            A tensor for a tensor, a tuple for a tuple; with `return_convergence_delta=True`, these
            and the wrapped method's delta.

        Raises:
            TypeError: an argument that the wrapped method does not have.
            ValueError: a map without the examples or the spatial dimensions of an input.
        """
        is_tuple = _is_tuple(inputs)
        arguments = drop_unset(
            target=target, additional_forward_args=additional_forward_args, **kwargs
        )
        check_keywords(self, arguments)
        examples: Tensors = _format_tensor_into_tuples(inputs)
        with preserve_state(self.forward_func):
            result = call_attribute(self.attribution_method, inputs, **arguments)
        delta = None
        if kwargs.get("return_convergence_delta"):
            result, delta = result
        if self._has_input_shapes(result, is_tuple, examples):
            output: Any = result
        else:
            output = _format_output(is_tuple, tuple(self.upsample(result, x) for x in examples))
        return output if delta is None else (output, delta)

    def _has_input_shapes(self, result: Any, is_tuple: bool, inputs: Tensors) -> bool:
        """Return whether the result explains the inputs, and not a layer that has their size."""
        return (
            not isinstance(self.attribution_method, LayerAttribution)
            and isinstance(result, tuple if is_tuple else Tensor)
            and [x.shape for x in _flatten(result)] == [x.shape for x in inputs]
        )

    def upsample(self, maps: Any, x: Tensor) -> Tensor:
        """Resize maps (a tensor, a tuple, a list of either) to x, fuse them, and repeat channels.

        Args:
            maps: the result of the wrapped method.
            x: the input.

        Returns:
            A tensor of the shape of x.

        Raises:
            ValueError: a map without the examples or the spatial dimensions of x.
        """
        maps = [reshaped(self.reshape_transform, m) for m in _flatten(maps)]
        for m in maps:
            if m.dim() != x.dim() or len(m) != len(x):
                raise ValueError(
                    f"A map of shape {tuple(m.shape)} cannot be laid over an input of shape "
                    f"{tuple(x.shape)}: it needs the same examples and spatial dimensions. To turn "
                    f"tokens into a map, pass `reshape_transform`."
                )
        resized = [
            _NORMALIZATIONS[self.normalize](self._resize(m.sum(1, keepdim=True), x)) for m in maps
        ]
        fused = resized[0] if len(resized) == 1 else _FUSIONS[self.fuse](torch.stack(resized))
        return fused.expand(x.shape).contiguous()

    def _resize(self, m: Tensor, x: Tensor) -> Tensor:
        if x.dim() < 3:
            return m
        return resize(m, x.shape[2:], self.mode, self.align_corners)


def _flatten(maps: Any) -> list[Tensor]:
    """The tensors of a map, a tuple of maps (one layer), or a list of either (several layers)."""
    if isinstance(maps, Tensor):
        return [maps]
    return [tensor for nested in maps for tensor in _flatten(nested)]
