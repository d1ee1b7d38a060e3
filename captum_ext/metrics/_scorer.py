"""Scores of perturbed images: what insertion, deletion, drop and ROAD share.

Only `Faithfulness.scores` runs a model.
"""

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import wraps
from typing import Any, TypedDict, TypeVar, cast

import torch
from torch import Generator, Tensor

from captum_ext._checks import check_count, check_generator, check_images, closest
from captum_ext._compat import (
    TargetType,
    with_progress,
)
from captum_ext._engine.modules import Forward
from captum_ext._engine.outputs import (
    Score,
    Scorer,
    default_batch_size,
)
from captum_ext._engine.state import preserve_state
from captum_ext.imaging import min_max
from captum_ext.infill import Baselines, Infill
from captum_ext.metrics._inputs import checked_maps

SEED = 0  # of the order of equal pixels, and of ROAD's noise

Perturb = Callable[[Tensor, Tensor], Tensor]
Function = TypeVar("Function", bound=Callable[..., Any])


class Scoring(TypedDict, total=False):
    """Keywords that all metrics of faithfulness take.

    Attributes:
        score: "softmax" (default; RISE), "sigmoid", "logit" (the output as it is) or a callable of
            the output.
        generator: of the order of equal pixels and of random infill; on the images' device. None
            is a fixed order and fixed noise, and touches no global random state.
        internal_batch_size: images in one pass of the model, and in memory. None is 16 on a CPU and
            64 elsewhere.
        show_progress: whether to draw a progress bar.
    """

    score: Score
    generator: Generator | None
    internal_batch_size: int | None
    show_progress: bool


def with_scoring(function: Function) -> Function:
    """`function`, with a signature that names the keywords in its `**scoring`, and no other.

    Calls with another one raise a TypeError that names the function and the closest keywords.
    """
    signature = inspect.signature(function)
    own = [p for p in signature.parameters.values() if p.kind is not p.VAR_KEYWORD]
    keywords = inspect.signature(Faithfulness).parameters
    shared = [keywords[name] for name in Scoring.__annotations__]
    full = signature.replace(parameters=own + shared)

    @wraps(function)
    def checked(*args: Any, **kwargs: Any) -> Any:
        for name in kwargs:
            if name not in full.parameters:
                raise TypeError(
                    f"{function.__name__}() got an unexpected keyword argument {name!r}. Closest: "
                    f"{closest(name, list(full.parameters))}."
                )
        return function(*args, **kwargs)

    vars(checked)["__signature__"] = full
    return cast(Function, checked)


class Faithfulness:
    """A model, images, and the model's scores of what is made of the images, in chunks."""

    def __init__(
        self,
        forward_func: Forward,
        inputs: Any,
        target: TargetType,
        additional_forward_args: Any,
        *,
        score: Score = "softmax",
        generator: Generator | None = None,
        internal_batch_size: int | None = None,
        show_progress: bool = False,
    ) -> None:
        self.images = check_images(inputs)
        if internal_batch_size is None:
            internal_batch_size = default_batch_size(self.images.device)
        check_count("internal_batch_size", internal_batch_size)
        self.forward_func, self.internal_batch_size = forward_func, internal_batch_size
        self.scorer = Scorer(
            forward_func, len(self.images), target, additional_forward_args, score,
            self.images.device,
        )  # fmt: skip
        check_generator(generator, self.images.device)
        self.score, self.generator, self.show_progress = score, generator, show_progress

    @contextmanager
    def running(self) -> Iterator[None]:
        """The block in which scores are taken: without gradients, and with the model put back."""
        with torch.no_grad(), preserve_state(self.forward_func):
            yield

    def maps(self, attributions: Any) -> Tensor:
        """One map for each image, (B, H, W)."""
        if isinstance(attributions, tuple) and len(attributions) == 1:
            attributions = attributions[0]
        maps = checked_maps(attributions).to(self.images.device)
        shape = (len(self.images), *self.images.shape[2:])
        if maps.shape != shape:
            raise ValueError(
                f"`attributions` are {len(maps)} maps of {maps.shape[1]} x {maps.shape[2]} and "
                f"`inputs` {shape[0]} images of {shape[1]} x {shape[2]}: they must agree. Maps of "
                f"a layer are brought to the images' size by `UpsampleWrapper`."
            )
        return maps

    def ranks(self, attributions: Any) -> Tensor:
        """Each pixel's rank, (B, H, W), from 0, the most relevant; equal ones in random order."""
        maps = self.maps(attributions)
        flat = maps.flatten(1)
        draws = self.generator or Generator().manual_seed(SEED)
        shuffled = torch.randperm(flat.shape[1], generator=draws, device=draws.device)
        shuffled = shuffled.to(flat.device)
        order = shuffled[flat[:, shuffled].argsort(dim=1, descending=True, stable=True)]
        ranks = torch.arange(flat.shape[1], device=flat.device).expand_as(order)
        return torch.empty_like(order).scatter_(1, order, ranks).view_as(maps)

    def infill(self, baselines: Baselines) -> Infill:
        """What takes the place of hidden pixels."""
        infill = Infill(self.images, baselines)
        infill.draw(self.generator or Generator(self.images.device).manual_seed(SEED))
        return infill

    def scores(self, perturb: Perturb, n: int) -> Tensor:
        """The scores (B, n) of `perturb(examples, which of the n)`, indices in two tensors."""
        total, chunks = len(self.images) * n, []
        starts = range(0, total, self.internal_batch_size)
        for start in with_progress(starts, self.show_progress, "Faithfulness"):
            stop = min(start + self.internal_batch_size, total)
            numbers = torch.arange(start, stop, device=self.images.device)
            examples = numbers // n
            chunks.append(self.scorer((perturb(examples, numbers % n),), examples))
        scores = torch.cat(chunks).reshape(-1, n).to(self.images.device)
        if not bool(torch.isfinite(scores).all()):
            raise ValueError("`forward_func` gives scores that are not finite.")
        return scores

    def shown(self, ranks: Tensor, infill: Infill, counts: Sequence[int]) -> Tensor:
        """The scores (B, n) while only the first so many pixels of `ranks` show."""
        cuts = torch.tensor(counts, device=ranks.device)[:, None, None]

        def perturb(examples: Tensor, which: Tensor) -> Tensor:
            show = (ranks[examples] < cuts[which])[:, None]
            fill = infill(examples, show[:, None].to(self.images.dtype))[:, 0]
            return torch.where(show, self.images[examples], fill)

        return self.scores(perturb, len(counts))

    def confidences(self, attributions: Any, baselines: Baselines) -> tuple[Tensor, Tensor]:
        """The scores (B,) of the images, and of what their maps, scaled to [0, 1], let through."""
        infill = self.infill(baselines)
        weights = min_max(self.maps(attributions)[:, None])

        def perturb(examples: Tensor, which: Tensor) -> Tensor:
            keep = torch.where(which[:, None, None, None] == 0, 1, weights[examples])
            keep = keep.to(self.images.dtype)
            fill = infill(examples, keep[:, None])[:, 0]
            return torch.lerp(fill, self.images[examples], keep)

        with self.running():
            original, masked = self.scores(perturb, 2).unbind(1)
        return original, masked
