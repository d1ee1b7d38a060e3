"""What is written of each image and method: the cells of a row."""

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
from torch.utils._pytree import tree_map

from captum_ext._compat import _run_forward
from captum_ext._engine.modules import Forward
from captum_ext.evaluation.examples import Prepared
from captum_ext.imaging import min_max
from captum_ext.metrics import Curve, box_ious, in_top_k, pixel_counts
from captum_ext.metrics._definition import Definition

Array = np.ndarray[Any, np.dtype[Any]]
Options = Mapping[str, Any]


class Explained(NamedTuple):
    """Images of one size and their maps.

    Attributes:
        forward_func: the model.
        images: (B, C, H, W).
        maps: (B, H, W), finite: `attributions`, with one channel.
        target: (B,), int64, or None: what was explained.
        examples: as many.
        additional_forward_args: of the model.
        attributions: (B, C', H, W), as the method gave them.
        attribution: the method.
        kwargs: what its `attribute` was called with, but for `inputs` and `target`.
    """

    forward_func: Forward
    images: Tensor
    maps: Tensor
    target: Tensor | None
    examples: Sequence[Prepared]
    additional_forward_args: Any
    attributions: Tensor
    attribution: Attribution
    kwargs: Mapping[str, Any]

    def only(self, places: list[int]) -> "Explained":
        """Some of them."""
        if len(places) == len(self.examples):
            return self
        return self._replace(
            images=self.images[places],
            maps=self.maps[places],
            target=None if self.target is None else self.target[places],
            examples=[self.examples[place] for place in places],
            attributions=self.attributions[places],
        )


class Record(ABC):
    """What one computation writes."""

    columns: tuple[str, ...]

    def serves(self, example: Prepared) -> bool:
        """Whether the example has the ground truth that is needed."""
        return True

    @abstractmethod
    def cells(self, found: Explained) -> Sequence[tuple[str, ...]]:
        """One for each column, of each image."""


class Numbers(Record):
    """A finite number for each image.

    Args:
        name: of the column.
        function: of `Explained` gives them, (B,).
        needs: what an example must have.
    """

    def __init__(
        self,
        name: str,
        function: Callable[[Explained], Any],
        needs: Callable[[Prepared], Any] | None = None,
    ) -> None:
        self.columns = (name,)
        self.function, self.needs = function, needs

    def serves(self, example: Prepared) -> bool:
        return self.needs is None or self.needs(example) is not None

    def cells(self, found: Explained) -> Sequence[tuple[str, ...]]:
        values = torch.as_tensor(self.function(found))
        if values.shape != (len(found.examples),) or not bool(torch.isfinite(values).all()):
            raise ValueError(
                f"`metrics`: {self.columns[0]} must give a finite number for each of "
                f"{len(found.examples)} images, got {values}."
            )
        return [(text,) for text in _texts(values)]


class Curves(Record):
    """The area under a curve, and the curve: shares and scores.

    Args:
        name: of the column of areas; the other is called `name`_curve.
        function: of `Explained` gives a `Curve`.
    """

    def __init__(self, name: str, function: Callable[[Explained], Curve]) -> None:
        self.columns = (name, f"{name}_curve")
        self.function = function

    def cells(self, found: Explained) -> Sequence[tuple[str, ...]]:
        auc, scores, shares = self.function(found)
        both = torch.stack((shares.to(scores).expand_as(scores), scores), 1)
        curves = both.float().cpu().numpy().astype("<f4")
        return list(zip(_texts(auc), map(packed, curves), strict=True))


class Ious(Record):
    """The IoU of boxes at each threshold, of `MaxBoxAcc`."""

    def __init__(self, contours: str, convention: str) -> None:
        self.columns = (f"ious_{contours}_{convention}",)
        self.contours, self.convention = contours, convention

    def serves(self, example: Prepared) -> bool:
        return example.boxes is not None

    def cells(self, found: Explained) -> Sequence[tuple[str, ...]]:
        boxes = [e.boxes.floor() for e in found.examples if e.boxes is not None]
        ious = box_ious(_scaled(found.maps), boxes, self.contours, self.convention)
        return [(packed(each),) for each in ious.cpu().numpy().astype("<f4")]


