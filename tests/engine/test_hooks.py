"""Hooks act in their own block and thread only, and never after an interrupt."""

import dis
import gc
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from itertools import count
from types import FrameType
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.overrides import _get_current_function_mode_stack
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack, _pop_mode

from captum_ext._engine.hooks import LockedFunctionMode, enter_mode, hooked, hooked_globally
from captum_ext._engine.receptive_field import _RedispatchFromPython, receptive_field
from captum_ext._engine.replay import LayerReplay, run_to_layer
from captum_ext._engine.state import set_inference_mode
from captum_ext.attr import RISE, LayerAblationCam, LayerHiResCam, SESSWrapper
from tests.captures import layer_activations, layer_gradients
from tests.networks import small_net


def test_hooks_act_while_their_lock_is_held() -> None:
    net, seen = nn.Sequential(nn.Identity(), nn.Identity()), []
    x = torch.ones(1)

    def before(index: int, args: Any, kwargs: Any) -> Any:
        return (args[0] + 1,), kwargs

    def after(index: int, args: Any, output: Any) -> Any:
        seen.append((index, args[0].item()))
        return output * 10

    with hooked([net[1], net[0]], before=before, after=after) as lock:
        assert net(x).item() == 1, "not yet"
        with lock:
            assert net(x).item() == 210
        assert net(x).item() == 1, "no longer"
    assert seen == [(1, 2.0), (0, 21.0)]
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in net)
    modules: list[nn.Module] = []
    with hooked_globally(lambda module, args: modules.append(module)) as lock:
        net(x)
        with lock:
            net(x)
    assert modules == [net, net[0], net[1]]


class Interrupter:
    """Raises a KeyboardInterrupt at the n-th point at which Python checks for signals.

    CPython checks after calls, on backward jumps, and at the start of functions and generators. It
    does not check between other instructions.
    """

    def __init__(self, n: int) -> None:
        self.left, self.files = n, ("captum_ext", "contextlib", "module.py", "hooks.py")
        self.last: dict[FrameType, str] = {}

    def __call__(self, frame: FrameType, event: str, arg: Any) -> Any:
        if not any(name in frame.f_code.co_filename for name in self.files):
            return None
        frame.f_trace_opcodes, frame.f_trace_lines = True, False
        if event == "opcode":
            name = dis.opname[frame.f_code.co_code[frame.f_lasti]]
            after_call = "CALL" in self.last.get(frame, "") and "PRECALL" not in self.last[frame]
            self.last[frame] = name
            if after_call or name in ("RESUME", "JUMP_BACKWARD"):
                self.left -= 1
                if self.left == 0:
                    sys.settrace(None)
                    raise KeyboardInterrupt
        return self


def interrupted_at(point: int, run: Callable[..., Any], net: Any, x: Tensor) -> tuple[bool, bool]:
    """Interrupt a run at a point. Was the point reached, and does a hook or a mode remain?"""
    expected: Tensor = net(x)
    interrupter = Interrupter(point)
    try:
        sys.settrace(interrupter)
        run(net, x)
    except KeyboardInterrupt:
        pass
    finally:
        sys.settrace(None)
    while dispatch_modes := _get_current_dispatch_mode_stack():
        assert isinstance(dispatch_modes[-1], _RedispatchFromPython), "it passes all calls on"
        _pop_mode()
    assert torch._C._functorch.get_dynamic_layer_stack_depth() == 0, point
    assert torch._C._get_graph_executor_optimize(), point
    torch.set_grad_enabled(True)
    hooks = [m for m in net.modules() if m._forward_hooks or m._forward_pre_hooks]
    modes = [
        mode for mode in _get_current_function_mode_stack() if isinstance(mode, LockedFunctionMode)
    ]
    assert not any(mode.lock.locked() for mode in modes), point
    for _ in range(2):
        assert torch.equal(net(x), expected), point
    for module in hooks:  # leftover hooks would add points to the next run
        module._forward_hooks.clear()
        module._forward_pre_hooks.clear()
    return interrupter.left <= 0, bool(hooks or modes)


RUNS: dict[str, Callable[..., Any]] = {
    "activations": lambda net, x: layer_activations(net, [net.conv2], (x,), 1),
    "gradients": lambda net, x: layer_gradients(net, [net.conv2], (x,), 1),
    "up to a layer": lambda net, x: run_to_layer(net, net.conv2, (x,)),
    "a CAM": lambda net, x: LayerHiResCam(net, net.conv2).attribute(x, target=1),
    "a CAM at a ReLU": lambda net, x: LayerHiResCam(net, net.relu2).attribute(x, target=1),
    "a replay": lambda net, x: LayerReplay(net, net.conv2, (x,), 1),
    "a receptive field": lambda net, x: receptive_field(net, net.conv2, x),
    "an exact receptive field": lambda net, x: receptive_field(net, net.conv2, x, exact=True),
    "Ablation-CAM": lambda net, x: LayerAblationCam(net, net.conv2).attribute(x, target=1),
    "RISE": lambda net, x: RISE(net).attribute(x, target=1, n_masks=4, grid=2),
    "SESS": lambda net, x: SESSWrapper(
        LayerHiResCam(net, net.conv2), window=4, scales=(4, 6)
    ).attribute(x, target=1),
}
# The longest runs are interrupted at some of the points only: all of them took minutes.
STEPS = {
    "a replay": 11, "a CAM at a ReLU": 3, "a receptive field": 3, "an exact receptive field": 11,
    "Ablation-CAM": 307, "RISE": 23, "SESS": 101, "a CAM": 3,
}  # fmt: skip


@pytest.mark.parametrize("name", RUNS)
def test_no_hook_acts_after_an_interrupt_at_any_instruction(name: str) -> None:
    net, x = small_net(), torch.randn(1, 3, 4, 4)
    n_leftovers = 0
    for point in count(1, STEPS.get(name, 1)):
        with ThreadPoolExecutor(1) as thread:  # the interrupt spoils the thread's state in Python
            was_reached, has_leftovers = thread.submit(
                interrupted_at, point, RUNS[name], net, x
            ).result()
        n_leftovers += has_leftovers
        if not was_reached:
            break
    assert point > 100
    assert n_leftovers < point / 10
    assert n_leftovers > 0 or name in STEPS


class Doubling(LockedFunctionMode):
    """A mode of the user's, or of a later call."""

    def call(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        return func(*args, **kwargs) * 2


def test_a_block_that_ends_late_leaves_later_modes_on_the_stack() -> None:
    """After an interrupt, the garbage collector may end a block while another mode is in use."""
    x, late = torch.ones(1), enter_mode(Doubling())
    late.__enter__()
    with enter_mode(Doubling()) as lock, lock:
        assert len(_get_current_function_mode_stack()) == 1, "the leftover mode is gone"
        del late
        gc.collect()
        result = x.neg()
    assert result.item() == -2, "the mode of the block in progress acts"
    assert not _get_current_function_mode_stack()


def test_leaving_inference_mode_ends_with_its_block() -> None:
    """An object of torch's own class, interrupted in its beginning, would end it at any time."""
    with torch.no_grad():
        with set_inference_mode(False) as guard:
            assert torch.is_grad_enabled()
        assert not torch.is_grad_enabled()
    del guard
    assert torch.is_grad_enabled()
    with torch.inference_mode():
        with set_inference_mode(False):
            assert not torch.is_inference_mode_enabled()
        assert torch.is_inference_mode_enabled()
