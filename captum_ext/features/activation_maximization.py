"""Activation maximisation (Simonyan, Vedaldi, Zisserman, ICLR workshop 2014)."""

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Generator, Tensor
from torch.nn import Module

from captum_ext._checks import (
    check_choice,
    check_count,
    check_generator,
    check_non_negative,
    check_positive,
    warn,
)
from captum_ext._compat import TargetType, with_progress
from captum_ext._data.pixels import mean_and_std
from captum_ext._engine.modules import Forward, find_module, module_name, root_module
from captum_ext._engine.precision import divide_by_power
from captum_ext._engine.state import preserve_state, seeded_random, set_inference_mode
from captum_ext._errors import ArgumentError, ArgumentTypeError
from captum_ext._repr import bounded_repr, fields_repr, options_repr
from captum_ext.features._parametrizations import Fourier, Pixels
from captum_ext.features._starts import (
    SharedRandom,
    broadcast_mean_std,
    start_images,
    to_pictures,
)
from captum_ext.features._unit_scores import UnitScores
from captum_ext.infill import gaussian

Transform = Callable[[Tensor], Tensor]

CHECK_INTERVAL = (
    32  # steps from one check for finite values to the next, which waits for the device
)
OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "adam": torch.optim.Adam,
    "normalized": torch.optim.SGD,
    "gradient": torch.optim.SGD,
}
PARAMETRIZATIONS = ("fourier", "pixel")


@dataclass(frozen=True, eq=False)
class PreferredInputs:
    """The images of activation maximisation for B targets, on the model's device.

    Scores and objectives are those of the images themselves, without jitter or transformations;
    histories are those of the transformed images.

    Attributes:
        images: (B, C, *spatial), inputs of the model, in float32 (float64 for models in float64).
        pictures: the images in [0, 1], to look at: denormalised; without `normalize`, 0 is mid-grey
            and the largest magnitude of each image is black or white.
        scores_before: (B,), the score S at the start.
        scores: (B,), the score S at the end.
        objectives_before: (B,), S minus the penalties at the start.
        objectives: (B,), S minus the penalties at the end.
        score_history: (n_steps, B), S before each step.
        objective_history: (n_steps, B), S minus the penalties before each step.
    """

    images: Tensor
    pictures: Tensor
    scores_before: Tensor
    scores: Tensor
    objectives_before: Tensor
    objectives: Tensor
    score_history: Tensor
    objective_history: Tensor

    def __repr__(self) -> str:
        return fields_repr(self)


