"""Transforms of token layers (ViT, Swin) to maps (B, C, h, w)."""

from math import isqrt

from torch import Tensor

_MOST_PREFIX_TOKENS = 8  # a class token, a distillation token, registers


def tokens_to_grid(
    tokens: Tensor, *, grid: tuple[int, int] | None = None, prefix_tokens: int | None = None
) -> Tensor:
    """Arrange the patch tokens of a vision transformer on their grid, (B, C, h, w).

    The first `prefix_tokens` tokens (class token, registers) are dropped; the others are read row
    by row.

    Args:
        tokens: (B, T, C).
        grid: (h, w). None infers a square: the largest h with h * h <= T that leaves at most 8
            prefix tokens. It must be given for images that are not square, since the tokens do
            not tell.
        prefix_tokens: the number of tokens in front of the patches; None: T - h * w.

    Raises:
        ValueError: tokens of another shape, or a number of tokens that fits no grid.

    Use it as a layer method's `reshape_transform`, with `functools.partial` to set its options.

    Example:
        >>> import torch
        >>> tokens_to_grid(torch.zeros(2, 197, 768)).shape
        torch.Size([2, 768, 14, 14])
    """
    if tokens.dim() != 3:
        raise ValueError(f"`tokens` must have the shape (B, T, C), got {tuple(tokens.shape)}.")
    n = tokens.shape[1]
    if grid is None:
        side = isqrt(n if prefix_tokens is None else n - prefix_tokens)
        grid = (side, side)
    h, w = grid
    prefix = n - h * w if prefix_tokens is None else prefix_tokens
    if prefix + h * w != n or not 0 <= prefix <= max(_MOST_PREFIX_TOKENS, prefix_tokens or 0):
        raise ValueError(
            f"{n} tokens (shape {tuple(tokens.shape)}) are not {prefix_tokens or 'a few'} prefix "
            f"tokens and a {h} x {w} grid: pass `grid=(h, w)`, `prefix_tokens`, or both."
        )
    return tokens[:, prefix:].transpose(1, 2).reshape(len(tokens), -1, h, w)


def channels_last_to_first(activations: Tensor) -> Tensor:
    """Move the channels from the last dimension to dimension 1, for Swin and similar models.

    (B, h, w, C) becomes (B, C, h, w).

    Raises:
        ValueError: activations that do not have four dimensions.

    Example:
        >>> import torch
        >>> channels_last_to_first(torch.zeros(2, 7, 7, 768)).shape
        torch.Size([2, 768, 7, 7])
    """
    if activations.dim() != 4:
        raise ValueError(
            f"`activations` must have the shape (B, h, w, C), got {tuple(activations.shape)}."
        )
    return activations.permute(0, 3, 1, 2)
