"""Does the model heed what an attribution marks? Insertion, deletion, average drop and ROAD.

Pixels are shown or hidden in the order of a map, and the model is asked again. Attributions are
(B, C, H, W) or (B, H, W), of the images' height and width; channels that are all equal count as one
map, others are summed. Insertion, deletion and ROAD see nothing of a map but the order of its
pixels. **Pixels of equal value** come in a random order, the same for all images of a size and for
every call, unless a `generator` draws another: a flat map is a random one, and not one that reads
from the upper left.

Functions give figures of each image, and keep the curves; the torchmetrics classes take what the
functions return, and average it over batches and processes.
"""

import math
from abc import abstractmethod
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import torch
from scipy import sparse
from scipy.sparse.linalg import splu
from torch import Generator, Tensor
from torchmetrics import Metric

from captum_ext._checks import (
    check_count,
    check_generator,
    check_size,
    is_finite,
    one_batch_of_images,
)
from captum_ext._compat import (
    TargetType,
    _format_additional_forward_args,
    _select_targets,
    progress,
)
from captum_ext._model import (
    Forward,
    Score,
    Tensors,
    check_one_score_each,
    full_precision,
    one_target_each,
    scored,
    untouched,
)
from captum_ext.imaging import min_max
from captum_ext.infill import Baselines, Infill
from captum_ext.metrics.localization import checked_maps

STEP = 1 / 28  # of the pixels: 224 x 8 of 224 x 224
PERCENTILES = (10, 20, 30, 40, 50, 60, 70, 80, 90)
SEED = 0  # of the order of equal pixels, and of ROAD's noise

Pictures = Callable[[Tensor, Tensor], Tensor]
_Array = np.ndarray[Any, np.dtype[Any]]


class Curve(NamedTuple):
    """The score of each image, while its pixels come or go.

    Attributes:
        auc: (B,): the area under the curve, by the trapezoidal rule; the mean score.
        scores: (B, n): at each share.
        shares: (n,), from 0 to 1: of the pixels that were inserted, or deleted.
    """

    auc: Tensor
    scores: Tensor
    shares: Tensor


class OverallScore(NamedTuple):
    """Insertion less deletion.

    Attributes:
        score: (B,): `insertion.auc - deletion.auc`.
        insertion: its curve.
        deletion: its curve.
    """

    score: Tensor
    insertion: Curve
    deletion: Curve


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


# --- functions -----------------------------------------------------------------------------------


def insertion(
    forward_func: Forward,
    inputs: Tensor | Tensors,
    attributions: Tensor | Tensors,
    target: TargetType = None,
    additional_forward_args: Any = None,
    *,
    baselines: Baselines = "blur",
    step: float = STEP,
    score: Score = "softmax",
    generator: Generator | None = None,
    internal_batch_size: int | None = None,
    show_progress: bool = False,
) -> Curve:
    r"""How soon the score comes up when an image's pixels come back, the most relevant first.

    With :math:`x_k` the baseline in which the k pixels of highest attribution are the image's,

    .. math:: \operatorname{AUC} = \int_0^1 S(x_{\lfloor u H W \rceil}) \, du

    by the trapezoidal rule over the steps (Petsiuk et al., "RISE", 2018). The higher, the better.
    The first point is the bare baseline, the last the image itself. Any strictly increasing
    function of the map gives the same.

    Published settings: SESS and Group-CAM blur by `partial(infill.gaussian, sigma=50.0,
    kernel_size=51)`, RISE by `sigma=5.0, kernel_size=11`; both step by 224 x 8 pixels of 224 x 224.
    Their last step counts fully where it is shorter; ours by its length.

    Args:
        forward_func: the model; it gives logits, classes in dimension 1.
        inputs: images (B, C, H, W), or a tuple of one such tensor.
        attributions: (B, C, H, W) or (B, H, W); see above.
        target: as in Captum; one for each image. The literature takes the model's first answer.
        additional_forward_args: as in Captum. Tensors with an entry for each image follow it, all
            else is handed on as it is.
        baselines: what is there before a pixel comes: "blur" (10 pixels for 224), a number, a
            tensor, "mean", "zeros", "local", "noise", or a callable; see
            `captum_ext.infill.Infill`.
        step: pixels at a time: an int is a number of pixels, a float a share of the image's. 1/28
            (RISE, SESS: 1792 of 50176).
        score: "softmax" (RISE), "sigmoid", "logit" (the output as it is) or a callable of it.
        generator: of the order of equal pixels, and of "noise"; on the images' device. None is a
            fixed order, and touches no global random state.
        internal_batch_size: pictures in one pass of the model. None is 16 on a CPU and 64
            elsewhere. Memory does not grow with the number of steps.
        show_progress: whether to draw a progress bar.

    Raises:
        ValueError: images, attributions, an infill or an option that do not fit or are not finite;
            scores that are not one number for each picture, or not finite.
        TypeError: attributions, an infill, a generator or outputs of another type.
        AssertionError: a target that does not select one score for each image, as in Captum.

    Reference:
        Petsiuk et al., https://arxiv.org/abs/1806.07421

    Example:
        >>> image, weights = torch.ones(1, 1, 2, 2), torch.tensor([[4.0, 3.0], [2.0, 1.0]])
        >>> model = lambda x: (x * weights).sum((1, 2, 3))
        >>> found = insertion(model, image, weights[None], baselines=0, step=1, score="logit")
        >>> found.scores, found.auc  # the most relevant pixels first
        (tensor([[ 0.,  4.,  7.,  9., 10.]]), tensor([6.2500]))
    """
    trial = _Trial(
        forward_func, inputs, target, additional_forward_args, score, internal_batch_size
    )
    ranks, infill = trial.ranks(attributions, generator), trial.infill(baselines, generator)
    counts = _counts(step, ranks[0].numel())
    with torch.no_grad(), untouched(forward_func):
        return _inserted(trial, ranks, infill, counts, show_progress)


