"""What is measured of each image and method, and how figures of a data set come of it.

A measure writes one cell for each image. Read again, a cell is a vector, and each figure of a data
set is a function of the vectors' sum and their number: so a resample of the images is a weighted
sum, for means as for MaxBoxAcc, whose threshold is chosen anew in each resample.
"""

import base64
import zlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch
from torch import Tensor

from captum_ext._checks import check_choice, check_range
from captum_ext._model import Forward
from captum_ext.evaluation.examples import Prepared
from captum_ext.imaging import min_max
from captum_ext.metrics import (
    PxAP,
    average_drop,
    box_ious,
    deletion,
    energy_pointing_game,
    increase_in_confidence,
    insertion,
    pointing_game,
    road,
)
from captum_ext.metrics.wsol import CONVENTIONS

Array = np.ndarray[Any, np.dtype[Any]]


class Explained(NamedTuple):
    """Images of one size and their maps.

    Attributes:
        forward_func: the model.
        images: (B, C, H, W).
        maps: (B, H, W), finite.
        target: (B,), int64, or None: what was explained.
        examples: as many.
        additional_forward_args: of the model.
    """

    forward_func: Forward
    images: Tensor
    maps: Tensor
    target: Tensor | None
    examples: Sequence[Prepared]
    additional_forward_args: Any = None

    def only(self, places: list[int]) -> "Explained":
        """Some of them."""
        if len(places) == len(self.examples):
            return self
        return self._replace(
            images=self.images[places],
            maps=self.maps[places],
            target=None if self.target is None else self.target[places],
            examples=[self.examples[place] for place in places],
        )


class Measure(ABC):
    """One column of the rows, and one figure of the data set: the mean of its numbers."""

    name: ClassVar[str]
    higher_is_better: ClassVar[bool] = True
    options: Mapping[str, Any]

    def __init__(self) -> None:
        self.options = {}

    def serves(self, example: Prepared) -> bool:
        """Whether the example has the ground truth that is needed."""
        return True

    @abstractmethod
    def cells(self, found: Explained) -> list[str]:
        """One for each image."""

    def vector(self, cell: str) -> Array:
        """What is summed over images."""
        return np.array([float(cell)])

    def figure(self, sums: Array, counts: Array) -> Array:
        """Of sums (R, d) of the vectors of so many images, (R,): the figure, (R,)."""
        figures: Array = sums[:, 0] / counts
        return figures


def numbers(values: Tensor) -> list[str]:
    """Short and exact: a float32 read again is the same."""
    return [f"{value:.9g}" for value in values.double().tolist()]


def packed(values: Array) -> str:
    """Many numbers as text, exactly."""
    return base64.b64encode(zlib.compress(values.tobytes(), 9)).decode()


def unpacked(text: str, kind: str) -> Array:
    """What `packed` was given, of the kind that NumPy calls so."""
    return np.frombuffer(zlib.decompress(base64.b64decode(text)), kind)


# --- localisation --------------------------------------------------------------------------------


class _InRegion(Measure):
    def serves(self, example: Prepared) -> bool:
        return example.boxes is not None or example.mask is not None

    def cells(self, found: Explained) -> list[str]:
        regions = [e.region for e in found.examples]
        masks = torch.stack([r for r in regions if r is not None]).to(found.maps.device)
        return numbers(self._scores(found.maps, masks))

    @abstractmethod
    def _scores(self, maps: Tensor, masks: Tensor) -> Tensor: ...


class _Pointing(_InRegion):
    name = "pointing_game"

    def __init__(self, tolerance: float = 15) -> None:
        check_range("tolerance", tolerance, 0, 1e9)
        self.options = {"tolerance": tolerance}

    def _scores(self, maps: Tensor, masks: Tensor) -> Tensor:
        return pointing_game(maps, masks, **self.options)


class _Energy(_InRegion):
    name = "energy"

    def _scores(self, maps: Tensor, masks: Tensor) -> Tensor:
        return energy_pointing_game(maps, masks)


class _MaxBoxAcc(Measure):
    """Cells have the IoU at each threshold."""

    name = "max_box_acc"
    contours: ClassVar[str] = "largest"
    default: ClassVar[tuple[float, ...]] = (0.5,)

    def __init__(
        self, iou_thresholds: Sequence[float] | None = None, convention: str = "components"
    ) -> None:
        check_choice("convention", convention, CONVENTIONS)
        self.convention = convention
        self.deltas = self.default if iou_thresholds is None else tuple(iou_thresholds)
        for delta in self.deltas:
            check_range("iou_thresholds", delta, 0, 1)
        if not self.deltas:
            raise ValueError("`iou_thresholds` must be at least one number.")
        self.options = {"iou_thresholds": list(self.deltas), "convention": convention}

    def serves(self, example: Prepared) -> bool:
        return example.boxes is not None

    def cells(self, found: Explained) -> list[str]:
        boxes = [e.boxes.floor() for e in found.examples if e.boxes is not None]
        maps = min_max(found.maps[:, None])[:, 0]
        ious = box_ious(maps, boxes, self.contours, self.convention)
        return [packed(each) for each in ious.cpu().numpy().astype("<f4")]

    def vector(self, cell: str) -> Array:
        ious = unpacked(cell, "<f4")
        return np.concatenate([ious >= np.float32(delta) for delta in self.deltas])

    def figure(self, sums: Array, counts: Array) -> Array:
        best = sums.reshape(len(sums), len(self.deltas), -1).max(2).mean(1)
        figures: Array = best / counts
        return figures


