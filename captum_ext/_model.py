"""Run a model up to, at and after a layer, and leave it exactly as it was found.

Two functions carry the layer methods of this package:

- `layer_activations`: what the layers put out (or take in), without a graph;
- `layer_gradients`: the same, and the gradient of each example's target with respect to it. The
  graph starts at the first layer: what lies in front of it runs as under `no_grad`, and gradients
  of parameters are never computed.

Both hook the layers for the length of one forward pass, through `intercept`, on which `Behind` in
`_behind.py` stands too. The hooks act only in the thread that set them, so that several threads may
explain one model at once. `untouched` is put around a whole call and keeps the buffers of a model
that was left in train mode.
"""

import difflib
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.jit import ScriptModule
from torch.nn import DataParallel, Module
from torch.nn.modules.module import register_module_forward_pre_hook
from torch.utils._pytree import tree_flatten, tree_unflatten

from captum_ext._checks import warn
from captum_ext._compat import (
    TargetType,
    _reduce_list,
    _run_forward,
    _sort_key_list,
)

Tensors = tuple[Tensor, ...]
Forward = Callable[..., Any]
Score = str | Callable[[Tensor], Tensor]


# --- finding the model and its layers ------------------------------------------------------------


def root_module(forward_func: Forward) -> Module | None:
    """The module behind `forward_func`, without DataParallel; None for a plain function."""
    owner = _owner(forward_func)
    if isinstance(owner, DataParallel):
        inner: Module = owner.module
        return inner
    return owner


def _owner(forward_func: object) -> Module | None:
    """The module that `forward_func` is, or is a method, a part or a decoration of."""
    while forward_func is not None and not isinstance(forward_func, Module):
        owner = getattr(forward_func, "__self__", None)
        if isinstance(owner, Module):
            return owner
        inner = forward_func.func if isinstance(forward_func, partial) else None
        forward_func = inner or getattr(forward_func, "__wrapped__", None)
    return forward_func


def closest(name: str, names: Sequence[str], count: int = 3) -> str:
    """The `count` names most like `name`, as a phrase for an error message."""
    return ", ".join(difflib.get_close_matches(name, names, n=count, cutoff=0.0))


def find_module(forward_func: Forward, module: Module | str, argument: str = "layer") -> Module:
    """The module called `module`, or `module` itself.

    Raises:
        ValueError: an unknown name (the three closest are named), or a name for a plain function.
        TypeError: neither a module nor a name.
    """
    root = root_module(forward_func)
    if hasattr(root, "_orig_mod"):
        raise ValueError(
            "`forward_func` is a compiled module, and compiled graphs ignore hooks: pass the eager "
            "module (`model._orig_mod`)."
        )
    if isinstance(module, Module):
        return module
    if not isinstance(module, str):
        raise TypeError(
            f"`{argument}` must be a torch.nn.Module or its dotted name, got {type(module)}."
        )
    if root is None:
        raise ValueError(
            f"`{argument}` is the name {module!r}, but `forward_func` is not a module that could "
            f"be searched for it: pass the module itself."
        )
    names = dict(root.named_modules())
    if module not in names or not module:
        known = [name for name in names if name]
        raise ValueError(
            f"`{argument}` {module!r} is not in the model. Closest: {closest(module, known)}."
        )
    return names[module]


def module_name(forward_func: Forward, module: Module) -> str:
    """The dotted name of `module`, or its class where the model is not at hand."""
    root = root_module(forward_func)
    names = {} if root is None else {id(m): name for name, m in root.named_modules()}
    return f"`{names.get(id(module)) or type(module).__name__}`"


def scored(forward_func: Forward, score: Score) -> Forward:
    """`forward_func` with its output turned into scores, in float32 or better.

    Args:
        forward_func: gives logits, classes in dimension 1.
        score: "logit" (the output as it is), "softmax" or "sigmoid" (probabilities), or a callable
            of the whole output.
    """
    named: dict[str, Callable[[Tensor], Tensor]] = {
        "logit": lambda output: output,
        "softmax": partial(torch.softmax, dim=1),
        "sigmoid": torch.sigmoid,
    }
    if not callable(score) and score not in named:
        raise ValueError(f"`score` must be one of {sorted(named)} or a callable, got {score!r}.")

    def forward(*args: Any) -> Tensor:
        output = forward_func(*args)
        if callable(score):
            return full_precision(score(output))
        return named[score](full_precision(output))

    forward.__wrapped__ = forward_func  # type: ignore[attr-defined]
    return forward


