"""Does the model heed what an attribution marks? What insertion, deletion, drop and ROAD share.

Pixels are shown or hidden in the order of a map, and the model is asked again: in `curves` for each
share of the pixels, in `confidence` once, in `road` with what is hidden interpolated. Attributions
are (B, C, H, W) or (B, H, W), of the images' height and width; channels that are all equal count as
one map, others are summed. Insertion, deletion and ROAD see nothing of a map but the order of its
pixels. **Pixels of equal value** come in a random order, the same for all images of a size and for
every call, unless a `generator` draws another: a flat map is a random one, and not one that reads
from the upper left.

Functions give figures of each image, and keep the curves; the torchmetrics classes take what the
functions return, and average it over batches and processes.
"""

from abc import abstractmethod
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Generator, Tensor
from torchmetrics import Metric

from captum_ext._checks import check_count, check_generator, one_batch_of_images
from captum_ext._compat import (
    TargetType,
    _format_additional_forward_args,
    _select_targets,
    progress,
)
from captum_ext._engine.modules import Forward
from captum_ext._engine.outputs import Score, check_one_score_each, one_target_each, scored
from captum_ext._engine.state import preserve_state
from captum_ext.imaging import min_max
from captum_ext.infill import Baselines, Infill
from captum_ext.metrics._inputs import checked_maps

SEED = 0  # of the order of equal pixels, and of ROAD's noise

Pictures = Callable[[Tensor, Tensor], Tensor]


