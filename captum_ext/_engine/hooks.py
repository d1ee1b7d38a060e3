"""Call functions at modules, in one thread and inside one block.

    with hooked([layer], after=keep) as lock, lock:
        model(x)

An interrupt (Ctrl-C) may come between any two steps of Python: after a hook is registered and
before its handle is noted, say. Such a hook stays behind, and must not act. So hooks look at a lock
first. `lock` is that lock. `with lock` takes it once all hooks stand. It is given back in C,
hence at once, however the block is left. Torch function modes of ours do the same.
"""

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module
from torch.nn.modules.module import register_module_forward_pre_hook
from torch.overrides import TorchFunctionMode, _get_current_function_mode
from torch.utils._pytree import tree_flatten, tree_unflatten

from captum_ext._engine.modules import Tensors


class _Block:
    """The block of code, in one thread or all, in which hooks act."""

    def __init__(self, every_thread: bool) -> None:
        self.thread = None if every_thread else threading.get_ident()
        self.lock = threading.Lock()

    def __bool__(self) -> bool:
        return self.lock.locked() and self.thread in (None, threading.get_ident())


class LockedFunctionMode(TorchFunctionMode):
    """A torch function mode that acts while a lock is held; else functions run as they are."""

    def __init__(self, lock: "threading.Lock | None" = None) -> None:
        super().__init__()
        self.lock = threading.Lock() if lock is None else lock

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        return self.call(func, args, kwargs) if self.lock.locked() else func(*args, **kwargs)

    def call(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        """Run a function of torch."""
        raise NotImplementedError

    def leave(self) -> None:
        """Take the mode off the stack, if it is on top."""
        if _get_current_function_mode() is self:
            self.__exit__(None, None, None)


@contextmanager
def preserve_modes() -> Iterator[None]:
    """Take off the stack, at the end, the modes that were put on it and not taken off."""
    depth = torch._C._len_torch_function_stack()
    try:
        yield
    finally:
        while torch._C._len_torch_function_stack() > depth:
            torch._C._pop_torch_function_stack()


@contextmanager
def enter_mode(mode: LockedFunctionMode) -> Iterator[threading.Lock]:
    """Enter a mode, which acts while the lock that this gives is held."""
    with preserve_modes():
        mode.__enter__()  # type: ignore[no-untyped-call]
        yield mode.lock


@contextmanager
def hooked(
    modules: Sequence[Module],
    *,
    before: Callable[[int, Any, Any], Any] | None = None,
    after: Callable[[int, Any, Any], Any] | None = None,
    every_thread: bool = False,
) -> Iterator[threading.Lock]:
    """Hook modules. The hooks act while the lock that this gives is held.

    Args:
        modules: the modules.
        before: called as `before(index, args, kwargs)`; replaces both, unless it returns None.
        after: called as `after(index, args, output)`; replaces the output, unless it returns None.
        every_thread: whether to act in other threads too, as DataParallel's replicas need.
    """
    block = _Block(every_thread)

    def hooks_of(index: int) -> tuple[Callable[..., Any], Callable[..., Any]]:
        # Another thread may meet a hook while it is removed, when the module no longer knows that
        # the hook takes keywords: hence the default.
        def call_before(module: Module, args: Any, kwargs: Any = None) -> Any:
            return before(index, args, kwargs) if before is not None and block else None

        def call_after(module: Module, args: Any, output: Any) -> Any:
            return after(index, args, output) if after is not None and block else None

        return call_before, call_after

    with ExitStack() as handles:
        for index, module in enumerate(modules):
            call_before, call_after = hooks_of(index)
            if before is not None:
                handle = module.register_forward_pre_hook(call_before, with_kwargs=True)
                handles.callback(handle.remove)
            if after is not None:
                handles.callback(module.register_forward_hook(call_after).remove)
        yield block.lock


@contextmanager
def hooked_globally(before: Callable[[Module], None]) -> Iterator[threading.Lock]:
    """As `hooked`, for every module that runs: `before(module)` is called in front of it."""
    block = _Block(every_thread=False)

    def call_before(module: Module, args: Any) -> None:
        if block:
            before(module)

    with ExitStack() as handles:
        handles.callback(register_module_forward_pre_hook(call_before).remove)
        yield block.lock


@contextmanager
def edit_layers(
    layers: Sequence[Module],
    edit: Callable[[int, Tensors], Tensors],
    *,
    at_input: bool = False,
    every_thread: bool = False,
) -> Iterator[threading.Lock]:
    """Let `edit(index of the layer, its tensors)` replace what the layers put out or take in.

    Args:
        layers: the modules to hook; each of them may run once.
        edit: takes and returns the floating-point tensors of a layer, wherever they stand in its
            tuple, list or dict.
        at_input: the layer's inputs, positional and by keyword, instead of its output.
        every_thread: see `hooked`.
    """
    ran: set[tuple[int, torch.device]] = set()

    def edit_tree(index: int, value: Any) -> Any:
        leaves, spec = tree_flatten(value)
        at = [i for i, x in enumerate(leaves) if isinstance(x, Tensor) and x.is_floating_point()]
        tensors = tuple(leaves[i] for i in at)
        if not tensors:
            what = "takes in" if at_input else "puts out"
            raise ValueError(f"`layer` {type(layers[index]).__name__} {what} no float tensor.")
        key = (index, tensors[0].device)
        if key in ran:
            raise ValueError(
                f"`layer` {type(layers[index]).__name__} runs more than once in one forward pass, "
                f"so it has no single activation: choose a module that runs once, or give each use "
                f"a module of its own."
            )
        ran.add(key)
        for i, tensor in zip(at, edit(index, tensors), strict=True):
            leaves[i] = tensor
        return tree_unflatten(leaves, spec)

    def before(index: int, args: Any, kwargs: Any) -> Any:
        return edit_tree(index, (args, kwargs))

    def after(index: int, args: Any, output: Any) -> Any:
        return edit_tree(index, output)

    hooks: Any = {"before": before} if at_input else {"after": after}
    with hooked(layers, every_thread=every_thread, **hooks) as lock:
        yield lock
