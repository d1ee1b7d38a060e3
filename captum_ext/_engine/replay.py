"""Runs a model only up to a layer, or again only behind it, on edited activations.

`LayerReplay` serves methods that edit one layer many times, such as Ablation-CAM. Its first pass
records on a `Tape` the result of every torch function in front of the layer. In later passes the
model's code runs again, but the tape answers these functions, so nothing in front of the layer is
computed twice. Behind the layer, functions run as usual, for many edits at once by `torch.vmap`.
"""

import gc
import weakref
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module, Parameter
from torch.utils._pytree import tree_leaves

from captum_ext._checks import warn
from captum_ext._compat import TargetType
from captum_ext._engine.capture import LayerCapture, LayerReachedError, clone_tensors
from captum_ext._engine.hooks import LayerEdit, LockedFunctionMode, enter_mode
from captum_ext._engine.modules import Forward, Tensors, module_name
from captum_ext._engine.outputs import check_one_score_per_example
from captum_ext._engine.state import set_inference_mode

# --- up to a layer -------------------------------------------------------------------------------


def run_to_layer(
    forward_func: Forward,
    layer: Module,
    inputs: Tensors,
    additional_forward_args: Any = None,
    *,
    traces_channels: bool = False,
) -> Tensors:
    """The output tensors of a layer, with a graph to `inputs` if gradients are enabled.

    The model stops at the layer, except with DataParallel, whose replicas run to their end. A
    second run of the layer would therefore not be noticed.

    Args:
        forward_func: the model.
        layer: the layer.
        inputs: the model's inputs.
        additional_forward_args: as in Captum.
        traces_channels: check that the channels are in dimension 1.

    Raises:
        ValueError: the layer did not run; the traced channels are not in dimension 1.
    """
    capture = LayerCapture(forward_func, [layer], traces_channels=traces_channels)

    def stop(index: int, tensors: Tensors) -> Tensors:
        capture.store(index, tensors)
        if not capture.is_parallel:
            raise LayerReachedError
        return clone_tensors(tensors)  # the model may write into them

    capture.run_traced(stop, clone_tensors(inputs), None, additional_forward_args)
    capture.check_channels(inputs, additional_forward_args)
    return capture.gather()[0]


# --- behind a layer ------------------------------------------------------------------------------


class TapeError(Exception):
    """A pass cannot be answered from the tape: it differs from the first pass."""


