"""Base of the masking CAMs: scores of masked inputs, in chunks."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from captum_ext._compat import (
    BaselineType,
    PerturbationAttribution,
    TargetType,
    _format_baseline,
    with_progress,
)
from captum_ext._engine.modules import Tensors
from captum_ext._engine.outputs import Score, Scorer, check_score
from captum_ext._engine.precision import full_precision
from captum_ext.attr.layer._typing import LayerOrList
from captum_ext.attr.layer.base import BaseLayerCam
from captum_ext.imaging import min_max, resize
from captum_ext.infill import blend

ScoresUnder = Callable[[Callable[[int, int], Tensor], int], Tensor]


class BaseMaskingCam(BaseLayerCam[LayerOrList], PerturbationAttribution):
    """Base of the CAMs that weigh activations by the scores of masked inputs."""

    family = "masking"
    score: Score

    def __post_init__(self) -> None:
        super().__post_init__()
        check_score(self.score)

    def _scores_under_masks(
        self,
        inputs: Tensors,
        baselines: BaselineType,
        target: TargetType,
        additional_forward_args: Any,
        perturbations_per_eval: int,
        show_progress: bool,
    ) -> ScoresUnder:
        r"""A function that scores the inputs under masks.

        The masked input is :math:`x \odot m + b \odot (1 - m)`, with m the mask resized to the
        input and scaled to [0, 1].

        Args:
            inputs: those of floats with as many spatial dimensions as the masks are masked; the
                others are passed on as they are.
            baselines: numbers or tensors, b.
            target: as in Captum.
            additional_forward_args: as in Captum.
            perturbations_per_eval: masks in one forward pass, for each example.
            show_progress: whether to draw a bar.

        Returns:
            A function of `masks` and their number N that returns the scores, (B, N) in float32 or
            better. `masks(start, stop)` makes the masks of these indices, (B, n, *spatial of the
            layer).
        """
        n_examples, device = len(inputs[0]), inputs[0].device
        scorer = Scorer(
            self.forward_func, n_examples, target, additional_forward_args, self.score, device
        )
        rows = torch.arange(n_examples, device=device)
        values = _format_baseline(baselines, inputs)

        def scores_under(masks: Callable[[int, int], Tensor], n_masks: int) -> Tensor:
            starts = range(0, n_masks, perturbations_per_eval)
            chunks = []
            for start in with_progress(starts, show_progress, f"{self.get_name()} attribution"):
                chunk = masks(start, min(start + perturbations_per_eval, n_masks))
                n = chunk.shape[1]
                masked = tuple(
                    _mask_input(x, b, chunk) if _is_maskable(x, chunk) else torch.cat([x] * n)
                    for x, b in zip(inputs, values, strict=True)
                )
                chunks.append(scorer(masked, rows.repeat(n)).reshape(n, -1))
            scores = torch.cat(chunks).T
            if not bool(torch.isfinite(scores).all()):
                raise ValueError("The scores of the masked inputs are not finite.")
            return scores

        return scores_under


def _mask_input(x: Tensor, baseline: Tensor | float, masks: Tensor) -> Tensor:
    """The inputs under n masks (B, n, *spatial), X m + b (1 - m), mask by mask: (n * B, ...)."""
    m = min_max(resize(masks, x.shape[2:])).to(x.dtype).transpose(0, 1).unsqueeze(2)
    return blend(x, baseline, m)


def _is_maskable(x: Tensor, maps: Tensor) -> bool:
    return x.is_floating_point() and x.dim() == maps.dim() >= 3


def check_perturbable(inputs: Tensors, activation: Tensor) -> None:
    """Raise a ValueError, before any mask is made, if the activations can mask no input."""
    if not any(_is_maskable(x, activation) for x in inputs):
        raise ValueError(
            f"`layer` has the shape {tuple(activation.shape)} and the inputs are "
            f"{[(tuple(x.shape), x.dtype) for x in inputs]}: the activations of a layer "
            f"can mask only an input of floats with the same number of spatial dimensions."
        )


def is_flat(maps: Tensor) -> Tensor:
    """True for each of the maps (B, K, *spatial) that is constant, (B, K)."""
    low, high = torch.aminmax(full_precision(maps).flatten(2), dim=2)
    return low == high
