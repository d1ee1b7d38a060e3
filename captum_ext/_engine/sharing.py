"""Locks of models and of the global random states, between threads.

Our own methods share a model: their hooks act in one thread only. Captum's hooks act in all
threads, so a method of Captum that sets hooks must have the model alone. Code that seeds the global
random states must have these alone, too.

A thread that waits runs no model, so what it shares is free for others until it goes on. Threads
that share models and then ask to have one alone do not wait for each other, whatever the order. A
thread that has a model alone must not ask for another one: Captum's methods do not.
"""

import os
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import cached_property
from weakref import ref

from torch.nn import Module

_PATIENCE = 10.0  # seconds that new calls let those go first that wait to have a model alone
_RANDOM_STATES: tuple[Module, ...] = (Module(),)  # stands for torch's and NumPy's global states


class ThreadToken:
    """An object that stands for a thread, and ends with it.

    Idents are used again, in the child of a fork above all.
    """


class _Local(threading.local):
    def __init__(self) -> None:
        self.token = ThreadToken()


_local = _Local()


def thread_token() -> ThreadToken:
    """The token of this thread."""
    return _local.token


class ModelUse:
    """The use of a model by a thread, in one block of code.

    Args:
        roots: the model's outermost modules. None is a plain function, which may run any module.
        alone: whether no other thread may use the modules.
    """

    def __init__(self, roots: Sequence[Module] | None, alone: bool) -> None:
        self.token, self.roots, self.alone = ref(thread_token()), roots, alone
        self.is_waiting = True
        self.block = threading.Lock()  # held in the block: see `hooks` for the reason

    def is_active(self) -> bool:
        """Return whether the block has not ended, nor the thread.

        A block that an interrupt cut short ends when its frame goes, which a traceback may keep.
        """
        return self.block.locked() and self.token() is not None

    def is_of_this_thread(self) -> bool:
        """Return whether this thread is in the block."""
        return self.token() is thread_token()

    @cached_property
    def parts(self) -> set[Module]:
        """All modules of the model."""
        return {part for root in self.roots or () for part in root.modules()}

    def excludes(self, other: "ModelUse") -> bool:
        """Return whether the two uses must not happen at the same time."""
        if self.token() is other.token() or not (self.alone or other.alone):
            return False
        if self.roots is _RANDOM_STATES or other.roots is _RANDOM_STATES:
            return self.roots is other.roots
        if self.roots is None or other.roots is None:
            return True
        return self.roots == other.roots or not self.parts.isdisjoint(other.parts)


# Reentrant, because the garbage collector may run at any time, also while this thread holds it, and
# close a block that an interrupt cut short.
_lock = threading.RLock()
_changed = threading.Condition(_lock)
_uses: list[ModelUse] = []  # an interrupt may leave a use here that has ended


def _reset_in_child() -> None:
    """Forget the other threads, which a fork does not copy. One of them may hold the lock."""
    global _lock, _changed
    _lock = threading.RLock()
    _changed = threading.Condition(_lock)
    _uses[:] = [use for use in _uses if use.is_of_this_thread()]


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_reset_in_child)


@contextmanager
def use_model(roots: Sequence[Module] | None, *, alone: bool) -> Iterator[ModelUse]:
    """Block in which this thread runs a model, once no other thread stands in the way.

    Args:
        roots: the model's outermost modules; None for a plain function, which may run any module.
        alone: whether other threads must not run these modules in our methods meanwhile.
    """
    use = ModelUse(roots, alone)
    try:
        with use.block:
            with _lock:
                _uses.append(use)
                _wait(use)
            yield use
    finally:
        with _lock:
            _uses[:] = active_uses(_uses)
            _changed.notify_all()


def active_uses(uses: list[ModelUse]) -> list[ModelUse]:
    """The uses that have not ended."""
    return [use for use in uses if use.is_active()]


def _wait(use: ModelUse) -> None:
    """Wait until no other thread excludes `use`, or the thread's other uses. Needs the lock."""
    own = [other for other in active_uses(_uses) if other.is_of_this_thread()]
    shared = [other for other in own if not other.alone or other is use]
    patience = time.monotonic() + _PATIENCE if len(own) == 1 and not use.alone else 0

    def must_wait() -> bool:
        is_patient = time.monotonic() < patience
        return any(
            mine.excludes(other)
            for other in active_uses(_uses)
            if not other.is_waiting or (is_patient and other.alone)
            for mine in shared
        )

    try:
        if must_wait():
            for mine in shared:
                mine.is_waiting = True
            _changed.notify_all()
        while must_wait():
            _changed.wait(1.0)  # bounded, as an interrupted thread may not notify
    finally:
        for mine in shared:
            mine.is_waiting = False


def use_random_states_alone() -> AbstractContextManager[ModelUse]:
    """Block in which no other thread seeds the global random states."""
    return use_model(_RANDOM_STATES, alone=True)
