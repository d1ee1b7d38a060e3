"""Sums over the masks of RISE, and the maps computed from them."""

import torch
from torch import Tensor

from captum_ext._engine.precision import divide_by_power, without_autocast

_LEAST_POWER = 2.0**-126  # of scores that are all 0


class MaskedMeans:
    """Running sums over masks, from which both estimators and their standard errors follow.

    With masks m and scores f, the sums are of g, m, m^2, g m, g m^2 and g^2 m^2, for g = f - f_0
    with the score f_0 of the first mask. So large scores that differ little lose no digits, and a
    constant score is exact. Scores are divided by the power of two of the largest so far, so that
    their squares are in the range of floats.

    Args:
        with_errors: whether to keep the sums for standard errors.
    """

    def __init__(self, with_errors: bool) -> None:
        self.with_errors, self.n = with_errors, 0
        self.is_finite: Tensor | None = None

    def add(self, scores: Tensor, masks: Tensor) -> None:
        """Add masks (n, P) and their scores (n, R)."""
        f = scores.to(masks)
        power = divide_by_power(f.T)[1].masked_fill(~f.any(0)[:, None], _LEAST_POWER)
        if self.n:
            self._grow_power(power)
        else:
            self.power = power
        f = f / self.power.T
        if self.n == 0:
            self.first = f[0].clone()
            rows, pixels = f.shape[1], masks.shape[1]
            self.g = f.new_zeros(rows)
            self.m, self.mm = masks.new_zeros(pixels), masks.new_zeros(pixels)
            self.gm = masks.new_zeros(rows, pixels)
            if self.with_errors:
                self.gmm, self.ggmm = torch.zeros_like(self.gm), torch.zeros_like(self.gm)
        finite = torch.isfinite(f).all()
        self.is_finite = finite if self.is_finite is None else self.is_finite & finite
        g = f - self.first
        self.n += len(f)
        self.g += g.sum(0)
        self.m += masks.sum(0)
        with without_autocast(masks):
            self.gm.addmm_(g.T, masks)
            if self.with_errors:
                squares = masks.square()
                self.mm += squares.sum(0)
                self.gmm.addmm_(g.T, squares)
                self.ggmm.addmm_(g.square().T, squares)

    def _grow_power(self, power: Tensor) -> None:
        """Divide all sums by a larger power (R, 1), where scores have grown. This is exact."""
        larger = torch.maximum(self.power, power)
        ratio, self.power = self.power / larger, larger
        self.first, self.g = self.first * ratio[:, 0], self.g * ratio[:, 0]
        self.gm *= ratio
        if self.with_errors:
            self.gmm *= ratio
            self.ggmm *= ratio.square()

    def check(self) -> None:
        """Raise a ValueError if a score was not finite. This synchronises with the device."""
        if self.is_finite is None or not bool(self.is_finite):
            raise ValueError("The scores of the masked inputs are not finite.")

    def estimates(self, p: float, estimator: str) -> tuple[Tensor, Tensor]:
        """The maps (R, P) and their standard errors."""
        maps, errors = self._divided_estimates(p, estimator)
        return maps * self.power, errors * self.power

    def _divided_estimates(self, p: float, estimator: str) -> tuple[Tensor, Tensor]:
        """The estimates for the scores divided by `power`."""
        first, n = self.first[:, None], self.n
        maps: Tensor
        if estimator == "standard":
            fm = self.gm + first * self.m
            maps = fm / (n * p)
        else:
            ratio = torch.where(self.m > 0, self.gm / self.m, self.g[:, None] / n)
            maps = first + ratio
        if not self.with_errors or n == 1:
            return maps, torch.full_like(maps, torch.inf)
        if estimator == "standard":
            ffmm = self.ggmm + 2 * first * self.gmm + first.square() * self.mm
            variance = (ffmm - fm.square() / n) / (n - 1)
            return maps, (variance.clamp(min=0) / n).sqrt() / p
        residuals = self.ggmm - 2 * ratio * self.gmm + ratio.square() * self.mm
        errors = (residuals.clamp(min=0) * (n / (n - 1))).sqrt() / self.m
        return maps, torch.where(self.m > 0, errors, torch.inf)
