"""The torchmetrics classes over `average_drop` and `increase_in_confidence`."""

from captum_ext.metrics import confidence
from captum_ext.metrics.classes._sums import MeanOverImages

__all__ = ["AverageDrop", "IncreaseInConfidence"]


class AverageDrop(MeanOverImages):
    """The mean of `average_drop` over images, a share of 1.

    `update` takes the tensor that `average_drop` returns for a batch.

    Args:
        **kwargs: see `torchmetrics.Metric`.

    Raises:
        TypeError: a result of another function, in `update`.
        ValueError: values that are not finite, in `update`.

    Example:
        >>> import torch
        >>> metric = AverageDrop()
        >>> metric.update(torch.tensor([0.0, 0.5]))
        >>> metric.compute()
        tensor(0.2500)
    """

    definition = confidence.AVERAGE_DROP


class IncreaseInConfidence(MeanOverImages):
    """The share of images with an `increase_in_confidence`.

    `update` takes the tensor that `increase_in_confidence` returns for a batch.

    Args:
        **kwargs: see `torchmetrics.Metric`.

    Raises:
        TypeError: a result of another function, in `update`.

    Example:
        >>> import torch
        >>> metric = IncreaseInConfidence()
        >>> metric.update(torch.tensor([True, False, False, True]))
        >>> metric.compute()
        tensor(0.5000)
    """

    definition = confidence.INCREASE
