"""The peak of memory does not grow with the number of perturbations."""

import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from captum.attr import Saliency
from hypothesis import given
from hypothesis import strategies as st
from torch import Generator, Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from captum_ext.attr import (
    FIDO,
    RISE,
    AugmentedSR,
    LayerSmoothGradCamPlusPlus,
    SESSWrapper,
)
from captum_ext.metrics import deletion, insertion, road
from tests.fuzz.properties import fuzz
from tests.networks import small_net

Run = Callable[[nn.Module, Tensor, int], Any]


class PeakMemory(TorchDispatchMode):
    """Counts the bytes of all tensors that live at once."""

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        old = {id(t.untyped_storage()) for t in tree_leaves(args) if isinstance(t, Tensor)}
        for tensor in tree_leaves(result):
            if not isinstance(tensor, Tensor) or id(tensor.untyped_storage()) in old:
                continue
            storage = tensor.untyped_storage()
            old.add(id(storage))
            self.live += storage.nbytes()
            self.peak = max(self.peak, self.live)
            weakref.finalize(storage, self._free, storage.nbytes())
        return result

    def _free(self, size: int) -> None:
        self.live -= size


def peak(run: Run, net: nn.Module, x: Tensor, n: int) -> int:
    with PeakMemory() as memory:
        run(net, x, n)
    return memory.peak


def rise(net: nn.Module, x: Tensor, n: int) -> Any:
    generator = Generator().manual_seed(0)
    return RISE(net).attribute(x, target=0, n_masks=256 * n, generator=generator)


def fido(net: nn.Module, x: Tensor, n: int) -> Any:
    # The optimizer has no moments yet in the first step, and 4 masks fill chunks of any batch.
    return FIDO(net).attribute(x, target=0, n_steps=2 * n, n_masks=4 * n, internal_batch_size=4)


def smooth(net: nn.Module, x: Tensor, n: int) -> Any:
    return LayerSmoothGradCamPlusPlus(net, "relu1", n_samples=4 * n).attribute(x, target=0)


def sess(net: nn.Module, x: Tensor, n: int) -> Any:
    method = SESSWrapper(
        Saliency(net), scales=[16], window=8, step=8 // n, internal_batch_size=4, smooth=False
    )
    return method.attribute(x, target=0)


def mean_of_copies(net: nn.Module, x: Tensor, n: int) -> Any:
    options = {"n_augmentations": 4 * n, "mode": "tta", "internal_batch_size": 4}
    return AugmentedSR(Saliency(net), **options).attribute(x, target=0)


def curve(function: Any) -> Run:
    def run(net: nn.Module, x: Tensor, n: int) -> Any:
        return function(net, x, x, 0, step=1 / (8 * n), internal_batch_size=4)

    return run


def removed(net: nn.Module, x: Tensor, n: int) -> Any:
    percentiles = torch.linspace(5, 95, 4 * n).tolist()
    return road(net, x, x, 0, percentiles=percentiles, internal_batch_size=4)


RUNS: dict[str, Run] = {
    "RISE": rise,
    "FIDO": fido,
    "Smooth Grad-CAM++": smooth,
    "SESS": sess,
    "AugmentedSR": mean_of_copies,
    "insertion": curve(insertion),
    "deletion": curve(deletion),
    "ROAD": removed,
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", RUNS)
@fuzz
@given(batch=st.integers(1, 3), factor=st.sampled_from([2, 4]))
def test_memory_does_not_grow_with_the_perturbations(name: str, batch: int, factor: int) -> None:
    net = small_net()
    x = torch.rand(batch, 3, 16, 16, generator=Generator().manual_seed(0))
    few, many = (peak(RUNS[name], net, x, n) for n in (1, factor))
    assert many <= 1.1 * few, (few, many)
