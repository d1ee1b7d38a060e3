"""Real signals at random times: KeyboardInterrupt comes out, and nothing that acts remains."""

import random
import signal
import time
from collections.abc import Callable
from typing import Any, NoReturn

import pytest
import torch
from captum.attr import LayerGradCam, Saliency
from torch.overrides import _get_current_function_mode_stack
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack, _pop_mode

from captum_ext._engine.hooks import LockedFunctionMode
from captum_ext._engine.receptive_field import _RedispatchFromPython, receptive_field
from captum_ext._engine.state import preserve_state
from captum_ext.attr import FIDO, RISE, AugmentedSR, LayerCam, SESSWrapper, UpsampleWrapper
from tests.methods import METHODS
from tests.networks import small_net

Run = Callable[[Any, Any], Any]


def exact_field(net: Any, x: Any) -> None:
    with preserve_state(net):
        receptive_field(net, net.conv2, x, exact=True)


RUNS: dict[str, Run] = {
    **{name: lambda net, x, m=method: m(net, "relu2").attribute(x, target=1)
       for name, method in METHODS.items()},
    "RISE": lambda net, x: RISE(net).attribute(x, target=1, n_masks=32),
    "FIDO": lambda net, x: FIDO(net).attribute(x, target=1, n_steps=2),
    "SESS": lambda net, x: SESSWrapper(
        LayerGradCam(net, net.conv2), window=8, scales=(8, 16)
    ).attribute(x, target=1),
    "AugmentedSR": lambda net, x: AugmentedSR(
        LayerCam(net, "conv2"), n_augmentations=2
    ).attribute(x, target=1),
    "UpsampleWrapper": lambda net, x: UpsampleWrapper(Saliency(net)).attribute(x, target=1),
    "receptive field": exact_field,
}  # fmt: skip


def raise_interrupt(*_: Any) -> NoReturn:
    raise KeyboardInterrupt


def interrupt(run: Run, net: Any, x: Any, delay: float) -> bool:
    """Run with a signal after `delay` seconds. Return whether it came before the end."""
    try:
        try:
            signal.setitimer(signal.ITIMER_REAL, delay)
            run(net, x)
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
    except KeyboardInterrupt:
        return True
    return False


def check_nothing_acts(net: Any, x: Any, expected: Any, label: str) -> None:
    modes = _get_current_function_mode_stack()
    assert all(isinstance(mode, LockedFunctionMode) for mode in modes), label
    assert not any(mode.lock.locked() for mode in modes), label
    while dispatch_modes := _get_current_dispatch_mode_stack():
        assert isinstance(dispatch_modes[-1], _RedispatchFromPython), "it passes all calls on"
        _pop_mode()
    assert torch._C._functorch.get_dynamic_layer_stack_depth() == 0, label
    assert torch.is_grad_enabled(), label
    assert not torch.is_inference_mode_enabled(), label
    assert torch._C._get_graph_executor_optimize(), label
    assert torch.equal(net(x), expected), label


@pytest.mark.filterwarnings("ignore")
@pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="no timer signals")
@pytest.mark.parametrize("count", [45, pytest.param(600, marks=pytest.mark.slow)])
def test_signals_at_random_times_leave_nothing_that_acts(count: int) -> None:
    net, x, rng = small_net(), torch.randn(2, 3, 16, 16), random.Random(0)
    expected, durations = net(x), {}
    for name, run in RUNS.items():
        run(net, x)
        start = time.perf_counter()
        run(net, x)
        durations[name] = time.perf_counter() - start
    before, n_interrupts = signal.signal(signal.SIGALRM, raise_interrupt), 0
    try:
        for i in range(count):
            name = list(RUNS)[i % len(RUNS)]
            delay = max(1e-5, rng.random() * durations[name])
            n_interrupts += interrupt(RUNS[name], net, x, delay)
            check_nothing_acts(net, x, expected, f"{name}, {i}")
    finally:
        signal.signal(signal.SIGALRM, before)
        while _get_current_function_mode_stack():
            torch._C._pop_torch_function_stack()
    assert n_interrupts > count / 4
