"""Image operations on the device, for signals, images and volumes alike.

Tensors are (B, C, *spatial) with one to three spatial dimensions. Kornia filters, warps and resizes
images. Torch resizes signals and volumes, and images with antialiasing.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from captum_ext._checks import check_choice, check_flag
from captum_ext._engine.precision import full_precision, headroom, without_autocast
from captum_ext._errors import ArgumentError
from captum_ext._repr import bounded_repr

_LINEAR = {1: "linear", 2: "bilinear", 3: "trilinear"}
MODES = ("bilinear", "bicubic", "nearest", "nearest-exact", "area")
_WARPS = ("bilinear", "nearest", "bicubic")
_PADDINGS = ("zeros", "border", "reflection")


def resize(
    x: Tensor,
    size: Sequence[int],
    mode: str = "bilinear",
    align_corners: bool = False,
    antialias: bool = False,
) -> Tensor:
    """Resize the spatial dimensions of `x` (B, C, *spatial) to `size`.

    Args:
        x: a tensor with one to three spatial dimensions.
        size: the new spatial size, one number for each spatial dimension.
        mode: "bilinear" (which becomes linear or trilinear as `x` demands), "bicubic" (images
            only), "nearest", "nearest-exact" or "area".
        align_corners: whether corner pixels, rather than the edges of the picture, are kept in
            place by the linear modes.
        antialias: whether images are smoothed where they shrink, as torchvision and Pillow do;
            only for "bilinear" and "bicubic".

    Raises:
        ValueError: an unknown mode, a size of another number of dimensions, or a side below 1.

    Example:
        >>> resize(torch.tensor([[[0.0, 1.0]]]), (4,))
        tensor([[[0.0000, 0.2500, 0.7500, 1.0000]]])
    """
    n = x.dim() - 2
    if mode not in MODES:
        raise ArgumentError(f"`mode` must be one of {MODES}, got {mode!r}.")
    check_flag("align_corners", align_corners)
    check_flag("antialias", antialias)
    fits = n in _LINEAR and len(size) == n and (mode != "bicubic" or n == 2)
    if not fits or min(size) < 1:
        raise ValueError(
            f"A tensor of shape {tuple(x.shape)} cannot be resized to {tuple(size)} by {mode}."
        )
    if tuple(x.shape[2:]) == tuple(size):
        return x
    linear = mode in ("bilinear", "bicubic")
    align = align_corners if linear else None
    resized: Tensor
    if n == 2 and not (linear and antialias):
        from kornia.geometry.transform import resize as resize_images

        resized = resize_images(x, (size[0], size[1]), mode, align_corners=align)
    else:
        # Kornia blurs images before it shrinks them, which differs by up to 0.045 from Pillow.
        smooth = linear and antialias
        mode = _LINEAR[n] if mode == "bilinear" else mode
        values = full_precision(x) if smooth else x  # a CPU antialiases no halves
        resized = F.interpolate(values, tuple(size), None, mode, align, antialias=smooth)
    return resized.to(x.dtype) if linear else resized


def lay_over(x: Tensor, size: tuple[int, int], offset: tuple[float, float] = (0.0, 0.0)) -> Tensor:
    """Upsample maps (B, C, h, w) bilinearly, with their cells' centres off by `offset` pixels.

    The centre of cell (i, j) is at ((i + 1/2) H / h - 1/2 + offset_y, (j + 1/2) W / w - 1/2 +
    offset_x). Beyond the outermost centres the map is constant. Without an offset this is `resize`.

    Args:
        x: the maps.
        size: (H, W).
        offset: (y, x), in pixels, down and right positive. In a ResNet the units of layer4 are
            centred 15.5 pixels up and left of their cells: (-15.5, -15.5).

    Returns:
        (B, C, H, W).

    Example:
        >>> lay_over(torch.tensor([[[[0.0, 1.0]]]]), (1, 4), (0.0, 1.0))
        tensor([[[[0.0000, 0.0000, 0.2500, 0.7500]]]])
    """
    if offset == (0.0, 0.0):
        return resize(x, size)
    values = full_precision(x)  # halves do not tell the coordinates of neighbours apart
    coordinates = [
        (torch.arange(n, device=x.device, dtype=values.dtype) + 0.5 - shift) * 2 / n - 1
        for n, shift in zip(size, offset, strict=True)
    ]
    rows, columns = torch.meshgrid(*coordinates, indexing="ij")
    grid = torch.stack([columns, rows], -1).expand(len(x), -1, -1, -1)
    laid = F.grid_sample(values, grid, "bilinear", "border", align_corners=False)
    return laid.to(x.dtype)


def warp(
    x: Tensor, matrices: Tensor, mode: str = "bilinear", fill: str | float | Tensor = "zeros"
) -> Tensor:
    """Warp images by affine maps: the pixel at p = (x, y, 1) moves to M p.

    Args:
        x: images (N, C, H, W), of any dtype.
        matrices: M, (N, 3, 3) or (1, 3, 3), in pixels whose centres are whole numbers.
        mode: "bilinear" or "nearest".
        fill: the pixels from outside the image: "zeros", "border" (the nearest pixel),
            "reflection", a number, or a tensor that broadcasts to `x`.

    Returns:
        A tensor of the shape and dtype of `x`.

    Raises:
        ValueError: an unknown `fill` or `mode`.

    Example:
        >>> right = torch.tensor([[[1.0, 0, 1], [0, 1, 0], [0, 0, 1]]])
        >>> warp(torch.tensor([[[[1.0, 2.0, 3.0]] * 2]]), right, fill=9.0)[0, 0]
        tensor([[9., 1., 2.],
                [9., 1., 2.]])
    """
    from kornia.geometry.transform import warp_affine

    check_choice("mode", mode, _WARPS)
    if isinstance(fill, str) and fill not in _PADDINGS:
        raise ArgumentError(
            f"`fill` must be one of {_PADDINGS}, a number or a tensor, got {fill!r}."
        )
    floats = full_precision(x) if x.is_floating_point() else x.double()
    size, affine = (x.shape[2], x.shape[3]), matrices[:, :2].to(floats)
    padding = fill if isinstance(fill, str) else "zeros"
    with without_autocast(floats):
        warped = warp_affine(floats, affine, size, mode, padding, align_corners=True)
        if not isinstance(fill, str):
            ones = floats.new_ones(len(warped), 1, *size)
            inside = warp_affine(ones, affine, size, mode, align_corners=True)
            warped = warped + fill * (1 - inside)
    return warped.to(x.dtype) if x.is_floating_point() else warped.round().to(x.dtype)


def blur(x: Tensor, kernel_size: int = 51, sigma: float = 50.0) -> Tensor:
    r"""Gaussian blur of the spatial dimensions of `x` (B, C, \*spatial), one after the other.

    Along each dimension, with the kernel size K = 2 r + 1,

    .. math::
        y_i = \frac{\sum_{j=-r}^{r} e^{-j^2 / (2 \sigma^2)} \, x_{i+j}}
                  {\sum_{j=-r}^{r} e^{-j^2 / (2 \sigma^2)}}

    Values beyond the border are those of the mirror image, which does not repeat the border itself.
    A dimension of r values or fewer is continued by its border value instead.

    Args:
        x: a tensor with one to three spatial dimensions.
        kernel_size: K, odd, in pixels. 51 (Group-CAM).
        sigma: standard deviation in pixels. 50 (Group-CAM).

    Returns:
        A tensor of the shape and dtype of `x`.

    Raises:
        ValueError: an even or negative `kernel_size`; a `sigma` that is not greater than 0.

    Example:
        >>> blur(torch.tensor([[[0.0, 0.0, 1.0, 0.0]]]), kernel_size=3, sigma=1.0)
        tensor([[[0.0000, 0.2741, 0.4519, 0.5481]]])
    """
    from kornia.filters import filter2d, get_gaussian_kernel1d

    if not isinstance(kernel_size, int) or kernel_size < 1 or kernel_size % 2 == 0:
        raise ArgumentError(
            f"`kernel_size` must be odd and positive, got {bounded_repr(kernel_size)}."
        )
    is_number = isinstance(sigma, int | float) and not isinstance(sigma, bool)
    if not is_number or not sigma > 0:  # infinity gives the mean
        raise ArgumentError(f"`sigma` must be a number, greater than 0, got {bounded_repr(sigma)}.")
    kernel = get_gaussian_kernel1d(kernel_size, sigma, device=x.device, dtype=x.dtype)[:, None]
    for dim in range(2, x.dim()):
        line = x.movedim(dim, -1)
        border = "reflect" if line.shape[-1] > kernel_size // 2 else "replicate"
        flat = line.reshape(x.shape[0], x.shape[1], -1, line.shape[-1])
        with without_autocast(flat):
            x = filter2d(flat, kernel, border).reshape(line.shape).movedim(-1, dim)
    return x


def percentile(x: Tensor, q: float) -> Tensor:
    """The q-th percentile of each map of `x` (B, C, *spatial), as (B, C, 1, ...).

    It is interpolated linearly between two values, as in NumPy. Unlike `torch.quantile`, it takes
    maps of any size.

    Example:
        >>> percentile(torch.tensor([[[4.0, 1.0, 2.0, 3.0]]]), 50)
        tensor([[[2.5000]]])
    """
    flat = full_precision(x).flatten(2)
    rank = q / 100 * (flat.shape[2] - 1)
    low = flat.kthvalue(math.floor(rank) + 1, dim=2).values
    high = flat.kthvalue(math.ceil(rank) + 1, dim=2).values
    return torch.lerp(low, high, rank % 1).reshape(x.shape[:2] + (1,) * (x.dim() - 2)).to(x.dtype)


def one_channel(x: Tensor) -> Tensor:
    """The sum over the channels of each map of `x` (B, C, *spatial), or a channel if all are equal.

    Methods whose maps are purely spatial repeat them over the channels.

    Example:
        >>> one_channel(torch.tensor([[[2.0, 3.0], [2.0, 3.0]], [[2.0, 3.0], [0.0, 1.0]]]))[:, 0]
        tensor([[2., 3.],
                [2., 4.]])
    """
    values = full_precision(x) if x.is_floating_point() else x.float()
    is_equal = (values == values[:, :1]).flatten(1).all(1)
    is_equal = is_equal.reshape(-1, *[1] * (x.dim() - 1))
    return torch.where(is_equal, values[:, :1], values.sum(1, keepdim=True))


def min_max(x: Tensor) -> Tensor:
    """Scale each map of `x` (B, C, *spatial) to [0, 1]; a flat map becomes zeros.

    m = (x - min x) / (max x - min x), over the spatial dimensions.

    Example:
        >>> min_max(torch.tensor([[[-1.0, 0.0, 3.0], [5.0, 5.0, 5.0]]]))
        tensor([[[0.0000, 0.2500, 1.0000],
                 [0.0000, 0.0000, 0.0000]]])
    """
    flat = full_precision(x).flatten(2)
    low, high = flat.amin(2, keepdim=True), flat.amax(2, keepdim=True)
    room = headroom(low, high)
    flat, low, high = flat * room, low * room, high * room
    scaled = (flat - low) / torch.where(high == low, 1, high - low)
    return scaled.reshape(x.shape).to(x.dtype)
