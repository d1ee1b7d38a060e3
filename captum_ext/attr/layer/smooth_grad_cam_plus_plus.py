"""Smooth Grad-CAM++ (Omeiza et al., 2019)."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Generator, Tensor
from torch.nn import functional as F

from captum_ext._checks import check_count, check_generator, check_non_negative
from captum_ext._compat import TargetType, _format_tensor_into_tuples
from captum_ext._engine.modules import Tensors
from captum_ext._engine.outputs import ExampleArguments
from captum_ext._engine.precision import divide_by_power, full_precision
from captum_ext.attr._method_info import Paper
from captum_ext.attr.layer._typing import LayerOrList
from captum_ext.attr.layer.base import BaseGradientCam, divide, spatial_sum


@dataclass(eq=False, repr=False, kw_only=True)
class LayerSmoothGradCamPlusPlus(BaseGradientCam[LayerOrList]):
    r"""Smooth Grad-CAM++: Grad-CAM++ with the powers of the gradient averaged over noisy inputs.

    With D1, D2, D3 the means of g, g^2, g^3 over `n_samples` noisy copies of the input, and A the
    activations of the clean input:

    .. math::
        w_k = \sum_x \alpha_k(x) [D^1_k(x)]_+, \qquad
        \alpha_k(x) = \frac{D^2_k(x)}{2 D^2_k(x) + D^3_k(x) \sum_y A_k(y)}

    The paper prints D1 in the numerator of alpha. Grad-CAM++ has D2 there, with which the two agree
    where there is no noise. It is not `NoiseTunnel(LayerGradCamPlusPlus)`, which averages maps.

    Args:
        forward_func: the model.
        layer: a layer or a list of layers.
        device_ids: as in Captum.
        reshape_transform: see `BaseLayerCam`.
        n_samples: noisy copies.
        stdev_spread: standard deviation of the noise as a share of each example's range,
            max - min, as in SmoothGrad; 0.15 is the value in common use.
        generator: of the noise; None takes torch's global one. The noise is drawn once a call and
            shared by the examples of a batch.
        samples_per_eval: noisy copies of the batch in one forward pass.

    Raises:
        ValueError: a number of samples below 1, or a negative spread.

    Reference:
        Omeiza et al., "Smooth Grad-CAM++: An Enhanced Inference Level Visualization Technique for
        Deep Convolutional Neural Network Models", https://arxiv.org/abs/1908.01224

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from captum_ext.attr import LayerSmoothGradCamPlusPlus
        >>> conv = nn.Conv2d(3, 4, 3)
        >>> net = nn.Sequential(conv, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 10))
        >>> cam = LayerSmoothGradCamPlusPlus(net, conv, generator=torch.Generator().manual_seed(0))
        >>> cam.attribute(torch.rand(2, 3, 8, 8), target=5).shape
        torch.Size([2, 1, 6, 6])
    """

    title = "Smooth Grad-CAM++"
    paper = Paper("Omeiza et al.", 2019, "https://arxiv.org/abs/1908.01224")
    passes = "1 + 25"

    n_samples: int = 25
    stdev_spread: float = 0.15
    generator: Generator | None = None
    samples_per_eval: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count("n_samples", self.n_samples)
        check_count("samples_per_eval", self.samples_per_eval)
        check_non_negative("stdev_spread", self.stdev_spread)
        check_generator(self.generator, device=None)

    def weights(self, activations: Tensor, gradients: Tensor) -> Tensor:
        """The weights. `gradients` are the three moments of the gradient, (3, B, C, *spatial).

        The second and the third one may have a common factor, which the fraction cancels.
        """
        d1, d2, d3 = gradients
        alpha = divide(d2, 2 * d2 + d3 * spatial_sum(activations))
        return spatial_sum(alpha * F.relu(d1))

    def _activations_and_gradients(
        self,
        inputs: Tensor | Tensors,
        target: TargetType,
        additional_forward_args: Any,
        at_input: bool,
        grad_kwargs: dict[str, Any] | None = None,
    ) -> tuple[list[Tensors], list[Tensors]]:
        if (grad_kwargs or {}).get("create_graph"):  # the clean activations need a graph, too
            clean = super()._activations_and_gradients(
                inputs, target, additional_forward_args, at_input, grad_kwargs
            )
            activations = clean[0]
        else:
            activations, _ = self._activations(inputs, target, additional_forward_args, at_input)
        moments = [
            tuple(full_precision(t).new_zeros(3, *t.shape) for t in tensors)
            for tensors in activations
        ]
        powers: list[Tensors] = []
        examples: Tensors = _format_tensor_into_tuples(inputs)
        batch = torch.arange(len(examples[0]), device=examples[0].device)
        arguments = ExampleArguments(len(batch), target, additional_forward_args, batch.device)
        for start in range(0, self.n_samples, self.samples_per_eval):
            n = min(self.samples_per_eval, self.n_samples - start)
            rows = batch.repeat(n)
            _, gradients = super()._activations_and_gradients(
                tuple(self._noisy(x, n) for x in examples),
                arguments.targets_for(rows),
                arguments.extra_args_for(rows),
                at_input,
                grad_kwargs,
            )
            if not powers:  # those of the first gradients do for all
                powers = [tuple(_power(t, n) for t in tensors) for tensors in gradients]
            for sums, tensors, units in zip(moments, gradients, powers, strict=True):
                for total, gradient, power in zip(sums, tensors, units, strict=True):
                    g = full_precision(gradient).unflatten(0, (n, -1))
                    square = (g / power) ** 2
                    total += torch.stack([g, square, square * g]).sum(1) / self.n_samples
        return activations, moments

    def _noisy(self, x: Tensor, n: int) -> Tensor:
        """`n` noisy copies of the batch `x`, one after the other; integers stay as they are."""
        copies = x.expand(n, *x.shape)
        if x.is_floating_point():
            device = x.device if self.generator is None else self.generator.device
            options: Any = {"generator": self.generator, "dtype": torch.float32, "device": device}
            noise = torch.randn(n, 1, *x.shape[1:], **options)
            flat = x.reshape(len(x), -1)
            spread = self.stdev_spread * (flat.amax(1) - flat.amin(1))
            stdev = spread.reshape(-1, *[1] * (x.dim() - 1))
            copies = copies + noise.to(x) * stdev
        return copies.flatten(0, 1)


def _power(gradients: Tensor, n: int) -> Tensor:
    """The power of two of each example's `n` gradients (n * B, ...), in (B, 1, ...)."""
    by_example = full_precision(gradients.detach()).unflatten(0, (n, -1)).transpose(0, 1)
    return divide_by_power(by_example)[1][:, 0]
