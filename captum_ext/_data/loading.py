"""A loader of batches that works under any default device."""

from collections.abc import Iterator
from typing import Any

import torch
from torch.utils.data import DataLoader

from captum_ext._engine.hooks import preserve_modes


class CpuLoader(DataLoader[Any]):
    """A DataLoader whose tensors are on the CPU, whatever torch's default device is.

    torch makes the numbers of a batch, and the workers' seed, on the default device. Workers start
    with the CPU as theirs.
    """

    def __iter__(self) -> Any:
        with preserve_modes(), torch.device("cpu"):
            iterator = super().__iter__()
        return _on_cpu(iterator)


def _on_cpu(iterator: Iterator[Any]) -> Iterator[Any]:
    done = object()
    while True:
        with preserve_modes(), torch.device("cpu"):
            batch = next(iterator, done)
        if batch is done:
            return
        yield batch
