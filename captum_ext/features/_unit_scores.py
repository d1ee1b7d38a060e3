"""The scores of images: a class's, or the activation of a unit of a layer."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module

from captum_ext._compat import (
    _format_additional_forward_args,
    _run_forward,
    _select_targets,
)
from captum_ext._engine.capture import LayerCapture
from captum_ext._engine.modules import Forward, Tensors
from captum_ext._engine.outputs import (
    as_normal_tensor,
    check_one_score_per_example,
    scoring_forward,
    target_per_example,
)
from captum_ext._engine.precision import full_precision, gradient_of_sum, without_autocast
from captum_ext._engine.replay import run_to_layer


class UnitScores:
    """S of images (B, C, *spatial), one number each, and its gradient by the images.

    Args:
        forward_func: the model.
        layer: whose units are looked at; None looks at the model's output.
        reshape_transform: turns what the layer gives into (B, K, ...).
        target: which class or unit, of each of the images.
        additional_forward_args: as in Captum.
        images: the first of them; the first pass is made of these, all through the model.
        kind: the dtype that the model takes.
    """

    def __init__(
        self,
        forward_func: Forward,
        layer: Module | None,
        reshape_transform: Callable[[Tensor], Tensor] | None,
        target: Any,
        additional_forward_args: Any,
        images: Tensor,
        kind: torch.dtype,
    ) -> None:
        self.forward_func, self.layer, self.kind = forward_func, layer, kind
        self.reshape_transform = reshape_transform
        self.target = (
            target if callable(target) else target_per_example(target, len(images), images.device)
        )
        self.target = as_normal_tensor(self.target)
        if layer is not None and isinstance(self.target, Tensor):
            self.target = self.target.tolist()
        if layer is not None and isinstance(self.target, list):
            self.target = [(t,) if isinstance(t, int) else t for t in self.target]
            for t in self.target:
                assert isinstance(t, tuple), f"Target element type {type(t)} in list is not valid."
        extra = _format_additional_forward_args(additional_forward_args)
        self.extra = None if extra is None else tuple(map(as_normal_tensor, extra))

    def whole_pass(self, images: Tensor) -> Tensor:
        """What a call gives, without a graph; the layer is seen to run, and to run once."""
        with torch.no_grad():
            if self.layer is None:
                return self(images)
            inputs = (images.to(self.kind),)
            capture = LayerCapture(self.forward_func, [self.layer])
            found, _ = capture.activations(inputs, None, self.extra)
            return self._of_layer(found[0], len(images))

    def __call__(self, images: Tensor) -> Tensor:
        """(B,), in float32 or better."""
        if self.layer is not None:
            inputs = (images.to(self.kind),)
            found = run_to_layer(self.forward_func, self.layer, inputs, self.extra)
            return self._of_layer(found, len(images))
        x = images.to(self.kind, copy=True)  # the model's first step may work in place
        output = _run_forward(
            scoring_forward(self.forward_func, "logit"), (x,), self.target, self.extra
        )
        check_one_score_per_example(output)
        return _one_each(output.flatten(), len(images))

    def with_gradient(self, images: Tensor, transform: Any) -> tuple[Tensor, Tensor]:
        """The scores of the transformed images, and their gradient by the images themselves."""
        leaf = images.detach().requires_grad_()
        score = self(transform(leaf))
        return score.detach(), gradient_of_sum(score, leaf, self.kind)

    def _of_layer(self, activations: Tensors, n: int) -> Tensor:
        if len(activations) != 1:
            raise ValueError(f"`layer` must put out one tensor, got {len(activations)}.")
        a, target = activations[0], self.target
        if self.reshape_transform is not None:
            a = self.reshape_transform(a)
        with without_autocast(a):
            if callable(target):
                score = full_precision(target(a))
            elif isinstance(target, list):
                units = [full_precision(a[i, *place]) for i, place in enumerate(target)]
                score = torch.stack([unit.mean() for unit in units])
            else:
                if target is None:  # of a layer with one channel
                    check_one_score_per_example(a.flatten(2)[..., 0] if a.dim() > 2 else a)
                score = full_precision(_select_targets(a, target)).reshape(len(a), -1).mean(1)
        return _one_each(score, n)


def _one_each(score: Tensor, n: int) -> Tensor:
    if score.shape != (n,):
        raise ValueError(
            f"There must be one score for each of {n} images, got {tuple(score.shape)}."
        )
    return score
