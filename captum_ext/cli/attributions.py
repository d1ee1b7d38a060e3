"""The attributions that `captum-ext evaluate` is asked for, by name or with options."""

import inspect
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

from captum_ext.cli.methods import (
    METHODS,
    ON_REQUEST,
    Method,
    arguments_of,
    attribution,
    find_methods,
)

if TYPE_CHECKING:
    from captum.attr import Attribution
    from torch import Tensor

    from captum_ext.zoo import LoadedModel

_WRAPPERS = {"sess": "SESSWrapper", "augmented-sr": "AugmentedSR"}
_KEYS = ("method", "layer", "arguments", *_WRAPPERS)
_REFUSALS = (ValueError, RuntimeError, AssertionError)
# What a trial runs of the methods that take minutes.
_TRIED = {"RISE": {"n_masks": 1}, "FIDO": {"n_steps": 1}}


class Asked(NamedTuple):
    """An attribution that is asked for.

    Attributes:
        name: what it is called in the results.
        kind: a method of `captum-ext methods`, or a class that takes a model.
        layer: of the layer method; None is the command's.
        wrappers: around it, from the inside out, with their options.
        arguments: of `attribute`.
    """

    name: str
    kind: "Method | type[Attribution]"
    layer: str | None = None
    wrappers: Mapping[str, Mapping[str, Any]] = {}
    arguments: Mapping[str, Any] = {}

    @property
    def has_options(self) -> bool:
        """Whether there is more of it than the name of a method."""
        return not isinstance(self.kind, Method) or bool(self.wrappers or self.arguments)


def find_attributions(asked: Iterable[str] | Mapping[str, Any] | None) -> list[Asked]:
    """What is asked for by names, or by a mapping from names to options; None is all layer methods.

    Raises:
        InputError: an unknown name or option.
    """
    if asked is None:
        return [Asked(method.name, method) for method in METHODS]
    if isinstance(asked, Mapping):
        return [_with_options(str(name), options) for name, options in asked.items()]
    kinds = dict.fromkeys(_find(name) for name in asked)
    return [Asked(k.name if isinstance(k, Method) else k.__name__, k) for k in kinds]


def _with_options(name: str, options: Any) -> Asked:
    """An entry of a mapping.

    ``name: {}``, ``name: method`` or ``name: {method: ..., sess: {...}, arguments: {...}}``.
    """
    from captum_ext._checks import closest
    from captum_ext._errors import InputError

    if name.splitlines() != [name]:
        raise InputError(f"method: expected names of one line, got {name!r}")
    options = {} if options is None else options
    options = {"method": options} if isinstance(options, str) else options
    if not isinstance(options, Mapping):
        raise InputError(f"method: {name}: expected options of {', '.join(_KEYS)}, got {options!r}")
    for key, value in options.items():
        if key not in _KEYS:
            raise InputError(
                f"method: {name}: unknown key {key!r}. Closest: {closest(str(key), _KEYS)}"
            )
        if key in ("method", "layer"):
            if not isinstance(value, str):
                raise InputError(f"method: {name}: {key}: expected text, got {value!r}")
        elif not isinstance(value, Mapping | None):
            raise InputError(f"method: {name}: {key}: expected a mapping, got {value!r}")
    kind = _find(options.get("method", name))
    if "layer" in options and not (isinstance(kind, Method) and kind.at_layer):
        raise InputError(f"method: {name}: {_class_name(kind)} takes no layer")
    wrappers = {key: _plain(options[key] or {}) for key in options if key in _WRAPPERS}
    arguments = _plain(options.get("arguments") or {})
    return Asked(name, kind, options.get("layer"), wrappers, arguments)


def _plain(value: Any) -> Any:
    """With tuples, as Captum wants them, in place of lists."""
    if isinstance(value, Mapping):
        return {key: _plain(inner) for key, inner in value.items()}
    return tuple(_plain(inner) for inner in value) if isinstance(value, list) else value


def _find(name: str) -> "Method | type[Attribution]":
    from captum_ext._checks import closest
    from captum_ext._errors import InputError

    try:
        return find_methods([name], "")[0]
    except InputError:
        classes = _classes()
        if name in classes:
            return classes[name]
        names = [*(method.name for method in (*METHODS, *ON_REQUEST)), *classes]
        raise InputError(f"unknown method {name!r}. Closest: {closest(name, names)}") from None


