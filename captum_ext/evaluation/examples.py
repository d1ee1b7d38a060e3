"""Labelled examples of a data set, as a model takes them, with their ground truth."""

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
from captum_ext.imaging import resize
from captum_ext.metrics import boxes_to_masks

LONGEST_REASON = 300
N_PROBES = 8  # entries by which a data set is known again


@dataclass(frozen=True, eq=False)
class Prepared:
    """An image and what is known of it.

    Attributes:
        index: its place in the data set.
        name: of its file, or its index.
        image: (C, H, W), float32, as the model takes it.
        label: the class.
        boxes: (n, 4), float64: (x1, y1, x2, y2) in pixels of `image`, half-open. None: not known.
        mask: (H, W), bool. None: not known.
        ignored: (H, W), bool: pixels that do not count. None: all count.
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
        """(H, W), bool: the pixels in any of the boxes; without boxes, those of the mask."""
        if self.boxes is None:
            return self.mask
        height, width = self.image.shape[1:]
        return boxes_to_masks([self.boxes], (height, width))[0]


@dataclass(frozen=True)
class Failure:
    """An image that came to nothing, and why."""

    index: int
    name: str
    reason: str


class Blocks(Dataset[list[Prepared | Failure]]):
    """The examples of a data set, so many consecutive ones at a time.

    A picture that cannot be read, and ground truth that cannot be right, are failures.

    Args:
        data: what it has at i has attributes `image`, `target` and, as far as known, `boxes` or
            `box`, `mask` or `part`, `ignored`, `name`; or is (picture, label) or
            (picture, label, boxes).
        batch_size: examples in a block.
        size: (H, W) that pictures are brought to; None leaves them as they are.
        normalize: (mean, std) of each channel; None takes tensors as they are.
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

    def __getitem__(self, block: int) -> list[Prepared | Failure]:
        return [self.example(index) for index in self.indices(block)]

    def indices(self, block: int) -> range:
        """The places of a block's examples in the data set."""
        start = block * self.batch_size
        return range(start, min(start + self.batch_size, len(self.data)))

    def example(self, index: int) -> Prepared | Failure:
        """The example at a place of the data set."""
        samples = getattr(self.data, "samples", None)
        name = "/".join(Path(samples[index][0]).parts[-2:]) if samples else str(index)
        try:
            entry = self.data[index]
            name = str(entry_field(entry, "name") or name)
            return self._example(entry, index, name)
        except Exception as error:
            if is_resource_error(error):
                raise
            return Failure(index, name, reason(error))

    def _example(self, entry: Any, index: int, name: str) -> Prepared:
        pixels = self._pixels(entry_field(entry, "image", index=0))
        label = entry_field(entry, "target", index=1)
        if pixels is None or label is None:
            raise TypeError(
                f"examples must have `image` and `target`, or be (picture, label, ...), got "
                f"{type(entry).__name__}."
            )
        before = (pixels.shape[1], pixels.shape[2])
        after = before if self.size is None else self.size
        pixels = resize_pixels(pixels, after)
        if self.normalize is not None:
            pixels = self.normalize(pixels)
        if not bool(torch.isfinite(pixels).all()):
            raise ValueError("the image has values that are not finite.")
        boxes = entry_field(
            entry, "boxes", "box", index=2 if type(entry) in (tuple, list) else None
        )
        boxes = None if boxes is not None and len(boxes) == 0 else boxes  # known to have none
        return Prepared(
            index,
            name,
            pixels,
            _class(label),
            None if boxes is None else _boxes(boxes, before, after),
            _mask("mask", entry_field(entry, "mask", "part"), before, after),
            _mask("ignored", entry_field(entry, "ignored"), before, after),
        )

    def _pixels(self, picture: Any) -> Tensor | None:
        """(C, H, W), float32: in [0, 1], but for tensors of floats if nothing is normalised."""
        if picture is None:
            return None
        if not isinstance(picture, Tensor) or not picture.is_floating_point():
            pixels = to_byte_tensor(picture) / 255
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
        """By what the data set is known again: its length, its names, and some of its entries."""
        samples = getattr(self.data, "samples", None)
        known: list[Any] = [("/".join(Path(n).parts[-2:]), int(y)) for n, y in samples or ()]
        for index in evenly_spaced(len(self.data), N_PROBES):
            example = self.example(index)
            if isinstance(example, Failure):
                known.append((example.name, example.reason))
                continue
            tensors = (example.image, example.boxes, example.mask, example.ignored)
            known.append((example.name, example.label))
            known += [None if t is None else digest(t.numpy().tobytes()) for t in tensors]
        return f"{len(self.data)} examples, {digest(known)}"


def reason(error: Exception) -> str:
    """What is written of an error: one line, the same in each run."""
    text = re.sub(r" at 0x[0-9a-f]+", "", f"{type(error).__name__}: {error}")
    return " ".join(text.split())[:LONGEST_REASON]


def _class(label: Any) -> int:
    if isinstance(label, bool | str) or int(label) != label:
        raise ValueError(f"labels must be indices of classes, got {label!r}.")
    return int(label)


def _boxes(boxes: Any, before: tuple[int, int], after: tuple[int, int]) -> Tensor:
    """(n, 4), in pixels of the image; each has some of them."""
    found = box_tensor(boxes)
    height, width = before
    inside = (found[:, 2:].clamp(max=found.new_tensor([width, height])) > 0).all(1)
    inside &= (found[:, :2] < found.new_tensor([width, height])).all(1)
    if not bool((inside & (found[:, :2] < found[:, 2:]).all(1) & found.isfinite().all(1)).all()):
        raise ValueError(
            f"boxes must be (x1, y1, x2, y2) with x1 < x2 and y1 < y2, and not outside of an image "
            f"of {width} x {height}, got {found.tolist()}."
        )
    return scale_boxes(
        found.clamp(min=0).minimum(found.new_tensor([width, height] * 2)), before, after
    )


def _mask(name: str, mask: Any, before: tuple[int, int], after: tuple[int, int]) -> Tensor | None:
    """(H, W), bool, at the image's size."""
    if mask is None:
        return None
    found = torch.as_tensor(mask)
    if found.dtype != torch.bool or tuple(found.shape) != before:
        raise ValueError(
            f"`{name}` must be bool and of the picture's size, {before}, got {found.dtype}, "
            f"{tuple(found.shape)}."
        )
    return resize(found[None, None].float(), after, "nearest-exact")[0, 0] > 0
