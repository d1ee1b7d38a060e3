"""Fingerprints of attributions, to recognise stored runs."""

from captum.attr import Attribution
from torch import Tensor
from torch.nn import Module
from torch.utils._pytree import tree_leaves

from captum_ext._identity import json_value, versioned_name
from captum_ext.attr._chain import wrapped_method


def attribution_fingerprint(argument: str, attribution: Attribution, model: Module) -> str:
    """The name, layers, options and functions of an attribution and of those it wraps.

    Args:
        argument: the argument of the attribution, as errors name it.
        attribution: any attribution.
        model: the model that it explains, for the layers' names.

    Raises:
        ValueError: an option is a function without a version, see `versioned_name`.
    """
    names = {module: name for name, module in model.named_modules()}
    options = []
    is_captums = type(attribution).__module__.partition(".")[0] == "captum"
    for name, value in sorted(vars(attribution).items()):
        if is_captums and name.startswith("_"):  # Occlusion changes these in each call
            continue
        values = value if isinstance(value, list | tuple) else [value]
        if all(isinstance(item, int | float | str | None) for item in values):
            options.append(f"{name}={value!r}")
        elif name == "layer":
            options.append(f"layer={', '.join(names.get(layer, '?') for layer in values)}")
        for leaf in tree_leaves(value):
            if _is_function_option(name, leaf, attribution):
                options.append(f"{name}={versioned_name(f'{argument}: {name}', leaf)}")
            elif isinstance(leaf, Tensor) and not is_captums:  # Captum's keep tensors of a call
                options.append(f"{name}={json_value(argument, leaf)}")
    inner = wrapped_method(attribution)
    if inner is not None:
        options.insert(0, attribution_fingerprint(argument, inner, model))
    return f"{attribution.get_name()}({', '.join(options)})"


def _is_function_option(name: str, value: object, attribution: Attribution) -> bool:
    """Return whether a value is a function that was passed as an option.

    The model, modules and the attribution's own methods do not count. Nor does Captum's
    `gradient_func`, which the methods for neurons replace in each call.
    """
    if not callable(value) or isinstance(value, Module) or name == "forward_func":
        return False
    if name == "gradient_func" and str(value.__module__).partition(".")[0] == "captum":
        return False
    return getattr(value, "__self__", None) is not attribution
