"""RISE (Petsiuk, Das, Saenko, BMVC 2018)."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from captum.attr import PerturbationAttribution
from torch import Generator, Tensor

from captum_ext._checks import check_choice, check_count, check_generator, check_size
from captum_ext._compat import (
    TargetType,
    TensorOrTupleOfTensors,
    _format_baseline,
    _format_output,
    _format_tensor_into_tuples,
    _is_tuple,
    _validate_input,
    log_usage,
    with_progress,
)
from captum_ext._engine.modules import Forward, Tensors
from captum_ext._engine.outputs import Score, Scorer, check_score, compute_scores, select_target
from captum_ext._engine.state import preserve_state
from captum_ext.attr._grid_masks import BLOCK, GridMasks, chunks_of
from captum_ext.attr._masked_means import MaskedMeans
from captum_ext.attr._method_info import Paper
from captum_ext.attr._named import Named
from captum_ext.infill import OF_IMAGES

ESTIMATORS = ("standard", "self-normalized")


@dataclass(frozen=True, eq=False)
class RISEMaps:
    """What RISE found for T targets of B examples, in float32 (float64 for inputs in float64).

    Attributes:
        maps: (T, B, 1, *spatial).
        standard_errors: (T, B, 1, *spatial), of the maps; infinite where nothing is known of them:
            of one mask, and where a self-normalized map has a pixel that no mask has shown.
        n_masks: (T, B), the masks that the map is made of; fewer than were asked for where
            `tolerance` was met.
    """

    maps: Tensor
    standard_errors: Tensor
    n_masks: Tensor


class RISE(Named, PerturbationAttribution):
    r"""RISE: a pixel matters if the score is high when random masks show it.

    With f the score, b the baseline, and N random masks m, whose values have the mean p (Eq. 6),

    .. math::
        S = \frac{1}{N p} \sum_n f(x \odot m_n + b \odot (1 - m_n)) \, m_n

    estimates the mean score of the masks that show the pixel. Where f is a constant q, S is q times
    the mean of the masks drawn over p, which is noise alone. The self-normalized estimator divides
    by that mean, and is q:

    .. math::
        S' = \sum_n f_n \, m_n \, / \sum_n m_n

    with a bias of the order 1/N.

    **Masks** (section 3.2): a grid whose cells are 1 with probability p and else 0, upsampled
    bilinearly to one cell more than the input has, and cut to the input's size at a random place
    within a cell. A cell has ceil(size / grid) pixels. Where that is 1, a dimension is neither
    upsampled nor shifted, so that pixels are independent. Masks are drawn once for the whole batch,
    and do not depend on `perturbations_per_eval` nor on the number format; more of them begin with
    the same ones.

    **Where paper and code differ.** The paper, and TorchRay, have 8000 masks for a ResNet-50 and
    4000 for a VGG-16, a grid of 7 and p = 0.5; the published notebooks 6000 masks, a grid of 8 and
    p = 0.1. The defaults are the paper's. Its code upsamples by scikit-image, whose border differs
    a little. Copies of it that come with other methods weigh by the model's raw output:
    `score="logit"`.

    Args:
        forward_func: the model; it gives logits, classes in dimension 1.
        score: f: "softmax" (the paper), "logit", "sigmoid", or a callable of the output.

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
        >>> found = RISE(net).estimate(x, targets=[0, 1, [1, 3]], n_masks=50, grid=4)
        >>> found.maps.shape, found.standard_errors.shape
        (torch.Size([3, 2, 1, 16, 16]), torch.Size([3, 2, 1, 16, 16]))
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
        r"""The map of each example: one forward pass for each mask, and nothing backwards.

        Args:
            inputs: a tensor (B, C, \*spatial) with one to three spatial dimensions, or a tuple. Of
                a tuple, the first tensor of floats with spatial dimensions is masked, and with it,
                by the same masks, those of its spatial size; the others are passed on as they are,
                and their attributions are 0.
            baselines: what shows where the mask is 0, in any of Captum's forms; None is 0, which in
                normalised images is the mean colour (the paper). For images also "blur", "mean" or
                "zeros", see `captum_ext.infill.Infill`; `NoiseTunnel` does not know these names.
            target: as in Captum; one for each example.
            additional_forward_args: as in Captum.
            n_masks: N, or the most masks where there is a `tolerance`. 8000 (paper).
            p: the probability that a cell is shown. 0.5 (paper).
            grid: cells along each spatial dimension, or one number for all. 7 (paper).
            estimator: "standard" (paper) or "self-normalized".
            tolerance: stop an example where its largest standard error is at most this share of the
                map's range, the largest value minus the smallest. It is looked at after every 256
                masks. None runs all.
            generator: of all random numbers; None takes torch's global one.
            perturbations_per_eval: masks in one forward pass, for each example; at most 256 are
                used. Memory beyond that pass does not grow with `n_masks`.
            show_progress: whether to draw a progress bar.

        Returns:
            The maps, of the inputs' shapes and dtypes, equal in all channels.

        Raises:
            ValueError: inputs without spatial dimensions or that are not finite; an option out of
                range, or a grid finer than the input; scores that are not finite, or no scores of
                each example.
            TypeError: a generator of another type.
            AssertionError: a target that does not select one score for each example, and baselines
                that do not go with the inputs, as in Captum.
        """
        examples: Tensors = _format_tensor_into_tuples(inputs)
        found = self._estimate(
            examples, [target], baselines, additional_forward_args, n_masks, p, grid, estimator,
            tolerance, generator, perturbations_per_eval, show_progress, tolerance is not None,
        ).maps[0]  # fmt: skip
        masked = _masked_inputs(examples)
        whole = tuple(
            found.to(x.dtype).expand(x.shape).contiguous() if is_masked else torch.zeros_like(x)
            for x, is_masked in zip(examples, masked, strict=True)
        )
        formatted: TensorOrTupleOfTensors = _format_output(_is_tuple(inputs), whole)
        return formatted

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

        Each map is that of `attribute` for its target with the same random numbers. Memory grows
        with the number of targets by three numbers for each example and pixel.

        Args:
            inputs: as in `attribute`, as all that follows.
            targets: a list of targets, each in any of Captum's forms: `[1, 2]` is two maps of each
                example, `[[1, 2]]` one of each of two.
            baselines: what shows where the mask is 0.
            additional_forward_args: as in Captum.
            n_masks: N.
            p: the probability that a cell is shown.
            grid: cells along each spatial dimension.
            estimator: "standard" or "self-normalized".
            tolerance: of each map; passes go on until the last is done.
            generator: of all random numbers.
            perturbations_per_eval: masks in one forward pass, for each example.
            show_progress: whether to draw a progress bar.

        Returns:
            Maps, standard errors and the number of masks. The standard error of a self-normalized
            map is that of the ratio to first order.

        Raises:
            ValueError: as in `attribute`, and no targets.
            TypeError: as in `attribute`.
            AssertionError: as in `attribute`.
        """
        if not isinstance(targets, Sequence | Tensor) or len(targets) == 0:
            raise ValueError(f"`targets` must be a list of at least one target, got {targets!r}.")
        return self._estimate(
            _format_tensor_into_tuples(inputs), list(targets), baselines, additional_forward_args,
            n_masks, p, grid, estimator, tolerance, generator, perturbations_per_eval,
            show_progress, True,
        )  # fmt: skip

    @torch.no_grad()
    def _estimate(
        self,
        inputs: Tensors,
        targets: Sequence[TargetType],
        baselines: Any,
        additional_forward_args: Any,
        n_masks: int,
        p: float,
        grid: int | tuple[int, ...],
        estimator: str,
        tolerance: float | None,
        generator: Generator | None,
        perturbations_per_eval: int,
        show_progress: bool,
        with_errors: bool,
    ) -> RISEMaps:
        is_masked = _masked_inputs(inputs)
        first = inputs[is_masked.index(True)]
        check_count("n_masks", n_masks)
        check_count("perturbations_per_eval", perturbations_per_eval)
        check_choice("estimator", estimator, ESTIMATORS)
        if tolerance is not None:
            check_size("tolerance", tolerance, positive=True)
        check_generator(generator, first.device)
        masks = GridMasks(first, grid, p, generator)
        fills = _fills(baselines, inputs)
        n_examples = len(first)
        scorers = [
            Scorer(
                self.forward_func, n_examples, target, additional_forward_args, self.score,
                first.device,
            )
            for target in targets
        ]  # fmt: skip
        every = torch.arange(n_examples, device=first.device)

        def scores_under(m: Tensor) -> Tensor:
            """(n, T * B) of the masks (n, *spatial)."""
            n = len(m)
            composites = tuple(
                _blend(x, b, m) if masked else torch.cat([x] * n)
                for x, b, masked in zip(inputs, fills, is_masked, strict=True)
            )
            rows = every.repeat(n)
            scores = compute_scores(scorers[0].outputs(composites, rows), self.score)
            chosen = [select_target(scores, scorer.targets_for(rows)) for scorer in scorers]
            return torch.stack([score.reshape(n, n_examples) for score in chosen], 1).flatten(1)

        chunks = chunks_of(n_masks, perturbations_per_eval)
        sums, found = MaskedMeans(with_errors), _Estimates(tolerance)
        with preserve_state(self.forward_func):
            for start, stop in with_progress(
                chunks, show_progress, f"{self.get_name()} attribution"
            ):
                m = masks(start, stop)
                sums.add(scores_under(m), m.flatten(1))
                if stop % BLOCK and stop < n_masks:
                    continue
                sums.check()
                if tolerance is None and stop < n_masks:
                    continue
                found.update(*sums.estimates(p, estimator), stop)
                if found.are_done:
                    break
        shape = (len(targets), n_examples)
        whole = (*shape, 1, *first.shape[2:])
        return RISEMaps(
            found.maps.reshape(whole), found.errors.reshape(whole), found.n_masks.reshape(shape)
        )


class _Estimates:
    """Maps (R, P), their standard errors, and the number of their masks (R,).

    What is within the tolerance stays as it was: a batch equals its examples one by one.
    """

    def __init__(self, tolerance: float | None) -> None:
        self.tolerance, self.are_done = tolerance, False
        self.is_done: Tensor | None = None

    def update(self, maps: Tensor, errors: Tensor, n: int) -> None:
        n_masks = torch.full((len(maps),), n, device=maps.device)
        if self.is_done is None:
            self.maps, self.errors, self.n_masks = maps, errors, n_masks
            self.is_done = torch.zeros_like(n_masks, dtype=torch.bool)
        else:
            self.maps = torch.where(self.is_done[:, None], self.maps, maps)
            self.errors = torch.where(self.is_done[:, None], self.errors, errors)
            self.n_masks = torch.where(self.is_done, self.n_masks, n_masks)
        if self.tolerance is not None:
            low, high = torch.aminmax(maps, dim=1)
            self.is_done |= errors.amax(1) <= self.tolerance * (high - low)
            self.are_done = bool(self.is_done.all())


def _masked_inputs(inputs: Tensors) -> list[bool]:
    """Which of the inputs are masked."""
    spatial = [x.is_floating_point() and 3 <= x.dim() <= 5 and x.numel() > 0 for x in inputs]
    if not any(spatial):
        raise ValueError(
            f"`inputs` must have a tensor of floats (B, C, *spatial) with one to three spatial "
            f"dimensions, got {[(tuple(x.shape), x.dtype) for x in inputs]}."
        )
    size = inputs[spatial.index(True)].shape[2:]
    masked = [can and x.shape[2:] == size for x, can in zip(inputs, spatial, strict=True)]
    for x, is_masked in zip(inputs, masked, strict=True):
        if is_masked and not bool(torch.isfinite(x).all()):
            raise ValueError("`inputs` are not finite.")
    return masked


def _fills(baselines: Any, inputs: Tensors) -> Any:
    """Numbers or tensors, one for each of the inputs."""
    given = baselines if isinstance(baselines, tuple) else (baselines,)
    if any(isinstance(b, str) for b in given):
        if len(given) != len(inputs):
            raise ValueError(f"`baselines` must be one for each of {len(inputs)} inputs.")
        given = tuple(
            _named(b, x) if isinstance(b, str) else b for b, x in zip(given, inputs, strict=True)
        )
        baselines = tuple(0 if b is None else b for b in given)
    fills = _format_baseline(baselines, inputs)
    _validate_input(inputs, fills)
    for x, fill in zip(inputs, fills, strict=True):
        if isinstance(fill, Tensor) and not _broadcasts(fill, x):
            raise ValueError(
                f"`baselines` must broadcast to the inputs, got {tuple(fill.shape)} for "
                f"{tuple(x.shape)}."
            )
    return fills


def _broadcasts(fill: Tensor, x: Tensor) -> bool:
    sizes = zip(reversed(fill.shape), reversed(x.shape), strict=False)
    return fill.dim() <= x.dim() and all(n in (1, m) for n, m in sizes)


def _named(name: str, x: Tensor) -> Tensor:
    check_choice("baselines", name, OF_IMAGES)
    if x.dim() != 4:
        raise ValueError(f"`baselines` {name!r} is for images (B, C, H, W), got {tuple(x.shape)}.")
    return OF_IMAGES[name](x).expand_as(x)


def _blend(x: Tensor, baseline: Tensor | float, masks: Tensor) -> Tensor:
    """X m + b (1 - m) for each of n masks (n, *spatial), mask after mask: (n * B, ...)."""
    m = masks.to(x.dtype)[:, None, None]
    if not isinstance(baseline, Tensor) and baseline == 0:
        return (x * m).flatten(0, 1)
    # A number that is copied to the device would make each pass wait for it.
    fill = baseline.to(x) if isinstance(baseline, Tensor) else x.new_full((), baseline)
    return torch.lerp(fill, x, m).flatten(0, 1)
