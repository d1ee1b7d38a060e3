"""Traces the channels' dimensions in the part of a pass that leads to given layers."""

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch.nn import Module

from captum_ext._engine.channels import (
    CHANNELS_FIRST_MODULES,
    ChannelTracer,
    Dims,
    input_channels,
    trace_start,
)
from captum_ext._engine.hooks import hooked
from captum_ext._engine.modules import Tensors


class LayerChannelTracer:
    """Traces the channels on the way to layers, in each thread that runs them.

    Most layers contain a module that fixes the channels' dimension (see `trace_start`), so a trace
    of a part of the layer is enough. It is faster: the mode slows down each function that it sees.

    Args:
        layers: the layers.
        at_input: trace the layers' inputs, not their outputs.
        root: the model, if it is known.
        is_parallel: whether the model runs in threads of its own, like DataParallel's replicas.
        from_input: trace from the model's input, even if a part of the layers would do.

    Attributes:
        dims: for each layer, the channels' dimensions of its tensors (None if unknown); empty
            before it has run.
    """

    def __init__(
        self,
        layers: Sequence[Module],
        at_input: bool,
        root: Module | None,
        is_parallel: bool,
        from_input: bool = False,
    ) -> None:
        # The inputs of these layers have their channels in dimension 1, without any trace.
        known = [at_input and isinstance(layer, CHANNELS_FIRST_MODULES) for layer in layers]
        self.untraced = {i for i, is_known in enumerate(known) if is_known}
        traced = [layer for i, layer in enumerate(layers) if i not in self.untraced]
        starts = [None if at_input else trace_start(layer) for layer in traced]
        self.from_input = from_input or None in starts
        self.starts = [start for start in starts if start is not None]
        if self.from_input:
            self.starts = [root] if is_parallel and root is not None else []
        self.layers, self.is_parallel = layers, is_parallel
        self.dims: list[list[Dims | None]] = [[] for _ in layers]
        self.local, self.lock = threading.local(), threading.Lock()

    def begin(self, *_: Any) -> None:
        """Start the trace in this thread. Traces nest: it stops after as many calls of `_end`."""
        self.local.depth = getattr(self.local, "depth", 0) + 1
        if self.local.depth == 1:
            self.local.n_layers_left = len(self.layers) - len(self.untraced)
            self.local.tracer = ChannelTracer(self.lock)
            self.local.tracers = [*getattr(self.local, "tracers", ()), self.local.tracer]
            self.local.tracer.__enter__()

    def record(self, index: int, tensors: Tensors) -> None:
        """Record the channels' dimensions of the tensors of layer `index`."""
        if index in self.untraced:
            self.dims[index] = [input_channels(self.layers[index], x.dim()) for x in tensors]
        elif getattr(self.local, "depth", 0):
            self.dims[index] = [self.local.tracer.dims_of(x) for x in tensors]
            self.local.n_layers_left -= 1
            # After the last layer, the model goes on without the mode.
            if not self.from_input or not self.local.n_layers_left:
                self._end()

    def _end(self) -> None:
        self.local.depth -= 1
        if not self.local.depth:
            self.local.tracer.leave()

    @contextmanager
    def tracing(self, inputs: Tensors) -> Iterator[threading.Lock]:
        """Trace the forward passes in the block, while the yielded lock is held."""
        hooks = hooked(self.starts, before=self.begin, every_thread=self.is_parallel)
        try:
            with hooks as self.lock:
                if self.from_input and not self.starts:
                    self.begin()
                    self.local.tracer.mark_inputs(inputs)
                yield self.lock
        finally:
            for tracer in getattr(self.local, "tracers", ()):
                tracer.leave_with_inner_modes()
