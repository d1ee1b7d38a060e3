"""`LayerCapture` as two functions, for tests that need one pass."""

from typing import Any

from captum_ext._engine.capture import LayerCapture


def layer_activations(
    forward_func: Any,
    layers: Any,
    inputs: Any,
    target: Any = None,
    extra: Any = None,
    **options: Any,
) -> Any:
    return LayerCapture(forward_func, layers, **options).activations(inputs, target, extra)


def layer_gradients(
    forward_func: Any, layers: Any, inputs: Any, target: Any = None, extra: Any = None,
    *, grad_kwargs: Any = None, **options: Any,
) -> Any:  # fmt: skip
    capture = LayerCapture(forward_func, layers, **options)
    return capture.activations_and_gradients(inputs, target, extra, grad_kwargs)
