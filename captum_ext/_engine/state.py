"""Context managers that restore buffers, random states and train/eval modes at their end."""

import os
import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any, cast

import numpy as np
import torch
from torch.jit import ScriptModule
from torch.nn import Module

from captum_ext._checks import warn
from captum_ext._engine.hooks import hooked_globally
from captum_ext._engine.modules import Forward, root_module
from captum_ext._engine.sharing import (
    ModelUse,
    active_uses,
    use_model,
    use_random_states_alone,
)


def set_inference_mode(enabled: bool) -> AbstractContextManager[None]:
    """`torch.inference_mode(enabled)`, which ends in one step, also at an interrupt.

    torch's own class can be interrupted before its end. The mode would then end with the object,
    at any later time, and set the grad mode of its beginning.
    """
    return cast(AbstractContextManager[None], torch._C._InferenceMode(enabled))


class _BufferSnapshot:
    """A copy of the buffers of one module, to restore them later."""

    def __init__(self, module: Module) -> None:
        self.module, self.named = module, dict(module._buffers)
        self.values = {n: b.detach().clone() for n, b in self.named.items() if b is not None}

    def restore(self) -> None:
        """Restore the module's buffers: their names, the tensors and their values."""
        if not isinstance(self.module, ScriptModule):  # scripted modules cannot lose or gain names
            for name in self.module._buffers.keys() - self.named.keys():
                del self.module._buffers[name]
            self.module._buffers.update(self.named)
        for name, value in self.values.items():
            buffer = self.named[name]
            assert buffer is not None
            with set_inference_mode(buffer.is_inference()), torch.no_grad():
                try:
                    buffer.copy_(value)
                except RuntimeError:  # expanded buffers are not writable, and did not change
                    if not torch.equal(buffer, value):
                        raise


_buffers_lock = threading.RLock()  # reentrant for the reason of the lock in `sharing`
# By the module's id: its buffers before the first of the calls in progress, and the uses of the
# model by these calls.
_buffers_of_modules: dict[int, tuple[_BufferSnapshot, list[ModelUse]]] = {}


def _reset_in_child() -> None:
    """End the calls of the other threads, which a fork does not copy. One may hold the lock."""
    global _buffers_lock
    _buffers_lock = threading.RLock()
    for key, (first, uses) in list(_buffers_of_modules.items()):
        uses[:] = [use for use in uses if use.is_of_this_thread()]
        if not uses:
            del _buffers_of_modules[key]
            first.restore()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_reset_in_child)


@contextmanager
def preserve_state(forward_func: Forward) -> Iterator[None]:
    """Restore the model's buffers at the end, and warn once if the model is in train mode.

    Nested calls of a thread do not warn again.

    This covers modules in train mode, and modules of classes outside torch.nn. For a plain
    function, the modules are unknown until they run: a hook snapshots each one just before.

    If several threads use one model at once, the last call to end restores the buffers of before
    the first call. Each thread's nested calls restore their own. The call waits while another
    thread has the model alone.
    """
    had_gradients = torch.is_grad_enabled()
    # This call's snapshots. None: another thread had started before, and has the snapshot.
    snapshots: dict[int, _BufferSnapshot | None] = {}
    warned = False

    def snapshot(module: Module, args: Any = ()) -> None:
        nonlocal warned
        if id(module) in snapshots:
            return
        is_nested = False
        if module.training or not type(module).__module__.startswith("torch.nn."):
            with _buffers_lock:
                first, uses = _buffers_of_modules.get(id(module), (None, []))
                uses = active_uses(uses)
                are_own = [other.is_of_this_thread() for other in uses]
                is_nested = any(are_own)
                own_snapshot = None
                if all(are_own):
                    own_snapshot = _BufferSnapshot(module)
                # Before `_buffers_of_modules`: an interrupt may come in between, and `_release`
                # must know of every module that is in there.
                snapshots[id(module)] = own_snapshot
                if first is None or not uses:
                    first = own_snapshot or _BufferSnapshot(module)
                _buffers_of_modules[id(module)] = (first, [*uses, use])
        if _depends_on_mode(module) and not warned and not is_nested:
            warned = True
            warn(
                f"The model is in train mode (its {type(module).__name__} is), so it is explained "
                f"with batch statistics and dropout. Call .eval() to explain the model as it "
                f"predicts."
            )

    root = root_module(forward_func)
    with use_model(None if root is None else (root,), alone=False) as use:
        try:
            if root is None:
                with hooked_globally(snapshot) as lock, lock:
                    yield
            else:
                for module in root.modules():
                    snapshot(module)
                yield
        finally:
            # An interrupt can keep torch.no_grad from ending: restore the grad mode, too. It comes
            # first, because another interrupt may come after each call.
            torch._C._set_grad_enabled(had_gradients)
            with ExitStack() as stack:  # runs all of them, even if one raises
                for key, own_snapshot in snapshots.items():
                    stack.callback(_release, key, use, own_snapshot)


def _release(key: int, use: ModelUse, own_snapshot: _BufferSnapshot | None) -> None:
    """Remove a call from those that use the module with id `key`, and restore the buffers.

    They are restored by the last call, and by a nested call of the only thread in progress.
    """
    with _buffers_lock:
        if key not in _buffers_of_modules:
            return
        first, uses = _buffers_of_modules[key]
        uses = [other for other in active_uses(uses) if other is not use]
        if uses:
            _buffers_of_modules[key] = (first, uses)
            if own_snapshot is not None and all(other.is_of_this_thread() for other in uses):
                own_snapshot.restore()
        else:
            del _buffers_of_modules[key]
            first.restore()


def _depends_on_mode(module: Module) -> bool:
    """Return whether `module` is in train mode and, by its class or buffers, depends on it."""
    is_random = any(word in type(module).__name__ for word in ("Drop", "Stochastic", "RReLU"))
    return module.training and not module._modules and (is_random or bool(module._buffers))


@contextmanager
def seeded_random(device: torch.device, seed: int) -> Iterator[None]:
    """Seed the global random states of torch (CPU and `device`) and NumPy; restore them at the end.

    Captum's GradientShap draws from NumPy. Blocks of several threads run one after another.
    """
    devices = [device] if device.type == "cuda" else []
    with use_random_states_alone(), torch.random.fork_rng(devices):
        numpy_state = np.random.get_state()
        torch.default_generator.manual_seed(seed)  # `torch.manual_seed` seeds all devices
        for cuda_device in devices:
            with torch.cuda.device(cuda_device):
                torch.cuda.manual_seed(seed)
        np.random.seed(seed % 2**32)
        try:
            yield
        finally:
            np.random.set_state(numpy_state)


@contextmanager
def eval_mode(module: Module) -> Iterator[None]:
    """Set all parts of a module to eval mode; restore their modes at the end."""
    training = [part for part in module.modules() if part.training]
    for part in training:
        part.training = False
    try:
        yield
    finally:
        for part in training:
            part.training = True
