"""Checks that every attribution makes of its arguments before and while the model runs."""

import inspect
import threading
from collections.abc import Callable, Mapping
from functools import wraps
from typing import Any, TypeVar, cast

from torch import Tensor

from captum_ext._checks import check_inputs
from captum_ext._compat import BaselineType, _format_baseline, _validate_input
from captum_ext._engine.faults import explained_faults, refuse_unbatched
from captum_ext._engine.modules import Tensors
from captum_ext._engine.targets import check_target
from captum_ext._repr import bounded_repr

Method = TypeVar("Method", bound=Callable[..., Any])

# Names in other packages, and the lines that do the same here.
_CONSTRUCTOR_HABITS = ("model", "target_layer", "target_layers", "use_cuda")
_ATTRIBUTE_HABITS = ("input_tensor", "targets")


class _OuterCall(threading.local):
    """The lock that a thread's outermost call of a method holds."""

    def __init__(self) -> None:
        self.lock = threading.Lock()


_outer_call = _OuterCall()


def checked_baselines(baselines: BaselineType, inputs: Tensors) -> tuple[Any, ...]:
    """The baselines in Captum's form, one for each of the inputs.

    Raises:
        AssertionError: they do not fit the inputs. Captum's own error shows all their values.
    """
    formatted: tuple[Any, ...] = _format_baseline(baselines, inputs)
    try:
        _validate_input(inputs, formatted)
    except (AssertionError, IndexError) as error:
        received, expected = (
            ", ".join(
                str(tuple(b.shape)) if isinstance(b, Tensor) else bounded_repr(b) for b in values
            )
            for values in (formatted, inputs)
        )
        raise AssertionError(
            f"`baselines` must be a number, or a tensor of the shape of the inputs or of one "
            f"example, for each of the inputs {expected}, got {received}."
        ) from error
    return formatted


def refuse_constructor_habits(cls: type, names: Mapping[str, Any]) -> None:
    """Raise a TypeError for a keyword that other packages have in their constructors."""
    name = next((name for name in names if name in _CONSTRUCTOR_HABITS), None)
    if name is None:
        return
    parameters = list(inspect.signature(cls).parameters)
    if name in parameters:
        return
    arguments = {"forward_func": "model", "layer": "model.layer4", "attribution_method": "method"}
    call = ", ".join(arguments[p] for p in parameters if p in arguments)
    raise TypeError(
        f"{cls.__name__}() has no argument {name!r}; its arguments have Captum's names: "
        f"{cls.__name__}({call}).attribute(x, target=3)."
    )


def checks_arguments(attribute: Method) -> Method:
    """Check the inputs and the target of a method that explains a model.

    The errors of the model that come from its inputs are raised again with their cause. What a
    wrapper passes on to the methods in it is not checked again, crop by crop. Write the decorator
    under `@log_usage()`: Captum's NoiseTunnel calls what lies under that one.
    """
    signature = inspect.signature(attribute)
    parameters = list(signature.parameters)
    default = signature.parameters["target"].default if "target" in parameters else None
    has_targets = "targets" in parameters
    position = parameters.index("target") - 1 if "target" in parameters else None

    @wraps(attribute)
    def checked(self: Any, *args: Any, **kwargs: Any) -> Any:
        if _outer_call.lock.locked():
            return attribute(self, *args, **kwargs)
        for habit in _ATTRIBUTE_HABITS:
            if habit in kwargs and not has_targets:
                raise TypeError(
                    f"{type(self).__name__}.{attribute.__name__}() has no argument {habit!r}; its "
                    f"arguments have Captum's names: "
                    f".{attribute.__name__}(x, target=3) for one class, target=[3, 5] for one of "
                    f"each example."
                )
        if not args and "inputs" not in kwargs:
            return attribute(self, **kwargs)  # Python's own error
        inputs = args[0] if args else kwargs["inputs"]
        check_inputs(inputs)
        target = kwargs.get("target")
        if position is not None and position < len(args):
            target = args[position]
        if target is not default:
            check_target(target)
        with (
            _outer_call.lock,
            explained_faults(self.forward_func, inputs),
            refuse_unbatched(self.forward_func, inputs),
        ):
            return attribute(self, *args, **kwargs)

    return cast(Method, checked)
