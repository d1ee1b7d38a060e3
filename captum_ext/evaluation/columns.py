"""The columns of `rows.csv`: one or more cells for each image, computed from its map."""

import base64
import zlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from captum.attr import Attribution
from captum.metrics import infidelity, sensitivity_max
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from captum_ext._compat import _run_forward
from captum_ext._engine.modules import Forward
from captum_ext._engine.precision import divide_by_power, full_precision
from captum_ext._repr import fields_repr
from captum_ext.attr._chain import call_attribute
from captum_ext.evaluation.examples import PreparedExample
from captum_ext.imaging import min_max
from captum_ext.metrics import Curve, box_ious, in_top_k, pixel_counts
from captum_ext.metrics._definition import MetricDefinition

Array = np.ndarray[Any, np.dtype[Any]]
Options = Mapping[str, Any]
# Bounds of the bytes in a packed curve. Real ones have at most four times those of their text.
_SMALLEST_LIMIT, _LARGEST_RATIO = 2**20, 16


class ExplainedBatch(NamedTuple):
    """Images of one size with their maps by one method.

    Attributes:
        forward_func: the model.
        images: (B, C, H, W).
        maps: (B, H, W), finite: `attributions`, reduced to one channel.
        target: (B,), int64: the explained classes; None for models with one output.
        examples: B examples.
        additional_forward_args: of the model.
        attributions: (B, C', H, W), as the method returned them.
        attribution: the method.
        kwargs: arguments of its `attribute`, without `inputs` and `target`.
    """

    forward_func: Forward
    images: Tensor
    maps: Tensor
    target: Tensor | None
    examples: Sequence[PreparedExample]
    additional_forward_args: Any
    attributions: Tensor
    attribution: Attribution
    kwargs: Mapping[str, Any]

    def only(self, indices: list[int]) -> "ExplainedBatch":
        """The images at these indices of the batch."""
        if len(indices) == len(self.examples):
            return self
        return self._replace(
            images=self.images[indices],
            maps=self.maps[indices],
            target=None if self.target is None else self.target[indices],
            examples=[self.examples[i] for i in indices],
            attributions=self.attributions[indices],
        )

    def __repr__(self) -> str:
        return fields_repr(self)


class Columns(ABC):
    """One or more columns that are computed together.

    Attributes:
        names: of the columns.
    """

    names: tuple[str, ...]

    def is_defined_for(self, example: PreparedExample) -> bool:
        """True if the example has the ground truth that the columns need."""
        return True

    @abstractmethod
    def cells(self, batch: ExplainedBatch) -> Sequence[tuple[str, ...]]:
        """A tuple with one cell of each column, for each image."""


class NumberColumn(Columns):
    """A finite number for each image.

    Args:
        name: of the column.
        function: returns the numbers (B,) of an `ExplainedBatch`.
        ground_truth: returns the ground truth of an example that the number needs, or None if it
            is missing.
    """

    def __init__(
        self,
        name: str,
        function: Callable[[ExplainedBatch], Any],
        ground_truth: Callable[[PreparedExample], Any] | None = None,
    ) -> None:
        self.names = (name,)
        self.function, self.ground_truth = function, ground_truth

    def is_defined_for(self, example: PreparedExample) -> bool:
        return self.ground_truth is None or self.ground_truth(example) is not None

    def cells(self, batch: ExplainedBatch) -> Sequence[tuple[str, ...]]:
        values = torch.as_tensor(self.function(batch), device="cpu")
        if values.shape != (len(batch.examples),) or not bool(torch.isfinite(values).all()):
            raise ValueError(
                f"`metrics`: {self.names[0]} must give a finite number for each of "
                f"{len(batch.examples)} images, got {values}."
            )
        return [(text,) for text in _exact_texts(values)]


