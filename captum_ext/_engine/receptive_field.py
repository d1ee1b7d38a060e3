"""Where in the image the units of a convolutional layer look.

Each axis of a convolution or pooling with kernel k, dilation d, stride s and padding p in front
turns units of receptive field r, jump j and first centre c into

    r' = r + (k - 1) d j,        j' = s j,        c' = c + ((k - 1) d / 2 - p) j

(Araujo et al., "Computing receptive fields of convolutional neural networks", Distill 2019). The
model is run once, and every function that it calls on the way to the layer is followed.
"""

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import Module
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from captum_ext._compat import _run_forward
from captum_ext._engine.channels import call_argument, permutation, torch_function_name
from captum_ext._engine.hooks import LockedFunctionMode, enter_mode, hooked
from captum_ext._engine.modules import Forward, module_name


class FieldAxis(NamedTuple):
    """The units along one axis, in pixels: unit i is centred at `start` + i `stride`."""

    size: float
    stride: float
    start: float


class ReceptiveField(NamedTuple):
    """The receptive fields of the units of a layer."""

    rows: FieldAxis
    columns: FieldAxis


class _TracedTensor(NamedTuple):
    """A tensor that comes from the image, and where its height and width are."""

    tensor: Tensor
    field: ReceptiveField
    dims: tuple[int, int]


def receptive_field(
    forward_func: Forward,
    layer: Module,
    image: Tensor,
    additional_forward_args: Any = None,
    *,
    exact: bool = False,
    reshape_transform: Callable[[Tensor], Tensor] | None = None,
) -> ReceptiveField:
    """The receptive fields of the units of `layer`, for images like `image`.

    Where branches meet it is the union of theirs. What a branch gets by global pooling (squeeze and
    excitation) or by functions that move values (attention) is left aside, unless it is `exact`.

    The model runs as it stands: `preserve_state` is the caller's.

    Args:
        forward_func: the model.
        layer: a module that puts out (B, C, h, w) or (B, h, w, C).
        image: (1, C, H, W).
        additional_forward_args: as in Captum.
        exact: whether nothing outside of its field may have any effect on a unit. Followed are
            then only functions that are known to work unit by unit. (What is written into a view,
            so as to change what it is a view of, is not seen.)
        reshape_transform: turns what the layer puts out into (B, C, h, w), and is followed as well.

    Raises:
        ValueError: the layer's output cannot be followed back to the image.
    """
    tracer = _FieldTracer(image)
    found: list[tuple[_TracedTensor | None, str | None]] = []

    def keep(index: int, args: Any, output: Any) -> None:
        for x in tree_leaves(output):
            if isinstance(x, Tensor):
                y = x if reshape_transform is None else reshape_transform(x)
                stray = tracer.strays.get(id(y), (y, tracer.was_read))[1]
                found.append((tracer.spots.get(id(y)), stray))

    with ExitStack() as stack:
        lock = stack.enter_context(hooked([layer], after=keep))
        stack.enter_context(torch.no_grad())
        follows = stack.enter_context(enter_mode(tracer))
        if exact:
            unfused = torch.jit.optimized_execution  # type: ignore[attr-defined]
            stack.enter_context(unfused(False))  # what is fused is not seen
            stack.enter_context(_FromPython())  # type: ignore[no-untyped-call]
        with lock, follows:
            _run_forward(forward_func, tracer.image, None, additional_forward_args)
    spot, stray = found[0] if found else (None, None)
    if spot is None:
        raise ValueError(
            f"Where the units of `layer` {module_name(forward_func, layer)} are centred is not "
            f"known: there is more than convolution and pooling on the way from the image."
        )
    if exact and stray is not None:
        raise ValueError(
            f"The units of `layer` {module_name(forward_func, layer)} may see all of the image: "
            f"`{stray}` is on the way, which is not known to work unit by unit."
        )
    return spot.field


def unit_offset(
    field: ReceptiveField, size: tuple[int, int], cells: tuple[int, int]
) -> tuple[float, float]:
    """How far units stand off the centres of their cells (y, x), in pixels.

    A map of n cells over an image of S pixels is laid over it with cell i centred at
    (i + 1/2) S / n - 1/2. The middle of the units' centres is that much below or right of the
    middle of the image: 0 for VGG, -15.5 for layer4 of a ResNet.
    """
    y, x = (
        axis.start + axis.stride * (n - 1) / 2 - (side - 1) / 2
        for axis, side, n in zip(field, size, cells, strict=True)
    )
    return y, x


