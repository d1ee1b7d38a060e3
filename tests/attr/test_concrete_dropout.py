"""Concrete dropout and its simplification: the same function, up to floating point."""

import pytest
import torch
from torch import Tensor

from captum_ext.attr._concrete_dropout import (
    DROPOUTS,
    concrete_dropout,
    draw_uniform_noise,
    simplified_concrete_dropout,
)


def noise_at(logit: float, dtype: torch.dtype) -> Tensor:
    """Noise with (logit + eta) / 0.1 = 0.3 / 0.1 = 3, where the gradient is not small."""
    return torch.sigmoid(torch.tensor([0.3 - logit], dtype=torch.float64)).to(dtype)


def gradient(sample: object, logit: float, dtype: torch.dtype, **options: float) -> Tensor:
    at = torch.tensor([logit], dtype=dtype, requires_grad=True)
    z = sample(at, noise_at(logit, dtype), 0.1, **options)
    return torch.autograd.grad(z.sum(), at)[0]


@pytest.mark.parametrize("t", [0.1, 0.5, 1.0])
def test_both_dropouts_are_equal_in_float64(t: float) -> None:
    logits = torch.linspace(-8, 8, 4001, dtype=torch.float64).requires_grad_()
    uniform = torch.rand(4001, dtype=torch.float64).clamp(1e-3, 1 - 1e-3)
    samples = {name: sample(logits, uniform, t) for name, sample in DROPOUTS.items()}
    slopes = {name: torch.autograd.grad(z.sum(), logits)[0] for name, z in samples.items()}
    torch.testing.assert_close(samples["cd"], samples["scd"], rtol=1e-9, atol=0)
    torch.testing.assert_close(slopes["cd"], slopes["scd"], rtol=1e-9, atol=0)
    # sigmoid'((logit + eta) / t) / t, by hand.
    x = (logits + torch.log(uniform / (1 - uniform))).detach() / t
    by_hand = torch.sigmoid(x) * torch.sigmoid(-x) / t
    torch.testing.assert_close(slopes["scd"], by_hand, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("t", [0.1, 1.0])
def test_both_dropouts_agree_in_float32_up_to_logits_of_5(t: float) -> None:
    logits = torch.linspace(-5, 5, 100_001).requires_grad_()
    uniform = draw_uniform_noise((100_001,), logits, None)
    slopes = [
        torch.autograd.grad(sample(logits, uniform, t).sum(), logits)[0]
        for sample in DROPOUTS.values()
    ]
    torch.testing.assert_close(*slopes, rtol=1e-4, atol=1e-4)


def test_only_simplified_dropout_has_a_gradient_where_theta_saturates() -> None:
    exact = gradient(simplified_concrete_dropout, 17.0, torch.float64)
    simplified = gradient(simplified_concrete_dropout, 17.0, torch.float32)
    torch.testing.assert_close(simplified.double(), exact, rtol=1e-5, atol=0)
    assert torch.isnan(gradient(concrete_dropout, 17.0, torch.float32, eps=0.0)).all()
    assert gradient(concrete_dropout, 17.0, torch.float32).item() == 0.0, "the published epsilon"


def test_original_dropout_is_nan_in_half_precision() -> None:
    assert torch.isnan(gradient(concrete_dropout, 9.0, torch.float16)).all()
    assert torch.isfinite(gradient(simplified_concrete_dropout, 9.0, torch.float16)).all()


@pytest.mark.parametrize(
    ("t", "mean", "variance"), [(0.1, 0.2480, 0.3538), (0.5, 0.2146, 0.0316), (1.0, 1 / 6, 1 / 180)]
)
@pytest.mark.parametrize("sample", DROPOUTS.values(), ids=DROPOUTS)
def test_the_temperature_sets_the_variance(
    sample: object, t: float, mean: float, variance: float
) -> None:
    """Moments of dz/dlogit at logit 0, by the midpoint rule over the noise."""
    n = 1_000_000
    logits = torch.zeros(n, dtype=torch.float64, requires_grad=True)
    uniform = (torch.arange(n, dtype=torch.float64) + 0.5) / n
    (slope,) = torch.autograd.grad(sample(logits, uniform, t).sum(), logits)
    assert slope.mean().item() == pytest.approx(mean, rel=0.01)
    assert slope.var().item() == pytest.approx(variance, rel=0.01)


@pytest.mark.parametrize("t", [0.1, 1.0])
@pytest.mark.parametrize("sample", DROPOUTS.values(), ids=DROPOUTS)
def test_values_above_a_half_have_probability_theta(sample: object, t: float) -> None:
    n = 100_000
    uniform = (torch.arange(n, dtype=torch.float64) + 0.5) / n
    share = (sample(torch.ones(n, dtype=torch.float64), uniform, t) > 0.5).double().mean().item()
    assert share == pytest.approx(torch.sigmoid(torch.tensor(1.0)).item(), abs=2e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_noise_is_never_0_or_1(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype) -> None:
    like = torch.zeros(1, dtype=dtype)
    for end in (torch.zeros, torch.ones):
        monkeypatch.setattr(torch, "rand", lambda shape, generator, end=end, **k: end(shape, **k))
        noise = draw_uniform_noise((3,), like, None)
        for sample in DROPOUTS.values():
            assert torch.isfinite(sample(torch.zeros(3, dtype=dtype), noise, 0.1)).all()
        assert ((noise > 0) & (noise < 1)).all()
