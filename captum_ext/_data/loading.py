"""A loader of batches that works under any default device."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch.utils.data import DataLoader

from captum_ext._engine.modules import default_device
from captum_ext._errors import ArgumentError
from captum_ext._repr import bounded_repr


class CpuLoader(DataLoader[Any]):
    """A DataLoader whose tensors are on the CPU, whatever torch's default device is.

    torch makes the numbers of a batch, and the workers' seed, on the default device. Workers start
    with the CPU as theirs.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        num_workers = kwargs.get("num_workers", 0)
        if isinstance(num_workers, bool) or not isinstance(num_workers, int) or num_workers < 0:
            raise ArgumentError(
                f"`num_workers` must be an integer of at least 0, got {bounded_repr(num_workers)}.",
                "num_workers",
            )
        super().__init__(*args, **kwargs)

    def __iter__(self) -> Any:
        with _cpu_as_default():
            iterator = super().__iter__()
        return _on_cpu(iterator)


def _on_cpu(iterator: Iterator[Any]) -> Iterator[Any]:
    done = object()
    while True:
        with _cpu_as_default():
            batch = next(iterator, done)
        if batch is done:
            return
        yield batch


def _cpu_as_default() -> AbstractContextManager[Any]:
    """Block with the CPU as the default device; nothing to enter where it is that already."""
    is_default = default_device().type == "cpu"
    return nullcontext() if is_default else torch.device("cpu")
