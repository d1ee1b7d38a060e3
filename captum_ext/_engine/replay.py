"""Run only what lies behind a layer, on edited activations; or only what leads up to it."""

import gc
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module, Parameter
from torch.utils._pytree import tree_leaves

from captum_ext._checks import warn
from captum_ext._compat import TargetType
from captum_ext._engine.capture import LayerCapture, LayerReachedError, clone_tensors
from captum_ext._engine.hooks import LockedFunctionMode, enter_mode
from captum_ext._engine.modules import Forward, Tensors, module_name
from captum_ext._engine.outputs import check_one_score_per_example

# --- up to a layer -------------------------------------------------------------------------------


def run_to_layer(
    forward_func: Forward,
    layer: Module,
    inputs: Tensors,
    additional_forward_args: Any = None,
    *,
    traces_channels: bool = False,
) -> Tensors:
    """The tensors that a layer puts out, with a graph to `inputs` where gradients are switched on.

    What lies behind the layer does not run, but for DataParallel, whose replicas run whole. Whether
    the layer would run a second time is not seen.

    Raises:
        ValueError: the layer did not run; channels that are traced and not in dimension 1.
    """
    capture = LayerCapture(forward_func, [layer], traces_channels=traces_channels)

    def keep(index: int, tensors: Tensors) -> Tensors:
        capture.hold(index, tensors)
        if not capture.is_parallel:
            raise LayerReachedError
        return clone_tensors(tensors)  # the model may go on in place

    capture.first_run(keep, clone_tensors(inputs), None, additional_forward_args)
    capture.check_channels(inputs, additional_forward_args)
    return capture.gathered()[0]


# --- behind a layer ------------------------------------------------------------------------------


class TapeError(Exception):
    """A pass cannot be answered from the tape."""


