"""Lets every argument of a wrapped method follow its image into windows and moved copies."""

from collections.abc import Callable, Sequence
from typing import Any, Generic, TypeVar

import torch
from captum.attr import (
    Attribution,
    DeepLiftShap,
    GradientShap,
    LayerDeepLiftShap,
    LayerGradientShap,
)
from torch import Tensor

from captum_ext._compat import _format_callable_baseline
from captum_ext.attr._chain import chain

Place = TypeVar("Place")
Arguments = dict[str, Any]

_DRAW_BASELINES = (GradientShap, DeepLiftShap, LayerGradientShap, LayerDeepLiftShap)


class Following(Generic[Place]):
    """The arguments of an attribution method, each of which follows its image to other places.

    Targets and tensors with one entry for each example are picked by example. What has the images'
    height and width (`baselines`, `feature_mask`, and `additional_forward_args` of three or four
    dimensions) is moved as they are: masks and whatever is not of floats by nearest neighbour, and
    the features of a mask are numbered anew for each picture, from 0 and without gaps. Everything
    else stays as it is.

    A method that draws its baselines from a distribution (`GradientShap`) has one for the whole
    call: then each call may hold pictures of only one place (`one_place`).

    Args:
        method: the method that is called.
        images: (B, C, H, W).
        arguments: those of `method.attribute`.
        move: gives, of a tensor (N, C, H, W) of the images' size, the entries of these numbers at
            these places; bilinear, or by nearest neighbour.
    """

    def __init__(
        self,
        method: Attribution,
        images: Tensor,
        arguments: Arguments,
        move: Callable[[Tensor, Sequence[int], Sequence[Place], bool], Tensor],
    ) -> None:
        self.images, self.move, self.arguments = images, move, dict(arguments)
        for name in ("baselines", "feature_mask"):
            value = self.arguments.get(name)
            if isinstance(value, tuple) and len(value) == 1:
                self.arguments[name] = value[0]
        self._check_target(self.arguments.get("target"))
        baselines = self.arguments.get("baselines")
        draws = any(isinstance(m, _DRAW_BASELINES) for m in chain(method))
        if draws and callable(baselines):
            (baselines,) = _format_callable_baseline(baselines, images)
            self.arguments["baselines"] = baselines
        draws = draws or bool(self.arguments.get("draw_baseline_from_distrib"))
        self.one_place = isinstance(baselines, Tensor) and draws
        if isinstance(baselines, Tensor):
            self.arguments["baselines"] = self._like_images("baselines", baselines)
        mask = self.arguments.get("feature_mask")
        if isinstance(mask, Tensor):
            if mask.dim() < 4:
                mask = mask.reshape((1,) * (4 - mask.dim()) + tuple(mask.shape))
            # What lies outside of the image becomes 0, a feature of its own.
            mask = mask.long()
            mask = self._like_images("feature_mask", mask - mask.min() + 1).float()
            self.arguments["feature_mask"] = mask

    def at(
        self, examples: Sequence[int], places: Sequence[Place], names: Sequence[str] | None = None
    ) -> Arguments:
        """The arguments, or those of `names`, for `examples` at `places`, picture by picture."""
        found = {k: v for k, v in self.arguments.items() if names is None or k in names}
        if isinstance(found.get("target"), list | Tensor):
            found["target"] = self._pick(found["target"], examples)
        extra = found.get("additional_forward_args")
        if isinstance(extra, tuple):
            moved = tuple(self._extra(value, examples, places) for value in extra)
            found["additional_forward_args"] = moved
        elif extra is not None:
            found["additional_forward_args"] = self._extra(extra, examples, places)
        baselines, mask = found.get("baselines"), found.get("feature_mask")
        if isinstance(baselines, Tensor):
            if self.one_place:
                n = len(baselines)
                found["baselines"] = self.move(baselines, range(n), [places[0]] * n, False)
            else:
                found["baselines"] = self._moved(baselines, examples, places, False)
        if isinstance(mask, Tensor):
            features = self._moved(mask, examples, places, True)
            found["feature_mask"] = _numbered_anew(features.round().long())
        return found

    def _moved(
        self, tensor: Tensor, examples: Sequence[int], places: Sequence[Place], nearest: bool
    ) -> Tensor:
        if len(tensor) == 1:
            examples = [0] * len(examples)
        return self.move(tensor, examples, places, nearest)

    def _extra(self, value: Any, examples: Sequence[int], places: Sequence[Place]) -> Any:
        if not isinstance(value, Tensor) or not value.dim():
            return value
        if is_image_like(value, self.images):
            nearest = not value.is_floating_point()
            floats = value.float() if nearest else value
            floats = floats[:, None] if value.dim() == 3 else floats
            moved = self._moved(floats, examples, places, nearest)
            moved = moved[:, 0] if value.dim() == 3 else moved
            return moved.round().to(value.dtype) if nearest else moved
        return self._pick(value, examples) if len(value) == len(self.images) else value

    def _pick(self, value: Any, examples: Sequence[int]) -> Any:
        if isinstance(value, Tensor):
            if value.numel() == 1 and value.dim() < 2:
                return value.reshape(1).expand(len(examples))
            return value[torch.as_tensor(examples, device=value.device)]
        return [value[i] for i in examples]

    def _check_target(self, target: Any) -> None:
        n = len(self.images)
        if isinstance(target, list):
            assert len(target) == n, (
                f"Target list length {len(target)} is not that of the inputs, {n}."
            )
        elif isinstance(target, Tensor):
            fits = target.numel() == 1 or (target.dim() == 1 and len(target) == n)
            assert fits, f"Tensor target dimension {tuple(target.shape)} is not valid."

    def _like_images(self, name: str, value: Tensor) -> Tensor:
        n, channels, *size = self.images.shape
        counts = (len(value),) if self.one_place and name == "baselines" else (1, n)
        widths = (1, channels) if name == "feature_mask" else (channels,)
        fits = value.dim() == 4 and list(value.shape[2:]) == size and value.shape[1] in widths
        if not fits or len(value) not in counts:
            raise ValueError(
                f"`{name}` must have the shape of the images {tuple(self.images.shape)}, or that "
                f"of one of them, got {tuple(value.shape)}."
            )
        return value.detach()


def is_image_like(value: Tensor, images: Tensor) -> bool:
    """Whether `value`, (B or 1, C, H, W) or (B or 1, H, W), has the height and width of images."""
    is_one_each = value.dim() in (3, 4) and len(value) in (1, len(images))
    return is_one_each and value.shape[-2:] == images.shape[-2:]


def _numbered_anew(masks: Tensor) -> Tensor:
    """The features of each mask (n, C, h, w) numbered from 0, in order and without gaps."""
    flat = masks.flatten(1)
    present = torch.zeros(len(flat), int(flat.max()) + 1, dtype=torch.long, device=flat.device)
    number = present.scatter(1, flat, 1).cumsum(1) - 1
    return number.gather(1, flat).reshape(masks.shape)
