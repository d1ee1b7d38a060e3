"""Insertion and deletion: areas under the score while an image's pixels are inserted or deleted."""

import math
from typing import Any, NamedTuple, Unpack

import torch
from torch import Tensor

from captum_ext._compat import TargetType
from captum_ext._engine.modules import Forward, Tensors
from captum_ext._errors import ArgumentError
from captum_ext._repr import fields_repr
from captum_ext.infill import Baselines
from captum_ext.metrics._definition import MetricDefinition, as_column
from captum_ext.metrics._scorer import PerturbationScorer, ScoringOptions, with_scoring_options

__all__ = ["Curve", "OverallScore", "deletion", "insertion", "overall_score"]

STEP = 1 / 28  # a share of the pixels: 224 x 8 of 224 x 224


class Curve(NamedTuple):
    """The scores of images while their pixels are inserted or deleted.

    Attributes:
        auc: (B,): the area under the curve, by the trapezoidal rule; the mean score.
        scores: (B, n): the score at each share.
        shares: (n,), from 0 to 1: the share of the pixels that are inserted, or deleted.

    Example:
        >>> model, image = lambda x: x.sum((1, 2, 3)), torch.ones(1, 1, 2, 2)
        >>> curve = insertion(model, image, image, baselines=0, step=2, score="logit")
        >>> curve.scores, curve.shares, curve.auc
        (tensor([[0., 2., 4.]]), tensor([0.0000, 0.5000, 1.0000]), tensor([2.]))
    """

    auc: Tensor
    scores: Tensor
    shares: Tensor

    def __repr__(self) -> str:
        return fields_repr(self)


class OverallScore(NamedTuple):
    """The result of `overall_score`.

    Attributes:
        score: (B,): `insertion.auc - deletion.auc`.
        insertion: the `Curve` of insertion.
        deletion: the `Curve` of deletion.

    Example:
        >>> model, image = lambda x: x.sum((1, 2, 3)), torch.ones(1, 1, 2, 2)
        >>> result = overall_score(model, image, image, insertion_baselines=0.5, score="logit")
        >>> result.score, result.insertion.auc, result.deletion.auc
        (tensor([1.]), tensor([3.]), tensor([2.]))
    """

    score: Tensor
    insertion: Curve
    deletion: Curve

    def __repr__(self) -> str:
        return fields_repr(self)


@with_scoring_options
def insertion(
    forward_func: Forward,
    inputs: Tensor | Tensors,
    attributions: Tensor | Tensors,
    target: TargetType = None,
    additional_forward_args: Any = None,
    *,
    baselines: Baselines = "blur",
    step: float = STEP,
    **scoring: Unpack[ScoringOptions],
) -> Curve:
    r"""The score while an image's pixels are inserted into a baseline, the most relevant first.

    With :math:`x_k` the baseline in which the k pixels of highest attribution are the image's, and
    S the score,

    .. math:: \operatorname{AUC} = \int_0^1 S(x_{\lfloor u H W \rceil}) \, du

    by the trapezoidal rule over the steps (Petsiuk et al., "RISE", 2018). Higher is better. The
    first point is the bare baseline, the last the image itself. Any strictly increasing function of
    the map gives the same curve.

    Published settings: SESS and Group-CAM blur by `partial(infill.gaussian, sigma=50.0,
    kernel_size=51)`, RISE by `sigma=5.0, kernel_size=11`; both step by 224 x 8 pixels of 224 x 224.
    Their last step counts fully where it is shorter; ours by its length.

    Args:
        forward_func: the model; it gives logits, classes in dimension 1.
        inputs: images (B, C, H, W), or a tuple of one such tensor.
        attributions: (B, C, H, W) or (B, H, W); see `captum_ext.metrics`.
        target: as in Captum; one for each image. The literature takes the model's first answer.
        additional_forward_args: as in Captum. Tensors with an entry for each image follow their
            image; the others are passed on unchanged.
        baselines: the infill of pixels that are not inserted yet: "blur" (10 pixels for 224), a
            number, a tensor, "mean", "zeros", "local", "noise", or a callable; see
            `captum_ext.infill.Infill`.
        step: pixels at a time: an int is a number of pixels, a float a share of the image's. 1/28
            (RISE, SESS: 1792 of 50176).
        **scoring: `score`: "softmax" (default; RISE), "sigmoid", "logit" (the bare output) or a
            callable of the output. `generator`: draws the order of equal pixels, and "noise", on
            the images' device; None fixes the order, and touches no global random state.
            `internal_batch_size`: images in one pass of the model; None is 16 on a CPU and 64
            elsewhere; memory does not grow with the number of steps. `show_progress`: whether to
            draw a progress bar.

    Returns:
        The curve of each image, and the area under it.

    Raises:
        ValueError: images, attributions, an infill or an option that do not fit or are not finite;
            scores that are not one number for each image, or not finite.
        TypeError: attributions, an infill, a generator or outputs of another type.
        AssertionError: a target that does not select one score for each image, as in Captum.

    Reference:
        Petsiuk et al., https://arxiv.org/abs/1806.07421

    Example:
        >>> image, weights = torch.ones(1, 1, 2, 2), torch.tensor([[4.0, 3.0], [2.0, 1.0]])
        >>> model = lambda x: (x * weights).sum((1, 2, 3))
        >>> curve = insertion(model, image, weights[None], baselines=0, step=1, score="logit")
        >>> curve.scores, curve.auc  # the most relevant pixels first
        (tensor([[ 0.,  4.,  7.,  9., 10.]]), tensor([6.2500]))
    """
    scorer = PerturbationScorer(forward_func, inputs, target, additional_forward_args, **scoring)
    return _score_curves(scorer, attributions, step, insertion=baselines)[0]


