"""A warning for Captum's methods that change gradients at some activation functions only."""

import re
from collections.abc import Iterator
from weakref import WeakSet

from captum.attr import (
    Attribution,
    Deconvolution,
    DeepLift,
    GuidedBackprop,
    GuidedGradCam,
    LayerDeepLift,
    NeuronDeconvolution,
    NeuronDeepLift,
    NeuronGuidedBackprop,
)
from torch import nn
from torch.nn import Module

from captum_ext._checks import warn
from captum_ext._compat import SUPPORTED_NON_LINEAR
from captum_ext._engine.modules import root_module
from captum_ext.attr._chain import innermost

_AT_RELU = (GuidedBackprop, Deconvolution, GuidedGradCam, NeuronGuidedBackprop, NeuronDeconvolution)
_AT_SEVERAL = (DeepLift, LayerDeepLift, NeuronDeepLift)  # and their subclasses with baselines
_DEEP_LIFT_RULES = tuple(
    cls for cls in SUPPORTED_NON_LINEAR if cls.__module__ == "torch.nn.modules.activation"
)
_ACTIVATION = re.compile(r"relu|elu|silu|swish|mish|hardtanh|softplus|threshold", re.IGNORECASE)
_warned: "WeakSet[Attribution]" = WeakSet()


def warn_of_plain_gradients(method: Attribution) -> None:
    """Warn once for each object if Captum's method leaves some activation functions unchanged.

    Guided backpropagation, deconvolution and DeepLift have rules of their own for the backward
    pass. Captum sets them by hooks at modules of some classes. At other activation functions, and
    at those that are no modules, the gradient is the plain one. Functions are noticed only in a
    model without any module that Captum hooks.

    Args:
        method: any attribution, perhaps in wrappers.
    """
    inner = innermost(method)
    root = root_module(inner.forward_func)
    if root is None or inner in _warned or not isinstance(inner, (*_AT_RELU, *_AT_SEVERAL)):
        return
    is_at_relu = isinstance(inner, _AT_RELU)
    rules = (nn.ReLU,) if is_at_relu else _DEEP_LIFT_RULES
    activations = list(_activation_modules(root))
    others = sorted({type(part).__name__ for part in activations if not isinstance(part, rules)})
    if others:
        where = f"at {', '.join(others)} the gradient is the plain one"
    elif not any(isinstance(part, rules) for part in root.modules()):
        where = "the model has none, so the map is made of plain gradients"
    else:
        return
    _warned.add(inner)
    names = "nn.ReLU" if is_at_relu else "nn.ReLU, nn.ELU, nn.Softplus and others"
    warn(f"Captum's {type(inner).__name__} acts at modules of {names} only: {where}.")


def _activation_modules(root: Module) -> Iterator[Module]:
    """The modules without parts that are activation functions like ReLU, by their class's name."""
    for part in root.modules():
        if not part._modules and _ACTIVATION.search(type(part).__name__):
            yield part
