"""What trainings have in common: modes, interrupts and the order of pictures."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Generator
from torch.nn import Module
from torch.utils.data import Sampler

from captum_ext._pictures import hash_of


@contextmanager
def evaluated(module: Module) -> Iterator[None]:
    """The module in eval mode, and then each part as it was."""
    training = [part for part in module.modules() if part.training]
    for part in training:
        part.training = False
    try:
        yield
    finally:
        for part in training:
            part.training = True


@contextmanager
def interruptible() -> Iterator[None]:
    """Ctrl-C is a KeyboardInterrupt again: Lightning ends the process, and ignores the next one."""
    handler = signal.getsignal(signal.SIGINT)
    try:
        yield
    except SystemExit as ended:
        if isinstance(ended.__context__, KeyboardInterrupt):
            raise KeyboardInterrupt from ended
        raise
    finally:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGINT, handler)


class Shuffled(Sampler[int]):
    """A new order in each epoch, that depends on the seed and the epoch alone."""

    def __init__(self, n: int, seed: int) -> None:
        self.n, self.seed, self.epoch = n, seed, 0

    def __len__(self) -> int:
        return self.n

    def set_epoch(self, epoch: int) -> None:
        """Called by Lightning at the start of each."""
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        generator = Generator().manual_seed(hash_of(self.seed, self.epoch))
        return iter(torch.randperm(self.n, generator=generator).tolist())
