"""The receptive fields of the units of a convolutional layer, in pixels of the image.

A convolution or pooling with kernel k, dilation d, stride s and padding p (in front) turns units of
receptive field r, jump j and first centre c, along each axis, into

    r' = r + (k - 1) d j,        j' = s j,        c' = c + ((k - 1) d / 2 - p) j

(Araujo et al., "Computing receptive fields of convolutional neural networks", Distill 2019).

`receptive_field` runs the model once. A torch function mode, `_FieldTracer`, sees each function on
the way from the image to the layer, and computes the field of its results from those of its inputs.
"""

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import Module
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from captum_ext._compat import _run_forward
from captum_ext._engine.channels import (
    call_argument,
    dim_after_reshape,
    permutation,
    torch_function_name,
)
from captum_ext._engine.hooks import LockedFunctionMode, enter_mode, hooked
from captum_ext._engine.modules import Forward, check_eager, module_name
from captum_ext._errors import ArgumentError


class FieldAxis(NamedTuple):
    """The receptive fields of the units along one axis, in pixels.

    Unit i sees `size` pixels, centred at `start` + i `stride`. After a flip, `stride` is negative.
    """

    size: float
    stride: float
    start: float


class ReceptiveField(NamedTuple):
    """The receptive fields of the units of a layer, along the rows and columns of the image.

    With `is_transposed`, `rows` is for the column of a unit in the layer's map, and `columns` for
    its row.
    """

    rows: FieldAxis
    columns: FieldAxis
    is_transposed: bool = False


