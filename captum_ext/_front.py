"""Run a model up to a layer, and no further."""

from typing import Any

from torch.nn import Module

from captum_ext._compat import _run_forward
from captum_ext._model import Forward, Seen, Tensors, copies, intercept


class _ReachedError(BaseException):
    """The layer has run, and nothing behind it is needed. No model's `except Exception` has it."""


def up_to_layer(
    forward_func: Forward, layer: Module, inputs: Tensors, additional_forward_args: Any = None
) -> Tensors:
    """The tensors that a layer puts out, with a graph to `inputs` where gradients are switched on.

    What lies behind the layer does not run, but for DataParallel, whose replicas run whole. Whether
    the layer would run a second time is not seen.

    Raises:
        ValueError: the layer did not run.
    """
    seen = Seen(forward_func, [layer], None)

    def keep(index: int, tensors: Tensors) -> Tensors:
        seen.by_device[index][tensors[0].device] = tensors
        if not seen.parallel:
            raise _ReachedError
        return copies(tensors)  # the model may go on in place

    try:
        with intercept([layer], keep, every_thread=seen.parallel):
            _run_forward(forward_func, copies(inputs), None, additional_forward_args)
    except _ReachedError:
        pass
    return seen.gather()[0]
