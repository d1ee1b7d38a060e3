"""Short texts for objects: class, model, layer, and the options that differ from their defaults."""

import dataclasses
import inspect
import reprlib
from collections.abc import Mapping
from functools import partial
from typing import Any

from torch import Generator, Tensor, device, dtype
from torch.nn import Module

_REPR = reprlib.Repr()
_REPR.maxstring, _REPR.maxother = 260, 80  # the path of a file is shown as a whole


def options_repr(instance: object, **replaced: Any) -> str:
    """The call that makes an object, without the options that have their default.

    Only the first argument of the constructor goes without its name.

    Args:
        instance: an object that keeps each argument of its constructor under the argument's name.
        replaced: values to show instead of the object's attributes, by the argument's name.

    Example:
        >>> from torch import nn
        >>> from captum_ext.attr import LayerEigenCam
        >>> net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten())
        >>> LayerEigenCam(net, "0", center=True)
        LayerEigenCam(Sequential, layer='0', center=True)
    """
    arguments: list[str] = []
    for index, (name, parameter) in enumerate(inspect.signature(type(instance)).parameters.items()):
        value = replaced.get(name, getattr(instance, name, parameter.default))
        if value is parameter.default or _is_equal(value, parameter.default):
            continue
        text = short_repr(value)
        arguments.append(f"{name}={text}" if index else text)
    return f"{type(instance).__name__}({', '.join(arguments)})"


def fields_repr(instance: Any) -> str:
    """The fields of a dataclass or named tuple, with tensors as their shape and dtype."""
    names = getattr(instance, "_fields", None) or [f.name for f in dataclasses.fields(instance)]
    fields = (f"{name}={short_repr(getattr(instance, name))}" for name in names)
    return f"{type(instance).__name__}({', '.join(fields)})"


def short_repr(value: Any) -> str:
    """One value on one line: models by their class, tensors by shape and dtype."""
    if isinstance(value, Tensor):
        return f"Tensor({tuple(value.shape)}, {_plain(value.dtype)})"
    if isinstance(value, Module | Generator):
        return type(value).__name__
    if isinstance(value, dtype | device):
        return _plain(value)
    if isinstance(value, partial):
        return f"partial({short_repr(value.func)}, ...)"
    if inspect.isroutine(value) or inspect.isclass(value):
        return str(getattr(value, "__qualname__", value))
    if isinstance(value, Mapping):
        return f"{{{', '.join(f'{k!r}: {short_repr(v)}' for k, v in value.items())}}}"
    if type(value) in (list, tuple):
        items = ", ".join(short_repr(item) for item in value)
        comma = "," if len(value) == 1 else ""
        return f"[{items}]" if isinstance(value, list) else f"({items}{comma})"
    default: object = object.__repr__
    if type(value).__repr__ is default:  # Captum's attributions are of this kind
        return _attribution_repr(value)
    return repr(value) if type(value).__module__.startswith("captum_ext") else _REPR.repr(value)


def bounded_repr(value: Any, length: int = 200) -> str:
    """The `repr` of any value in one line, cut where it is long or deep; models by their class."""
    if isinstance(value, Tensor):
        return short_repr(value)
    if isinstance(value, Module):
        return f"a {type(value).__name__}"
    shortener = reprlib.Repr()
    shortener.maxlevel, shortener.maxstring, shortener.maxother = 3, length, length
    shortener.maxlist = shortener.maxtuple = shortener.maxdict = 20
    try:
        text = shortener.repr(value)
    except ValueError:  # Python does not print integers of thousands of digits
        text = f"a large {type(value).__name__}"
    if "\n" in text:  # an array
        text = " ".join(text.split())
    return text if len(text) <= length else f"{text[: length - 3]}..."


def _attribution_repr(value: Any) -> str:
    """An attribution of Captum: its model or wrapped method, and its layer."""
    inner = getattr(value, "attribution_method", None) or getattr(value, "forward_func", None)
    if inner is None:
        return type(value).__name__
    model = getattr(value, "forward_func", None)
    modules = model.named_modules() if isinstance(model, Module) else ()
    names = {id(module): name for name, module in modules}
    layer = getattr(value, "layer", None)
    name = names.get(id(layer))
    layer_text = "" if layer is None else f", layer={name!r}" if name else f", {short_repr(layer)}"
    return f"{type(value).__name__}({short_repr(inner)}{layer_text})"


def _is_equal(value: Any, default: Any) -> bool:
    if isinstance(value, Tensor) or default is inspect.Parameter.empty:
        return False
    return type(value) is type(default) and bool(value == default)


def _plain(value: Any) -> str:
    return str(value).removeprefix("torch.")
