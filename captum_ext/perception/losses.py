"""What the decoder of Perception Visualization is trained by."""

from kornia.metrics import ssim
from torch import Tensor

from captum_ext._engine.precision import full_precision, without_autocast

WINDOW = 11  # of SSIM, with sigma 1.5


def structural_similarity(pictures: Tensor, others: Tensor) -> Tensor:
    r"""SSIM of pictures in [0, 1], each channel by itself (Wang et al. 2004), by Kornia.

    .. math:: \mathrm{SSIM} = \frac{(2 \mu_x \mu_y + c_1)(2 \sigma_{xy} + c_2)}
        {(\mu_x^2 + \mu_y^2 + c_1)(\sigma_x^2 + \sigma_y^2 + c_2)}

    with Gaussian windows of 11 x 11 and sigma 1.5 that lie in the picture as a whole, averaged over
    their places.

    Args:
        pictures: (N, C, H, W), at least 11 x 11.
        others: the same.

    Returns:
        (N, C), in float32 or better.

    Raises:
        ValueError: pictures that are smaller, or of different shapes.

    Example:
        >>> import torch
        >>> from captum_ext.perception import structural_similarity
        >>> x = torch.rand(2, 3, 16, 16)
        >>> structural_similarity(x, x).shape
        torch.Size([2, 3])
    """
    if pictures.shape != others.shape or pictures.dim() != 4 or min(pictures.shape[2:]) < WINDOW:
        raise ValueError(
            f"`pictures` must be two of (N, C, H, W), at least {WINDOW} x {WINDOW}, got "
            f"{tuple(pictures.shape)} and {tuple(others.shape)}."
        )
    x, y = full_precision(pictures), full_precision(others)
    with without_autocast(x):  # half precision loses variances
        maps: Tensor = ssim(x, y, WINDOW, eps=0.0, padding="valid")
    return maps.mean((2, 3))


def deep_similarity(latents: Tensor, others: Tensor) -> Tensor:
    r"""How far latents are apart: the mean of :math:`(E(\hat x) - E(x))^2`, (N,).

    The paper's name; 0 is equality.
    """
    return (full_precision(others) - full_precision(latents)).square().flatten(1).mean(1)


def perception_loss(
    pictures: Tensor,
    reconstructions: Tensor,
    latents: Tensor,
    latents_of_reconstructions: Tensor,
    weights: tuple[float, float, float] = (0.2, 0.4, 0.4),
) -> dict[str, Tensor]:
    r"""The parts of the loss, which is their sum.

    .. math::
        a \, \overline{(x - \hat x)^2} + b \, \overline{(E(\hat x) - E(x))^2}
        - c \sum_{R, G, B} \mathrm{SSIM}(x, \hat x)

    The three colours' SSIMs are summed, not averaged, so that c counts three times.

    Args:
        pictures: x, (N, C, H, W), in [0, 1].
        reconstructions: of them.
        latents: E(x).
        latents_of_reconstructions: E of the reconstructions.
        weights: a, b, c. (0.2, 0.4, 0.4): the authors' final model; their published script has
            (0.4, 0, 0.6), which leaves the latents out.

    Returns:
        "pixel", "deep" and "ssim", weighted; those of weight 0 are left out.

    Reference:
        Giulivi, Carman, Boracchi, "Perception Visualization: Seeing Through the Eyes of a DNN",
        https://arxiv.org/abs/2204.09920
    """
    pixel, deep, similarity = weights
    parts: dict[str, Tensor] = {}
    if pixel:
        difference = full_precision(reconstructions) - full_precision(pictures)
        parts["pixel"] = pixel * difference.square().mean()
    if deep:
        parts["deep"] = deep * deep_similarity(latents, latents_of_reconstructions).mean()
    if similarity:
        found = structural_similarity(pictures, reconstructions)
        parts["ssim"] = -similarity * found.sum(1).mean()
    return parts