def deletion(
    forward_func: Forward,
    inputs: Tensor | Tensors,
    attributions: Tensor | Tensors,
    target: TargetType = None,
    additional_forward_args: Any = None,
    *,
    baselines: Baselines = "zeros",
    step: float = STEP,
    score: Score = "softmax",
    generator: Generator | None = None,
    internal_batch_size: int | None = None,
    show_progress: bool = False,
) -> Curve:
    r"""How soon the score goes down when an image's pixels go, the most relevant first.

    `insertion` the other way round: with :math:`x_k` the image in which the k pixels of highest
    attribution are the baseline's. The lower, the better. The first point is the image itself, the
    last the bare baseline.

    Args:
        forward_func: see `insertion`, as for the rest.
        inputs: images (B, C, H, W), or a tuple of one such tensor.
        attributions: (B, C, H, W) or (B, H, W).
        target: as in Captum.
        additional_forward_args: as in Captum.
        baselines: what is left where a pixel went. "zeros" (RISE), the mean colour of normalised
            images.
        step: pixels at a time, or a share of them. 1/28.
        score: "softmax", "sigmoid", "logit" or a callable of the output.
        generator: of the order of equal pixels, and of "noise".
        internal_batch_size: pictures in one pass of the model.
        show_progress: whether to draw a progress bar.

    Raises:
        ValueError: see `insertion`, as for the rest.
        TypeError: likewise.
        AssertionError: likewise.

    Example:
        >>> image, weights = torch.ones(1, 1, 2, 2), torch.tensor([[4.0, 3.0], [2.0, 1.0]])
        >>> model = lambda x: (x * weights).sum((1, 2, 3))
        >>> found = deletion(model, image, weights[None], step=0.5, score="logit")
        >>> found.scores, found.shares, found.auc
        (tensor([[10.,  3.,  0.]]), tensor([0.0000, 0.5000, 1.0000]), tensor([4.]))
    """
    trial = _Trial(
        forward_func, inputs, target, additional_forward_args, score, internal_batch_size
    )
    ranks, infill = trial.ranks(attributions, generator), trial.infill(baselines, generator)
    counts = _counts(step, ranks[0].numel())
    with torch.no_grad(), untouched(forward_func):
        return _deleted(trial, ranks, infill, counts, show_progress)


