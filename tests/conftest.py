import signal
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import pytest
import torch
from hypothesis import settings
from torch import Tensor, nn

torch.set_num_threads(1)

settings.register_profile("usual", max_examples=50, deadline=None)
settings.register_profile("nightly", max_examples=2000, deadline=None)
settings.load_profile("usual")  # `--hypothesis-profile=nightly` goes before

# A shell ignores Ctrl-C in what it starts in the background, and children would inherit that.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(1234)


@pytest.fixture(autouse=True)
def _exact_convolutions(request: pytest.FixtureRequest) -> Iterator[None]:
    """No TF32 on a GPU, whose ten bits are not enough for a comparison with a CPU."""
    if "gpu" in request.keywords:
        with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
            yield
    else:
        yield


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not torch.cuda.is_available():
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="no CUDA device"))


def snapshot(model: nn.Module, inputs: tuple[Tensor, ...]) -> list[Any]:
    """The state that a call must leave unchanged, in values that compare with ==."""
    state: list[Any] = [torch.is_grad_enabled(), torch.is_inference_mode_enabled()]
    globals_ = vars(nn.modules.module)
    state += [
        dict(globals_[name])
        for name in sorted(globals_)
        if name.startswith("_global_") and isinstance(globals_[name], dict)
    ]
    state += [torch._C._len_torch_function_stack(), torch.empty(0).device]
    for name, module in model.named_modules():
        state += [name, id(module), module.training, *(len(getattr(module, h)) for h in HOOKS)]
        state += [[(key, id(value)) for key, value in sorted(vars(module).items())]]
    tensors = [*model.parameters(), *model.buffers(), *inputs]
    for t in tensors:
        grad = None if t.grad is None else t.grad.tolist()
        state += [id(t), t.requires_grad, t.is_leaf, grad, t.detach().nan_to_num().tolist()]
    return state


@pytest.fixture
def trace_free() -> Callable[..., AbstractContextManager[None]]:
    """A context manager that checks that the model, the inputs and torch's modes are unchanged."""

    @contextmanager
    def check(model: nn.Module, *inputs: Tensor, keeps_rng: bool = True) -> Iterator[None]:
        before, rng = snapshot(model, inputs), torch.get_rng_state()
        try:
            yield
        finally:
            assert snapshot(model, inputs) == before
            if keeps_rng:
                assert torch.equal(torch.get_rng_state(), rng)

    return check


@pytest.fixture
def no_warnings() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield
