"""Checks of arguments before any model call, with errors that name the argument; and warnings."""

import difflib
import math
import sys
import warnings
from collections.abc import Callable, Sequence
from types import FrameType
from typing import Any

import torch
from torch import Generator, Tensor

from captum_ext._errors import ArgumentError, ArgumentTypeError
from captum_ext._repr import bounded_repr

_LONGEST_NAME = 100  # characters that are compared with names


def is_finite(value: Any) -> bool:
    """Return whether `value` is an int or a float, and neither infinite nor NaN."""
    return isinstance(value, int | float) and math.isfinite(value)


def check_count(name: str, value: int) -> None:
    """Raise a ValueError unless argument `name` is an integer of at least 1."""
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value < 2**63:
        raise ArgumentError(
            f"`{name}` must be an integer of at least 1, got {bounded_repr(value)}.", name
        )


def check_seed(value: Any) -> None:
    """Raise a TypeError unless the argument `seed` is an integer."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise ArgumentTypeError(f"`seed` must be an integer, got {bounded_repr(value)}.", "seed")


def check_range(name: str, value: Any, low: float, high: float, *, below: bool = False) -> None:
    """Raise a ValueError unless argument `name` is a number from `low` to `high`.

    Args:
        name: the argument's name.
        value: its value.
        low: the smallest allowed value.
        high: the largest allowed value.
        below: do not allow `high` itself.
    """
    if not is_finite(value) or not low <= value <= high or (below and value == high):
        end = "below" if below else "at most"
        raise ArgumentError(
            f"`{name}` must be a number, at least {low:g} and {end} {high:g}, got "
            f"{bounded_repr(value)}.",
            name,
        )


def check_positive(name: str, value: Any) -> None:
    """Raise a ValueError unless argument `name` is a number greater than 0."""
    if isinstance(value, bool) or not is_finite(value) or value <= 0:
        raise ArgumentError(
            f"`{name}` must be a number, greater than 0, got {bounded_repr(value)}.", name
        )


def check_non_negative(name: str, value: Any) -> None:
    """Raise a ValueError unless argument `name` is a number of 0 or more."""
    if isinstance(value, bool) or not is_finite(value) or value < 0:
        raise ArgumentError(
            f"`{name}` must be a number, 0 or more, got {bounded_repr(value)}.", name
        )


def check_choice(name: str, value: Any, choices: Any) -> None:
    """Raise a ValueError unless argument `name` is one of the choices."""
    if not isinstance(value, str | None) or value not in tuple(choices):
        raise ArgumentError(
            f"`{name}` must be one of {list(choices)}, got {bounded_repr(value)}.", name
        )


def closest(name: str, names: Sequence[str], count: int = 3) -> str:
    """The `count` names most similar to `name`, separated by commas, for an error message."""
    return ", ".join(difflib.get_close_matches(name[:_LONGEST_NAME], names, n=count, cutoff=0.0))


def check_generator(generator: Any, device: torch.device | None) -> None:
    """Raise an error unless `generator` is None or a generator of `device`; None is any device."""
    if generator is None:
        return
    if not isinstance(generator, Generator):
        raise ArgumentTypeError(
            f"`generator` must be a torch.Generator, got {type(generator)}.", "generator"
        )
    if device is not None and generator.device != torch.empty(0, device=device).device:
        raise ArgumentError(
            f"`generator` must be on the device of the inputs, {device}, got {generator.device}.",
            "generator",
        )


def check_inputs(inputs: Any) -> None:
    """Raise an error unless `inputs` is a tensor, or a tuple of tensors, with finite values.

    Warn of images with values far from those of normalised ones.

    Raises:
        TypeError: a value that is no tensor; the message says how to make one of it.
        ValueError: no examples, or values that are not finite.
    """
    tensors = inputs if isinstance(inputs, tuple) else (inputs,)
    for x in tensors:
        if not isinstance(x, Tensor):
            raise ArgumentTypeError(
                f"`inputs` must be a tensor or a tuple of tensors, got {type(x)}{_as_tensor(x)}.",
                "inputs",
            )
    if not tensors or tensors[0].dim() == 0 or tensors[0].numel() == 0:
        shapes = [tuple(x.shape) for x in tensors]
        raise ArgumentError(
            f"`inputs` must have at least one example, in dimension 0, got {shapes}.", "inputs"
        )
    for x in tensors:
        low, high = _value_range(x.detach())
        if not (math.isfinite(low) and math.isfinite(high)):
            raise ArgumentError(
                "`inputs` has values that are not finite. (A mask with infinite values is one of "
                "the `additional_forward_args`.)",
                "inputs",
            )
        if x.dim() == 4 and x.shape[1] in (1, 3) and (low < -10 or high > 10):
            warn(
                f"`inputs` are images with values from {low:g} to {high:g}. Most models take "
                f"normalised ones, with values near 0: (pixels / 255 - mean) / std."
            )


def _as_tensor(value: Any) -> str:
    """Advice that turns an input of another type into a tensor."""
    module = type(value).__module__.partition(".")[0]
    if module == "numpy":
        return ": pass `torch.from_numpy(inputs)`, in the shape and dtype that the model takes"
    if module == "PIL":
        return (
            ": pass the tensor that the model's transform makes of it, such as "
            "`torchvision.models.ResNet50_Weights.DEFAULT.transforms()(image)[None]`"
        )
    if isinstance(value, list):
        return ": pass `torch.stack(inputs)` for a batch, or a tuple for a model of several inputs"
    return ""


def _value_range(x: Tensor) -> tuple[float, float]:
    """The smallest and the largest value, NaN if there is one; zeros where it is not known."""
    if x.is_meta or x.is_nested or x.layout != torch.strided or not x.numel():
        return 0.0, 0.0  # they have no values, or not in one block
    if x.is_complex():
        x = torch.view_as_real(x)
    if not x.is_floating_point():
        return 0.0, 0.0
    x = x.float() if x.dtype.itemsize == 1 else x
    low, high = torch.stack(torch.aminmax(x)).tolist()  # one copy to the host
    return low, high


def check_dense(name: str, x: Tensor) -> None:
    """Raise a TypeError unless each value of a tensor can be read: not sparse, nested or meta."""
    if x.is_nested or x.layout != torch.strided or x.is_meta:
        form = "nested" if x.is_nested else x.device if x.is_meta else x.layout
        raise ArgumentTypeError(f"`{name}` must be a dense tensor with values, got {form}.", name)


def check_flag(name: str, value: Any) -> None:
    """Raise a TypeError unless argument `name` is True or False."""
    if not isinstance(value, bool):
        raise ArgumentTypeError(f"`{name}` must be True or False, got {bounded_repr(value)}.", name)


def reshaped(transform: Callable[[Tensor], Tensor] | None, x: Tensor) -> Tensor:
    """A layer's tensor after the user's `reshape_transform`; None leaves it as it is.

    Raises:
        TypeError: the transform returns no tensor.
    """
    y = x if transform is None else transform(x)
    if not isinstance(y, Tensor):
        raise ArgumentTypeError(
            f"`reshape_transform` must return a tensor, got {type(y)}.", "reshape_transform"
        )
    return y


def check_images(inputs: Any) -> Tensor:
    """Check that `inputs` is one float tensor (B, C, H, W), perhaps in a tuple, and return it."""
    check_inputs(inputs)
    return image_tensor(inputs)


def image_tensor(inputs: Any) -> Tensor:
    """The one float tensor (B, C, H, W) in `inputs`, whose values were checked before."""
    if isinstance(inputs, tuple) and len(inputs) != 1:
        raise ArgumentError(
            f"`inputs` must be one tensor of images, got a tuple of {len(inputs)}: pass the "
            f"model's other arguments as `additional_forward_args`.",
            "inputs",
        )
    x: Tensor = inputs[0] if isinstance(inputs, tuple) else inputs
    check_dense("inputs", x)
    if x.dim() != 4 or not x.is_floating_point():
        if x.dim() == 3 and x.is_floating_point():
            advice = " One image is `inputs[None]`."
        elif x.dim() == 4:
            advice = " Convert pixels by `inputs.float() / 255`, and normalise them."
        else:
            advice = ""
        raise ArgumentError(
            f"`inputs` must be images (B, C, H, W) of floats, got {tuple(x.shape)}, {x.dtype}."
            f"{advice}",
            "inputs",
        )
    return x.detach()


def first_line(message: BaseException | str, length: int = 120) -> str:
    """The first line of an error's text, at most `length` characters; its type if it has none."""
    line = (str(message).splitlines() or [type(message).__name__])[0]
    return line if len(line) <= length else f"{line[: length - 3]}..."


def warn(message: str) -> None:
    """Warn at the innermost caller outside of this package, Captum, torch and Lightning.

    `captum_ext.cli` counts as outside: so the command line recognises the package's own warnings.
    """
    frame, level = sys._getframe(1), 2
    while frame.f_back is not None and _is_inside(frame):
        frame, level = frame.f_back, level + 1
    warnings.warn(message, stacklevel=level)


def _is_inside(frame: FrameType) -> bool:
    """Return whether a frame is code of one of these packages, `captum_ext.cli` excepted."""
    name = str(frame.f_globals.get("__name__"))
    inside = ("captum_ext", "captum", "torch", "lightning", "contextlib")
    return not name.startswith("captum_ext.cli") and name.partition(".")[0] in inside