def overall_score(
    forward_func: Forward,
    inputs: Tensor | Tensors,
    attributions: Tensor | Tensors,
    target: TargetType = None,
    additional_forward_args: Any = None,
    *,
    insertion_baselines: Baselines = "blur",
    deletion_baselines: Baselines = "zeros",
    step: float = STEP,
    score: Score = "softmax",
    generator: Generator | None = None,
    internal_batch_size: int | None = None,
    show_progress: bool = False,
) -> OverallScore:
    """The AUC of insertion less that of deletion (Zhang et al., "Group-CAM", 2021), and both.

    The higher, the better. With the same baselines for both, a random map is expected to have 0.

    Args:
        forward_func: see `insertion`, as for the rest.
        inputs: images (B, C, H, W), or a tuple of one such tensor.
        attributions: (B, C, H, W) or (B, H, W).
        target: as in Captum.
        additional_forward_args: as in Captum.
        insertion_baselines: "blur".
        deletion_baselines: "zeros".
        step: pixels at a time, or a share of them. 1/28.
        score: "softmax", "sigmoid", "logit" or a callable of the output.
        generator: of the order of equal pixels, and of "noise".
        internal_batch_size: pictures in one pass of the model.
        show_progress: whether to draw a progress bar.

    Raises:
        ValueError: see `insertion`, as for the rest.
        TypeError: likewise.
        AssertionError: likewise.

    Reference:
        Zhang et al., https://arxiv.org/abs/2103.13859

    Example:
        >>> image, weights = torch.ones(1, 1, 2, 2), torch.tensor([[4.0, 3.0], [2.0, 1.0]])
        >>> model = lambda x: (x * weights).sum((1, 2, 3))
        >>> found = overall_score(
        ...     model, image, weights[None], insertion_baselines=0, step=1, score="logit"
        ... )
        >>> found.score, found.insertion.auc, found.deletion.auc
        (tensor([2.5000]), tensor([6.2500]), tensor([3.7500]))
    """
    trial = _Trial(
        forward_func, inputs, target, additional_forward_args, score, internal_batch_size
    )
    ranks = trial.ranks(attributions, generator)
    coming, left = (trial.infill(b, generator) for b in (insertion_baselines, deletion_baselines))
    counts = _counts(step, ranks[0].numel())
    with torch.no_grad(), untouched(forward_func):
        first = _inserted(trial, ranks, coming, counts, show_progress)
        second = _deleted(trial, ranks, left, counts, show_progress)
    return OverallScore(first.auc - second.auc, first, second)


def average_drop(
    forward_func: Forward,
    inputs: Tensor | Tensors,
    attributions: Tensor | Tensors,
    target: TargetType = None,
    additional_forward_args: Any = None,
    *,
    baselines: Baselines = "zeros",
    score: Score = "softmax",
    generator: Generator | None = None,
    internal_batch_size: int | None = None,
) -> Tensor:
    r"""The share of each image's score that is lost when only what the map marks is shown: (B,).

    With m the map scaled to [0, 1], Y the score of the image and O that of its explanation map
    :math:`m \odot x + (1 - m) \odot b`,

    .. math:: \max(0, Y - O) / Y

    (Chattopadhay et al., "Grad-CAM++", 2018, who give the mean over images in per cent). The lower,
    the better. A flat map is scaled to zeros, and shows nothing. The paper's maps are rectified;
    rectify others first (`attributions.relu()`), or what speaks against the class is shown in part.
    A positive factor or a summand of a map changes nothing.

    Args:
        forward_func: see `insertion`, as for the rest.
        inputs: images (B, C, H, W), or a tuple of one such tensor.
        attributions: (B, C, H, W) or (B, H, W).
        target: as in Captum.
        additional_forward_args: as in Captum.
        baselines: b. "zeros" (paper): the image is multiplied by the map.
        score: "softmax" (paper), "sigmoid", "logit" or a callable of the output.
        generator: of "noise".
        internal_batch_size: pictures in one pass of the model.

    Raises:
        ValueError: see `insertion`, and scores below 0, of which no share is lost.
        TypeError: likewise.
        AssertionError: likewise.

    Reference:
        Chattopadhay et al., https://arxiv.org/abs/1710.11063

    Example:
        >>> image, weights = torch.ones(1, 1, 2, 2), torch.tensor([[4.0, 3.0], [2.0, 1.0]])
        >>> model = lambda x: (x * weights).sum((1, 2, 3))
        >>> average_drop(model, image, torch.eye(2)[None], score="logit")  # 5 of 10 are shown
        tensor([0.5000])
    """
    trial = _Trial(
        forward_func, inputs, target, additional_forward_args, score, internal_batch_size
    )
    whole, marked = trial.whole_and_marked(attributions, trial.infill(baselines, generator))
    if bool((whole < 0).any()):
        raise ValueError(
            f"`score` {score!r} is below 0 for an image, so that no share of it can be lost: "
            f"choose probabilities."
        )
    return (whole - marked).clamp(min=0) / torch.where(whole > 0, whole, 1)


