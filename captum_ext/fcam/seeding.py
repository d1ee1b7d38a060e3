"""Seeds: a few pixels of each image, labelled at random from a coarse map (F-CAM, Sec. 3)."""

import torch
from torch import Generator, Tensor
from torch.nn.functional import max_pool2d

from captum_ext._checks import check_count, check_generator, check_range

FOREGROUND, BACKGROUND, IGNORED = 1, 0, -255
LEVELS = 256


def otsu(levels: Tensor) -> Tensor:
    r"""Otsu's threshold of each image: the level that best parts its dark pixels from its bright.

    .. math:: T = \arg\max_t w_0(t) w_1(t) (m_0(t) - m_1(t))^2

    with the shares and means of the pixels at or below t and of those above; of several maxima, the
    first. It is computed from sums of integers, so that equal values are equal.

    Args:
        levels: (N, P), int64, in [0, 255].

    Returns:
        (N,), int64. Of an image of one level, 0.

    Example:
        >>> otsu(torch.tensor([[10, 12, 200, 210]]))
        tensor([12])
    """
    counts = levels.new_zeros(len(levels), LEVELS)
    counts.scatter_add_(1, levels, torch.ones_like(levels))
    below, mass = counts.cumsum(1), (counts * torch.arange(LEVELS, device=levels.device)).cumsum(1)
    above, all_mass = below[:, -1:] - below, mass[:, -1:]
    # n m_0 - w_0 n m = w_0 w_1 (m_0 - m_1), up to factors of n: exact, and then squared.
    apart = (below[:, -1:] * mass - below * all_mass).double()
    between = apart.square() / (below * above).clamp(min=1)
    return between.argmax(1)


def erosion_size(side: int) -> int:
    """The kernel of the erosion: 11 at a side of 224 pixels (official code), odd, in proportion.

    Example:
        >>> erosion_size(224), erosion_size(64), erosion_size(8)
        (11, 3, 1)
    """
    return 2 * max(round((11 * side / 224 - 1) / 2), 0) + 1


class SeedSampler:
    """Draws seeds from coarse maps: a few pixels each of what looks like object, and like none.

    Foreground pixels are drawn from those above Otsu's threshold, after an erosion of that region;
    background pixels from the share `n_minus` with the lowest values, where ties are broken at
    random. All of a region are equally likely. Both are then dilated, and what belongs to both is
    ignored. A map that is flat, or not finite, gives no seeds; nor does what a region lacks.

    Kornia's `erosion` and `dilation` with a flat kernel are max-pooling, which is used here: it is
    two orders of magnitude faster.

    Args:
        n_foreground: pixels of each image. 10 (1 in the paper).
        n_background: the same.
        n_minus: which share of the pixels may be background. 0.3 (paper: chosen from 0.1 to 0.7).
        kernel_size: of the dilation, odd, in pixels. 3 (official code).
        erosion: size of the erosion's kernel, odd, in pixels. None is `erosion_size` of the shorter
            side: 11 at 224 pixels (official code). A region that it would empty stays whole.

    Raises:
        ValueError: an argument out of range.

    Shape:
        - maps: (N, 1, H, W), in [0, 1].
        - seeds: (N, H, W), int64: 1 foreground, 0 background, -255 ignored.

    Reference:
        Belharbi et al., "F-CAM: Full Resolution Class Activation Maps via Guided Parametric
        Upscaling", WACV 2022, https://arxiv.org/abs/2109.07069

    Example:
        >>> maps = torch.linspace(0, 1, 64).reshape(1, 1, 8, 8)
        >>> seeds = SeedSampler(n_foreground=2, kernel_size=1)(maps)
        >>> (seeds == 1).sum(), (seeds == 0).sum()
        (tensor(2), tensor(10))
    """

    def __init__(
        self,
        n_foreground: int = 10,
        n_background: int = 10,
        n_minus: float = 0.3,
        kernel_size: int = 3,
        erosion: int | None = None,
    ) -> None:
        check_count("n_foreground", n_foreground)
        check_count("n_background", n_background)
        check_range("n_minus", n_minus, 0, 1)
        for name, size in (("kernel_size", kernel_size), ("erosion", erosion)):
            if size is not None:
                check_count(name, size)
                if size % 2 == 0:
                    raise ValueError(f"`{name}` must be odd, got {size}.")
        self.n_foreground, self.n_background, self.n_minus = n_foreground, n_background, n_minus
        self.kernel_size, self.erosion = kernel_size, erosion

    def __call__(self, maps: Tensor, generator: Generator | None = None) -> Tensor:
        """Draw the seeds.

        Args:
            maps: (N, 1, H, W), in [0, 1].
            generator: of the random numbers; None takes torch's global one.
        """
        is_map = maps.dim() == 4 and maps.shape[1] == 1 and maps.numel()
        if not is_map or not maps.is_floating_point():
            raise ValueError(
                f"`maps` must be (N, 1, H, W) of floats, got {tuple(maps.shape)}, {maps.dtype}."
            )
        check_generator(generator, maps.device)
        noise = torch.rand((3, len(maps), maps[0].numel()), generator=generator, device=maps.device)
        foreground, background = self.regions(maps, noise[0])
        chosen = [
            self._dilated(_draw(region, n, keys), maps)
            for region, n, keys in (
                (foreground, self.n_foreground, noise[1]),
                (background, self.n_background, noise[2]),
            )
        ]
        seeds = torch.full_like(chosen[0], IGNORED, dtype=torch.int64)
        seeds[chosen[0] & ~chosen[1]] = FOREGROUND
        seeds[chosen[1] & ~chosen[0]] = BACKGROUND
        return seeds

    def regions(self, maps: Tensor, ties: Tensor) -> tuple[Tensor, Tensor]:
        """What may be foreground and what may be background: (N, H * W), bool.

        Args:
            maps: (N, 1, H, W), in [0, 1].
            ties: (N, H * W), random numbers that break ties among the lowest values.
        """
        flat = maps.detach().float().flatten(1)
        usable = torch.isfinite(flat).all(1, keepdim=True)
        flat = torch.where(usable, flat, 0).clamp(0, 1)
        levels = (255 * flat).floor().long()
        usable = usable & (levels.amin(1, keepdim=True) < levels.amax(1, keepdim=True))
        above = levels > otsu(levels).clamp(1, LEVELS - 2)[:, None]
        foreground = self._eroded(above.reshape(maps.shape)).flatten(1)
        n_lowest = int(self.n_minus * flat.shape[1])
        order = ties.argsort(1)
        order = order.gather(1, flat.gather(1, order).argsort(stable=True, dim=1))
        background = torch.zeros_like(foreground).scatter_(1, order[:, :n_lowest], True)
        return foreground & usable, background & usable

    def _eroded(self, region: Tensor) -> Tensor:
        size = erosion_size(min(region.shape[2:])) if self.erosion is None else self.erosion
        left = max_pool2d((~region).float(), size, 1, size // 2) == 0
        return torch.where(left.flatten(1).any(1)[:, None, None, None], left, region)

    def _dilated(self, pixels: Tensor, maps: Tensor) -> Tensor:
        grown = max_pool2d(
            pixels.reshape(maps.shape).float(), self.kernel_size, 1, self.kernel_size // 2
        )
        return grown[:, 0] > 0


def _draw(region: Tensor, n: int, keys: Tensor) -> Tensor:
    """`n` pixels of each region (N, P), or all that there are, by the largest of their keys."""
    keys = torch.where(region, keys, -1)
    largest = keys.topk(min(n, keys.shape[1]), dim=1)
    return torch.zeros_like(region).scatter_(1, largest.indices, largest.values >= 0)