def one_target_each(target: TargetType, images: Tensor) -> Any:
    """The target as None, an int, a tuple, a tensor (N,) on the device or a list of N tuples."""
    n = len(images)
    if isinstance(target, list):
        assert len(target) == n, f"Target list length {len(target)} is not that of inputs, {n}."
        if all(isinstance(t, int) for t in target):
            return torch.tensor(target, dtype=torch.int64, device=images.device)
    if isinstance(target, Tensor):
        if target.numel() == 1 and not target.is_floating_point():
            return int(target.item())
        assert target.shape == (n,), f"Tensor target dimension {tuple(target.shape)} is not valid."
        return target.to(images.device)
    return target


def full_precision(tensor: Tensor) -> Tensor:
    """`tensor` in float32 where it has half precision, else as it is."""
    return tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor


def without_autocast(tensor: Tensor) -> AbstractContextManager[None]:
    """A context in which autocast, if it is on, does not reach what is computed of `tensor`."""
    kind = tensor.device.type
    return torch.autocast(kind, enabled=False) if torch.is_autocast_enabled(kind) else nullcontext()


# --- leaving no trace ----------------------------------------------------------------------------


class _Buffers:
    """The buffers of a module as they are now."""

    def __init__(self, module: Module) -> None:
        self.module, self.named = module, dict(module._buffers)
        self.values = {n: b.detach().clone() for n, b in self.named.items() if b is not None}

    def put_back(self) -> None:
        if not isinstance(self.module, ScriptModule):  # whose names are fixed
            for name in self.module._buffers.keys() - self.named.keys():
                del self.module._buffers[name]
            self.module._buffers.update(self.named)
        for name, value in self.values.items():
            buffer = self.named[name]
            assert buffer is not None
            with torch.inference_mode(buffer.is_inference()), torch.no_grad():
                try:
                    buffer.copy_(value)
                except RuntimeError:  # an expanded buffer cannot be written to, nor was it
                    if not torch.equal(buffer, value):
                        raise


_keeping = threading.Lock()
# By module: its buffers before any call that is under way, and the threads of these calls.
_kept: dict[int, tuple[_Buffers, list[int]]] = {}


@contextmanager
def untouched(forward_func: Forward) -> Iterator[None]:
    """Put buffers back at the end, and warn once if the model is in train mode.

    Kept are the buffers of modules in train mode, and of modules that are not torch's own. For a
    plain function, whose modules are not known, they are found while they run. Where several
    threads explain one model, the last that goes puts back what the first found.
    """
    me = threading.get_ident()
    mine: dict[int, _Buffers | None] = {}  # None: another thread was here before
    warned = False

    def keep(module: Module, args: Any = None) -> None:
        nonlocal warned
        if threading.get_ident() != me or id(module) in mine:
            return
        if _depends_on_mode(module) and not warned:
            warned = True
            warn(
                f"The model is in train mode ({type(module).__name__} is): it is explained as it "
                f"stands, with batch statistics and dropout. Call .eval() to explain what it "
                f"predicts in use."
            )
        if module.training or not type(module).__module__.startswith("torch.nn."):
            with _keeping:
                first, threads = _kept.get(id(module)) or (_Buffers(module), [])
                alone = all(thread == me for thread in threads)
                own = (_Buffers(module) if threads else first) if alone else None
                _kept[id(module)] = (first, [*threads, me])
                mine[id(module)] = own

    root = root_module(forward_func)
    with ExitStack() as hooks:
        try:
            if root is None:
                hooks.callback(register_module_forward_pre_hook(keep).remove)
            else:
                for module in root.modules():
                    keep(module)
            yield
        finally:
            with ExitStack() as each:  # also where one of them raises
                for key, own in mine.items():
                    each.callback(_let_go, key, own)


def _let_go(key: int, own: _Buffers | None) -> None:
    with _keeping:
        me = threading.get_ident()
        first, threads = _kept.pop(key)
        threads.remove(me)
        if threads:
            _kept[key] = (first, threads)
        if not threads:
            first.put_back()
        elif own is not None and all(thread == me for thread in threads):
            own.put_back()


def _depends_on_mode(module: Module) -> bool:
    """Whether `module` is in train mode, and by its looks does something else than in eval mode."""
    is_random = any(word in type(module).__name__ for word in ("Drop", "Stochastic", "RReLU"))
    return module.training and not module._modules and (is_random or bool(module._buffers))