class _FieldTracer(LockedFunctionMode):
    """Follows what becomes of the image's pixels.

    Attributes:
        spots: by identity, the tensors whose fields are known.
        strays: those that also come from the image in a way that is left aside, and by what.
        was_read: by what a number was made of the image that Python has, or None. All that follows
            may depend on it.
    """

    def __init__(self, image: Tensor) -> None:
        super().__init__()
        self.image = image.clone()
        first = ReceptiveField(FieldAxis(1, 1, 0), FieldAxis(1, 1, 0))
        # The tensors are kept, so that no other gets the identity of one that is gone.
        self.spots = {id(self.image): _TracedTensor(self.image, first, (2, 3))}
        self.strays: dict[int, tuple[Any, str]] = {}
        self.was_read: str | None = None

    def call(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        """Run a function, and follow its results."""
        leaves = tree_leaves((args, kwargs))
        spots = [self.spots[id(x)] for x in leaves if id(x) in self.spots]
        strays = [self.strays[id(x)][1] for x in leaves if id(x) in self.strays]
        shapes = [spot.tensor.shape for spot in spots]
        output = func(*args, **kwargs)
        if spots or strays:
            name = torch_function_name(func)
            if _is_number(name, output):
                self.was_read = self.was_read or (strays or [name])[0]
            if name == "setitem":
                self.strays[id(args[0])] = (args[0], name)
            for x in tree_leaves(output):
                if isinstance(x, Tensor):
                    self.spots.pop(id(x), None)
                    self.strays.pop(id(x), None)
                    call = (name, args, kwargs, spots, shapes, x.shape)
                    after = _after(*call) if spots else None
                    if after is not None:
                        self.spots[id(x)] = _TracedTensor(x, *after)
                    if strays or after is None or not _is_local(*call):
                        self.strays[id(x)] = (x, (strays or [name])[0])
        return output


class _FromPython(TorchDispatchMode):
    """Calls from Python what scripts call from elsewhere, so that a tracer sees it."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


def _is_number(name: str, output: Any) -> bool:
    """Whether a function has made numbers of values, and not of a shape, say."""
    leaves = tree_leaves(output)
    if any(isinstance(x, Tensor) for x in leaves):
        return False
    return name in _READING or any(isinstance(x, float | complex | np.ndarray) for x in leaves)


def _after(
    name: str,
    args: Any,
    kwargs: dict[str, Any],
    spots: list[_TracedTensor],
    shapes: list[torch.Size],
    shape: torch.Size,
) -> tuple[ReceptiveField, tuple[int, int]] | None:
    """The field of what a function gave of `spots`, and where height and width are; or None."""
    field, dims = spots[0].field, spots[0].dims
    if name in _ARGUMENTS:
        if dims != (2, 3) or len(shape) != 4:
            return None
        return _slid(field, *_ARGUMENTS[name](args, kwargs)), dims
    if name == "pad":
        sides = args[1] if len(args) > 1 else kwargs["pad"]
        left = {len(shape) - 1 - i: sides[2 * i] for i in range(len(sides) // 2)}
        moved = (
            axis._replace(start=axis.start - left.get(dim, 0) * axis.stride)
            for axis, dim in zip(field, dims, strict=True)
        )
        return ReceptiveField(*moved), dims
    order = permutation(name, args, kwargs, len(shape))
    if order is not None:
        return field, (order.index(dims[0]), order.index(dims[1]))
    if name in ("view", "reshape") and len(shape) > 3:
        # Where height and width are last and stay so, only what is in front is counted anew.
        n = len(shapes[0])
        if dims == (n - 2, n - 1) and shapes[0][-2:] == shape[-2:]:
            return field, (len(shape) - 2, len(shape) - 1)
    if name in _MOVING:
        return None
    # Whatever else keeps height and width is taken to work unit by unit.
    kept = _kept(spots, shapes, shape)
    if not kept:
        return None
    return ReceptiveField(_union([f.rows for f in kept]), _union([f.columns for f in kept])), dims


def _kept(
    spots: list[_TracedTensor], shapes: list[torch.Size], shape: torch.Size
) -> list[ReceptiveField]:
    """The fields of those spots that lie on the output unit by unit."""
    field, dims = spots[0].field, spots[0].dims
    return [
        spot.field
        for spot, before in zip(spots, shapes, strict=True)
        if spot.dims == dims
        and len(before) == len(shape)
        and all(before[d] == shape[d] for d in dims)
        and spot.field.rows.stride == field.rows.stride
        and spot.field.columns.stride == field.columns.stride
    ]


def _is_local(
    name: str,
    args: Any,
    kwargs: dict[str, Any],
    spots: list[_TracedTensor],
    shapes: list[torch.Size],
    shape: torch.Size,
) -> bool:
    """Whether what `_after` says of a function is known to be all that a unit depends on."""
    dims, n = spots[0].dims, len(shapes[0])

    if name in _ARGUMENTS or name in _REARRANGING:
        return len(spots) == 1
    if name == "pad":  # others repeat pixels from further away
        return bool(call_argument(args, kwargs, 2, "mode", "constant") == "constant")
    if name == "batch_norm":
        return not call_argument(args, kwargs, 5, "training", False)
    if name == "layer_norm":
        return max(dims) < n - len(call_argument(args, kwargs, 1, "normalized_shape", ()))
    if name == "linear":
        return len(spots) == 1 and max(dims) < n - 1
    if name in ("softmax", "log_softmax"):
        dim = call_argument(args, kwargs, 1, "dim", None)
        return dim is not None and dim % n not in dims
    if name == "getitem":
        # A slice that keeps its length keeps everything where it is.
        index = args[1] if isinstance(args[1], tuple) else (args[1],)
        if not all(isinstance(i, slice) or i is Ellipsis for i in index):
            return False
    elif name not in _UNIT_BY_UNIT:
        return False
    return len(_kept(spots, shapes, shape)) == len(spots)


_REARRANGING = {"permute", "transpose", "swapaxes", "swapdims", "movedim", "moveaxis", "mT", "view",
                "reshape"}  # fmt: skip
# With a reduction height and width stay only where it is over the channels.
_UNIT_BY_UNIT = {
    "abs", "adaptive_avg_pool2d", "adaptive_max_pool2d", "add", "alpha_dropout", "amax", "amin",
    "bfloat16", "cat", "ceil", "celu", "chunk", "clamp", "clip", "clone", "concat", "contiguous",
    "detach", "div", "double", "dropout", "dropout1d", "dropout2d", "elu", "exp", "expm1",
    "feature_alpha_dropout", "feature_dropout", "float", "floor", "gelu", "glu", "half",
    "hardsigmoid", "hardswish", "hardtanh", "leaky_relu", "local_response_norm", "log", "log1p",
    "logsigmoid", "max", "maximum", "mean", "min", "minimum", "mish", "mul", "multiply", "neg",
    "pow", "prelu", "reciprocal", "relu", "relu6", "round", "rrelu", "rsqrt", "rsub", "selu",
    "sigmoid", "sign", "silu", "softplus", "softsign", "split", "sqrt", "square", "sub",
    "subtract", "sum", "tanh", "threshold", "to", "truediv", "type", "type_as", "where",
}  # fmt: skip
_READING = {"allclose", "bool", "equal", "index", "int", "is_nonzero", "item", "tolist"}
_MOVING = {
    "reshape",
    "view",
    "matmul",
    "bmm",
    "einsum",
    "roll",
    "flip",
    "interpolate",
    "grid_sample",
    "scaled_dot_product_attention",
}


def _convolution(args: Any, kwargs: dict[str, Any]) -> tuple[Any, ...]:
    names = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")
    arguments = dict(zip(names, args, strict=False)) | kwargs
    kernel, dilation = arguments["weight"].shape[2:], _two(arguments.get("dilation", 1))
    padding = arguments.get("padding", 0)
    if padding == "valid":
        padding = 0
    elif padding == "same":  # what is odd goes to the end
        padding = [(k - 1) * d // 2 for k, d in zip(kernel, dilation, strict=True)]
    return kernel, arguments.get("stride", 1), padding, dilation


def _pooling(args: Any, kwargs: dict[str, Any]) -> tuple[Any, ...]:
    names = ("input", "kernel_size", "stride", "padding", "dilation")
    arguments = dict(zip(names, args, strict=False)) | kwargs
    stride = arguments.get("stride")
    # A pooling that leaves its stride out has that of its kernel.
    stride = arguments["kernel_size"] if stride is None or stride == [] else stride
    return (
        arguments["kernel_size"],
        stride,
        arguments.get("padding", 0),
        arguments.get("dilation", 1),
    )


def _average(args: Any, kwargs: dict[str, Any]) -> tuple[Any, ...]:
    return _pooling(args[:4], {k: v for k, v in kwargs.items() if k != "dilation"})


_ARGUMENTS: dict[str, Callable[[Any, dict[str, Any]], tuple[Any, ...]]] = {
    "conv2d": _convolution,
    "max_pool2d": _pooling,
    "max_pool2d_with_indices": _pooling,
    "avg_pool2d": _average,
}


def _slid(
    field: ReceptiveField, kernel: Any, stride: Any, padding: Any, dilation: Any
) -> ReceptiveField:
    options = (_two(option) for option in (kernel, stride, padding, dilation))
    rows, columns = (
        FieldAxis(
            axis.size + (k - 1) * d * axis.stride,
            axis.stride * s,
            axis.start + ((k - 1) * d / 2 - p) * axis.stride,
        )
        for axis, k, s, p, d in zip(field, *options, strict=True)
    )
    return ReceptiveField(rows, columns)


def _two(option: Any) -> Any:
    if isinstance(option, int):
        return option, option
    return tuple(option) * (2 // len(option))


def _union(axes: list[FieldAxis]) -> FieldAxis:
    low = min(axis.start - (axis.size - 1) / 2 for axis in axes)
    high = max(axis.start + (axis.size - 1) / 2 for axis in axes)
    return FieldAxis(high - low + 1, axes[0].stride, (low + high) / 2)
