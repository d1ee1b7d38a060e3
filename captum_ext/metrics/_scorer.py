"""Scores of perturbed images, for insertion, deletion, average drop and ROAD.

Only `PerturbationScorer.score_perturbed` runs the model.
"""

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import wraps
from typing import Any, TypedDict, TypeVar, cast

import torch
from torch import Generator, Tensor

from captum_ext._checks import check_count, check_generator, check_images, closest
from captum_ext._compat import TargetType, with_progress
from captum_ext._engine.modules import Forward
from captum_ext._engine.outputs import Score, Scorer, default_batch_size
from captum_ext._engine.state import preserve_state
from captum_ext.imaging import min_max
from captum_ext.infill import Baselines, Infill
from captum_ext.metrics._inputs import checked_maps

SEED = 0  # for the order of equal pixels, random infill and ROAD's noise

# Makes perturbed images (m, C, H, W) from the indices of their examples and of their perturbations.
Perturb = Callable[[Tensor, Tensor], Tensor]
Function = TypeVar("Function", bound=Callable[..., Any])


class ScoringOptions(TypedDict, total=False):
    """Options of all metrics that run the model.

    Attributes:
        score: "softmax" (default; RISE), "sigmoid", "logit" (the bare output) or a callable of the
            output.
        generator: draws the order of equal pixels and random infill, on the images' device. None
            fixes the order and the noise, and touches no global random state.
        internal_batch_size: images in one pass of the model, and in memory. None is 16 on a CPU and
            64 elsewhere.
        show_progress: whether to draw a progress bar.
    """

    score: Score
    generator: Generator | None
    internal_batch_size: int | None
    show_progress: bool


def with_scoring_options(function: Function) -> Function:
    """Give `function` a signature that lists the `ScoringOptions` in place of its `**scoring`.

    Calls with another keyword raise a TypeError that names the function and the closest keywords.
    """
    signature = inspect.signature(function)
    explicit = [p for p in signature.parameters.values() if p.kind is not p.VAR_KEYWORD]
    keywords = inspect.signature(PerturbationScorer).parameters
    shared = [keywords[name] for name in ScoringOptions.__annotations__]
    full = signature.replace(parameters=explicit + shared)

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


class PerturbationScorer:
    """A model's scores of perturbed images, in chunks.

    Args:
        forward_func: the model.
        inputs: images (B, C, H, W), or a tuple of one such tensor.
        target: as in Captum.
        additional_forward_args: as in Captum.
        score: see `ScoringOptions`, as for the rest.
        generator: draws the order of equal pixels and random infill.
        internal_batch_size: images in one pass of the model.
        show_progress: whether to draw a progress bar.

    Raises:
        ValueError: images or an option that do not fit.
        TypeError: a generator of another type.
        AssertionError: a target that is not one for each image.
    """

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
    def preserved(self) -> Iterator[None]:
        """Block without gradients that leaves the model as it was found."""
        with torch.no_grad(), preserve_state(self.forward_func):
            yield

    def maps_of(self, attributions: Any) -> Tensor:
        """One map for each image, (B, H, W)."""
        if isinstance(attributions, tuple) and len(attributions) == 1:
            attributions = attributions[0]
        maps = checked_maps(attributions).to(self.images.device)
        shape = (len(self.images), *self.images.shape[2:])
        if maps.shape != shape:
            raise ValueError(
                f"`attributions` are {len(maps)} maps of {maps.shape[1]} x {maps.shape[2]} and "
                f"`inputs` {shape[0]} images of {shape[1]} x {shape[2]}: they must agree. "
                f"`UpsampleWrapper` brings a layer's maps to the images' size."
            )
        return maps

    def rank_pixels(self, attributions: Any) -> Tensor:
        """Rank pixels (B, H, W) from 0, the most relevant; equal pixels in random order."""
        maps = self.maps_of(attributions)
        flat = maps.flatten(1)
        draws = self.generator or Generator().manual_seed(SEED)
        shuffled = torch.randperm(flat.shape[1], generator=draws, device=draws.device)
        shuffled = shuffled.to(flat.device)
        order = shuffled[flat[:, shuffled].argsort(dim=1, descending=True, stable=True)]
        ranks = torch.arange(flat.shape[1], device=flat.device).expand_as(order)
        return torch.empty_like(order).scatter_(1, order, ranks).view_as(maps)

    def make_infill(self, baselines: Baselines) -> Infill:
        """Make the infill of hidden pixels."""
        infill = Infill(self.images, baselines)
        infill.draw(self.generator or Generator(self.images.device).manual_seed(SEED))
        return infill

    def score_perturbed(self, perturb: Perturb, n: int) -> Tensor:
        """Score n perturbations of each image: (B, n)."""
        total, chunks = len(self.images) * n, []
        starts = range(0, total, self.internal_batch_size)
        for start in with_progress(starts, self.show_progress, "Faithfulness"):
            stop = min(start + self.internal_batch_size, total)
            pairs = torch.arange(start, stop, device=self.images.device)
            examples = pairs // n
            chunks.append(self.scorer((perturb(examples, pairs % n),), examples))
        scores = torch.cat(chunks).reshape(-1, n).to(self.images.device)
        if not bool(torch.isfinite(scores).all()):
            raise ValueError("`forward_func` gives scores that are not finite.")
        return scores

    def score_first_pixels(self, ranks: Tensor, infill: Infill, counts: Sequence[int]) -> Tensor:
        """Score the images with all but the first `count` pixels hidden, for n counts: (B, n)."""
        limits = torch.tensor(counts, device=ranks.device)[:, None, None]

        def perturb(examples: Tensor, indices: Tensor) -> Tensor:
            keep = (ranks[examples] < limits[indices])[:, None]
            fill = infill(examples, keep[:, None].to(self.images.dtype))[:, 0]
            return torch.where(keep, self.images[examples], fill)

        return self.score_perturbed(perturb, len(counts))

    def score_masked(self, attributions: Any, baselines: Baselines) -> tuple[Tensor, Tensor]:
        """Score the images, bare and masked by their maps, scaled to [0, 1]: (B,) each."""
        infill = self.make_infill(baselines)
        weights = min_max(self.maps_of(attributions)[:, None])

        def perturb(examples: Tensor, indices: Tensor) -> Tensor:
            keep = torch.where(indices[:, None, None, None] == 0, 1, weights[examples])
            keep = keep.to(self.images.dtype)
            fill = infill(examples, keep[:, None])[:, 0]
            return torch.lerp(fill, self.images[examples], keep)

        with self.preserved():
            original, masked = self.score_perturbed(perturb, 2).unbind(1)
        return original, masked
