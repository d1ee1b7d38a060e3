"""Base classes of metrics that are functions of sums over images."""

import warnings
from typing import Any, ClassVar

import torch
from torch import Tensor
from torchmetrics import Metric

from captum_ext._repr import options_repr
from captum_ext.metrics._definition import MetricDefinition


class SummedMetric(Metric):
    """A metric of sums over images, which add up over batches and processes.

    A subclass with a `definition` takes its `higher_is_better`.
    """

    is_differentiable = False
    full_state_update = False
    higher_is_better = True

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "definition" in vars(cls):
            cls.higher_is_better = vars(cls)["definition"].higher_is_better

    def __repr__(self) -> str:
        return options_repr(self)

    def _add_sums(self, options: Any = "", **zeros: Tensor) -> None:
        """Add states for the sums, and one more whose name tells their source.

        `MetricCollection` updates metrics as one if their states agree in name, shape and, after
        the first batch, value. The extra state is always 0. Its name keeps metrics apart whose sums
        agree by chance.
        """
        for name, zero in zeros.items():
            self.add_state(name, zero, dist_reduce_fx="sum")
        source = self._class_of_update()
        name = f"sums of {source.__module__}.{source.__qualname__} {options}"
        self.add_state(name, torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")

    @classmethod
    def _class_of_update(cls) -> type:
        """The class whose `update` fills the sums."""
        return cls


class MeanOverImages(SummedMetric):
    """The mean over images of the numbers that a function returns.

    `update` takes a result of the function. `compute` returns the mean, or a mean for each of
    `names`, in float32; NaN without an image.

    Args:
        **kwargs: see `torchmetrics.Metric`.

    Attributes:
        definition: the metric.
        names: the names of the means, if there are several.
    """

    definition: ClassVar[MetricDefinition]
    names: tuple[str, ...] = ()

    total: Tensor
    count: Tensor

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        # A float32 would lose single images in the sum of a million.
        total = torch.zeros(len(self.names) or 1, dtype=torch.float64)
        self._add_sums(total=total, count=torch.zeros((), dtype=torch.int64))

    def update(self, result: Any = None, *, found: Any = None) -> None:
        """Add a batch.

        Args:
            result: the result of the function for the batch.
            found: the former name of `result`, deprecated.

        Raises:
            TypeError: a result of another function.
            ValueError: values that are not finite.
        """
        if found is not None:
            warnings.warn(
                "`found` is now `result`; version 0.3 drops the old name.",
                DeprecationWarning,
                stacklevel=3,
            )
            result = found
        values = self.definition.values(result)
        if not bool(torch.isfinite(values).all()):
            raise ValueError("`result` has values that are not finite.")
        self.total = self.total + values.double().sum(0).to(self.total.device)
        self.count = self.count + len(values)

    def compute(self) -> Any:
        """The mean, or a dictionary of the means by name; NaN without an image."""
        means = (self.total / self.count).float()
        return dict(zip(self.names, means, strict=True)) if self.names else means[0]
