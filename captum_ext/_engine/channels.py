"""Find the dimension of the channels, from the operations that made a tensor.

Convolution, pooling and batch normalisation put the channels into dimension 1; linear layers and
layer normalisation into the last. Operations that work element by element keep them there, and
`permute`, `reshape` and their like take them along. Shapes alone do not tell: (1, 64, 64, 64) may
be either.
"""

import threading
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import Module
from torch.overrides import resolve_name
from torch.utils._pytree import tree_leaves

from captum_ext._engine.hooks import LockedFunctionMode, hooked, preserve_modes
from captum_ext._engine.modules import Tensors

Dims = frozenset[int]  # several where the channels are split, as those of attention heads

_FIRST = (
    "conv",
    "grid_sample",
    "batch_norm",
    "instance_norm",
    "group_norm",
    "pixel_shuffle",
    "local_response",
)
_LAST = ("embedding", "multi_head_attention_forward", "native_multi_head_attention",
         "transformer_encoder_layer_fwd")  # fmt: skip
_UNKNOWN = ("einsum", "tensordot", "T", "H", "t", "as_strided", "cdist", "fold")
_REDUCTIONS = (
    "sum",
    "mean",
    "std",
    "var",
    "amax",
    "amin",
    "max",
    "min",
    "prod",
    "logsumexp",
    "norm",
)
_FIRST_MODULES = (
    nn.modules.conv._ConvNd, nn.modules.batchnorm._NormBase, nn.GroupNorm,
    nn.modules.pooling._MaxPoolNd, nn.modules.pooling._AvgPoolNd,
    nn.modules.pooling._AdaptiveAvgPoolNd, nn.modules.pooling._AdaptiveMaxPoolNd,
)  # fmt: skip
# No linear layer is among them: it may mix positions, which only its input tells.
_SOURCES = (*_FIRST_MODULES, nn.LayerNorm)


