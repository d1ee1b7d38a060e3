"""Finds the dimension of the channels of a layer's tensors, from the operations that made them.

Convolution, pooling and batch normalisation put the channels into dimension 1, linear layers and
layer normalisation into the last dimension. Elementwise operations keep them there, `permute`,
`reshape` and similar ones move them. The shape alone is not enough: (1, 64, 64, 64) may be
channels-first or channels-last.

`ChannelTracer` is a torch function mode. It sees each function of a pass and stores the channels'
dimensions of each result, computed by `_result_dims`. `layer_channels` enters this mode for a part
of a pass.
"""

import re
import threading
import weakref
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import Module
from torch.overrides import resolve_name
from torch.utils._pytree import tree_leaves

from captum_ext._engine.hooks import LockedFunctionMode
from captum_ext._engine.modules import Tensors
from captum_ext._errors import ArgumentError

Dims = frozenset[int]  # several if the channels are split, as in attention heads

_CHANNELS_FIRST = ("conv", "grid_sample", "batch_norm", "instance_norm", "group_norm",
                   "pixel_shuffle", "local_response")  # fmt: skip
_CHANNELS_LAST = ("embedding", "multi_head_attention_forward", "native_multi_head_attention",
         "transformer_encoder_layer_fwd")  # fmt: skip
_UNTRACED = ("einsum", "tensordot", "T", "H", "t", "as_strided", "cdist", "fold")
_REDUCTIONS = ("sum", "mean", "std", "var", "amax", "amin", "max", "min", "prod", "logsumexp",
               "norm")  # fmt: skip
CHANNELS_FIRST_MODULES = (
    nn.modules.conv._ConvNd, nn.modules.batchnorm._NormBase, nn.GroupNorm,
    nn.modules.pooling._MaxPoolNd, nn.modules.pooling._AvgPoolNd,
    nn.modules.pooling._AdaptiveAvgPoolNd, nn.modules.pooling._AdaptiveMaxPoolNd,
)  # fmt: skip
# Without linear layers: whether they mix channels or positions depends on their input.
_CHANNEL_SOURCES = (*CHANNELS_FIRST_MODULES, nn.LayerNorm)


