"""Causes of the errors that a model raises about its inputs.

A model that gets an input of another dtype, rank or number of channels than it was made for fails
at its first layer with weights. `explained_faults` finds that layer in the traceback, and says
which input the layer takes. Models that convert their inputs themselves do not fail, and are never
refused. Convolutions alone take one example without a batch in silence; `refuse_unbatched` looks
at what they get.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import Module
from torch.nn.modules.conv import _ConvNd
from torch.utils._pytree import tree_leaves

from captum_ext._compat import _run_forward
from captum_ext._engine.hooks import hooked, hooked_globally
from captum_ext._engine.modules import Forward, module_name, root_module
from captum_ext._engine.targets import check_selection
from captum_ext._errors import ArgumentError

_LAYERS = (_ConvNd, nn.Linear, nn.Embedding)
_NO_GRADIENT = "element 0 of tensors does not require grad"  # as autograd says it
_STOPS_GRADIENTS = "Something in it stops gradients (such as `detach`, `no_grad`, `argmax`)."
_SPATIAL = {1: "L", 2: "H, W", 3: "D, H, W"}


@contextmanager
def explained_faults(
    forward_func: Forward, inputs: Any, argument: str = "inputs"
) -> Iterator[None]:
    """Raise errors of the block with their cause, if they come from the inputs or the target.

    Args:
        forward_func: the model that the block runs.
        inputs: a tensor or a tuple of tensors.
        argument: their name in errors.

    Raises:
        ValueError: `inputs` are not what the model's first layer takes.
        AssertionError: Captum could not select the target.
        TypeError: the model's output is no tensor that it could be selected from.
    """
    try:
        yield
    except (ArgumentError, torch.OutOfMemoryError):
        raise
    except (RuntimeError, ValueError, IndexError, AttributeError, AssertionError) as error:
        check_selection(error)
        _check_layer_input(error, forward_func, inputs, argument)
        if str(error).startswith(_NO_GRADIENT):
            raise ArgumentError(
                f"`forward_func` gives a score without a gradient. {_STOPS_GRADIENTS}",
                "forward_func",
            ) from error
        raise


def _check_layer_input(error: Exception, forward_func: Forward, inputs: Any, argument: str) -> None:
    """Raise a ValueError if `error` comes from a layer that cannot take the inputs."""
    layer, x = _failing_layer(error)
    if layer is None or x is None:
        return
    root = root_module(forward_func)
    modules = () if root is None else root.modules()
    first = next((m for m in modules if isinstance(m, _LAYERS)), layer)
    cause = _cause(layer, x, inputs if isinstance(inputs, tuple) else (inputs,), first is layer)
    if cause:
        raise ArgumentError(_message(forward_func, layer, cause, argument), argument) from error


def _failing_layer(error: BaseException) -> tuple[Any, Tensor | None]:
    """The innermost layer with weights that the error passed through, and the layer's input."""
    layer, x, traceback = None, None, error.__traceback__
    while traceback is not None:
        frame = traceback.tb_frame
        if frame.f_code.co_argcount > 1:
            values = [frame.f_locals.get(name) for name in frame.f_code.co_varnames[:2]]
            if isinstance(values[0], _LAYERS):
                layer, x = values[0], values[1] if isinstance(values[1], Tensor) else x
        traceback = traceback.tb_next
    return layer, x


def _cause(layer: Any, x: Tensor, inputs: Sequence[Tensor], is_first: bool) -> str:
    """The reason why a layer cannot take x, which is like the inputs; "" if unknown.

    Args:
        layer: with weights.
        x: its input.
        inputs: of the model.
        is_first: the layer is the first one with weights, as far as known.
    """
    if isinstance(layer, nn.Linear) and x.dim() and x.shape[-1] != layer.in_features:
        return (
            f"takes {layer.in_features} features, and gets {x.shape[-1]} of inputs of shape "
            f"{', '.join(_shape_of_batch(t) for t in inputs)}: the model needs another size"
        )
    if not is_first:
        return ""
    device, dtype = layer.weight.device, layer.weight.dtype
    if x.device != device and x.device in [t.device for t in inputs]:
        return f"is on {device}, and they are on {x.device}: pass `inputs.to({str(device)!r})`"
    if isinstance(layer, nn.Embedding):
        is_float = x.is_floating_point() and x.dtype in [t.dtype for t in inputs]
        return is_float * f"takes integers, and they are {x.dtype}: pass `inputs.long()`"
    if x.dtype != dtype and x.dtype in [t.dtype for t in inputs]:
        pixels = "inputs.float() / 255` for pixels, normalised as in its training"
        is_pixels = not (x.is_floating_point() or x.is_complex())
        convert = pixels if is_pixels else f"inputs.to({dtype})`"
        return f"has weights of {dtype}, and they are {x.dtype}: pass `{convert}"
    return _cause_of_shape(layer, x, inputs) if isinstance(layer, _ConvNd) else ""


