"""Activations and gradients at layers of a model, from one forward pass.

`LayerCapture` hooks the layers for the length of the pass, with `edit_layers`. Each hook stores the
layer's tensors and passes copies on to the model. For gradients, the stored tensors become leaves
of the autograd graph, and the score is differentiated with respect to them. The hooks act only in
the thread that set them, so several threads may explain one model at once.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import DataParallel, Module

from captum_ext._compat import (
    TargetType,
    _format_tensor_into_tuples,
    _reduce_list,
    _sort_key_list,
)
from captum_ext._engine.channels import Dims, check_channels_first
from captum_ext._engine.faults import explain_missing_gradient
from captum_ext._engine.hooks import LayerEdit, edit_layers
from captum_ext._engine.layer_channels import LayerChannelTracer
from captum_ext._engine.modules import (
    EAGER_ADVICE,
    Forward,
    Tensors,
    check_eager,
    module_name,
    owner_module,
    root_module,
)
from captum_ext._engine.outputs import check_one_score_per_example
from captum_ext._engine.targets import run_forward
from captum_ext._errors import ArgumentError


class LayerReachedError(BaseException):
    """Raised by a hook to end a forward pass: its layer has run, and the rest is not needed.

    It is a BaseException, so that no `except Exception` in a model catches it.
    """


class LayerCapture:
    """Captures the floating-point tensors of layers, and gradients with respect to them.

    Args:
        forward_func: the model.
        layers: the modules. Each must run once.
        at_input: capture the layers' inputs instead of their outputs.
        device_ids: DataParallel's devices, if `forward_func` is a function that calls it.
        traces_channels: trace the dimension of the channels, for `check_channels`.

    Attributes:
        captured: for each layer, its tensors of the last pass on each device.
        channel_dims: for each layer, the channels' dimensions of its tensors, if traced.
    """

    def __init__(
        self,
        forward_func: Forward,
        layers: Sequence[Module],
        *,
        at_input: bool = False,
        device_ids: list[int] | None = None,
        traces_channels: bool = False,
    ) -> None:
        for layer in layers:
            check_eager(forward_func, layer)
        owner = owner_module(forward_func)
        self.is_parallel = device_ids is not None or isinstance(owner, DataParallel)
        self.device_ids: Any = device_ids or getattr(owner, "device_ids", None)
        self.forward_func, self.layers, self.at_input = forward_func, layers, at_input
        self.captured: list[dict[torch.device, Tensors]] = [{} for _ in layers]
        self.traces_channels = traces_channels
        self.channel_dims: list[list[Dims | None]] = [[] for _ in layers]

    def activations(
        self,
        inputs: Tensor | Tensors,
        target: TargetType = None,
        additional_forward_args: Any = None,
    ) -> tuple[list[Tensors], Tensor]:
        """Run the model without a graph, and return the layers' activations and the target's score.

        Returns:
            One tuple of tensors for each layer, and the entries of the output that `target`
            selects.
        """

        def record(index: int, tensors: Tensors) -> Tensors:
            # Two copies: the model may write in place into the tensor that it gets from here, and
            # into the original, if it kept a reference to it.
            self.store(index, tuple(t.detach().clone() for t in tensors))
            return clone_tensors(tensors)

        with torch.no_grad():
            score = self.run_traced(record, clone_tensors(inputs), target, additional_forward_args)
        return self.gather(), score

    def activations_and_gradients(
        self,
        inputs: Tensor | Tensors,
        target: TargetType = None,
        additional_forward_args: Any = None,
        grad_kwargs: dict[str, Any] | None = None,
    ) -> tuple[list[Tensors], list[Tensors]]:
        """Activations of the layers, and the gradients of the target's scores with respect to them.

        The autograd graph starts at the layers: the model runs without gradients up to them, and
        no gradients of parameters are computed. If the model switches gradients off between the
        layer and the score, it runs once more with gradients on from the start.

        Args:
            inputs: the model's inputs.
            target: as in Captum.
            additional_forward_args: as in Captum.
            grad_kwargs: further arguments of `torch.autograd.grad`. With `create_graph=True` the
                graph starts at the inputs, so that the results can be differentiated with respect
                to the inputs, the parameters and the activations.

        Returns:
            Two lists with one tuple of tensors for each layer: activations and gradients.

        Raises:
            RuntimeError: inside `torch.inference_mode`.
            AssertionError: `target` does not select one number for each example (as in Captum).
            ValueError: a layer does not run, runs twice, or the target does not depend on it.
        """
        check_gradients_exist()
        grad_kwargs = grad_kwargs or {}
        keeps_graph = bool(grad_kwargs.get("create_graph"))

        def start_graph(index: int, tensors: Tensors) -> Tensors:
            torch.set_grad_enabled(True)  # until the context manager around the pass ends
            leaves = tuple(
                t.clone() if t.requires_grad else t.detach().clone().requires_grad_()
                for t in tensors
            )
            self.store(index, leaves)
            return clone_tensors(leaves)

        for graph_in_front in [True] if keeps_graph or self.is_parallel else [False, True]:
            with torch.set_grad_enabled(graph_in_front):
                score = self.run_traced(
                    start_graph, clone_tensors(inputs), target, additional_forward_args
                )
            if score.requires_grad:
                break
        check_one_score_per_example(score)
        devices = self.devices()
        if keeps_graph and all(len(layer_devices) == 1 for layer_devices in devices):
            # The leaves themselves: copies would not be part of the graph.
            pairs = zip(self.captured, devices, strict=True)
            activations = [tensors_on[device] for tensors_on, (device,) in pairs]
        else:
            activations = self.gather()
        if unreached := self._differentiate(score, grad_kwargs):
            name = module_name(self.forward_func, self.layers[unreached[0]])
            cause = explain_missing_gradient(self.forward_func, inputs, additional_forward_args)
            raise ArgumentError(
                f"The target does not depend on `layer` {name}: it has no gradient there. {cause}",
                "layer",
            )
        if not keeps_graph:
            activations = [tuple(t.detach() for t in tensors) for tensors in activations]
        return activations, self.gather()

    def _differentiate(self, score: Tensor, grad_kwargs: dict[str, Any]) -> list[int]:
        """Replace the captured activations by the gradients of the score.

        Returns:
            The indices of the layers without a gradient.
        """
        keys = [(i, device) for i, devices in enumerate(self.devices()) for device in devices]
        leaves = [self.captured[index][device] for index, device in keys]
        flat = [tensor for tensors in leaves for tensor in tensors]
        gradients: Sequence[Tensor | None] = [None] * len(flat)
        if score.requires_grad:
            options = {"allow_unused": True, **grad_kwargs}
            with torch.enable_grad():
                gradients = torch.autograd.grad(torch.unbind(score.flatten()), flat, **options)
        remaining, unreached = iter(gradients), []
        for (index, device), tensors in zip(keys, leaves, strict=True):
            own_gradients = [next(remaining) for _ in tensors]
            if all(gradient is None for gradient in own_gradients):
                unreached.append(index)
            self.captured[index][device] = tuple(
                torch.zeros_like(t) if g is None else g
                for t, g in zip(tensors, own_gradients, strict=True)
            )
        return unreached

    def run(
        self, edit: LayerEdit, inputs: Tensors, target: TargetType, additional_forward_args: Any
    ) -> Tensor:
        """Run the model with `edit` at the layers (see `edit_layers`); return the target's score.

        The score is an empty tensor if `edit` raises `LayerReachedError`.

        Raises:
            ValueError: a layer does not run.
        """
        options: Any = {"at_input": self.at_input, "every_thread": self.is_parallel}
        ran: set[int] = set()

        def note_and_edit(index: int, tensors: Tensors) -> Tensors:
            ran.add(index)
            return edit(index, tensors)

        try:
            with edit_layers(self.layers, note_and_edit, **options) as lock, lock:
                score: Tensor = run_forward(
                    self.forward_func, inputs, target, additional_forward_args
                )
        except LayerReachedError:
            return torch.empty(0, device="cpu")
        for index, layer in enumerate(self.layers):
            if index not in ran:
                name = module_name(self.forward_func, layer)
                raise ArgumentError(
                    f"`layer` {name} did not run in the forward pass. Is it part of this model? If "
                    f"`forward_func` calls a compiled module, {EAGER_ADVICE}.",
                    "layer",
                )
        return score

    def run_traced(
        self, edit: LayerEdit, inputs: Tensors, target: TargetType, additional_forward_args: Any
    ) -> Tensor:
        """Like `run`, and trace the channels' dimensions, if `traces_channels`."""
        if not self.traces_channels:
            return self.run(edit, inputs, target, additional_forward_args)
        root = root_module(self.forward_func)
        tracer = LayerChannelTracer(self.layers, self.at_input, root, self.is_parallel)
        self.channel_dims = tracer.dims

        def trace_and_edit(index: int, tensors: Tensors) -> Tensors:
            tracer.record(index, tensors)
            return edit(index, tensors)

        with tracer.tracing(inputs) as lock, lock:
            return self.run(trace_and_edit, inputs, target, additional_forward_args)

    def check_channels(self, inputs: Tensor | Tensors, additional_forward_args: Any = None) -> None:
        """Raise a ValueError if the traced channels are not in dimension 1, or unknown.

        If a trace inside the layers did not determine them, another pass traces the whole model.
        """
        if self.traces_channels and any(None in dims or not dims for dims in self.channel_dims):
            root = root_module(self.forward_func)
            tracer = LayerChannelTracer(
                self.layers, self.at_input, root, self.is_parallel, from_input=True
            )

            def record(index: int, tensors: Tensors) -> Tensors:
                tracer.record(index, tensors)
                return clone_tensors(tensors)

            images = clone_tensors(inputs)
            with torch.no_grad(), tracer.tracing(images) as lock, lock:
                self.run(record, images, None, additional_forward_args)
            self.channel_dims = tracer.dims
        triples = zip(self.layers, self.captured, self.channel_dims, strict=True)
        for layer, tensors_on, dims in triples if self.traces_channels else ():
            for i, tensor in enumerate(next(iter(tensors_on.values()), ())):
                check_channels_first(tensor, dims[i] if dims else None, layer)

    def store(self, index: int, tensors: Tensors) -> None:
        """Store the tensors of layer `index`, by their device."""
        self.captured[index][tensors[0].device] = tensors

    def devices(self) -> list[list[torch.device]]:
        """The devices of each layer's tensors, in the order of the batch's chunks."""
        return [_sort_key_list(list(on), self.device_ids) for on in self.captured]

    def gather(self) -> list[Tensors]:
        """The tensors of each layer, concatenated over devices."""
        pairs = zip(self.captured, self.devices(), strict=True)
        return [_reduce_list([on[device] for device in devices]) for on, devices in pairs]


def clone_tensors(inputs: Tensor | Tensors) -> Tensors:
    """Clone the inputs, so that a model that works in place does not write into the caller's."""
    return tuple(tensor.clone() for tensor in _format_tensor_into_tuples(inputs))


def check_gradients_exist() -> None:
    """Raise a RuntimeError inside `torch.inference_mode`."""
    if torch.is_inference_mode_enabled():
        raise RuntimeError(
            "There are no gradients inside torch.inference_mode(). Leave it for gradient-based "
            "attributions; torch.no_grad() is no problem."
        )
