"""ROAD: the score while pixels are removed and imputed from their neighbours."""

from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from typing import Any, NamedTuple, Unpack

import numpy as np
import torch
from torch import Generator, Tensor

from captum_ext._checks import check_non_negative, is_finite
from captum_ext._compat import TargetType
from captum_ext._engine.modules import Forward, Tensors
from captum_ext._engine.precision import full_precision
from captum_ext._errors import ArgumentError
from captum_ext._repr import bounded_repr, fields_repr
from captum_ext.infill import Infill
from captum_ext.metrics._definition import MetricDefinition
from captum_ext.metrics._scorer import (
    SEED,
    PerturbationScorer,
    ScoringOptions,
    with_scoring_options,
)

__all__ = ["RoadScores", "linear_imputation", "road"]

PERCENTILES = (10, 20, 30, 40, 50, 60, 70, 80, 90)

_Array = np.ndarray[Any, np.dtype[Any]]


class RoadScores(NamedTuple):
    """The scores of images while their pixels are removed, in two orders.

    Attributes:
        score: (B,): the mean of (lerf - morf) / 2; higher is better.
        morf: (B, P): the score with the most relevant pixels removed first.
        lerf: (B, P): the score with the least relevant pixels removed first.
        percentiles: (P,): the percentage of removed pixels.

    Example:
        >>> image = torch.tensor([[[[8.0, 6.0, 4.0, 2.0, 0.0]]]])
        >>> model = lambda x: x.sum((1, 2, 3))
        >>> result = road(model, image, image, percentiles=[20, 40], noise=0, score="logit")
        >>> result.morf, result.lerf, result.score
        (tensor([[18., 14.]]), tensor([[22., 26.]]), tensor([4.]))
    """

    score: Tensor
    morf: Tensor
    lerf: Tensor
    percentiles: Tensor

    def __repr__(self) -> str:
        return fields_repr(self)


@with_scoring_options
def road(
    forward_func: Forward,
    inputs: Tensor | Tensors,
    attributions: Tensor | Tensors,
    target: TargetType = None,
    additional_forward_args: Any = None,
    *,
    percentiles: Sequence[float] = PERCENTILES,
    noise: float = 0.01,
    **scoring: Unpack[ScoringOptions],
) -> RoadScores:
    r"""Remove and debias: the score while pixels are removed and imputed from their neighbours.

    A removed pixel becomes the weighted mean of its neighbours (`linear_imputation`) plus a little
    noise. The model thus does not see the shape of the removed region, which a patch of zeros would
    show (Rong et al., 2022). With the most relevant pixels removed first (MoRF) the score should
    drop; with the least relevant first (LeRF) it should stay. Of P percentiles p the result is

    .. math:: \frac1P \sum_p \frac{\operatorname{LeRF}(p) - \operatorname{MoRF}(p)}{2},

    the combination of pytorch-grad-cam. The paper measures accuracies over images, in place of the
    scores of one image. Higher is better, and a random map is expected to have 0.

    The imputation runs on the CPU, and takes longer than a small model's passes.

    Args:
        forward_func: the model; see `insertion`, as for the next four.
        inputs: images (B, C, H, W), or a tuple of one such tensor.
        attributions: (B, C, H, W) or (B, H, W).
        target: as in Captum.
        additional_forward_args: as in Captum.
        percentiles: percentages of pixels to remove, above 0 and below 100. 10, 20, ..., 90
            (authors). One pixel is always left.
        noise: the standard deviation of the noise, in units of the images. 0.01 (authors). All
            images and percentiles have the same noise.
        **scoring: `score` and the other scoring options of `insertion`. The `generator` draws the
            noise, too.

    Returns:
        The scores of each image at each percentile, and their combination.

    Raises:
        ValueError: images, attributions, an infill or an option that do not fit or are not finite;
            scores that are not one number for each image, or not finite.
        TypeError: attributions, an infill, a generator or outputs of another type.
        AssertionError: a target that does not select one score for each image, as in Captum.

    Reference:
        Rong et al., "A Consistent and Efficient Evaluation Strategy for Attribution Methods",
        https://arxiv.org/abs/2202.00449

    Example:
        >>> image = torch.tensor([[[[8.0, 6.0, 4.0, 2.0, 0.0]]]])
        >>> model = lambda x: x.sum((1, 2, 3))
        >>> result = road(model, image, image, percentiles=[20], noise=0, score="logit")
        >>> result.morf, result.lerf, result.score  # 8 becomes 6, and 0 becomes 2
        (tensor([[18.]]), tensor([[22.]]), tensor([2.]))
    """
    check_non_negative("noise", noise)
    values = percentiles.tolist() if isinstance(percentiles, Tensor) else percentiles
    percentiles = tuple(values) if isinstance(values, Iterable) else ()
    if not percentiles or not all(is_finite(p) and 0 < p < 100 for p in percentiles):
        raise ArgumentError(
            f"`percentiles` must be numbers above 0 and below 100, got {bounded_repr(values)}.",
            "percentiles",
        )
    scorer = PerturbationScorer(forward_func, inputs, target, additional_forward_args, **scoring)
    ranks, images = scorer.rank_pixels(attributions), scorer.images
    draws = scorer.generator or Generator().manual_seed(SEED)
    shape, dtype = images.shape[1:], full_precision(images).dtype
    grain = torch.randn(shape, generator=draws, device=draws.device, dtype=dtype) * noise
    grain = grain.to(images.device)

    def impute(images: Tensor, keep: Tensor) -> Tensor:
        return (linear_imputation(full_precision(images), keep) + grain).to(images)

    infill = Infill(images, impute)
    pixels = ranks[0].numel()
    left = [max(pixels - round(p / 100 * pixels), 1) for p in percentiles]
    with scorer.preserved():
        lerf = scorer.score_first_pixels(ranks, infill, left)
        morf = scorer.score_first_pixels(pixels - 1 - ranks, infill, left)
    return RoadScores((lerf - morf).mean(1) / 2, morf, lerf, lerf.new_tensor(percentiles))


