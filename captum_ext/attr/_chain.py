"""The chain of wrapped methods: a wrapper, the method that it wraps, and so on to the innermost."""

import copy
import inspect
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import captum.attr
from captum.attr import Attribution, GuidedGradCam, LayerAttribution, NeuronAttribution
from torch import Tensor
from torch.nn import Module
from torch.utils._pytree import tree_leaves

from captum_ext._checks import closest
from captum_ext._engine.modules import Forward, Tensors, root_module
from captum_ext._engine.sharing import use_model
from captum_ext._errors import ArgumentError
from captum_ext.attr._method_info import MethodInfo

# The default of a wrapper's argument that is passed on only where the caller passed it: some
# methods take no `target`, and each of the others has its own default.
UNSET: Any = ...

# Captum's methods that set no hooks, so that threads may run them at once.
_WITHOUT_HOOKS = {
    getattr(captum.attr, name)
    for name in (
        "FeatureAblation", "FeaturePermutation", "GradientShap", "InputXGradient",
        "IntegratedGradients", "KernelShap", "Lime", "NoiseTunnel", "Occlusion", "Saliency",
        "ShapleyValueSampling", "ShapleyValues",
    )
}  # fmt: skip


def drop_unset(**arguments: Any) -> dict[str, Any]:
    """The arguments without those that are `UNSET`."""
    return {name: value for name, value in arguments.items() if value is not UNSET}


def wrapped_method(method: Attribution) -> Attribution | None:
    """The method inside a wrapper, such as Captum's NoiseTunnel or ours; None inside another."""
    inner = getattr(method, "attribution_method", None)
    return inner if isinstance(inner, Attribution) else None


def chain(method: Attribution) -> Iterator[Attribution]:
    """A method, the one that it wraps, and so on."""
    inner: Attribution | None = method
    while inner is not None:
        yield inner
        inner = wrapped_method(inner)


def innermost(method: Attribution) -> Attribution:
    """The last method of the chain."""
    *_, last = chain(method)
    return last


def call_attribute(method: Attribution, inputs: Tensor | Tensors, **arguments: Any) -> Any:
    """The result of `method.attribute`, also while other threads explain the model.

    Captum's hooks act in all threads, so a method that sets hooks has the model alone meanwhile.
    Captum's gradient methods switch `requires_grad` of their inputs on and off, and inputs may be
    shared by threads: the method gets copies, to which a model may write, too.
    """
    attribute: Callable[..., Any] = method.attribute
    if isinstance(method, MethodInfo):
        return attribute(inputs, **arguments)
    inputs = tuple(_copied(x) for x in inputs) if isinstance(inputs, tuple) else _copied(inputs)
    with use_model(_explained_modules(innermost(method)), alone=_sets_hooks(method)):
        return attribute(inputs, **arguments)


def _copied(x: Any) -> Any:
    return x.detach().clone() if isinstance(x, Tensor) and not x.requires_grad else x


def _sets_hooks(method: Attribution) -> bool:
    """Return whether `method` sets hooks of Captum, or of a library that we do not know."""
    for inner in chain(method):
        if isinstance(inner, MethodInfo):
            return False
        if type(inner) not in _WITHOUT_HOOKS:
            return True
    return False


def _explained_modules(method: Attribution) -> list[Module] | None:
    """The model, or its layers if it is a plain function; None if the modules are unknown."""
    root = root_module(method.forward_func)
    if root is not None:
        return [root]
    layers = [x for x in tree_leaves(vars(method).get("layer")) if isinstance(x, Module)]
    return layers or None


def keywords_of(method: Attribution) -> set[str] | None:
    """The names that `attribute` takes; None if it takes any name.

    Those of a wrapper include the names of the method that it wraps.
    """
    _, *parameters = inspect.signature(type(method).attribute).parameters.values()
    names = {p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
    if all(p.kind != p.VAR_KEYWORD for p in parameters):
        return names
    inner = wrapped_method(method)
    inner_names = None if inner is None else keywords_of(inner)
    return None if inner_names is None else names | inner_names


def check_keywords(method: Attribution, names: Iterable[str]) -> None:
    """Raise Python's TypeError, before a model runs, for a name that no method of the chain takes.

    Raises:
        TypeError: an unexpected name; the message has the closest known ones.
    """
    known = keywords_of(method)
    names_of_chain = " of ".join(type(m).__name__ for m in chain(method))
    if known is None:
        return
    for name in names:
        if name not in known:
            raise TypeError(
                f"{names_of_chain}.attribute() got an unexpected keyword argument {name!r}. "
                f"Closest: {closest(name, sorted(known - {'inputs'}))}."
            )


def with_forward_func(method: Attribution, forward_func: Forward) -> Attribution:
    """A shallow copy of `method`, and of all that it wraps, that explains `forward_func`.

    Raises:
        ValueError: a method of a layer or a neuron, or one that needs the module itself.
    """
    needs_module = LayerAttribution | NeuronAttribution | GuidedGradCam
    if isinstance(method, needs_module) or hasattr(method, "model"):
        raise ArgumentError(
            f"`attribution_method` {type(method).__name__} needs the module itself, so it cannot "
            f"explain a function of it."
        )
    copied = copy.copy(method)
    copied.forward_func = forward_func
    inner = wrapped_method(method)
    if inner is not None:
        copied.attribution_method = with_forward_func(inner, forward_func)
    return copied
