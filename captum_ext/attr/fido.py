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
    check_images,
    check_size,
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
from captum_ext._engine.state import preserve_state
from captum_ext.attr._concrete_dropout import DROPOUTS
from captum_ext.attr._log_odds import OUTPUTS
from captum_ext.attr._masked_scores import SDR, SSR, LogOddsScorer, MaskedScores, regulariser
from captum_ext.attr._method_info import Paper
from captum_ext.attr._named import Named
from captum_ext.imaging import resize
from captum_ext.infill import Baselines, Infill, gaussian

OBJECTIVES = {"joint": (SSR, SDR), "ssr": (SSR,), "sdr": (SDR,)}
TV_NORMS: dict[str, Callable[[Tensor], Tensor]] = {"l1": torch.abs, "l2": torch.square}


@dataclass(frozen=True, eq=False)
class FIDOMasks:
    """What FIDO found. All three maps are high where it matters, and 1/2 where nothing is known.

    Attributes:
        ssr: (N, 1, H, W), in [0, 1]: the probability that the smallest sufficient region keeps the
            pixel; None if it was not asked for, as for the next two.
        sdr: (N, 1, H, W): the probability that the smallest destroying region takes it.
        joint: (N, 1, H, W): sqrt(ssr * sdr), Eq. 9.
        logits: (N, 2, h, w), of the mask's own size: log-odds of the probability that the pixel is
            replaced, of SSR and of SDR; (N, 1, h, w) of the one that was asked for.
        losses: (n_steps, N): the loss of each image, at the random masks of that step.
    """

    ssr: Tensor | None
    sdr: Tensor | None
    joint: Tensor | None
    logits: Tensor
    losses: Tensor


class FIDOOptions(TypedDict, total=False):
    """The options of `FIDO.attribute`, for a type checker; `return_masks` decides what it gives."""

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


