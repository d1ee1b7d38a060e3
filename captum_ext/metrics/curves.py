"""Insertion and deletion: the score while an image's pixels come or go, and the area under it."""

import math
from typing import Any, NamedTuple, Unpack

import torch
from torch import Tensor

from captum_ext._compat import TargetType
from captum_ext._engine.modules import Forward, Tensors
from captum_ext.infill import Baselines
from captum_ext.metrics._definition import define
from captum_ext.metrics._scorer import Faithfulness, Scoring, with_scoring

__all__ = ["Curve", "OverallScore", "deletion", "insertion", "overall_score"]

STEP = 1 / 28  # of the pixels: 224 x 8 of 224 x 224


class Curve(NamedTuple):
    """The score of each image, while its pixels come or go.

    Attributes:
        auc: (B,): the area under the curve, by the trapezoidal rule; the mean score.
        scores: (B, n): at each share.
        shares: (n,), from 0 to 1: of the pixels that were inserted, or deleted.
    """

    auc: Tensor
    scores: Tensor
    shares: Tensor


class OverallScore(NamedTuple):
    """Insertion less deletion.

    Attributes:
        score: (B,): `insertion.auc - deletion.auc`.
        insertion: its curve.
        deletion: its curve.
    """

    score: Tensor
    insertion: Curve
    deletion: Curve


@with_scoring
def insertion(
    forward_func: Forward,
    inputs: Tensor | Tensors,
    attributions: Tensor | Tensors,
    target: TargetType = None,
    additional_forward_args: Any = None,
    *,
    baselines: Baselines = "blur",
    step: float = STEP,
    **scoring: Unpack[Scoring],
) -> Curve:
    r"""How soon the score comes up when an image's pixels come back, the most relevant first.

    With :math:`x_k` the baseline in which the k pixels of highest attribution are the image's,

    .. math:: \operatorname{AUC} = \int_0^1 S(x_{\lfloor u H W \rceil}) \, du

    by the trapezoidal rule over the steps (Petsiuk et al., "RISE", 2018). The higher, the better.
    The first point is the bare baseline, the last the image itself. Any strictly increasing
    function of the map gives the same.

    Published settings: SESS and Group-CAM blur by `partial(infill.gaussian, sigma=50.0,
    kernel_size=51)`, RISE by `sigma=5.0, kernel_size=11`; both step by 224 x 8 pixels of 224 x 224.
    Their last step counts fully where it is shorter; ours by its length.

    Args:
        forward_func: the model; it gives logits, classes in dimension 1.
        inputs: images (B, C, H, W), or a tuple of one such tensor.
        attributions: (B, C, H, W) or (B, H, W); see `captum_ext.metrics`.
        target: as in Captum; one for each image. The literature takes the model's first answer.
        additional_forward_args: as in Captum. Tensors with an entry for each image follow it, all
            else is handed on as it is.
        baselines: what is there before a pixel comes: "blur" (10 pixels for 224), a number, a
            tensor, "mean", "zeros", "local", "noise", or a callable; see
            `captum_ext.infill.Infill`.
        step: pixels at a time: an int is a number of pixels, a float a share of the image's. 1/28
            (RISE, SESS: 1792 of 50176).
        **scoring: `score`: "softmax" (default; RISE), "sigmoid", "logit" (the output as it is) or a
            callable of it. `generator`: of the order of equal pixels, and of "noise"; on the
            images' device; None is a fixed order, and touches no global random state.
            `internal_batch_size`: images in one pass of the model; None is 16 on a CPU and 64
            elsewhere; memory does not grow with the number of steps. `show_progress`: whether to
            draw a progress bar.

    Raises:
        ValueError: images, attributions, an infill or an option that do not fit or are not finite;
            scores that are not one number for each picture, or not finite.
        TypeError: attributions, an infill, a generator or outputs of another type.
        AssertionError: a target that does not select one score for each image, as in Captum.

    Reference:
        Petsiuk et al., https://arxiv.org/abs/1806.07421

    Example:
        >>> image, weights = torch.ones(1, 1, 2, 2), torch.tensor([[4.0, 3.0], [2.0, 1.0]])
        >>> model = lambda x: (x * weights).sum((1, 2, 3))
        >>> found = insertion(model, image, weights[None], baselines=0, step=1, score="logit")
        >>> found.scores, found.auc  # the most relevant pixels first
        (tensor([[ 0.,  4.,  7.,  9., 10.]]), tensor([6.2500]))
    """
    scorer = Faithfulness(forward_func, inputs, target, additional_forward_args, **scoring)
    return _curves(scorer, attributions, step, insertion=baselines)[0]


