"""ROAD: the score while pixels are removed and their place is interpolated."""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from typing import Any, NamedTuple, Unpack

import numpy as np
import torch
from torch import Generator, Tensor

from captum_ext._checks import check_size, is_finite
from captum_ext._compat import TargetType
from captum_ext._engine.modules import Forward, Tensors
from captum_ext._engine.precision import full_precision
from captum_ext.infill import Infill
from captum_ext.metrics._definition import define
from captum_ext.metrics._scorer import SEED, Faithfulness, Scoring, with_scoring

__all__ = ["RoadScores", "linear_imputation", "road"]

PERCENTILES = (10, 20, 30, 40, 50, 60, 70, 80, 90)

_Array = np.ndarray[Any, np.dtype[Any]]


class RoadScores(NamedTuple):
    """What is left of the score when pixels are removed, in either order.

    Attributes:
        score: (B,): the mean of (lerf - morf) / 2; the higher, the better.
        morf: (B, P): the most relevant pixels removed first.
        lerf: (B, P): the least relevant ones first.
        percentiles: (P,): of the pixels that were removed.
    """

    score: Tensor
    morf: Tensor
    lerf: Tensor
    percentiles: Tensor


@with_scoring
def road(
    forward_func: Forward,
    inputs: Tensor | Tensors,
    attributions: Tensor | Tensors,
    target: TargetType = None,
    additional_forward_args: Any = None,
    *,
    percentiles: Sequence[float] = PERCENTILES,
    noise: float = 0.01,
    **scoring: Unpack[Scoring],
) -> RoadScores:
    """Remove and debias: the score when pixels are removed and their place is interpolated.

    A removed pixel becomes the weighted mean of its neighbours (`linear_imputation`) plus a little
    noise, so that the model does not see the shape of what was removed, as it sees that of a patch
    of zeros (Rong et al., 2022). With the most relevant pixels removed first (MoRF) the score
    should drop, with the least relevant first (LeRF) it should stay. The paper measures accuracies;
    of one image these are scores, and (LeRF - MoRF) / 2 is the combination of pytorch-grad-cam. A
    random map is expected to have 0.

    The imputation is done on the CPU, and takes longer than a small model's passes.

    Args:
        forward_func: see `insertion`, as for the rest and for what is raised.
        inputs: images (B, C, H, W), or a tuple of one such tensor.
        attributions: (B, C, H, W) or (B, H, W).
        target: as in Captum.
        additional_forward_args: as in Captum.
        percentiles: of the pixels to remove, above 0 and below 100. 10, 20, ..., 90 (authors). One
            pixel is always left.
        noise: its standard deviation, in units of the images. 0.01 (authors). It is the same for
            all images and percentiles.
        **scoring: `score` and other keywords of `insertion`. The `generator` draws the noise, too.

    Reference:
        Rong et al., "A Consistent and Efficient Evaluation Strategy for Attribution Methods",
        https://arxiv.org/abs/2202.00449

    Example:
        >>> image = torch.tensor([[[[8.0, 6.0, 4.0, 2.0, 0.0]]]])
        >>> model = lambda x: x.sum((1, 2, 3))
        >>> found = road(model, image, image, percentiles=[20], noise=0, score="logit")
        >>> found.morf, found.lerf, found.score  # 8 becomes 6, and 0 becomes 2
        (tensor([[18.]]), tensor([[22.]]), tensor([2.]))
    """
    check_size("noise", noise)
    if not len(percentiles) or not all(is_finite(p) and 0 < p < 100 for p in percentiles):
        raise ValueError(
            f"`percentiles` must be numbers above 0 and below 100, got {tuple(percentiles)}."
        )
    scorer = Faithfulness(forward_func, inputs, target, additional_forward_args, **scoring)
    ranks, images = scorer.ranks(attributions), scorer.images
    draws = scorer.generator or Generator().manual_seed(SEED)
    shape, dtype = images.shape[1:], full_precision(images).dtype
    grain = torch.randn(shape, generator=draws, device=draws.device, dtype=dtype) * noise
    grain = grain.to(images.device)

    def imputed(images: Tensor, keep: Tensor) -> Tensor:
        return (linear_imputation(full_precision(images), keep) + grain).to(images)

    infill = Infill(images, imputed)
    pixels = ranks[0].numel()
    left = [max(pixels - round(p / 100 * pixels), 1) for p in percentiles]
    with scorer.running():
        lerf = scorer.shown(ranks, infill, left)
        morf = scorer.shown(pixels - 1 - ranks, infill, left)
    return RoadScores((lerf - morf).mean(1) / 2, morf, lerf, lerf.new_tensor(percentiles))


def _values(found: Any) -> Tensor:
    if not isinstance(found, RoadScores):
        raise TypeError(f"`found` must be RoadScores, got {type(found)}.")
    return torch.stack((found.score, found.morf.mean(1), found.lerf.mean(1)), 1)


ROAD = define("road", road, "model", "Road", values=_values)


# --- imputation ----------------------------------------------------------------------------------


def linear_imputation(images: Tensor, keep: Tensor) -> Tensor:
    r"""The images, with each pixel that is not kept the weighted mean of its neighbours.

    Of all missing pixels p together, with w = 1/6 for the four direct neighbours q and 1/12 for the
    four diagonal ones, as far as they are in the image,

    .. math:: \sum_q w_{pq} (x_p - x_q) = 0

    (Rong et al., 2022, without their noise). It may be the `baselines` of `insertion`,
    `deletion` and `FIDO`.

    SciPy factors the sparse matrix, on the CPU, in as many threads as torch uses. On one thread, at
    224 x 224 with half of the pixels missing in blobs, that took 0.14 s (0.28 s with nine tenths),
    SciPy's conjugate gradients 0.19 s (0.67 s), and conjugate gradients by convolutions in torch
    0.35 s (0.81 s); both were off by up to 1e-4.

    Args:
        images: (B, C, H, W).
        keep: (B, 1, H, W); a pixel is kept where it is above 1/2. Where none is, all become 0.

    Raises:
        ValueError: shapes that do not fit.

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
        found = list(threads.map(lambda x, k: _imputed(laplacian, x, k), values, kept))
    return torch.from_numpy(np.stack(found)).view(images.shape).to(images)


def _imputed(laplacian: Any, values: _Array, kept: _Array) -> _Array:
    """One image, (C, H W)."""
    from scipy.sparse.linalg import splu

    if kept.all() or not kept.any():
        return values * kept
    rows = laplacian[~kept]
    # Symmetric and positive definite: no pivot is needed, and the order of elimination may be
    # chosen for that.
    system = splu(
        rows[:, ~kept].tocsc(),
        permc_spec="MMD_AT_PLUS_A",
        diag_pivot_thresh=0.0,
        options={"SymmetricMode": True},
    )
    found = values.copy()
    found[:, ~kept] = system.solve(-(rows[:, kept] @ values[:, kept].T)).T
    return found


@lru_cache(maxsize=8)
def _laplacian(height: int, width: int) -> Any:
    """Of each pixel, sum_q w_pq (x_p - x_q): a sparse matrix (H W, H W)."""
    from scipy import sparse

    down, right = (
        sparse.diags([np.ones(n - 1)] * 2, [-1, 1], shape=(n, n)) for n in (height, width)
    )
    direct = sparse.kron(down, sparse.eye(width)) + sparse.kron(sparse.eye(height), right)
    weights = direct / 6 + sparse.kron(down, right) / 12
    return (sparse.diags(np.asarray(weights.sum(1)).ravel()) - weights).tocsr()
