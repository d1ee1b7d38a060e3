"""Run again only what lies behind a layer, on edited activations."""

import threading
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module
from torch.nn.modules.module import register_module_forward_pre_hook
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from captum_ext._checks import warn
from captum_ext._compat import TargetType, _run_forward
from captum_ext._model import (
    Forward,
    Seen,
    Tensors,
    check_one_score_each,
    copies,
    intercept,
    module_name,
    root_module,
)


class TapeError(Exception):
    """A pass cannot be answered from the tape."""


class Tape(TorchFunctionMode):
    """Record what every torch function in front of a layer gives, and answer from it later.

    Torch functions of one thread pass through here one by one. Up to the layer, the first pass
    writes down each result; later passes are handed the results and compute nothing. A function
    without tensors (a switch of autocast, say) is run each time. `given` are the model's arguments,
    which must stay as they are, like the results.
    """

    def __init__(self, given: Any) -> None:
        super().__init__()
        self.given = given
        self.results: list[tuple[Any, Any, bool]] = []
        self.position = 0
        self.recorded = self.behind = False
        self.versions: list[tuple[Tensor, int]] = []

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if self.behind:
            return func(*args, **kwargs)
        if not self.recorded:
            result = func(*args, **kwargs)
            on_tensors = any(isinstance(x, Tensor) for x in tree_leaves((args, kwargs, result)))
            self.results.append((func, result, on_tensors))
            return result
        if self.position == len(self.results) or self.results[self.position][0] != func:
            raise TapeError("its second pass took another path than its first")
        _, result, on_tensors = self.results[self.position]
        self.position += 1
        return result if on_tensors else func(*args, **kwargs)

    def reach_layer(self) -> None:
        """From here on functions are run; and none that was not taped has run so far."""
        self.behind = True
        if self.recorded:
            self._check_results()
        else:
            leaves = tree_leaves((self.given, [result for _, result, _ in self.results]))
            tensors = [x for x in leaves if isinstance(x, Tensor) and not x.is_inference()]
            self.versions = [(tensor, tensor._version) for tensor in tensors]

    def rewind(self) -> None:
        """Begin another pass."""
        self._check_results()
        self.recorded, self.behind, self.position = True, False, 0

    def _check_results(self) -> None:
        if any(tensor._version != version for tensor, version in self.versions):
            raise TapeError("it writes in place into what comes from in front of the layer")


