"""Types of the layer methods: one layer gives a tensor, a list of layers a list.

A method's class is generic in the layers that it was made with. `attribute` is annotated with
`Maps` of them, and `maps_by_layer` tells a type checker what these are.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Concatenate, Generic, ParamSpec, Protocol, cast, overload

from torch import Tensor
from torch.nn import Module

Layer = Module | str
Arguments = ParamSpec("Arguments")

if TYPE_CHECKING:
    from typing_extensions import TypeVar  # Python's own has a `default` from 3.13 on

    # A list[Any], since a list[Conv2d] is no list[Module].
    LayerOrList = TypeVar(
        "LayerOrList", bound=Layer | list[Any], default=Layer | list[Any], covariant=True
    )
else:
    from typing import TypeVar

    LayerOrList = TypeVar("LayerOrList", covariant=True)


class Maps(Generic[LayerOrList]):
    """The maps of one layer, a tensor, or of a list of layers, a list. It has no instances."""


class _MapsMethod(Protocol[Arguments, LayerOrList]):
    """A method with these arguments, on an object that was made with these layers."""

    @overload
    def __get__(
        self: "_MapsMethod[Arguments, Layer]", instance: object, owner: Any = None
    ) -> Callable[Arguments, Tensor]: ...
    @overload
    def __get__(
        self: "_MapsMethod[Arguments, list[Any]]", instance: object, owner: Any = None
    ) -> Callable[Arguments, list[Tensor]]: ...
    @overload
    def __get__(
        self, instance: object, owner: Any = None
    ) -> Callable[Arguments, Tensor | list[Tensor]]: ...


def maps_by_layer(
    method: Callable[Concatenate[Any, Arguments], Maps[LayerOrList]],
) -> _MapsMethod[Arguments, LayerOrList]:
    """The method itself, whose result is typed by the layers of its object."""
    return cast(_MapsMethod[Arguments, LayerOrList], method)