class CurveColumns(Columns):
    """The area under a curve, and the curve: shares of the pixels and scores.

    Args:
        name: of the column of areas; the other is called `name`_curve.
        function: returns the `Curve` of an `ExplainedBatch`.
    """

    def __init__(self, name: str, function: Callable[[ExplainedBatch], Curve]) -> None:
        self.names = (name, f"{name}_curve")
        self.function = function

    def cells(self, batch: ExplainedBatch) -> Sequence[tuple[str, ...]]:
        auc, scores, shares = self.function(batch)
        both = torch.stack((shares.to(scores).expand_as(scores), scores), 1)
        curves = both.float().cpu().numpy().astype("<f4")
        return list(zip(_exact_texts(auc), map(pack, curves), strict=True))


class BoxIouColumn(Columns):
    """The IoU of boxes at each threshold, for `MaxBoxAcc`."""

    def __init__(self, contours: str, convention: str) -> None:
        self.names = (f"ious_{contours}_{convention}",)
        self.contours, self.convention = contours, convention

    def is_defined_for(self, example: PreparedExample) -> bool:
        return example.boxes is not None

    def cells(self, batch: ExplainedBatch) -> Sequence[tuple[str, ...]]:
        boxes = [e.boxes.floor() for e in batch.examples if e.boxes is not None]
        ious = box_ious(_min_max_maps(batch), boxes, self.contours, self.convention)
        return [(pack(values),) for values in ious.cpu().numpy().astype("<f4")]


class PixelCountColumn(Columns):
    """The numbers of pixels at each threshold, inside and outside of the mask."""

    names = ("pixel_counts",)

    def is_defined_for(self, example: PreparedExample) -> bool:
        return example.mask is not None

    def cells(self, batch: ExplainedBatch) -> Sequence[tuple[str, ...]]:
        device = batch.maps.device
        masks = torch.stack([e.mask for e in batch.examples if e.mask is not None])
        nothing = torch.zeros_like(masks[0])
        ignored = [nothing if e.ignored is None else e.ignored for e in batch.examples]
        counts = pixel_counts(
            _min_max_maps(batch), masks.to(device), torch.stack(ignored).to(device)
        )
        both = torch.stack(counts, 1).cpu().numpy().astype("<i4")
        return [(pack(values),) for values in both]


# --- functions of an ExplainedBatch, which pickle ------------------------------------------------


def metric_values(definition: MetricDefinition, options: Options, batch: ExplainedBatch) -> Tensor:
    """The values (B,) of a metric."""
    if definition.takes == "model":
        values = call_with_model(definition.function, options, batch)
    elif definition.takes == "region":
        regions = [example.region for example in batch.examples]
        masks = torch.stack([region for region in regions if region is not None])
        values = definition.function(batch.maps, masks.to(batch.maps.device), **options)
    else:
        values = definition.function(_min_max_maps(batch), **options)
    return definition.values(values)[:, 0]


def call_with_model(function: Callable[..., Any], options: Options, batch: ExplainedBatch) -> Any:
    """The result of a metric that takes the model, images, maps and targets, as Captum's do."""
    return function(
        batch.forward_func,
        batch.images,
        batch.maps,
        batch.target,
        batch.additional_forward_args,
        **options,
    )


def model_scores(forward_func: Forward, images: Tensor, additional_forward_args: Any) -> Tensor:
    """The model's output, without a graph."""
    with torch.no_grad():
        scores: Tensor = _run_forward(forward_func, images, None, additional_forward_args)
    return scores


def label_in_top(k: int, batch: ExplainedBatch) -> Tensor:
    """1 where the label is among the k classes with the highest scores, 0 elsewhere."""
    logits = model_scores(batch.forward_func, batch.images, batch.additional_forward_args)
    labels = torch.tensor([example.label for example in batch.examples], device=logits.device)
    return in_top_k(logits, labels, k).float()