def _columns_of_road(result: Any) -> Tensor:
    if not isinstance(result, RoadScores):
        raise TypeError(f"`result` must be RoadScores, got {type(result)}.")
    return torch.stack((result.score, result.morf.mean(1), result.lerf.mean(1)), 1)


ROAD = MetricDefinition("road", road, "model", "Road", values=_columns_of_road)


# --- imputation ----------------------------------------------------------------------------------


def linear_imputation(images: Tensor, keep: Tensor) -> Tensor:
    r"""Replace each pixel that is not kept by the weighted mean of its neighbours.

    All missing pixels p together solve

    .. math:: \sum_q w_{pq} (x_p - x_q) = 0,

    with w = 1/6 for the four direct neighbours q and 1/12 for the four diagonal ones, as far as
    they are in the image (Rong et al., 2022, without their noise). The function may be the
    `baselines` of `insertion`, `deletion` and `FIDO`.

    SciPy factors the sparse matrix on the CPU, in as many threads as torch uses. On one thread, at
    224 x 224 with half of the pixels missing in blobs, that took 0.14 s (0.28 s with nine tenths).
    SciPy's conjugate gradients took 0.19 s (0.67 s), and conjugate gradients by convolutions in
    torch 0.35 s (0.81 s); both were off by up to 1e-4.

    Args:
        images: (B, C, H, W).
        keep: (B, 1, H, W); a pixel is kept where `keep` is above 1/2. An image without a kept pixel
            becomes 0.

    Returns:
        The images (B, C, H, W).

    Raises:
        ValueError: shapes that do not fit.

    Reference:
        Rong et al., https://arxiv.org/abs/2202.00449

    Example:
        >>> images = torch.tensor([[[[2.0, 9.0, 9.0, 5.0]]]])
        >>> linear_imputation(images, torch.tensor([[[[1.0, 0.0, 0.0, 1.0]]]]))
        tensor([[[[2., 3., 4., 5.]]]])
    """
    if images.dim() != 4 or keep.shape != (len(images), 1, *images.shape[2:]):
        raise ValueError(
            f"`images` must be (B, C, H, W) and `keep` (B, 1, H, W), got {tuple(images.shape)} and "
            f"{tuple(keep.shape)}."
        )
    laplacian = _laplacian(*images.shape[2:])
    values = images.detach().double().flatten(2).cpu().numpy()
    kept = (keep > 0.5).flatten(1).cpu().numpy()
    with ThreadPoolExecutor(torch.get_num_threads()) as threads:
        imputed = list(threads.map(lambda x, k: _impute_image(laplacian, x, k), values, kept))
    return torch.from_numpy(np.stack(imputed)).view(images.shape).to(images)


def _impute_image(laplacian: Any, values: _Array, kept: _Array) -> _Array:
    """Impute the pixels of one image (C, H W) that are not kept (H W)."""
    from scipy.sparse.linalg import splu

    if kept.all() or not kept.any():
        return values * kept
    rows = laplacian[~kept]
    # The matrix is symmetric and positive definite: it needs no pivots, and the order of
    # elimination may be chosen for sparsity.
    system = splu(
        rows[:, ~kept].tocsc(),
        permc_spec="MMD_AT_PLUS_A",
        diag_pivot_thresh=0.0,
        options={"SymmetricMode": True},
    )
    imputed = values.copy()
    imputed[:, ~kept] = system.solve(-(rows[:, kept] @ values[:, kept].T)).T
    return imputed


@lru_cache(maxsize=8)
def _laplacian(height: int, width: int) -> Any:
    """The sparse matrix (H W, H W) that maps x to sum_q w_pq (x_p - x_q) for each pixel p."""
    from scipy import sparse

    down, right = (
        sparse.diags([np.ones(n - 1)] * 2, [-1, 1], shape=(n, n)) for n in (height, width)
    )
    direct = sparse.kron(down, sparse.eye(width)) + sparse.kron(sparse.eye(height), right)
    weights = direct / 6 + sparse.kron(down, right) / 12
    return (sparse.diags(np.asarray(weights.sum(1)).ravel()) - weights).tocsr()