@with_scoring_options
def deletion(
    forward_func: Forward,
    inputs: Tensor | Tensors,
    attributions: Tensor | Tensors,
    target: TargetType = None,
    additional_forward_args: Any = None,
    *,
    baselines: Baselines = "zeros",
    step: float = STEP,
    **scoring: Unpack[ScoringOptions],
) -> Curve:
    r"""The score while an image's pixels are deleted, the most relevant first.

    With :math:`x_k` the image in which the k pixels of highest attribution are the baseline's, and
    S the score,

    .. math:: \operatorname{AUC} = \int_0^1 S(x_{\lfloor u H W \rceil}) \, du

    by the trapezoidal rule over the steps (Petsiuk et al., "RISE", 2018). Lower is better. The
    first point is the image itself, the last the bare baseline.

    Args:
        forward_func: the model; see `insertion`, as for the next four.
        inputs: images (B, C, H, W), or a tuple of one such tensor.
        attributions: (B, C, H, W) or (B, H, W).
        target: as in Captum.
        additional_forward_args: as in Captum.
        baselines: the infill of deleted pixels; see `insertion`. "zeros" (RISE), the mean colour of
            normalised images.
        step: pixels at a time, or a share of them; see `insertion`. 1/28 (RISE).
        **scoring: `score` and the other scoring options of `insertion`.

    Returns:
        The curve of each image, and the area under it.

    Raises:
        ValueError: images, attributions, an infill or an option that do not fit or are not finite;
            scores that are not one number for each image, or not finite.
        TypeError: attributions, an infill, a generator or outputs of another type.
        AssertionError: a target that does not select one score for each image, as in Captum.

    Reference:
        Petsiuk et al., https://arxiv.org/abs/1806.07421

    Example:
        >>> image, weights = torch.ones(1, 1, 2, 2), torch.tensor([[4.0, 3.0], [2.0, 1.0]])
        >>> model = lambda x: (x * weights).sum((1, 2, 3))
        >>> curve = deletion(model, image, weights[None], step=0.5, score="logit")
        >>> curve.scores, curve.shares, curve.auc
        (tensor([[10.,  3.,  0.]]), tensor([0.0000, 0.5000, 1.0000]), tensor([4.]))
    """
    scorer = PerturbationScorer(forward_func, inputs, target, additional_forward_args, **scoring)
    return _score_curves(scorer, attributions, step, deletion=baselines)[0]


