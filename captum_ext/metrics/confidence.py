"""Average drop and increase in confidence: the score of what a map lets through."""

from typing import Any

import torch
from torch import Generator, Tensor

from captum_ext._compat import TargetType
from captum_ext._engine.modules import Forward, Tensors
from captum_ext._engine.outputs import Score
from captum_ext.infill import Baselines
from captum_ext.metrics.faithfulness import Means, Trial


def average_drop(
    forward_func: Forward,
    inputs: Tensor | Tensors,
    attributions: Tensor | Tensors,
    target: TargetType = None,
    additional_forward_args: Any = None,
    *,
    baselines: Baselines = "zeros",
    score: Score = "softmax",
    generator: Generator | None = None,
    internal_batch_size: int | None = None,
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
        score: "softmax" (paper), "sigmoid", "logit" or a callable of the output.
        generator: of "noise".
        internal_batch_size: pictures in one pass of the model.

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
    trial = Trial(forward_func, inputs, target, additional_forward_args, score, internal_batch_size)
    whole, marked = trial.whole_and_marked(attributions, trial.infill(baselines, generator))
    if bool((whole < 0).any()):
        raise ValueError(
            f"`score` {score!r} is below 0 for an image, so that no share of it can be lost: "
            f"choose probabilities."
        )
    return (whole - marked).clamp(min=0) / torch.where(whole > 0, whole, 1)


def increase_in_confidence(
    forward_func: Forward,
    inputs: Tensor | Tensors,
    attributions: Tensor | Tensors,
    target: TargetType = None,
    additional_forward_args: Any = None,
    *,
    baselines: Baselines = "zeros",
    score: Score = "softmax",
    generator: Generator | None = None,
    internal_batch_size: int | None = None,
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
        score: "softmax", "sigmoid", "logit" or a callable of the output.
        generator: of "noise".
        internal_batch_size: pictures in one pass of the model.

    Reference:
        Chattopadhay et al., https://arxiv.org/abs/1710.11063

    Example:
        >>> image, weights = torch.ones(1, 1, 1, 2), torch.tensor([[4.0, -3.0]])
        >>> model = lambda x: (x * weights).sum((1, 2, 3))
        >>> increase_in_confidence(model, image, weights[None], score="logit")  # 1 to 4
        tensor([True])
    """
    trial = Trial(forward_func, inputs, target, additional_forward_args, score, internal_batch_size)
    whole, marked = trial.whole_and_marked(attributions, trial.infill(baselines, generator))
    return whole < marked


# --- torchmetrics --------------------------------------------------------------------------------


class AverageDrop(Means):
    """The mean of `average_drop`, a share of 1.

    Args:
        **kwargs: see `torchmetrics.Metric`.

    Raises:
        TypeError: from `update`, for anything but what the function returns.
        ValueError: from `update`, for values that are not finite.

    Example:
        >>> metric = AverageDrop()
        >>> metric.update(torch.tensor([0.0, 0.5]))
        >>> metric.compute()
        tensor(0.2500)
    """

    higher_is_better = False

    def _values(self, found: Any) -> Tensor:
        return _each(found, of_bools=False)


class IncreaseInConfidence(Means):
    """The share of images that have an `increase_in_confidence`.

    Args:
        **kwargs: see `torchmetrics.Metric`.

    Raises:
        TypeError: from `update`, for anything but what the function returns.

    Example:
        >>> metric = IncreaseInConfidence()
        >>> metric.update(torch.tensor([True, False, False, True]))
        >>> metric.compute()
        tensor(0.5000)
    """

    higher_is_better = True

    def _values(self, found: Any) -> Tensor:
        return _each(found, of_bools=True)


def _each(found: Any, of_bools: bool) -> Tensor:
    """A number for each image, (B, 1)."""
    if not isinstance(found, Tensor) or found.dim() != 1 or (found.dtype == torch.bool) != of_bools:
        shown = f"{found.dtype}, {tuple(found.shape)}" if isinstance(found, Tensor) else type(found)
        kind = "bool" if of_bools else "numbers"
        raise TypeError(f"`found` must be {kind}, (B,), got {shown}.")
    return found[:, None]