class FIDO(Named, PerturbationAttribution):
    r"""FIDO: which pixels suffice for the model's decision, and which does it need?

    Each pixel is replaced by the infill with a probability theta = sigmoid(logit) of its own, and
    the logits are learned by gradient descent through random masks z, drawn by (simplified)
    concrete dropout (z near 1: replaced). With :math:`x(z) = (1 - z) \odot x + z \odot \hat x` and
    the log-odds :math:`s_c = \log p_c - \log (1 - p_c)` (Eqs. 1 to 4, written for the probability
    of a replacement), the smallest sufficient and the smallest destroying region are

    .. math::
        \theta_{SSR} &= \arg\min_\theta E_z[-s_c(x(z))]
            + w (\lambda_1 \textstyle\sum (1 - \theta) + \lambda_{TV} TV(\theta)) \\
        \theta_{SDR} &= \arg\min_\theta E_z[+s_c(x(z))]
            + w (\lambda_1 \textstyle\sum \theta + \lambda_{TV} TV(\theta))

    with w = 1 after a warm-up. The maps are 1 - theta of SSR, theta of SDR, and jointly their
    geometric mean (Eq. 9). The two problems share nothing, and one run solves both. In a batch,
    each image has its own problem, with the same random numbers, and the result of a run by itself,
    up to rounding (which the l1 form of TV, whose slope jumps between equal neighbours, amplifies).

    The sums are over pixels, and the learning rate is for logits that weigh on the score as the
    pixels of a 224-pixel image do: these numbers mean what they meant at about that size. On much
    smaller masks logits become large within a few steps. Where the infill alone has the class, as
    it has for the class that a network answers when it sees nothing, no pixel is needed: the masks
    of such images are empty.

    **Temperature and weights.** The paper says that t = 0.1 for both dropouts. The published code
    runs its simplified one at 1.0 and its original one at 0.1. The two are one function; in float32
    they differ where \|logit\| is beyond 8 or so. What differs is the temperature. On forty
    pictures whose decisive part is known, joint masks of 100 steps with 8 masks have at t = 1 an
    IoU with that part of 0.67, at t = 0.1 of 0.62, with either dropout; at t = 1 they have 0.54
    times the TV, and 2 masks do as well as 32. The published code's `l1` does better (0.67) than
    the paper's (0.57), at which masks go on shrinking. Both are the defaults for that. (`python -m
    tests.benchmarks.fido_ablation`; a mask of 56 x 56, with weights to match, has 0.71.)

    Named settings, for ``attribute(x, target=3, **{**FIDO.RELEASED, "n_steps": 30})``:

    - `FIDO.RELEASED`: the code published with the paper (its simplified dropout, at t = 1; for its
      original one add ``dropout="cd", temperature=0.1``): the defaults, but for a blur of 11.6
      pixels whatever the image's size. Its log-odds are those above, as in the version of the
      paper's time; later versions of that code fall back on log p/(2 - p).
    - `FIDO.PAPER`: the paper's text: t = 0.1, twice the `l1`, TV of squares, no warm-up. On the
      optimiser it is silent, so that is the same.

    Args:
        forward_func: gives the scores of all classes: (B, K), (B, K, ...), or one logit, (B,) or
            (B, 1), whose target 1 or None is the class that it speaks for and 0 the other.
        outputs: "logits" (log-probabilities are as good), or "probabilities" of classes that
            exclude each other.

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
        """The map of each image: `n_steps` of descent, each of 2 `n_masks` passes and backwards.

        Gradients are taken with respect to masks alone, also inside `no_grad` and
        `inference_mode`.

        Args:
            inputs: images (N, C, H, W), or a tuple of one such tensor.
            baselines: the infill: None or "blur", a number, a tensor, "mean", "zeros", "local",
                "noise", or a callable; see `captum_ext.infill.Infill`. `NoiseTunnel` knows None,
                numbers and tensors only.
            target: the class, as in Captum; one for each image.
            additional_forward_args: as in Captum. Tensors with an entry for each image follow
                it, all else is handed on as it is.
            objective: "joint", "ssr" or "sdr". One alone costs half, and is what it is in "joint".
            n_steps: of the optimisation. 100 (paper; 30 in its first figure).
            n_masks: random masks for each objective, image and step. 8 (paper).
            dropout: "scd", simplified concrete dropout, or "cd", the original.
            temperature: t of the dropout; see above.
            l1: lambda_1, of each objective. 5e-4 (published code; 1e-3 in the paper).
            tv: lambda_TV. 1e-2 (paper).
            tv_norm: "l1", sums of absolute differences of neighbours (published code), or "l2", of
                squared ones (Eq. 10).
            lr: of AdamW without decay of weights. 10 (published code).
            eps: of AdamW, large enough that it is nearly gradient descent with momentum. 0.1
                (published code).
            warmup: w = min(1, step / warmup), step from 0. 5 (published code).
            mask_size: (h, w), or one number for both: masks are drawn at this size and upsampled
                bilinearly, and `l1` and `tv` count its pixels. None is the image's. On a GPU the
                gradient of the upsampling is not deterministic.
            generator: of all random numbers; None takes torch's global one. They are shared by the
                images of a batch.
            internal_batch_size: masked images in one pass of the model. None is 16 on a CPU and 64
                elsewhere. Memory beyond a pass of so many grows with images only: logits, infill.
            show_progress: whether to draw a progress bar.
            return_masks: whether to give all masks too.
            callback: called with the number of steps done and the masks as they are, after each.

        Returns:
            The map asked for, of the inputs' shape and dtype, equal in all channels, in [0, 1];
            with `return_masks` a tuple of it and `FIDOMasks`, in float32 (float64 for inputs in
            float64).

        Raises:
            ValueError: inputs that are not images, not of floats or not finite; an option out of
                range; outputs that are no scores, not finite, or not differentiable.
            TypeError: an infill or a generator of another type.
            AssertionError: a target that does not select one class for each image, as in Captum.
        """
        images = check_images(inputs)
        _check_choices(objective=objective, dropout=dropout, tv_norm=tv_norm)
        _check_numbers(n_steps, n_masks, temperature=temperature, lr=lr, eps=eps)
        for name, value in (("l1", l1), ("tv", tv), ("warmup", warmup)):
            check_size(name, value)
        if internal_batch_size is None:
            internal_batch_size = default_batch_size(images.device)
        check_count("internal_batch_size", internal_batch_size)
        check_generator(generator, images.device)
        size = _checked_size(mask_size, images)
        rows = OBJECTIVES[objective]
        if callback is not None and not callable(callback):
            raise TypeError(f"`callback` must be callable or None, got {type(callback)}.")
        shape = (images.shape[2], images.shape[3])
        with torch.inference_mode(False), preserve_state(self.forward_func), torch.enable_grad():
            scores = MaskedScores(
                LogOddsScorer(
                    self.forward_func, self.outputs, target, additional_forward_args, images
                ),
                images,
                Infill(images, baselines),
                partial(DROPOUTS[dropout], temperature=temperature),
                rows,
                n_masks,
                internal_batch_size,
            )
            penalty = partial(regulariser, rows=rows, l1=l1, tv=tv, difference=TV_NORMS[tv_norm])
            kind = full_precision(images).dtype
            logits = torch.zeros(len(images), len(rows), *size, dtype=kind, device=images.device)
            optimiser = torch.optim.AdamW([logits], lr=lr, eps=eps, weight_decay=0.0)
            losses = logits.new_zeros(n_steps, len(images))
            steps = with_progress(range(n_steps), show_progress, f"{self.get_name()} attribution")
            for step in steps:
                weight = min(1.0, step / warmup) if warmup else 1.0
                values, gradient = scores(logits, generator)
                penalties, shrinking = _with_gradient(penalty, logits, weight)
                logits.grad = gradient + shrinking
                losses[step] = values + penalties
                optimiser.step()
                if callback is not None:
                    done = step + 1
                    callback(done, _masks(logits.clone(), losses[:done].clone(), rows, shape))
        if not bool(torch.isfinite(logits).all() & torch.isfinite(losses).all()):
            raise ValueError("`forward_func` gave scores or gradients that are not finite.")
        masks = _masks(logits.detach(), losses, rows, shape)
        found = {"joint": masks.joint, "ssr": masks.ssr, "sdr": masks.sdr}[objective]
        assert found is not None
        whole = found.to(images.dtype).repeat(1, images.shape[1], 1, 1)
        attributions = _format_output(isinstance(inputs, tuple), (whole,))
        return (attributions, masks) if return_masks else attributions


def _check_choices(**options: str) -> None:
    choices: dict[str, Any] = {"objective": OBJECTIVES, "dropout": DROPOUTS, "tv_norm": TV_NORMS}
    for name, value in options.items():
        check_choice(name, value, choices[name])


def _check_numbers(n_steps: int, n_masks: int, **positive: float) -> None:
    check_count("n_steps", n_steps)
    check_count("n_masks", n_masks)
    for name, value in positive.items():
        check_size(name, value, positive=True)


def _with_gradient(
    penalty: Callable[[Tensor], Tensor], logits: Tensor, weight: float
) -> tuple[Tensor, Tensor]:
    """The weighted penalties of the probabilities (N,), and their gradient by the logits."""
    leaf = logits.clone().requires_grad_()
    penalties = weight * penalty(torch.sigmoid(leaf))
    (gradient,) = torch.autograd.grad(penalties.sum(), leaf)
    return penalties.detach(), gradient


@torch.no_grad()
def _masks(
    logits: Tensor, losses: Tensor, rows: tuple[int, ...], size: tuple[int, int]
) -> FIDOMasks:
    """The importance maps of drop logits: what SSR keeps, what SDR drops, and both."""
    found = {
        row: resize(
            torch.sigmoid(-logits[:, i : i + 1] if row == SSR else logits[:, i : i + 1]), size
        )
        for i, row in enumerate(rows)
    }
    ssr, sdr = found.get(SSR), found.get(SDR)
    joint = None if ssr is None or sdr is None else ssr.sqrt() * sdr.sqrt()
    return FIDOMasks(ssr, sdr, joint, logits, losses)


def _checked_size(mask_size: Any, images: Tensor) -> tuple[int, int]:
    height, width = images.shape[2:]
    size = (height, width) if mask_size is None else height_width("mask_size", mask_size)
    if size[0] > height or size[1] > width:
        raise ValueError(
            f"`mask_size` must be at most the image's {height} x {width}, got {mask_size!r}."
        )
    return size
