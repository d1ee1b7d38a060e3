"""Activation maximisation (Simonyan, Vedaldi, Zisserman, ICLR workshop 2014)."""

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Generator, Tensor
from torch.nn import Module

from captum_ext._checks import check_choice, check_count, check_generator, check_size, warn
from captum_ext._compat import TargetType, with_progress
from captum_ext._data.pixels import mean_and_std
from captum_ext._engine.modules import Forward, find_module, root_module
from captum_ext._engine.state import preserve_state, seeded_random
from captum_ext.features._parametrizations import Fourier, Pixels
from captum_ext.features._starts import (
    Drawn,
    channels,
    checked_start,
    pictures,
)
from captum_ext.features._unit_scores import UnitScores
from captum_ext.infill import gaussian

Transform = Callable[[Tensor], Tensor]

LOOK = 32  # steps from one look at whether all is finite to the next: it waits for the device


OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "adam": torch.optim.Adam,
    "normalized": torch.optim.SGD,
    "gradient": torch.optim.SGD,
}
PARAMETRIZATIONS = ("fourier", "pixel")


@dataclass(frozen=True, eq=False)
class PreferredInputs:
    """What activation maximisation found, on the model's device, for each of B targets.

    Scores and objectives are of the images as they are, without jitter or other transformations.

    Attributes:
        images: (B, C, *spatial), what the model takes, in float32 (float64 for models in float64).
        pictures: the same in [0, 1], to be shown: the normalisation undone; where none was given,
            0 is mid-grey and the largest magnitude of each image is black or white.
        scores_before: (B,), S of the images at the start.
        scores: (B,), S at the end.
        objectives_before: (B,), S less the penalties, at the start.
        objectives: (B,), at the end.
        score_history: (n_steps, B), S before each step, of the images as transformed in that step.
        objective_history: (n_steps, B), these less the penalties.
    """

    images: Tensor
    pictures: Tensor
    scores_before: Tensor
    scores: Tensor
    objectives_before: Tensor
    objectives: Tensor
    score_history: Tensor
    objective_history: Tensor


