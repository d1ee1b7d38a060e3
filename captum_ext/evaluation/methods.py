"""The methods of an evaluation: attributions with the arguments of their `attribute`."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
from captum.attr import Attribution, LayerAttribution
from torch import Generator, Tensor
from torch.nn import Module
from torch.utils._pytree import tree_leaves, tree_map

from captum_ext._engine.modules import Forward, module_device, parameter_dtype, root_module
from captum_ext._errors import ArgumentError, ArgumentTypeError
from captum_ext._identity import json_value, versioned_name
from captum_ext.attr import UpsampleWrapper
from captum_ext.attr._chain import chain, innermost, keywords_of
from captum_ext.attr._fingerprint import attribution_fingerprint
from captum_ext.attr._plain_gradients import warn_of_plain_gradients


class ConfiguredMethod(NamedTuple):
    """An attribution, its name in the run, and the arguments of its `attribute`."""

    name: str
    attribution: Attribution
    kwargs: Mapping[str, Any]

    @property
    def forward_func(self) -> Forward:
        """The model."""
        forward_func: Forward = self.attribution.forward_func
        return forward_func

    @property
    def device_and_dtype(self) -> tuple[torch.device, torch.dtype]:
        """The device and the dtype of the images that the model takes."""
        root = root_module(self.forward_func)
        if root is None:  # a function: its layers are of the model, if the method has any
            leaves = tree_leaves(vars(innermost(self.attribution)).get("layer"))
            root = next((leaf for leaf in leaves if isinstance(leaf, Module)), None)
        if root is None:
            return torch.device("cpu"), torch.float32
        return module_device(root), parameter_dtype(root)


def configured_methods(methods: Any) -> list[ConfiguredMethod]:
    """The methods of `evaluate`'s argument, with maps of layers upsampled to the image.

    Raises:
        TypeError: no mapping from names to attributions.
        ValueError: an argument of `attribute` that the user cannot give.
    """
    if not isinstance(methods, Mapping) or not methods:
        raise ArgumentTypeError(
            f"`methods` must be a mapping from names to attributions, at least one, got "
            f"{type(methods).__name__}."
        )
    for name in methods:
        if not isinstance(name, str) or not name or name.splitlines() != [name]:
            raise ArgumentTypeError(f"`methods` must have names of one line, got {name!r}.")
    return [_configured_method(name, value) for name, value in methods.items()]


def _configured_method(name: str, value: Any) -> ConfiguredMethod:
    attribution, kwargs = value if isinstance(value, tuple) and len(value) == 2 else (value, {})
    if not isinstance(attribution, Attribution) or not isinstance(kwargs, Mapping):
        raise ArgumentTypeError(
            f"`methods`: {name} must be a Captum Attribution, or (Attribution, arguments of "
            f"`attribute`), got {type(value).__name__}."
        )
    reserved = {"inputs", "target", "return_convergence_delta"} & kwargs.keys()
    if reserved:
        raise ArgumentError(f"`methods`: {name}: {sorted(reserved)} cannot be given.")
    if isinstance(attribution, LayerAttribution):
        attribution = UpsampleWrapper(attribution)
    warn_of_plain_gradients(attribution)
    keywords = keywords_of(attribution)
    if keywords is not None and (unknown := sorted(kwargs.keys() - keywords)):
        raise ArgumentError(
            f"`methods`: {name} has no arguments {unknown}, but {sorted(keywords)}."
        )
    return ConfiguredMethod(name, attribution, kwargs)


@contextmanager
def seed_generators(method: ConfiguredMethod, seed: int) -> Iterator[None]:
    """Seed a method's own generators and those of its arguments; restore their states after it."""
    generators: list[Generator] = []
    for attribution in chain(method.attribution):
        generators += [
            value for value in vars(attribution).values() if isinstance(value, Generator)
        ]
    generators += [value for value in method.kwargs.values() if isinstance(value, Generator)]
    states = [generator.get_state() for generator in generators]
    for generator in generators:
        generator.manual_seed(seed)
    try:
        yield
    finally:
        for generator, state in zip(generators, states, strict=True):
            generator.set_state(state)


def move_to_device(device: torch.device, method: ConfiguredMethod) -> ConfiguredMethod:
    """Move a method's model, other modules (a decoder) and tensors to the device."""
    root = root_module(method.forward_func)
    if root is not None:
        root.to(device)
    for attribution in chain(method.attribution):
        for name, value in vars(attribution).items():
            if isinstance(value, Module | Tensor | Generator):
                setattr(attribution, name, _moved(device, value))
    return method._replace(kwargs=tree_map(partial(_moved, device), dict(method.kwargs)))


def _moved(device: torch.device, value: Any) -> Any:
    """A value on the device; a module stays the same object.

    A generator cannot move between GPUs. A new one replaces it; `seed_generators` seeds it.
    """
    if isinstance(value, Generator):
        is_other_gpu = value.device.type == device.type and value.device != device
        return Generator(device) if is_other_gpu else value
    return value.to(device) if isinstance(value, Module | Tensor) else value


def method_fingerprint(method: ConfiguredMethod, digest_of: Callable[[Module], str]) -> str:
    """A method's class, options, arguments and model as a text, to recognise stored rows.

    Args:
        method: of a run.
        digest_of: `model_digest`, with a cache for models that several methods share.
    """

    def module_text(module: Module) -> str:
        mode = " in train mode" if any(part.training for part in module.modules()) else ""
        return f"{type(module).__name__} {digest_of(module)}{mode}"

    def tensors_and_modules() -> list[str]:
        """The method's tensors, and modules outside of the model, such as a decoder."""
        texts = []
        for attribution in chain(method.attribution):
            for name, value in sorted(vars(attribution).items()):
                for leaf in tree_leaves(value):
                    if isinstance(leaf, Tensor):
                        texts.append(f"{name}={json_value(where, leaf)}")
                    elif isinstance(leaf, Module) and leaf not in model_parts:
                        texts.append(f"{name}={module_text(leaf)}")
        return texts

    where = f"`methods`: {method.name}"
    root = root_module(method.forward_func)
    model_parts = set() if root is None else set(root.modules())
    if root is None:
        model = versioned_name(f"{where}: the model", method.forward_func)
    else:
        model = module_text(root)
    options = attribution_fingerprint(where, method.attribution, root or Module())
    arguments = [
        f"{key}={json_value(f'{where}: {key}', value)!r}"
        for key, value in sorted(method.kwargs.items())
    ]
    return (
        f"{', '.join([options, *tensors_and_modules()])}, of {model}, called with "
        f"({', '.join(arguments)})"
    )
