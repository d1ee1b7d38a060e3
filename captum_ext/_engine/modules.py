"""Find the module behind a forward function, and its layers."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.jit import ScriptModule
from torch.nn import DataParallel, Module

from captum_ext._checks import brief, closest
from captum_ext._errors import ArgumentError, ArgumentTypeError

Tensors = tuple[Tensor, ...]
Forward = Callable[..., Any]


def owner_module(forward_func: object) -> Module | None:
    """The module behind a module, a bound method, a `functools.partial` or a wrapped function."""
    while forward_func is not None and not isinstance(forward_func, Module):
        owner = getattr(forward_func, "__self__", None)
        if isinstance(owner, Module):
            return owner
        inner = forward_func.func if isinstance(forward_func, partial) else None
        forward_func = inner or getattr(forward_func, "__wrapped__", None)
    return forward_func


def root_module(forward_func: Forward) -> Module | None:
    """The module behind `forward_func`, unwrapped from DataParallel; None for a plain function."""
    owner = owner_module(forward_func)
    if isinstance(owner, DataParallel):
        inner: Module = owner.module
        return inner
    return owner


def require_module(
    forward_func: Forward, argument: str = "forward_func", advice: str = ""
) -> Module:
    """The module behind `forward_func`, unwrapped from DataParallel.

    Args:
        forward_func: the model.
        argument: the name of `forward_func` in the error.
        advice: the end of the error.

    Raises:
        ValueError: `forward_func` is a plain function.
    """
    root = root_module(forward_func)
    if root is None:
        raise ArgumentError(
            f"`{argument}` must be a torch.nn.Module, got {brief(forward_func)}{advice}.", argument
        )
    return root


def find_module(forward_func: Forward, module: Module | str, argument: str = "layer") -> Module:
    """The module of the model with the name `module`, or `module` itself.

    Args:
        forward_func: the model.
        module: a module, or its dotted name.
        argument: the name of `module` in errors.

    Raises:
        ValueError: an unknown name (the error lists the three closest); a name, but `forward_func`
            is a plain function; a compiled or a scripted model.
        TypeError: neither a module nor a name.
    """
    root = root_module(forward_func)
    if hasattr(root, "_orig_mod"):
        raise ArgumentError(
            "`forward_func` is a compiled module, and compiled graphs ignore hooks: pass the eager "
            "module (`model._orig_mod`).",
            "forward_func",
        )
    if isinstance(root, ScriptModule):
        raise ArgumentError(
            "`forward_func` is a ScriptModule, whose layers run without hooks: pass the module "
            "that it was made from. RISE, FIDO and the metrics take it as it is.",
            "forward_func",
        )
    if isinstance(module, Module):
        return module
    if not isinstance(module, str):
        raise ArgumentTypeError(
            f"`{argument}` must be a torch.nn.Module or its dotted name, got {type(module)}.",
            argument,
        )
    if root is None:
        raise ArgumentError(
            f"`{argument}` is the name {module!r}, but `forward_func` is not a module, so the "
            f"name cannot be looked up: pass the module itself.",
            argument,
        )
    names = dict(root.named_modules())
    if module not in names or not module:
        known = [name for name in names if name]
        raise ArgumentError(
            f"`{argument}` {module!r} is not in the model. Closest: {closest(module, known)}.",
            argument,
        )
    return names[module]


def module_name(forward_func: Forward, module: Module) -> str:
    """The dotted name of `module` in backticks; its class name if `forward_func` lacks it."""
    root = root_module(forward_func)
    names = {} if root is None else {id(m): name for name, m in root.named_modules()}
    return f"`{names.get(id(module)) or type(module).__name__}`"


def parameter_dtype(module: Module) -> torch.dtype:
    """The dtype of the module's first floating-point parameter; float32 without one."""
    dtypes = (weight.dtype for weight in module.parameters() if weight.is_floating_point())
    return next(dtypes, torch.float32)