def infidelity_to_noise(
    batch: ExplainedBatch,
    *,
    noise: float = 0.1,
    perturb_func: Callable[[Tensor], tuple[Tensor, Tensor]] | None = None,
    n_perturb_samples: int = 10,
    normalize: bool = True,
) -> Tensor:
    """`captum.metrics.infidelity`, with Gaussian noise unless there is a `perturb_func`.

    If it is normalised, a factor of the attributions cancels, and a power of two is taken out:
    Captum squares them.
    """

    def add_noise(images: Tensor) -> tuple[Tensor, Tensor]:
        change = noise * torch.randn_like(images)
        return change, images - change

    attributions = batch.attributions
    if normalize and full_precision(attributions) is attributions:
        attributions = divide_by_power(attributions)[0]
    values: Tensor = infidelity(
        batch.forward_func,
        add_noise if perturb_func is None else perturb_func,
        batch.images,
        attributions.expand_as(batch.images),
        additional_forward_args=batch.additional_forward_args,
        target=batch.target,
        n_perturb_samples=n_perturb_samples,
        max_examples_per_batch=len(batch.images),
        normalize=normalize,
    )
    return values


def sensitivity_to_noise(
    batch: ExplainedBatch, *, perturb_radius: float = 0.02, n_perturb_samples: int = 10
) -> Tensor:
    """`captum.metrics.sensitivity_max`: the change of the map when the image has some noise.

    It is a ratio of lengths. Maps are divided by powers of two of the first ones, those of the
    images without noise, because Captum squares them.
    """
    powers: list[Tensor] = []

    def explain(images: Any, **kwargs: Any) -> Any:
        # Captum takes views of them, which channels last and expanded maps do not have.
        maps = tree_map(Tensor.contiguous, call_attribute(batch.attribution, images, **kwargs))
        leaves = tree_leaves(maps)
        if len(leaves) > 1 or full_precision(leaves[0]) is not leaves[0]:
            return maps
        if not powers:
            powers.append(divide_by_power(leaves[0])[1])
        repeats = len(leaves[0]) // len(powers[0])
        return tree_map(lambda m: m / powers[0].repeat_interleave(repeats, 0), maps)

    def add_noise(images: Tensor) -> Tensor:  # Captum's own is float32
        return images + torch.empty_like(images).uniform_(-perturb_radius, perturb_radius)

    values: Tensor = sensitivity_max(
        explain,
        batch.images,
        add_noise,
        n_perturb_samples=n_perturb_samples,
        max_examples_per_batch=len(batch.images),
        target=batch.target,
        **batch.kwargs,
    )
    return values


# --- cells ---------------------------------------------------------------------------------------


def pack(values: Array) -> str:
    """Many numbers as text, without loss."""
    return base64.b64encode(zlib.compress(values.tobytes(), 9)).decode()


def unpack(text: str, dtype: str, count: int | None = None) -> Array:
    """The numbers of a packed cell.

    Args:
        text: the cell.
        dtype: of NumPy, such as "<f4".
        count: how many numbers there must be. None allows any number that is usual for a text of
            this length: a small text of a stranger may unpack to a gigabyte.

    Raises:
        ValueError: the text is no packed cell, or has another number of values.
    """
    size = np.dtype(dtype).itemsize
    largest = max(_SMALLEST_LIMIT, _LARGEST_RATIO * len(text)) if count is None else count * size
    stream = zlib.decompressobj()
    try:
        content = stream.decompress(base64.b64decode(text, validate=True), largest + 1)
    except zlib.error as error:
        raise ValueError(f"a packed cell is damaged ({error})") from error
    if len(content) > largest or not stream.eof:
        raise ValueError(f"a packed cell has more than {largest} bytes, or is cut off")
    if count is not None and len(content) != largest:
        raise ValueError(f"a packed cell has {len(content)} bytes, and not {largest}")
    return np.frombuffer(content, dtype)


def _exact_texts(values: Tensor) -> list[str]:
    """Short texts that give the same float32 when they are read."""
    return [f"{value:.9g}" for value in values.double().tolist()]


def _min_max_maps(batch: ExplainedBatch) -> Tensor:
    """The maps (B, H, W), each scaled to [0, 1]."""
    return min_max(batch.maps[:, None])[:, 0]
