"""The terms of FIDO's loss: the score under masks, with its gradient, and the penalty of masks."""

from collections.abc import Callable, Iterator
from itertools import islice
from typing import Any

import torch
from torch import Generator, Tensor

from captum_ext._checks import warn
from captum_ext._compat import TargetType
from captum_ext._engine.modules import Forward
from captum_ext._engine.outputs import Scorer, check_classes_first, even_chunk_size
from captum_ext._engine.precision import full_precision, gradient_of_sum, without_autocast
from captum_ext._engine.targets import check_on_host
from captum_ext._errors import ArgumentError
from captum_ext.attr._concrete_dropout import draw_uniform_noise
from captum_ext.attr._log_odds import log_odds
from captum_ext.imaging import resize
from captum_ext.infill import Infill

SSR, SDR = 0, 1


class LogOddsScorer:
    """Log-odds of the target for masked images.

    Args:
        forward_func: the model.
        outputs: "logits" or "probabilities".
        target: in any of Captum's forms, for all images.
        additional_forward_args: tensors with an entry for each image are indexed by image;
            everything else is passed on unchanged.
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
        self.outputs = outputs
        self.scorer = Scorer(
            forward_func, len(images), target, additional_forward_args, device=images.device
        )
        self.indices = torch.arange(len(images), device=images.device)
        self.channels_last = not images.is_contiguous() and images.is_contiguous(
            memory_format=torch.channels_last
        )
        self.image_dims, self.is_checked = images.dim(), False

    def __call__(self, composites: Tensor, examples: slice) -> Tensor:
        """The log-odds (n, p) of n images under p masks each, (n, p, C, H, W)."""
        n, p = composites.shape[:2]
        indices = self.indices[examples].repeat_interleave(p)
        flat = composites.flatten(0, 1)
        if self.channels_last:
            flat = flat.contiguous(memory_format=torch.channels_last)
        output = self.scorer.outputs((flat,), indices)
        if not self.is_checked:
            self._check_target(output)
        with without_autocast(output):
            targets = self.scorer.targets_for(indices)
            odds = log_odds(output, targets, self.outputs, is_checked=True)
        if not self.is_checked:
            self._check(output.detach(), odds.detach())
        return odds.reshape(n, p)

    def _check_target(self, output: Tensor) -> None:
        """Check once that the output has the targets of all images."""
        check_classes_first(output, self.image_dims, f"`outputs` {self.outputs!r}")
        if not output.is_cpu:
            n_classes = max(2, *output.shape[1:2])  # a single logit stands for two classes
            shape = (self.scorer.n_examples, n_classes, *output.shape[2:])
            check_on_host(shape, self.scorer.target)

    def _check(self, output: Tensor, odds: Tensor) -> None:
        """Check the first values only, because each check synchronises with the device."""
        self.is_checked = True
        if not bool(torch.isfinite(odds).all()):
            raise ArgumentError("`forward_func` gives scores that are not finite.")
        is_in_0_1 = bool(((output >= 0) & (output <= 1 + 1e-3)).all())
        if self.outputs == "probabilities" and not is_in_0_1:
            raise ArgumentError(
                "`outputs` is 'probabilities', but `forward_func` gives values beyond [0, 1]."
            )
        if self.outputs == "logits" and is_in_0_1 and output.dim() > 1 and output.shape[1] > 1:
            sums = full_precision(output).sum(1)
            if bool(((sums - 1).abs() < 1e-3).all()):
                warn(
                    "`outputs` is 'logits', but `forward_func` seems to give probabilities: pass "
                    "outputs='probabilities' if it does."
                )


class MaskedScores:
    """The score's term of the loss: -E[s] under the masks of SSR, +E[s] under those of SDR.

    Args:
        score: the log-odds (n, p) of n images under p masks each.
        images: (N, C, H, W).
        infill: of the replaced pixels.
        dropout: z from logits and uniform noise.
        rows: SSR, SDR or both.
        n_masks: of each.
        internal_batch_size: the most masked images in one pass. Passes have about equal sizes.
    """

    def __init__(
        self,
        score: LogOddsScorer,
        images: Tensor,
        infill: Infill,
        dropout: Callable[[Tensor, Tensor], Tensor],
        rows: tuple[int, ...],
        n_masks: int,
        internal_batch_size: int,
    ) -> None:
        self.score, self.images, self.infill, self.dropout = score, images, infill, dropout
        self.rows, self.n_masks = rows, n_masks
        n_all_masks = n_masks * len(rows)
        self.images_at_once = even_chunk_size(len(images), internal_batch_size)
        self.masks_at_once = even_chunk_size(n_all_masks, internal_batch_size // len(images))
        dtype = full_precision(images).dtype
        signs = [-1.0 if row == SSR else 1.0 for row in rows]
        self.signs = torch.tensor(signs * n_masks, dtype=dtype, device=images.device)

    def __call__(self, logits: Tensor, generator: Generator | None) -> tuple[Tensor, Tensor]:
        """The term of each image (N,), and its gradient, (N, rows, h, w), for the logits."""
        total, gradient = torch.zeros_like(logits[:, 0, 0, 0]), torch.zeros_like(logits)
        self.infill.draw(generator)
        noise, first = self._draw_noise(logits, generator), 0
        while chunk := list(islice(noise, self.masks_at_once)):
            uniform = torch.stack([u for _, u in chunk])
            signs = self.signs[first : first + len(chunk)]
            first += len(chunk)
            for start in range(0, len(self.images), self.images_at_once):
                examples = slice(start, start + self.images_at_once)
                leaf = logits[examples].detach().requires_grad_()
                by_row = leaf.unbind(1)
                z = self.dropout(torch.stack([by_row[row] for row, _ in chunk], 1), uniform)
                odds = self.score(self._composites(examples, z), examples) * signs
                gradient[examples] += gradient_of_sum(odds, leaf, self.images.dtype)
                total[examples] += odds.detach().sum(1)
        return total / self.n_masks, gradient / self.n_masks

    def _draw_noise(
        self, logits: Tensor, generator: Generator | None
    ) -> Iterator[tuple[int, Tensor]]:
        """Draw the noise (h, w) of each mask, and yield it after the mask's row.

        Noise is always drawn for both objectives.
        """
        size = (logits.shape[2], logits.shape[3])
        for _ in range(self.n_masks):
            both = draw_uniform_noise((2, *size), logits, generator)
            for i, row in enumerate(self.rows):
                yield i, both[row]

    def _composites(self, examples: slice, z: Tensor) -> Tensor:
        """The images (n, p, C, H, W), kept where z is 0 and replaced where it is 1."""
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
    """The penalty of the size and the edges of masks.

    Args:
        theta: (N, rows, h, w), probabilities of a replacement.
        rows: SSR, SDR or both.
        l1: the weight of the size.
        tv: the weight of the edges.
        difference: of the differences between neighbours, before they are summed.

    Returns:
        (N,).
    """
    by_row = zip(rows, theta.unbind(1), strict=True)
    size = sum((1 - t if row == SSR else t).sum((1, 2)) for row, t in by_row)
    down = difference(theta[..., 1:, :] - theta[..., :-1, :]).sum((1, 2, 3))
    right = difference(theta[..., 1:] - theta[..., :-1]).sum((1, 2, 3))
    return l1 * size + tv * (down + right)