@with_scoring
def deletion(
    forward_func: Forward,
    inputs: Tensor | Tensors,
    attributions: Tensor | Tensors,
    target: TargetType = None,
    additional_forward_args: Any = None,
    *,
    baselines: Baselines = "zeros",
    step: float = STEP,
    **scoring: Unpack[Scoring],
) -> Curve:
    r"""How soon the score goes down when an image's pixels go, the most relevant first.

    `insertion` the other way round: with :math:`x_k` the image in which the k pixels of highest
    attribution are the baseline's. The lower, the better. The first point is the image itself, the
    last the bare baseline.

    Args:
        forward_func: see `insertion`, as for the rest and for what is raised.
        inputs: images (B, C, H, W), or a tuple of one such tensor.
        attributions: (B, C, H, W) or (B, H, W).
        target: as in Captum.
        additional_forward_args: as in Captum.
        baselines: what is left where a pixel went. "zeros" (RISE), the mean colour of normalised
            images.
        step: pixels at a time, or a share of them. 1/28.
        **scoring: `score` and other keywords of `insertion`.

    Example:
        >>> image, weights = torch.ones(1, 1, 2, 2), torch.tensor([[4.0, 3.0], [2.0, 1.0]])
        >>> model = lambda x: (x * weights).sum((1, 2, 3))
        >>> found = deletion(model, image, weights[None], step=0.5, score="logit")
        >>> found.scores, found.shares, found.auc
        (tensor([[10.,  3.,  0.]]), tensor([0.0000, 0.5000, 1.0000]), tensor([4.]))
    """
    scorer = Faithfulness(forward_func, inputs, target, additional_forward_args, **scoring)
    return _curves(scorer, attributions, step, deletion=baselines)[0]


@with_scoring
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
    **scoring: Unpack[Scoring],
) -> OverallScore:
    """The AUC of insertion less that of deletion (Zhang et al., "Group-CAM", 2021), and both.

    The higher, the better. With the same baselines for both, a random map is expected to have 0.

    Args:
        forward_func: see `insertion`, as for the rest and for what is raised.
        inputs: images (B, C, H, W), or a tuple of one such tensor.
        attributions: (B, C, H, W) or (B, H, W).
        target: as in Captum.
        additional_forward_args: as in Captum.
        insertion_baselines: "blur".
        deletion_baselines: "zeros".
        step: pixels at a time, or a share of them. 1/28.
        **scoring: `score` and other keywords of `insertion`.

    Reference:
        Zhang et al., https://arxiv.org/abs/2103.13859

    Example:
        >>> image, weights = torch.ones(1, 1, 2, 2), torch.tensor([[4.0, 3.0], [2.0, 1.0]])
        >>> model = lambda x: (x * weights).sum((1, 2, 3))
        >>> found = overall_score(
        ...     model, image, weights[None], insertion_baselines=0, step=1, score="logit"
        ... )
        >>> found.score, found.insertion.auc, found.deletion.auc
        (tensor([2.5000]), tensor([6.2500]), tensor([3.7500]))
    """
    scorer = Faithfulness(forward_func, inputs, target, additional_forward_args, **scoring)
    first, second = _curves(
        scorer, attributions, step, insertion=insertion_baselines, deletion=deletion_baselines
    )
    return OverallScore(first.auc - second.auc, first, second)


def _curves(
    scorer: Faithfulness, attributions: Any, step: float, **baselines: Baselines
) -> list[Curve]:
    """Of "insertion" and "deletion", those of which there are baselines, in their order."""
    ranks = scorer.ranks(attributions)
    infills = {name: scorer.infill(value) for name, value in baselines.items()}
    counts = _counts(step, ranks[0].numel())
    left = [counts[-1] - count for count in counts]
    shown = {"insertion": (ranks, counts), "deletion": (counts[-1] - 1 - ranks, left)}
    with scorer.running():
        return [
            _curve(scorer.shown(shown[name][0], infill, shown[name][1]), counts)
            for name, infill in infills.items()
        ]


def _curve(scores: Tensor, counts: list[int]) -> Curve:
    shares = scores.new_tensor(counts) / counts[-1]
    return Curve(torch.trapezoid(scores, shares, dim=1), scores, shares)


def _counts(step: Any, pixels: int) -> list[int]:
    """How many pixels have come at each point of a curve, from 0 to all."""
    whole = isinstance(step, int) and not isinstance(step, bool)
    if whole and 1 <= step <= pixels:
        return [*range(0, pixels, step), pixels]
    if not isinstance(step, float) or not 0 < step <= 1:
        raise ValueError(
            f"`step` must be a number of pixels, an int from 1 to the images' {pixels}, or a share "
            f"of them, a float above 0 and at most 1, got {step!r}."
        )
    share = max(step, 1 / pixels)
    steps = math.ceil(1 / share)
    return sorted({round(min(i * share, 1) * pixels) for i in range(steps)} | {pixels})


def _auc(found: Any) -> Tensor:
    if not isinstance(found, Curve):
        raise TypeError(f"`found` must be a Curve, got {type(found)}.")
    return found.auc[:, None]


def _scores(found: Any) -> Tensor:
    if not isinstance(found, OverallScore):
        raise TypeError(f"`found` must be an OverallScore, got {type(found)}.")
    return torch.stack((found.score, found.insertion.auc, found.deletion.auc), 1)


INSERTION = define("insertion", insertion, "model", "Insertion", values=_auc)
DELETION = define("deletion", deletion, "model", "Deletion", higher_is_better=False, values=_auc)
OVERALL = define("overall_score", overall_score, "model", "Overall", values=_scores)
