"""The torchmetrics class over `road`."""

from captum_ext.metrics.classes._sums import MeanOverImages
from captum_ext.metrics.road import ROAD

__all__ = ["Road"]


class Road(MeanOverImages):
    """The mean scores of `road` over images and percentiles.

    `update` takes the `RoadScores` that `road` returns for a batch. `compute` returns the means by
    their names, "combined", "morf" and "lerf".

    Args:
        **kwargs: see `torchmetrics.Metric`.

    Raises:
        TypeError: a result of another function, in `update`.
        ValueError: values that are not finite, in `update`.

    Example:
        >>> import torch
        >>> from captum_ext.metrics import RoadScores
        >>> metric = Road()
        >>> morf, lerf = torch.tensor([[0.25, 0.5]]), torch.tensor([[0.75, 0.5]])
        >>> score = (lerf - morf).mean(1) / 2
        >>> metric.update(RoadScores(score, morf, lerf, torch.tensor([10.0, 90.0])))
        >>> metric.compute()
        {'combined': tensor(0.1250), 'morf': tensor(0.3750), 'lerf': tensor(0.6250)}
    """

    definition = ROAD
    names = ("combined", "morf", "lerf")
