"""Run again only what lies behind a layer, on edited activations."""

import warnings
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from captum_ext._compat import (
    TargetType,
    _expand_additional_forward_args,
    _expand_target,
    _run_forward,
)
from captum_ext._model import (
    Forward,
    Seen,
    Tensors,
    check_one_score_each,
    copies,
    intercept,
    module_name,
)


class Tape(TorchFunctionMode):
    """Record what every torch function in front of a layer gives, and answer from it later.

    Torch functions of one thread pass through here one by one. Up to the layer, the first pass
    writes down each result; later passes are handed the results and compute nothing. A function
    without tensors (a switch of autocast, say) is run each time.
    """

    def __init__(self) -> None:
        super().__init__()
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
            raise RuntimeError("its second pass took another path than its first")
        _, result, on_tensors = self.results[self.position]
        self.position += 1
        return result if on_tensors else func(*args, **kwargs)

    def reach_layer(self) -> None:
        self.behind = True
        if not self.recorded:
            leaves = (x for _, result, _ in self.results for x in tree_leaves(result))
            tensors = [x for x in leaves if isinstance(x, Tensor) and not x.is_inference()]
            self.versions = [(tensor, tensor._version) for tensor in tensors]

    def rewind(self) -> None:
        self.recorded, self.behind, self.position = True, False, 0

    def is_intact(self) -> bool:
        """Whether nothing that lies behind the layer wrote into what came from in front of it."""
        return all(tensor._version == version for tensor, version in self.versions)


class Behind:
    """Run again only what lies behind a layer, on edited activations.

    The first pass writes down everything in front of the layer; each later pass is answered from
    that up to the layer and computes only what is behind it, for a whole chunk of edits at once
    (`torch.vmap`). Skips around the layer and the model's own Python code, shapes included, are
    as in the first pass, because it *is* the model's code that runs, on the same batch. Kept in
    memory: the intermediate results in front of the layer, once.

    A model that cannot be run like this falls back, with a warning, to one full forward pass for
    each edit, in chunks: control flow behind the layer that depends on the activations, in-place
    writes behind the layer into tensors from in front of it, operations that `vmap` does not know.
    DataParallel always takes the full passes.

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
        seen = Seen(forward_func, [layer], device_ids)
        self.device_ids = seen.device_ids if seen.parallel else None
        self.tape: Tape | None = None if seen.parallel else Tape()

        def keep(index: int, tensors: Tensors) -> Tensors:
            if self.tape is not None:
                self.tape.reach_layer()
            seen.by_device[0][tensors[0].device] = tuple(t.detach().clone() for t in tensors)
            return tuple(t.clone() for t in tensors)

        with ExitStack() as modes:
            # Tensors made in inference mode cannot tell whether they were written to.
            modes.enter_context(torch.inference_mode(False))
            modes.enter_context(torch.no_grad())
            self.inputs = copies(inputs)
            hooks = intercept([layer], keep, at_input=at_input, every_thread=seen.parallel)
            modes.enter_context(hooks)
            if self.tape is not None:
                modes.enter_context(self.tape)
            score = _run_forward(forward_func, self.inputs, target, additional_forward_args)
        self.activations: Tensors = seen.gather()[0]
        check_one_score_each(score)
        self.score = score.reshape(-1)
        if self.tape is not None:
            self.tape.rewind()

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
        with torch.inference_mode(False), torch.no_grad():
            if self.tape is not None:
                reason = "it writes in place into what comes from in front of the layer"
                try:
                    if self.tape.is_intact():
                        scores = self._rerun_behind(self.tape, edit, chunk, which)
                        if self.tape.is_intact():
                            return scores
                except torch.OutOfMemoryError:
                    raise
                except Exception as error:  # the full passes below raise what is truly wrong
                    reason = str(error).partition("\n")[0]
                self.tape = None
                warnings.warn(
                    f"The part of the model behind {module_name(self.forward_func, self.layer)} "
                    f"cannot be run on its own ({reason}): running the whole model for each edit.",
                    stacklevel=2,
                )
            return self._run_all(edit, chunk, which)

    def _rerun_behind(
        self, tape: Tape, edit: Callable[[Tensor, Tensor], Tensor], chunk: Tensor, which: int
    ) -> Tensor:
        def score_after(one: Tensor) -> Tensor:
            def replace(index: int, tensors: Tensors) -> Tensors:
                tape.reach_layer()
                new = [t.clone() for t in self.activations]
                new[which] = edit(new[which], one)
                return tuple(new)

            tape.rewind()
            with intercept([self.layer], replace, at_input=self.at_input), tape:
                score = _run_forward(
                    self.forward_func, self.inputs, self.target, self.additional_forward_args
                )
            flat: Tensor = score.reshape(-1)
            return flat

        scores: Tensor = torch.vmap(score_after, randomness="different")(chunk)
        return scores

    def _run_all(
        self, edit: Callable[[Tensor, Tensor], Tensor], chunk: Tensor, which: int
    ) -> Tensor:
        n, rows = len(chunk), len(chunk) * len(self.activations[which])
        edited = torch.vmap(edit, in_dims=(None, 0))(self.activations[which], chunk).flatten(0, 1)

        def replace(index: int, tensors: Tensors) -> Tensors:
            start = 0
            if self.device_ids is not None:  # DataParallel gives each device a piece of the batch
                piece = -(-rows // len(self.device_ids))
                start = piece * self.device_ids.index(tensors[which].device.index)
            new = list(tensors)
            mine = edited[start : start + len(new[which])]
            new[which] = mine.to(new[which].device, copy=True)
            return tuple(new)

        parallel = self.device_ids is not None
        with intercept([self.layer], replace, at_input=self.at_input, every_thread=parallel):
            scores = _run_forward(
                self.forward_func,
                tuple(torch.cat([x] * n) for x in self.inputs),
                _expand_target(self.target, n),
                _expand_additional_forward_args(self.additional_forward_args, n),
            )
        by_edit: Tensor = scores.reshape(n, -1)
        return by_edit