class ChannelTracer(LockedFunctionMode):
    """Records the channels' dimensions of each tensor that a torch function returns."""

    def __init__(self, lock: "threading.Lock | None" = None) -> None:
        super().__init__(lock)
        self._dims: dict[int, tuple[weakref.ref[Tensor], Dims]] = {}

    def mark_inputs(self, inputs: Tensors) -> None:
        """Record dimension 1 for the channels of the model's inputs that are images or volumes."""
        with torch._C.DisableTorchFunction():  # hides `x.dim()` from other modes
            for x in inputs:
                if x.dim() > 3:
                    self._dims[id(x)] = (weakref.ref(x), frozenset({1}))

    def dims_of(self, tensor: Any) -> Dims | None:
        """The dimensions of a tensor that hold its channels; None if unknown."""
        reference, dims = self._dims.get(id(tensor), (None, None))
        return dims if reference is not None and reference() is tensor else None

    def call(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        """Run a torch function, and record the channels' dimensions of its results."""
        name = torch_function_name(func)
        leaves = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        with torch._C.DisableTorchFunction():
            traced = [(self.dims_of(x), x.shape) for x in leaves]
        result = func(*args, **kwargs)
        with torch._C.DisableTorchFunction():
            for x in tree_leaves(result):
                if isinstance(x, Tensor):
                    try:
                        dims = _result_dims(name, args, kwargs, traced, x.shape)
                    except (TypeError, ValueError, IndexError, RuntimeError):
                        dims = None  # a call in a form that `_result_dims` does not know
                    if dims is None:
                        self._dims.pop(id(x), None)
                    else:
                        self._dims[id(x)] = (weakref.ref(x), dims)
        return result


@lru_cache(maxsize=4096)
def torch_function_name(func: Any) -> str:
    """The base name of a torch function: "add" for `torch.add`, `Tensor.add_` and operators."""
    if isinstance(func, torch._ops.OpOverload):
        name = func.overloadpacket.__name__
    else:
        path = resolve_name(func) or getattr(func, "__name__", "")
        name = path.removesuffix(".__get__").rpartition(".")[2]  # properties like `Tensor.mT`
    return str(name).strip("_")


def trace_start(layer: Module) -> Module | None:
    """The innermost part of a layer to trace from; None if the trace must begin before the layer.

    A convolution, for example, fixes the channels' dimension for any input.
    """
    while True:
        is_chain = getattr(type(layer), "forward", None) is nn.Sequential.forward
        children = list(layer.children()) if is_chain else []
        sources = [child for child in children if _has_source(child)]
        if not sources:
            return layer if _has_source(layer) else None
        layer = sources[-1]


def check_channels_first(tensor: Tensor, dims: Dims | None, layer: Module) -> None:
    """Check that the channels of a layer's tensor are in dimension 1.

    Args:
        tensor: the layer's tensor. With fewer than three dimensions it has no map, and passes.
        dims: the dimensions of its channels, if known.
        layer: the layer, for the error.

    Raises:
        ValueError: they are elsewhere or unknown. The error suggests a `reshape_transform`.
    """
    if tensor.dim() < 3 or dims == frozenset({1}):
        return
    shape, name = tuple(tensor.shape), type(layer).__name__
    if dims is None:
        raise ArgumentError(
            f"`layer` {name}, of shape {shape}, has its channels in a dimension that is not known "
            f"from the operations that made it. A map needs them in dimension 1. Pass "
            f"`reshape_transform=torch.nn.Identity()` if they are there, `tokens_to_grid` for "
            f"(B, T, C), `channels_last_to_first` for (B, h, w, C), or your own callable.",
            "layer",
        )
    if dims == frozenset({0}):
        raise ArgumentError(
            f"`layer` {name} gives a tensor without a batch, of shape {shape}: a map needs "
            f"examples in dimension 0 and channels in dimension 1.",
            "layer",
        )
    raise ArgumentError(
        f"`layer` {name} gives tokens or channels last, of shape {shape}. A map needs channels in "
        f"dimension 1. Pass `reshape_transform=tokens_to_grid` for (B, T, C), "
        f"`channels_last_to_first` for (B, h, w, C), or your own callable.",
        "layer",
    )


def _has_source(module: Module) -> bool:
    return any(
        isinstance(part, _CHANNEL_SOURCES) and len(getattr(part, "normalized_shape", (1,))) == 1
        for part in module.modules()
    )


def _result_dims(
    name: str,
    args: Any,
    kwargs: dict[str, Any],
    traced: Sequence[tuple[Dims | None, torch.Size]],
    shape: torch.Size,
) -> Dims | None:
    """The channels' dimensions in the result of a torch function; None if unknown.

    Args:
        name: the function's name, see `torch_function_name`.
        args: its positional arguments.
        kwargs: its keyword arguments.
        traced: the channels' dimensions and the shape of each tensor argument.
        shape: the shape of the result.
    """
    n = len(shape)
    before, old = traced[0] if traced else (None, shape)
    if name.startswith(_CHANNELS_FIRST) or name.endswith(("pool1d", "pool2d", "pool3d")):
        return _channels_before_space(name, n)
    if name in _CHANNELS_LAST:
        return frozenset({n - 1})
    if name == "linear":  # on a last dimension without channels, it mixes positions
        return frozenset({n - 1}) if before is None or n - 1 in before else before
    if name == "layer_norm" and len(call_argument(args, kwargs, 1, "normalized_shape", ())) == 1:
        return frozenset({n - 1}) if before is None or n - 1 in before else before
    if name in ("matmul", "bmm", "scaled_dot_product_attention"):
        values = traced[2 if name.startswith("scaled") else 1][0] if len(traced) > 1 else None
        return values if values is not None and n - 1 in values else None
    order = permutation(name, args, kwargs, len(old))
    if order is not None:
        return None if before is None else frozenset(order.index(dim) for dim in before)
    if name in ("view", "reshape", "flatten", "unflatten", "squeeze", "unsqueeze", "view_as"):
        return None if before is None else _dims_after_reshape(before, old, shape)
    kept: Sequence[int | None] | None = None
    if name == "getitem":
        kept = _index_dims(args[1], len(old)) or ()
    elif name in ("select", "unbind", *_REDUCTIONS) and n < len(old):
        gone = call_argument(args, kwargs, 1, "dim", kwargs.get("axis", 0))
        gone = {dim % len(old) for dim in (gone if isinstance(gone, tuple | list) else (gone,))}
        kept = [dim for dim in range(len(old)) if dim not in gone]
    if kept is not None:
        return frozenset(new for new, dim in enumerate(kept) if dim in (before or ())) or None
    if name in _UNTRACED or name.startswith("new_"):
        return None
    # Assumption: any other function that keeps the number of dimensions keeps their meaning.
    candidates = {dims for dims, size in traced if dims is not None and len(size) == n}
    return candidates.pop() if len(candidates) == 1 else None


@lru_cache(maxsize=4096)
def _channels_before_space(name: str, n: int) -> Dims:
    """The channels of a convolution or pooling: dimension 1, or 0 without a batch.

    Args:
        name: of the function or class, like "conv2d".
        n: the number of dimensions of its result.
    """
    space = re.search(r"(?:conv|conv_transpose|convtranspose|pool)(\d)d", name.lower())
    return frozenset({1 if space is None else n - 1 - int(space[1])})


def input_channels(layer: Module, n: int) -> Dims:
    """The channels' dimension in an input of a module of `CHANNELS_FIRST_MODULES`.

    Args:
        layer: the module.
        n: the number of dimensions of the input.
    """
    # A subclass of a convolution may have any name.
    names = "".join(base.__name__ for base in type(layer).__mro__)
    return _channels_before_space(names, n)


def call_argument(args: Any, kwargs: dict[str, Any], position: int, key: str, default: Any) -> Any:
    """Get an argument of a call, by its position or by its name `key`."""
    return args[position] if len(args) > position else kwargs.get(key, default)


def permutation(name: str, args: Any, kwargs: dict[str, Any], n: int) -> list[int] | None:
    """The old dimension of each new one, if the function permutes `n` dimensions; else None."""
    if name == "permute":
        order = args[1:] if len(args) > 2 else call_argument(args, kwargs, 1, "dims", ())
        return [dim % n for dim in ((order,) if isinstance(order, int) else order)]
    if name in ("transpose", "swapaxes", "swapdims"):
        keys = ("dim0", "dim1") if name == "transpose" else ("axis0", "axis1")
        pair = [call_argument(args, kwargs, i + 1, key, 0) % n for i, key in enumerate(keys)]
        order = list(range(n))
        order[pair[0]], order[pair[1]] = pair[1], pair[0]
        return order
    if name in ("movedim", "moveaxis"):
        numbered = torch.empty(tuple(range(1, n + 1)), device="meta")
        ends = {key: value for key, value in kwargs.items() if key != "input"}
        return [size - 1 for size in numbered.movedim(*args[1:], **ends).shape]
    if name == "rot90":
        first, second = (dim % n for dim in call_argument(args, kwargs, 2, "dims", (0, 1)))
        order = list(range(n))
        if call_argument(args, kwargs, 1, "k", 1) % 2:
            order[first], order[second] = second, first
        return order
    if name in ("mT", "mH", "adjoint"):
        return [*range(n - 2), n - 1, n - 2]
    return None


def dim_after_reshape(dim: int, old: torch.Size, new: torch.Size) -> int | None:
    """The dimension that holds dimension `dim` after a reshape, unmixed and unsplit; else None."""
    from_end = len(old) - dim
    if old[dim:] == new[-from_end:]:
        return len(new) - from_end
    (new_dim, *others) = _dims_after_reshape(frozenset({dim}), old, new) or (None,)
    return new_dim if not others and new_dim is not None and new[new_dim] == old[dim] else None


def _dims_after_reshape(dims: Dims, old: torch.Size, new: torch.Size) -> Dims | None:
    """The channels' dimensions after a reshape; None if it merged them with other dimensions."""
    new_dims: set[int] = set()
    i = j = 0
    while i < len(old) or j < len(new):
        first_i, first_j = i, j
        a = b = 1
        while True:  # the shortest runs of old and new dimensions with equally many values
            if a == b and (i > first_i or j > first_j) and a != 1:
                break
            if a <= b and i < len(old):
                a, i = a * old[i], i + 1
            elif j < len(new):
                b, j = b * new[j], j + 1
            else:
                break
        sizes = [old[k] for k in range(first_i, i) if old[k] > 1]
        inside = [old[k] for k in range(first_i, i) if old[k] > 1 and k in dims]
        if inside and len(inside) < len(sizes):
            return None
        if inside:
            new_dims |= {k for k in range(first_j, j) if new[k] > 1}
    return frozenset(new_dims) or None


def _index_dims(index: Any, n: int) -> list[int | None] | None:
    """The dimension in `x` (of `n` dimensions) of each one of `x[index]`; None for a new one.

    Supported are slices, integers, None and Ellipsis, with at most one list or tensor (m,) among
    them. For other indices the result is None.
    """
    index = index if isinstance(index, tuple) else (index,)
    lists = [i for i, k in enumerate(index) if isinstance(k, list | Tensor)]
    if len(lists) == 1 and getattr(index[lists[0]], "ndim", 1) == 1:
        index = (*index[: lists[0]], slice(None), *index[lists[0] + 1 :])
    if not all(isinstance(k, int | slice) or k is None or k is Ellipsis for k in index):
        return None
    if Ellipsis not in index:
        index = (*index, Ellipsis)
    gap, n_taken = index.index(Ellipsis), sum(isinstance(k, int | slice) for k in index)
    kept: list[int | None] = []
    dim = 0
    for element in (*index[:gap], *[slice(None)] * (n - n_taken), *index[gap + 1 :]):
        if element is None:
            kept.append(None)
        elif isinstance(element, slice):
            kept.append(dim)
        dim += element is not None
    return kept