class Tape(LockedFunctionMode):
    """Record what every torch function in front of a layer gives, and answer from it later.

    Torch functions of one thread pass through here one by one. Up to the layer, the first pass
    writes down each result; later passes are handed the results and compute nothing. A function
    without tensors (a switch of autocast, say) is run each time.

    Args:
        inputs: the model's arguments, which must stay as they are, like the results.
    """

    def __init__(self, inputs: Any) -> None:
        super().__init__()
        self.inputs = inputs
        self.results: list[tuple[Any, Any, bool]] = []
        self.position = 0
        self.is_recorded = self.is_behind = False
        self.versions: list[tuple[Tensor, int]] = []
        # The tensors that functions behind the layer were called with in the first pass.
        self.arguments: dict[int, weakref.ref[Tensor]] = {}
        self.watch: Dependents | None = None
        self.has_failed = False

    def call(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        """Run a function, or answer from the tape."""
        if self.is_behind:
            if not self.is_recorded:
                given = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
                self.arguments |= {id(x): weakref.ref(x) for x in given}
            try:
                if self.watch is not None:
                    return self.watch.call(func, args, kwargs)
                return func(*args, **kwargs)
            except Exception:
                self.has_failed = True
                raise
        if not self.is_recorded:
            result = func(*args, **kwargs)
            on_tensors = any(isinstance(x, Tensor) for x in tree_leaves((args, kwargs, result)))
            self.results.append((func, result, on_tensors))
            return result
        if self.position == len(self.results) or self.results[self.position][0] != func:
            raise TapeError("its second pass took another path than its first")
        _, result, on_tensors = self.results[self.position]
        self.position += 1
        return result if on_tensors else func(*args, **kwargs)

    def tensors(self) -> list[Tensor]:
        """The arguments and all results."""
        leaves = tree_leaves((self.inputs, [result for _, result, _ in self.results]))
        return [leaf for leaf in leaves if isinstance(leaf, Tensor)]

    def reach_layer(self) -> None:
        """From here on functions are run, and all that were taped have been answered."""
        self.is_behind = True
        if self.is_recorded:
            self._check_versions()
        else:
            self.versions = [(tensor, _version(tensor)) for tensor in self.tensors()]

    def rewind(self) -> None:
        """Begin another pass."""
        self._check_versions()
        self.is_recorded, self.is_behind, self.position = True, False, 0

    def _check_versions(self) -> None:
        if any(_version(tensor) != version for tensor, version in self.versions):
            raise TapeError("it writes in place into what comes from in front of the layer")


class Dependents:
    """The tensors that a pass makes of a layer's activations: does one of them outlive the pass?

    Args:
        activations: these, which are held anyway.
        constants: tensors that do not depend on them. (Parameters never do.)
    """

    def __init__(self, activations: Tensors, constants: dict[int, weakref.ref[Tensor]]) -> None:
        self.activations, self.constants = {id(x) for x in activations}, constants
        self.dependents: list[weakref.ref[Tensor]] = []

    def call(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        """Run a function, and note what may depend on the activations.

        That is its results, unless all of its arguments are constants, and arguments that are
        unknown: what a script gives is not seen before.
        """
        given = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        constants = {id(x): _version(x) for x in given if self._is_constant(x)}
        unknown = [x for x in given if id(x) not in self.activations | constants.keys()]
        self.dependents += map(weakref.ref, unknown)
        del unknown
        result = func(*args, **kwargs)
        is_constant = bool(given) and len(constants) == len({id(x) for x in given})
        for x in tree_leaves(result):
            if not isinstance(x, Tensor) or constants.get(id(x)) == _version(x):
                continue  # as it was, `weight.to(x)` say
            if is_constant:
                self.constants[id(x)] = weakref.ref(x)
            else:
                self.constants.pop(id(x), None)
                self.dependents.append(weakref.ref(x))
        return result

    def _is_constant(self, tensor: Tensor) -> bool:
        known = self.constants.get(id(tensor))
        return isinstance(tensor, Parameter) or (known is not None and known() is tensor)

    def are_kept(self) -> bool:
        """Whether somebody still holds one of them."""
        for collect in (lambda: None, gc.collect):
            collect()
            if all(reference() is None for reference in self.dependents):
                return False
        return True


class LayerReplay:
    """Run again only what lies behind a layer, on edited activations.

    The first pass writes down everything in front of the layer; each later pass is answered from
    that up to the layer and computes only what is behind it. Skips around the layer and the model's
    own Python code, shapes included, are as in the first pass, because it *is* the model's code
    that runs, on the same batch. Kept in memory: the intermediate results in front of the layer,
    once.

    There are three ways, from fast to slow, and a warning on leaving the first:

    1. all edits of a chunk at once, by `torch.vmap`;
    2. one edit after the other, for models that `vmap` cannot follow behind the layer (control flow
       that depends on the activations, numpy, custom functions), or where something that a pass
       makes of the activations outlives it (in an attribute, by a hook): there, `vmap`'s internal
       tensors must not get to;
    3. the whole model for each edit, where a second pass, without any edit, does not give what the
       first gave (in-place writes of any kind, counters, dropout); and for DataParallel.

    Args:
        forward_func: the model.
        layer: the layer, which must run once.
        inputs: a batch of B examples.
        target: as in Captum.
        additional_forward_args: as in Captum.
        **options: those of `LayerCapture`.

    Attributes:
        activations: the layer's tensors.
        score: (B,), what `target` selects for the unedited activations.
    """

    def __init__(
        self,
        forward_func: Forward,
        layer: Module,
        inputs: Tensor | Tensors,
        target: TargetType = None,
        additional_forward_args: Any = None,
        **options: Any,
    ) -> None:
        self.forward_func, self.layer = forward_func, layer
        self.target, self.additional_forward_args = target, additional_forward_args
        self.capture = LayerCapture(forward_func, [layer], **options)
        self.tape: Tape | None = None
        self.at_once = not self.capture.is_parallel

        def keep(index: int, tensors: Tensors) -> Tensors:
            if self.tape is not None:
                self.tape.reach_layer()
            # vmap has no rule for some operations on channels-last tensors: contiguous copies.
            kept = tuple(t.detach().clone(memory_format=torch.contiguous_format) for t in tensors)
            self.capture.hold(0, kept)
            return clone_tensors(tensors)

        # Tensors made in inference mode cannot tell whether they were written to: hence its end.
        with torch.inference_mode(False), torch.no_grad():
            self.inputs, self.taped_inputs = clone_tensors(inputs), clone_tensors(inputs)
            if not self.capture.is_parallel:
                self.tape = Tape((self.taped_inputs, additional_forward_args))
            score = self._run(self.capture.first_run, keep)
            self.activations: Tensors = self.capture.gathered()[0]
            check_one_score_per_example(score)
            self.score: Tensor = score.reshape(-1)
            if self.tape is not None:
                self._rehearse(self.tape)

    def _rehearse(self, tape: Tape) -> None:
        """Run once more without an edit: does it give the same, and keep nothing?"""
        # What functions were called with before, and again, nobody has made in between.
        constants = {id(x): weakref.ref(x) for x in tape.tensors()}
        tape.watch = watch = Dependents(self.activations, tape.arguments | constants)
        reason = ""
        try:
            again = self._replay(self.activations)
            tolerance = 1e-4 * self.score.abs().max()
            if not bool(((again - self.score).abs() <= tolerance).all()):
                self.tape, reason = None, "a second pass does not give what the first gave"
            del again
        except Exception as error:
            self.tape, reason = None, _first_sentence(error)
        tape.watch = None
        if not reason and watch.are_kept():
            reason = "the model or a hook keeps what it computes"
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

        def score_after(step: Tensor) -> Tensor:
            edited = list(self.activations)
            edited[which] = edit(edited[which], step)
            return self._replay(tuple(edited))

        depth = torch._C._functorch.get_dynamic_layer_stack_depth()
        with torch.inference_mode(False), torch.no_grad():
            if self.at_once:
                try:
                    scores: Tensor = torch.vmap(score_after, randomness="different")(chunk)
                    if self.tape is None or not self.tape.has_failed:
                        return scores
                    self._leave_the_fast_way("the model catches an error, perhaps of vmap")
                except torch.OutOfMemoryError:
                    raise
                except Exception as error:  # a real error is raised again below
                    self._leave_the_fast_way(_first_sentence(error))
                finally:  # an interrupt may keep vmap from ending
                    torch._C._functorch.pop_dynamic_layer_stack_and_undo_to_depth(depth)
            return torch.stack([score_after(step) for step in chunk])

    def _replay(self, edited: Tensors) -> Tensor:
        """The score (B,) with the layer's tensors replaced."""
        if self.tape is not None:
            try:
                self.tape.rewind()
                return self._run(self.capture.run, lambda *_: self._behind(edited)).reshape(-1)
            except TapeError:
                self.tape = None
                if self.at_once:
                    raise
        score = self._run(self.capture.run, lambda _, tensors: self._piece_of(edited, tensors))
        return score.reshape(-1)

    def _behind(self, edited: Tensors) -> Tensors:
        assert self.tape is not None
        self.tape.reach_layer()
        return clone_tensors(edited)

    def _piece_of(self, edited: Tensors, tensors: Tensors) -> Tensors:
        """The part of the edited activations that DataParallel gives to the device of `tensors`."""
        start = 0
        for device in self.capture.devices()[0]:
            if device == tensors[0].device:
                break
            start += len(self.capture.by_device[0][device][0])
        return tuple(
            t[start : start + len(old)].to(old.device, copy=True)
            for t, old in zip(edited, tensors, strict=True)
        )

    def _run(self, run: Callable[..., Tensor], edit: Callable[[int, Tensors], Tensors]) -> Tensor:
        if self.tape is None:
            return run(edit, clone_tensors(self.inputs), self.target, self.additional_forward_args)
        with enter_mode(self.tape) as lock, lock:
            return run(edit, self.taped_inputs, self.target, self.additional_forward_args)


def _version(tensor: Tensor) -> int:
    """How often a tensor was written to; 0 for those of inference mode, which do not count."""
    return 0 if tensor.is_inference() else tensor._version


def _first_sentence(error: Exception) -> str:
    return str(error).partition("\n")[0].partition(". ")[0] or type(error).__name__
