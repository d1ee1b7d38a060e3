"""What the fuzz draws: networks, inputs in every memory format, targets, and options by name."""

import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from hypothesis import reject
from hypothesis import strategies as st
from torch import Tensor

from tests.fuzz.networks import BLOCKS, HEADS, LAYERS, DrawnNet, NetSpec

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
VALUES = ("normal", "zero", "flat", "negative", "tiny", "denormal", "huge", "mixed", "one pixel")
MEMORY = ("contiguous", "channels last", "transposed", "sliced", "expanded")


# --- inputs --------------------------------------------------------------------------------------


def draw_values(shape: tuple[int, ...], values: str, dtype: torch.dtype, seed: int) -> Tensor:
    """A tensor of one of the `VALUES`."""
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    info = torch.finfo(dtype)
    huge = 1e30 if info.max > 1e30 else 1e4
    makers: dict[str, Callable[[], Tensor]] = {
        "normal": lambda: x,
        "zero": lambda: 0 * x,
        "flat": lambda: 0 * x + 0.7,
        "negative": lambda: -x.abs(),
        "tiny": lambda: x * max(1e-38, info.tiny),
        "denormal": lambda: x.sign() * info.smallest_normal / 4,
        "huge": lambda: x * huge,
        "mixed": lambda: torch.where(x > 1, huge * x, torch.where(x < -1, x, info.tiny * x)),
        "one pixel": lambda: x * (torch.arange(x.numel()).reshape(shape) == x.numel() // 2),
    }
    return makers[values]().to(dtype)


def lay_out(x: Tensor, memory: str) -> Tensor:
    """The same values in one of the formats of `MEMORY`."""
    if memory == "channels last" and x.dim() in (4, 5):
        formats = {4: torch.channels_last, 5: torch.channels_last_3d}
        return x.contiguous(memory_format=formats[x.dim()])
    if memory == "transposed":
        return x.transpose(0, -1).contiguous().transpose(0, -1)
    if memory == "sliced":
        wide = torch.zeros(*x.shape[:-1], 2 * x.shape[-1] + 3, dtype=x.dtype)
        wide[..., 3::2] = x
        return wide[..., 3::2]
    if memory == "expanded":
        return x[:1].expand(x.shape)
    return x.contiguous()


@dataclass
class Case:
    """A network with the arguments of one call.

    Attributes:
        spec: the network's choices.
        layer: the name of the explained layer.
        n: the number of examples.
        values: one of `VALUES`.
        memory: one of `MEMORY`.
        requires_grad: of the inputs.
        second: "facts" as a second input, as an extra argument, or None.
        gain: an extra argument: a number, "each" for one number an example, or None.
        target: as in Captum.
        is_valid: whether the target fits the output.
    """

    spec: NetSpec
    layer: str
    n: int
    values: str
    memory: str
    requires_grad: bool
    second: str | None
    gain: float | str | None
    target: Any = None
    is_valid: bool = True
    options: dict[str, Any] = field(default_factory=dict)

    def network(self) -> DrawnNet:
        return DrawnNet(self.spec)

    def inputs(self) -> tuple[Tensor, ...]:
        shape = (self.n, self.spec.channels, *self.spec.size)
        x = lay_out(draw_values(shape, self.values, self.spec.dtype, self.spec.seed), self.memory)
        x.requires_grad_(self.requires_grad)
        facts = draw_values((self.n, 1), "normal", self.spec.dtype, 1)
        return (x, facts) if self.second == "input" else (x,)

    def extra(self) -> tuple[Any, ...] | None:
        extra: list[Any] = []
        if self.second == "extra":
            extra.append(draw_values((self.n, 1), "normal", self.spec.dtype, 1))
        elif self.second is None and self.gain is not None:
            extra.append(None)
        if self.gain is not None:
            each = draw_values((self.n, 1), "normal", self.spec.dtype, 2)
            extra.append(each if self.gain == "each" else self.gain)
        return tuple(extra) or None


# --- networks and targets ------------------------------------------------------------------------


@st.composite
def net_specs(draw: Any, dims: int | None = None, heads: tuple[str, ...] = HEADS) -> NetSpec:
    n_dims = dims or draw(st.integers(1, 3))
    largest = {1: 13, 2: 9, 3: 5}[n_dims]
    return NetSpec(
        size=tuple(draw(st.integers(1, largest)) for _ in range(n_dims)),
        channels=draw(st.integers(1, 5)),
        width=draw(st.integers(1, 5)),
        blocks=tuple(draw(st.lists(st.sampled_from(BLOCKS), max_size=4))),
        layer_output=draw(st.sampled_from(LAYERS)),
        head=draw(st.sampled_from(heads)),
        classes=draw(st.integers(2, 4)),
        seed=draw(st.integers(0, 2**16)),
        dtype=draw(st.sampled_from(DTYPES)),
    )


@st.composite
def cases(
    draw: Any,
    dims: int | None = None,
    heads: tuple[str, ...] = HEADS,
    values: tuple[str, ...] = VALUES,
    second: tuple[str | None, ...] = (None, "input", "extra"),
) -> Case:
    spec = draw(net_specs(dims, heads))
    try:
        names = DrawnNet(spec).layer_names()
    except ValueError:  # torch has no group norm of a single number
        reject()
    case = Case(
        spec=spec,
        layer=draw(st.sampled_from(names)),
        n=draw(st.integers(1, 4)),
        values=draw(st.sampled_from(values)),
        memory=draw(st.sampled_from(MEMORY)),
        requires_grad=draw(st.booleans()),
        second=draw(st.sampled_from(second)),
        gain=draw(st.sampled_from([None, 0.5, "each"])),
    )
    case.target, case.is_valid = draw(targets(case))
    return case


@st.composite
def targets(draw: Any, case: Case) -> tuple[Any, bool]:
    """A target and whether it fits; one in twelve does not."""
    if draw(st.integers(0, 11)) == 11:
        k = case.spec.classes
        bad = [k, [0] * (case.n + 1), "espresso", torch.zeros(case.n + 1, dtype=torch.long), 1.5]
        bad += [(0,) * 7, [(0,) * 7] * case.n, [], {"class": 1}]
        single = case.spec.head == "vector"
        return draw(st.sampled_from(bad)), single
    if case.spec.head == "vector":
        return None, True
    if case.spec.head == "column":
        return draw(st.sampled_from([None, 0, [0] * case.n, (0,)])), True
    classes = draw(st.lists(st.integers(0, case.spec.classes - 1), min_size=4, max_size=4))
    classes = classes[: case.n]
    if case.spec.head == "map":
        zeros = (0,) * len(case.spec.size)
        return draw(st.sampled_from([(classes[0], *zeros), [(k, *zeros) for k in classes]])), True
    forms = [classes[0], classes, torch.tensor(classes), torch.tensor(classes[0])]
    forms += [(classes[0],), [(k,) for k in classes], torch.tensor(classes[:1])]
    return draw(st.sampled_from(forms[: 6 if case.n > 1 else 7])), True


# --- options -------------------------------------------------------------------------------------

SCORES = st.sampled_from(["logit", "softmax", "sigmoid", torch.tanh])
COUNTS = st.integers(1, 7)


def _baselines(case: Case) -> st.SearchStrategy[Any]:
    shape = (case.n, case.spec.channels, *case.spec.size)
    tensors = [draw_values(shape, v, case.spec.dtype, 3) for v in ("normal", "flat")]
    if case.second == "input":
        return st.sampled_from([None, (0, 0), (0.5, 0), *((t, 0) for t in tensors)])
    return st.sampled_from([None, 0, 0.5, *tensors, tensors[0][:1]])


OPTIONS: dict[str, Callable[[Case], st.SearchStrategy[Any]]] = {
    "attribute_to_layer_input": lambda case: st.booleans(),
    "relu_attributions": lambda case: st.booleans(),
    "attr_dim_summation": lambda case: st.booleans(),
    "grad_kwargs": lambda case: st.sampled_from([None, {}, {"create_graph": True}]),
    "perturbations_per_eval": lambda case: COUNTS,
    "internal_batch_size": lambda case: COUNTS,
    "samples_per_eval": lambda case: COUNTS,
    "layer_baselines": lambda case: st.sampled_from([None, "min", 0.5, -1, torch.ones(1)]),
    "score": lambda case: SCORES,
    "weighting": lambda case: st.sampled_from(["softmax", "increase", "score"]),
    "divide_by_score": lambda case: st.booleans(),
    "groups": lambda case: COUNTS,
    "n_samples": lambda case: st.integers(1, 3),
    "stdev_spread": lambda case: st.sampled_from([0.0, 0.15, 1]),
    "center": lambda case: st.booleans(),
    "baselines": _baselines,
}
UNDRAWN = {"self", "forward_func", "layer", "device_ids", "attribution_method", "head"} | {
    "reshape_transform", "inputs", "target", "additional_forward_args", "show_progress", "callback",
    "return_masks", "generator", "kwargs", "args", "return_history", "return_coverage",
}  # fmt: skip


def options_of(
    function: Callable[..., Any], case: Case, more: dict[str, Any] | None = None
) -> st.SearchStrategy[dict[str, Any]]:
    """Any of the options that `function` has: each one drawn, or left at its default."""
    known = OPTIONS | (more or {})
    names = [n for n in inspect.signature(function).parameters if n not in UNDRAWN]
    assert not set(names) - known.keys(), "a new option needs a strategy"
    return st.fixed_dictionaries({}, optional={name: known[name](case) for name in names})


def example_rows(case: Case) -> st.SearchStrategy[list[int]]:
    """Some of the examples, in any order, perhaps repeated."""
    return st.lists(st.integers(0, case.n - 1), min_size=1, max_size=4)
