"""Ablation-CAM (Desai and Ramaswamy, WACV 2020)."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from captum_ext._checks import check_count
from captum_ext._compat import (
    PerturbationAttribution,
    TargetType,
    log_usage,
    with_progress,
)
from captum_ext._engine.modules import Tensors
from captum_ext._engine.outputs import Score, check_score, scoring_forward
from captum_ext._engine.precision import full_precision
from captum_ext._engine.replay import LayerReplay
from captum_ext._engine.state import preserve_state, set_inference_mode
from captum_ext._errors import ArgumentError
from captum_ext.attr._arguments import checks_arguments
from captum_ext.attr._method_info import Paper
from captum_ext.attr.layer._typing import LayerOrList, Maps, maps_by_layer
from captum_ext.attr.layer.base import BaseLayerCam, divide, weighted_sum


@dataclass(eq=False, repr=False, kw_only=True)
class LayerAblationCam(BaseLayerCam[LayerOrList], PerturbationAttribution):
    r"""Ablation-CAM: each channel weighted by the share of the score that is lost without it.

    With S_k the score when channel k is set to 0 (eq. 2):

    .. math:: L = \sum_k w_k A_k, \qquad w_k = \frac{S - S_k}{S}

    Only the part of the model behind the layer is run again, for `perturbations_per_eval` channels
    at a time. Where a model does not allow that, the whole model is run, with a warning (see
    `captum_ext._engine.replay.LayerReplay`, also for the memory that this takes).

    Args:
        forward_func: the model.
        layer: a layer or a list of layers.
        device_ids: as in Captum.
        reshape_transform: see `BaseLayerCam`. Values that it drops (a class token) are not ablated.
        score: "logit" (the paper), "softmax", "sigmoid", or a callable of the output.
        divide_by_score: divide by S, as the paper does. The division inverts the map where S is
            negative, and enlarges it without bound near 0; False leaves it out.

    Raises:
        ValueError: an unknown score, or scores that are not finite.

    Reference:
        Desai and Ramaswamy, "Ablation-CAM: Visual Explanations for Deep Convolutional Network via
        Gradient-free Localization", WACV 2020, https://doi.org/10.1109/WACV45572.2020.9093360

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from captum_ext.attr import LayerAblationCam
        >>> conv = nn.Conv2d(3, 4, 3)
        >>> net = nn.Sequential(conv, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 10))
        >>> LayerAblationCam(net, conv).attribute(torch.rand(2, 3, 8, 8), target=5).shape
        torch.Size([2, 1, 6, 6])
    """

    title = "Ablation-CAM"
    paper = Paper("Desai and Ramaswamy", 2020, "https://doi.org/10.1109/WACV45572.2020.9093360")
    family = "masking"
    passes = "1 + K of the part behind the layer"

    score: Score = "logit"
    divide_by_score: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        check_score(self.score)

    @maps_by_layer
    @log_usage()
    @checks_arguments
    def attribute(
        self,
        inputs: Tensor | Tensors,
        layer_baselines: float | str | Tensor | None = None,
        target: TargetType = None,
        additional_forward_args: Any = None,
        attribute_to_layer_input: bool = False,
        relu_attributions: bool = False,
        perturbations_per_eval: int = 16,
        show_progress: bool = False,
    ) -> Maps[LayerOrList]:
        """The map of each example: a forward pass, and one behind the layer for each channel.

        Args:
            inputs: a tensor or tuple of tensors, examples in dimension 0.
            layer_baselines: the value of an ablated channel: None is 0 (the paper), "min" each
                example's smallest activation (for layers with negative activations), a number, or
                a tensor that broadcasts with the layer's activations.
            target: as in Captum.
            additional_forward_args: as in Captum.
            attribute_to_layer_input: take the layer's input instead of its output.
            relu_attributions: keep the positive part only (the paper does).
            perturbations_per_eval: channels run at once, for each example.
            show_progress: whether to draw a progress bar.

        Returns:
            (B, 1, *spatial) of the layer; a tuple for a layer with several tensors; a list for a
            list of layers.
        """
        check_count("perturbations_per_eval", perturbations_per_eval)
        is_number = isinstance(layer_baselines, int | float | Tensor)
        if not is_number and layer_baselines not in (None, "min"):
            raise ValueError(
                f"`layer_baselines` must be None, 'min', a number or a tensor, got "
                f"{layer_baselines!r}."
            )
        activations, weights = [], []
        with preserve_state(self.forward_func), torch.no_grad():
            for layer in self.layers:
                replay = LayerReplay(
                    scoring_forward(self.forward_func, self.score),
                    layer,
                    inputs,
                    target,
                    additional_forward_args,
                    **self._capture_options(attribute_to_layer_input),
                )
                replay.capture.check_channels(inputs, additional_forward_args)
                activations += self._as_maps([replay.activations], inputs, [layer])
                weights.append(
                    tuple(
                        self._weights(
                            replay, index, layer_baselines, perturbations_per_eval, show_progress
                        )
                        for index in range(len(replay.activations))
                    )
                )

        def cam(a: Tensor, w: Tensor) -> Tensor:
            w = w.reshape(a.shape[:2] + (1,) * (a.dim() - 2))
            return weighted_sum(w, a, relu_attributions)

        return self._maps(cam, activations, weights)

    def _weights(
        self,
        replay: LayerReplay,
        index: int,
        layer_baselines: float | str | Tensor | None,
        perturbations_per_eval: int,
        show_progress: bool,
    ) -> Tensor:
        """w_k for the channels of one of the layer's tensors, (B, K)."""
        activation = replay.activations[index]
        channel_of, n_channels = self._channels(activation)
        if layer_baselines == "min":
            lowest = activation.flatten(1).amin(1)
            fill = lowest.reshape(-1, *[1] * (activation.dim() - 1))
        else:
            fill = torch.as_tensor(
                0 if layer_baselines is None else layer_baselines,
                dtype=activation.dtype,
                device=activation.device,
            )
            try:
                fill = fill.expand_as(activation)
            except RuntimeError:
                raise ValueError(
                    f"`layer_baselines` has the shape {tuple(fill.shape)}, which does not "
                    f"broadcast with the {tuple(activation.shape)} of `layer`."
                ) from None

        def ablate(a: Tensor, channel: Tensor) -> Tensor:
            return torch.where(channel_of == channel, fill, a)

        channels = torch.arange(n_channels, device=activation.device)
        chunks = with_progress(
            channels.split(perturbations_per_eval), show_progress, f"{self.get_name()} attribution"
        )
        scores = torch.cat([replay(ablate, chunk, index) for chunk in chunks])
        if scores.shape[1] != len(activation):
            raise ArgumentError(
                f"`forward_func` must give one score for each of {len(activation)} examples, got "
                f"{scores.shape[1]}.",
                "forward_func",
            )
        if not bool(torch.isfinite(scores).all()):
            raise ValueError("The scores of the ablated activations are not finite.")
        weights = replay.score - scores
        if self.divide_by_score:
            weights = divide(weights, replay.score)
        return full_precision(weights.T)

    def _channels(self, activation: Tensor) -> tuple[Tensor, int]:
        """The map's channel that each value of the layer belongs to (-1: none), and their number.

        A `reshape_transform` only moves values, so its transpose brings the channels' numbers back
        to the values that they came from.
        """
        if self.reshape_transform is None:
            k = activation.shape[1]
            shape = (1, -1) + (1,) * (activation.dim() - 2)
            return torch.arange(k, device=activation.device).reshape(shape), k
        with set_inference_mode(False):
            like = torch.zeros_like(activation, dtype=torch.float32)
            transpose: Callable[[Tensor], tuple[Tensor]]
            grid, transpose = torch.func.vjp(self.reshape_transform, like)  # type: ignore[misc]
            k = grid.shape[1]
            numbers = torch.arange(1, k + 1, dtype=grid.dtype, device=grid.device)
            numbers = numbers.reshape((1, -1) + (1,) * (grid.dim() - 2)).expand_as(grid)
            return transpose(numbers.contiguous())[0].long() - 1, k