class ActivationMaximization:
    r"""Finds the images that most activate a class, or a unit of a layer, by gradient ascent.

    .. math::
        I^* = \arg\max_I \; S(I) - \lambda \|I\|_2^2 - \lambda_{TV} TV(I)

    (Sec. 2 of the paper, and a total variation TV) with the class's logit S. A softmax would also
    grow when other logits fall. The ascent starts from zeros, the mean colour of normalised images.
    A step of plain ascent (``optimizer="gradient", parametrization="pixel"``) without TV is

    .. math::
        I \leftarrow I + \eta \, (\partial S / \partial I - 2 \lambda I)

    For a linear score S = v . I + b the maximum is :math:`I^* = v / (2 \lambda)` with the value
    :math:`\|v\|^2 / (4 \lambda) + b`. Each step multiplies the error by
    :math:`1 - 2 \eta \lambda`, so plain ascent converges for 0 < eta < 1 / lambda only. (Some
    slides print S + lambda \|I\|^2, with the wrong sign: that has no maximum.)

    For a unit of a layer, S is its activation A_k(i, j), or the mean of the channel A_k. The model
    runs up to that layer only. A batch has one image for each target, which equals the image that
    the target would have alone.

    **Defaults.** They were chosen on an EfficientNet-lite0 with 128 pixels, eight classes and 256
    steps, after which each class has a probability of 1.000 for its image:

    ============================  ==========  ====================================
    ascent                        mean logit  probability after a blur of 2 pixels
    ============================  ==========  ====================================
    Fourier coefficients          65.5        0.91
    pixels                        59.3        0.41
    Fourier, no blur in steps     66.8        0.23
    pixels, no blur in steps      63.0        0.11
    ============================  ==========  ====================================

    Without the blur, images have fine patterns that no object has. Without jitter the mean logit is
    91.4, but only 28.6 after a shift of some pixels. (`python -m
    tests.benchmarks.activation_maximization`.) Units of early layers look for fine patterns: they
    get higher activations and cleaner images by pixels.

    Args:
        forward_func: the model, which gives logits with classes in dimension 1.
        layer: the module, or its dotted name, whose units are targets. It puts out (B, K) or
            (B, K, ...), and runs once. None takes the model's output.
        normalize: (mean, std) of each channel, as the model expects pictures. With it, images stay
            in the range of pictures in [0, 1], and are returned as pictures, too.
        reshape_transform: turns the layer's output into (B, K, ...), for layers with their channels
            elsewhere; see `captum_ext.attr.tokens_to_grid`. Without it, targets of a transformer's
            layer (B, T, C) are its tokens.

    Raises:
        ValueError: `layer` is not in the model, or `normalize` is invalid.
        TypeError: `layer` or `reshape_transform` has the wrong type.

    Reference:
        Simonyan, Vedaldi, Zisserman, "Deep Inside Convolutional Networks: Visualising Image
        Classification Models and Saliency Maps", https://arxiv.org/abs/1312.6034

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from captum_ext.features import ActivationMaximization
        >>> net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())
        >>> result = ActivationMaximization(net).maximize((3, 16, 16), target=[0, 2], n_steps=8)
        >>> result.images.shape, bool((result.scores > result.scores_before).all())
        (torch.Size([2, 3, 16, 16]), True)
        >>> unit = ActivationMaximization(net, layer="0").maximize(
        ...     (3, 16, 16), target=(1, 7, 6), parametrization="pixel", jitter=0, blur_every=0
        ... )
        >>> unit.images[0, 0].nonzero().aminmax(dim=0)  # rows and columns that the unit sees
        torch.return_types.aminmax(
        min=tensor([7, 6]),
        max=tensor([9, 8]))
    """

    def __init__(
        self,
        forward_func: Forward,
        layer: Module | str | None = None,
        *,
        normalize: tuple[Any, Any] | None = None,
        reshape_transform: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        self.forward_func = forward_func
        self.layer = None if layer is None else find_module(forward_func, layer)
        self.normalize = None if normalize is None else mean_and_std(normalize, torch.float64)
        if reshape_transform is not None and not callable(reshape_transform):
            raise ArgumentTypeError(
                f"`reshape_transform` must be callable, got {bounded_repr(reshape_transform)}.",
                "reshape_transform",
            )
        self.reshape_transform = reshape_transform

    def __repr__(self) -> str:
        layer = self.layer and module_name(self.forward_func, self.layer).strip("`")
        normalize = self.normalize and tuple(values.tolist() for values in self.normalize)
        return options_repr(self, layer=layer, normalize=normalize)

    def maximize(
        self,
        start: Tensor | Sequence[int],
        target: TargetType | Callable[[Tensor], Tensor] = None,
        additional_forward_args: Any = None,
        *,
        n_steps: int = 256,
        optimizer: str | Callable[[list[Tensor]], torch.optim.Optimizer] = "adam",
        lr: float = 0.02,
        parametrization: str = "fourier",
        l2: float = 1e-4,
        tv: float = 0.0,
        noise: float = 0.0,
        jitter: int = 8,
        blur_every: int = 4,
        blur_sigma: float = 0.5,
        transform: Transform | None = None,
        clip: bool = True,
        generator: Generator | None = None,
        show_progress: bool = False,
    ) -> PreferredInputs:
        r"""Run the ascent: `n_steps` passes through the model and back.

        Parameters of the model get no gradient, and may be frozen. It works inside `no_grad` and
        `inference_mode`.

        Args:
            start: the shape of an image, (C, \*spatial), to start from zeros on the device of the
                model's parameters; or images (B, C, \*spatial) to start from, which are not
                changed. A single image is repeated for several targets.
            target: of the model's output, as in Captum: one class for each image. Of a layer, an
                integer k is the mean of channel k; a tuple (k, i, j) is one unit; a shorter tuple,
                or one with slices, is the mean of the units that it selects; a list or a tensor has
                one target for each image; a callable maps the layer's output to (B,). If `start` is
                a shape or a single image, a list or tensor of N targets gives N images.
            additional_forward_args: as in Captum.
            n_steps: number of steps. 256.
            optimizer: "adam"; "normalized", which divides the gradient by its root mean square, so
                that each step has a root mean square of `lr`; "gradient", plain ascent; or a
                callable that makes a `torch.optim.Optimizer` of a list of tensors, with its own
                `lr`.
            lr: eta, the learning rate. 0.02, for "adam" and "normalized". Plain ascent needs one
                that suits the scale of the scores.
            parametrization: the parameters that the optimiser moves: "fourier", the frequencies of
                the image, weighted by 1 / \|f\|; or "pixel". "fourier".
            l2: lambda, the weight of the sum of squares of the image's values. 1e-4.
            tv: lambda_TV, the weight of the sum of absolute differences of neighbours, for images
                (B, C, H, W) only. 0.
            noise: standard deviation of Gaussian noise on the start, the same for all images. 0.
                Networks without biases, and untrained ones, have no gradient at zeros.
            jitter: the largest shift in pixels along each dimension. In each step the images are
                shifted at random, cyclically and all by the same amount, before the model sees
                them. 8. 0 does not shift.
            blur_every: number of steps from one blur of the images to the next; the last step has
                none. 4. 0 never blurs.
            blur_sigma: standard deviation of that blur, in pixels. 0.5.
            transform: a callable of (B, C, \*spatial) that transforms the images in each step
                before the model sees them, such as a module of `kornia.augmentation`. For a batch
                that equals its images alone, give that ``same_on_batch=True``.
            clip: whether images stay in the range of normalised pictures, with `normalize`. True.
            generator: the generator of all random numbers, those of `transform` included. None
                takes torch's global one.
            show_progress: whether to draw a progress bar.

        Returns:
            Images, scores before and after, and their history. A warning is given if an objective
            did not increase.

        Raises:
            ValueError: `start` or an option is out of range; or scores are not finite at the start,
                are not one for each image, or do not depend on it.
            TypeError: `start`, `transform`, `optimizer` or `generator` has the wrong type.
            FloatingPointError: images or scores are not finite after a step, which is named.
            AssertionError: `target` does not select one score for each image, as in Captum.
        """
        check_count("n_steps", n_steps)
        for name, count in (("jitter", jitter), ("blur_every", blur_every)):
            if count != 0 or isinstance(count, bool):
                check_count(name, count)
        for name, value in (("lr", lr), ("blur_sigma", blur_sigma)):
            check_positive(name, value)
        for name, value in (("l2", l2), ("tv", tv), ("noise", noise)):
            check_non_negative(name, value)
        check_choice("parametrization", parametrization, PARAMETRIZATIONS)
        if not callable(optimizer):
            check_choice("optimizer", optimizer, OPTIMIZERS)
        if transform is not None and not callable(transform):
            raise ArgumentTypeError(
                f"`transform` must be callable or None, got {type(transform)}.", "transform"
            )
        start, dtype = start_images(start, target, root_module(self.forward_func) or self.layer)
        if tv and start.dim() != 4:
            raise ArgumentError(f"`tv` is for images (B, C, H, W), got {tuple(start.shape)}.", "tv")
        check_generator(generator, start.device)
        mean, std = broadcast_mean_std(self.normalize, start)
        is_clipped = clip and self.normalize is not None

        def clip_range(x: Tensor) -> Tensor:
            return x.clamp(-mean / std, (1 - mean) / std) if is_clipped else x

        steps = with_progress(range(n_steps), show_progress, "Activation maximization")
        with ExitStack() as stack:
            stack.enter_context(set_inference_mode(False))
            stack.enter_context(preserve_state(self.forward_func))
            stack.enter_context(torch.enable_grad())
            random = SharedRandom(start, generator)
            images = clip_range(start + noise * random.normal() if noise else start.clone())
            shifts = random.shifts(n_steps, jitter) if jitter else [None] * n_steps
            if transform is not None and generator is not None:
                stack.enter_context(seeded_random(start.device, random.seed()))
            scores = UnitScores(
                self.forward_func, self.layer, self.reshape_transform, target,
                additional_forward_args, images, dtype,
            )  # fmt: skip
            objective = _Objective(scores, l2, tv)
            before, objectives_before = objective.evaluate(images)
            if not bool(torch.isfinite(before).all()):
                raise ArgumentError(
                    "`forward_func` gives scores that are not finite at the start.", "forward_func"
                )
            ascent = _Ascent(images, parametrization, optimizer, lr)
            history = before.new_zeros(2, n_steps, len(images))
            for step in steps:
                transform_step = partial(_transform, shift=shifts[step], transform=transform)
                history[:, step], gradient = objective.with_gradient(images, transform_step)
                images = ascent.step(gradient)
                is_last = step + 1 == n_steps
                is_blurred = blur_every and (step + 1) % blur_every == 0 and not is_last
                if is_blurred or is_clipped:
                    images = clip_range(gaussian(images, blur_sigma) if is_blurred else images)
                    ascent.replace(images)
                if step % CHECK_INTERVAL == 0 or is_last:
                    _check_finite(images, history[:, : step + 1], lr)
            after, objectives = objective.evaluate(images)
            pictures = to_pictures(images, self.normalize)
        _check_finite(after, history, lr)
        _warn_if_not_increased(objectives <= objectives_before)
        return PreferredInputs(
            images, pictures, before, after, objectives_before, objectives, *history.unbind()
        )


class _Objective:
    """The objective S(I) - lambda ||I||^2 - lambda_TV TV(I) of each image, and its gradient."""

    def __init__(self, scores: UnitScores, l2: float, tv: float) -> None:
        self.scores, self.l2, self.tv = scores, l2, tv

    def penalties(self, images: Tensor) -> Tensor:
        """The terms lambda ||I||^2 + lambda_TV TV(I), (B,)."""
        from kornia.losses import total_variation

        squares = self.l2 * images.square().flatten(1).sum(1)
        return squares + self.tv * total_variation(images).sum(1) if self.tv else squares

    def evaluate(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Scores and objectives, (B,) each, from a full pass."""
        scores = self.scores.run_full_pass(images)
        return scores, scores - self.penalties(images)

    def with_gradient(self, images: Tensor, transform: Transform) -> tuple[Tensor, Tensor]:
        """Scores and objectives of transformed images, (2, B), and the objectives' gradient."""
        scores, score_gradient = self.scores.with_gradient(images, transform)
        leaf = images.detach().requires_grad_()
        penalties = self.penalties(leaf)
        (penalty_gradient,) = torch.autograd.grad(penalties.sum(), leaf)
        values = torch.stack((scores, scores - penalties.detach()))
        return values, score_gradient - penalty_gradient


class _Ascent:
    """An optimiser of images by their parameters.

    Args:
        images: the images at the start.
        parametrization: "fourier" or "pixel".
        optimizer: a name of `OPTIMIZERS`, or a callable of a list of tensors.
        lr: the learning rate of the optimiser, if it is a name.

    Raises:
        TypeError: the callable makes no `torch.optim.Optimizer`.
    """

    def __init__(self, images: Tensor, parametrization: str, optimizer: Any, lr: float) -> None:
        self.space = Fourier(images) if parametrization == "fourier" else Pixels()
        self.parameters = self.space.encode(images)
        self.is_normalized = optimizer == "normalized"
        if callable(optimizer):
            self.optimizer = optimizer([self.parameters])
        else:
            self.optimizer = OPTIMIZERS[optimizer]([self.parameters], lr=lr)
        if not isinstance(self.optimizer, torch.optim.Optimizer):
            raise ArgumentTypeError(
                f"`optimizer` must make a torch.optim.Optimizer, got {type(self.optimizer)}.",
                "optimizer",
            )

    def step(self, gradient: Tensor) -> Tensor:
        """Move along the gradient of an objective by the images, and give the new images."""
        gradient = self.space.gradient(-gradient)  # optimisers descend
        if self.is_normalized:
            gradient = gradient / _root_mean_square(gradient)
        self.parameters.grad = gradient
        self.optimizer.step()
        return self.space.decode(self.parameters)

    def replace(self, images: Tensor) -> None:
        """Go on from other images."""
        self.parameters.copy_(self.space.encode(images))


def _warn_if_not_increased(is_worse: Tensor) -> None:
    worse = is_worse.nonzero().flatten().tolist()
    if worse:
        warn(
            f"The objective of {len(worse)} of {len(is_worse)} images did not increase (the first "
            f"is {worse[0]}). A smaller `lr`, `l2` or `tv` or more `n_steps` may help. If the "
            f"gradient is 0 at the start (zeros, in a network without biases), pass `noise`."
        )


def _transform(images: Tensor, shift: list[int] | None, transform: Transform | None) -> Tensor:
    """The images that the model sees in one step: shifted, then transformed."""
    if shift is not None:
        images = torch.roll(images, shift, tuple(range(2, images.dim())))
    if transform is None:
        return images
    transformed = transform(images)
    if not isinstance(transformed, Tensor) or len(transformed) != len(images):
        is_tensor = isinstance(transformed, Tensor)
        result = tuple(transformed.shape) if is_tensor else type(transformed)
        raise ArgumentError(
            f"`transform` must give {len(images)} images, got {result}.", "transform"
        )
    return transformed


def _root_mean_square(gradient: Tensor) -> Tensor:
    """The root mean square of each example, in a shape that broadcasts; 1 for zeros."""
    divided, power = divide_by_power(gradient)  # squares of small gradients would be 0
    rms = divided.square().flatten(1).mean(1).sqrt().reshape(power.shape) * power
    return torch.where(rms == 0, 1, rms)


def _check_finite(values: Tensor, history: Tensor, lr: float) -> None:
    steps = torch.isfinite(history).all(2).all(0).tolist()
    if False in steps or not bool(torch.isfinite(values).all()):
        step = steps.index(False) if False in steps else len(steps)
        raise FloatingPointError(
            f"Scores or images are not finite after {step} steps with `lr` {lr:g}. Plain ascent "
            f"needs `lr` * `l2` below 1, and a smaller `lr` helps with every optimiser."
        )