class Tape(LockedFunctionMode):
    """Records the results of the torch functions in front of a layer, and replays them later.

    The mode sees all torch functions of one thread, in order. In the first pass, it records each
    result up to the layer. In later passes, it returns these results, and computes nothing.
    Functions without tensors (one that switches autocast, for example) run in each pass.

    Args:
        inputs: the model's arguments. They and the results must not be written to.

    Attributes:
        results: (function, result, whether it has tensors as arguments or results), in order.
        position: the index of the next result to replay.
        is_recorded: the first pass has ended.
        is_behind: the current pass has reached the layer.
        versions: the recorded tensors, and how often each had been written to.
        arguments: the tensors that functions behind the layer took in the first pass, by id.
        dependents: if set, it sees the functions behind the layer.
        has_failed: a function behind the layer has raised an error.
    """

    def __init__(self, inputs: Any) -> None:
        super().__init__()
        self.inputs = inputs
        self.results: list[tuple[Any, Any, bool]] = []
        self.position = 0
        self.is_recorded = self.is_behind = False
        self.versions: list[tuple[Tensor, int]] = []
        self.arguments: dict[int, weakref.ref[Tensor]] = {}
        self.dependents: Dependents | None = None
        self.has_failed = False

    def call(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        """Run a torch function, or return its recorded result in front of the layer."""
        if self.is_behind:
            if not self.is_recorded:
                self.arguments |= {id(x): weakref.ref(x) for x in _tensor_leaves((args, kwargs))}
            try:
                if self.dependents is not None:
                    return self.dependents.call(func, args, kwargs)
                return func(*args, **kwargs)
            except Exception:
                self.has_failed = True
                raise
        if not self.is_recorded:
            result = func(*args, **kwargs)
            self.results.append((func, result, bool(_tensor_leaves((args, kwargs, result)))))
            return result
        if self.position == len(self.results) or self.results[self.position][0] != func:
            raise TapeError("its second pass took another path than its first")
        _, result, has_tensors = self.results[self.position]
        self.position += 1
        return result if has_tensors else func(*args, **kwargs)

    def tensors(self) -> list[Tensor]:
        """The tensors among the model's arguments and the recorded results."""
        return _tensor_leaves((self.inputs, [result for _, result, _ in self.results]))

    def reach_layer(self) -> None:
        """Note that the pass has reached the layer: functions are computed from here on."""
        self.is_behind = True
        if self.is_recorded:
            self._check_versions()
        else:
            self.versions = [(tensor, _version(tensor)) for tensor in self.tensors()]

    def rewind(self) -> None:
        """Prepare for another pass."""
        self._check_versions()
        self.is_recorded, self.is_behind, self.position = True, False, 0

    def _check_versions(self) -> None:
        """Raise a TapeError if a recorded tensor has been written to."""
        if any(_version(tensor) != version for tensor, version in self.versions):
            raise TapeError("it writes in place into tensors from in front of the layer")


class Dependents:
    """Collects the tensors that a pass computes from a layer's activations.

    `outlive_pass` then tells whether the model or a hook keeps one of them.

    Args:
        activations: the layer's activations.
        constants: tensors that do not depend on the activations, by id. (Parameters never do.)
    """

    def __init__(self, activations: Tensors, constants: dict[int, weakref.ref[Tensor]]) -> None:
        self.activations, self.constants = {id(x) for x in activations}, constants
        self.references: list[weakref.ref[Tensor]] = []

    def call(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        """Run a torch function, and note the tensors that may depend on the activations.

        These are its results, unless all of its arguments are constants, and its arguments of
        unknown origin: the functions inside a script are not seen.
        """
        arguments = _tensor_leaves((args, kwargs))
        constants = {id(x): _version(x) for x in arguments if self._is_constant(x)}
        unknown = [x for x in arguments if id(x) not in self.activations | constants.keys()]
        self.references += map(weakref.ref, unknown)
        del unknown
        result = func(*args, **kwargs)
        is_constant = bool(arguments) and len(constants) == len({id(x) for x in arguments})
        for x in _tensor_leaves(result):
            if constants.get(id(x)) == _version(x):
                continue  # an unchanged constant, like `weight.to(x)`
            if is_constant:
                self.constants[id(x)] = weakref.ref(x)
            else:
                self.constants.pop(id(x), None)
                self.references.append(weakref.ref(x))
        return result

    def _is_constant(self, tensor: Tensor) -> bool:
        known = self.constants.get(id(tensor))
        return isinstance(tensor, Parameter) or (known is not None and known() is tensor)

    def outlive_pass(self) -> bool:
        """Return whether one of the collected tensors still exists."""
        if all(reference() is None for reference in self.references):
            return False
        gc.collect()  # only if needed, because it takes long
        return any(reference() is not None for reference in self.references)


class LayerReplay:
    """Runs the model again behind a layer, on edited activations of the layer.

    The first pass records all results in front of the layer on a tape. Each later pass runs the
    model's code on the same batch, takes the results in front of the layer from the tape, and
    computes only behind it. Connections that skip the layer work, because the model's own code
    runs. Memory: all intermediate results in front of the layer.

    There are three ways, from fast to slow. A warning tells that the first is not possible:

    1. All edits of a chunk at once, by `torch.vmap`.
    2. One edit after the other. This is for models that `vmap` cannot run behind the layer (control
       flow that depends on the activations, NumPy, custom functions). It is also for models that
       keep a result of a pass (in an attribute, by a hook), which must not be one of `vmap`'s
       internal tensors.
    3. The whole model for each edit. This is for models that give another score in a second pass
       without an edit (in-place writes, counters, dropout), and for DataParallel.

    Args:
        forward_func: the model.
        layer: the layer, which must run once.
        inputs: a batch of B examples.
        target: as in Captum.
        additional_forward_args: as in Captum.
        **options: those of `LayerCapture`.

    Attributes:
        activations: the layer's tensors, unedited.
        score: (B,), the target's score for the unedited activations.
        at_once: all edits of a chunk run at once.
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

        def record(index: int, tensors: Tensors) -> Tensors:
            if self.tape is not None:
                self.tape.reach_layer()
            # Contiguous copies: vmap has no rule for some operations on channels-last tensors.
            contiguous = torch.contiguous_format
            activations = tuple(t.detach().clone(memory_format=contiguous) for t in tensors)
            self.capture.store(0, activations)
            return clone_tensors(tensors)

        # Inference tensors do not count writes, which the tape must detect: leave inference mode.
        with set_inference_mode(False), torch.no_grad():
            self.inputs, self.taped_inputs = clone_tensors(inputs), clone_tensors(inputs)
            if not self.capture.is_parallel:
                self.tape = Tape((self.taped_inputs, additional_forward_args))
            score = self._run(self.capture.run_traced, record)
            self.activations: Tensors = self.capture.gather()[0]
            check_one_score_per_example(score)
            self.score: Tensor = score.reshape(-1)
            if self.tape is not None:
                self._check_second_pass(self.tape)

    def _check_second_pass(self, tape: Tape) -> None:
        """Replay without an edit, to see whether the tape and `vmap` may be used."""
        # An argument of the first pass that is also one of the second was not made in either.
        constants = {id(x): weakref.ref(x) for x in tape.tensors()}
        tape.dependents = dependents = Dependents(self.activations, tape.arguments | constants)
        reason = ""
        try:
            again = self._replay(self.activations)
            tolerance = 1e-4 * self.score.abs().max()
            if not bool(((again - self.score).abs() <= tolerance).all()):
                self.tape, reason = None, "a second pass does not give what the first gave"
            del again
        except Exception as error:
            self.tape, reason = None, _first_sentence(error)
        tape.dependents = None
        if not reason and dependents.outlive_pass():
            reason = "the model or a hook keeps a result"
        if reason:
            self._disable_vmap(reason)

    def _disable_vmap(self, reason: str) -> None:
        """Run the edits one after the other from now on, and warn."""
        self.at_once = False
        name = module_name(self.forward_func, self.layer)
        warn(
            f"The model behind {name} cannot be run for several edits at once ({reason}): running "
            f"one edit after the other."
        )

    def __call__(
        self, edit: Callable[[Tensor, Tensor], Tensor], chunk: Tensor, tensor_index: int = 0
    ) -> Tensor:
        """Scores after each of `len(chunk)` edits, (len(chunk), B).

        Args:
            edit: takes the activation (B, ...) and one entry of `chunk`, and returns the new
                activation, by operations that `torch.vmap` supports.
            chunk: the parameters of the edits, along dimension 0.
            tensor_index: the index of the tensor to edit, for a layer with several.
        """

        def score_after(entry: Tensor) -> Tensor:
            edited = list(self.activations)
            edited[tensor_index] = edit(edited[tensor_index], entry)
            return self._replay(tuple(edited))

        depth = torch._C._functorch.get_dynamic_layer_stack_depth()
        with set_inference_mode(False), torch.no_grad():
            if self.at_once:
                try:
                    scores: Tensor = torch.vmap(score_after, randomness="different")(chunk)
                    if self.tape is None or not self.tape.has_failed:
                        return scores
                    self._disable_vmap("the model catches an error, perhaps of vmap")
                except torch.OutOfMemoryError:
                    raise
                except Exception as error:  # an error of the model itself is raised again below
                    self._disable_vmap(_first_sentence(error))
                finally:  # an interrupt can keep vmap from ending
                    _close_levels(depth)
            return torch.stack([score_after(entry) for entry in chunk])

    def _replay(self, edited: Tensors) -> Tensor:
        """The score (B,) with the layer's tensors replaced by `edited`."""
        if self.tape is not None:
            try:
                self.tape.rewind()
                return self._run(self.capture.run, lambda *_: self._reach_layer(edited)).reshape(-1)
            except TapeError:
                self.tape = None
                if self.at_once:
                    raise
        score = self._run(self.capture.run, lambda _, tensors: self._chunk_for(tensors, edited))
        return score.reshape(-1)

    def _reach_layer(self, edited: Tensors) -> Tensors:
        """Tell the tape that the pass has reached the layer, and copy the edited activations."""
        assert self.tape is not None
        self.tape.reach_layer()
        return clone_tensors(edited)

    def _chunk_for(self, tensors: Tensors, edited: Tensors) -> Tensors:
        """The chunk of the edited activations for the device of `tensors`, with DataParallel."""
        start = 0
        for device in self.capture.devices()[0]:
            if device == tensors[0].device:
                break
            start += len(self.capture.captured[0][device][0])
        return tuple(
            t[start : start + len(old)].to(old.device, copy=True)
            for t, old in zip(edited, tensors, strict=True)
        )

    def _run(self, run: Callable[..., Tensor], edit: LayerEdit) -> Tensor:
        """Call `run`, a method of the capture, with the tape's mode if there is a tape."""
        if self.tape is None:
            return run(edit, clone_tensors(self.inputs), self.target, self.additional_forward_args)
        with enter_mode(self.tape) as lock, lock:
            return run(edit, self.taped_inputs, self.target, self.additional_forward_args)


def _tensor_leaves(tree: Any) -> list[Tensor]:
    """The tensors in nested tuples, lists and dicts."""
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def _version(tensor: Tensor) -> int:
    """The number of writes to a tensor; 0 for inference tensors, which do not count them."""
    return 0 if tensor.is_inference() else tensor._version


def _close_levels(depth: int) -> None:
    """Close the levels of vmap beyond `depth`, which an interrupt left open.

    Torch 2.6 has the same as `pop_dynamic_layer_stack_and_undo_to_depth`, but closes one too many.
    """
    functorch = torch._C._functorch
    while functorch.get_dynamic_layer_stack_depth() > depth:
        with suppress(RuntimeError):  # another transform of the model; its level is closed, too
            functorch._vmap_decrement_nesting()


def _first_sentence(error: Exception) -> str:
    """The first sentence of an error's message, or the name of its class."""
    return str(error).partition("\n")[0].partition(". ")[0] or type(error).__name__