@contextmanager
def intercept(
    layers: Sequence[Module],
    edit: Callable[[int, Tensors], Tensors],
    *,
    at_input: bool = False,
    every_thread: bool = False,
) -> Iterator[None]:
    """Let `edit(index of the layer, its tensors)` replace what the layers put out or take in.

    Args:
        layers: the modules to hook, each of which may run once.
        edit: takes and returns the floating-point tensors of a layer, wherever they stand in its
            tuple, list or dict.
        at_input: the layer's inputs, positional and by keyword, instead of its output.
        every_thread: DataParallel runs its replicas in threads of its own.
    """
    me = threading.get_ident()
    ran: set[tuple[int, torch.device]] = set()

    def edit_tree(index: int, value: Any) -> Any:
        leaves, spec = tree_flatten(value)
        at = [i for i, x in enumerate(leaves) if isinstance(x, Tensor) and x.is_floating_point()]
        tensors = tuple(leaves[i] for i in at)
        if not tensors:
            what = "takes in" if at_input else "puts out"
            raise ValueError(f"`layer` {type(layers[index]).__name__} {what} no float tensor.")
        key = (index, tensors[0].device)
        if key in ran:
            raise ValueError(
                f"`layer` {type(layers[index]).__name__} runs more than once in one forward pass, "
                f"so it has no single activation: choose a module that runs once, or give each use "
                f"a module of its own."
            )
        ran.add(key)
        for i, tensor in zip(at, edit(index, tensors), strict=True):
            leaves[i] = tensor
        return tree_unflatten(leaves, spec)

    def hook(index: int) -> tuple[Callable[..., Any], Callable[..., Any]]:
        # Another thread may meet this hook at any moment, also while it is being removed and the
        # module forgets that it wants keywords: hence the default of `kwargs`.
        def before(module: Module, args: Any, kwargs: Any = None) -> Any:
            mine = every_thread or threading.get_ident() == me
            return edit_tree(index, (args, kwargs)) if mine else None

        def after(module: Module, args: Any, output: Any) -> Any:
            mine = every_thread or threading.get_ident() == me
            return edit_tree(index, output) if mine else None

        return before, after

    with ExitStack() as handles:
        for index, layer in enumerate(layers):
            before, after = hook(index)
            handle = (
                layer.register_forward_pre_hook(before, with_kwargs=True)
                if at_input
                else layer.register_forward_hook(after)
            )
            handles.callback(handle.remove)
        yield


# --- at the layer --------------------------------------------------------------------------------


class Seen:
    """What hooked layers had in hand in one forward pass, by layer and device."""

    def __init__(self, forward_func: Forward, layers: Sequence[Module], device_ids: Any) -> None:
        owner = _owner(forward_func)
        self.parallel = device_ids is not None or isinstance(owner, DataParallel)
        self.device_ids = device_ids or getattr(owner, "device_ids", None)
        self.forward_func, self.layers = forward_func, layers
        self.by_device: list[dict[torch.device, Tensors]] = [{} for _ in layers]

    def devices(self) -> list[list[torch.device]]:
        """The devices of each layer, in the order of DataParallel's pieces of the batch."""
        for layer, seen in zip(self.layers, self.by_device, strict=True):
            if not seen:
                raise ValueError(
                    f"`layer` {module_name(self.forward_func, layer)} did not run in the forward "
                    f"pass. Is it part of this model, eager and not compiled?"
                )
        return [_sort_key_list(list(seen), self.device_ids) for seen in self.by_device]

    def gather(self) -> list[Tensors]:
        pairs = zip(self.by_device, self.devices(), strict=True)
        return [_reduce_list([seen[device] for device in devices]) for seen, devices in pairs]


def layer_activations(
    forward_func: Forward,
    layers: Sequence[Module],
    inputs: Tensors,
    target: TargetType = None,
    additional_forward_args: Any = None,
    *,
    at_input: bool = False,
    device_ids: list[int] | None = None,
) -> tuple[list[Tensors], Tensor]:
    """Activations of `layers` and the scores of the target, in one forward pass without a graph.

    Returns:
        One tuple of tensors for each layer, and what `target` selects of the output.
    """
    seen = Seen(forward_func, layers, device_ids)

    def keep(index: int, tensors: Tensors) -> Tensors:
        # Both the kept and the passed-on tensor are copies: the model may go on in place, on the
        # value it gets here as well as on an alias of it that it kept.
        seen.by_device[index][tensors[0].device] = tuple(t.detach().clone() for t in tensors)
        return tuple(t.clone() for t in tensors)

    with torch.no_grad(), intercept(layers, keep, at_input=at_input, every_thread=seen.parallel):
        score = _run_forward(forward_func, copies(inputs), target, additional_forward_args)
    return seen.gather(), score