class _TracedTensor(NamedTuple):
    """A tensor computed from the image, its field, and its dimensions of height and width."""

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

    Where branches meet, the field is the union of their fields. Global pooling (squeeze and
    excitation) and functions that move values (attention) are ignored, unless `exact`.

    Callers preserve the model's state, with `preserve_state`.

    Args:
        forward_func: the model.
        layer: a module with the output (B, C, h, w) or (B, h, w, C).
        image: (1, C, H, W).
        additional_forward_args: as in Captum.
        exact: require that pixels outside of its field have no effect on a unit. Then all
            functions on the way must be known to work unit by unit. (Writes into a view of a tensor
            are not detected.)
        reshape_transform: turns the layer's output into (B, C, h, w). It is traced, too.

    Raises:
        ValueError: the layer's output cannot be traced back to the image; with `exact`, a function
            on the way may make units depend on more than their field.
    """
    check_eager(forward_func, layer)
    tracer = _FieldTracer(image)
    results: list[tuple[_TracedTensor | None, str | None]] = []

    def record(index: int, args: Any, output: Any) -> None:
        for x in tree_leaves(output):
            if isinstance(x, Tensor):
                y = x if reshape_transform is None else reshape_transform(x)
                leak = tracer.leaks.get(id(y), (y, tracer.number_source))[1]
                results.append((tracer.traced.get(id(y)), leak))

    was_optimized = torch._C._get_graph_executor_optimize()
    try:
        with ExitStack() as stack:
            lock = stack.enter_context(hooked([layer], after=record))
            stack.enter_context(torch.no_grad())
            tracer_lock = stack.enter_context(enter_mode(tracer))
            if exact:  # a function mode does not see into fused functions
                torch._C._set_graph_executor_optimize(False)
                stack.enter_context(_RedispatchFromPython())  # type: ignore[no-untyped-call]
            with lock, tracer_lock:
                _run_forward(forward_func, tracer.image, None, additional_forward_args)
    finally:
        torch._C._set_graph_executor_optimize(was_optimized)
    traced, leak = results[0] if results else (None, None)
    name = module_name(forward_func, layer)
    if traced is None:
        raise ArgumentError(
            f"The receptive fields of `layer` {name} are not known: there is more than convolution "
            f"and pooling on the way from the image.",
            "layer",
        )
    if exact and leak is not None:
        raise ArgumentError(
            f"The units of `layer` {name} may see all of the image: `{leak}` is on the way, which "
            f"is not known to work unit by unit.",
            "layer",
        )
    return traced.field._replace(is_transposed=traced.dims[0] > traced.dims[1])


def unit_offset(
    field: ReceptiveField, size: tuple[int, int], cells: tuple[int, int]
) -> tuple[float, float]:
    """The offset (y, x) of the units' centres from the centres of a map's cells, in pixels.

    An upsampled map of n cells over S pixels has cell i centred at (i + 1/2) S / n - 1/2. Positive
    offsets mean that the units look further down or right: 0 for VGG, -15.5 for layer4 of a ResNet.

    Args:
        field: the receptive fields.
        size: (H, W) of the image.
        cells: (h, w) of the map.

    Raises:
        ValueError: the map is transposed or flipped.
    """
    if field.is_transposed or min(axis.stride for axis in field[:2]) < 0:
        raise ArgumentError(
            "`layer` has a map that is transposed or flipped, so it cannot be laid over the image. "
            "Pass a `reshape_transform` that turns it back, or another layer.",
            "layer",
        )
    y, x = (
        axis.start + axis.stride * (n - 1) / 2 - (side - 1) / 2
        for axis, side, n in zip(field[:2], size, cells, strict=True)
    )
    return y, x


class _Call(NamedTuple):
    """A call of a torch function on traced tensors, with the shapes before and after it."""

    name: str
    args: Any
    kwargs: dict[str, Any]
    inputs: list[_TracedTensor]
    input_shapes: list[torch.Size]
    output_shape: torch.Size


class _FieldTracer(LockedFunctionMode):
    """Follows the image through the torch functions of a pass.

    Attributes:
        traced: by id, the tensors whose units have a known receptive field.
        leaks: by id, the tensors whose units may depend on more of the image than their field:
            (tensor, name of the first function that is not known to work unit by unit).
        number_source: the name of a function that turned values of the image into a Python number,
            or None. Everything after it may depend on the number.
    """

    def __init__(self, image: Tensor) -> None:
        super().__init__()
        self.image = image.clone()
        first = ReceptiveField(FieldAxis(1, 1, 0), FieldAxis(1, 1, 0))
        # Both dicts hold their tensors: the id of a deleted tensor could be used again.
        self.traced = {id(self.image): _TracedTensor(self.image, first, (2, 3))}
        self.leaks: dict[int, tuple[Any, str]] = {}
        self.number_source: str | None = None

    def call(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        """Run a torch function, and trace its results."""
        leaves = tree_leaves((args, kwargs))
        inputs = [self.traced[id(x)] for x in leaves if id(x) in self.traced]
        leaks = [self.leaks[id(x)][1] for x in leaves if id(x) in self.leaks]
        input_shapes = [x.tensor.shape for x in inputs]
        output = func(*args, **kwargs)
        if inputs or leaks:
            name = torch_function_name(func)
            if _reads_numbers(name, output):
                self.number_source = self.number_source or (leaks or [name])[0]
            if name == "setitem":
                self.leaks[id(args[0])] = (args[0], name)
            for x in tree_leaves(output):
                if isinstance(x, Tensor):
                    self.traced.pop(id(x), None)
                    self.leaks.pop(id(x), None)
                    call = _Call(name, args, kwargs, inputs, input_shapes, x.shape)
                    field_and_dims = _output_field(call) if inputs else None
                    if field_and_dims is not None:
                        self.traced[id(x)] = _TracedTensor(x, *field_and_dims)
                    if leaks or field_and_dims is None or not _is_local(call):
                        self.leaks[id(x)] = (x, (leaks or [name])[0])
        return output


class _RedispatchFromPython(TorchDispatchMode):
    """Calls the functions of a TorchScript module from Python, where a function mode sees them.

    It passes all calls on, so that it does no harm if an interrupt leaves it on the stack.
    """

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


def _reads_numbers(name: str, output: Any) -> bool:
    """Return whether a function turned values of tensors (not only shapes) into numbers."""
    leaves = tree_leaves(output)
    if any(isinstance(x, Tensor) for x in leaves):
        return False
    return name in _READING or any(isinstance(x, float | complex | np.ndarray) for x in leaves)


def _output_field(call: _Call) -> tuple[ReceptiveField, tuple[int, int]] | None:
    """The field of a function's result, and its dimensions of height and width; None if unknown."""
    name, args, kwargs, shape = call.name, call.args, call.kwargs, call.output_shape
    _, field, dims = call.inputs[0]
    if name in _WINDOW_OPTIONS:
        if sorted(dims) != [2, 3] or len(shape) != 4:
            return None
        return _slide_window(field, dims, *_WINDOW_OPTIONS[name](args, kwargs)), dims
    if name == "pad":
        sides = args[1] if len(args) > 1 else kwargs["pad"]
        left = {len(shape) - 1 - i: sides[2 * i] for i in range(len(sides) // 2)}
        rows, columns = (
            axis._replace(start=axis.start - left.get(dim, 0) * axis.stride)
            for axis, dim in zip(field[:2], dims, strict=True)
        )
        return ReceptiveField(rows, columns), dims
    order = permutation(name, args, kwargs, len(shape))
    if order is not None:
        dims = (order.index(dims[0]), order.index(dims[1]))
    if order is not None or name in _FLIPS:
        flipped = _flipped_dims(name, args, kwargs, len(shape))
        rows, columns = (
            _flip(axis, shape[dim]) if dim in flipped else axis
            for axis, dim in zip(field[:2], dims, strict=True)
        )
        return ReceptiveField(rows, columns), dims
    if name in ("view", "reshape") and len(shape) > 3:
        old = call.input_shapes[0]
        height, width = (dim_after_reshape(dim, old, shape) for dim in dims)
        return None if height is None or width is None else (field, (height, width))
    if name in _MOVING:
        return None
    # Assumption: any other function that keeps height and width works unit by unit.
    fields = _aligned_fields(call)
    if not fields:
        return None
    rows, columns = (_union(list(axes)) for axes in zip(*(f[:2] for f in fields), strict=True))
    return ReceptiveField(rows, columns), dims


def _aligned_fields(call: _Call) -> list[ReceptiveField]:
    """The fields of those inputs whose units correspond one to one to the units of the output."""
    _, field, dims = call.inputs[0]
    return [
        x.field
        for x, shape in zip(call.inputs, call.input_shapes, strict=True)
        if x.dims == dims
        and len(shape) == len(call.output_shape)
        and all(shape[d] == call.output_shape[d] for d in dims)
        and x.field.rows.stride == field.rows.stride
        and x.field.columns.stride == field.columns.stride
    ]


def _is_local(call: _Call) -> bool:
    """Return whether a unit of the result surely depends on nothing outside of its field."""
    name, args, kwargs = call.name, call.args, call.kwargs
    dims, n = call.inputs[0].dims, len(call.input_shapes[0])

    if name in _WINDOW_OPTIONS or name in _REARRANGING:
        return len(call.inputs) == 1
    if name == "pad":  # other modes repeat pixels from elsewhere
        return bool(call_argument(args, kwargs, 2, "mode", "constant") == "constant")
    if name == "local_response_norm":
        return 1 not in dims
    if name == "batch_norm":
        return not call_argument(args, kwargs, 5, "training", False)
    if name == "layer_norm":
        return max(dims) < n - len(call_argument(args, kwargs, 1, "normalized_shape", ()))
    if name == "linear":
        return len(call.inputs) == 1 and max(dims) < n - 1
    if name in ("softmax", "log_softmax"):
        dim = call_argument(args, kwargs, 1, "dim", None)
        return dim is not None and dim % n not in dims
    if name == "getitem":
        # `_aligned_fields` checks lengths: a slice of the full length changes no positions.
        index = args[1] if isinstance(args[1], tuple) else (args[1],)
        if not all(isinstance(i, slice) or i is Ellipsis for i in index):
            return False
    elif name not in _UNIT_BY_UNIT:
        return False
    return len(_aligned_fields(call)) == len(call.inputs)


_FLIPS = ("flip", "fliplr", "flipud", "rot90")
_REARRANGING = {"permute", "transpose", "swapaxes", "swapdims", "movedim", "moveaxis", "mT", "mH",
                "adjoint", "view", "reshape", *_FLIPS}  # fmt: skip
# `_aligned_fields` checks shapes: reductions over height or width do not pass.
_UNIT_BY_UNIT = {
    "abs", "adaptive_avg_pool2d", "adaptive_max_pool2d", "add", "alpha_dropout", "amax", "amin",
    "bfloat16", "cat", "ceil", "celu", "chunk", "clamp", "clip", "clone", "concat", "contiguous",
    "detach", "div", "double", "dropout", "dropout1d", "dropout2d", "elu", "exp", "expm1",
    "feature_alpha_dropout", "feature_dropout", "float", "floor", "gelu", "glu", "half",
    "hardsigmoid", "hardswish", "hardtanh", "leaky_relu", "log", "log1p", "logsigmoid", "max",
    "maximum", "mean", "min", "minimum", "mish", "mul", "multiply", "neg", "pow", "prelu",
    "reciprocal", "relu", "relu6", "round", "rrelu", "rsqrt", "rsub", "selu", "sigmoid", "sign",
    "silu", "softplus", "softsign", "split", "sqrt", "square", "sub", "subtract", "sum", "tanh",
    "threshold", "to", "truediv", "type", "type_as", "where",
}  # fmt: skip
_READING = {"allclose", "bool", "equal", "index", "int", "is_nonzero", "item", "tolist"}
_MOVING = {"reshape", "view", "matmul", "bmm", "einsum", "roll", "interpolate", "grid_sample",
           "T", "H", "t", "scaled_dot_product_attention"}  # fmt: skip


def _convolution(args: Any, kwargs: dict[str, Any]) -> tuple[Any, ...]:
    """(kernel, stride, padding, dilation) of a call of a convolution."""
    names = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")
    arguments = dict(zip(names, args, strict=False)) | kwargs
    kernel, dilation = arguments["weight"].shape[2:], _pair(arguments.get("dilation", 1))
    padding = arguments.get("padding", 0)
    if padding == "valid":
        padding = 0
    elif padding == "same":  # an odd number has one more at the end
        padding = [(k - 1) * d // 2 for k, d in zip(kernel, dilation, strict=True)]
    return kernel, arguments.get("stride", 1), padding, dilation


def _pooling(args: Any, kwargs: dict[str, Any]) -> tuple[Any, ...]:
    """(kernel, stride, padding, dilation) of a call of a pooling."""
    names = ("input", "kernel_size", "stride", "padding", "dilation")
    arguments = dict(zip(names, args, strict=False)) | kwargs
    stride = arguments.get("stride")
    # The default stride of a pooling is its kernel size.
    stride = arguments["kernel_size"] if stride is None or stride == [] else stride
    return (
        arguments["kernel_size"],
        stride,
        arguments.get("padding", 0),
        arguments.get("dilation", 1),
    )


def _average_pooling(args: Any, kwargs: dict[str, Any]) -> tuple[Any, ...]:
    """Like `_pooling`: the fifth argument of an average pooling is no dilation."""
    return _pooling(args[:4], {k: v for k, v in kwargs.items() if k != "dilation"})


_WINDOW_OPTIONS: dict[str, Callable[[Any, dict[str, Any]], tuple[Any, ...]]] = {
    "conv2d": _convolution,
    "max_pool2d": _pooling,
    "max_pool2d_with_indices": _pooling,
    "avg_pool2d": _average_pooling,
}


def _slide_window(field: ReceptiveField, dims: tuple[int, int], *options: Any) -> ReceptiveField:
    """The receptive fields after a window slides over units with the receptive fields `field`.

    Args:
        field: the receptive fields before.
        dims: the dimensions of the image's height and width, 2 and 3 in either order.
        *options: kernel, stride, padding and dilation of dimensions 2 and 3.
    """
    axes = []
    for axis, dim in zip(field[:2], dims, strict=True):
        k, s, p, d = (_pair(option)[dim - 2] for option in options)
        axes.append(
            FieldAxis(
                axis.size + (k - 1) * d * abs(axis.stride),
                axis.stride * s,
                axis.start + ((k - 1) * d / 2 - p) * axis.stride,
            )
        )
    return ReceptiveField(axes[0], axes[1])


def _flipped_dims(name: str, args: Any, kwargs: dict[str, Any], n: int) -> Sequence[int]:
    """The dimensions of the result that a function flips, in addition to any permutation."""
    if name == "flip":
        dims = args[1:] if len(args) > 2 else call_argument(args, kwargs, 1, "dims", ())
        return [dim % n for dim in ((dims,) if isinstance(dims, int) else dims)]
    if name == "rot90":
        quarters: int = call_argument(args, kwargs, 1, "k", 1) % 4
        first, second = (dim % n for dim in call_argument(args, kwargs, 2, "dims", (0, 1)))
        return ([], [first], [first, second], [second])[quarters]
    return {"fliplr": [1], "flipud": [0]}.get(name, [])


def _flip(axis: FieldAxis, n: int) -> FieldAxis:
    """The fields of `n` units in reverse order."""
    return axis._replace(stride=-axis.stride, start=axis.start + (n - 1) * axis.stride)


def _pair(option: Any) -> Any:
    """An option of two axes, from one or two numbers."""
    if isinstance(option, int):
        return option, option
    return tuple(option) * (2 // len(option))


def _union(axes: list[FieldAxis]) -> FieldAxis:
    """The smallest fields that contain those of several branches, along one axis."""
    low = min(axis.start - (axis.size - 1) / 2 for axis in axes)
    high = max(axis.start + (axis.size - 1) / 2 for axis in axes)
    return FieldAxis(high - low + 1, axes[0].stride, (low + high) / 2)
