"""The attributions of `captum-ext evaluate`: methods by name, or with options."""

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

from captum_ext.cli.methods import (
    Method,
    default_methods,
    find_methods,
    kebab,
    parameters_of,
    required_of,
)

if TYPE_CHECKING:
    from captum.attr import Attribution
    from torch import Tensor

    from captum_ext.zoo import LoadedModel


class Request(NamedTuple):
    """An attribution that the user asks for.

    Attributes:
        name: the attribution's name in the results.
        method: the method.
        layer: the layer to explain; None is the command's.
        wrappers: options of the wrappers around the method, from the inside out, by their keys.
        arguments: arguments of `attribute`.
    """

    name: str
    method: Method
    layer: str | None = None
    wrappers: Mapping[str, Mapping[str, Any]] = {}
    arguments: Mapping[str, Any] = {}

    @property
    def expected_errors(self) -> tuple[type[Exception], ...]:
        """The errors that it raises on a model that it cannot explain, or for wrong options."""
        has_options = bool(self.wrappers or self.arguments)
        return (*self.method.expected_errors, *((TypeError, LookupError) if has_options else ()))


def wrapper_classes() -> "dict[str, type[Attribution]]":
    """This package's wrappers of attributions, by their keys: "sess" is `SESSWrapper`."""
    import captum.attr

    import captum_ext.attr

    return {
        kebab(name.removesuffix("Wrapper")): cls
        for name, cls in vars(captum_ext.attr).items()
        if isinstance(cls, type)
        and issubclass(cls, captum.attr.Attribution)
        and required_of(cls) == ["attribution_method"]
    }


def find_attributions(
    methods: Iterable[str] | Mapping[str, Any] | None,
) -> list[Request]:
    """The attributions of a list of names, or of a mapping from names to options.

    Args:
        methods: names of methods, or the mapping; None is the default methods.

    Raises:
        InputError: an unknown name or option.
    """
    if methods is None:
        return [Request(method.name, method) for method in default_methods()]
    if isinstance(methods, Mapping):
        return [_with_options(str(name), options) for name, options in methods.items()]
    return [Request(method.name, method) for method in find_methods(list(methods), image="")]


def _with_options(name: str, options: Any) -> Request:
    """An entry of a mapping.

    ``name: {}``, ``name: method`` or ``name: {method: ..., sess: {...}, arguments: {...}}``.
    """
    from captum_ext._checks import closest
    from captum_ext._errors import InputError
    from captum_ext._repr import bounded_repr

    if name.splitlines() != [name]:
        raise InputError(f"method: expected names of one line, got {bounded_repr(name)}")
    options = {} if options is None else options
    options = {"method": options} if isinstance(options, str) else options
    wrappers = wrapper_classes()
    keys = ("method", "layer", "arguments", *wrappers)
    if not isinstance(options, Mapping):
        raise InputError(
            f"method: {name}: expected options of {', '.join(keys)}, got {bounded_repr(options)}"
        )
    for key, value in options.items():
        if key not in keys:
            raise InputError(
                f"method: {name}: unknown key {bounded_repr(key)}. Closest: "
                f"{closest(str(key), keys)}"
            )
        if key in ("method", "layer"):
            if not isinstance(value, str):
                raise InputError(f"method: {name}: {key}: expected text, got {bounded_repr(value)}")
        elif not isinstance(value, Mapping | None):
            raise InputError(
                f"method: {name}: {key}: expected a mapping, got {bounded_repr(value)}"
            )
    (method,) = find_methods([options.get("method", name)], image="")
    if "layer" in options and not method.at_layer:
        raise InputError(f"method: {name}: {method.cls.__name__} takes no layer")
    wrapped = {key: _with_tuples(options[key] or {}) for key in options if key in wrappers}
    arguments = _with_tuples(options.get("arguments") or {})
    return Request(name, method, options.get("layer"), wrapped, arguments)


def _with_tuples(value: Any) -> Any:
    """The value with tuples, which Captum expects, in place of YAML's lists."""
    if isinstance(value, Mapping):
        return {key: _with_tuples(inner) for key, inner in value.items()}
    return tuple(_with_tuples(inner) for inner in value) if isinstance(value, list) else value


def make_attributions(
    requests: Iterable[Request],
    loaded: "LoadedModel",
    x: "Tensor",
    *,
    layer: str | None,
    batch_size: int,
    seed: int,
    keep_going: bool,
) -> tuple[dict[str, tuple["Attribution", dict[str, Any]]], list[str]]:
    """Attributions of a model with arguments of their `attribute`, each tried on an input.

    Args:
        requests: the attributions to make.
        loaded: the model.
        x: the input, (1, 3, H, W), on the model's device.
        layer: the layer of the methods that do not name one; None is the model's own.
        batch_size: inputs in one pass of a method that would take all at once.
        seed: of the wrappers that draw random numbers.
        keep_going: leave out an attribution that does not work on this model, with a note, instead
            of raising.

    Returns:
        The attributions, and the notes.

    Raises:
        InputError: one does not work and `keep_going` is False, or none does.
    """
    import torch

    from captum_ext import zoo
    from captum_ext._errors import InputError

    attributions: dict[str, tuple[Attribution, dict[str, Any]]] = {}
    notes = []
    target = torch.zeros(1, dtype=torch.int64, device=x.device)
    for request in requests:
        layer_name, reshape_transform = zoo.find_layer(loaded, x, request.layer or layer)
        method = request.method
        arguments = {**method.attribute_arguments(x, batch_size), **request.arguments}
        try:
            attribution = method.attribution(loaded, layer_name, reshape_transform)
            attribution = _wrapped(attribution, request, seed)
            attribution.attribute(x, target=target, **_trial_arguments(method, arguments))
        except request.expected_errors as error:
            at = f"at layer {layer_name} of" if method.at_layer else "on"
            note = f"{request.name} does not work {at} {loaded.name}: {error}"
            if not keep_going:
                raise InputError(note) from error
            notes.append(f"{note} (left out)")
            continue
        attributions[request.name] = (attribution, arguments)
    if not attributions:
        layer_name = zoo.find_layer(loaded, x, layer)[0]
        raise InputError(
            f"no method works at layer {layer_name} of {loaded.name}: name another --layer"
        )
    return attributions, notes


def _wrapped(attribution: "Attribution", request: Request, seed: int) -> "Attribution":
    import torch

    for key, options in request.wrappers.items():
        wrapper = wrapper_classes()[key]
        if "generator" in parameters_of(wrapper):
            options = {"generator": torch.Generator().manual_seed(seed), **options}
        attribution = wrapper(attribution, **options)
    return attribution


def _trial_arguments(method: Method, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of a short trial: one step or mask of the masking methods that take minutes.

    Invalid values stay, so that the trial finds them.
    """
    if method.family != "masking" or method.at_layer:
        return dict(arguments)
    short = {}
    for name in ("n_steps", "n_masks"):
        parameter = method.arguments.get(name)
        if parameter is not None:
            value = arguments.get(name, parameter.default)
            if isinstance(value, int) and value >= 1:
                short[name] = 1
    return {**arguments, **short}
