"""All private names of Captum that this package uses.

Other modules import them from here. They move between Captum's releases, so pyproject.toml pins the
supported range.
"""

from collections.abc import Callable, Iterable, Sequence
from types import CodeType
from typing import Any, TypeVar, cast

from captum._utils.common import (
    _format_additional_forward_args,
    _format_baseline,
    _format_output,
    _format_outputs,
    _format_tensor_into_tuples,
    _is_tuple,
    _reduce_list,
    _run_forward,
    _select_targets,
    _sort_key_list,
    _validate_input,
    _verify_select_column,
)
from captum._utils.progress import progress
from captum._utils.typing import BaselineType, TargetType
from captum.attr._core.deep_lift import SUPPORTED_NON_LINEAR
from captum.attr._utils.common import _format_callable_baseline
from captum.log import log_usage as _log_usage
from torch import Tensor

MYPY = False  # which mypy takes for True
if MYPY:
    # To mypy, Captum's classes are Any, and a dataclass with such a base loses its arguments.

    class Attribution:
        def __getattr__(self, name: str) -> Any: ...

    class LayerAttribution(Attribution): ...

    class GradientAttribution(Attribution): ...

    class PerturbationAttribution(Attribution): ...

else:
    from captum.attr import (
        Attribution,
        GradientAttribution,
        LayerAttribution,
        PerturbationAttribution,
    )

__all__ = [
    "SUPPORTED_NON_LINEAR",
    "Attribution",
    "BaselineType",
    "GradientAttribution",
    "LayerAttribution",
    "PerturbationAttribution",
    "TargetType",
    "TensorOrTupleOfTensors",
    "_format_additional_forward_args",
    "_format_baseline",
    "_format_callable_baseline",
    "_format_output",
    "_format_outputs",
    "_format_tensor_into_tuples",
    "_is_tuple",
    "_reduce_list",
    "_run_forward",
    "_select_targets",
    "_sort_key_list",
    "_validate_input",
    "is_target_selection",
    "log_usage",
    "with_progress",
]

TensorOrTupleOfTensors = TypeVar("TensorOrTupleOfTensors", Tensor, tuple[Tensor, ...])
_Item = TypeVar("_Item")
_Method = TypeVar("_Method", bound=Callable[..., Any])


def with_progress(chunks: Sequence[_Item], show_progress: bool, desc: str) -> Iterable[_Item]:
    """Iterate over chunks, with Captum's progress bar if `show_progress`."""
    if not show_progress:
        return chunks
    iterator: Iterable[_Item] = progress(chunks, desc=desc, total=len(chunks))
    return iterator


def log_usage() -> Callable[[_Method], _Method]:
    """Captum's decorator of `attribute`, typed to keep the method's signature.

    The decorated method has the attribute `__wrapped__`, which NoiseTunnel calls.
    """
    return cast(Callable[[_Method], _Method], _log_usage())


def is_target_selection(code: CodeType) -> bool:
    """Return whether this is the code by which Captum selects a target from an output."""
    return code in (_select_targets.__code__, _verify_select_column.__code__)
