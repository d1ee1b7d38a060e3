"""Find the module behind a forward function, and its layers."""

import sys
from collections.abc import Callable
from functools import partial
from itertools import chain
from typing import Any

import torch
from torch import Tensor
from torch.jit import ScriptModule
from torch.nn import DataParallel, Module

from captum_ext._checks import closest
from captum_ext._errors import ArgumentError, ArgumentTypeError
from captum_ext._repr import bounded_repr

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
            f"`{argument}` must be a torch.nn.Module, got {bounded_repr(forward_func)}{advice}.",
            argument,
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
        check_eager(forward_func, module)
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
    check_eager(forward_func, names[module])
    return names[module]


EAGER_ADVICE = (
    'run it without its compiled graphs, inside `with torch.compiler.set_stance("force_eager"):`'
)


def check_eager(forward_func: Forward, layer: Module, argument: str = "forward_func") -> None:
    """Raise a ValueError if `layer` is in a compiled part of the model, which ignores hooks.

    `torch.compile(part)` and `part.compile()` are allowed where torch runs no compiled graphs.

    Args:
        forward_func: the model.
        layer: the layer.
        argument: the name of `forward_func` in the error.
    """
    eval_frame = sys.modules.get("torch._dynamo.eval_frame")
    if eval_frame is None:  # nothing was compiled in this process
        return
    root, stance = root_module(forward_func), getattr(eval_frame, "_stance", None)
    if root is None or getattr(stance, "stance", None) == "force_eager":
        return
    wrapper = getattr(eval_frame, "OptimizedModule", ())
    for part in root.modules():
        is_wrapper = isinstance(part, wrapper)
        if not is_wrapper and part._compiled_call_impl is None:
            continue
        compiled: Any = part._orig_mod if is_wrapper else part
        if any(inner is layer for inner in compiled.modules()):
            label = f"`{argument}` is"
            if part is not root:
                label = f"`layer` is in {module_name(forward_func, part)},"
            raise ArgumentError(
                f"{label} a compiled module, and compiled graphs ignore hooks: {EAGER_ADVICE}."
            )


def module_name(forward_func: Forward, module: Module) -> str:
    """The dotted name of `module` in backticks; its class name if `forward_func` lacks it."""
    root = root_module(forward_func)
    names = {} if root is None else {id(m): name for name, m in root.named_modules()}
    return f"`{names.get(id(module)) or type(module).__name__}`"


def default_device() -> torch.device:
    """The device of new tensors. `torch.get_default_device` fails in torch 2.6 after a reset."""
    return torch.empty(0).device


def module_device(module: Module) -> torch.device:
    """The device of the module's first parameter or buffer; the CPU without one."""
    tensors = chain(module.parameters(), module.buffers())
    return next((tensor.device for tensor in tensors), torch.device("cpu"))


def gather_shards(weights: Tensor) -> Tensor:
    """The whole of weights that `fully_shard` split between processes, without a graph.

    All processes must call this. Other tensors are returned as they are.
    """
    weights = weights.detach()
    gather = getattr(weights, "full_tensor", None)  # of torch's DTensor
    return weights if gather is None else gather()


def parameter_dtype(module: Module) -> torch.dtype:
    """The dtype of the module's first floating-point parameter; float32 without one."""
    dtypes = (weight.dtype for weight in module.parameters() if weight.is_floating_point())
    return next(dtypes, torch.float32)
