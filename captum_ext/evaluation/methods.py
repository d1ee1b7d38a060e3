"""The attributions of an evaluation: what they are known by, and what they are called with."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
from captum.attr import Attribution, LayerAttribution
from torch import Generator, Tensor
from torch.nn import Module
from torch.utils._pytree import tree_leaves, tree_map

from captum_ext._engine.modules import Forward, parameter_dtype, root_module
from captum_ext._errors import ArgumentError, ArgumentTypeError
from captum_ext._identity import json_value, versioned_name
from captum_ext.attr import UpsampleWrapper
from captum_ext.attr._chain import chain, innermost, keywords_of
from captum_ext.attr._fingerprint import attribution_fingerprint


class Method(NamedTuple):
    """An attribution, and what its `attribute` is called with."""

    name: str
    attribution: Attribution
    kwargs: Mapping[str, Any]

    @property
    def forward_func(self) -> Forward:
        """The model."""
        found: Forward = self.attribution.forward_func
        return found

    @property
    def where(self) -> tuple[torch.device, torch.dtype]:
        """Of the images that the model takes."""
        root = root_module(self.forward_func)
        if root is None:  # a function: its layers are of the model, if the method has any
            root = next(
                (
                    m
                    for m in tree_leaves(vars(innermost(self.attribution)).get("layer"))
                    if isinstance(m, Module)
                ),
                None,
            )
        if root is None:
            return torch.device("cpu"), torch.float32
        return next(root.parameters(), torch.empty(0)).device, parameter_dtype(root)


def checked_methods(methods: Any) -> list[Method]:
    """Those of `evaluate`'s argument; layer attributions are laid over the image.

    Raises:
        TypeError: no mapping from names to attributions.
        ValueError: an argument of `attribute` that is not the caller's.
    """
    if not isinstance(methods, Mapping) or not methods:
        raise ArgumentTypeError(
            f"`methods` must be a mapping from names to attributions, at least one, got "
            f"{type(methods).__name__}.",
            "methods",
        )
    for name in methods:
        if not isinstance(name, str) or not name or name.splitlines() != [name]:
            raise ArgumentTypeError(
                f"`methods` must have names of one line, got {name!r}.", "methods"
            )
    return [_method(name, value) for name, value in methods.items()]


def _method(name: str, value: Any) -> Method:
    attribution, kwargs = value if isinstance(value, tuple) and len(value) == 2 else (value, {})
    if not isinstance(attribution, Attribution) or not isinstance(kwargs, Mapping):
        raise ArgumentTypeError(
            f"`methods`: {name} must be a Captum Attribution, or (Attribution, arguments of "
            f"`attribute`), got {type(value).__name__}.",
            "methods",
        )
    taken = {"inputs", "target", "return_convergence_delta"} & kwargs.keys()
    if taken:
        raise ArgumentError(f"`methods`: {name}: {sorted(taken)} cannot be given.", "methods")
    if isinstance(attribution, LayerAttribution):
        attribution = UpsampleWrapper(attribution)
    known = keywords_of(attribution)
    if known is not None and (unknown := sorted(kwargs.keys() - known)):
        raise ArgumentError(
            f"`methods`: {name} has no arguments {unknown}, but {sorted(known)}.", "methods"
        )
    return Method(name, attribution, kwargs)


@contextmanager
def seeded(method: Method, seed: int) -> Iterator[None]:
    """A method's own generators, and those among its arguments, from a seed; then as before."""
    found: list[Generator] = []
    for inner in chain(method.attribution):
        found += [value for value in vars(inner).values() if isinstance(value, Generator)]
    found += [value for value in method.kwargs.values() if isinstance(value, Generator)]
    states = [generator.get_state() for generator in found]
    for generator in found:
        generator.manual_seed(seed)
    try:
        yield
    finally:
        for generator, state in zip(found, states, strict=True):
            generator.set_state(state)


def on_device(device: torch.device, method: Method) -> Method:
    """A method whose model, other modules (a decoder) and tensors are on the device."""
    root = root_module(method.forward_func)
    if root is not None:
        root.to(device)
    for inner in chain(method.attribution):
        for name, value in vars(inner).items():
            if isinstance(value, Module | Tensor | Generator):
                setattr(inner, name, _there(device, value))
    return method._replace(kwargs=tree_map(partial(_there, device), dict(method.kwargs)))


def _there(device: torch.device, value: Any) -> Any:
    """A module stays the same object. One GPU's generator is a new one there; `seeded` seeds it."""
    if isinstance(value, Generator):
        other = value.device.type == device.type and value.device != device
        return Generator(device) if other else value
    return value.to(device) if isinstance(value, Module | Tensor) else value


# --- in words ------------------------------------------------------------------------------------


def method_fingerprint(method: Method, digest_of: Callable[[Module], str]) -> str:
    """A method, its options, its arguments and its model, as far as they can be known.

    Args:
        method: of a run.
        digest_of: `model_digest`, with a memory of the models of this run.
    """

    def in_digits(module: Module) -> str:
        mode = " in train mode" if any(part.training for part in module.modules()) else ""
        return f"{type(module).__name__} {digest_of(module)}{mode}"

    def held() -> list[str]:
        """Its tensors, and modules that are no part of the model, such as a decoder."""
        found = []
        attributes = (
            item for one in chain(method.attribution) for item in sorted(vars(one).items())
        )
        for name, value in attributes:
            for leaf in tree_leaves(value):
                if isinstance(leaf, Tensor):
                    found.append(f"{name}={json_value(where, leaf)}")
                elif isinstance(leaf, Module) and leaf not in own:
                    found.append(f"{name}={in_digits(leaf)}")
        return found

    where = f"`methods`: {method.name}"
    root = root_module(method.forward_func)
    own = set() if root is None else set(root.modules())
    if root is None:
        model = versioned_name(f"{where}: the model", method.forward_func)
    else:
        model = in_digits(root)
    made = ", ".join(
        [attribution_fingerprint(where, method.attribution, root or Module()), *held()]
    )
    arguments = [
        f"{key}={json_value(f'{where}: {key}', value)!r}"
        for key, value in sorted(method.kwargs.items())
    ]
    return f"{made}, of {model}, called with ({', '.join(arguments)})"