class ActivationMaximization:
    r"""The images that most excite a class, or a unit of a layer.

    With S the class's logit, before any softmax, which could also grow by shrinking the others,

    .. math::
        I^* = \arg\max_I \; S(I) - \lambda \|I\|_2^2 - \lambda_{TV} TV(I)

    is found by gradient ascent on the image, from zeros, the mean colour of normalised images. Of
    plain ascent (``optimizer="gradient", parametrization="pixel"``) without TV a step is

    .. math::
        I \leftarrow I + \eta \, (\partial S / \partial I - 2 \lambda I)

    (Some slides print S + lambda \|I\|^2. That is a slip of the sign: it has no maximum.) For a
    linear S = v . I + b, :math:`I^* = v / (2 \lambda)` with the value
    :math:`\|v\|^2 / (4 \lambda) + b`, and a step multiplies the error by
    :math:`1 - 2 \eta \lambda`: plain ascent converges for 0 < eta < 1 / lambda, and not beyond.

    Of a unit of a layer, S is its activation A_k(i, j), or the mean of the channel A_k; the model
    is run up to that layer only. A batch has an image for each target, and each is what it would be
    alone.

    **Defaults.** On an EfficientNet-lite0, 128 pixels, eight classes, 256 steps, each of which has
    a probability of 1.000 in the end: moved by their Fourier coefficients, images reach a mean
    logit of 65.5, and the classes keep a probability of 0.91 where the images are blurred by 2
    pixels; moved by their pixels, 59.3 and 0.41. Without the blur between steps it is 66.8 and
    0.23, of pixels 63.0 and 0.11: fine patterns, which no object has. Without jitter it is 91.4,
    but 28.6 where the images are shifted by some pixels. (`python -m
    tests.benchmarks.activation_maximization`.) Units of early layers, which look for fine patterns,
    have higher and cleaner images by pixels.

    Args:
        forward_func: the model; it gives logits, classes in dimension 1.
        layer: the module, or its dotted name, whose units are looked at; None looks at the model's
            output. It puts out (B, K) or (B, K, ...), and runs once.
        normalize: (mean, std) of each channel, by which the model's inputs are made of pictures in
            [0, 1]. With it, images stay within what pictures can be, and are given as pictures too.
        reshape_transform: turns what the layer gives into (B, K, ...), for layers whose channels
            are elsewhere; see `captum_ext.attr.tokens_to_grid`. Without one, targets of a
            transformer's layer (B, T, C) are its tokens.

    Raises:
        ValueError: a layer that is not in the model; a `normalize` that is none.
        TypeError: a layer, or a `reshape_transform`, of another type.

    Reference:
        Simonyan, Vedaldi, Zisserman, "Deep Inside Convolutional Networks: Visualising Image
        Classification Models and Saliency Maps", https://arxiv.org/abs/1312.6034

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from captum_ext.features import ActivationMaximization
        >>> net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())
        >>> found = ActivationMaximization(net).maximize((3, 16, 16), target=[0, 2], n_steps=8)
        >>> found.images.shape, bool((found.scores > found.scores_before).all())
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
            raise TypeError(f"`reshape_transform` must be callable, got {reshape_transform!r}.")
        self.reshape_transform = reshape_transform

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
        r"""Climb from the start: `n_steps` passes through the model and back.

        Parameters get no gradient, and need none; it works inside `no_grad` and `inference_mode`.

        Args:
            start: the shape of an image, (C, \*spatial), to start from zeros on the device of the
                model's parameters; or images (B, C, \*spatial) to start from, which are not
                changed; one image is repeated for several targets.
            target: of the output, as in Captum: one class for each image. Of a layer, an integer k
                is the mean of channel k, a tuple (k, i, j) one unit, a shorter one or one with
                slices the mean of what it leaves; a list or a tensor has one for each image; and a
                callable makes (B,) of the layer's output. Where the start is a shape or one image,
                a list or tensor of N targets makes N images.
            additional_forward_args: as in Captum.
            n_steps: of the ascent. 256.
            optimizer: "adam"; "normalized", the gradient over its root mean square, so that
                what each step moves has that of `lr`; "gradient", which is plain; or a callable
                that makes a `torch.optim.Optimizer` of a list of tensors, with its own `lr`.
            lr: eta. 0.02, for the first two; plain ascent needs one that goes with the scores.
            parametrization: what the optimiser moves: "fourier", the frequencies of the image,
                weighted by 1 / \|f\|, or "pixel". "fourier".
            l2: lambda, of the sum of squares of the image's numbers. 1e-4.
            tv: lambda_TV, of the sum of absolute differences of neighbours; images (2D) only. 0.
            noise: standard deviation of Gaussian noise on the start, the same for all images. 0. A
                network without biases, and one that was never trained, has no gradient at zeros.
            jitter: the largest shift, in pixels along each dimension, by which the images are
                moved in each step before the model sees them (what leaves comes in at the other
                side); the same for all images. 8; 0 does not move them.
            blur_every: after so many steps the images are blurred, but for the last. 4; 0 never.
            blur_sigma: of that blur, in pixels. 0.5.
            transform: what else becomes of the images in each step before the model sees them: a
                callable of (B, C, \*spatial), such as a module of `kornia.augmentation`, with
                ``same_on_batch=True`` if a batch is to equal its images alone.
            clip: whether images stay within what normalised pictures can be, if `normalize` was
                given.
            generator: of all random numbers, also those of `transform`; None takes torch's global
                one.
            show_progress: whether to draw a progress bar.

        Returns:
            Images, scores before and after, and their history. There is a warning where an
            objective did not increase.

        Raises:
            ValueError: a start or an option out of range; scores that are not finite at the start,
                not one for each image, or that do not depend on it.
            TypeError: a start, a transform, an optimiser or a generator of another type.
            FloatingPointError: images or scores that are no longer finite, with the step and `lr`.
            AssertionError: a target that does not select one score for each image, as in Captum.
        """
        _check_counts(n_steps=n_steps, jitter=jitter, blur_every=blur_every)
        for name, value in (("lr", lr), ("blur_sigma", blur_sigma)):
            check_size(name, value, positive=True)
        for name, value in (("l2", l2), ("tv", tv), ("noise", noise)):
            check_size(name, value)
        check_choice("parametrization", parametrization, PARAMETRIZATIONS)
        if not callable(optimizer):
            check_choice("optimizer", optimizer, OPTIMIZERS)
        if transform is not None and not callable(transform):
            raise TypeError(f"`transform` must be callable or None, got {type(transform)}.")
        start, kind = checked_start(start, target, root_module(self.forward_func) or self.layer)
        if tv and start.dim() != 4:
            raise ValueError(f"`tv` is for images (B, C, H, W), got {tuple(start.shape)}.")
        check_generator(generator, start.device)
        mean, std = channels(self.normalize, start)
        is_limited = clip and self.normalize is not None

        def limited(x: Tensor) -> Tensor:
            return x.clamp(-mean / std, (1 - mean) / std) if is_limited else x

        penalties = partial(_penalties, l2=l2, tv=tv)
        steps = with_progress(range(n_steps), show_progress, "Activation maximization")
        with ExitStack() as stack:
            stack.enter_context(torch.inference_mode(False))
            stack.enter_context(preserve_state(self.forward_func))
            stack.enter_context(torch.enable_grad())
            drawn = Drawn(start, generator)
            images = limited(start + noise * drawn.normal() if noise else start.clone())
            shifts = drawn.shifts(n_steps, jitter) if jitter else None
            if transform is not None and generator is not None:
                stack.enter_context(seeded_random(start.device, drawn.seed()))
            scores = UnitScores(
                self.forward_func, self.layer, self.reshape_transform, target,
                additional_forward_args, images, kind,
            )  # fmt: skip
            before = scores.whole_pass(images)
            if not bool(torch.isfinite(before).all()):
                raise ValueError("`forward_func` gives scores that are not finite at the start.")
            objectives_before = before - penalties(images)
            space = Fourier(images) if parametrization == "fourier" else Pixels()
            parameters = space.encode(images)
            ascent = _made(optimizer, parameters, lr)
            history = before.new_zeros(2, n_steps, len(images))
            for step in steps:
                shift = None if shifts is None else shifts[step]
                view = partial(_view, shift=shift, transform=transform)
                score, gradient = scores.with_gradient(images, view)
                penalty, shrinking = _with_gradient(penalties, images)
                history[:, step] = torch.stack((score, score - penalty))
                descent = space.gradient(shrinking - gradient)
                if optimizer == "normalized":
                    descent = descent / _root_mean_square(descent)
                parameters.grad = descent
                ascent.step()
                images = space.decode(parameters)
                is_blurred = blur_every and (step + 1) % blur_every == 0 and step + 1 < n_steps
                if is_blurred or is_limited:
                    images = limited(gaussian(images, blur_sigma) if is_blurred else images)
                    parameters.copy_(space.encode(images))
                if step % LOOK == 0 or step + 1 == n_steps:
                    _check_finite(images, history[:, : step + 1], lr)
            after = scores.whole_pass(images)
            objectives = after - penalties(images)
            shown = pictures(images, self.normalize)
        _check_finite(after, history, lr)
        _warn_of_descents(objectives <= objectives_before)
        return PreferredInputs(
            images, shown, before, after, objectives_before, objectives, *history.unbind()
        )


def _check_counts(n_steps: int, **or_none: int) -> None:
    check_count("n_steps", n_steps)
    for name, count in or_none.items():
        if count != 0 or isinstance(count, bool):
            check_count(name, count)


def _made(optimizer: Any, parameters: Tensor, lr: float) -> torch.optim.Optimizer:
    if not callable(optimizer):
        return OPTIMIZERS[optimizer]([parameters], lr=lr)
    made = optimizer([parameters])
    if not isinstance(made, torch.optim.Optimizer):
        raise TypeError(f"`optimizer` must make a torch.optim.Optimizer, got {type(made)}.")
    return made


def _penalties(images: Tensor, l2: float, tv: float) -> Tensor:
    """The terms lambda ||I||^2 + lambda_TV TV(I) of each image."""
    from kornia.losses import total_variation

    of_size = l2 * images.square().flatten(1).sum(1)
    return of_size + tv * total_variation(images).sum(1) if tv else of_size


def _warn_of_descents(is_worse: Tensor) -> None:
    worse = is_worse.nonzero().flatten().tolist()
    if worse:
        warn(
            f"The objective of {len(worse)} of {len(is_worse)} images did not increase (the first "
            f"is {worse[0]}). A smaller `lr`, `l2` or `tv` or more `n_steps` may help, and `noise` "
            f"where the start itself has no gradient, as zeros in a network without biases."
        )


def _view(images: Tensor, shift: list[int] | None, transform: Transform | None) -> Tensor:
    """The images as the model sees them in one step."""
    if shift is not None:
        images = torch.roll(images, shift, tuple(range(2, images.dim())))
    if transform is None:
        return images
    seen = transform(images)
    if not isinstance(seen, Tensor) or len(seen) != len(images):
        shown = tuple(seen.shape) if isinstance(seen, Tensor) else type(seen)
        raise ValueError(f"`transform` must give {len(images)} images, got {shown}.")
    return seen


def _with_gradient(function: Transform, images: Tensor) -> tuple[Tensor, Tensor]:
    leaf = images.detach().requires_grad_()
    values = function(leaf)
    (gradient,) = torch.autograd.grad(values.sum(), leaf)
    return values.detach(), gradient


def _root_mean_square(gradient: Tensor) -> Tensor:
    """Of each image; 1 where all is 0."""
    rms = gradient.square().flatten(1).mean(1).sqrt()
    return torch.where(rms == 0, 1, rms).reshape(-1, *[1] * (gradient.dim() - 1))


def _check_finite(values: Tensor, history: Tensor, lr: float) -> None:
    steps = torch.isfinite(history).all(2).all(0).tolist()
    if False in steps or not bool(torch.isfinite(values).all()):
        step = steps.index(False) if False in steps else len(steps)
        raise FloatingPointError(
            f"Scores or images are not finite after {step} steps with `lr` {lr:g}: plain ascent "
            f"needs `lr` * `l2` below 1, and all are safer with a smaller `lr`."
        )