def _cause_of_shape(layer: _ConvNd, x: Tensor, inputs: Sequence[Tensor]) -> str:
    """The reason why a convolution cannot take x, a tensor with the inputs' channels and rank."""
    like = [t for t in inputs if x.dim() == t.dim() and x.shape[1:2] == t.shape[1:2]]
    if not like:
        return ""
    dims, channels, shape = len(layer.kernel_size), layer.in_channels, tuple(like[0].shape)
    if x.dim() == dims + 1:
        advice = "one example is `inputs[None]`"
    elif x.dim() != dims + 2:
        advice = "the rank differs"
    elif shape[1] == channels:
        return ""
    elif shape[-1] == channels:
        order = (0, x.dim() - 1, *range(1, x.dim() - 1))
        advice = f"pass `inputs.permute{order}`"
    elif shape[1] == 1:
        advice = f"grey is repeated by `inputs.repeat(1, {channels}{', 1' * dims})`"
    else:
        advice = "the channels differ"
    received = shape if x.dim() == dims + 1 else _shape_of_batch(x)
    return f"takes (B, {channels}, {_SPATIAL[dims]}), and they are {received}: {advice}"


def _shape_of_batch(x: Tensor) -> str:
    """A shape with B for the number of examples, which is another one in each chunk."""
    return f"({', '.join(['B', *map(str, x.shape[1:])])})"


@contextmanager
def refuse_unbatched(forward_func: Forward, inputs: Any) -> Iterator[None]:
    """Raise a ValueError in the block if a convolution gets the inputs as one example.

    A convolution takes a tensor without a batch, (C, H, W), and gives (K, H, W), which the methods
    would read as a batch of K examples.
    """
    tensors = inputs if isinstance(inputs, tuple) else (inputs,)
    ranks = {t.dim() for t in tensors if t.is_floating_point() and 2 <= t.dim() <= 4}
    shapes = {t.shape for t in tensors}

    def check(module: Module, args: Any) -> None:
        x = args[0] if args else None
        if not isinstance(module, _ConvNd) or not isinstance(x, Tensor):
            return
        if x.dim() == len(module.kernel_size) + 1 and x.shape in shapes:
            cause = _cause_of_shape(module, x, tensors)
            raise ArgumentError(_message(forward_func, module, cause, "inputs"), "inputs")

    root = root_module(forward_func)
    if root is None:
        with hooked_globally(check) as lock, lock:
            yield
        return
    layers = [
        m for m in root.modules() if isinstance(m, _ConvNd) and len(m.kernel_size) + 1 in ranks
    ]
    if not layers:
        yield
        return
    with hooked(layers, before=lambda i, args, _: check(layers[i], args)) as lock, lock:
        yield


def _message(forward_func: Forward, layer: Module, cause: str, argument: str) -> str:
    name = f"{module_name(forward_func, layer)} ({type(layer).__name__})"
    return f"`{argument}` do not fit the model: its layer {name} {cause}."


def explain_missing_gradient(
    forward_func: Forward, inputs: Any, additional_forward_args: Any = None
) -> str:
    """The reason why the model's output has no gradient at a layer, as a sentence."""
    root = root_module(forward_func)
    modules = {} if root is None else dict(root.named_modules())
    quantised = [name for name, m in modules.items() if ".quantized" in type(m).__module__]
    if quantised:
        return (
            f"`{quantised[0]}` ({type(modules[quantised[0]]).__name__}) is quantised, and such "
            f"layers have no gradients: explain the model of floats, or take a method without "
            f"gradients, such as LayerScoreCam or RISE."
        )
    tensors = inputs if isinstance(inputs, tuple) else (inputs,)
    with torch.enable_grad():
        leaves = tuple(x.detach().requires_grad_(x.is_floating_point()).clone() for x in tensors)
        output = _run_forward(forward_func, leaves, None, additional_forward_args)
    nodes: set[Any] = {x.grad_fn for x in tree_leaves(output) if isinstance(x, Tensor)}
    seen: set[Any] = {None}
    while nodes - seen:
        seen |= nodes
        if any(node.name() == "CheckpointFunctionBackward" for node in nodes - {None}):
            return (
                "The model runs a reentrant checkpoint, which hides the layers inside: pass "
                "use_reentrant=False to torch.utils.checkpoint, or switch checkpointing off."
            )
        nodes = {parent for node in nodes - {None} for parent, _ in node.next_functions}
    return (
        "Something behind the layer stops gradients (such as `detach`, `no_grad`, `argmax`), or "
        "the target's score does not read the layer."
    )