def increase_in_confidence(
    forward_func: Forward,
    inputs: Tensor | Tensors,
    attributions: Tensor | Tensors,
    target: TargetType = None,
    additional_forward_args: Any = None,
    *,
    baselines: Baselines = "zeros",
    score: Score = "softmax",
    generator: Generator | None = None,
    internal_batch_size: int | None = None,
) -> Tensor:
    """Whether the score rises when only what the map marks is shown: (B,), bool.

    Y < O, of `average_drop` (Chattopadhay et al., "Grad-CAM++", 2018, who give the share of images
    in per cent). The higher, the better.

    Args:
        forward_func: see `average_drop`, as for the rest.
        inputs: images (B, C, H, W), or a tuple of one such tensor.
        attributions: (B, C, H, W) or (B, H, W).
        target: as in Captum.
        additional_forward_args: as in Captum.
        baselines: b. "zeros".
        score: "softmax", "sigmoid", "logit" or a callable of the output.
        generator: of "noise".
        internal_batch_size: pictures in one pass of the model.

    Raises:
        ValueError: see `insertion`, as for the rest.
        TypeError: likewise.
        AssertionError: likewise.

    Reference:
        Chattopadhay et al., https://arxiv.org/abs/1710.11063

    Example:
        >>> image, weights = torch.ones(1, 1, 1, 2), torch.tensor([[4.0, -3.0]])
        >>> model = lambda x: (x * weights).sum((1, 2, 3))
        >>> increase_in_confidence(model, image, weights[None], score="logit")  # 1 to 4
        tensor([True])
    """
    trial = _Trial(
        forward_func, inputs, target, additional_forward_args, score, internal_batch_size
    )
    whole, marked = trial.whole_and_marked(attributions, trial.infill(baselines, generator))
    return whole < marked


