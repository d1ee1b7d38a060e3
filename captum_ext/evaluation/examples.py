"""Labelled images of a data set with their ground truth, in batches."""

import re
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from captum_ext._data.files import is_resource_error
from captum_ext._data.pictures import (
    box_tensor,
    check_data,
    entry_field,
    evenly_spaced,
    scale_boxes,
)
from captum_ext._data.pixels import Normalize, resize_pixels, to_byte_tensor
from captum_ext._identity import digest
from captum_ext._repr import fields_repr
from captum_ext.imaging import resize
from captum_ext.metrics import boxes_to_masks

MAX_MESSAGE = 300  # characters of an error in a row
N_PROBES = 8  # examples in the fingerprint of a data set


@dataclass(frozen=True, eq=False, repr=False)
class PreparedExample:
    """An image with its label and its ground truth.

    Attributes:
        index: in the data set.
        name: the name of the file, or the index.
        image: (C, H, W), float32, as the model takes it.
        label: the index of the class.
        boxes: (n, 4), float64: (x1, y1, x2, y2) in pixels of `image`, half-open. None: unknown.
        mask: (H, W), bool. None: unknown.
        ignored: (H, W), bool: pixels that do not count. None: all pixels count.
    """

    index: int
    name: str
    image: Tensor
    label: int
    boxes: Tensor | None
    mask: Tensor | None
    ignored: Tensor | None

    @cached_property
    def region(self) -> Tensor | None:
        """(H, W), bool: the pixels inside any of the boxes, or the mask where there is no box."""
        if self.boxes is None:
            return self.mask
        height, width = self.image.shape[1:]
        return boxes_to_masks([self.boxes], (height, width))[0]

    def __repr__(self) -> str:
        return fields_repr(self)


@dataclass(frozen=True)
class FailedExample:
    """An image that could not be read, or whose ground truth is invalid, with the reason."""

    index: int
    name: str
    reason: str