class _MaxBoxAccV2(_MaxBoxAcc):
    name, contours, default = "max_box_acc_v2", "all", (0.3, 0.5, 0.7)


class _PxAP(Measure):
    """Cells have the numbers of pixels at each threshold, in the mask and outside of it."""

    name = "pxap"

    def serves(self, example: Prepared) -> bool:
        return example.mask is not None

    def cells(self, found: Explained) -> list[str]:
        maps, device = min_max(found.maps[:, None])[:, 0], found.maps.device
        metric = PxAP().to(device)
        totals = [torch.stack((metric.inside, metric.outside))]
        for values, example in zip(maps, found.examples, strict=True):
            assert example.mask is not None
            ignored = None if example.ignored is None else example.ignored[None].to(device)
            metric.update(values[None], example.mask[None].to(device), ignored)
            totals.append(torch.stack((metric.inside, metric.outside)))
        return [packed(c) for c in torch.stack(totals).diff(dim=0).cpu().numpy().astype("<i4")]

    def vector(self, cell: str) -> Array:
        return unpacked(cell, "<i4")

    def figure(self, sums: Array, counts: Array) -> Array:
        levels = sums.reshape(len(sums), 2, -1)[:, :, ::-1].cumsum(2)
        precision = levels[:, 0] / np.maximum(levels.sum(1), 1)
        recall = levels[:, 0] / levels[:, 0, -1:]
        figures: Array = (precision * np.diff(recall, axis=1, prepend=0)).sum(1)
        return figures


# --- faithfulness --------------------------------------------------------------------------------


class _Faithful(Measure):
    function: ClassVar[Callable[..., Any]]

    def __init__(self, **options: Any) -> None:
        self.options = options

    def cells(self, found: Explained) -> list[str]:
        scores = type(self).function(
            found.forward_func,
            found.images,
            found.maps,
            found.target,
            found.additional_forward_args,
            **self.options,
        )
        values = scores if isinstance(scores, Tensor) else scores[0]  # the AUC, the score
        return numbers(values)


class _Insertion(_Faithful):
    name, function = "insertion", insertion


class _Deletion(_Faithful):
    name, function, higher_is_better = "deletion", deletion, False


class _AverageDrop(_Faithful):
    name, function, higher_is_better = "average_drop", average_drop, False


class _Increase(_Faithful):
    name, function = "increase_in_confidence", increase_in_confidence


class _Road(_Faithful):
    name, function = "road", road


# --- by name -------------------------------------------------------------------------------------


class Custom(Measure):
    """A function of the caller's: of `Explained` it gives a number for each image, (B,)."""

    def __init__(self, name: str, function: Callable[[Explained], Any] | None) -> None:
        super().__init__()
        self.name, self.function = name, function  # type: ignore[misc]

    def cells(self, found: Explained) -> list[str]:
        assert self.function is not None
        values = torch.as_tensor(self.function(found))
        if values.shape != (len(found.examples),) or not bool(torch.isfinite(values).all()):
            raise ValueError(
                f"`metrics`: {self.name} must give a finite number for each of "
                f"{len(found.examples)} images, got {values}."
            )
        return numbers(values)


LOCALIZATION = (_Pointing, _Energy, _MaxBoxAcc, _MaxBoxAccV2, _PxAP)
_FAITHFULNESS = (_Insertion, _Deletion, _AverageDrop, _Increase, _Road)
MEASURES: Mapping[str, type[Any]] = {m.name: m for m in LOCALIZATION + _FAITHFULNESS}


def make_measures(metrics: Any, known: Sequence[Prepared]) -> list[Measure]:
    """The measures of `evaluate`'s argument.

    Args:
        metrics: names, or a mapping from names to options or functions; None is "localization".
        known: some examples, whose ground truth says what "localization" is.
    """
    if metrics is None:
        metrics = ["localization"]
    if isinstance(metrics, str):
        metrics = [metrics]
    items = metrics.items() if isinstance(metrics, Mapping) else ((name, {}) for name in metrics)
    made: dict[str, Measure] = {}
    for name, value in items:
        if name == "localization":
            every = [kind() for kind in LOCALIZATION]
            made |= {m.name: m for m in every if any(m.serves(e) for e in known)}
        elif callable(value) and name not in MEASURES:
            made[name] = Custom(name, value)
        elif name in MEASURES and isinstance(value, Mapping):
            made[name] = MEASURES[name](**value)
        else:
            raise ValueError(
                f"`metrics` must be names of {['localization', *MEASURES]}, with options where "
                f"they are a mapping, or other names with functions, got {name!r}: {value!r}."
            )
    if not made:
        raise ValueError(
            "`metrics`: the first examples of `data` have neither boxes nor masks, so that no "
            f"localisation can be measured: name others, of {list(MEASURES)}."
        )
    return list(made.values())


def measure_of(name: str, options: Mapping[str, Any]) -> Measure:
    """The measure that wrote a column, to read it: of the options only IoUs matter for that."""
    if name not in MEASURES:
        return Custom(name, None)
    kind = MEASURES[name]
    measure: Measure = kind(**options) if issubclass(kind, _MaxBoxAcc) else kind()
    return measure
