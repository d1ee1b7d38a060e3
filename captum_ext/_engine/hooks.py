"""Forward hooks and torch function modes that act in one thread and inside one block only.

    with hooked([layer], after=record) as lock, lock:
        model(x)

`hooked` registers the hooks and yields a lock. Hooks do nothing unless the lock is held: `with
lock` switches them on after all of them are registered. The end of the block releases the lock,
which switches them off, and then removes them.

The lock is needed because an interrupt (Ctrl-C) may come between any two steps of Python, for
example after a hook is registered and before its handle is stored. Such a hook stays on the module,
but it never acts. CPython releases the lock in one step, however the block ends. The package's
torch function modes work in the same way.
"""

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any
from weakref import ref

import torch
from torch import Tensor
from torch.nn import Module
from torch.nn.modules.module import register_module_forward_pre_hook
from torch.overrides import (
    TorchFunctionMode,
    _get_current_function_mode,
    _get_current_function_mode_stack,
)
from torch.utils._pytree import tree_flatten, tree_unflatten

from captum_ext._engine.modules import Tensors
from captum_ext._engine.sharing import thread_token
from captum_ext._errors import ArgumentError

LayerEdit = Callable[[int, Tensors], Tensors]  # the layer's index, its tensors -> new tensors


class _HookScope:
    """The thread and the block of code in which hooks act."""

    def __init__(self, every_thread: bool) -> None:
        self.thread = None if every_thread else ref(thread_token())
        self.lock = threading.Lock()

    def is_active(self) -> bool:
        """Return whether the lock is held, and this is the scope's thread."""
        return self.lock.locked() and (self.thread is None or self.thread() is thread_token())