def layer_gradients(
    forward_func: Forward,
    layers: Sequence[Module],
    inputs: Tensors,
    target: TargetType = None,
    additional_forward_args: Any = None,
    *,
    at_input: bool = False,
    device_ids: list[int] | None = None,
    grad_kwargs: dict[str, Any] | None = None,
) -> tuple[list[Tensors], list[Tensors]]:
    """Activations of `layers`, and the gradient of each example's target with respect to them.

    The layers' activations are made leaves of a graph that begins with them. Where the model
    switches gradients off behind the layer (a frozen part under `no_grad`), the pass is run once
    more with gradients on from the start. `grad_kwargs` goes to `torch.autograd.grad`; with
    `create_graph=True` the caller's graph is kept all the way, so that the result can be
    differentiated with respect to the inputs and the parameters.

    Raises:
        RuntimeError: inside `torch.inference_mode`, where no gradient exists.
        AssertionError: `target` does not select one number for each example (as in Captum).
        ValueError: a layer that does not run, runs twice, or that the target does not depend on.
    """
    if torch.is_inference_mode_enabled():
        raise RuntimeError(
            "Gradients do not exist inside torch.inference_mode(): use torch.no_grad() around a "
            "gradient-based attribution, or none."
        )
    grad_kwargs = grad_kwargs or {}
    keep_graph = bool(grad_kwargs.get("create_graph"))
    seen = Seen(forward_func, layers, device_ids)

    def start_graph(index: int, tensors: Tensors) -> Tensors:
        torch.set_grad_enabled(True)  # the no_grad around the pass restores the caller's mode
        held = tuple(
            t.clone() if t.requires_grad else t.detach().clone().requires_grad_() for t in tensors
        )
        seen.by_device[index][tensors[0].device] = held
        return tuple(t.clone() for t in held)

    for graph_in_front in [True] if keep_graph or seen.parallel else [False, True]:
        with (
            torch.set_grad_enabled(graph_in_front),
            intercept(layers, start_graph, at_input=at_input, every_thread=seen.parallel),
        ):
            score = _run_forward(forward_func, copies(inputs), target, additional_forward_args)
        if score.requires_grad:
            break
    activations = seen.gather()
    check_one_score_each(score)
    keys = [(index, device) for index, on in enumerate(seen.devices()) for device in on]
    held = [seen.by_device[index][device] for index, device in keys]
    flat = [tensor for tensors in held for tensor in tensors]
    found: Sequence[Tensor | None] = [None] * len(flat)
    if score.requires_grad:
        options = {"allow_unused": True, **grad_kwargs}
        with torch.enable_grad():
            found = torch.autograd.grad(torch.unbind(score.flatten()), flat, **options)
    each = iter(found)
    for (index, device), tensors in zip(keys, held, strict=True):
        pieces = [next(each) for _ in tensors]
        if all(piece is None for piece in pieces):
            raise ValueError(
                f"The target does not depend on `layer` "
                f"{module_name(forward_func, layers[index])}: it has no gradient there."
            )
        seen.by_device[index][device] = tuple(
            torch.zeros_like(t) if g is None else g for t, g in zip(tensors, pieces, strict=True)
        )
    if not keep_graph:
        activations = [tuple(t.detach() for t in tensors) for tensors in activations]
    return activations, seen.gather()


def copies(inputs: Tensors) -> Tensors:
    """Copies of `inputs`: a model whose first step works in place must not reach the caller's."""
    return tuple(tensor.clone() for tensor in inputs)


def check_one_score_each(score: Tensor) -> None:
    """Raise the error that Captum raises where `target` leaves several numbers for one example."""
    assert score.dim() == 0 or score[0].numel() == 1, (
        "Target not provided when necessary, cannot take gradient with respect to multiple outputs."
    )


def floating_type(module: Module) -> torch.dtype:
    """That of the module's parameters."""
    kinds = (weight.dtype for weight in module.parameters() if weight.is_floating_point())
    return next(kinds, torch.float32)


@contextmanager
def random_numbers(device: torch.device, seed: int) -> Iterator[None]:
    """Torch's global random numbers, of the CPU and this device, from a seed; then as they were.

    NumPy's too: Captum's GradientShap draws these.
    """
    cuda = [device] if device.type == "cuda" else []
    numpys = np.random.get_state()
    with torch.random.fork_rng(cuda):
        torch.default_generator.manual_seed(seed)  # `torch.manual_seed` would reach other devices
        for one in cuda:
            with torch.cuda.device(one):
                torch.cuda.manual_seed(seed)
        np.random.seed(seed % 2**32)
        try:
            yield
        finally:
            np.random.set_state(numpys)
