"""What must be true of each call: a documented error, or a right result; and no trace."""

import gc
import traceback
import warnings
import weakref
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import captum
import torch
from hypothesis import HealthCheck, settings
from torch import Tensor, nn

import captum_ext
from tests.conftest import snapshot

OWN = tuple(str(Path(package.__file__).parent) for package in (captum_ext, captum))
BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}

is_usual = settings.get_current_profile_name() == "usual"
# A few examples in each run, always the same ones; at night all of them, new ones each time.
fuzz = settings(
    max_examples=3 if is_usual else settings.default.max_examples,
    derandomize=is_usual,
    deadline=None,
    suppress_health_check=list(HealthCheck),
)


class RefusedError(Exception):
    """A documented error, with the error as its cause."""


def attempt(call: Callable[[], Any]) -> Any:
    """The result of a call; `RefusedError` for an error that this package raises on purpose.

    An error on purpose is one of the documented types, and raised by the package's own lines, or by
    Captum's for targets.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return call()
    except (ValueError, TypeError, AssertionError, FloatingPointError) as error:
        frames = traceback.extract_tb(error.__traceback__)
        if not frames[-1].filename.startswith(OWN) or not str(error):
            raise
        raise RefusedError(f"{type(error).__name__}: {error}") from error


def tensors_of(result: Any) -> list[Tensor]:
    """The tensors of a result: of a tensor, of a named tuple, of nested tuples and lists."""
    if isinstance(result, Tensor):
        return [result.detach()]
    if isinstance(result, dict):
        result = list(result.values())
    return [t for part in result for t in tensors_of(part)]


def bits(tensor: Tensor) -> Tensor:
    """The bit pattern of a tensor, which tells -0 from 0 and one NaN from another."""
    if tensor.dtype == torch.bool:
        return tensor.detach().clone()
    return tensor.detach().clone().contiguous().view(BITS[tensor.element_size()])


def unchanged(model: nn.Module | None, tensors: Sequence[Tensor], rng: bool) -> Callable[[], None]:
    """A function that checks that nothing has changed since: the model, tensors, modes, and RNG."""
    state = torch.get_rng_state()
    before, patterns = snapshot(model or nn.Module(), ()), [bits(t) for t in tensors]
    kept = [(t.requires_grad, t.grad, t._version, t.stride()) for t in tensors]

    def check() -> None:
        if model is not None:
            assert snapshot(model, ()) == before
        assert all(torch.equal(bits(t), old) for t, old in zip(tensors, patterns, strict=True))
        assert [(t.requires_grad, t.grad, t._version, t.stride()) for t in tensors] == kept
        assert not rng or torch.equal(torch.get_rng_state(), state), "the caller's random state"

    return check


def assert_close(actual: Any, expected: Any, dtype: torch.dtype, scale: float = 0.0) -> None:
    """Equal up to the rounding of a hundred operations on numbers as large as the largest one.

    Args:
        actual: the result.
        expected: of the same structure.
        dtype: of the computation.
        scale: the largest magnitude that the result is made of, if it may cancel.
    """
    for a, b in zip(tensors_of(actual), tensors_of(expected), strict=True):
        assert a.shape == b.shape
        if not a.numel():
            continue
        largest = max(scale, float(b.double().abs().max()))
        atol = 100 * torch.finfo(dtype).eps * largest + 2 * torch.finfo(dtype).tiny
        torch.testing.assert_close(a.double(), b.double(), rtol=0, atol=atol)


def assert_same(actual: Any, expected: Any) -> None:
    """Equal to the last bit."""
    for a, b in zip(tensors_of(actual), tensors_of(expected), strict=True):
        assert a.shape == b.shape
        assert torch.equal(bits(a), bits(b)), (a - b).abs().max()


def assert_finite(result: Any) -> None:
    for tensor in tensors_of(result):
        assert bool(torch.isfinite(tensor).all()), "not finite"


def assert_released(make: Callable[[], tuple[Any, list[Any]]]) -> None:
    """What a call was given is free once the caller lets it go, though the method lives on.

    Args:
        make: makes and calls the method; returns it, and the objects that it must not keep.
    """
    gc.freeze()  # only what is made from here on has to be searched
    try:
        method, objects = make()
        references = [weakref.ref(o) for o in objects]
        del objects
        gc.collect()
    finally:
        gc.unfreeze()
    assert [ref() for ref in references] == [None] * len(references), "a reference is kept"
    del method
