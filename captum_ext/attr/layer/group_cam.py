"""Group-CAM (Zhang et al., 2021)."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from captum_ext._checks import check_count
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
from captum_ext._errors import ArgumentError
from captum_ext.attr._arguments import checked_baselines, checks_arguments
from captum_ext.attr._method_info import Paper
from captum_ext.attr.layer._typing import LayerOrList, Maps, maps_by_layer
from captum_ext.attr.layer.base import spatial_mean
from captum_ext.attr.layer.masking import (
    BaseMaskingCam,
    check_perturbable,
    is_flat,
)
from captum_ext.imaging import blur


@dataclass(eq=False, repr=False, kw_only=True)
class LayerGroupCam(BaseMaskingCam[LayerOrList]):
    r"""Group-CAM: groups of channels, each weighted by the score of the pixels that it uncovers.

    With g the gradient at the layer, G_l the l-th group of channels, S the softmax score and b the
    blurred input (section 3.2):

    .. math::
        M_l = \Big[ \sum_{k \in G_l} \bar g_k A_k \Big]_+, \qquad
        L = \sum_l \left[ S(x \odot m_l + b \odot (1 - m_l)) - S(b) \right]_+ M_l

    with m_l the map M_l, upsampled to the input and scaled to [0, 1]. A group whose map is flat has
    no mask and adds nothing. The map is nowhere negative, and zero where no group raises the score.

    Args:
        forward_func: the model; it gives logits, classes in dimension 1.
        layer: a layer or a list of layers.
        device_ids: as in Captum.
        reshape_transform: see `BaseLayerCam`.
        groups: the number of groups of neighbouring channels (the authors' is 32; group sizes may
            differ by one), or a tensor with the group of each channel, from a clustering.
        score: "softmax" (the authors' code), "logit", "sigmoid", or a callable of the output.

    Raises:
        ValueError: no group, or a tensor of groups that does not fit the layer; a layer without
            spatial dimensions; scores that are not finite.
        RuntimeError: inside `torch.inference_mode` (the groups need gradients).

    Reference:
        Zhang et al., "Group-CAM: Group Score-Weighted Visual Explanations for Deep Convolutional
        Networks", https://arxiv.org/abs/2103.13859

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from captum_ext.attr import LayerGroupCam
        >>> conv = nn.Conv2d(3, 4, 3)
        >>> net = nn.Sequential(conv, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 10))
        >>> LayerGroupCam(net, conv, groups=2).attribute(torch.rand(2, 3, 8, 8), target=5).shape
        torch.Size([2, 1, 6, 6])
    """

    title = "Group-CAM"
    paper = Paper("Zhang et al.", 2021, "https://arxiv.org/abs/2103.13859")
    passes = "1 + 32 + 1"
    needs_gradients = True

    groups: int | Tensor = 32
    score: Score = "softmax"

    def __post_init__(self) -> None:
        super().__post_init__()
        groups = self.groups
        if not isinstance(groups, Tensor):
            check_count("groups", groups)
        elif groups.is_floating_point() or groups.dim() != 1 or bool((groups < 0).any()):
            raise ArgumentError(
                f"`groups` must be the number of groups, or a vector of integers from 0, the group "
                f"of each channel; got {groups.dtype} of shape {tuple(groups.shape)}.",
                "groups",
            )

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
        perturbations_per_eval: int = 16,
        show_progress: bool = False,
    ) -> Maps[LayerOrList]:
        """The map of each example: a forward and backward pass, and groups + 1 masked passes.

        Args:
            inputs: a tensor or tuple of tensors, examples in dimension 0. Those of floats with as
                many spatial dimensions as the layer are masked.
            baselines: the values where the mask is 0, in any of Captum's forms; None is the input
                under the authors' blur (51 pixels, sigma 50).
            target: as in Captum.
            additional_forward_args: as in Captum.
            attribute_to_layer_input: take the layer's input instead of its output.
            perturbations_per_eval: groups in one forward pass, for each example.
            show_progress: whether to draw a progress bar.

        Returns:
            (B, 1, *spatial) of the layer; a tuple for a layer with several tensors; a list for a
            list of layers.
        """
        examples: Tensors = _format_tensor_into_tuples(inputs)
        check_count("perturbations_per_eval", perturbations_per_eval)
        checked_baselines(baselines, examples)
        with preserve_state(self.forward_func), torch.no_grad():
            activations, gradients = self._activations_and_gradients(
                examples, target, additional_forward_args, attribute_to_layer_input
            )
            for a in (a for tensors in activations for a in tensors):
                check_perturbable(examples, a)
            if baselines is None:
                dims = {a.dim() for tensors in activations for a in tensors}
                baselines = tuple(
                    blur(x) if x.is_floating_point() and x.dim() in dims else 0 for x in examples
                )
            scores_under = self._scores_under_masks(
                examples, baselines, target, additional_forward_args, perturbations_per_eval,
                show_progress,
            )  # fmt: skip

            def cam(a: Tensor, g: Tensor) -> Tensor:
                m = self._group_maps(full_precision(a), full_precision(g))
                # The last mask is flat, and so zero everywhere: it shows the baseline alone.
                masks = torch.cat([m, torch.zeros_like(m[:, :1])], 1)
                scores = scores_under(lambda start, stop: masks[:, start:stop], masks.shape[1])
                gain = F.relu(scores[:, :-1] - scores[:, -1:]).masked_fill(is_flat(m), 0)
                return torch.einsum("bl,bl...->b...", gain.to(m), m).unsqueeze(1).to(a.dtype)

            return self._maps(cam, activations, gradients)

    def _group_maps(self, activations: Tensor, gradients: Tensor) -> Tensor:
        """M_l, (B, groups, *spatial)."""
        k = activations.shape[1]
        if isinstance(self.groups, Tensor):
            group_of = self.groups.to(activations.device)
            if len(group_of) != k:
                raise ValueError(
                    f"`groups` must hold the group of each of the {k} channels of `layer`, got "
                    f"{len(group_of)}."
                )
        else:
            n = min(self.groups, k)
            group_of = torch.arange(k, device=activations.device) * n // k
        membership = F.one_hot(group_of).to(activations)
        weighted = spatial_mean(gradients) * activations
        return F.relu(torch.einsum("bk...,kl->bl...", weighted, membership))
