"""What a model's layers put out or take in during one forward pass, and gradients there.

The layers are hooked for the length of the pass, and the hooks act in the thread that set them
only, so that several threads may explain one model at once.
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
    _run_forward,
    _sort_key_list,
)
from captum_ext._engine.channels import Dims, LayerChannelTracer, check_channels_first
from captum_ext._engine.hooks import edit_layers
from captum_ext._engine.modules import Forward, Tensors, module_name, owner_module, root_module
from captum_ext._engine.outputs import check_one_score_per_example


class LayerReachedError(BaseException):
    """The layers have run, and nothing behind them is needed. No `except Exception` catches it."""


class LayerCapture:
    """Captures the floating-point tensors of layers.

    Args:
        forward_func: the model.
        layers: the modules. Each must run once.
        at_input: the layers' inputs instead of their outputs.
        device_ids: DataParallel's devices, where `forward_func` is a function around it.
        traces_channels: whether to look where the channels are, for `check_channels`.

    Attributes:
        channel_dims: if they are traced, where the channels of each layer's tensors are.
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
        owner = owner_module(forward_func)
        self.is_parallel = device_ids is not None or isinstance(owner, DataParallel)
        self.device_ids: Any = device_ids or getattr(owner, "device_ids", None)
        self.forward_func, self.layers, self.at_input = forward_func, layers, at_input
        self.by_device: list[dict[torch.device, Tensors]] = [{} for _ in layers]
        self.traces_channels = traces_channels
        self.channel_dims: list[list[Dims | None]] = [[] for _ in layers]

    def activations(
        self,
        inputs: Tensor | Tensors,
        target: TargetType = None,
        additional_forward_args: Any = None,
    ) -> tuple[list[Tensors], Tensor]:
        """Activations and the scores of the target, in one pass without a graph.

        Returns:
            One tuple of tensors for each layer, and what `target` selects of the output.
        """

        def keep(index: int, tensors: Tensors) -> Tensors:
            # Both the kept and the passed-on tensor are copies: the model may go on in place, on
            # the value it gets here as well as on an alias of it that it kept.
            self.hold(index, tuple(t.detach().clone() for t in tensors))
            return clone_tensors(tensors)

        with torch.no_grad():
            score = self.first_run(keep, clone_tensors(inputs), target, additional_forward_args)
        return self.gathered(), score

    def gradients(
        self,
        inputs: Tensor | Tensors,
        target: TargetType = None,
        additional_forward_args: Any = None,
        grad_kwargs: dict[str, Any] | None = None,
    ) -> tuple[list[Tensors], list[Tensors]]:
        """Activations, and the gradient of each example's target with respect to them.

        The layers' activations are made leaves of a graph that begins with them: what lies in front
        runs as under `no_grad`, and gradients of parameters are never computed. Where the model
        switches gradients off behind the layer (a frozen part under `no_grad`), the pass is run
        once more with gradients on from the start. `grad_kwargs` goes to `torch.autograd.grad`;
        with `create_graph=True` the caller's graph is kept all the way, so that the result can be
        differentiated with respect to the inputs, the parameters and the activations.

        Raises:
            RuntimeError: inside `torch.inference_mode`, where no gradient exists.
            AssertionError: `target` does not select one number for each example (as in Captum).
            ValueError: a layer that does not run, runs twice, or that the target does not depend
                on.
        """
        check_gradients_exist()
        grad_kwargs = grad_kwargs or {}
        keeps_graph = bool(grad_kwargs.get("create_graph"))

        def start_graph(index: int, tensors: Tensors) -> Tensors:
            torch.set_grad_enabled(True)  # the context around the pass restores the caller's mode
            leaves = tuple(
                t.clone() if t.requires_grad else t.detach().clone().requires_grad_()
                for t in tensors
            )
            self.hold(index, leaves)
            return clone_tensors(leaves)

        for graph_in_front in [True] if keeps_graph or self.is_parallel else [False, True]:
            with torch.set_grad_enabled(graph_in_front):
                score = self.first_run(
                    start_graph, clone_tensors(inputs), target, additional_forward_args
                )
            if score.requires_grad:
                break
        check_one_score_per_example(score)
        devices = self.devices()
        if keeps_graph and all(len(on) == 1 for on in devices):
            # The leaves themselves: a copy would not lie on the gradients' way.
            pairs = zip(self.by_device, devices, strict=True)
            activations = [held[device] for held, (device,) in pairs]
        else:
            activations = self.gathered()
        self._differentiate(score, grad_kwargs)
        if not keeps_graph:
            activations = [tuple(t.detach() for t in tensors) for tensors in activations]
        return activations, self.gathered()

    def _differentiate(self, score: Tensor, grad_kwargs: dict[str, Any]) -> None:
        """Put the score's gradients in the place of the activations."""
        keys = [(index, device) for index, on in enumerate(self.devices()) for device in on]
        leaves = [self.by_device[index][device] for index, device in keys]
        flat = [tensor for tensors in leaves for tensor in tensors]
        gradients: Sequence[Tensor | None] = [None] * len(flat)
        if score.requires_grad:
            options = {"allow_unused": True, **grad_kwargs}
            with torch.enable_grad():
                gradients = torch.autograd.grad(torch.unbind(score.flatten()), flat, **options)
        following = iter(gradients)
        for (index, device), tensors in zip(keys, leaves, strict=True):
            pieces = [next(following) for _ in tensors]
            if all(piece is None for piece in pieces):
                raise ValueError(
                    f"The target does not depend on `layer` "
                    f"{module_name(self.forward_func, self.layers[index])}: it has no gradient "
                    f"there."
                )
            self.by_device[index][device] = tuple(
                torch.zeros_like(t) if g is None else g
                for t, g in zip(tensors, pieces, strict=True)
            )

    def run(
        self, edit: Any, inputs: Tensors, target: TargetType, additional_forward_args: Any
    ) -> Tensor:
        """What `target` selects of the output, with `edit` at the layers (see `edit_layers`).

        Empty where `edit` raises `LayerReachedError`.
        """
        options: Any = {"at_input": self.at_input, "every_thread": self.is_parallel}
        try:
            with edit_layers(self.layers, edit, **options) as lock, lock:
                score: Tensor = _run_forward(
                    self.forward_func, inputs, target, additional_forward_args
                )
        except LayerReachedError:
            return torch.empty(0)
        return score

    def first_run(
        self, edit: Any, inputs: Tensors, target: TargetType, additional_forward_args: Any
    ) -> Tensor:
        """As `run`, with a look at where the channels of the layers' tensors are."""
        if not self.traces_channels:
            return self.run(edit, inputs, target, additional_forward_args)
        root = root_module(self.forward_func)
        tracer = LayerChannelTracer(self.layers, self.at_input, root, self.is_parallel)
        self.channel_dims = tracer.dims

        def see_and_edit(index: int, tensors: Tensors) -> Tensors:
            tracer.see(index, tensors)
            edited: Tensors = edit(index, tensors)
            return edited

        with tracer.tracing(inputs) as lock, lock:
            return self.run(see_and_edit, inputs, target, additional_forward_args)

    def check_channels(self, inputs: Tensor | Tensors, additional_forward_args: Any = None) -> None:
        """Raise a ValueError where channels are traced and not known to be in dimension 1.

        Where a trace of the layers alone has lost them, another pass traces the whole way.
        """
        if self.traces_channels and any(None in dims or not dims for dims in self.channel_dims):
            root = root_module(self.forward_func)
            tracer = LayerChannelTracer(
                self.layers, self.at_input, root, self.is_parallel, is_whole=True
            )

            def see(index: int, tensors: Tensors) -> Tensors:
                tracer.see(index, tensors)
                return clone_tensors(tensors)

            images = clone_tensors(inputs)
            with torch.no_grad(), tracer.tracing(images) as lock, lock:
                self.run(see, images, None, additional_forward_args)
            self.channel_dims = tracer.dims
        for layer, held, dims in zip(self.layers, self.by_device, self.channel_dims, strict=True):
            for i, tensor in enumerate(next(iter(held.values()), ())):
                if self.traces_channels:
                    check_channels_first(tensor, dims[i] if dims else None, layer)

    def hold(self, index: int, tensors: Tensors) -> None:
        """Keep the tensors of one layer on one device."""
        self.by_device[index][tensors[0].device] = tensors

    def devices(self) -> list[list[torch.device]]:
        """The devices of each layer, in the order of DataParallel's pieces of the batch."""
        for layer, held in zip(self.layers, self.by_device, strict=True):
            if not held:
                raise ValueError(
                    f"`layer` {module_name(self.forward_func, layer)} did not run in the forward "
                    f"pass. Is it part of this model, eager and not compiled?"
                )
        return [_sort_key_list(list(held), self.device_ids) for held in self.by_device]

    def gathered(self) -> list[Tensors]:
        """The tensors of each layer, those of several devices joined."""
        pairs = zip(self.by_device, self.devices(), strict=True)
        return [_reduce_list([held[device] for device in devices]) for held, devices in pairs]


def clone_tensors(inputs: Tensor | Tensors) -> Tensors:
    """Copies of `inputs`: a model whose first step works in place must not reach the caller's."""
    return tuple(tensor.clone() for tensor in _format_tensor_into_tuples(inputs))


def check_gradients_exist() -> None:
    """Raise a RuntimeError inside `torch.inference_mode`."""
    if torch.is_inference_mode_enabled():
        raise RuntimeError(
            "Gradients do not exist inside torch.inference_mode(): use torch.no_grad() around a "
            "gradient-based attribution, or none."
        )
