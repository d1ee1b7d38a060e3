"""The terms of FIDO's loss, and the gradient of the one that needs the model."""

import math
from collections.abc import Callable, Iterator
from itertools import islice
from typing import Any

import torch
from torch import Generator, Tensor

from captum_ext._checks import warn
from captum_ext._compat import TargetType, _format_additional_forward_args
from captum_ext._model import Forward, full_precision, one_target_each, without_autocast
from captum_ext.attr._concrete_dropout import draw_uniform
from captum_ext.attr._log_odds import log_odds
from captum_ext.imaging import resize
from captum_ext.infill import Infill

SSR, SDR = 0, 1
SCALE = 1024  # of fp16's loss in the backward pass: it has no numbers for a pixel's share


class Score:
    """Log-odds of the target for masked images.

    Args:
        forward_func: the model.
        outputs: "logits" or "probabilities".
        target: in any of Captum's forms, for all images.
        additional_forward_args: tensors with an entry for each image follow it, anything else is
            handed on.
        images: (N, C, H, W).

    Raises:
        AssertionError: targets that are not one for each image.
    """

    def __init__(
        self,
        forward_func: Forward,
        outputs: str,
        target: TargetType,
        additional_forward_args: Any,
        images: Tensor,
    ) -> None:
        self.forward_func, self.outputs, self.n_images = forward_func, outputs, len(images)
        self.target = one_target_each(target, images)
        extra = _format_additional_forward_args(additional_forward_args) or ()
        # No graph may hold a tensor that inference_mode made.
        self.extra = [e.clone() if isinstance(e, Tensor) and e.is_inference() else e for e in extra]
        self.channels_last = not images.is_contiguous() and images.is_contiguous(
            memory_format=torch.channels_last
        )
        self.checked = False

    def __call__(self, composites: Tensor, examples: slice) -> Tensor:
        """Log-odds (n, p), of composites (n, p, C, H, W) of these examples."""
        n, p = composites.shape[:2]
        numbers = torch.arange(self.n_images, device=composites.device)
        each = numbers[examples].repeat_interleave(p)
        target = self.target
        if isinstance(target, Tensor):
            target = target[each]
        elif isinstance(target, list):
            target = [t for t in target[examples] for _ in range(p)]
        flat = composites.flatten(0, 1)
        if self.channels_last:
            flat = flat.contiguous(memory_format=torch.channels_last)
        output = self.forward_func(flat, *(self._of(each, e) for e in self.extra))
        if not isinstance(output, Tensor) or not output.is_floating_point():
            shown = output.dtype if isinstance(output, Tensor) else type(output)
            raise TypeError(f"`forward_func` must give a tensor of floats, got {shown}.")
        if output.dim() == 0 or len(output) != n * p:
            raise ValueError(
                f"`forward_func` must give scores for each of {n * p} images, got "
                f"{tuple(output.shape)}."
            )
        with without_autocast(output):
            odds = log_odds(output, target, self.outputs)
        if not self.checked:
            self._check(output.detach(), odds.detach())
        return odds.reshape(n, p)

    def _of(self, each: Tensor, value: Any) -> Any:
        is_each = isinstance(value, Tensor) and value.dim() > 0 and len(value) == self.n_images
        return value[each.to(value.device)] if is_each else value

    def _check(self, output: Tensor, odds: Tensor) -> None:
        """Look at the first values; to look at all would wait for the device each time."""
        self.checked = True
        if not bool(torch.isfinite(odds).all()):
            raise ValueError("`forward_func` gives scores that are not finite.")
        of_shares = bool(((output >= 0) & (output <= 1 + 1e-3)).all())
        if self.outputs == "probabilities" and not of_shares:
            raise ValueError(
                "`outputs` is 'probabilities', but `forward_func` gives values beyond [0, 1]."
            )
        if self.outputs == "logits" and of_shares and output.dim() > 1 and output.shape[1] > 1:
            sums = full_precision(output).sum(1)
            if bool(((sums - 1).abs() < 1e-3).all()):
                warn(
                    "`outputs` is 'logits', but what `forward_func` gives looks like "
                    "probabilities: say outputs='probabilities'."
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
        internal_batch_size: the most composites in one pass. Passes are made about equal.
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
        n_planes = n_masks * len(rows)
        self.images_at_once = _evenly(len(images), internal_batch_size)
        self.planes_at_once = _evenly(n_planes, internal_batch_size // len(images))
        kind = full_precision(images).dtype
        signs = torch.tensor([-1.0 if row == SSR else 1.0 for row in rows], dtype=kind)
        self.signs = signs.repeat(n_masks).to(images.device)

    def __call__(self, logits: Tensor, generator: Generator | None) -> tuple[Tensor, Tensor]:
        """The term of each image (N,), and its gradient by the logits (N, rows, h, w)."""
        total, gradient = torch.zeros_like(logits[:, 0, 0, 0]), torch.zeros_like(logits)
        self.infill.draw(generator)
        planes, first = self._planes(logits, generator), 0
        while some := list(islice(planes, self.planes_at_once)):
            uniform = torch.stack([u for _, u in some])
            signs = self.signs[first : first + len(some)]
            first += len(some)
            for start in range(0, len(self.images), self.images_at_once):
                examples = slice(start, start + self.images_at_once)
                leaf = logits[examples].detach().requires_grad_()
                by_row = leaf.unbind(1)
                z = self.sample(torch.stack([by_row[row] for row, _ in some], 1), uniform)
                odds = self.score(self._composites(examples, z), examples) * signs
                gradient[examples] += self._gradient(odds, leaf)
                total[examples] += odds.detach().sum(1)
        return total / self.n_masks, gradient / self.n_masks

    def _planes(self, logits: Tensor, generator: Generator | None) -> Iterator[tuple[int, Tensor]]:
        """One mask's noise (h, w) after the other; that of both objectives is always drawn."""
        size = (logits.shape[2], logits.shape[3])
        for _ in range(self.n_masks):
            both = draw_uniform((2, *size), logits, generator)
            for i, row in enumerate(self.rows):
                yield i, both[row]

    def _composites(self, examples: slice, z: Tensor) -> Tensor:
        """X kept where z is 0 and replaced where it is 1: (n, p, C, H, W)."""
        x = self.images[examples, None]
        keep = 1 - resize(z, x.shape[3:])[:, :, None].to(x.dtype)
        fill = self.infill(examples, keep)
        return torch.addcmul(fill, keep, x - fill)

    def _gradient(self, odds: Tensor, leaf: Tensor) -> Tensor:
        """The gradient of the sum of `odds`, by the logits alone."""
        kind = self.images.device.type
        autocast = torch.is_autocast_enabled(kind) and torch.get_autocast_dtype(kind)
        scale = SCALE if torch.float16 in (self.images.dtype, autocast) else 1
        found: Tensor | None = None
        if odds.requires_grad:
            again = scale > 1
            (found,) = torch.autograd.grad(
                odds.sum() * scale, leaf, allow_unused=True, retain_graph=again
            )
            if again and found is not None and not bool(torch.isfinite(found).all()):
                scale = 1
                (found,) = torch.autograd.grad(odds.sum(), leaf)
        if found is None:
            raise ValueError(
                "`forward_func` gives scores that have no gradient with respect to its input."
            )
        return found / scale


def regulariser(
    theta: Tensor,
    rows: tuple[int, ...],
    l1: float,
    tv: float,
    difference: Callable[[Tensor], Tensor],
) -> Tensor:
    """What sizes and edges add to the loss of each image: (N,), of theta (N, rows, h, w)."""
    by_row = zip(rows, theta.unbind(1), strict=True)
    size = sum((1 - t if row == SSR else t).sum((1, 2)) for row, t in by_row)
    down = difference(theta[..., 1:, :] - theta[..., :-1, :]).sum((1, 2, 3))
    right = difference(theta[..., 1:] - theta[..., :-1]).sum((1, 2, 3))
    return l1 * size + tv * (down + right)


def _evenly(count: int, most: int) -> int:
    """The size of as few chunks of at most `most` as there can be, about equal."""
    return math.ceil(count / math.ceil(count / max(most, 1)))
