"""Average drop and increase in confidence: scores of images that are masked by their maps."""

from functools import partial
from typing import Any, Unpack

import torch
from torch import Tensor

from captum_ext._compat import TargetType
from captum_ext._engine.modules import Forward, Tensors
from captum_ext._errors import ArgumentError
from captum_ext.infill import Baselines
from captum_ext.metrics._definition import MetricDefinition, as_column
from captum_ext.metrics._scorer import PerturbationScorer, ScoringOptions, with_scoring_options

__all__ = ["average_drop", "increase_in_confidence"]


@with_scoring_options
def average_drop(
    forward_func: Forward,
    inputs: Tensor | Tensors,
    attributions: Tensor | Tensors,
    target: TargetType = None,
    additional_forward_args: Any = None,
    *,
    baselines: Baselines = "zeros",
    **scoring: Unpack[ScoringOptions],
) -> Tensor:
    r"""The share of each image's score that is lost when the image is masked by its map: (B,).

    With m the map scaled to [0, 1], Y the score of the image x and O the score of its explanation
    map :math:`m \odot x + (1 - m) \odot b`,

    .. math:: \max(0, Y - O) / Y

    (Chattopadhay et al., "Grad-CAM++", 2018, who give the mean over images in per cent). Lower is
    better. A flat map is scaled to zeros and hides the whole image. The paper's maps are rectified.
    Rectify other maps first (`attributions.relu()`), or evidence against the class stays visible in
    part. A positive factor or a summand of a map changes nothing.

    Args:
        forward_func: the model; see `insertion`, as for the next four.
        inputs: images (B, C, H, W), or a tuple of one such tensor.
        attributions: (B, C, H, W) or (B, H, W).
        target: as in Captum.
        additional_forward_args: as in Captum.
        baselines: b; see `insertion`. "zeros" (paper) multiplies the image by the map.
        **scoring: `score` and the other scoring options of `insertion`. "softmax" (paper).

    Returns:
        The drops, a share of 1; 0 for a score of 0.

    Raises:
        ValueError: images, attributions, an infill or an option that do not fit or are not finite;
            scores that are not one number for each image, not finite, or below 0.
        TypeError: attributions, an infill, a generator or outputs of another type.
        AssertionError: a target that does not select one score for each image, as in Captum.

    Reference:
        Chattopadhay et al., https://arxiv.org/abs/1710.11063

    Example:
        >>> image, weights = torch.ones(1, 1, 2, 2), torch.tensor([[4.0, 3.0], [2.0, 1.0]])
        >>> model = lambda x: (x * weights).sum((1, 2, 3))
        >>> average_drop(model, image, torch.eye(2)[None], score="logit")  # 5 of 10 are left
        tensor([0.5000])
    """
    scorer = PerturbationScorer(forward_func, inputs, target, additional_forward_args, **scoring)
    original, masked = scorer.score_masked(attributions, baselines)
    if bool((original < 0).any()):
        raise ArgumentError(
            f"`score` {scorer.score!r} is below 0 for an image, so that no share of it can be "
            f"lost: choose a probability, 'softmax' or 'sigmoid'.",
            "score",
        )
    return (original - masked).clamp(min=0) / torch.where(original > 0, original, 1)


@with_scoring_options
def increase_in_confidence(
    forward_func: Forward,
    inputs: Tensor | Tensors,
    attributions: Tensor | Tensors,
    target: TargetType = None,
    additional_forward_args: Any = None,
    *,
    baselines: Baselines = "zeros",
    **scoring: Unpack[ScoringOptions],
) -> Tensor:
    r"""True for each image whose score rises when the image is masked by its map: (B,), bool.

    With Y the score of the image and O the score of its explanation map, as in `average_drop`,

    .. math:: Y < O

    (Chattopadhay et al., "Grad-CAM++", 2018, who give the share of images in per cent). A higher
    share is better.

    Args:
        forward_func: the model; see `insertion`, as for the next four.
        inputs: images (B, C, H, W), or a tuple of one such tensor.
        attributions: (B, C, H, W) or (B, H, W).
        target: as in Captum.
        additional_forward_args: as in Captum.
        baselines: b of `average_drop`; see `insertion`. "zeros" (paper).
        **scoring: `score` and the other scoring options of `insertion`. "softmax" (paper).

    Raises:
        ValueError: images, attributions, an infill or an option that do not fit or are not finite;
            scores that are not one number for each image, or not finite.
        TypeError: attributions, an infill, a generator or outputs of another type.
        AssertionError: a target that does not select one score for each image, as in Captum.

    Reference:
        Chattopadhay et al., https://arxiv.org/abs/1710.11063

    Example:
        >>> image, weights = torch.ones(1, 1, 1, 2), torch.tensor([[4.0, -3.0]])
        >>> model = lambda x: (x * weights).sum((1, 2, 3))
        >>> increase_in_confidence(model, image, weights[None], score="logit")  # 1 to 4
        tensor([True])
    """
    scorer = PerturbationScorer(forward_func, inputs, target, additional_forward_args, **scoring)
    original, masked = scorer.score_masked(attributions, baselines)
    return original < masked


def _column_of(result: Any, are_bool: bool) -> Tensor:
    is_vector = isinstance(result, Tensor) and result.dim() == 1
    if not is_vector or (result.dtype == torch.bool) != are_bool:
        is_tensor = isinstance(result, Tensor)
        got = f"{result.dtype}, {tuple(result.shape)}" if is_tensor else type(result)
        expected = "bool" if are_bool else "numbers"
        raise TypeError(f"`result` must be {expected}, (B,), got {got}.")
    return as_column(result)


AVERAGE_DROP = MetricDefinition(
    "average_drop",
    average_drop,
    "model",
    "AverageDrop",
    higher_is_better=False,
    values=partial(_column_of, are_bool=False),
)
INCREASE = MetricDefinition(
    "increase_in_confidence",
    increase_in_confidence,
    "model",
    "IncreaseInConfidence",
    values=partial(_column_of, are_bool=True),
)
