"""Leave the model and the random numbers as they were found."""

import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from weakref import WeakSet

import numpy as np
import torch
from torch.jit import ScriptModule
from torch.nn import Module

from captum_ext._checks import warn
from captum_ext._engine.hooks import hooked_globally
from captum_ext._engine.modules import Forward, root_module


class _BufferSnapshot:
    """The buffers of a module as they are now."""

    def __init__(self, module: Module) -> None:
        self.module, self.named = module, dict(module._buffers)
        self.values = {n: b.detach().clone() for n, b in self.named.items() if b is not None}

    def restore(self) -> None:
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


class _PreservingCall:
    """One call that keeps buffers."""

    def __init__(self) -> None:
        self.thread = threading.get_ident()


_buffers_lock = threading.Lock()
# By module: its buffers before any call that is under way, and these calls, as long as they live:
# an interrupt may keep one from letting go.
_buffers_of_modules: dict[int, tuple[_BufferSnapshot, WeakSet[_PreservingCall]]] = {}


@contextmanager
def preserve_state(forward_func: Forward) -> Iterator[None]:
    """Put buffers back at the end, and warn once if the model is in train mode.

    Kept are the buffers of modules in train mode, and of modules that are not torch's own. For a
    plain function, whose modules are not known, they are found while they run. Where several
    threads explain one model, the last that goes puts back what the first found.
    """
    call, had_gradients = _PreservingCall(), torch.is_grad_enabled()
    mine: dict[int, _BufferSnapshot | None] = {}  # None: another thread was here before
    warned = False

    def keep(module: Module) -> None:
        nonlocal warned
        if id(module) in mine:
            return
        if _depends_on_mode(module) and not warned:
            warned = True
            warn(
                f"The model is in train mode ({type(module).__name__} is): it is explained as it "
                f"stands, with batch statistics and dropout. Call .eval() to explain what it "
                f"predicts in use."
            )
        if module.training or not type(module).__module__.startswith("torch.nn."):
            with _buffers_lock:
                first, calls = _buffers_of_modules.get(id(module), (None, WeakSet()))
                now = None
                if all(other.thread == call.thread for other in calls):
                    now = _BufferSnapshot(module)
                # First what lets go of it, for an interrupt may come in between.
                mine[id(module)] = now
                if first is None or not calls:
                    first = now or _BufferSnapshot(module)
                _buffers_of_modules[id(module)] = (first, calls)
                calls.add(call)

    root = root_module(forward_func)
    try:
        if root is None:
            with hooked_globally(keep) as lock, lock:
                yield
        else:
            for module in root.modules():
                keep(module)
            yield
    finally:
        with ExitStack() as each:  # also where one of them raises
            each.callback(torch._C._set_grad_enabled, had_gradients)  # an interrupt may lose it
            for key, own in mine.items():
                each.callback(_release, key, call, own)


def _release(key: int, call: _PreservingCall, own: _BufferSnapshot | None) -> None:
    with _buffers_lock:
        if key not in _buffers_of_modules:
            return
        first, calls = _buffers_of_modules[key]
        calls.discard(call)
        if calls:
            if own is not None and all(other.thread == call.thread for other in calls):
                own.restore()
        else:
            del _buffers_of_modules[key]
            first.restore()


def _depends_on_mode(module: Module) -> bool:
    """Whether `module` is in train mode, and by its looks does something else than in eval mode."""
    is_random = any(word in type(module).__name__ for word in ("Drop", "Stochastic", "RReLU"))
    return module.training and not module._modules and (is_random or bool(module._buffers))


@contextmanager
def seeded_random(device: torch.device, seed: int) -> Iterator[None]:
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


@contextmanager
def eval_mode(module: Module) -> Iterator[None]:
    """The module in eval mode, and then each part as it was."""
    training = [part for part in module.modules() if part.training]
    for part in training:
        part.training = False
    try:
        yield
    finally:
        for part in training:
            part.training = True