def road(
    forward_func: Forward,
    inputs: Tensor | Tensors,
    attributions: Tensor | Tensors,
    target: TargetType = None,
    additional_forward_args: Any = None,
    *,
    percentiles: Sequence[float] = PERCENTILES,
    noise: float = 0.01,
    score: Score = "softmax",
    generator: Generator | None = None,
    internal_batch_size: int | None = None,
    show_progress: bool = False,
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
        forward_func: see `insertion`, as for the rest.
        inputs: images (B, C, H, W), or a tuple of one such tensor.
        attributions: (B, C, H, W) or (B, H, W).
        target: as in Captum.
        additional_forward_args: as in Captum.
        percentiles: of the pixels to remove, above 0 and below 100. 10, 20, ..., 90 (authors). One
            pixel is always left.
        noise: its standard deviation, in units of the images. 0.01 (authors). It is the same for
            all images and percentiles.
        score: "softmax", "sigmoid", "logit" or a callable of the output.
        generator: of the order of equal pixels and of the noise; on the images' device. None is a
            fixed order and fixed noise.
        internal_batch_size: pictures in one pass of the model, and in memory.
        show_progress: whether to draw a progress bar.

    Raises:
        ValueError: see `insertion`, as for the rest.
        TypeError: likewise.
        AssertionError: likewise.

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
    trial = _Trial(
        forward_func, inputs, target, additional_forward_args, score, internal_batch_size
    )
    ranks = trial.ranks(attributions, generator)
    draws = generator or Generator().manual_seed(SEED)
    shape, kind = trial.images.shape[1:], full_precision(trial.images).dtype
    grain = torch.randn(shape, generator=draws, device=draws.device, dtype=kind) * noise
    grain = grain.to(trial.images.device)

    def imputed(images: Tensor, keep: Tensor) -> Tensor:
        return (linear_imputation(full_precision(images), keep) + grain).to(images)

    infill = Infill(trial.images, imputed)
    pixels = ranks[0].numel()
    left = [max(pixels - round(p / 100 * pixels), 1) for p in percentiles]
    with torch.no_grad(), untouched(forward_func):
        lerf = trial.shown(ranks, infill, left, show_progress)
        morf = trial.shown(pixels - 1 - ranks, infill, left, show_progress)
    return RoadScores((lerf - morf).mean(1) / 2, morf, lerf, lerf.new_tensor(percentiles))


# --- ROAD's imputation ---------------------------------------------------------------------------


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
    down, right = (
        sparse.diags([np.ones(n - 1)] * 2, [-1, 1], shape=(n, n)) for n in (height, width)
    )
    direct = sparse.kron(down, sparse.eye(width)) + sparse.kron(sparse.eye(height), right)
    weights = direct / 6 + sparse.kron(down, right) / 12
    return (sparse.diags(np.asarray(weights.sum(1)).ravel()) - weights).tocsr()


# --- what they share -----------------------------------------------------------------------------


class _Trial:
    """A model, images, and the scores of pictures that are made of them, in chunks."""

    def __init__(
        self,
        forward_func: Forward,
        inputs: Any,
        target: TargetType,
        additional_forward_args: Any,
        score: Score,
        internal_batch_size: int | None,
    ) -> None:
        self.images = one_batch_of_images(inputs)
        if internal_batch_size is None:
            internal_batch_size = 16 if self.images.device.type == "cpu" else 64
        check_count("internal_batch_size", internal_batch_size)
        self.forward_func, self.internal_batch_size = forward_func, internal_batch_size
        self.forward = scored(_checked(forward_func, score), score)
        self.target = one_target_each(target, self.images)
        self.extra = _format_additional_forward_args(additional_forward_args) or ()

    def maps(self, attributions: Any) -> Tensor:
        """One map for each image, (B, H, W)."""
        if isinstance(attributions, tuple) and len(attributions) == 1:
            attributions = attributions[0]
        maps = checked_maps(attributions).to(self.images.device)
        shape = (len(self.images), *self.images.shape[2:])
        if maps.shape != shape:
            raise ValueError(
                f"`attributions` are {len(maps)} maps of {maps.shape[1]} x {maps.shape[2]} and "
                f"`inputs` {shape[0]} images of {shape[1]} x {shape[2]}: they must agree. Maps of "
                f"a layer are brought to the images' size by `UpsampleWrapper`."
            )
        return maps

    def ranks(self, attributions: Any, generator: Generator | None) -> Tensor:
        """Each pixel's place, (B, H, W), from 0, the most relevant; equal ones in random order."""
        check_generator(generator, self.images.device)
        maps = self.maps(attributions)
        flat = maps.flatten(1)
        draws = generator or Generator().manual_seed(SEED)
        shuffled = torch.randperm(flat.shape[1], generator=draws, device=draws.device)
        shuffled = shuffled.to(flat.device)
        order = shuffled[flat[:, shuffled].argsort(dim=1, descending=True, stable=True)]
        places = torch.arange(flat.shape[1], device=flat.device).expand_as(order)
        return torch.empty_like(order).scatter_(1, order, places).view_as(maps)

    def infill(self, baselines: Baselines, generator: Generator | None) -> Infill:
        device = self.images.device
        check_generator(generator, device)
        infill = Infill(self.images, baselines)
        infill.draw(generator or Generator(device).manual_seed(SEED))
        return infill

    def scores(self, pictures: Pictures, n: int, show_progress: bool = False) -> Tensor:
        """The scores (B, n) of `pictures(examples, which of the n)`, indices in two tensors."""
        every, found = len(self.images) * n, []
        starts: Any = range(0, every, self.internal_batch_size)
        if show_progress:
            starts = progress(starts, desc="Faithfulness")
        for start in starts:
            stop = min(start + self.internal_batch_size, every)
            numbers = torch.arange(start, stop, device=self.images.device)
            examples = numbers // n
            extra = [self._of(examples, e) for e in self.extra]
            output = self.forward(pictures(examples, numbers % n), *extra)
            target = self.target
            if isinstance(target, Tensor):
                target = target.to(output.device)[examples.to(output.device)]
            elif isinstance(target, list):
                target = [target[i // n] for i in range(start, stop)]
            chosen = _select_targets(output, target)
            check_one_score_each(chosen)
            found.append(chosen.reshape(-1))
        scores = torch.cat(found).reshape(-1, n).to(self.images.device)
        if not bool(torch.isfinite(scores).all()):
            raise ValueError("`forward_func` gives scores that are not finite.")
        return scores

    def shown(
        self, ranks: Tensor, infill: Infill, counts: Sequence[int], show_progress: bool
    ) -> Tensor:
        """The scores (B, n) while just the first so many pixels of `ranks` show."""
        cuts = torch.tensor(counts, device=ranks.device)[:, None, None]

        def pictures(examples: Tensor, which: Tensor) -> Tensor:
            show = (ranks[examples] < cuts[which])[:, None]
            fill = infill(examples, show[:, None].to(self.images.dtype))[:, 0]
            return torch.where(show, self.images[examples], fill)

        return self.scores(pictures, len(counts), show_progress)

    def whole_and_marked(self, attributions: Any, infill: Infill) -> tuple[Tensor, Tensor]:
        """The scores (B,) of the images, and of what their maps, scaled to [0, 1], let through."""
        weights = min_max(self.maps(attributions)[:, None])

        def pictures(examples: Tensor, which: Tensor) -> Tensor:
            keep = torch.where(which[:, None, None, None] == 0, 1, weights[examples])
            keep = keep.to(self.images.dtype)
            fill = infill(examples, keep[:, None])[:, 0]
            return torch.lerp(fill, self.images[examples], keep)

        with torch.no_grad(), untouched(self.forward_func):
            whole, marked = self.scores(pictures, 2).unbind(1)
        return whole, marked

    def _of(self, examples: Tensor, value: Any) -> Any:
        is_each = isinstance(value, Tensor) and value.dim() > 0 and len(value) == len(self.images)
        return value[examples.to(value.device)] if is_each else value


def _inserted(
    trial: _Trial, ranks: Tensor, infill: Infill, counts: list[int], show_progress: bool
) -> Curve:
    return _curve(trial.shown(ranks, infill, counts, show_progress), counts)


def _deleted(
    trial: _Trial, ranks: Tensor, infill: Infill, counts: list[int], show_progress: bool
) -> Curve:
    left = [counts[-1] - count for count in counts]
    return _curve(trial.shown(counts[-1] - 1 - ranks, infill, left, show_progress), counts)


def _curve(scores: Tensor, counts: list[int]) -> Curve:
    shares = scores.new_tensor(counts) / counts[-1]
    return Curve(torch.trapezoid(scores, shares, dim=1), scores, shares)


def _counts(step: Any, pixels: int) -> list[int]:
    """How many pixels have come at each point of a curve, from 0 to all."""
    whole = isinstance(step, int) and not isinstance(step, bool)
    if whole and 1 <= step <= pixels:
        return [*range(0, pixels, step), pixels]
    if not isinstance(step, float) or not 0 < step <= 1:
        raise ValueError(
            f"`step` must be a number of pixels, an int from 1 to the images' {pixels}, or a share "
            f"of them, a float above 0 and at most 1, got {step!r}."
        )
    share = max(step, 1 / pixels)
    steps = math.ceil(1 / share)
    return sorted({round(min(i * share, 1) * pixels) for i in range(steps)} | {pixels})


def _checked(forward_func: Forward, score: Score) -> Forward:
    """`forward_func`, with an error where its output is not one of a batch."""

    def forward(pictures: Tensor, *extra: Any) -> Tensor:
        n = len(pictures)
        output = forward_func(pictures, *extra)
        if not isinstance(output, Tensor) or not output.is_floating_point():
            shown = output.dtype if isinstance(output, Tensor) else type(output)
            raise TypeError(f"`forward_func` must give a tensor of floats, got {shown}.")
        if output.dim() == 0 or len(output) != n:
            raise ValueError(
                f"`forward_func` must give scores for each of {n} images, got "
                f"{tuple(output.shape)}."
            )
        if score == "softmax" and (output.dim() == 1 or output.shape[1] == 1):
            raise ValueError(
                f'`score` is "softmax", but `forward_func` gives one number for each image, '
                f'{tuple(output.shape)}: choose "sigmoid" or "logit".'
            )
        return output

    return forward


# --- torchmetrics --------------------------------------------------------------------------------


class _Means(Metric):
    """Means over images of what a function gives for each."""

    is_differentiable = False
    full_state_update = False

    total: Tensor
    count: Tensor

    def __init__(self, n: int = 1, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        # One float32 more or less is lost in the sum of a million images.
        self.add_state("total", torch.zeros(n, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("count", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")

    @abstractmethod
    def _values(self, found: Any) -> Tensor:
        """Of each image, (B, n)."""

    def update(self, found: Any) -> None:
        """Add a batch: what the function returned for it."""
        values = self._values(found)
        if not bool(torch.isfinite(values).all()):
            raise ValueError("`found` has values that are not finite.")
        self.total = self.total + values.double().sum(0).to(self.total.device)
        self.count = self.count + len(values)

    def compute(self) -> Any:
        """The mean; NaN without an image."""
        return self._means()[0]

    def _means(self) -> Tensor:
        return (self.total / self.count).float()


class Insertion(_Means):
    """The mean AUC of `insertion`.

    Args:
        **kwargs: see `torchmetrics.Metric`.

    Raises:
        TypeError: from `update`, for anything but what the function returns.
        ValueError: from `update`, for values that are not finite.

    Example:
        >>> metric = Insertion()
        >>> shares = torch.tensor([0.0, 1.0])
        >>> metric.update(Curve(torch.tensor([0.5, 0.75]), torch.zeros(2, 2), shares))
        >>> metric.compute()
        tensor(0.6250)
    """

    higher_is_better = True

    def _values(self, found: Any) -> Tensor:
        if not isinstance(found, Curve):
            raise TypeError(f"`found` must be a Curve, got {type(found)}.")
        return found.auc[:, None]


class Deletion(Insertion):
    """The mean AUC of `deletion`; see `Insertion`.

    Args:
        **kwargs: see `torchmetrics.Metric`.

    Example:
        >>> metric = Deletion()
        >>> shares = torch.tensor([0.0, 1.0])
        >>> metric.update(Curve(torch.tensor([0.25, 0.5]), torch.zeros(2, 2), shares))
        >>> metric.compute()
        tensor(0.3750)
    """

    higher_is_better = False


class AverageDrop(_Means):
    """The mean of `average_drop`, a share of 1.

    Args:
        **kwargs: see `torchmetrics.Metric`.

    Raises:
        TypeError: from `update`, for anything but what the function returns.
        ValueError: from `update`, for values that are not finite.

    Example:
        >>> metric = AverageDrop()
        >>> metric.update(torch.tensor([0.0, 0.5]))
        >>> metric.compute()
        tensor(0.2500)
    """

    higher_is_better = False

    def _values(self, found: Any) -> Tensor:
        return _each(found, of_bools=False)


class IncreaseInConfidence(_Means):
    """The share of images that have an `increase_in_confidence`.

    Args:
        **kwargs: see `torchmetrics.Metric`.

    Raises:
        TypeError: from `update`, for anything but what the function returns.

    Example:
        >>> metric = IncreaseInConfidence()
        >>> metric.update(torch.tensor([True, False, False, True]))
        >>> metric.compute()
        tensor(0.5000)
    """

    higher_is_better = True

    def _values(self, found: Any) -> Tensor:
        return _each(found, of_bools=True)


class Road(_Means):
    """The mean scores of `road`, over images and percentiles: "combined", "morf" and "lerf".

    Args:
        **kwargs: see `torchmetrics.Metric`.

    Raises:
        TypeError: from `update`, for anything but what the function returns.
        ValueError: from `update`, for values that are not finite.

    Example:
        >>> metric = Road()
        >>> morf, lerf = torch.tensor([[0.25, 0.5]]), torch.tensor([[0.75, 0.5]])
        >>> score = (lerf - morf).mean(1) / 2
        >>> metric.update(RoadScores(score, morf, lerf, torch.tensor([10.0, 90.0])))
        >>> metric.compute()
        {'combined': tensor(0.1250), 'morf': tensor(0.3750), 'lerf': tensor(0.6250)}
    """

    higher_is_better = True

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(3, **kwargs)

    def _values(self, found: Any) -> Tensor:
        if not isinstance(found, RoadScores):
            raise TypeError(f"`found` must be RoadScores, got {type(found)}.")
        return torch.stack((found.score, found.morf.mean(1), found.lerf.mean(1)), 1)

    def compute(self) -> dict[str, Tensor]:
        """The three means; NaN without an image."""
        return dict(zip(("combined", "morf", "lerf"), self._means(), strict=True))


def _each(found: Any, of_bools: bool) -> Tensor:
    """A number for each image, (B, 1)."""
    if not isinstance(found, Tensor) or found.dim() != 1 or (found.dtype == torch.bool) != of_bools:
        shown = f"{found.dtype}, {tuple(found.shape)}" if isinstance(found, Tensor) else type(found)
        kind = "bool" if of_bools else "numbers"
        raise TypeError(f"`found` must be {kind}, (B,), got {shown}.")
    return found[:, None]
