"""Score-CAM (Wang et al., CVPR Workshops 2020)."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from captum_ext._checks import check_choice, check_count
from captum_ext._compat import (
    BaselineType,
    TargetType,
    _format_tensor_into_tuples,
    log_usage,
)
from captum_ext._engine.modules import Tensors
from captum_ext._engine.outputs import Score
from captum_ext._engine.precision import full_precision
from captum_ext._engine.state import preserve_state
from captum_ext.attr._arguments import checked_baselines, checks_arguments
from captum_ext.attr._method_info import Paper
from captum_ext.attr.layer._typing import LayerOrList, Maps, maps_by_layer
from captum_ext.attr.layer.base import weighted_sum
from captum_ext.attr.layer.masking import (
    BaseMaskingCam,
    ScoresUnder,
    check_perturbable,
    is_flat,
)

_WEIGHTINGS = ("softmax", "increase", "score")


@dataclass(eq=False, repr=False, kw_only=True)
class LayerScoreCam(BaseMaskingCam[LayerOrList]):
    r"""Score-CAM: each channel weighted by the score of the input masked with it.

    With m_k the channel A_k, upsampled to the input and scaled to [0, 1], S the score and b the
    baseline (eqs. 6 to 8 and algorithm 1):

    .. math::
        L = \sum_k w_k A_k, \qquad w = \mathrm{softmax}_k \left( S(x \odot m_k + b \odot (1 - m_k))
        - S(b) \right)

    A flat channel makes no mask: it is not run, and its weight is 0.

    Args:
        forward_func: the model; it gives logits, classes in dimension 1.
        layer: a layer or a list of layers.
        device_ids: as in Captum.
        reshape_transform: see `BaseLayerCam`.
        score: "logit" (the paper), "softmax", "sigmoid", or a callable of the output.
        weighting: "softmax" over the channels (the paper, and grad-cam and torchcam); "increase",
            S(masked) - S(b), without it; "score", S(masked) alone. The authors' released code, and
            those of Group-CAM and SESS, are `score="softmax", weighting="score"`.

    Raises:
        ValueError: an unknown score or weighting; a layer without spatial dimensions; scores that
            are not finite.

    Reference:
        Wang et al., "Score-CAM: Score-Weighted Visual Explanations for Convolutional Neural
        Networks", https://arxiv.org/abs/1910.01279

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from captum_ext.attr import LayerScoreCam
        >>> conv = nn.Conv2d(3, 4, 3)
        >>> net = nn.Sequential(conv, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 10))
        >>> LayerScoreCam(net, conv).attribute(torch.rand(2, 3, 8, 8), target=5).shape
        torch.Size([2, 1, 6, 6])
    """

    title = "Score-CAM"
    paper = Paper("Wang et al.", 2020, "https://arxiv.org/abs/1910.01279")
    passes = "1 + K"

    score: Score = "logit"
    weighting: str = "softmax"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("weighting", self.weighting, _WEIGHTINGS)

    @maps_by_layer
    @log_usage()
    @checks_arguments
    def attribute(
        self,
        inputs: Tensor | Tensors,
        baselines: BaselineType = None,
        target: TargetType = None,
        additional_forward_args: Any = None,
        attribute_to_layer_input: bool = False,
        relu_attributions: bool = False,
        perturbations_per_eval: int = 16,
        show_progress: bool = False,
    ) -> Maps[LayerOrList]:
        """The map of each example: one forward pass, and one for each channel that is not flat.

        Args:
            inputs: a tensor or tuple of tensors, examples in dimension 0. Those of floats with as
                many spatial dimensions as the layer are masked.
            baselines: the values where the mask is 0, in any of Captum's forms; None is 0.
            target: as in Captum.
            additional_forward_args: as in Captum.
            attribute_to_layer_input: take the layer's input instead of its output.
            relu_attributions: keep the positive part only (the paper does).
            perturbations_per_eval: channels in one forward pass, for each example.
            show_progress: whether to draw a progress bar.

        Returns:
            (B, 1, *spatial) of the layer; a tuple for a layer with several tensors; a list for a
            list of layers.
        """
        examples: Tensors = _format_tensor_into_tuples(inputs)
        check_count("perturbations_per_eval", perturbations_per_eval)
        checked_baselines(baselines, examples)
        with preserve_state(self.forward_func), torch.no_grad():
            per_layer, _ = self._activations(
                examples, target, additional_forward_args, attribute_to_layer_input
            )
            for a in (a for tensors in per_layer for a in tensors):
                check_perturbable(examples, a)
            scores_under = self._scores_under_masks(
                examples, baselines, target, additional_forward_args, perturbations_per_eval,
                show_progress,
            )  # fmt: skip
            return self._maps(
                lambda a: weighted_sum(self._weights(a, scores_under), a, relu_attributions),
                per_layer,
            )

    def _weights(self, a: Tensor, scores_under: ScoresUnder) -> Tensor:
        """w_k for the channels of `a`, (B, K, 1, ...)."""
        flat = is_flat(a)
        runs = (~flat).any(0).nonzero().flatten()
        scores = full_precision(a).new_zeros(a.shape[:2])
        if len(runs):
            masked_scores = scores_under(lambda i, j: a[:, runs[i:j]], len(runs))
            if self.weighting == "increase":
                masked_scores -= scores_under(lambda i, j: torch.zeros_like(a[:, :1]), 1)
            scores[:, runs] = masked_scores.to(scores)
        if self.weighting == "softmax":
            scores = scores.masked_fill(flat, -torch.inf).softmax(1)
        return scores.masked_fill(flat, 0).reshape(a.shape[:2] + (1,) * (a.dim() - 2))
