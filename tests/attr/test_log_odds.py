"""The stable log-odds, in every form of output and target."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from captum_ext.attr._log_odds import log_odds


def naive_log_odds(logits: Tensor, target: int) -> Tensor:
    p = logits.double().softmax(1)[:, target]
    return torch.log(p / (1 - p))


def test_values_equal_the_definition() -> None:
    logits = torch.randn(5, 7, dtype=torch.float64)
    torch.testing.assert_close(log_odds(logits, 3), naive_log_odds(logits, 3))
    torch.testing.assert_close(log_odds(logits[:, :2], 1), logits[:, 1] - logits[:, 0])


def test_large_logits_do_not_saturate() -> None:
    """At a logit of 17 over 200 zeros, naive float32 is off by 0.06; at 90 it has no gradient."""
    for height in (17.0, 90.0, 1e4):
        logits = torch.zeros(1, 201)
        logits[0, 0] = height
        logits.requires_grad_()
        odds = log_odds(logits, 0)
        assert odds.item() == pytest.approx(height - math.log(200), rel=1e-6)
        (slope,) = torch.autograd.grad(odds.sum(), logits)
        assert slope[0, 0].item() == 1.0
        torch.testing.assert_close(slope[0, 1:], torch.full((200,), -1 / 200))


def test_a_batch_equals_its_rows() -> None:
    """The largest logit is subtracted in each row; that of the batch would cause an underflow."""
    logits = torch.tensor([[1.0, 2.0, 3.0], [1e4, 0.0, 5e3]])
    torch.testing.assert_close(log_odds(logits, 1)[:1], log_odds(logits[:1], 1), rtol=0, atol=0)
    assert log_odds(logits, 0).tolist()[1] == 5e3


def test_shifted_logits_and_probabilities_give_the_same() -> None:
    logits = torch.randn(4, 6, dtype=torch.float64)
    expected = log_odds(logits, [0, 1, 2, 5])
    for same in (logits + 100, logits.log_softmax(1)):
        torch.testing.assert_close(log_odds(same, [0, 1, 2, 5]), expected)
    result = log_odds(logits.softmax(1), [0, 1, 2, 5], "probabilities")
    torch.testing.assert_close(result, expected)
    certain = torch.tensor([[1.0, 0.0, 0.0]], requires_grad=True)
    odds = log_odds(certain, 0, "probabilities")
    assert torch.isfinite(odds).all()
    assert torch.isfinite(torch.autograd.grad(odds.sum(), certain)[0]).all()


@pytest.mark.parametrize(
    "target",
    [2, torch.tensor(2), torch.tensor([2]), torch.tensor([2, 2, 2]), [2, 2, 2], (2,), [(2,)] * 3],
)
def test_target_forms_are_equivalent(target: Any) -> None:
    logits = torch.randn(3, 4)
    torch.testing.assert_close(log_odds(logits, target), naive_log_odds(logits, 2).float())


def test_dense_outputs_take_targets_with_positions() -> None:
    """Classes are in dimension 1; the rest of a target is the position."""
    logits = torch.randn(2, 4, 3, 5, dtype=torch.float64)
    at = [(3, 0, 4), (1, 2, 2)]
    expected = torch.cat(
        [naive_log_odds(logits[i : i + 1, :, y, x], c) for i, (c, y, x) in enumerate(at)]
    )
    torch.testing.assert_close(log_odds(logits, at), expected)
    same = torch.cat([naive_log_odds(logits[i : i + 1, :, 1, 2], 3) for i in range(2)])
    torch.testing.assert_close(log_odds(logits, (3, 1, 2)), same)


@pytest.mark.parametrize("shape", [(3,), (3, 1)])
def test_a_single_logit_stands_for_class_1(shape: tuple[int, ...]) -> None:
    values = torch.tensor([-1.0, 2.0, 1e4]).reshape(shape)
    flat = values.flatten()
    for target in (1, None, [1, 1, 1], torch.tensor([1, 1, 1])):
        assert torch.equal(log_odds(values, target), flat)
    assert torch.equal(log_odds(values, 0), -flat)
    assert torch.equal(log_odds(values, [0, 1, 0]), flat * torch.tensor([-1, 1, -1]))
    result = log_odds(torch.sigmoid(values[:2]), 1, "probabilities")
    torch.testing.assert_close(result, flat[:2])
    with pytest.raises(AssertionError):
        log_odds(values, [1, 1])


@pytest.mark.parametrize("target", [None, [0], torch.tensor([[0, 1, 2]])])
def test_targets_that_select_no_class_raise(target: Any) -> None:
    with pytest.raises(AssertionError):
        log_odds(torch.randn(3, 4), target)


@pytest.mark.parametrize("target", [4, [0, 1, 4]])
def test_classes_out_of_range_raise(target: Any) -> None:
    """Captum's selection raises AssertionError, IndexError or gather's RuntimeError."""
    with pytest.raises((AssertionError, IndexError, RuntimeError)):
        log_odds(torch.randn(3, 4), target)


def test_half_precision_is_scored_in_float32() -> None:
    logits = torch.tensor([[10.0, 3.0, -2.0]])
    result = log_odds(logits.half(), 0)
    assert result.dtype == torch.float32
    torch.testing.assert_close(result, log_odds(logits, 0))
