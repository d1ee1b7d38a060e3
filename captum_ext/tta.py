"""Test-time augmentation by a crop around the pixels that matter.

`mask_boxes` turns a mask of the pixels that matter to a classifier into a box, and `crop_tta`
averages the predictions of the image and of its crop by that box.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from captum_ext._checks import check_count, check_dense, check_non_negative, is_finite
from captum_ext._data.sizes import height_width
from captum_ext._engine.modules import Forward
from captum_ext._engine.outputs import Score, Scorer, compute_scores
from captum_ext._engine.state import preserve_state
from captum_ext._errors import ArgumentError, ArgumentTypeError
from captum_ext.imaging import blur, resize
from captum_ext.metrics import masks_to_boxes
from captum_ext.metrics._inputs import checked_maps

Box = tuple[int, int, int, int]


def mask_boxes(
    masks: Tensor,
    threshold: float = 0.5,
    *,
    sigma: float = 0.0,
    margin: int = 0,
    min_size: int = 1,
    square: bool = False,
) -> Tensor:
    """The box around the pixels of each mask above the threshold.

    The defaults are the paper's: the tightest box around mask > 0.5 (Korsch et al., "Simplified
    Concrete Dropout", 2023, section 3.3). The code that its authors published crops by about
    `sigma=3, margin=5, min_size=64, square=True`; if no pixel is above 0.5 its threshold is the
    mean of the mask.

    A box that grows keeps its centre, to half a pixel. At a border of the mask it moves inside, and
    it never gets larger than the mask.

    Args:
        masks: (N, C, H, W) or (N, H, W), of any scale, or bool. Channels that are all equal count
            as one map, others are summed.
        threshold: pixels strictly above it count.
        sigma: standard deviation, in pixels, of a Gaussian blur before the threshold.
        margin: pixels added on each side of the tight box.
        min_size: the smallest width and height, in pixels.
        square: whether the shorter side grows to the longer one.

    Returns:
        (N, 4), int64: (x1, y1, x2, y2), half-open. (0, 0, 0, 0) if no pixel is above the threshold.

    Raises:
        ValueError: masks of another shape or that are not finite; an option out of range.

    Example:
        >>> masks = torch.zeros(1, 1, 8, 8)
        >>> masks[0, 0, 2:4, 5] = 0.9
        >>> mask_boxes(masks)
        tensor([[5, 2, 6, 4]])
        >>> mask_boxes(masks, margin=1, square=True)
        tensor([[4, 1, 8, 5]])
    """
    _check_box_options(threshold, sigma, margin, min_size)
    maps = checked_maps(masks, "masks")
    if sigma > 0:
        maps = blur(maps[:, None], 2 * math.ceil(4 * sigma) + 1, sigma)[:, 0]
    boxes = masks_to_boxes(maps > threshold)
    low, sides = boxes[:, :2], boxes[:, 2:] - boxes[:, :2]
    grown = (sides + 2 * margin).clamp(min=min_size)
    if square:
        grown = grown.amax(1, keepdim=True).expand(-1, 2)
    limit = grown.new_tensor([maps.shape[2], maps.shape[1]])
    grown = torch.minimum(grown, limit)
    low = torch.minimum((low - (grown - sides) // 2).clamp(min=0), limit - grown)
    return torch.where(sides[:, :1] > 0, torch.cat((low, low + grown), 1), 0)


def crop_tta(
    model: Forward,
    images: Tensor,
    masks: Tensor,
    *,
    originals: Tensor | Sequence[Tensor] | None = None,
    views: Tensor | None = None,
    score: Score = "softmax",
    threshold: float = 0.5,
    sigma: float = 0.0,
    margin: int = 0,
    min_size: int = 1,
    square: bool = False,
    size: int | tuple[int, int] | None = None,
    additional_forward_args: Any = None,
    internal_batch_size: int | None = None,
) -> Tensor:
    r"""The mean of the predictions of each image and of its crop by the box of its mask.

    .. math:: \tfrac12 (p(x) + p(\mathrm{crop}(x)))

    (Korsch et al., "Simplified Concrete Dropout", 2023, sections 3.3 and 4.3, with the joint mask
    of FIDO). The crop is resized to the model's input (bilinear, antialiased where it shrinks),
    without keeping its aspect ratio. An image whose mask is nowhere above the threshold has p(x)
    alone.

    Pass masks of the class that the model predicts. Masks made for the true label reveal the label
    to the model, and any gain in accuracy with them means nothing.

    A box is mapped to the original and widened there to whole pixels. The part of a box outside the
    original is dropped.

    Args:
        model: gives (N, K), or (N, 1) or (N,) for a single logit.
        images: (N, C, H, W), as the model takes them.
        masks: see `mask_boxes`. They cover the image edge to edge, at any height and width.
            `captum_ext.metrics.boxes_to_masks` makes them from boxes of another source.
        originals: images to crop from, for crops sharper than `images`: (N, C, H', W'), or N
            tensors (C, H', W') of any sizes, normalised as `images` are. None crops `images`.
        views: (N, 4), (x1, y1, x2, y2) in pixels of the original: the part that preprocessing cut
            out for the image. None is all of the original.
        score: p: "softmax", "sigmoid" (for a single logit, or labels that do not exclude each
            other), "logit", or a callable of the output.
        threshold: see `mask_boxes`, as for the next four. All lengths are in pixels of the masks.
        sigma: Gaussian blur of the masks.
        margin: added on each side.
        min_size: of the box.
        square: whether the box is made square.
        size: (height, width) of the crop for the model, or one number for both; None is the size of
            `images`.
        additional_forward_args: as in Captum. Tensors with N entries follow their images into the
            crops.
        internal_batch_size: the largest batch for the model; None is N. The images run first, then
            the crops of those images that have a box.

    Returns:
        The mean predictions, of the shape of the model's output (N, K), in float32 or better.

    Raises:
        ValueError: shapes that do not fit, values that are not finite, an option out of range; an
            output that is not one row for each image, or the softmax of a single logit.
        TypeError: images or originals that are not tensors of floats.

    Example:
        >>> model = torch.nn.Sequential(torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten())
        >>> images, masks = torch.zeros(1, 2, 8, 8), torch.zeros(1, 1, 8, 8)
        >>> images[0, 1, 2:4, 2:4], masks[0, 0, 2:4, 2:4] = 1, 1
        >>> model(images), crop_tta(model, images, masks, score="logit")
        (tensor([[0.0000, 0.0625]]), tensor([[0.0000, 0.5312]]))
    """
    _check_images(images, masks)
    sources = _checked_originals(originals, images)
    windows = _checked_views(views, originals is not None, sources)
    size = (images.shape[2], images.shape[3]) if size is None else height_width("size", size)
    if internal_batch_size is not None:
        check_count("internal_batch_size", internal_batch_size)
    boxes = mask_boxes(
        masks, threshold, sigma=sigma, margin=margin, min_size=min_size, square=square
    )
    # Each crop has a size of its own, so crops are made one by one, with numbers on the CPU. All
    # boxes are copied there at once.
    mask_size = (masks.shape[-1], masks.shape[-2])
    crop_boxes = [
        _map_to_original(box, mask_size, window, source)
        for box, window, source in zip(boxes.tolist(), windows, sources, strict=True)
    ]
    n, device = len(images), images.device
    scorer = Scorer(model, n, None, additional_forward_args, score, device, argument="model")

    def copies(examples: list[int]) -> Tensor:
        return images[examples]  # copied by the index, since a model may write to its input

    def crops(examples: list[int]) -> Tensor:
        return torch.cat([crop(sources[i], crop_boxes[i] or (0, 0, 0, 0)) for i in examples])

    def crop(source: Tensor, box: Box) -> Tensor:
        x1, y1, x2, y2 = box
        part = source[None, :, y1:y2, x1:x2].to(images.device)
        return resize(part, size, antialias=True).to(images.dtype)

    def predict(pictures: Callable[[list[int]], Tensor], examples: list[int]) -> Tensor:
        step = internal_batch_size or n
        chunks = [examples[i : i + step] for i in range(0, len(examples), step)]
        return torch.cat([_predictions(scorer, pictures(chunk), chunk) for chunk in chunks])

    with torch.no_grad(), preserve_state(model):
        mean = predict(copies, list(range(n)))
        with_box = [i for i, box in enumerate(crop_boxes) if box]
        if with_box:
            mean[with_box] = (mean[with_box] + predict(crops, with_box)) / 2
    return mean


# --- boxes ---------------------------------------------------------------------------------------


def _map_to_original(
    box: Sequence[int], mask_size: tuple[int, int], view: Sequence[float], original: Tensor
) -> Box | None:
    """The box of all pixels of the original that a mask's box touches; None if there are none.

    Args:
        box: in pixels of the mask.
        mask_size: (width, height).
        view: the box of the original that the mask covers.
        original: (C, H', W').
    """
    edges = [
        view[i % 2] + edge * (view[2 + i % 2] - view[i % 2]) / mask_size[i % 2]
        for i, edge in enumerate(box)
    ]
    height, width = original.shape[1:]
    x1, y1 = (max(math.floor(edge), 0) for edge in edges[:2])
    x2, y2 = min(math.ceil(edges[2]), width), min(math.ceil(edges[3]), height)
    return (x1, y1, x2, y2) if any(box) and x1 < x2 and y1 < y2 else None


def _check_box_options(threshold: float, sigma: float, margin: int, min_size: int) -> None:
    if not is_finite(threshold):
        raise ArgumentError(f"`threshold` must be a finite number, got {threshold!r}.")
    check_non_negative("sigma", sigma)
    if isinstance(margin, bool) or not isinstance(margin, int) or margin < 0:
        raise ArgumentError(f"`margin` must be an integer of at least 0, got {margin!r}.")
    check_count("min_size", min_size)


# --- arguments -----------------------------------------------------------------------------------


def _check_images(images: Tensor, masks: Tensor) -> None:
    _check_floats("images", images)
    if images.dim() != 4 or 0 in images.shape:
        raise ArgumentError(f"`images` must be (N, C, H, W), got {tuple(images.shape)}.")
    if not isinstance(masks, Tensor):
        raise ArgumentTypeError(f"`masks` must be a tensor, got {type(masks)}.")
    if masks.dim() == 0 or len(masks) != len(images):
        raise ArgumentError(
            f"`masks` must be {len(images)}, one for each image, got {tuple(masks.shape)}."
        )


def _check_floats(name: str, value: Tensor) -> None:
    if not isinstance(value, Tensor) or not value.is_floating_point():
        got = value.dtype if isinstance(value, Tensor) else type(value)
        raise ArgumentTypeError(
            f"`{name}` must be tensors of floats, as the model takes them, got {got}."
        )
    check_dense(name, value)
    if not bool(torch.isfinite(value).all()):
        raise ArgumentError(f"`{name}` has values that are not finite.")


def _checked_originals(
    originals: Tensor | Sequence[Tensor] | None, images: Tensor
) -> Sequence[Tensor]:
    if isinstance(originals, Tensor) and originals.dim() == 0:
        raise ArgumentError("`originals` must be one for each image, got a single number.")
    sources = list(images if originals is None else originals)
    for source in sources:
        _check_floats("originals", source)
    shapes = [tuple(source.shape) for source in sources]
    shapes_fit = all(len(s) == 3 and s[0] == images.shape[1] and 0 not in s for s in shapes)
    if len(sources) != len(images) or not shapes_fit:
        raise ArgumentError(
            f"`originals` must be {len(images)} tensors ({images.shape[1]}, H', W'), one for each "
            f"image, got {shapes}."
        )
    return sources


def _checked_views(
    views: Tensor | None, has_originals: bool, sources: Sequence[Tensor]
) -> list[list[float]]:
    if views is None:
        return [[0, 0, source.shape[2], source.shape[1]] for source in sources]
    if not has_originals:
        raise ArgumentError("`views` are parts of `originals`: pass `originals` too.")
    if not isinstance(views, Tensor) or views.shape != (len(sources), 4):
        got = tuple(views.shape) if isinstance(views, Tensor) else type(views)
        raise ArgumentError(f"`views` must be a tensor ({len(sources)}, 4), got {got}.")
    windows: list[list[float]] = views.double().tolist()
    for (x1, y1, x2, y2), source in zip(windows, sources, strict=True):
        height, width = source.shape[1:]
        finite = all(math.isfinite(edge) for edge in (x1, y1, x2, y2))
        if not (finite and x1 < x2 and y1 < y2 and x1 < width and y1 < height and min(x2, y2) > 0):
            raise ArgumentError(
                f"`views` must be (x1, y1, x2, y2) with x1 < x2 and y1 < y2, in pixels of the "
                f"original, got {(x1, y1, x2, y2)} for one of {height} x {width}."
            )
    return windows


def _predictions(scorer: Scorer, pictures: Tensor, examples: list[int]) -> Tensor:
    """A row of scores for each of the pictures, which show the images `examples`."""
    output = scorer.outputs((pictures,), torch.tensor(examples, device=pictures.device))
    _check_rows("`model` must give", output, len(pictures))
    scores = compute_scores(output, scorer.score, pictures.dim())
    _check_rows("`score` must return", scores, len(pictures))
    if not bool(torch.isfinite(scores).all()):
        raise ArgumentError("`model` gives predictions that are not finite.")
    return scores


def _check_rows(requirement: str, rows: Any, n: int) -> None:
    if not isinstance(rows, Tensor) or rows.dim() not in (1, 2) or len(rows) != n:
        got = tuple(rows.shape) if isinstance(rows, Tensor) else type(rows)
        raise ArgumentError(
            f"{requirement} (N, K) or (N,), a row for each of {n} images, got {got}."
        )
