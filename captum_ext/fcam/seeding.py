"""Seeds: a few pixels of each image, labelled at random from a coarse map (F-CAM, Sec. 3)."""

import torch
from torch import Generator, Tensor
from torch.nn.functional import max_pool2d

from captum_ext._checks import check_count, check_generator, check_range
from captum_ext._errors import ArgumentError
from captum_ext._repr import options_repr

FOREGROUND, BACKGROUND, IGNORED = 1, 0, -255
LEVELS = 256


def otsu(levels: Tensor) -> Tensor:
    r"""Otsu's threshold of each image, which separates its dark from its bright pixels best.

    .. math:: T = \arg\max_t w_0(t) w_1(t) (m_0(t) - m_1(t))^2

    with the share w_0 and the mean m_0 of the pixels at or below t, and w_1 and m_1 of the pixels
    above t. The first of several maxima is taken. Sums are of integers, so that ties are exact.

    Args:
        levels: (N, P), int64, in [0, 255].

    Returns:
        Thresholds (N,), int64; 0 for an image of a single level.

    Reference:
        Otsu, "A Threshold Selection Method from Gray-Level Histograms", IEEE Transactions on
        Systems, Man, and Cybernetics 9(1), 1979

    Example:
        >>> otsu(torch.tensor([[10, 12, 200, 210]]))
        tensor([12])
    """
    counts = levels.new_zeros(len(levels), LEVELS)
    counts.scatter_add_(1, levels, torch.ones_like(levels))
    below, mass = counts.cumsum(1), (counts * torch.arange(LEVELS, device=levels.device)).cumsum(1)
    above, all_mass = below[:, -1:] - below, mass[:, -1:]
    # w_0 w_1 (m_0 - m_1) up to factors of n, as an exact integer that is squared afterwards.
    difference = (below[:, -1:] * mass - below * all_mass).double()
    variance = difference.square() / (below * above).clamp(min=1)
    return variance.argmax(1)


def erosion_size(side: int) -> int:
    """The erosion's kernel size for images of this side: odd, in proportion to 11 at 224 pixels.

    11 at 224 pixels is that of the official code.

    Example:
        >>> erosion_size(224), erosion_size(64), erosion_size(8)
        (11, 3, 1)
    """
    return 2 * max(round((11 * side / 224 - 1) / 2), 0) + 1


class SeedSampler:
    """Draws seeds from coarse maps: a few pixels of each image, labelled as object or background.

    The foreground region is the map above Otsu's threshold, eroded. The background region is the
    share `n_minus` of pixels with the lowest values; ties are broken at random. Some pixels of each
    region are drawn, all with equal probability, and dilated. Pixels in both results are ignored.
    A map that is flat or not finite gives no seeds. A region with fewer pixels than are to be drawn
    gives all of them.

    Kornia's `erosion` and `dilation` with a flat kernel equal max-pooling, which is used here
    because it is two orders of magnitude faster.

    Args:
        n_foreground: number of foreground pixels to draw in each image. 10 (paper: 1).
        n_background: number of background pixels to draw in each image. 10 (paper: 1).
        n_minus: the share of pixels in the background region. 0.3 (paper: chosen in 0.1 to 0.7).
        kernel_size: kernel of the dilation in pixels, odd. 3 (official code).
        erosion: kernel of the erosion in pixels, odd. None scales 11 at 224 pixels (official code)
            to the image's shorter side. A region that would vanish is not eroded.

    Raises:
        ValueError: an argument is out of range.

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
                    raise ArgumentError(f"`{name}` must be odd, got {size}.", name)
        self.n_foreground, self.n_background, self.n_minus = n_foreground, n_background, n_minus
        self.kernel_size, self.erosion = kernel_size, erosion

    def __repr__(self) -> str:
        return options_repr(self)

    def __call__(self, maps: Tensor, generator: Generator | None = None) -> Tensor:
        """Draw the seeds.

        Args:
            maps: (N, 1, H, W), in [0, 1].
            generator: the generator of the random numbers. None takes torch's global one.

        Raises:
            ValueError: `maps` have another shape or are no floats, or `generator` is on another
                device.
            TypeError: `generator` is not a torch.Generator.
        """
        is_map = maps.dim() == 4 and maps.shape[1] == 1 and maps.numel()
        if not is_map or not maps.is_floating_point():
            raise ArgumentError(
                f"`maps` must be (N, 1, H, W) of floats, got {tuple(maps.shape)}, {maps.dtype}.",
                "maps",
            )
        check_generator(generator, maps.device)
        shape = (3, len(maps), maps[0].numel())
        noise = torch.rand(shape, generator=generator, dtype=torch.float32, device=maps.device)
        foreground, background = self.regions(maps, noise[0])
        is_object = self._dilate(_draw(foreground, self.n_foreground, noise[1]), maps)
        is_background = self._dilate(_draw(background, self.n_background, noise[2]), maps)
        seeds = torch.full_like(is_object, IGNORED, dtype=torch.int64)
        seeds[is_object & ~is_background] = FOREGROUND
        seeds[is_background & ~is_object] = BACKGROUND
        return seeds

    def regions(self, maps: Tensor, ties: Tensor) -> tuple[Tensor, Tensor]:
        """The foreground and the background region of each map, (N, H * W) each, bool.

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
        foreground = self._erode(above.reshape(maps.shape)).flatten(1)
        n_lowest = int(self.n_minus * flat.shape[1])
        order = ties.argsort(1)
        order = order.gather(1, flat.gather(1, order).argsort(stable=True, dim=1))
        background = torch.zeros_like(foreground).scatter_(1, order[:, :n_lowest], True)
        return foreground & usable, background & usable

    def _erode(self, region: Tensor) -> Tensor:
        size = erosion_size(min(region.shape[2:])) if self.erosion is None else self.erosion
        eroded = max_pool2d((~region).float(), size, 1, size // 2) == 0
        return torch.where(eroded.flatten(1).any(1)[:, None, None, None], eroded, region)

    def _dilate(self, pixels: Tensor, maps: Tensor) -> Tensor:
        size = self.kernel_size
        return max_pool2d(pixels.reshape(maps.shape).float(), size, 1, size // 2)[:, 0] > 0


def _draw(region: Tensor, n: int, keys: Tensor) -> Tensor:
    """The `n` pixels of each region (N, P) with the largest keys; all pixels of smaller regions."""
    keys = torch.where(region, keys, -1)
    largest = keys.topk(min(n, keys.shape[1]), dim=1)
    return torch.zeros_like(region).scatter_(1, largest.indices, largest.values >= 0)