class Trial:
    """A model, images, and the scores of pictures that are made of them, in chunks."""

    def __init__(
        self,
        forward_func: Forward,
        inputs: Any,
        target: TargetType,
        additional_forward_args: Any,
        score: Score,
        internal_batch_size: int | None,
    ) -> None:
        self.images = one_batch_of_images(inputs)
        if internal_batch_size is None:
            internal_batch_size = 16 if self.images.device.type == "cpu" else 64
        check_count("internal_batch_size", internal_batch_size)
        self.forward_func, self.internal_batch_size = forward_func, internal_batch_size
        self.forward = scored(_checked(forward_func, score), score)
        self.target = one_target_each(target, len(self.images), self.images.device)
        self.extra = _format_additional_forward_args(additional_forward_args) or ()

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

    def ranks(self, attributions: Any, generator: Generator | None) -> Tensor:
        """Each pixel's place, (B, H, W), from 0, the most relevant; equal ones in random order."""
        check_generator(generator, self.images.device)
        maps = self.maps(attributions)
        flat = maps.flatten(1)
        draws = generator or Generator().manual_seed(SEED)
        shuffled = torch.randperm(flat.shape[1], generator=draws, device=draws.device)
        shuffled = shuffled.to(flat.device)
        order = shuffled[flat[:, shuffled].argsort(dim=1, descending=True, stable=True)]
        places = torch.arange(flat.shape[1], device=flat.device).expand_as(order)
        return torch.empty_like(order).scatter_(1, order, places).view_as(maps)

    def infill(self, baselines: Baselines, generator: Generator | None) -> Infill:
        device = self.images.device
        check_generator(generator, device)
        infill = Infill(self.images, baselines)
        infill.draw(generator or Generator(device).manual_seed(SEED))
        return infill

    def scores(self, pictures: Pictures, n: int, show_progress: bool = False) -> Tensor:
        """The scores (B, n) of `pictures(examples, which of the n)`, indices in two tensors."""
        every, found = len(self.images) * n, []
        starts: Any = range(0, every, self.internal_batch_size)
        if show_progress:
            starts = progress(starts, desc="Faithfulness")
        for start in starts:
            stop = min(start + self.internal_batch_size, every)
            numbers = torch.arange(start, stop, device=self.images.device)
            examples = numbers // n
            extra = [self._of(examples, e) for e in self.extra]
            output = self.forward(pictures(examples, numbers % n), *extra)
            target = self.target
            if isinstance(target, Tensor):
                target = target.to(output.device)[examples.to(output.device)]
            elif isinstance(target, list):
                target = [target[i // n] for i in range(start, stop)]
            chosen = _select_targets(output, target)
            check_one_score_each(chosen)
            found.append(chosen.reshape(-1))
        scores = torch.cat(found).reshape(-1, n).to(self.images.device)
        if not bool(torch.isfinite(scores).all()):
            raise ValueError("`forward_func` gives scores that are not finite.")
        return scores

    def shown(
        self, ranks: Tensor, infill: Infill, counts: Sequence[int], show_progress: bool
    ) -> Tensor:
        """The scores (B, n) while just the first so many pixels of `ranks` show."""
        cuts = torch.tensor(counts, device=ranks.device)[:, None, None]

        def pictures(examples: Tensor, which: Tensor) -> Tensor:
            show = (ranks[examples] < cuts[which])[:, None]
            fill = infill(examples, show[:, None].to(self.images.dtype))[:, 0]
            return torch.where(show, self.images[examples], fill)

        return self.scores(pictures, len(counts), show_progress)

    def whole_and_marked(self, attributions: Any, infill: Infill) -> tuple[Tensor, Tensor]:
        """The scores (B,) of the images, and of what their maps, scaled to [0, 1], let through."""
        weights = min_max(self.maps(attributions)[:, None])

        def pictures(examples: Tensor, which: Tensor) -> Tensor:
            keep = torch.where(which[:, None, None, None] == 0, 1, weights[examples])
            keep = keep.to(self.images.dtype)
            fill = infill(examples, keep[:, None])[:, 0]
            return torch.lerp(fill, self.images[examples], keep)

        with torch.no_grad(), preserve_state(self.forward_func):
            whole, marked = self.scores(pictures, 2).unbind(1)
        return whole, marked

    def _of(self, examples: Tensor, value: Any) -> Any:
        is_each = isinstance(value, Tensor) and value.dim() > 0 and len(value) == len(self.images)
        return value[examples.to(value.device)] if is_each else value


def _checked(forward_func: Forward, score: Score) -> Forward:
    """`forward_func`, with an error where its output is not one of a batch."""

    def forward(pictures: Tensor, *extra: Any) -> Tensor:
        n = len(pictures)
        output = forward_func(pictures, *extra)
        if not isinstance(output, Tensor) or not output.is_floating_point():
            shown = output.dtype if isinstance(output, Tensor) else type(output)
            raise TypeError(f"`forward_func` must give a tensor of floats, got {shown}.")
        if output.dim() == 0 or len(output) != n:
            raise ValueError(
                f"`forward_func` must give scores for each of {n} images, got "
                f"{tuple(output.shape)}."
            )
        if score == "softmax" and (output.dim() == 1 or output.shape[1] == 1):
            raise ValueError(
                f'`score` is "softmax", but `forward_func` gives one number for each image, '
                f'{tuple(output.shape)}: choose "sigmoid" or "logit".'
            )
        return output

    return forward


class Means(Metric):
    """Means over images of what a function gives for each."""

    is_differentiable = False
    full_state_update = False
    names: tuple[str, ...] = ()  # of the means, where there are several

    total: Tensor
    count: Tensor

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        # One float32 more or less is lost in the sum of a million images.
        zeros = torch.zeros(len(self.names) or 1, dtype=torch.float64)
        self.add_state("total", zeros, dist_reduce_fx="sum")
        self.add_state("count", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")

    @abstractmethod
    def _values(self, found: Any) -> Tensor:
        """Of each image, (B, one or as many as names)."""

    def update(self, found: Any) -> None:
        """Add a batch: what the function returned for it."""
        values = self._values(found)
        if not bool(torch.isfinite(values).all()):
            raise ValueError("`found` has values that are not finite.")
        self.total = self.total + values.double().sum(0).to(self.total.device)
        self.count = self.count + len(values)

    def compute(self) -> Any:
        """The mean, or each by its name; NaN without an image."""
        means = (self.total / self.count).float()
        return dict(zip(self.names, means, strict=True)) if self.names else means[0]