def _class_name(kind: "Method | type[Attribution]") -> str:
    return kind.class_name if isinstance(kind, Method) else kind.__name__


def _classes() -> "dict[str, type[Attribution]]":
    """The classes of Captum and of this package that are made of a model alone."""
    import captum.attr

    import captum_ext.attr

    found = {}
    for name, kind in [*vars(captum.attr).items(), *vars(captum_ext.attr).items()]:
        if not isinstance(kind, type) or not issubclass(kind, captum.attr.Attribution):
            continue
        needed = [
            parameter.name
            for parameter in inspect.signature(kind).parameters.values()
            if parameter.default is parameter.empty
        ]
        is_base = "._utils." in kind.__module__
        if needed in (["model"], ["forward_func"]) and not is_base:
            found[name] = kind
    return found


def make_attributions(
    asked: Iterable[Asked],
    loaded: "LoadedModel",
    x: "Tensor",
    *,
    layer: str | None,
    batch_size: int,
    seed: int,
    keep_going: bool,
) -> tuple[dict[str, tuple["Attribution", dict[str, Any]]], list[str]]:
    """Attributions of a model and arguments of their `attribute`, each tried on a picture.

    Args:
        asked: which.
        loaded: the model.
        x: the picture, (1, 3, H, W), on the model's device.
        layer: of the layer methods that do not name one; None is the model's own.
        batch_size: as many copies of pictures a method takes at once that has `internal_batch_size`
            and would take all of them.
        seed: of the wrappers that draw numbers when they are made.
        keep_going: leave out one that does not work on this model, with a note, instead of raising.

    Returns:
        The attributions, and the notes.

    Raises:
        InputError: one does not work and `keep_going` is False, or none does.
    """
    import torch

    from captum_ext import zoo
    from captum_ext._errors import InputError

    made: dict[str, tuple[Attribution, dict[str, Any]]] = {}
    notes = []
    target = torch.zeros(1, dtype=torch.int64, device=x.device)
    for one in asked:
        where, reshape_transform = zoo.find_layer(loaded, x, one.layer or layer)
        refusals = (*_REFUSALS, TypeError, LookupError) if one.has_options else _REFUSALS
        at_layer = isinstance(one.kind, Method) and one.kind.at_layer
        at = f"at layer {where} of" if at_layer else "on"
        try:
            found, kwargs = _made(one, loaded, where, reshape_transform, batch_size, seed)
            found.attribute(x, target=target, **_short(one, kwargs))
        except refusals as error:
            said = f"{one.name} does not work {at} {loaded.name}: {error}"
            if not keep_going:
                raise InputError(said) from error
            notes.append(f"{said} (left out)")
            continue
        made[one.name] = (found, kwargs)
    if not made:
        where = zoo.find_layer(loaded, x, layer)[0]
        raise InputError(f"no method works at layer {where} of {loaded.name}: name another --layer")
    return made, notes


def _short(one: Asked, kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of a trial. What is wrong stays as it is, to be refused."""
    few = _TRIED.get(_class_name(one.kind), {})
    cut = {
        key: n
        for key, n in few.items()
        if isinstance(kwargs.get(key, n), int) and kwargs.get(key, n) >= n
    }
    return {**kwargs, **cut}


def _made(
    one: Asked,
    loaded: "LoadedModel",
    layer: str,
    reshape_transform: Any,
    batch_size: int,
    seed: int,
) -> tuple["Attribution", dict[str, Any]]:
    import torch

    import captum_ext.attr

    kwargs: dict[str, Any] = {}
    if isinstance(one.kind, Method):
        found = attribution(one.kind, loaded, layer, reshape_transform)
        kwargs |= arguments_of(one.kind)
    else:
        found = one.kind(loaded.module)
        known = inspect.signature(one.kind.attribute).parameters
        if "internal_batch_size" in known and known["internal_batch_size"].default is None:
            kwargs["internal_batch_size"] = batch_size
    for key, options in one.wrappers.items():
        drawn = {"generator": torch.Generator().manual_seed(seed)} if key == "augmented-sr" else {}
        found = getattr(captum_ext.attr, _WRAPPERS[key])(found, **{**drawn, **options})
    return found, {**kwargs, **one.arguments}
