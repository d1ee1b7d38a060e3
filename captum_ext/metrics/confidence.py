"""Average drop and increase in confidence: the score of what a map lets through."""

from typing import Any, Unpack

import torch
from torch import Tensor

from captum_ext._compat import TargetType
from captum_ext._engine.modules import Forward, Tensors
from captum_ext.infill import Baselines
from captum_ext.metrics._definition import define
from captum_ext.metrics._scorer import Faithfulness, Scoring, with_scoring

__all__ = ["average_drop", "increase_in_confidence"]


@with_scoring
def average_drop(
    forward_func: Forward,
    inputs: Tensor | Tensors,
    attributions: Tensor | Tensors,
    target: TargetType = None,
    additional_forward_args: Any = None,
    *,
    baselines: Baselines = "zeros",
    **scoring: Unpack[Scoring],
) -> Tensor:
    r"""The share of each image's score that is lost when only what the map marks is shown: (B,).

    With m the map scaled to [0, 1], Y the score of the image and O that of its explanation map
    :math:`m \odot x + (1 - m) \odot b`,

    .. math:: \max(0, Y - O) / Y

    (Chattopadhay et al., "Grad-CAM++", 2018, who give the mean over images in per cent). The lower,
    the better. A flat map is scaled to zeros, and shows nothing. The paper's maps are rectified;
    rectify others first (`attributions.relu()`), or what speaks against the class is shown in part.
    A positive factor or a summand of a map changes nothing.

    Args:
        forward_func: see `insertion`, as for the rest and for what is raised.
        inputs: images (B, C, H, W), or a tuple of one such tensor.
        attributions: (B, C, H, W) or (B, H, W).
        target: as in Captum.
        additional_forward_args: as in Captum.
        baselines: b. "zeros" (paper): the image is multiplied by the map.
        **scoring: `score` and other keywords of `insertion`. "softmax" is the paper's score.

    Raises:
        ValueError: see `insertion`, and scores below 0, of which no share is lost.
        TypeError: likewise.
        AssertionError: likewise.

    Reference:
        Chattopadhay et al., https://arxiv.org/abs/1710.11063

    Example:
        >>> image, weights = torch.ones(1, 1, 2, 2), torch.tensor([[4.0, 3.0], [2.0, 1.0]])
        >>> model = lambda x: (x * weights).sum((1, 2, 3))
        >>> average_drop(model, image, torch.eye(2)[None], score="logit")  # 5 of 10 are shown
        tensor([0.5000])
    """
    scorer = Faithfulness(forward_func, inputs, target, additional_forward_args, **scoring)
    original, masked = scorer.confidences(attributions, baselines)
    if bool((original < 0).any()):
        raise ValueError(
            f"`score` {scorer.score!r} is below 0 for an image, so that no share of it can be "
            f"lost: choose probabilities."
        )
    return (original - masked).clamp(min=0) / torch.where(original > 0, original, 1)


@with_scoring
def increase_in_confidence(
    forward_func: Forward,
    inputs: Tensor | Tensors,
    attributions: Tensor | Tensors,
    target: TargetType = None,
    additional_forward_args: Any = None,
    *,
    baselines: Baselines = "zeros",
    **scoring: Unpack[Scoring],
) -> Tensor:
    """Whether the score rises when only what the map marks is shown: (B,), bool.

    Y < O, of `average_drop` (Chattopadhay et al., "Grad-CAM++", 2018, who give the share of images
    in per cent). The higher, the better.

    Args:
        forward_func: see `average_drop`, as for the rest and for what is raised.
        inputs: images (B, C, H, W), or a tuple of one such tensor.
        attributions: (B, C, H, W) or (B, H, W).
        target: as in Captum.
        additional_forward_args: as in Captum.
        baselines: b. "zeros".
        **scoring: `score` and other keywords of `insertion`.

    Reference:
        Chattopadhay et al., https://arxiv.org/abs/1710.11063

    Example:
        >>> image, weights = torch.ones(1, 1, 1, 2), torch.tensor([[4.0, -3.0]])
        >>> model = lambda x: (x * weights).sum((1, 2, 3))
        >>> increase_in_confidence(model, image, weights[None], score="logit")  # 1 to 4
        tensor([True])
    """
    scorer = Faithfulness(forward_func, inputs, target, additional_forward_args, **scoring)
    original, masked = scorer.confidences(attributions, baselines)
    return original < masked


def _values(found: Any, of_bools: bool = False) -> Tensor:
    if not isinstance(found, Tensor) or found.dim() != 1 or (found.dtype == torch.bool) != of_bools:
        shown = f"{found.dtype}, {tuple(found.shape)}" if isinstance(found, Tensor) else type(found)
        expected = "bool" if of_bools else "numbers"
        raise TypeError(f"`found` must be {expected}, (B,), got {shown}.")
    return found[:, None]


def _bools(found: Any) -> Tensor:
    return _values(found, of_bools=True)


AVERAGE_DROP = define(
    "average_drop",
    average_drop,
    "model",
    "AverageDrop",
    higher_is_better=False,
    values=_values,
)
INCREASE = define(
    "increase_in_confidence",
    increase_in_confidence,
    "model",
    "IncreaseInConfidence",
    values=_bools,
)
