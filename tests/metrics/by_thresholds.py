"""A slow reference of the boxes' IoUs, which labels each mask by SciPy, and difficult maps."""

import numpy as np
import torch
from scipy import ndimage

from captum_ext.imaging import min_max, resize

EIGHT_NEIGHBOURS = np.ones((3, 3))


# --- the reference -------------------------------------------------------------------------------


def reference_ious(image, true, contours, convention):
    """The IoUs of a map (H, W) and boxes (m, 4) at the 1000 thresholds, in float32."""
    known = {}  # equal masks have the same boxes
    ious = []
    for mask in masks(image.astype(np.float64), convention):
        key = mask.tobytes()
        if key not in known:
            known[key] = reference_iou(mask, true, contours, convention)
        ious.append(known[key])
    return np.array(ious, dtype=np.float32)


def masks(image, convention):
    if convention == "components":
        return [image > k / 1000 * image.max() for k in range(1000)]
    levels = (255 * image).astype(np.uint8)
    return [levels > int(tau * levels.max()) for tau in np.arange(0, 1, 0.001)]


def reference_iou(mask, true, contours, convention):
    """The IoU of the boxes of one mask."""
    if convention == "components":
        regions = label_regions(mask)
        if contours == "largest":
            largest = max((region.sum() for region, _ in regions), default=0)
            regions = [(region, box) for region, box in regions if region.sum() == largest]
        return max((iou(box, other) for _, box in regions for other in true), default=0)
    regions = label_regions(mask)
    boxes = [box for _, box in regions]
    if contours == "largest" and boxes:
        areas = [area_within_outline(region) for region, _ in regions]
        boxes = [max(zip(areas, range(len(boxes)), boxes, strict=True))[2]]
    elif contours == "all":
        boxes += hole_boxes(mask)
    height, width = mask.shape
    boxes = [(x1, y1, min(x2, width - 1), min(y2, height - 1)) for x1, y1, x2, y2 in boxes]
    return max(iou(box, other, 1) for box in boxes or [(0, 0, 0, 0)] for other in true)


def label_regions(mask):
    """Regions and their half-open boxes, in the order of their first pixels."""
    labels, n = ndimage.label(mask, EIGHT_NEIGHBOURS)
    regions = [(labels == i, box(labels == i)) for i in range(1, n + 1)]
    return sorted(regions, key=lambda pair: pair[0].argmax())


def box(region):
    rows, columns = np.nonzero(region)
    x1, y1 = int(columns.min()), int(rows.min())
    return x1, y1, int(columns.max()) + 1, int(rows.max()) + 1


def hole_boxes(mask):
    """The boxes of holes, with a pixel around: regions outside the mask away from the border."""
    labels, n = ndimage.label(np.pad(~mask, 1, constant_values=True))
    boxes = [box(labels == i) for i in range(1, n + 1) if i != labels[0, 0]]
    return [(x1 - 2, y1 - 2, x2, y2) for x1, y1, x2, y2 in boxes]  # the padding is 1


def area_within_outline(region):
    """The number of squares of four pixels in the filled region; three pixels count a half."""
    filled = ndimage.binary_fill_holes(region)
    four = sum(filled[i : i + filled.shape[0] - 1] * 1 for i in (0, 1))
    four = four[:, 1:] + four[:, :-1]
    return (four == 4).sum() + (four == 3).sum() / 2


def iou(a, b, end=0):
    shared = [max(min(a[i + 2], b[i + 2]) - max(a[i], b[i]) + end, 0) for i in (0, 1)]
    areas = [(c[2] - c[0] + end) * (c[3] - c[1] + end) for c in (a, b)]
    return shared[0] * shared[1] / (sum(areas) - shared[0] * shared[1])


# --- maps ----------------------------------------------------------------------------------------

SIZES = ((12, 17), (17, 9), (8, 8), (5, 24), (1, 13), (7, 1), (2, 2), (21, 22))


def hard_maps(seed):
    """The names and the maps (H, W), in float64, of 30 random and regular maps."""
    random = np.random.default_rng(seed)
    size = SIZES[seed % len(SIZES)]
    height, width = size
    y, x = np.indices(size)
    noise = random.random(size)
    smooth = torch.from_numpy(random.random((1, 1, 4, 5)))
    smooth = min_max(resize(smooth, size))[0, 0].numpy()
    rings = np.maximum(abs(y - height // 2), abs(x - width // 2))
    diamonds = abs(y % 6 - 2) + abs(x % 6 - 2)
    lines = random.random(size) < 0.1
    frame = (y == 0) | (y == height - 1) | (x == 0) | (x == width - 1)
    maps = {
        "noise": noise,
        "noise in float32": noise.astype(np.float32).astype(np.float64),
        "noise below 1": noise * 0.37,
        "noise of few bytes": noise * 0.02,
        "noise of one byte": noise / 255,
        "noise without a byte": noise * 0.003,
        "tiny noise": noise * 1e-30,
        "a subnormal": (noise > 0.5) * 5e-324,
        "smooth": smooth,
        "smooth steps": np.round(smooth * 4) / 4,
        "smooth, and noise": np.clip(0.9 * smooth + 0.1 * noise, 0, 1),
        "bimodal": 1 / (1 + np.exp(-40 * (smooth - 0.5))),
        "islands": (noise > 0.8) * 1.0,
        "holes": (noise > 0.45) * 0.8,
        "pixels": (noise > 0.93) * random.random(size),
        "steps of noise": np.floor(noise * 3) / 3,
        "many steps of noise": np.floor(noise * 20) / 20,
        "holes in holes": (rings % 2) * 1.0,
        "holes in holes, uneven": np.clip((rings % 3) / 2 * (0.7 + 0.3 * noise), 0, 1),
        "equal diamonds": (diamonds == 1) * 1.0,
        "diamonds": (diamonds == 1) * (0.5 + 0.5 * noise),
        "filled diamonds": (diamonds <= 2) * (0.3 + 0.1 * diamonds),
        "chessboard": (y + x) % 2 * 1.0,
        "columns": (x % 2) * (0.5 + 0.5 * (x % 4 == 1)),
        "lines": np.where(lines.any(1, keepdims=True) | lines.any(0), 0.6, 0.2 * noise),
        "a frame": frame * (0.5 + 0.5 * noise),
        "all but a frame": ~frame * 0.7,
        "mirrored": np.maximum(noise, noise[::-1, ::-1]),
        "constant": np.full(size, random.choice([0.3, 1.0])),
        "zeros": np.zeros(size),
    }
    return maps.items()


def random_boxes(seed, size):
    """One to three random boxes, (m, 4)."""
    random = np.random.default_rng(seed)
    m = random.integers(1, 4)
    low = random.integers(0, [size[1], size[0]], (m, 2))
    return np.concatenate((low, low + random.integers(1, 12, (m, 2))), 1).tolist()
