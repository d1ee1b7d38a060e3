"""Calls of attribution methods, made for a whole batch or for some of its examples."""

import warnings
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Generator, Tensor, nn

from tests.fuzz.networks import DrawnNet
from tests.fuzz.properties import (
    RefusedError,
    assert_close,
    assert_finite,
    assert_same,
    attempt,
    tensors_of,
    unchanged,
)
from tests.fuzz.strategies import Case


@dataclass
class Call:
    """A call of an attribution method.

    Attributes:
        build: makes the method from the network, the layer's name and the constructor's options.
        case: the network and the arguments that all methods have.
        init: options of the constructor.
        arguments: options of `attribute`.
        has_generator: "init", "attribute" or "" where the method draws nothing.
        keeps_rng: whether the call leaves the global random state alone.
    """

    build: Callable[..., Any]
    case: Case
    init: dict[str, Any]
    arguments: dict[str, Any]
    has_generator: str = ""
    keeps_rng: bool = True
    net: DrawnNet = field(init=False, repr=False)

    def __post_init__(self) -> None:
        self.net = self.case.network()

    def method(self) -> Any:
        drawn = {"generator": Generator().manual_seed(3)} if self.has_generator == "init" else {}
        return self.build(self.net, self.case.layer, **self.init, **drawn)

    def examples(self, rows: list[int] | None = None) -> dict[str, Any]:
        """The arguments for the examples `rows`, in contiguous memory; None is the whole batch."""
        case = self.case
        arguments = {"inputs": case.inputs(), "target": case.target, **self.arguments}
        if (extra := case.extra()) is not None:
            arguments["additional_forward_args"] = extra
        if self.has_generator == "attribute":
            arguments["generator"] = Generator().manual_seed(3)
        if rows is None:
            return arguments

        def cut(value: Any) -> Any:
            if isinstance(value, tuple):
                return tuple(cut(v) for v in value)
            has_examples = isinstance(value, Tensor) and value.dim() and len(value) == case.n
            return value[rows].detach().clone() if has_examples else value

        for name in {"inputs", "baselines", "additional_forward_args"} & arguments.keys():
            arguments[name] = cut(arguments[name])
        target = case.target
        if isinstance(target, list):
            arguments["target"] = [target[i] for i in rows]
        elif isinstance(target, Tensor) and target.dim() and target.numel() == case.n:
            arguments["target"] = target[rows]
        return arguments

    def run(self, rows: list[int] | None = None) -> Any:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return self.method().attribute(**self.examples(rows))

    def with_dtype(self, dtype: torch.dtype) -> "Call":
        """The same call in another dtype."""
        call = replace(self, case=replace(self.case, spec=replace(self.case.spec, dtype=dtype)))
        call.net.load_state_dict(self.net.state_dict())
        return call


Activations = dict[str, list[Tensor]]


def run_model(net: nn.Module, arguments: dict[str, Any]) -> Activations:
    """The tensors of all modules, by the module's name, and the gradients of the input."""
    seen: Activations = {}
    hooks = [
        module.register_forward_hook(
            lambda module, args, output, name=name: seen.update(
                {name: [t.clone() for t in tensors_of(output)]}
            )
        )
        for name, module in net.named_modules()
    ]
    x, *others = (x.detach().clone() for x in arguments["inputs"])
    output = net(x.requires_grad_(), *others, *(arguments.get("additional_forward_args") or ()))
    for hook in hooks:
        hook.remove()
    seen["gradient"] = list(torch.autograd.grad(output.sum(), x))
    return seen


def overflows(call: Call) -> bool:
    """True if the result in float64 is beyond the dtype, or noise brings the inputs there."""
    dtype = call.case.spec.dtype
    if call.case.values not in ("huge", "mixed"):
        return False
    if dtype == torch.float16 and call.has_generator:
        return True
    wide = tensors_of(call.with_dtype(torch.float64).run())
    return any(
        float(t.abs().nan_to_num(torch.inf).max()) > torch.finfo(dtype).max / 2 for t in wide
    )


def has_finite_model(seen: Activations) -> bool:
    return all(bool(torch.isfinite(t).all()) for tensors in seen.values() for t in tensors)


def largest_product(seen: Activations, inputs: tuple[Tensor, ...]) -> float:
    """The largest magnitude of any activation or input, times that of a score, if above 1."""
    activations = max(float(t.double().abs().max()) for ts in [*seen.values(), inputs] for t in ts)
    return activations * max(1.0, float(seen[""][0].double().abs().max()))


def agrees(seen: Activations, part: Activations, rows: list[int]) -> bool:
    """Return whether the network itself computes the same for the examples `rows` alone."""
    pairs = ((a[rows], b) for name in seen for a, b in zip(seen[name], part[name], strict=True))
    return all(torch.equal(a.nan_to_num(), b.nan_to_num()) for a, b in pairs)


def check_call(
    call: Call,
    rows: list[int],
    is_stable: bool = True,
    dtype: torch.dtype | None = None,
    cancels: bool = False,
) -> tuple[Any, Activations]:
    """Check all that is true of every method, and return its result; None where it is refused.

    A refused call, too, leaves no trace. A second call gives the same bits. The examples `rows`
    alone have the same maps, if the network itself gives the same numbers for them.

    Args:
        call: the call.
        rows: indices of examples, in any order, perhaps repeated.
        is_stable: whether rounding stays rounding: False for a chaotic iteration.
        dtype: whose rounding is allowed between a batch and its examples, by default the case's.
        cancels: whether the maps are made of differences of scores, which may cancel.

    Returns:
        The result, and the activations of all modules.
    """
    arguments = call.examples()
    seen = run_model(call.net, arguments)
    check = unchanged(call.net, arguments["inputs"], call.keeps_rng)
    try:
        result = attempt(lambda: call.method().attribute(**arguments))
    except RefusedError:
        check()
        return None, seen
    check()
    assert call.case.is_valid, "a target that does not fit was taken"
    assert {t.dtype for t in tensors_of(result)} == {call.case.spec.dtype}
    is_finite = has_finite_model(seen) and not overflows(call)
    if is_finite:
        assert_finite(result)
    assert_same(call.run(), result)
    part = call.examples(rows)
    scale = largest_product(seen, arguments["inputs"]) if cancels else 0.0
    if is_stable and is_finite and agrees(seen, run_model(call.net, part), rows):
        alone = attempt(lambda: call.method().attribute(**part))
        assert_close(
            alone, [t[rows] for t in tensors_of(result)], dtype or call.case.spec.dtype, scale
        )
    return result, seen
