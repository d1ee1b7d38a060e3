"""The terms of FIDO's loss, and the gradient of the one that needs the model."""

import warnings
from collections.abc import Callable, Iterator
from itertools import islice
from typing import Any

import torch
from torch import Generator, Tensor

from captum_ext._compat import (
    ExpansionTypes,
    TargetType,
    _expand_additional_forward_args,
    _expand_target,
    _format_additional_forward_args,
)
from captum_ext._model import Forward, full_precision, without_autocast
from captum_ext.attr._concrete_dropout import draw_uniform
from captum_ext.attr._log_odds import log_odds
from captum_ext.imaging import resize
from captum_ext.infill import Infill

SSR, SDR = 0, 1


class Score:
    """Log-odds of the target, for some of the images, each under several masks."""

    def __init__(
        self, forward_func: Forward, outputs: str, target: TargetType, additional_forward_args: Any
    ) -> None:
        self.forward_func, self.outputs, self.target = forward_func, outputs, target
        self.extra = _format_additional_forward_args(additional_forward_args)
        self.checked = False

    def __call__(self, composites: Tensor, examples: slice, n_images: int) -> Tensor:
        """Log-odds (n, p), of composites (n, p, C, H, W) of the examples of `n_images`."""
        n, p = composites.shape[:2]
        repeat = ExpansionTypes.repeat_interleave
        target = _of_examples(self.target, examples, n_images)
        extra = self.extra and tuple(_of_examples(e, examples, n_images) for e in self.extra)
        args = _expand_additional_forward_args(extra, p, repeat)
        output = self.forward_func(composites.flatten(0, 1), *(args or ()))
        self._check(output, n * p)
        with without_autocast(output):
            return log_odds(output, _expand_target(target, p, repeat), self.outputs).reshape(n, p)

    def _check(self, output: Any, count: int) -> None:
        """Refuse what is no score. Values are looked at once: it waits for the device."""
        if not isinstance(output, Tensor) or not output.is_floating_point():
            shown = output.dtype if isinstance(output, Tensor) else type(output)
            raise TypeError(f"`forward_func` must give a tensor of floats, got {shown}.")
        if output.dim() == 0 or len(output) != count:
            raise ValueError(
                f"`forward_func` must give scores for each of {count} images, got "
                f"{tuple(output.shape)}."
            )
        if not output.requires_grad:
            raise ValueError(
                "`forward_func` gives scores that have no gradient with respect to its input."
            )
        if self.checked:
            return
        self.checked = True
        values = output.detach()
        if bool(torch.isnan(values).any()):
            raise ValueError("`forward_func` gives scores that are not finite.")
        in_range = bool(((values >= 0) & (values <= 1)).all())
        if self.outputs == "probabilities" and not in_range:
            raise ValueError(
                "`outputs` is 'probabilities', but those that `forward_func` gives are not all in "
                "[0, 1]."
            )
        if self.outputs == "logits" and in_range and values.dim() > 1 and values.shape[1] > 1:
            sums = full_precision(values).sum(1)
            if bool(((sums - 1).abs() < 1e-3).all()):
                warnings.warn(
                    "`outputs` is 'logits', but what `forward_func` gives looks like "
                    "probabilities: say outputs='probabilities'.",
                    stacklevel=6,
                )


class MaskedScores:
    """What the score adds to the loss: -E[s] under the masks of SSR, +E[s] under those of SDR.

    Args:
        score: log-odds (n, p) of composites (n, p, C, H, W).
        images: (N, C, H, W).
        infill: what shows in the place of what is masked.
        sample: z of logits and uniform noise.
        rows: which of SSR and SDR.
        n_masks: for each.
        internal_batch_size: composites in one pass.
    """

    def __init__(
        self,
        score: Score,
        images: Tensor,
        infill: Infill,
        sample: Callable[[Tensor, Tensor], Tensor],
        rows: tuple[int, ...],
        n_masks: int,
        internal_batch_size: int,
    ) -> None:
        self.score, self.images, self.infill, self.sample = score, images, infill, sample
        self.rows, self.n_masks = rows, n_masks
        self.images_at_once = min(len(images), internal_batch_size)
        self.masks_at_once = max(1, internal_batch_size // len(images))

    def __call__(self, logits: Tensor, generator: Generator | None) -> tuple[Tensor, Tensor]:
        """The term of each image (N,), and its gradient by the logits (N, rows, h, w)."""
        n_images = len(self.images)
        total, gradient = logits.new_zeros(n_images), torch.zeros_like(logits)
        self.infill.draw(generator)
        noise = self._noise(logits, generator)
        while some := list(islice(noise, self.masks_at_once)):
            at = [self.rows.index(row) for row, _ in some]
            sign = logits.new_tensor([-1.0 if row == SSR else 1.0 for row, _ in some])
            uniform = torch.stack([u for _, u in some])
            for start in range(0, n_images, self.images_at_once):
                examples = slice(start, start + self.images_at_once)
                leaf = logits[examples].detach().requires_grad_()
                z = self.sample(leaf[:, at], uniform)
                composites = self._composites(examples, z)
                terms = self.score(composites, examples, n_images) * sign / self.n_masks
                gradient[examples] += torch.autograd.grad(terms.sum(), leaf)[0]
                total[examples] += terms.detach().sum(1)
        return total, gradient

    def _noise(self, logits: Tensor, generator: Generator | None) -> Iterator[tuple[int, Tensor]]:
        """A mask's noise (h, w) after the other; that of both objectives is always drawn."""
        size = (logits.shape[2], logits.shape[3])
        for _ in range(self.n_masks):
            both = draw_uniform((2, *size), logits, generator)
            for row in self.rows:
                yield row, both[row]

    def _composites(self, examples: slice, z: Tensor) -> Tensor:
        """X kept where z is 0 and replaced where it is 1: (n, p, C, H, W)."""
        x = self.images[examples, None]
        keep = 1 - resize(z, x.shape[3:])[:, :, None].to(x.dtype)
        fill = self.infill(examples, keep)
        return torch.addcmul(fill, keep, x - fill)


def regulariser(
    theta: Tensor,
    rows: tuple[int, ...],
    l1: float,
    tv: float,
    difference: Callable[[Tensor], Tensor],
) -> Tensor:
    """What sizes and edges add to the loss of each image: (N,), of theta (N, rows, h, w)."""
    kept = theta.new_tensor([row == SSR for row in rows])[:, None, None]
    size = (kept + (1 - 2 * kept) * theta).sum((1, 2, 3))  # 1 - theta of SSR, theta of SDR
    down = difference(theta[..., 1:, :] - theta[..., :-1, :]).sum((1, 2, 3))
    right = difference(theta[..., 1:] - theta[..., :-1]).sum((1, 2, 3))
    return l1 * size + tv * (down + right)


def _of_examples(value: Any, examples: slice, n_images: int) -> Any:
    """The part of a target or an argument that has an entry for each image."""
    is_list = isinstance(value, list) or (isinstance(value, Tensor) and value.dim() > 0)
    return value[examples] if is_list and len(value) == n_images else value