class ExampleBatches(Dataset[list[PreparedExample | FailedExample]]):
    """The examples of a data set in batches of consecutive ones.

    Args:
        data: entries with attributes `image`, `target` and optionally `boxes` or `box`, `mask` or
            `part`, `ignored`, `name`; or tuples (picture, label) or (picture, label, boxes).
        batch_size: examples in a batch; the last one may have fewer.
        size: (H, W) to resize pictures to; None keeps their own size.
        normalize: (mean, std) of each channel; None takes tensors without change.
    """

    def __init__(
        self,
        data: Any,
        batch_size: int,
        size: tuple[int, int] | None,
        normalize: Any,
    ) -> None:
        check_data("data", data)
        self.data: Any = data
        self.batch_size, self.size = batch_size, size
        self.normalize = None if normalize is None else Normalize(normalize)

    def __len__(self) -> int:
        return -(-len(self.data) // self.batch_size)

    def __getitem__(self, batch: int) -> list[PreparedExample | FailedExample]:
        return [self.example(index) for index in self.indices(batch)]

    def indices(self, batch: int) -> range:
        """The indices of a batch's examples in the data set."""
        start = batch * self.batch_size
        return range(start, min(start + self.batch_size, len(self.data)))

    def example(self, index: int) -> PreparedExample | FailedExample:
        """The example at an index of the data set."""
        samples = getattr(self.data, "samples", None)
        name = _short_name(samples[index][0]) if samples else str(index)
        try:
            entry = self.data[index]
            name = str(entry_field(entry, "name") or name)
            return self._make_example(entry, index, name)
        except Exception as error:
            if is_resource_error(error):
                raise
            return FailedExample(index, name, failure_text(error))

    def _make_example(self, entry: Any, index: int, name: str) -> PreparedExample:
        picture, label = entry_field(entry, "image", index=0), entry_field(entry, "target", index=1)
        if picture is None or label is None:
            raise TypeError(
                f"examples must have `image` and `target`, or be (picture, label, ...), got "
                f"{type(entry).__name__}."
            )
        pixels = self._pixels(picture)
        old_size = (pixels.shape[1], pixels.shape[2])
        new_size = old_size if self.size is None else self.size
        pixels = resize_pixels(pixels, new_size)
        if self.normalize is not None:
            pixels = self.normalize(pixels)
        if not bool(torch.isfinite(pixels).all()):
            raise ValueError("the image has values that are not finite.")
        is_tuple = type(entry) in (tuple, list)
        boxes = entry_field(entry, "boxes", "box", index=2 if is_tuple else None)
        has_boxes = boxes is not None and len(boxes) > 0
        return PreparedExample(
            index,
            name,
            pixels,
            _class_index(label),
            _resize_boxes(boxes, old_size, new_size) if has_boxes else None,
            _resize_mask("mask", entry_field(entry, "mask", "part"), old_size, new_size),
            _resize_mask("ignored", entry_field(entry, "ignored"), old_size, new_size),
        )

    def _pixels(self, picture: Any) -> Tensor:
        """(C, H, W), float32, in [0, 1]. Without `normalize`, tensors of floats are not changed."""
        if not isinstance(picture, Tensor) or not picture.is_floating_point():
            pixels = to_byte_tensor(picture).float() / 255
        elif picture.dim() != 3 or 0 in picture.shape:
            raise ValueError(f"tensors must be (C, H, W), got {tuple(picture.shape)}.")
        else:
            pixels = picture.float()
        if self.normalize is None:
            return pixels
        if not bool(((pixels >= 0) & (pixels <= 1)).all()):
            raise ValueError(
                "floats must be in [0, 1]: pictures are normalised here, unless `normalize` is "
                "None."
            )
        return self.normalize.grey(pixels)

    def fingerprint(self) -> str:
        """The length, the file names and the contents of some examples, to recognise the data."""
        samples = getattr(self.data, "samples", None)
        parts: list[Any] = [(_short_name(name), int(label)) for name, label in samples or ()]
        for index in evenly_spaced(len(self.data), N_PROBES):
            example = self.example(index)
            if isinstance(example, FailedExample):
                parts.append((example.name, example.reason))
                continue
            tensors = (example.image, example.boxes, example.mask, example.ignored)
            parts.append((example.name, example.label))
            parts += [None if t is None else digest(t.numpy().tobytes()) for t in tensors]
        return f"{len(self.data)} examples, {digest(parts)}"


def failure_text(error: Exception) -> str:
    """An error as one line that is the same in each run."""
    text = re.sub(r" at 0x[0-9a-f]+", "", f"{type(error).__name__}: {error}")
    return " ".join(text.split())[:MAX_MESSAGE]


def _short_name(path: Any) -> str:
    """The last folder and the file name."""
    return "/".join(Path(path).parts[-2:])


def _class_index(label: Any) -> int:
    if isinstance(label, bool | str) or int(label) != label:
        raise ValueError(f"labels must be indices of classes, got {label!r}.")
    return int(label)


def _resize_boxes(boxes: Any, old_size: tuple[int, int], new_size: tuple[int, int]) -> Tensor:
    """Boxes (n, 4) of a picture, clipped to it, in pixels of the resized picture.

    Raises:
        ValueError: a box without pixels of the picture.
    """
    corners = box_tensor(boxes)
    height, width = old_size
    end = corners.new_tensor([width, height])
    is_inside = (corners[:, 2:].clamp(max=end) > 0).all(1) & (corners[:, :2] < end).all(1)
    is_ordered = (corners[:, :2] < corners[:, 2:]).all(1) & corners.isfinite().all(1)
    if not bool((is_inside & is_ordered).all()):
        raise ValueError(
            f"boxes must be (x1, y1, x2, y2) with x1 < x2 and y1 < y2, and not outside of an image "
            f"of {width} x {height}, got {corners.tolist()}."
        )
    return scale_boxes(corners.clamp(min=0).minimum(end.repeat(2)), old_size, new_size)


def _resize_mask(
    name: str, mask: Any, old_size: tuple[int, int], new_size: tuple[int, int]
) -> Tensor | None:
    """The mask (H, W), bool, of a resized picture."""
    if mask is None:
        return None
    values = torch.as_tensor(mask, device="cpu")
    if values.dtype != torch.bool or tuple(values.shape) != old_size:
        raise ValueError(
            f"`{name}` must be bool and of the picture's size, {old_size}, got {values.dtype}, "
            f"{tuple(values.shape)}."
        )
    return resize(values[None, None].float(), new_size, "nearest-exact")[0, 0] > 0