class Behind:
    """Run again only what lies behind a layer, on edited activations.

    The first pass writes down everything in front of the layer; each later pass is answered from
    that up to the layer and computes only what is behind it. Skips around the layer and the model's
    own Python code, shapes included, are as in the first pass, because it *is* the model's code
    that runs, on the same batch. Kept in memory: the intermediate results in front of the layer,
    once.

    There are three ways, from fast to slow, and a warning on leaving the first:

    1. all edits of a chunk at once, by `torch.vmap`;
    2. one edit after the other, for models that `vmap` cannot follow behind the layer (control flow
       that depends on the activations, numpy, custom functions), or that keep what they compute
       (in an attribute, by a hook), where its internal tensors must not get to;
    3. the whole model for each edit, where a second pass, without any edit, does not give what the
       first gave (in-place writes of any kind, counters, dropout); and for DataParallel.

    Args:
        forward_func: the model.
        layer: the layer, which must run once.
        inputs: a batch of B examples.
        target: as in Captum.
        additional_forward_args: as in Captum.
        at_input: edit the layer's inputs instead of its output.
        device_ids: DataParallel's devices.

    Attributes:
        activations: the layer's tensors.
        score: (B,), what `target` selects for the unedited activations.
    """

    def __init__(
        self,
        forward_func: Forward,
        layer: Module,
        inputs: Tensors,
        target: TargetType = None,
        additional_forward_args: Any = None,
        *,
        at_input: bool = False,
        device_ids: list[int] | None = None,
    ) -> None:
        self.forward_func, self.layer, self.at_input = forward_func, layer, at_input
        self.target, self.additional_forward_args = target, additional_forward_args
        self.seen = Seen(forward_func, [layer], device_ids)
        self.tape: Tape | None = None
        self.at_once = not self.seen.parallel

        def keep(index: int, tensors: Tensors) -> Tensors:
            if self.tape is not None:
                self.tape.reach_layer()
            # vmap has no rule for some operations on channels-last tensors: contiguous copies.
            kept = tuple(t.detach().clone(memory_format=torch.contiguous_format) for t in tensors)
            self.seen.by_device[0][tensors[0].device] = kept
            return tuple(t.clone() for t in tensors)

        # Tensors made in inference mode cannot tell whether they were written to: hence its end.
        with torch.inference_mode(False), torch.no_grad():
            self.inputs, self.taped_inputs = copies(inputs), copies(inputs)
            if not self.seen.parallel:
                self.tape = Tape((self.taped_inputs, additional_forward_args))
            with _running(forward_func) as self.modules:
                score = self._run(keep, self.tape)
            self.activations: Tensors = self.seen.gather()[0]
            check_one_score_each(score)
            self.score: Tensor = score.reshape(-1)
            if self.tape is not None:
                self._rehearse()

    def _rehearse(self) -> None:
        """Run once more without an edit: does it give the same, and keep nothing?"""
        before, reason = _kept_by(self.modules), ""
        try:
            again = self._score_with(self.activations[0], 0)
        except Exception as error:
            self.tape, reason = None, _first_sentence(error)
        else:
            tolerance = 1e-4 * self.score.abs().max()
            if not bool(((again - self.score).abs() <= tolerance).all()):
                self.tape, reason = None, "a second pass does not give what the first gave"
            elif before is None or _kept_by(self.modules) != before:
                reason = "the model or a hook may keep what it computes"
        if reason:
            self._leave_the_fast_way(reason)

    def _leave_the_fast_way(self, reason: str) -> None:
        self.at_once = False
        name = module_name(self.forward_func, self.layer)
        warn(
            f"What lies behind {name} cannot be run for several edits at once ({reason}): running "
            f"one edit after the other."
        )

    def __call__(
        self, edit: Callable[[Tensor, Tensor], Tensor], chunk: Tensor, which: int = 0
    ) -> Tensor:
        """Scores after each of `len(chunk)` edits, (len(chunk), B).

        Args:
            edit: gives the new activation (B, ...) from the old one and one element of `chunk`,
                with operations that `torch.vmap` can follow.
            chunk: the edits to make, along dimension 0.
            which: the tensor to edit, for a layer with several.
        """

        def score_after(one: Tensor) -> Tensor:
            return self._score_with(edit(self.activations[which], one), which)

        with torch.inference_mode(False), torch.no_grad():
            if self.at_once:
                try:
                    scores: Tensor = torch.vmap(score_after, randomness="different")(chunk)
                    return scores
                except torch.OutOfMemoryError:
                    raise
                except Exception as error:  # what is truly wrong is raised again below
                    self._leave_the_fast_way(_first_sentence(error))
            return torch.stack([score_after(one) for one in chunk])

    def _score_with(self, edited: Tensor, which: int) -> Tensor:
        """The score (B,) with the layer's tensor number `which` replaced."""
        new = [t.clone() for t in self.activations]
        new[which] = edited.clone()
        if self.tape is not None:
            try:
                self.tape.rewind()
                score = self._run(lambda index, tensors: self._behind(tuple(new)), self.tape)
                return score.reshape(-1)
            except TapeError:
                self.tape = None
                if self.at_once:
                    raise
        score = self._run(lambda index, tensors: self._pieces(tuple(new), tensors), None)
        return score.reshape(-1)

    def _behind(self, new: Tensors) -> Tensors:
        assert self.tape is not None
        self.tape.reach_layer()
        return new

    def _pieces(self, new: Tensors, tensors: Tensors) -> Tensors:
        """Of the new activations, what DataParallel gives to the device of `tensors`."""
        start = 0
        for device in self.seen.devices()[0]:
            if device == tensors[0].device:
                break
            start += len(self.seen.by_device[0][device][0])
        return tuple(
            t[start : start + len(old)].to(old.device) for t, old in zip(new, tensors, strict=True)
        )

    def _run(self, edit: Callable[[int, Tensors], Tensors], tape: Tape | None) -> Tensor:
        parallel = self.seen.parallel
        with ExitStack() as modes:
            hooks = intercept([self.layer], edit, at_input=self.at_input, every_thread=parallel)
            modes.enter_context(hooks)
            if tape is not None:
                modes.enter_context(tape)
            score: Tensor = _run_forward(
                self.forward_func,
                copies(self.inputs) if tape is None else self.taped_inputs,
                self.target,
                self.additional_forward_args,
            )
        return score


_REGISTRIES = frozenset(vars(Module()))


class _Same:
    """A value that equals only itself, at its present length."""

    def __init__(self, value: Any) -> None:
        self.value, self.length = value, 0 if isinstance(value, Tensor) else len(value)

    def __eq__(self, other: object) -> bool:
        assert isinstance(other, _Same)
        return self.value is other.value and self.length == other.length


@contextmanager
def _running(forward_func: Forward) -> Iterator[list[Module]]:
    """The modules of a model; for a plain function, those that run inside this context."""
    root, me = root_module(forward_func), threading.get_ident()
    modules = [] if root is None else list(root.modules())

    def note(module: Module, args: Any) -> None:
        if threading.get_ident() == me:
            modules.append(module)

    with ExitStack() as hooks:
        if root is None:
            hooks.callback(register_module_forward_pre_hook(note).remove)
        yield modules


def _kept_by(modules: list[Module]) -> list[tuple[str, _Same]] | None:
    """Where modules keep tensors beside their parameters and buffers; None if hooks see them."""
    registries = [hooks for m in modules for hooks in (m._forward_hooks, m._forward_pre_hooks)]
    hooks = [hook for registry in registries for hook in list(registry.values())]
    if any(getattr(hook, "__module__", None) != intercept.__module__ for hook in hooks):
        return None  # not one of ours, in another thread
    return [
        (name, _Same(value))
        for module in modules
        for name, value in list(vars(module).items())
        if name not in _REGISTRIES and isinstance(value, Tensor | list | dict | tuple | set | deque)
    ]


def _first_sentence(error: Exception) -> str:
    return str(error).partition("\n")[0].partition(". ")[0] or type(error).__name__