class PixelCounts(Record):
    """The numbers of pixels at each threshold, in the mask and outside of it."""

    columns = ("pixel_counts",)

    def serves(self, example: Prepared) -> bool:
        return example.mask is not None

    def cells(self, found: Explained) -> Sequence[tuple[str, ...]]:
        device = found.maps.device
        masks = torch.stack([e.mask for e in found.examples if e.mask is not None])
        nothing = torch.zeros_like(masks[0])
        ignored = [nothing if e.ignored is None else e.ignored for e in found.examples]
        counts = pixel_counts(
            _scaled(found.maps), masks.to(device), torch.stack(ignored).to(device)
        )
        both = torch.stack(counts, 1).cpu().numpy().astype("<i4")
        return [(packed(each),) for each in both]


# --- functions of Explained, which pickle --------------------------------------------------------


def numbers_of(definition: Definition, options: Options, found: Explained) -> Tensor:
    """The numbers of a metric, (B,)."""
    if definition.takes == "model":
        figures = of_model(definition.function, options, found)
    elif definition.takes == "region":
        regions = [example.region for example in found.examples]
        masks = torch.stack([region for region in regions if region is not None])
        figures = definition.function(found.maps, masks.to(found.maps.device), **options)
    else:
        figures = definition.function(_scaled(found.maps), **options)
    return definition.values(figures)[:, 0]


def of_model(function: Callable[..., Any], options: Options, found: Explained) -> Any:
    """What a function in Captum's manner returns."""
    return function(
        found.forward_func,
        found.images,
        found.maps,
        found.target,
        found.additional_forward_args,
        **options,
    )


def label_in_top(k: int, found: Explained) -> Tensor:
    """Whether the label is among the model's first k answers, as 0 or 1."""
    with torch.no_grad():
        logits = _run_forward(found.forward_func, found.images, None, found.additional_forward_args)
    labels = torch.tensor([example.label for example in found.examples], device=logits.device)
    return in_top_k(logits, labels, k).float()


def infidelity_to_noise(
    found: Explained,
    *,
    noise: float = 0.1,
    perturb_func: Callable[[Tensor], tuple[Tensor, Tensor]] | None = None,
    n_perturb_samples: int = 10,
    normalize: bool = True,
) -> Tensor:
    """`captum.metrics.infidelity`, of Gaussian noise if there is no other `perturb_func`."""

    def perturbed(images: Tensor) -> tuple[Tensor, Tensor]:
        change = noise * torch.randn_like(images)
        return change, images - change

    values: Tensor = infidelity(
        found.forward_func,
        perturbed if perturb_func is None else perturb_func,
        found.images,
        found.attributions.expand_as(found.images),
        additional_forward_args=found.additional_forward_args,
        target=found.target,
        n_perturb_samples=n_perturb_samples,
        max_examples_per_batch=len(found.images),
        normalize=normalize,
    )
    return values


def sensitivity_to_noise(
    found: Explained, *, perturb_radius: float = 0.02, n_perturb_samples: int = 10
) -> Tensor:
    """`captum.metrics.sensitivity_max`: the method explains images with a little noise, too."""

    def explained(images: Any, **kwargs: Any) -> Any:
        # Captum takes views of them, which channels last and expanded maps do not have.
        return tree_map(Tensor.contiguous, found.attribution.attribute(images, **kwargs))

    def perturbed(images: Tensor) -> Tensor:  # Captum's own is float32
        return images + torch.empty_like(images).uniform_(-perturb_radius, perturb_radius)

    values: Tensor = sensitivity_max(
        explained,
        found.images,
        perturbed,
        n_perturb_samples=n_perturb_samples,
        max_examples_per_batch=len(found.images),
        target=found.target,
        **found.kwargs,
    )
    return values


# --- cells ---------------------------------------------------------------------------------------


def packed(values: Array) -> str:
    """Many numbers as text, exactly."""
    return base64.b64encode(zlib.compress(values.tobytes(), 9)).decode()


def unpacked(text: str, kind: str) -> Array:
    """What `packed` was given, of the kind that NumPy calls so."""
    return np.frombuffer(zlib.decompress(base64.b64decode(text)), kind)


def _texts(values: Tensor) -> list[str]:
    """Short and exact: a float32 read again is the same."""
    return [f"{value:.9g}" for value in values.double().tolist()]


def _scaled(maps: Tensor) -> Tensor:
    return min_max(maps[:, None])[:, 0]
