"""Targets: the entries of a model's output to explain, in Captum's forms.

Captum selects them. `check_target` refuses, before the model runs, values that are no target, and
`select_entries` refuses those that the output does not have.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from captum_ext._compat import TargetType, _run_forward, _select_targets, is_target_selection
from captum_ext._engine.modules import Forward
from captum_ext._errors import ArgumentTypeError
from captum_ext._repr import bounded_repr

_FORMS = (
    "a target is the index of a class (an int, or a tuple of ints for outputs with more than one "
    "dimension), a list of these or a tensor of int64 with one for each example, or None if the "
    "model gives a single score"
)


def check_target(target: Any) -> None:
    """Raise Captum's AssertionError for a value that is no target of any output."""
    if target is None or _is_index(target) or _is_tuple_of_indices(target):
        return
    if isinstance(target, Tensor):
        is_integer = not (target.is_floating_point() or target.is_complex())
        if target.numel() == 1 and is_integer and target.dtype != torch.bool:
            return
        if target.dim() == 1 and target.dtype in (torch.int32, torch.int64):
            return
        received = f"a tensor of {target.dtype} and shape {tuple(target.shape)}"
    elif isinstance(target, list):
        if target and (all(map(_is_index, target)) or all(map(_is_tuple_of_indices, target))):
            return
        received = bounded_repr(target)
    else:
        received = bounded_repr(target)
    raise AssertionError(f"`target` is {received}, but {_FORMS}.")


def _is_index(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_tuple_of_indices(value: Any) -> bool:
    return isinstance(value, tuple) and all(
        isinstance(part, slice) or (hasattr(part, "__index__") and not isinstance(part, bool))
        for part in value
    )


def select_entries(output: Any, target: TargetType, *, is_checked: bool = False) -> Any:
    """Select the entries of the output for a target, as Captum does; None selects all.

    Args:
        output: (B, ...).
        target: in any of Captum's forms.
        is_checked: leave out `check_on_host`.

    Raises:
        AssertionError: the output does not have the target.
        TypeError: a target of an output that is no tensor.
    """
    if target is None:
        return output
    check_can_be_scores(output)
    if not is_checked and not output.is_cpu:
        check_on_host(output.shape, target)
    try:
        return _select_targets(output, target)
    except (AssertionError, IndexError, RuntimeError) as error:
        if isinstance(error, torch.OutOfMemoryError):
            raise
        raise AssertionError(_misfit(output.shape, target)) from error


def check_can_be_scores(output: Any) -> None:
    """Raise a TypeError unless the model's output is a tensor of real numbers."""
    if not isinstance(output, Tensor):
        raise ArgumentTypeError(
            f"`forward_func` must give a tensor of scores, got {type(output)}: pass a function "
            f"that returns the tensor, such as `lambda x: model(x).logits`.",
            "forward_func",
        )
    if output.is_complex() or output.dtype == torch.bool or output.layout != torch.strided:
        received = output.dtype if output.layout == torch.strided else output.layout
        raise ArgumentTypeError(
            f"`forward_func` must give a dense tensor of real scores, got {received}.",
            "forward_func",
        )


def check_on_host(shape: Sequence[int], target: TargetType) -> None:
    """Select targets from an output of this shape on the host: a GPU stops at an index beyond it.

    Raises:
        AssertionError: the output does not have the target.
    """
    if isinstance(target, Tensor | list):
        on_host = target.cpu() if isinstance(target, Tensor) else target
        select_entries(torch.empty(tuple(shape), device="cpu"), on_host)


def run_forward(
    forward_func: Forward, inputs: Any, target: TargetType, additional_forward_args: Any
) -> Any:
    """Run the model, as Captum does, and select the target's scores."""
    return select_entries(_run_forward(forward_func, inputs, None, additional_forward_args), target)


def check_selection(error: BaseException) -> None:
    """Raise the error of `select_entries` if `error` comes from Captum's own selection."""
    traceback = error.__traceback__
    while traceback is not None and traceback.tb_next is not None:
        if is_target_selection(traceback.tb_frame.f_code):
            break
        traceback = traceback.tb_next
    if traceback is None or not is_target_selection(traceback.tb_frame.f_code):
        return
    values = traceback.tb_frame.f_locals
    try:
        check_can_be_scores(values.get("output"))
    except ArgumentTypeError as of_output:
        raise of_output from error
    raise AssertionError(_misfit(values["output"].shape, values.get("target"))) from error


def _fits(entry: Any, sizes: Sequence[int]) -> bool:
    """Return whether a list's entry is among an example's scores, of these sizes."""
    if not isinstance(entry, tuple):
        return isinstance(entry, int) and 0 <= entry < sizes[0]
    pairs = zip(entry, sizes, strict=False)
    return len(entry) <= len(sizes) and all(
        isinstance(i, slice) or (isinstance(i, int) and -n <= i < n) for i, n in pairs
    )


def _misfit(shape: Sequence[int], target: TargetType) -> str:
    """The text for a target that an output of this shape does not have."""
    sizes = tuple(shape[1:])
    outputs = f"({', '.join(['B', *map(str, sizes)])})" if sizes else "(B,)"
    if isinstance(target, Tensor):
        target = target.tolist()
    if isinstance(target, list) and len(target) != shape[0]:
        return f"`target` has {len(target)} entries for {shape[0]} examples, not one for each."
    if isinstance(target, list) and sizes:
        target = next((entry for entry in target if not _fits(entry, sizes)), target)
    start = f"`target` {bounded_repr(target)} is out of range for outputs of shape {outputs}"
    if not sizes:
        return f"{start}: the model gives one score for each example, so pass target=None."
    classes = f"a class from 0 to {sizes[0] - 1}"
    if len(sizes) == 1:
        return f"{start}: it must be {classes}, or a list or tensor of one for each example."
    return (
        f"{start}: it must be a tuple of {len(sizes)} indices, {classes} first, or a list of one "
        f"such tuple for each example."
    )
