"""CRF losses of an F-CAM decoder: near pixels of similar colour shall have similar values."""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Generator, Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from captum_ext._checks import check_count, check_generator, check_positive, warn
from captum_ext._engine.precision import full_precision, twice_square, without_autocast
from captum_ext._errors import ArgumentError

# Elements of the affinity matrix that are in memory at once: in float32 32 MiB on a GPU, and 4 MiB
# on a CPU, which fit into its caches.
CHUNK, CPU_CHUNK = 2**23, 2**20
# Smaller standard deviations, as shares of the contrast, tell no more colours apart. Their squares
# stay in the range of floats.
_LEAST_SIGMA = 2.0**-50
_LARGEST_ERROR = 2.0**-6  # of the exponents of A


class _Potts(torch.autograd.Function):
    """2 p'(A1 - Ap) of each image, from the products A1 and Ap with a symmetric A."""

    @staticmethod
    def forward(ctx: Any, p: Tensor, a_ones: Tensor, a_p: Tensor) -> Tensor:
        ctx.save_for_backward(a_ones - 2 * a_p)
        return 2 * (p * (a_ones - a_p)).sum(1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        return 2 * gradient[:, None] * ctx.saved_tensors[0], None, None


def _potts(p: Tensor, multiply: Callable[[Tensor], tuple[Tensor, Tensor]]) -> Tensor:
    """The Potts energy of each image, with a function that gives A1 and Ap."""
    with torch.no_grad():
        a_ones, a_p = multiply(p)
    energy: Tensor = _Potts.apply(p, a_ones, a_p)
    return energy


def dense_crf_loss(
    foreground: Tensor,
    images: Tensor,
    *,
    sigma_rgb: float = 15.0,
    sigma_xy: float = 100 / 224,
    side: int | None = 32,
    n_anchors: int | None = None,
    generator: Generator | None = None,
) -> Tensor:
    r"""The relaxed Potts energy: near pixels of similar colour shall have similar values.

    .. math::
        E(p) = \frac2{P^2} p^T A (1 - p), \quad A_{ij} = \exp\left(
            -\frac{|x_i - x_j|^2}{2 \sigma_{xy}^2} - \frac{|I_i - I_j|^2}{2 \sigma_{rgb}^2}\right)

    averaged over the images, with P pixels at positions x with colours I. With S = (1 - p, p) it
    equals -sum_k S_k' A S_k / P^2, the form of the papers, plus a constant of the image. So the
    gradient is the same, and E is never negative. The official code sums over pairs; the mean used
    here keeps its weight at any number of pixels. The code's weight of 2e-9 at 224 x 224 is a
    weight of 5.04 here.

    **Cost.** A has P^2 elements, and is never in memory as a whole. Images and maps are first
    reduced, by averaging areas, to a longer side of `side` pixels. There the energy is exact,
    unless `n_anchors` is given: then A is multiplied with that many random pixels, drawn at each
    call, instead of with all. Value and gradient are unbiased estimates of the exact ones, and
    their errors fall as 1 / sqrt(n_anchors). On three photographs at 56 pixels, 512 anchors had
    mean errors of 13% (of the gradient's length) and 2% (of the value).

    Args:
        foreground: p, (N, 1, H, W), in [0, 1].
        images: I, (N, C, H, W), floats or bytes in 0 to 255, not normalised.
        sigma_rgb: standard deviation of colours, in levels of 255. 15 (paper).
        sigma_xy: standard deviation of positions, as a share of the image's longer side. 100/224
            (paper: 100 pixels).
        side: longer side of the reduced images, in pixels. None keeps the size; smaller images keep
            theirs, too.
        n_anchors: number of random pixels that A is multiplied with. None takes all pixels.
        generator: the generator of the anchors. None takes torch's global one.

    Returns:
        A scalar in [0, 1/2]. It has no second derivative, and no gradient with respect to the
        images.

    Raises:
        ValueError: the shapes do not fit each other, or an argument is out of range.
        TypeError: `generator` is not a torch.Generator.

    Reference:
        Tang et al., "On Regularized Losses for Weakly-supervised CNN Segmentation", ECCV 2018,
        https://arxiv.org/abs/1803.09569

    Example:
        >>> half = torch.full((1, 1, 2, 2), 0.5)
        >>> dense_crf_loss(half, torch.full((1, 3, 2, 2), 200.0), sigma_xy=1e6)  # A_ij = 1
        tensor(0.5000)
    """
    _check_settings(sigma_rgb=sigma_rgb, sigma_xy=sigma_xy, side=side, n_anchors=n_anchors)
    foreground, images, contrast = _validated(foreground, images)
    check_generator(generator, foreground.device)
    longer = max(foreground.shape[2:])
    if side is not None and side < longer:
        height, width = (max(round(n * side / longer), 1) for n in foreground.shape[2:])
        size = (height, width)
        foreground, images = (F.adaptive_avg_pool2d(x, size) for x in (foreground, images))
    p, n_pixels = foreground.flatten(1), foreground[0].numel()
    anchors = None
    if n_anchors is not None and n_anchors < n_pixels:
        anchors = torch.randperm(n_pixels, generator=generator, device=p.device)[:n_anchors]
    sigma_rgb, sigma_xy = max(sigma_rgb, _LEAST_SIGMA * contrast), max(sigma_xy, _LEAST_SIGMA)
    features = _features(images, sigma_rgb, sigma_xy)
    squares = images.shape[1] * (contrast / sigma_rgb) ** 2 + (1 / sigma_xy) ** 2
    by_inner_products = squares * torch.finfo(p.dtype).eps < _LARGEST_ERROR

    def multiply(p: Tensor) -> tuple[Tensor, Tensor]:
        return _products(features, p, anchors, by_inner_products)

    with without_autocast(p):
        return _potts(p, multiply).mean() / n_pixels**2


def _features(images: Tensor, sigma_rgb: float, sigma_xy: float) -> Tensor:
    """Features f (N, P, C + 2) with A_ij = 2^(-|f_i - f_j|^2 / 2); `_products` has fast exp2."""
    height, width = images.shape[2:]
    lines = [torch.arange(n, device=images.device, dtype=images.dtype) for n in (height, width)]
    positions = torch.stack(torch.meshgrid(*lines, indexing="ij")) / (sigma_xy * max(height, width))
    parts = (images / sigma_rgb, positions.expand(len(images), -1, -1, -1))
    features = torch.cat(parts, 1).flatten(2).transpose(1, 2)
    return (features - features.mean(1, keepdim=True)) * math.sqrt(math.log2(math.e))


def _products(
    features: Tensor, p: Tensor, anchors: Tensor | None, by_inner_products: bool
) -> tuple[Tensor, Tensor]:
    """The products A1 and Ap, (N, P) each, a chunk of A's rows at a time.

    |f_i - f_j|^2 comes from inner products, which is faster, or from the differences.
    """
    columns = torch.stack((torch.ones_like(p), p), 2)
    others = features
    if anchors is not None:
        others, columns = features[:, anchors], columns[:, anchors]
    half_squares = others.square().sum(2)[:, None] / 2
    chunks = []
    chunk = CPU_CHUNK if p.device.type == "cpu" else CHUNK
    for rows in features.split(max(chunk // (len(p) * others.shape[1]), 1), 1):
        if by_inner_products:
            exponents = torch.baddbmm(half_squares, rows, others.transpose(1, 2), beta=-1)
            exponents -= rows.square().sum(2, keepdim=True) / 2
        else:
            distances = torch.cdist(rows, others, compute_mode="donot_use_mm_for_euclid_dist")
            exponents = distances.square_().mul_(-0.5)
        # On a CPU exp (MKL's) takes several times as long where it underflows, exp2 does not.
        chunks.append(exponents.clamp_(max=0).exp2_() @ columns)
        del exponents  # frees the memory before the next chunk needs it
    products = torch.cat(chunks, 1)
    if anchors is not None:  # the diagonal, A_ii = 1, is known and not estimated
        products[:, anchors] -= columns
        products *= p.shape[1] / len(anchors)
        products += torch.stack((torch.ones_like(p), p), 2)
    a_ones, a_p = products.unbind(2)
    return a_ones, a_p


def local_crf_loss(
    foreground: Tensor,
    images: Tensor,
    *,
    radius: int = 5,
    sigma_rgb: float = 25.5,
    sigma_xy: float = 6.0,
) -> Tensor:
    r"""The Potts energy in windows: neighbours of similar colour shall have similar values.

    .. math:: E(p) = \frac2P \sum_i \sum_{j \ne i, |x_i - x_j|_\infty \le r} A_{ij} p_i (1 - p_j)

    averaged over the images, with A as in `dense_crf_loss`. This is another prior than the dense
    one, not an approximation of it: it moves edges, and ignores pairs of distant pixels. Windows
    and standard deviations are those of the gated CRF loss.

    Args:
        foreground: p, (N, 1, H, W), in [0, 1].
        images: (N, C, H, W), floats or bytes in 0 to 255, not normalised.
        radius: r, in pixels. 5. The time grows with its square, the memory does not.
        sigma_rgb: standard deviation of colours, in levels of 255. 25.5.
        sigma_xy: standard deviation of positions, in pixels. 6.

    Returns:
        A scalar, 0 or more. It has no second derivative, and no gradient with respect to the
        images.

    Raises:
        ValueError: the shapes do not fit each other, or an argument is out of range.

    Reference:
        Obukhov et al., "Gated CRF Loss for Weakly Supervised Semantic Image Segmentation",
        https://arxiv.org/abs/1906.04651

    Example:
        >>> step = torch.tensor([[[[0.0, 1.0]]]])
        >>> local_crf_loss(step, torch.zeros(1, 3, 1, 2), sigma_xy=1e6)
        tensor(1.)
    """
    _check_settings(radius=radius, sigma_rgb=sigma_rgb, sigma_xy=sigma_xy)
    foreground, images, contrast = _validated(foreground, images)
    height, width = images.shape[2:]
    colours = images / (max(sigma_rgb, _LEAST_SIGMA * contrast) * math.sqrt(2))
    twice_variance = twice_square(sigma_xy)

    def multiply(p: Tensor) -> tuple[Tensor, Tensor]:
        planes = p.reshape(-1, height, width)
        a_ones, a_p = torch.zeros_like(planes), torch.zeros_like(planes)
        for dy in range(min(radius, height - 1) + 1):
            for dx in range(-radius, radius + 1):
                if (dy == 0 and dx <= 0) or abs(dx) >= width:
                    continue  # visits each pair once
                i = (slice(None), slice(0, height - dy), slice(max(-dx, 0), width - max(dx, 0)))
                j = (slice(None), slice(dy, height), slice(max(dx, 0), width + min(dx, 0)))
                distances = (colours[:, :, *i[1:]] - colours[:, :, *j[1:]]).square().sum(1)
                a = torch.exp(-distances - (dy * dy + dx * dx) / twice_variance)
                a_ones[i] += a
                a_ones[j] += a
                a_p[i] += a * planes[j]
                a_p[j] += a * planes[i]
        return a_ones.flatten(1), a_p.flatten(1)

    p = foreground.flatten(1)
    return _potts(p, multiply).mean() / (height * width)


class DenseCRFLoss(nn.Module):
    """`dense_crf_loss` as a module, which validates its settings when it is made.

    Example:
        >>> loss = DenseCRFLoss(side=16)
        >>> images = torch.randint(0, 256, (2, 3, 40, 40), dtype=torch.uint8)
        >>> loss(torch.rand(2, 1, 40, 40), images).shape
        torch.Size([])
    """

    def __init__(
        self,
        sigma_rgb: float = 15.0,
        sigma_xy: float = 100 / 224,
        side: int | None = 32,
        n_anchors: int | None = None,
    ) -> None:
        super().__init__()
        _check_settings(sigma_rgb=sigma_rgb, sigma_xy=sigma_xy, side=side, n_anchors=n_anchors)
        self.sigma_rgb, self.sigma_xy = sigma_rgb, sigma_xy
        self.side, self.n_anchors = side, n_anchors

    def extra_repr(self) -> str:
        return (
            f"sigma_rgb={self.sigma_rgb}, sigma_xy={self.sigma_xy}, side={self.side}, "
            f"n_anchors={self.n_anchors}"
        )

    def forward(
        self, foreground: Tensor, images: Tensor, generator: Generator | None = None
    ) -> Tensor:
        return dense_crf_loss(
            foreground,
            images,
            sigma_rgb=self.sigma_rgb,
            sigma_xy=self.sigma_xy,
            side=self.side,
            n_anchors=self.n_anchors,
            generator=generator,
        )


class LocalCRFLoss(nn.Module):
    """`local_crf_loss` as a module, which validates its settings when it is made.

    Example:
        >>> loss = LocalCRFLoss(radius=2)
        >>> loss(torch.rand(2, 1, 8, 8), torch.zeros(2, 3, 8, 8)).shape
        torch.Size([])
    """

    def __init__(self, radius: int = 5, sigma_rgb: float = 25.5, sigma_xy: float = 6.0) -> None:
        super().__init__()
        _check_settings(radius=radius, sigma_rgb=sigma_rgb, sigma_xy=sigma_xy)
        self.radius, self.sigma_rgb, self.sigma_xy = radius, sigma_rgb, sigma_xy

    def extra_repr(self) -> str:
        return f"radius={self.radius}, sigma_rgb={self.sigma_rgb}, sigma_xy={self.sigma_xy}"

    def forward(
        self, foreground: Tensor, images: Tensor, generator: Generator | None = None
    ) -> Tensor:
        return local_crf_loss(
            foreground,
            images,
            radius=self.radius,
            sigma_rgb=self.sigma_rgb,
            sigma_xy=self.sigma_xy,
        )


def _check_settings(*, sigma_rgb: Any, sigma_xy: Any, **counts: Any) -> None:
    """Raise a ValueError unless both sigmas are positive and the rest are counts of pixels."""
    for name, value in (("sigma_rgb", sigma_rgb), ("sigma_xy", sigma_xy)):
        check_positive(name, value)
    for name, value in counts.items():
        if value is not None or name == "radius":  # `side` and `n_anchors` may be None
            check_count(name, value)


def _validated(foreground: Tensor, images: Tensor) -> tuple[Tensor, Tensor, float]:
    """Both tensors, validated, in one dtype, which is float32 or float64, and the contrast.

    The contrast is the range of the colours; 255 for bytes, and 1 for a single colour.
    """
    fits = foreground.dim() == images.dim() == 4 and foreground.shape[1] == 1
    fits = fits and foreground.shape[2:] == images.shape[2:] and len(foreground) == len(images)
    if not fits or not foreground.numel() or not foreground.is_floating_point():
        raise ArgumentError(
            f"`foreground` must be floats (N, 1, H, W) and `images` (N, C, H, W), got "
            f"{tuple(foreground.shape)}, {foreground.dtype}, and {tuple(images.shape)}.",
            "foreground",
        )
    foreground = full_precision(foreground)
    colours = images.detach().to(foreground.dtype)
    contrast = 255.0
    if images.is_floating_point():
        low, high = torch.stack(colours.aminmax()).tolist()
        contrast = (high - low) or 1.0
        if low < 0 or 0 < high <= 1:
            warn(
                f"`images` are in {low:.3g} to {high:.3g}: they must be in 0 to 255, not "
                f"normalised, or all colours count as similar."
            )
    return foreground, colours, contrast
