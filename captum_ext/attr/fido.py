"""FIDO (Chang et al., ICLR 2019), with simplified concrete dropout (Korsch et al., 2023)."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from types import MappingProxyType
from typing import Any, Literal, TypedDict, Unpack, overload

import torch
from captum.attr import PerturbationAttribution
from torch import Generator, Tensor

from captum_ext._checks import (
    check_choice,
    check_count,
    check_generator,
    check_non_negative,
    check_positive,
    image_tensor,
)
from captum_ext._compat import (
    TargetType,
    TensorOrTupleOfTensors,
    _format_output,
    log_usage,
    with_progress,
)
from captum_ext._data.sizes import height_width
from captum_ext._engine.modules import Forward, Tensors
from captum_ext._engine.outputs import default_batch_size
from captum_ext._engine.precision import full_precision
from captum_ext._engine.state import preserve_state, set_inference_mode
from captum_ext._errors import ArgumentError, ArgumentTypeError
from captum_ext._repr import fields_repr
from captum_ext.attr._arguments import checks_arguments
from captum_ext.attr._concrete_dropout import DROPOUTS
from captum_ext.attr._log_odds import OUTPUTS
from captum_ext.attr._masked_scores import SDR, SSR, LogOddsScorer, MaskedScores, regulariser
from captum_ext.attr._method_info import Paper
from captum_ext.attr._mixin import AttributionMixin
from captum_ext.imaging import resize
from captum_ext.infill import Baselines, Infill, gaussian

OBJECTIVES = {"joint": (SSR, SDR), "ssr": (SSR,), "sdr": (SDR,)}
TV_NORMS: dict[str, Callable[[Tensor], Tensor]] = {"l1": torch.abs, "l2": torch.square}


@dataclass(frozen=True, eq=False)
class FIDOMasks:
    """FIDO's masks. The three maps are high where a pixel matters, and 1/2 without any evidence.

    Attributes:
        ssr: (N, 1, H, W), in [0, 1]: the probability that the smallest sufficient region keeps the
            pixel; None if `objective` left it out, as for the next two.
        sdr: (N, 1, H, W): the probability that the smallest destroying region contains the pixel.
        joint: (N, 1, H, W): sqrt(ssr * sdr), Eq. 9.
        logits: (N, 2, h, w), of the mask's own size: log-odds of the probability that the pixel is
            replaced, of SSR and of SDR; (N, 1, h, w) of the only objective.
        losses: (n_steps, N): the loss of each image, at the random masks of each step.
    """

    ssr: Tensor | None
    sdr: Tensor | None
    joint: Tensor | None
    logits: Tensor
    losses: Tensor

    def __repr__(self) -> str:
        return fields_repr(self)


class FIDOOptions(TypedDict, total=False):
    """The options of `FIDO.attribute` but `return_masks`, for a type checker."""

    objective: str
    n_steps: int
    n_masks: int
    dropout: str
    temperature: float
    l1: float
    tv: float
    tv_norm: str
    lr: float
    eps: float
    warmup: int
    mask_size: int | tuple[int, int] | None
    generator: Generator | None
    internal_batch_size: int | None
    show_progress: bool
    callback: Callable[[int, FIDOMasks], Any] | None


class FIDO(AttributionMixin, PerturbationAttribution):
    r"""FIDO: the pixels that suffice for the model's decision, and those that it needs.

    Each pixel is replaced by the infill with a probability theta = sigmoid(logit) of its own. The
    logits are learned by gradient descent through random masks z, drawn by (simplified) concrete
    dropout (z near 1: replaced). With :math:`x(z) = (1 - z) \odot x + z \odot \hat x` and the
    log-odds :math:`s_c = \log p_c - \log (1 - p_c)` (Eqs. 1 to 4, written for the probability of a
    replacement), the smallest sufficient region (SSR) and the smallest destroying region (SDR) are

    .. math::
        \theta_{SSR} &= \arg\min_\theta E_z[-s_c(x(z))]
            + w (\lambda_1 \textstyle\sum (1 - \theta) + \lambda_{TV} TV(\theta)) \\
        \theta_{SDR} &= \arg\min_\theta E_z[+s_c(x(z))]
            + w (\lambda_1 \textstyle\sum \theta + \lambda_{TV} TV(\theta))

    with w = 1 after a warm-up. The maps are 1 - theta of SSR, theta of SDR, and jointly their
    geometric mean (Eq. 9). The two problems are independent, and one run solves both. Each image of
    a batch has its own problem. All images share the random numbers, so each has the same result as
    in a run of its own, up to rounding (amplified by the l1 form of TV, whose slope jumps between
    equal neighbours).

    The sums are over pixels, and the learning rate is for logits that affect the score as the
    pixels of a 224-pixel image do: the defaults are meant for about that size. On much smaller
    masks, logits become large within a few steps. If the infill alone shows the class, no pixel is
    needed, and the masks are empty. This happens for the class that a network predicts for an
    empty image.

    **Temperature and weights.** The paper states t = 0.1 for both dropouts. The published code runs
    its simplified dropout at 1.0 and its original one at 0.1. The two dropouts are the same
    function; in float32 they differ only for \|logit\| beyond about 8. The temperature does make a
    difference. On forty pictures whose decisive part is known, joint masks of 100 steps with 8
    masks have an IoU with that part of 0.67 at t = 1 and of 0.62 at t = 0.1, with either dropout.
    At t = 1 they have 0.54 times the TV, and 2 masks do as well as 32. With the paper's `l1`, masks
    keep shrinking: the IoU is 0.57, against 0.67 with the published code's `l1`. Both defaults
    follow from these numbers. (`python -m tests.benchmarks.fido_ablation`; a mask of 56 x 56, with
    weights to match, has 0.71.)

    Named settings, for ``attribute(x, target=3, **{**FIDO.RELEASED, "n_steps": 30})``:

    - `FIDO.RELEASED`: the code published with the paper (its simplified dropout, at t = 1; for its
      original one add ``dropout="cd", temperature=0.1``): the defaults, except for a blur of 11.6
      pixels at any size of the image. Its log-odds are those above, as in the version of the
      paper's time; later versions of that code use log p/(2 - p).
    - `FIDO.PAPER`: the paper's text: t = 0.1, twice the `l1`, TV of squares, no warm-up. The text
      names no optimiser, so AdamW is kept.

    Args:
        forward_func: gives the scores of all classes: (B, K), (B, K, ...), or one logit of two
            classes, (B,) or (B, 1): target 1 or None is the class of the logit, 0 the other one.
        outputs: "logits" (log-probabilities also work), or "probabilities" of classes that exclude
            each other.

    Raises:
        ValueError: unknown `outputs`.

    Reference:
        Chang et al., "Explaining Image Classifiers by Counterfactual Generation",
        https://arxiv.org/abs/1807.08024. Korsch, Shadaydeh, Denzler, "Simplified Concrete Dropout -
        Improving the Generation of Attribution Masks for Fine-grained Classification",
        https://arxiv.org/abs/2307.14825

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from captum_ext.attr import FIDO
        >>> net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())
        >>> x = torch.rand(2, 3, 8, 8)
        >>> attributions, masks = FIDO(net).attribute(x, target=1, n_steps=2, return_masks=True)
        >>> attributions.shape, masks.ssr.shape, masks.losses.shape
        (torch.Size([2, 3, 8, 8]), torch.Size([2, 1, 8, 8]), torch.Size([2, 2]))
    """

    title = "FIDO"
    paper = Paper("Chang et al.", 2019, "https://arxiv.org/abs/1807.08024")
    family = "masking"
    passes = "1600"
    needs_gradients = True

    RELEASED: MappingProxyType[str, Any] = MappingProxyType(
        {
            "baselines": partial(gaussian, sigma=0.15 * 75 + 0.35, kernel_size=75),
            "n_steps": 100,
            "n_masks": 8,
            "dropout": "scd",
            "temperature": 1.0,
            "l1": 5e-4,
            "tv": 1e-2,
            "tv_norm": "l1",
            "lr": 10.0,
            "eps": 0.1,
            "warmup": 5,
        }
    )
    PAPER: MappingProxyType[str, Any] = MappingProxyType(
        {
            "n_steps": 100,
            "n_masks": 8,
            "dropout": "scd",
            "temperature": 0.1,
            "l1": 1e-3,
            "tv": 1e-2,
            "tv_norm": "l2",
            "lr": 10.0,
            "eps": 0.1,
            "warmup": 0,
        }
    )

    def __init__(self, forward_func: Forward, outputs: str = "logits") -> None:
        check_choice("outputs", outputs, OUTPUTS)
        super().__init__(forward_func)
        self.outputs = outputs

    @property
    def multiplies_by_inputs(self) -> bool:
        return False

    @overload
    def attribute(
        self,
        inputs: TensorOrTupleOfTensors,
        baselines: Baselines = ...,
        target: TargetType = ...,
        additional_forward_args: Any = ...,
        *,
        return_masks: Literal[False] = ...,
        **options: Unpack[FIDOOptions],
    ) -> TensorOrTupleOfTensors: ...
    @overload
    def attribute(
        self,
        inputs: TensorOrTupleOfTensors,
        baselines: Baselines = ...,
        target: TargetType = ...,
        additional_forward_args: Any = ...,
        *,
        return_masks: Literal[True],
        **options: Unpack[FIDOOptions],
    ) -> tuple[TensorOrTupleOfTensors, FIDOMasks]: ...
    @log_usage()
    @checks_arguments
    def attribute(
        self,
        inputs: Tensor | Tensors,
        baselines: Baselines = None,
        target: TargetType = None,
        additional_forward_args: Any = None,
        *,
        objective: str = "joint",
        n_steps: int = 100,
        n_masks: int = 8,
        dropout: str = "scd",
        temperature: float = 1.0,
        l1: float = 5e-4,
        tv: float = 1e-2,
        tv_norm: str = "l1",
        lr: float = 10.0,
        eps: float = 0.1,
        warmup: int = 5,
        mask_size: int | tuple[int, int] | None = None,
        generator: Generator | None = None,
        internal_batch_size: int | None = None,
        show_progress: bool = False,
        return_masks: bool = False,
        callback: Callable[[int, FIDOMasks], Any] | None = None,
    ) -> Any:
        """The map of each image, learned in `n_steps` steps with 2 `n_masks` masks each.

        Gradients are taken with respect to masks alone, also inside `no_grad` and
        `inference_mode`.

        Args:
            inputs: images (N, C, H, W), or a tuple of one such tensor.
            baselines: the infill: None or "blur", a number, a tensor, "mean", "zeros", "local",
                "noise", or a callable; see `captum_ext.infill.Infill`. `NoiseTunnel` knows None,
                numbers and tensors only.
            target: the class, as in Captum; one for each image.
            additional_forward_args: as in Captum. Tensors with an entry for each image are indexed
                by image; everything else is passed on unchanged.
            objective: "joint", "ssr" or "sdr". "ssr" or "sdr" alone takes half the time, and
                learns the same mask as in "joint".
            n_steps: steps of the optimisation. 100 (paper; 30 in its first figure).
            n_masks: random masks for each objective, image and step. 8 (paper).
            dropout: "scd", simplified concrete dropout, or "cd", the original.
            temperature: the temperature t of the dropout. 1.0 (published code; see above).
            l1: lambda_1, of each objective. 5e-4 (published code; 1e-3 in the paper).
            tv: lambda_TV. 1e-2 (paper).
            tv_norm: "l1", sums of absolute differences of neighbours (published code), or "l2", of
                squared ones (Eq. 10).
            lr: learning rate of AdamW, without weight decay. 10 (published code).
            eps: AdamW's epsilon. 0.1 (published code), which is so large that AdamW is nearly
                gradient descent with momentum.
            warmup: number of steps in which w grows: w = min(1, step / warmup), with steps counted
                from 0. 5 (published code).
            mask_size: (h, w), or one number for both: masks are drawn at this size and upsampled
                bilinearly, and `l1` and `tv` sum over its pixels. None is the image's size. On a
                GPU the gradient of the upsampling is not deterministic.
            generator: of all random numbers; None takes torch's global one. The images of a batch
                share the numbers.
            internal_batch_size: masked images in one pass of the model. None is 16 on a CPU and 64
                elsewhere. Memory beyond such a pass grows only with the images (logits, infill).
            show_progress: whether to draw a progress bar.
            return_masks: whether to return also the masks of all objectives.
            callback: called after each step, with the number of steps so far and the current masks.

        Returns:
            The map of `objective`, of the inputs' shape and dtype, equal in all channels, in
            [0, 1]; with `return_masks` a tuple of it and `FIDOMasks`, in float32 (float64 for
            inputs in float64).

        Raises:
            ValueError: inputs that are not images, not of floats or not finite; an option out of
                range; outputs that are no scores, not finite, or not differentiable.
            TypeError: an infill, a generator or a callback of another type.
            AssertionError: a target that does not select one class for each image, as in Captum.
        """
        images = image_tensor(inputs)
        _check_choices(objective=objective, dropout=dropout, tv_norm=tv_norm)
        _check_numbers(
            counts={"n_steps": n_steps, "n_masks": n_masks},
            positive={"temperature": temperature, "lr": lr, "eps": eps},
            non_negative={"l1": l1, "tv": tv, "warmup": warmup},
        )
        if internal_batch_size is None:
            internal_batch_size = default_batch_size(images.device)
        check_count("internal_batch_size", internal_batch_size)
        check_generator(generator, images.device)
        size = _checked_size(mask_size, images)
        if callback is not None and not callable(callback):
            raise ArgumentTypeError(f"`callback` must be callable or None, got {type(callback)}.")
        rows = OBJECTIVES[objective]
        with set_inference_mode(False), preserve_state(self.forward_func), torch.enable_grad():
            scorer = LogOddsScorer(
                self.forward_func, self.outputs, target, additional_forward_args, images
            )
            dropout_func = partial(DROPOUTS[dropout], temperature=temperature)
            infill = Infill(images, baselines)
            scores = MaskedScores(
                scorer, images, infill, dropout_func, rows, n_masks, internal_batch_size
            )
            penalty = partial(regulariser, rows=rows, l1=l1, tv=tv, difference=TV_NORMS[tv_norm])
            dtype = full_precision(images).dtype
            logits = torch.zeros(len(images), len(rows), *size, dtype=dtype, device=images.device)
            optimiser = torch.optim.AdamW([logits], lr=lr, eps=eps, weight_decay=0.0)
            losses = logits.new_zeros(n_steps, len(images))
            shape = (images.shape[2], images.shape[3])
            for step in with_progress(
                range(n_steps), show_progress, f"{self.get_name()} attribution"
            ):
                weight = min(1.0, step / warmup) if warmup else 1.0
                losses[step], logits.grad = _loss_and_gradient(
                    scores, penalty, logits, weight, generator
                )
                optimiser.step()
                if callback is not None:
                    n = step + 1
                    callback(n, _make_masks(logits.clone(), losses[:n].clone(), rows, shape))
        if not bool(torch.isfinite(logits).all() & torch.isfinite(losses).all()):
            raise ArgumentError("`forward_func` gave scores or gradients that are not finite.")
        masks = _make_masks(logits.detach(), losses, rows, shape)
        maps: Tensor = getattr(masks, objective)
        repeated = maps.to(images.dtype).repeat(1, images.shape[1], 1, 1)
        attributions = _format_output(isinstance(inputs, tuple), (repeated,))
        return (attributions, masks) if return_masks else attributions


def _check_choices(**options: str) -> None:
    choices: dict[str, Any] = {"objective": OBJECTIVES, "dropout": DROPOUTS, "tv_norm": TV_NORMS}
    for name, value in options.items():
        check_choice(name, value, choices[name])


def _check_numbers(
    counts: dict[str, int], positive: dict[str, float], non_negative: dict[str, float]
) -> None:
    for name, count in counts.items():
        check_count(name, count)
    for name, value in positive.items():
        check_positive(name, value)
    for name, value in non_negative.items():
        check_non_negative(name, value)


def _loss_and_gradient(
    scores: MaskedScores,
    penalty: Callable[[Tensor], Tensor],
    logits: Tensor,
    weight: float,
    generator: Generator | None,
) -> tuple[Tensor, Tensor]:
    """The loss of each image (N,), and its gradient, (N, rows, h, w), for the logits."""
    values, gradient = scores(logits, generator)
    leaf = logits.clone().requires_grad_()
    penalties = weight * penalty(torch.sigmoid(leaf))
    (penalty_gradient,) = torch.autograd.grad(penalties.sum(), leaf)
    return values + penalties.detach(), gradient + penalty_gradient


@torch.no_grad()
def _make_masks(
    logits: Tensor, losses: Tensor, rows: tuple[int, ...], size: tuple[int, int]
) -> FIDOMasks:
    """The maps of the logits: the region that SSR keeps, the region that SDR hides, and both."""
    maps = {
        row: resize(
            torch.sigmoid(-logits[:, i : i + 1] if row == SSR else logits[:, i : i + 1]), size
        )
        for i, row in enumerate(rows)
    }
    ssr, sdr = maps.get(SSR), maps.get(SDR)
    joint = None if ssr is None or sdr is None else ssr.sqrt() * sdr.sqrt()
    return FIDOMasks(ssr, sdr, joint, logits, losses)


def _checked_size(mask_size: Any, images: Tensor) -> tuple[int, int]:
    height, width = images.shape[2:]
    size = (height, width) if mask_size is None else height_width("mask_size", mask_size)
    if size[0] > height or size[1] > width:
        raise ArgumentError(
            f"`mask_size` must be at most the image's {height} x {width}, got {mask_size!r}."
        )
    return size
