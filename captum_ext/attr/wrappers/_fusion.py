"""Fusion of the maps of windows: laid back over their images and averaged."""

import math
from collections.abc import Callable
from itertools import groupby
from typing import Any

import torch
from torch import Tensor

from captum_ext._engine.precision import full_precision
from captum_ext.attr.wrappers._windows import Size, Window, window_indices
from captum_ext.imaging import resize


def canvas_key(pool: str, fusion: str) -> Callable[[Window], tuple[Any, ...]]:
    """Return a function that maps a window to a key; windows with one key share a canvas.

    Resizing and adding commute. So where maps are only added, a canvas holds a whole scale. Where
    each resized map is compared (with theta, or with the other maps), it holds one colour of a
    scale.
    """
    if pool == "mean" and fusion != "reference":
        return lambda window: (window.scale,)
    return lambda window: (window.scale, window.colour)


class WindowFusion:
    """The running numerator and denominator of the fusion, at the images' resolution.

    Maps come canvas by canvas: see `canvas_key`. Each canvas is resized once, when the next one
    begins. Where the largest score is not known beforehand, everything is kept relative to the
    largest one so far.

    Args:
        images: (B, C, H, W).
        sizes: the size of the images at each scale.
        window: the size of the maps.
        pool: "mean" or "max".
        fusion: the denominator; see `SESSWrapper`, as for `theta`.
        theta: the threshold of a vote.
        peak: (B,), the logarithm of each image's largest score; None if it is not known.
        wants_coverage: whether windows are counted.

    Attributes:
        coverage: (B, 1, H, W), how many windows see each pixel; None unless counted.
    """

    def __init__(
        self,
        images: Tensor,
        sizes: list[Size],
        window: Size,
        pool: str,
        fusion: str,
        theta: float,
        peak: Tensor | None,
        wants_coverage: bool,
    ) -> None:
        self.sizes, self.window, self.fusion, self.theta = sizes, window, fusion, theta
        self.canvas_key = canvas_key(pool, fusion)
        dtype = full_precision(images[:0]).dtype
        self.total = images.new_zeros((len(images), 1, *images.shape[2:]), dtype=dtype)
        self.votes = None if pool == "max" else torch.zeros_like(self.total)
        self.coverage = torch.zeros_like(self.total) if wants_coverage else None
        self.peak_is_known = peak is not None
        self.peak = self.total.new_full((len(images),), -math.inf) if peak is None else peak
        self.key: Any = None
        self.canvases: dict[str, Tensor] = {}

    def add(
        self, maps: Tensor, log_scores: Tensor, examples: list[int], windows: list[Window]
    ) -> None:
        """Add maps (n, 1, h, w) of n windows, with the logarithms of their scores (n,)."""
        index = torch.tensor(examples, device=maps.device)
        log_scores = log_scores.to(self.peak)
        if not self.peak_is_known:
            peak = self.peak.scatter_reduce(0, index, log_scores, "amax")
            self._rescale(_ratio(self.peak, peak)[:, None, None, None])
            self.peak = peak
        weights = _ratio(log_scores, self.peak[index])[:, None, None, None]
        start = 0
        for key, group in groupby(windows, self.canvas_key):
            run = list(group)
            part = slice(start, start + len(run))
            if key != self.key:
                self._fuse_canvases()
                self.key = key
            self._draw(maps[part], weights[part], log_scores[part], index[part], run)
            start += len(run)

    def result(self) -> Tensor:
        """The fused maps (B, 1, H, W)."""
        self._fuse_canvases()
        if self.votes is None:
            return self.total
        return self.total / torch.where(self.votes == 0, 1, self.votes)

    def _rescale(self, ratio: Tensor) -> None:
        """Make all sums relative to a larger score."""
        sums = [self.total, self.canvases.get("f")]
        if self.fusion == "weighted":
            sums += [self.votes, self.canvases.get("votes")]
        for tensor in sums:
            if tensor is not None:
                tensor.mul_(ratio)

    def _draw(
        self,
        maps: Tensor,
        weights: Tensor,
        log_scores: Tensor,
        index: Tensor,
        windows: list[Window],
    ) -> None:
        """Add weighted maps, and their votes, to the canvases of one scale."""
        f, fusion = maps * weights, self.fusion if self.votes is not None else "max"
        # A weight shrinks as larger scores come in. Without theta, a vote must not depend on that:
        # it is a property of the map itself.
        has_score = log_scores[:, None, None, None] > -math.inf
        if fusion == "soft":
            votes = f > self.theta if self.theta else (maps > 0) & has_score
            self._accumulate("votes", votes.to(f.dtype), index, windows)
            f = f * votes
        elif fusion == "reference" and not self.theta:
            self._accumulate("votes", maps * has_score, index, windows)
        elif fusion == "weighted":
            self._accumulate("votes", weights.expand_as(f), index, windows)
        elif fusion == "coverage":
            self._accumulate("votes", torch.ones_like(f), index, windows)
        self._accumulate("f", f, index, windows)
        if self.coverage is not None:
            self._accumulate("coverage", torch.ones_like(f), index, windows)

    def _accumulate(self, name: str, values: Tensor, index: Tensor, windows: list[Window]) -> None:
        """Add the values of windows to the canvas called `name`."""
        if name not in self.canvases:
            size = self.sizes[windows[0].scale]
            self.canvases[name] = self.total.new_zeros((len(self.total), 1, *size))
        rows, columns = window_indices(windows, self.window, values.device)
        at = (index[:, None, None], rows[:, :, None], columns[:, None, :])
        self.canvases[name][:, 0].index_put_(at, values[:, 0].to(self.total), accumulate=True)

    def _fuse_canvases(self) -> None:
        """Resize the canvases, add them to the sums, and begin new ones."""
        if not self.canvases:
            return
        size = self.total.shape[2:]
        resized = {name: resize(canvas, size) for name, canvas in self.canvases.items()}
        self.canvases = {}
        if self.coverage is not None:
            self.coverage += resized["coverage"]
        f = resized["f"]
        if self.votes is None:
            torch.maximum(self.total, f, out=self.total)
        elif self.fusion == "reference":
            is_vote = f > self.theta if self.theta else resized["votes"] > 0
            self.total += f * is_vote
            self.votes += is_vote
        else:
            self.total += f
            self.votes += resized["votes"]


def _ratio(log_scores: Tensor, peak: Tensor) -> Tensor:
    """exp(log_scores - peak), and 0 where no score is positive."""
    return torch.where(peak == -math.inf, 0, torch.exp(log_scores - peak))