class ChannelTracer(LockedFunctionMode):
    """Follows the dimensions of the channels through the functions of one thread."""

    def __init__(self, lock: "threading.Lock | None" = None) -> None:
        super().__init__(lock)
        self._dims: dict[int, tuple[weakref.ref[Tensor], Dims]] = {}

    def begin_at(self, inputs: Tensors) -> None:
        """Take the model's inputs, images and volumes, to have channels in dimension 1."""
        with torch._C.DisableTorchFunction():  # other modes would see the look at a shape
            for x in inputs:
                if x.dim() > 3:
                    self._dims[id(x)] = (weakref.ref(x), frozenset({1}))

    def dims_of(self, tensor: Any) -> Dims | None:
        """The dimensions that hold the channels of a tensor; None where they are not known."""
        reference, dims = self._dims.get(id(tensor), (None, None))
        return dims if reference is not None and reference() is tensor else None

    def call(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        """Run a function, and follow the channels of its results."""
        name = torch_function_name(func)
        leaves = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        with torch._C.DisableTorchFunction():
            known = [(self.dims_of(x), x.shape) for x in leaves]
        result = func(*args, **kwargs)
        with torch._C.DisableTorchFunction():
            for x in tree_leaves(result):
                if isinstance(x, Tensor):
                    try:
                        dims = _dims_after(name, args, kwargs, known, x.shape)
                    except (TypeError, ValueError, IndexError, RuntimeError):
                        dims = None  # a call of another form than is known here
                    if dims is None:
                        self._dims.pop(id(x), None)
                    else:
                        self._dims[id(x)] = (weakref.ref(x), dims)
        return result


@lru_cache(maxsize=4096)
def torch_function_name(func: Any) -> str:
    """The plain name of a torch function: "add" for `torch.add`, `Tensor.__iadd__`, `add_`."""
    if isinstance(func, torch._ops.OpOverload):
        name = func.overloadpacket.__name__
    else:
        path = resolve_name(func) or getattr(func, "__name__", "")
        name = path.removesuffix(".__get__").rpartition(".")[2]  # of a property, as `Tensor.mT`
    return str(name).strip("_")


def trace_start(layer: Module) -> Module | None:
    """The part of a layer at which it is enough to begin; None where that lies in front of it."""
    while True:
        is_chain = getattr(type(layer), "forward", None) is nn.Sequential.forward
        children = list(layer.children()) if is_chain else []
        sources = [child for child in children if _has_source(child)]
        if not sources:
            return layer if _has_source(layer) else None
        layer = sources[-1]


def check_channels_first(tensor: Tensor, dims: Dims | None, layer: Module) -> None:
    """Refuse a map whose channels are not in dimension 1, or not known to be.

    Raises:
        ValueError: with the `reshape_transform` to pass.
    """
    if tensor.dim() < 3 or dims == frozenset({1}):
        return
    shape, name = tuple(tensor.shape), type(layer).__name__
    if dims is None:
        raise ValueError(
            f"Which dimension of `layer` {name}, of shape {shape}, holds the channels is not known "
            f"from the operations that made it; a map needs them in dimension 1. Pass "
            f"`reshape_transform=torch.nn.Identity()` if they are there, `tokens_to_grid` for "
            f"(B, T, C), `channels_last_to_first` for (B, h, w, C), or your own callable."
        )
    raise ValueError(
        f"`layer` {name} gives tokens or channels last, of shape {shape}; a map needs channels in "
        f"dimension 1. Pass `reshape_transform=tokens_to_grid` for (B, T, C), "
        f"`channels_last_to_first` for (B, h, w, C), or your own callable."
    )


def _has_source(module: Module) -> bool:
    return any(
        isinstance(part, _SOURCES) and len(getattr(part, "normalized_shape", (1,))) == 1
        for part in module.modules()
    )


Known = Sequence[tuple[Dims | None, torch.Size]]


def _dims_after(
    name: str, args: Any, kwargs: dict[str, Any], known: Known, shape: torch.Size
) -> Dims | None:
    """The channels' dimensions in a result of `shape`; `known` are those of the arguments."""
    n = len(shape)
    before, old = known[0] if known else (None, shape)
    if name.startswith(_FIRST) or name.endswith(("pool1d", "pool2d", "pool3d")):
        return frozenset({1})
    if name in _LAST:
        return frozenset({n - 1})
    if name == "linear":  # over another dimension than the channels', it mixes positions
        return frozenset({n - 1}) if before is None or n - 1 in before else before
    if name == "layer_norm" and len(call_argument(args, kwargs, 1, "normalized_shape", ())) == 1:
        return frozenset({n - 1}) if before is None or n - 1 in before else before
    if name in ("matmul", "bmm", "scaled_dot_product_attention"):
        values = known[2 if name.startswith("scaled") else 1][0] if len(known) > 1 else None
        return values if values is not None and n - 1 in values else None
    order = permutation(name, args, kwargs, len(old))
    if order is not None:
        return None if before is None else frozenset(order.index(dim) for dim in before)
    if name in ("view", "reshape", "flatten", "unflatten", "squeeze", "unsqueeze", "view_as"):
        return None if before is None else _reshaped(before, old, shape)
    kept: Sequence[int | None] | None = None
    if name == "getitem":
        kept = _kept_by_index(args[1], len(old)) or ()
    elif name in ("select", "unbind", *_REDUCTIONS) and n < len(old):
        gone = call_argument(args, kwargs, 1, "dim", kwargs.get("axis", 0))
        gone = {dim % len(old) for dim in (gone if isinstance(gone, tuple | list) else (gone,))}
        kept = [dim for dim in range(len(old)) if dim not in gone]
    if kept is not None:
        found = {new for new, dim in enumerate(kept) if dim in (before or ())}
        return frozenset(found) or None
    if name in _UNKNOWN or name.startswith("new_"):
        return None
    # What else keeps the number of dimensions is taken to keep their meaning.
    agreed = {dims for dims, size in known if dims is not None and len(size) == n}
    return agreed.pop() if len(agreed) == 1 else None


def call_argument(args: Any, kwargs: dict[str, Any], position: int, key: str, default: Any) -> Any:
    """An argument of a call, by its position or its name."""
    return args[position] if len(args) > position else kwargs.get(key, default)


def permutation(name: str, args: Any, kwargs: dict[str, Any], n: int) -> list[int] | None:
    """For each new dimension its old one, if a function reorders `n` dimensions; else None."""
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
    if name in ("mT", "mH", "adjoint"):
        return [*range(n - 2), n - 1, n - 2]
    return None


def _reshaped(dims: Dims, old: torch.Size, new: torch.Size) -> Dims | None:
    """Where the channels are after a reshape; None where they were mixed with something else."""
    found: set[int] = set()
    i = j = 0
    while i < len(old) or j < len(new):
        first_i, first_j = i, j
        a = b = 1
        while True:  # the smallest runs of dimensions that hold the same values
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
            found |= {k for k in range(first_j, j) if new[k] > 1}
    return frozenset(found) if found else None


def _kept_by_index(index: Any, n: int) -> list[int | None] | None:
    """For each dimension of `x[index]` its dimension in `x`, None for a new one.

    Known of slices and whole numbers, and of one list or tensor (m,) among them.
    """
    index = index if isinstance(index, tuple) else (index,)
    lists = [i for i, k in enumerate(index) if isinstance(k, list | Tensor)]
    if len(lists) == 1 and getattr(index[lists[0]], "ndim", 1) == 1:
        index = (*index[: lists[0]], slice(None), *index[lists[0] + 1 :])
    if not all(isinstance(k, int | slice) or k is None or k is Ellipsis for k in index):
        return None
    if Ellipsis not in index:
        index = (*index, Ellipsis)
    at, taken = index.index(Ellipsis), sum(isinstance(k, int | slice) for k in index)
    kept: list[int | None] = []
    dim = 0
    for element in (*index[:at], *[slice(None)] * (n - taken), *index[at + 1 :]):
        if element is None:
            kept.append(None)
        elif isinstance(element, slice):
            kept.append(dim)
        dim += element is not None
    return kept


class LayerChannelTracer:
    """Traces the channels on the way to layers, in each thread that runs them.

    For most layers it is enough to begin inside of them. A mode around the whole pass would slow
    each of its functions down.

    Args:
        layers: the layers.
        at_input: whether their inputs are meant.
        root: the model, if it is known.
        is_parallel: whether it runs in threads of its own, as DataParallel's replicas do.
        is_whole: whether to begin with the model in any case.
    """

    def __init__(
        self,
        layers: Sequence[Module],
        at_input: bool,
        root: Module | None,
        is_parallel: bool,
        is_whole: bool = False,
    ) -> None:
        # Where the channels of such layers' inputs are needs no trace.
        self.given = {i for i, x in enumerate(layers) if at_input and isinstance(x, _FIRST_MODULES)}
        traced = [layer for i, layer in enumerate(layers) if i not in self.given]
        starts = [None if at_input else trace_start(layer) for layer in traced]
        self.is_whole = is_whole or None in starts
        self.starts = [start for start in starts if start is not None]
        if self.is_whole:
            self.starts = [root] if is_parallel and root is not None else []
        self.layers, self.is_parallel = layers, is_parallel
        self.dims: list[list[Dims | None]] = [[] for _ in layers]
        self.local, self.lock = threading.local(), threading.Lock()

    def begin(self, *_: Any) -> None:
        """Trace what runs in this thread, until as many ends have come."""
        self.local.depth = getattr(self.local, "depth", 0) + 1
        if self.local.depth == 1:
            self.local.left = len(self.layers) - len(self.given)
            self.local.tracer = ChannelTracer(self.lock)
            self.local.tracer.__enter__()

    def see(self, index: int, tensors: Tensors) -> None:
        """Note where the channels of a layer's tensors are."""
        if index in self.given:
            self.dims[index] = [frozenset({1}) for _ in tensors]
        elif getattr(self.local, "depth", 0):
            self.dims[index] = [self.local.tracer.dims_of(x) for x in tensors]
            self.local.left -= 1
            if not self.is_whole or not self.local.left:  # what lies behind runs without the mode
                self._end()

    def _end(self) -> None:
        self.local.depth -= 1
        if not self.local.depth:
            self.local.tracer.leave()

    @contextmanager
    def tracing(self, inputs: Tensors) -> Iterator[threading.Lock]:
        """Trace during a pass of the model, while the lock that this gives is held."""
        hooks = hooked(self.starts, before=self.begin, every_thread=self.is_parallel)
        with preserve_modes(), hooks as self.lock:
            if self.is_whole and not self.starts:
                self.begin()
                self.local.tracer.begin_at(inputs)
            yield self.lock
