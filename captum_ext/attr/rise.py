"""RISE (Petsiuk, Das, Saenko, BMVC 2018)."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from captum.attr import PerturbationAttribution
from torch import Generator, Tensor

from captum_ext._checks import check_choice, check_count, check_generator, check_positive
from captum_ext._compat import (
    TargetType,
    TensorOrTupleOfTensors,
    _format_output,
    _format_tensor_into_tuples,
    _is_tuple,
    log_usage,
    with_progress,
)
from captum_ext._engine.modules import Forward, Tensors
from captum_ext._engine.outputs import Score, Scorer, check_score, compute_scores, count_dims
from captum_ext._engine.state import preserve_state
from captum_ext._errors import ArgumentError
from captum_ext._repr import fields_repr
from captum_ext.attr._arguments import checked_baselines, checks_arguments
from captum_ext.attr._grid_masks import BLOCK, GridMasks, chunk_bounds
from captum_ext.attr._masked_means import MaskedMeans
from captum_ext.attr._method_info import Paper
from captum_ext.attr._mixin import AttributionMixin
from captum_ext.infill import IMAGE_INFILLS, blend

ESTIMATORS = ("standard", "self-normalized")


@dataclass(frozen=True, eq=False)
class RISEMaps:
    """RISE's maps for T targets of B examples, in float32 (float64 for inputs in float64).

    Attributes:
        maps: (T, B, 1, *spatial).
        standard_errors: (T, B, 1, *spatial), of the maps. They are infinite for a single mask, and
            at pixels of a self-normalized map that every mask hides.
        n_masks: (T, B), the number of masks of each map; fewer than requested where `tolerance` was
            reached.
    """

    maps: Tensor
    standard_errors: Tensor
    n_masks: Tensor

    def __repr__(self) -> str:
        return fields_repr(self)


@dataclass(frozen=True)
class _Options:
    """The options of `RISE.attribute` and `RISE.estimate`."""

    n_masks: int
    p: float
    grid: int | tuple[int, ...]
    estimator: str
    tolerance: float | None
    generator: Generator | None
    perturbations_per_eval: int
    show_progress: bool

    def check(self, device: torch.device) -> None:
        check_count("n_masks", self.n_masks)
        check_count("perturbations_per_eval", self.perturbations_per_eval)
        check_choice("estimator", self.estimator, ESTIMATORS)
        if self.tolerance is not None:
            check_positive("tolerance", self.tolerance)
        check_generator(self.generator, device)


class RISE(AttributionMixin, PerturbationAttribution):
    r"""RISE: a pixel matters if the score is high when random masks show it.

    With the score f, the baseline b, and N random masks m with values of mean p, the map (Eq. 6)

    .. math::
        S = \frac{1}{N p} \sum_n f(x \odot m_n + b \odot (1 - m_n)) \, m_n

    estimates, for each pixel, the mean score of the masks that show it. If f is a constant q, then
    S is q times the mean of the masks drawn, divided by p: it varies by chance alone. The
    self-normalized estimator divides by the mean of the masks drawn, and gives exactly q:

    .. math::
        S' = \sum_n f_n \, m_n \, / \sum_n m_n

    Its bias is of the order 1/N.

    **Masks** (section 3.2): a grid whose cells are 1 with probability p, and 0 otherwise. It is
    upsampled bilinearly to one cell more than the input has, and cropped to the input's size with a
    random shift of less than a cell. A cell has ceil(size / grid) pixels. A dimension where that is
    1 is neither upsampled nor shifted, so that its pixels are independent. Masks are drawn once for
    the whole batch. They depend neither on `perturbations_per_eval` nor on the number format, and
    the first of N masks are those of a call with fewer.

    **Where paper and code differ.** The paper, and TorchRay, use 8000 masks for a ResNet-50 and
    4000 for a VGG-16, a grid of 7 and p = 0.5. The published notebooks use 6000 masks, a grid of 8
    and p = 0.1. The defaults are the paper's. Its code upsamples by scikit-image, whose border
    differs a little. Copies of it that come with other methods weight masks by the model's raw
    output: `score="logit"`.

    Args:
        forward_func: the model; it gives logits, classes in dimension 1.
        score: f: "softmax" (paper), "logit", "sigmoid", or a callable of the output.

    Raises:
        ValueError: an unknown score.

    Reference:
        Petsiuk, Das, Saenko, "RISE: Randomized Input Sampling for Explanation of Black-box Models",
        https://arxiv.org/abs/1806.07421

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from captum_ext.attr import RISE
        >>> net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())
        >>> x = torch.rand(2, 3, 16, 16)
        >>> RISE(net).attribute(x, target=[1, 3], n_masks=50, grid=4).shape
        torch.Size([2, 3, 16, 16])
        >>> RISE(net).estimate(x, targets=[0, 1, [1, 3]], n_masks=50, grid=4).maps.shape
        torch.Size([3, 2, 1, 16, 16])
    """

    title = "RISE"
    paper = Paper("Petsiuk et al.", 2018, "https://arxiv.org/abs/1806.07421")
    family = "masking"
    passes = "8000"
    zero_is_neutral = False

    def __init__(self, forward_func: Forward, score: Score = "softmax") -> None:
        check_score(score)
        super().__init__(forward_func)
        self.score = score

    @property
    def multiplies_by_inputs(self) -> bool:
        return False

    @log_usage()
    @checks_arguments
    def attribute(
        self,
        inputs: TensorOrTupleOfTensors,
        baselines: Any = None,
        target: TargetType = None,
        additional_forward_args: Any = None,
        *,
        n_masks: int = 8000,
        p: float = 0.5,
        grid: int | tuple[int, ...] = 7,
        estimator: str = "standard",
        tolerance: float | None = None,
        generator: Generator | None = None,
        perturbations_per_eval: int = 16,
        show_progress: bool = False,
    ) -> TensorOrTupleOfTensors:
        r"""The map of each example, from one forward pass for each mask and no backward pass.

        Args:
            inputs: a tensor (B, C, \*spatial) with one to three spatial dimensions, or a tuple. In
                a tuple, the first tensor of floats with spatial dimensions is masked, and so are
                all others of its spatial size, by the same masks. The rest are passed on unchanged;
                their attributions are 0.
            baselines: b, the values where the mask is 0, in any of Captum's forms. None is 0, the
                mean colour of normalised images (paper). For images also "blur", "mean" or "zeros",
                see `captum_ext.infill.Infill`; `NoiseTunnel` does not know these names.
            target: as in Captum; one for each example.
            additional_forward_args: as in Captum.
            n_masks: N, or the most masks where there is a `tolerance`. 8000 (paper).
            p: the probability that a cell is shown. 0.5 (paper).
            grid: cells along each spatial dimension, or one number for all. 7 (paper).
            estimator: "standard" (paper) or "self-normalized".
            tolerance: stops an example when its largest standard error is at most this share of the
                map's range, the largest value minus the smallest. It is checked after every 256
                masks. None uses all masks.
            generator: of all random numbers; None takes torch's global one.
            perturbations_per_eval: masks in one forward pass, for each example; at most 256 are
                used. Memory beyond that pass does not grow with `n_masks`.
            show_progress: whether to draw a progress bar.

        Returns:
            The maps, of the inputs' shapes and dtypes, equal in all channels.

        Raises:
            ValueError: inputs without spatial dimensions or that are not finite; an option out of
                range, or a grid finer than the input; scores that are not finite, or not one for
                each example.
            TypeError: a generator of another type.
            AssertionError: a target that does not select one score for each example, or baselines
                that do not fit the inputs, as in Captum.
        """
        options = _Options(
            n_masks, p, grid, estimator, tolerance, generator, perturbations_per_eval, show_progress
        )
        examples: Tensors = _format_tensor_into_tuples(inputs)
        maps = self._estimate(
            examples, [target], baselines, additional_forward_args, options, tolerance is not None
        ).maps[0]
        attributions = tuple(
            maps.to(x.dtype).expand(x.shape).contiguous() if is_masked else torch.zeros_like(x)
            for x, is_masked in zip(examples, _masked_inputs(examples), strict=True)
        )
        output: TensorOrTupleOfTensors = _format_output(_is_tuple(inputs), attributions)
        return output

    @checks_arguments
    def estimate(
        self,
        inputs: Tensor | Tensors,
        targets: Sequence[TargetType],
        baselines: Any = None,
        additional_forward_args: Any = None,
        *,
        n_masks: int = 8000,
        p: float = 0.5,
        grid: int | tuple[int, ...] = 7,
        estimator: str = "standard",
        tolerance: float | None = None,
        generator: Generator | None = None,
        perturbations_per_eval: int = 16,
        show_progress: bool = False,
    ) -> RISEMaps:
        """The maps of several targets from the same forward passes, with their standard errors.

        Each map equals the one that `attribute` makes for its target from the same random numbers.
        Each target takes memory for three numbers per example and pixel.

        Args:
            inputs: as in `attribute`, like all arguments but `targets`.
            targets: a list of targets, each in any of Captum's forms: `[1, 2]` gives two maps of
                each example, `[[1, 2]]` gives one map of each of two examples.
            baselines: the values where the mask is 0.
            additional_forward_args: as in Captum.
            n_masks: N.
            p: the probability that a cell is shown.
            grid: cells along each spatial dimension.
            estimator: "standard" or "self-normalized".
            tolerance: of each map; new masks are drawn until all maps have reached it.
            generator: of all random numbers.
            perturbations_per_eval: masks in one forward pass, for each example.
            show_progress: whether to draw a progress bar.

        Returns:
            Maps, standard errors and the number of masks. A self-normalized map is a ratio of
            sums, and its standard error is exact to first order only.

        Raises:
            ValueError: as in `attribute`, or no targets.
            TypeError: as in `attribute`.
            AssertionError: as in `attribute`.
        """
        if not isinstance(targets, Sequence | Tensor) or len(targets) == 0:
            raise ArgumentError(
                f"`targets` must be a list of at least one target, got {targets!r}."
            )
        options = _Options(
            n_masks, p, grid, estimator, tolerance, generator, perturbations_per_eval, show_progress
        )
        examples: Tensors = _format_tensor_into_tuples(inputs)
        return self._estimate(
            examples, list(targets), baselines, additional_forward_args, options, True
        )

    @torch.no_grad()
    def _estimate(
        self,
        inputs: Tensors,
        targets: Sequence[TargetType],
        baselines: Any,
        additional_forward_args: Any,
        options: _Options,
        with_errors: bool,
    ) -> RISEMaps:
        is_masked = _masked_inputs(inputs)
        first = inputs[is_masked.index(True)]
        options.check(first.device)
        masks = GridMasks(first, options.grid, options.p, options.generator)
        baselines = _checked_baselines(baselines, inputs)
        scorers = [
            Scorer(
                self.forward_func, len(first), target, additional_forward_args, self.score,
                first.device,
            )
            for target in targets
        ]  # fmt: skip
        scores = _TargetScores(inputs, baselines, is_masked, scorers)
        n_masks = options.n_masks
        chunks = chunk_bounds(n_masks, options.perturbations_per_eval)
        sums, latest = MaskedMeans(with_errors), _LatestMaps(options.tolerance)
        with preserve_state(self.forward_func):
            for start, stop in with_progress(
                chunks, options.show_progress, f"{self.get_name()} attribution"
            ):
                m = masks(start, stop)
                sums.add(scores(m), m.flatten(1))
                if stop % BLOCK and stop < n_masks:
                    continue
                sums.check()
                if options.tolerance is None and stop < n_masks:
                    continue
                latest.update(*sums.estimates(options.p, options.estimator), stop)
                if latest.all_converged:
                    break
        rows = (len(targets), len(first))
        shape = (*rows, 1, *first.shape[2:])
        return RISEMaps(
            latest.maps.reshape(shape), latest.errors.reshape(shape), latest.n_masks.reshape(rows)
        )


class _TargetScores:
    """The scores of T targets of B examples under masks, all from the same forward passes."""

    def __init__(
        self, inputs: Tensors, baselines: Any, is_masked: list[bool], scorers: list[Scorer]
    ) -> None:
        self.parts = list(zip(inputs, baselines, is_masked, strict=True))
        self.scorers = scorers
        self.indices = torch.arange(len(inputs[0]), device=inputs[is_masked.index(True)].device)

    def __call__(self, masks: Tensor) -> Tensor:
        """The scores (n, T * B) under masks (n, *spatial)."""
        n = len(masks)
        masked = tuple(
            blend(x, b, masks.to(x.dtype)[:, None, None]) if is_masked else torch.cat([x] * n)
            for x, b, is_masked in self.parts
        )
        examples, first = self.indices.repeat(n), self.scorers[0]
        scores = compute_scores(first.outputs(masked, examples), first.score, count_dims(masked))
        selected = [scorer.select(scores, examples) for scorer in self.scorers]
        return torch.stack([s.reshape(n, len(self.indices)) for s in selected], 1).flatten(1)


class _LatestMaps:
    """The latest maps (R, P), their standard errors, and the number of their masks (R,).

    A map that has reached the tolerance no longer changes, so that a batch equals its examples.
    """

    def __init__(self, tolerance: float | None) -> None:
        self.tolerance, self.all_converged = tolerance, False
        self.has_converged: Tensor | None = None

    def update(self, maps: Tensor, errors: Tensor, n: int) -> None:
        n_masks = torch.full((len(maps),), n, device=maps.device)
        if self.has_converged is None:
            self.maps, self.errors, self.n_masks = maps, errors, n_masks
            self.has_converged = torch.zeros_like(n_masks, dtype=torch.bool)
        else:
            self.maps = torch.where(self.has_converged[:, None], self.maps, maps)
            self.errors = torch.where(self.has_converged[:, None], self.errors, errors)
            self.n_masks = torch.where(self.has_converged, self.n_masks, n_masks)
        if self.tolerance is not None:
            low, high = torch.aminmax(maps, dim=1)
            self.has_converged |= errors.amax(1) <= self.tolerance * (high - low)
            self.all_converged = bool(self.has_converged.all())


def _masked_inputs(inputs: Tensors) -> list[bool]:
    """Return, for each of the inputs, whether it is masked."""
    can_mask = [x.is_floating_point() and 3 <= x.dim() <= 5 and x.numel() > 0 for x in inputs]
    if not any(can_mask):
        raise ArgumentError(
            f"`inputs` must have a tensor of floats (B, C, *spatial) with one to three spatial "
            f"dimensions, got {[(tuple(x.shape), x.dtype) for x in inputs]}."
        )
    size = inputs[can_mask.index(True)].shape[2:]
    return [can and x.shape[2:] == size for x, can in zip(inputs, can_mask, strict=True)]


def _checked_baselines(baselines: Any, inputs: Tensors) -> Any:
    """The baselines as numbers or tensors, one for each of the inputs."""
    parts = baselines if isinstance(baselines, tuple) else (baselines,)
    if any(isinstance(b, str) for b in parts):
        if len(parts) != len(inputs):
            raise ArgumentError(
                f"`baselines` must be one for each of {len(inputs)} inputs, got {len(parts)}."
            )
        parts = tuple(
            _named_baseline(b, x) if isinstance(b, str) else b
            for b, x in zip(parts, inputs, strict=True)
        )
        baselines = tuple(0 if b is None else b for b in parts)
    formatted = checked_baselines(baselines, inputs)
    for x, baseline in zip(inputs, formatted, strict=True):
        if isinstance(baseline, Tensor) and not _can_broadcast(baseline, x):
            raise ArgumentError(
                f"`baselines` must broadcast to the inputs, got {tuple(baseline.shape)} for "
                f"{tuple(x.shape)}."
            )
    return formatted


def _can_broadcast(baseline: Tensor, x: Tensor) -> bool:
    sizes = zip(reversed(baseline.shape), reversed(x.shape), strict=False)
    return baseline.dim() <= x.dim() and all(n in (1, m) for n, m in sizes)


def _named_baseline(name: str, x: Tensor) -> Tensor:
    check_choice("baselines", name, IMAGE_INFILLS)
    if x.dim() != 4:
        raise ArgumentError(
            f"`baselines` {name!r} is for images (B, C, H, W), got {tuple(x.shape)}."
        )
    return IMAGE_INFILLS[name](x).expand_as(x)
