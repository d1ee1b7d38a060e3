"""The torchmetrics classes over `insertion`, `deletion` and `overall_score`."""

from captum_ext.metrics import curves
from captum_ext.metrics.classes._sums import MeanOverImages

__all__ = ["Deletion", "Insertion", "Overall"]


class Insertion(MeanOverImages):
    """The mean AUC of `insertion` over images.

    `update` takes the `Curve` that `insertion` returns for a batch.

    Args:
        **kwargs: see `torchmetrics.Metric`.

    Raises:
        TypeError: a result of another function, in `update`.
        ValueError: values that are not finite, in `update`.

    Example:
        >>> import torch
        >>> from captum_ext.metrics import Curve
        >>> metric = Insertion()
        >>> shares = torch.tensor([0.0, 1.0])
        >>> metric.update(Curve(torch.tensor([0.5, 0.75]), torch.zeros(2, 2), shares))
        >>> metric.compute()
        tensor(0.6250)
    """

    definition = curves.INSERTION


class Deletion(MeanOverImages):
    """The mean AUC of `deletion` over images.

    `update` takes the `Curve` that `deletion` returns for a batch.

    Args:
        **kwargs: see `torchmetrics.Metric`.

    Raises:
        TypeError: a result of another function, in `update`.
        ValueError: values that are not finite, in `update`.

    Example:
        >>> import torch
        >>> from captum_ext.metrics import Curve
        >>> metric = Deletion()
        >>> shares = torch.tensor([0.0, 1.0])
        >>> metric.update(Curve(torch.tensor([0.25, 0.5]), torch.zeros(2, 2), shares))
        >>> metric.compute()
        tensor(0.3750)
    """

    definition = curves.DELETION


class Overall(MeanOverImages):
    """The means of `overall_score` and of its two AUCs over images.

    `update` takes the `OverallScore` that `overall_score` returns for a batch. `compute` returns
    the means by their names, "score", "insertion" and "deletion".

    Args:
        **kwargs: see `torchmetrics.Metric`.

    Raises:
        TypeError: a result of another function, in `update`.
        ValueError: values that are not finite, in `update`.

    Example:
        >>> import torch
        >>> from captum_ext.metrics import Curve, OverallScore
        >>> shares = torch.tensor([0.0, 1.0])
        >>> up, down = (Curve(torch.tensor([a]), torch.zeros(1, 2), shares) for a in (0.75, 0.25))
        >>> metric = Overall()
        >>> metric.update(OverallScore(up.auc - down.auc, up, down))
        >>> metric.compute()
        {'score': tensor(0.5000), 'insertion': tensor(0.7500), 'deletion': tensor(0.2500)}
    """

    definition = curves.OVERALL
    names = ("score", "insertion", "deletion")