@with_scoring_options
def overall_score(
    forward_func: Forward,
    inputs: Tensor | Tensors,
    attributions: Tensor | Tensors,
    target: TargetType = None,
    additional_forward_args: Any = None,
    *,
    insertion_baselines: Baselines = "blur",
    deletion_baselines: Baselines = "zeros",
    step: float = STEP,
    **scoring: Unpack[ScoringOptions],
) -> OverallScore:
    r"""The AUC of insertion less that of deletion, and both curves.

    .. math:: \operatorname{AUC}_\text{insertion} - \operatorname{AUC}_\text{deletion}

    (Zhang et al., "Group-CAM", 2021). Higher is better. With the same baselines for both, a random
    map is expected to have 0.

    Args:
        forward_func: the model; see `insertion`, as for the next four.
        inputs: images (B, C, H, W), or a tuple of one such tensor.
        attributions: (B, C, H, W) or (B, H, W).
        target: as in Captum.
        additional_forward_args: as in Captum.
        insertion_baselines: the `baselines` of `insertion`. "blur".
        deletion_baselines: the `baselines` of `deletion`. "zeros".
        step: pixels at a time, or a share of them; see `insertion`. 1/28 (paper).
        **scoring: `score` and the other scoring options of `insertion`.

    Returns:
        The difference for each image, and both curves.

    Raises:
        ValueError: images, attributions, an infill or an option that do not fit or are not finite;
            scores that are not one number for each image, or not finite.
        TypeError: attributions, an infill, a generator or outputs of another type.
        AssertionError: a target that does not select one score for each image, as in Captum.

    Reference:
        Zhang et al., https://arxiv.org/abs/2103.13859

    Example:
        >>> image, weights = torch.ones(1, 1, 2, 2), torch.tensor([[4.0, 3.0], [2.0, 1.0]])
        >>> model = lambda x: (x * weights).sum((1, 2, 3))
        >>> result = overall_score(
        ...     model, image, weights[None], insertion_baselines=0, step=1, score="logit"
        ... )
        >>> result.score, result.insertion.auc, result.deletion.auc
        (tensor([2.5000]), tensor([6.2500]), tensor([3.7500]))
    """
    scorer = PerturbationScorer(forward_func, inputs, target, additional_forward_args, **scoring)
    inserted, deleted = _score_curves(
        scorer, attributions, step, insertion=insertion_baselines, deletion=deletion_baselines
    )
    return OverallScore(inserted.auc - deleted.auc, inserted, deleted)


def _score_curves(
    scorer: PerturbationScorer, attributions: Any, step: float, **baselines: Baselines
) -> list[Curve]:
    """Score the curves that have baselines, "insertion" or "deletion" or both, in their order."""
    ranks = scorer.rank_pixels(attributions)
    infills = {name: scorer.make_infill(value) for name, value in baselines.items()}
    counts = _pixels_at_points(step, ranks[0].numel())
    left = [counts[-1] - count for count in counts]
    orders = {"insertion": (ranks, counts), "deletion": (counts[-1] - 1 - ranks, left)}
    curves = []
    with scorer.preserved():
        for name, infill in infills.items():
            order, kept = orders[name]
            scores = scorer.score_first_pixels(order, infill, kept)
            shares = scores.new_tensor(counts) / counts[-1]
            curves.append(Curve(torch.trapezoid(scores, shares, dim=1), scores, shares))
    return curves


def _pixels_at_points(step: Any, pixels: int) -> list[int]:
    """The number of inserted or deleted pixels at each point of a curve, from 0 to all."""
    if isinstance(step, int) and not isinstance(step, bool) and 1 <= step <= pixels:
        return [*range(0, pixels, step), pixels]
    if not isinstance(step, float) or not 0 < step <= 1:
        raise ArgumentError(
            f"`step` must be a number of pixels, an int from 1 to the images' {pixels}, or a share "
            f"of them, a float above 0 and at most 1, got {step!r}.",
            "step",
        )
    share = max(step, 1 / pixels)
    steps = math.ceil(1 / share)
    return sorted({round(min(i * share, 1) * pixels) for i in range(steps)} | {pixels})


def _column_of_aucs(result: Any) -> Tensor:
    if not isinstance(result, Curve):
        raise TypeError(f"`result` must be a Curve, got {type(result)}.")
    return as_column(result.auc)


def _columns_of_overall(result: Any) -> Tensor:
    if not isinstance(result, OverallScore):
        raise TypeError(f"`result` must be an OverallScore, got {type(result)}.")
    return torch.stack((result.score, result.insertion.auc, result.deletion.auc), 1)


INSERTION = MetricDefinition("insertion", insertion, "model", "Insertion", values=_column_of_aucs)
DELETION = MetricDefinition(
    "deletion", deletion, "model", "Deletion", higher_is_better=False, values=_column_of_aucs
)
OVERALL = MetricDefinition(
    "overall_score", overall_score, "model", "Overall", values=_columns_of_overall
)
