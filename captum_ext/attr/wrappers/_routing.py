"""Arguments of a wrapped method, made to follow their images into crops and warped copies."""

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
from captum_ext._engine.outputs import ExampleArguments
from captum_ext._errors import ArgumentError
from captum_ext.attr._chain import chain

View = TypeVar("View")
Arguments = dict[str, Any]
MakeViews = Callable[[Tensor, Sequence[int], Sequence[View], bool], Tensor]

_DRAW_BASELINES = (GradientShap, DeepLiftShap, LayerGradientShap, LayerDeepLiftShap)


class ArgumentRouter(Generic[View]):
    """The arguments of an attribution method, which follow each image into its views.

    A view is a window or a warped copy. Targets, and tensors with one entry for each example, are
    indexed by example. `baselines`, a `feature_mask`, and tensors of three or four dimensions in
    `additional_forward_args` that have the images' height and width, are cropped or warped with
    the images, masks and other tensors without floats by nearest neighbour. The features of a mask
    are renumbered in each view, from 0 and without gaps. Everything else is passed on unchanged.

    A method that draws its baselines from a distribution (`GradientShap`) has one distribution for
    each call. Then all pictures of a call must have the same view (`one_view_per_call`).

    Args:
        method: the method that is called.
        images: (B, C, H, W).
        arguments: of `method.attribute`.
        make_views: called with a tensor (N, C, H, W) of the images' size, n indices of its entries,
            n views, and whether to use nearest neighbours instead of bilinear interpolation. It
            gives the n views.
    """

    def __init__(
        self,
        method: Attribution,
        images: Tensor,
        arguments: Arguments,
        make_views: MakeViews[View],
    ) -> None:
        self.images, self.make_views, self.arguments = images, make_views, dict(arguments)
        for name in ("baselines", "feature_mask"):
            value = self.arguments.get(name)
            if isinstance(value, tuple) and len(value) == 1:
                self.arguments[name] = value[0]
        self._per_example = ExampleArguments(
            len(images), self.arguments.get("target"), device=images.device
        )
        baselines = self.arguments.get("baselines")
        draws = any(isinstance(m, _DRAW_BASELINES) for m in chain(method))
        if draws and callable(baselines):
            (baselines,) = _format_callable_baseline(baselines, images)
            self.arguments["baselines"] = baselines
        draws = draws or bool(self.arguments.get("draw_baseline_from_distrib"))
        self.one_view_per_call = isinstance(baselines, Tensor) and draws
        if isinstance(baselines, Tensor):
            self.arguments["baselines"] = self._check_image_shape("baselines", baselines)
        mask = self.arguments.get("feature_mask")
        if isinstance(mask, Tensor):
            if mask.dim() < 4:
                mask = mask.reshape((1,) * (4 - mask.dim()) + tuple(mask.shape))
            # Pixels from outside the image become 0, a feature of their own.
            mask = mask.long()
            mask = self._check_image_shape("feature_mask", mask - mask.min() + 1).float()
            self.arguments["feature_mask"] = mask

    def route(
        self, examples: Sequence[int], views: Sequence[View], names: Sequence[str] | None = None
    ) -> Arguments:
        """The arguments of n pictures: picture i shows view i of example i.

        Args:
            examples: n indices of images.
            views: n views.
            names: of the arguments to return; None is all.
        """
        routed = {k: v for k, v in self.arguments.items() if names is None or k in names}
        index = torch.tensor(examples, device=self.images.device)
        if "target" in routed:
            routed["target"] = self._per_example.targets_for(index)
        extra = routed.get("additional_forward_args")
        if isinstance(extra, tuple):
            values = tuple(self._route_extra(value, examples, views) for value in extra)
            routed["additional_forward_args"] = values
        elif extra is not None:
            routed["additional_forward_args"] = self._route_extra(extra, examples, views)
        baselines, mask = routed.get("baselines"), routed.get("feature_mask")
        if isinstance(baselines, Tensor):
            if self.one_view_per_call:
                n = len(baselines)
                routed["baselines"] = self.make_views(baselines, range(n), [views[0]] * n, False)
            else:
                routed["baselines"] = self._make_views(baselines, examples, views, False)
        if isinstance(mask, Tensor):
            features = self._make_views(mask, examples, views, True)
            routed["feature_mask"] = _renumber(features.round().long())
        return routed

    def _make_views(
        self, tensor: Tensor, examples: Sequence[int], views: Sequence[View], nearest: bool
    ) -> Tensor:
        if len(tensor) == 1:
            examples = [0] * len(examples)
        return self.make_views(tensor, examples, views, nearest)

    def _route_extra(self, value: Any, examples: Sequence[int], views: Sequence[View]) -> Any:
        if not isinstance(value, Tensor) or not value.dim():
            return value
        if self._has_image_size(value):
            nearest = not value.is_floating_point()
            floats = value.float() if nearest else value
            floats = floats[:, None] if value.dim() == 3 else floats
            routed = self._make_views(floats, examples, views, nearest)
            routed = routed[:, 0] if value.dim() == 3 else routed
            return routed.round().to(value.dtype) if nearest else routed
        if len(value) == len(self.images):
            return value[torch.tensor(examples, device=value.device)]
        return value

    def _has_image_size(self, value: Tensor) -> bool:
        """Return whether `value` is (B or 1, C, H, W) or (B or 1, H, W)."""
        fits = value.dim() in (3, 4) and len(value) in (1, len(self.images))
        return fits and value.shape[-2:] == self.images.shape[-2:]

    def _check_image_shape(self, name: str, value: Tensor) -> Tensor:
        n, channels, *size = self.images.shape
        counts = (len(value),) if self.one_view_per_call and name == "baselines" else (1, n)
        widths = (1, channels) if name == "feature_mask" else (channels,)
        fits = value.dim() == 4 and list(value.shape[2:]) == size and value.shape[1] in widths
        if not fits or len(value) not in counts:
            raise ArgumentError(
                f"`{name}` must have the shape of the images {tuple(self.images.shape)}, or that "
                f"of one of them, got {tuple(value.shape)}."
            )
        return value.detach()


def _renumber(masks: Tensor) -> Tensor:
    """Number the features of each mask (n, C, h, w) from 0, in order and without gaps."""
    flat = masks.flatten(1)
    present = torch.zeros(len(flat), int(flat.max()) + 1, dtype=torch.long, device=flat.device)
    number = present.scatter(1, flat, 1).cumsum(1) - 1
    return number.gather(1, flat).reshape(masks.shape)
