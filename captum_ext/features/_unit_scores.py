"""Scores of images for activation maximisation: of a class, or of a unit of a layer."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module

from captum_ext._checks import reshaped
from captum_ext._engine.capture import LayerCapture
from captum_ext._engine.faults import explained_faults
from captum_ext._engine.modules import Forward, Tensors
from captum_ext._engine.outputs import (
    ExampleArguments,
    as_normal_tensor,
    check_one_score_per_example,
    scoring_forward,
)
from captum_ext._engine.precision import full_precision, gradient_of_sum, without_autocast
from captum_ext._engine.replay import run_to_layer
from captum_ext._engine.targets import check_target, run_forward, select_entries
from captum_ext._errors import ArgumentError


class UnitScores(ExampleArguments):
    """The score S of each image (B, C, *spatial), and its gradient with respect to them.

    Args:
        forward_func: the model.
        layer: the layer whose units are scored. None scores the model's output.
        reshape_transform: turns the layer's output into (B, K, ...).
        target: the class or the unit of each image, or a callable.
        additional_forward_args: as in Captum.
        images: example images, for the batch size and the device.
        dtype: the model's own dtype.

    Raises:
        AssertionError: `target` has several entries, but not one for each image.
    """

    def __init__(
        self,
        forward_func: Forward,
        layer: Module | None,
        reshape_transform: Callable[[Tensor], Tensor] | None,
        target: Any,
        additional_forward_args: Any,
        images: Tensor,
        dtype: torch.dtype,
    ) -> None:
        if layer is None and not callable(target):  # units of a layer have more forms
            check_target(target)
        super().__init__(len(images), target, additional_forward_args, images.device)
        self.target = as_normal_tensor(self.target)
        self.forward_func, self.layer, self.dtype = forward_func, layer, dtype
        self.reshape_transform = reshape_transform
        if layer is not None and isinstance(self.target, Tensor):
            self.target = self.target.tolist()
        if layer is not None and isinstance(self.target, list):
            self.target = [(t,) if isinstance(t, int) else t for t in self.target]
            for t in self.target:
                assert isinstance(t, tuple), f"Target element type {type(t)} in list is not valid."

    def run_full_pass(self, images: Tensor) -> Tensor:
        """The scores (B,), without a graph, from a pass through the whole model.

        Raises:
            ValueError: the layer does not run, or runs twice.
        """
        with torch.no_grad(), explained_faults(self.forward_func, images, "start"):
            if self.layer is None:
                return self(images)
            inputs = (images.to(self.dtype),)
            capture = LayerCapture(self.forward_func, [self.layer])
            activations, _ = capture.activations(inputs, None, self.extra_args)
            return self._score_layer(activations[0])

    def __call__(self, images: Tensor) -> Tensor:
        """The scores (B,), in float32 or float64, from a pass up to the layer."""
        if self.layer is not None:
            inputs = (images.to(self.dtype),)
            return self._score_layer(
                run_to_layer(self.forward_func, self.layer, inputs, self.extra_args)
            )
        x = images.to(self.dtype, copy=True)  # the model's first step may work in place
        forward = scoring_forward(self.forward_func, "logit")
        output = run_forward(forward, (x,), self.target, self.extra_args)
        check_one_score_per_example(output)
        return self._check_count(output.flatten())

    def with_gradient(self, images: Tensor, transform: Any) -> tuple[Tensor, Tensor]:
        """The scores of the transformed images, and the gradient with respect to `images`."""
        leaf = images.detach().requires_grad_()
        score = self(transform(leaf))
        return score.detach(), gradient_of_sum(score, leaf, self.dtype)

    def _score_layer(self, activations: Tensors) -> Tensor:
        if len(activations) != 1:
            raise ArgumentError(
                f"`layer` must put out one tensor, got {len(activations)}.", "layer"
            )
        a, target = reshaped(self.reshape_transform, activations[0]), self.target
        with without_autocast(a):
            if callable(target):
                scores = full_precision(target(a))
            elif isinstance(target, list):
                units = [full_precision(a[i, *index]) for i, index in enumerate(target)]
                scores = torch.stack([unit.mean() for unit in units])
            else:
                if target is None:  # valid for a layer with one channel
                    check_one_score_per_example(a.flatten(2)[..., 0] if a.dim() > 2 else a)
                scores = full_precision(select_entries(a, target)).reshape(len(a), -1).mean(1)
        return self._check_count(scores)

    def _check_count(self, scores: Tensor) -> Tensor:
        if scores.shape != (self.n_examples,):
            raise ValueError(
                f"There must be one score for each of {self.n_examples} images, got "
                f"{tuple(scores.shape)}."
            )
        return scores
