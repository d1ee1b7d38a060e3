"""The chain of wrapped methods: a wrapper, the method that it wraps, and so on to the innermost."""

import inspect
from collections.abc import Iterable, Iterator
from typing import Any

from captum.attr import Attribution

from captum_ext._checks import closest

# The default of a wrapper's argument that is not handed on unless it is passed: some methods take
# no `target`, and of the others each has a default of its own.
NOT_PASSED: Any = ...


def passed(**arguments: Any) -> dict[str, Any]:
    """The arguments that were passed."""
    return {name: value for name, value in arguments.items() if value is not NOT_PASSED}


def wrapped(method: Attribution) -> Attribution | None:
    """The method that a wrapper, such as Captum's NoiseTunnel or ours, is made with."""
    inner = getattr(method, "attribution_method", None)
    return inner if isinstance(inner, Attribution) else None


def chain(method: Attribution) -> Iterator[Attribution]:
    """A method, the one that it wraps, and so on."""
    inner: Attribution | None = method
    while inner is not None:
        yield inner
        inner = wrapped(inner)


def innermost(method: Attribution) -> Attribution:
    """The last method of the chain."""
    *_, last = chain(method)
    return last


def keywords_of(method: Attribution) -> set[str] | None:
    """The names that `attribute` takes, a wrapper's with those of its method; None: any name."""
    _, *parameters = inspect.signature(type(method).attribute).parameters.values()
    own = {p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
    if all(p.kind != p.VAR_KEYWORD for p in parameters):
        return own
    inner = wrapped(method)
    others = None if inner is None else keywords_of(inner)
    return None if others is None else own | others


def check_keywords(method: Attribution, names: Iterable[str]) -> None:
    """Raise Python's TypeError, before a model runs, for a name that no method of the chain takes.

    Raises:
        TypeError: an unexpected name; the closest ones are named.
    """
    known = keywords_of(method)
    if known is None:
        return
    for name in names:
        if name not in known:
            raise TypeError(
                f"{type(innermost(method)).__name__}.attribute() got an unexpected keyword "
                f"argument {name!r}. Closest: {closest(name, sorted(known - {'inputs'}))}."
            )
