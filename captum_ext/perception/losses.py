"""The loss of Perception Visualization's decoder, and its parts."""

from kornia.metrics import ssim
from torch import Tensor

from captum_ext._engine.precision import divide_by_power, full_precision, without_autocast
from captum_ext._errors import ArgumentError

WINDOW = 11  # of SSIM, with sigma 1.5


def structural_similarity(pictures: Tensor, others: Tensor) -> Tensor:
    r"""The SSIM of pictures in [0, 1], of each channel by itself (by Kornia).

    .. math:: \mathrm{SSIM} = \frac{(2 \mu_x \mu_y + c_1)(2 \sigma_{xy} + c_2)}
        {(\mu_x^2 + \mu_y^2 + c_1)(\sigma_x^2 + \sigma_y^2 + c_2)}

    (Eq. 13 of the reference) with :math:`c_1 = 0.01^2`, :math:`c_2 = 0.03^2` and Gaussian windows
    of 11 x 11 pixels with sigma 1.5, averaged over the windows that lie inside the picture.

    Args:
        pictures: x, (N, C, H, W), at least 11 x 11.
        others: y, of the same shape.

    Returns:
        (N, C), in float32 or float64. 1 is equality.

    Raises:
        ValueError: the pictures are smaller, or their shapes differ.

    Reference:
        Wang et al., "Image Quality Assessment: From Error Visibility to Structural Similarity",
        IEEE Transactions on Image Processing 13(4), 2004

    Example:
        >>> import torch
        >>> from captum_ext.perception import structural_similarity
        >>> x = torch.rand(2, 3, 16, 16)
        >>> structural_similarity(x, x).shape
        torch.Size([2, 3])
    """
    if pictures.shape != others.shape or pictures.dim() != 4 or min(pictures.shape[2:]) < WINDOW:
        raise ArgumentError(
            f"`pictures` and `others` must both be (N, C, H, W), at least {WINDOW} x {WINDOW}, got "
            f"{tuple(pictures.shape)} and {tuple(others.shape)}.",
            "pictures",
        )
    x, y = full_precision(pictures), full_precision(others)
    with without_autocast(x):  # half precision loses variances
        maps: Tensor = ssim(x, y, WINDOW, eps=0.0, padding="valid")
    return maps.mean((2, 3))


def deep_similarity(latents: Tensor, others: Tensor) -> Tensor:
    r"""The mean squared distance of latents, called deep similarity in the paper.

    .. math:: d = \overline{(E(\hat x) - E(x))^2}

    averaged over channels and cells.

    Args:
        latents: E(x), (N, C, h, w).
        others: E of the reconstruction, of the same shape.

    Returns:
        (N,), in float32 or float64. 0 is equality.

    Raises:
        RuntimeError: the shapes do not broadcast.

    Example:
        >>> import torch
        >>> from captum_ext.perception import deep_similarity
        >>> deep_similarity(torch.zeros(1, 2, 3, 3), torch.full((1, 2, 3, 3), 0.5))
        tensor([0.2500])
    """
    difference = (full_precision(others) - full_precision(latents)).flatten(1)
    # Small differences stay as they are, because a gradient is larger than its square.
    divided, power = divide_by_power(difference, least=0)
    return divided.square().mean(1) * power[:, 0] * power[:, 0]


def perception_loss(
    pictures: Tensor,
    reconstructions: Tensor,
    latents: Tensor,
    latents_of_reconstructions: Tensor,
    weights: tuple[float, float, float] = (0.2, 0.4, 0.4),
) -> dict[str, Tensor]:
    r"""The decoder's loss, as its weighted parts.

    .. math::
        L = a \, \overline{(x - \hat x)^2} + b \, \overline{(E(\hat x) - E(x))^2}
        - c \sum_{R, G, B} \mathrm{SSIM}(x, \hat x)

    averaged over the batch. The SSIMs of the three colours are summed, not averaged, so that c
    counts three times.

    Args:
        pictures: x, (N, C, H, W), in [0, 1].
        reconstructions: the decoder's pictures of them, of the same shape.
        latents: E(x), (N, C, h, w).
        latents_of_reconstructions: E of the reconstructions, of the same shape.
        weights: a, b and c. (0.2, 0.4, 0.4) (authors' final model). The authors' published script
            has (0.4, 0, 0.6), which leaves the latents out.

    Returns:
        Scalars "pixel", "deep" and "ssim", weighted; L is their sum. Parts of weight 0 are left
        out.

    Raises:
        ValueError: with c, the pictures are smaller than 11 x 11, or their shapes differ.

    Reference:
        Giulivi, Carman, Boracchi, "Perception Visualization: Seeing Through the Eyes of a DNN",
        https://arxiv.org/abs/2204.09920

    Example:
        >>> import torch
        >>> from captum_ext.perception import perception_loss
        >>> x, latents = torch.rand(2, 3, 16, 16), torch.rand(2, 4, 2, 2)
        >>> perception_loss(x, x, latents, latents + 1, weights=(0.2, 0.5, 0))
        {'pixel': tensor(0.), 'deep': tensor(0.5000)}
    """
    pixel, deep, similarity = weights
    parts: dict[str, Tensor] = {}
    if pixel:
        difference = full_precision(reconstructions) - full_precision(pictures)
        parts["pixel"] = pixel * difference.square().mean()
    if deep:
        parts["deep"] = deep * deep_similarity(latents, latents_of_reconstructions).mean()
    if similarity:
        ssims = structural_similarity(pictures, reconstructions)
        parts["ssim"] = -similarity * ssims.sum(1).mean()
    return parts