class LockedFunctionMode(TorchFunctionMode):
    """A torch function mode that acts while its lock is held.

    Subclasses override `call`. Without the lock, torch functions run unchanged.

    Args:
        lock: the lock; a new one if None.
    """

    def __init__(self, lock: "threading.Lock | None" = None) -> None:
        super().__init__()
        self.lock = threading.Lock() if lock is None else lock

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        return self.call(func, args, kwargs) if self.lock.locked() else func(*args, **kwargs)

    def call(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        """Run the torch function `func`, and return its result."""
        raise NotImplementedError

    def leave(self) -> None:
        """Remove the mode from the stack of modes, if it is on top."""
        if _get_current_function_mode() is self:
            self.__exit__(None, None, None)

    def leave_with_inner_modes(self) -> None:
        """Remove the mode from the stack, and the modes above it, if it is in there.

        After an interrupt this may happen late, when the garbage collector closes a block. Then
        the modes on the stack may be others, which stay.
        """
        while any(mode is self for mode in _get_current_function_mode_stack()):
            torch._C._pop_torch_function_stack()


def _remove_leftover_modes() -> None:
    """Remove the modes that an interrupt left on top of the stack. They do not act, but cost time.

    Modes of blocks in progress hold their locks.
    """
    while isinstance(top := _get_current_function_mode(), LockedFunctionMode):
        if top.lock.locked():
            break
        torch._C._pop_torch_function_stack()


@contextmanager
def enter_mode(mode: LockedFunctionMode) -> Iterator[threading.Lock]:
    """Enter a mode, and yield its lock. The mode acts while the lock is held."""
    try:
        _remove_leftover_modes()
        mode.__enter__()  # type: ignore[no-untyped-call]
        yield mode.lock
    finally:
        mode.leave_with_inner_modes()


@contextmanager
def hooked(
    modules: Sequence[Module],
    *,
    before: Callable[[int, Any, Any], Any] | None = None,
    after: Callable[[int, Any, Any], Any] | None = None,
    every_thread: bool = False,
) -> Iterator[threading.Lock]:
    """Register forward hooks on modules, and yield their lock. They act while the lock is held.

    Args:
        modules: the modules.
        before: called as `before(index, args, kwargs)` before module `index` runs. It returns the
            new `(args, kwargs)`, or None for no change.
        after: called as `after(index, args, output)` after module `index` ran. It returns the new
            output, or None for no change.
        every_thread: act in all threads, as the replicas of DataParallel need.
    """
    scope = _HookScope(every_thread)

    def hooks_of(index: int) -> tuple[Callable[..., Any], Callable[..., Any]]:
        # A hook that is being removed may still run in another thread. The module has then
        # forgotten that the hook takes keyword arguments: hence the default of `kwargs`.
        def call_before(module: Module, args: Any, kwargs: Any = None) -> Any:
            return before(index, args, kwargs) if before is not None and scope.is_active() else None

        def call_after(module: Module, args: Any, output: Any) -> Any:
            return after(index, args, output) if after is not None and scope.is_active() else None

        return call_before, call_after

    with ExitStack() as handles:
        for index, module in enumerate(modules):
            call_before, call_after = hooks_of(index)
            if before is not None:
                handle = module.register_forward_pre_hook(call_before, with_kwargs=True)
                handles.callback(handle.remove)
            if after is not None:
                handles.callback(module.register_forward_hook(call_after).remove)
        yield scope.lock


@contextmanager
def hooked_globally(before: Callable[[Module, Any], None]) -> Iterator[threading.Lock]:
    """Call `before(module, args)` before any module in this process runs, while the lock is held.

    Like `hooked`, for functions whose modules are unknown. It acts in this thread only.
    """
    scope = _HookScope(every_thread=False)

    def call_before(module: Module, args: Any) -> None:
        if scope.is_active():
            before(module, args)

    with ExitStack() as handles:
        handles.callback(register_module_forward_pre_hook(call_before).remove)
        yield scope.lock


@contextmanager
def edit_layers(
    layers: Sequence[Module],
    edit: LayerEdit,
    *,
    at_input: bool = False,
    every_thread: bool = False,
) -> Iterator[threading.Lock]:
    """Replace the outputs (or inputs) of layers by `edit(index, tensors)`, and yield the lock.

    Args:
        layers: the modules to hook. Each may run once in a forward pass.
        edit: takes the index of a layer and its floating-point tensors, collected from tuples,
            lists and dicts, and returns as many tensors.
        at_input: edit the layers' inputs, positional and keyword, instead of their outputs.
        every_thread: see `hooked`.

    Raises:
        ValueError: in the forward pass, for a layer without floating-point tensors, or one that
            runs twice.
    """
    ran: set[tuple[int, torch.device]] = set()

    def edit_tree(index: int, value: Any) -> Any:
        leaves, spec = tree_flatten(value)
        floats = [
            i for i, x in enumerate(leaves) if isinstance(x, Tensor) and x.is_floating_point()
        ]
        tensors = tuple(leaves[i] for i in floats)
        if not tensors:
            end = "input" if at_input else "output"
            raise ArgumentError(
                f"`layer` {type(layers[index]).__name__} has no float tensor in its {end}.",
                "layer",
            )
        key = (index, tensors[0].device)
        if key in ran:
            raise ArgumentError(
                f"`layer` {type(layers[index]).__name__} runs more than once in one forward pass, "
                f"so it has no single activation: choose a module that runs once, or give each use "
                f"a module of its own. Where a model compares two inputs (a Siamese net), embed "
                f"the second one before, and pass its embedding as `additional_forward_args` of a "
                f"function that embeds the first.",
                "layer",
            )
        ran.add(key)
        for i, tensor in zip(floats, edit(index, tensors), strict=True):
            leaves[i] = tensor
        return tree_unflatten(leaves, spec)

    def before(index: int, args: Any, kwargs: Any) -> Any:
        return edit_tree(index, (args, kwargs))

    def after(index: int, args: Any, output: Any) -> Any:
        return edit_tree(index, output)

    hooks: Any = {"before": before} if at_input else {"after": after}
    with hooked(layers, every_thread=every_thread, **hooks) as lock:
        yield lock
