"""Hooks act in their own block and thread only, also after an interrupt at any instruction."""

import dis
import sys
from collections.abc import Callable
from types import FrameType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from captum_ext._engine.hooks import hooked, hooked_everywhere
from captum_ext._engine.replay import run_to_layer
from tests.captures import layer_activations, layer_gradients
from tests.methods import small_net


def test_hooks_act_while_their_lock_is_held() -> None:
    net, seen = nn.Sequential(nn.Identity(), nn.Identity()), []
    x = torch.ones(1)

    def before(index: int, args: Any, kwargs: Any) -> Any:
        return (args[0] + 1,), kwargs

    def after(index: int, args: Any, output: Any) -> Any:
        seen.append((index, args[0].item()))
        return output * 10

    with hooked([net[1], net[0]], before=before, after=after) as acting:
        assert net(x).item() == 1, "not yet"
        with acting:
            assert net(x).item() == 210
        assert net(x).item() == 1, "no longer"
    assert seen == [(1, 2.0), (0, 21.0)]
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in net)
    modules: list[nn.Module] = []
    with hooked_everywhere(modules.append) as acting:
        net(x)
        with acting:
            net(x)
    assert modules == [net, net[0], net[1]]


class Interrupter:
    """Raises a KeyboardInterrupt at the n-th place at which Python looks for signals.

    CPython looks after calls, on jumps backwards and where functions and generators go on; not
    between any two of its instructions.
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


@pytest.mark.parametrize("run", [layer_activations, layer_gradients, run_to_layer])
def test_an_interrupt_at_any_instruction_leaves_nothing_that_acts(run: Callable[..., Any]) -> None:
    net, x = small_net(), torch.randn(1, 3, 4, 4)
    layer: Any = net.conv2 if run is run_to_layer else [net.conv2]
    target: tuple[Any, ...] = () if run is run_to_layer else (1,)
    expected: Tensor = net(x)
    n = n_interrupts = n_left = 0
    before = sys.gettrace()
    while True:
        n += 1
        interrupter = Interrupter(n)
        try:
            sys.settrace(interrupter)
            run(net, layer, (x,), *target)
        except KeyboardInterrupt:
            n_interrupts += 1
        finally:
            sys.settrace(before)
        if interrupter.left > 0:
            break
        torch.set_grad_enabled(True)
        n_left = max(n_left, len(net.conv2._forward_hooks))
        for _ in range(2):
            assert torch.equal(net(x), expected), n
        net.conv2._forward_hooks.clear()  # more hooks would be more places for the next interrupt
    assert n_interrupts > 100
    assert n_left > 0, "an interrupt may leave a hook behind; it must not act"
