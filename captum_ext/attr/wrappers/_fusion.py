"""Maps of windows, laid back over their images and averaged."""

import math
from collections.abc import Callable
from itertools import groupby
from typing import Any

import torch
from torch import Tensor

from captum_ext._engine.precision import full_precision
from captum_ext.attr.wrappers._windows import Size, Window, lines
from captum_ext.imaging import resize


def canvas_of(pool: str, fusion: str) -> Callable[[Window], tuple[Any, ...]]:
    """What windows whose maps share a canvas have in common.

    Resizing and adding commute, so a whole scale shares one where the maps are only added; where
    each resized map is compared (with theta, with the others) a colour class does.
    """
    if pool == "mean" and fusion != "reference":
        return lambda window: (window.scale,)
    return lambda window: (window.scale, window.colour)


class Fusion:
    """The running numerator and denominator of the fusion, at the images' resolution.

    Maps come canvas by canvas: a scale where the denominator is linear in the maps, else a colour
    class of a scale. A canvas is resized once, when the next one begins. Where the largest score is
    not known beforehand, everything is kept relative to the largest one so far.
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
        self.canvas = canvas_of(pool, fusion)
        dtype = full_precision(images[:0]).dtype
        self.total = images.new_zeros((len(images), 1, *images.shape[2:]), dtype=dtype)
        self.votes = None if pool == "max" else torch.zeros_like(self.total)
        self.coverage = torch.zeros_like(self.total) if wants_coverage else None
        self.peak_is_known = peak is not None
        self.peak = self.total.new_full((len(images),), -math.inf) if peak is None else peak
        self.key: Any = None
        self.drawn: dict[str, Tensor] = {}

    def add(self, maps: Tensor, logs: Tensor, examples: list[int], places: list[Window]) -> None:
        index = torch.tensor(examples, device=maps.device)
        logs = logs.to(self.peak)
        if not self.peak_is_known:
            peak = self.peak.scatter_reduce(0, index, logs, "amax")
            self._scale(_ratio(self.peak, peak)[:, None, None, None])
            self.peak = peak
        weights = _ratio(logs, self.peak[index])[:, None, None, None]
        start = 0
        for key, run in groupby(places, self.canvas):
            here = list(run)
            part = slice(start, start + len(here))
            if key != self.key:
                self._flush()
                self.key = key
            self._draw(maps[part], weights[part], logs[part], index[part], here)
            start += len(here)

    def result(self) -> Tensor:
        self._flush()
        if self.votes is None:
            return self.total
        return self.total / torch.where(self.votes == 0, 1, self.votes)

    def _scale(self, ratio: Tensor) -> None:
        scaled = [self.total, self.drawn.get("f")]
        if self.fusion == "weighted":
            scaled += [self.votes, self.drawn.get("votes")]
        for tensor in scaled:
            if tensor is not None:
                tensor.mul_(ratio)

    def _draw(
        self, maps: Tensor, weights: Tensor, logs: Tensor, index: Tensor, places: list[Window]
    ) -> None:
        f, fusion = maps * weights, self.fusion if self.votes is not None else "max"
        # Whether a map votes must not hang on how far its weight has sunk by now: without theta,
        # it is asked of the map itself.
        speaks = logs[:, None, None, None] > -math.inf
        if fusion == "soft":
            votes = f > self.theta if self.theta else (maps > 0) & speaks
            self._put("votes", votes.to(f.dtype), index, places)
            f = f * votes
        elif fusion == "reference" and not self.theta:
            self._put("votes", maps * speaks, index, places)
        elif fusion == "weighted":
            self._put("votes", weights.expand_as(f), index, places)
        elif fusion == "coverage":
            self._put("votes", torch.ones_like(f), index, places)
        self._put("f", f, index, places)
        if self.coverage is not None:
            self._put("coverage", torch.ones_like(f), index, places)

    def _put(self, name: str, values: Tensor, index: Tensor, places: list[Window]) -> None:
        if name not in self.drawn:
            size = self.sizes[places[0].scale]
            self.drawn[name] = self.total.new_zeros((len(self.total), 1, *size))
        rows, columns = lines(places, self.window, values.device)
        at = (index[:, None, None], rows[:, :, None], columns[:, None, :])
        self.drawn[name][:, 0].index_put_(at, values[:, 0].to(self.total), accumulate=True)

    def _flush(self) -> None:
        """Resize what is drawn, and add it to the fusion."""
        if not self.drawn:
            return
        size = self.total.shape[2:]
        sized = {name: resize(canvas, size) for name, canvas in self.drawn.items()}
        self.drawn = {}
        if self.coverage is not None:
            self.coverage += sized["coverage"]
        f = sized["f"]
        if self.votes is None:
            torch.maximum(self.total, f, out=self.total)
        elif self.fusion == "reference":
            is_vote = f > self.theta if self.theta else sized["votes"] > 0
            self.total += f * is_vote
            self.votes += is_vote
        else:
            self.total += f
            self.votes += sized["votes"]


def _ratio(logs: Tensor, peak: Tensor) -> Tensor:
    """exp(logs - peak), and 0 where no score is positive."""
    return torch.where(peak == -math.inf, 0, torch.exp(logs - peak))
