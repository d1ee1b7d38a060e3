"""Boxes and their accuracy against OpenCV's contours, as the authors of MaxBoxAcc use them."""

import numpy as np
import pytest
import torch

from captum_ext.imaging import min_max, resize
from captum_ext.metrics import box_ious

cv2 = pytest.importorskip("cv2")


def by_contours(image, true, every):
    """The evaluation of one map, threshold by threshold, with cv2.findContours."""
    height, width = image.shape
    levels = (image * 255).astype(np.uint8)
    found = []
    for tau in np.arange(0, 1, 0.001):
        mask = 255 * (levels > int(tau * levels.max())).astype(np.uint8)
        contours, _ = cv2.findContours(mask, cv2.RETR_TREE, cv2.CHAIN_APPROX_SIMPLE)
        if contours and not every:
            contours = [max(contours, key=cv2.contourArea)]
        boxes = [(0, 0, 0, 0)] if not contours else []
        for contour in contours:
            x, y, w, h = cv2.boundingRect(contour)
            boxes.append((x, y, min(x + w, width - 1), min(y + h, height - 1)))
        found.append(max(iou(box, one) for box in boxes for one in true))
    return found


def iou(a, b):
    shared = [max(min(a[i + 2], b[i + 2]) - max(a[i], b[i]) + 1, 0) for i in (0, 1)]
    areas = [(box[2] - box[0] + 1) * (box[3] - box[1] + 1) for box in (a, b)]
    return shared[0] * shared[1] / (sum(areas) - shared[0] * shared[1])


def maps(kind, n=6, size=(28, 37)):
    generator = torch.Generator().manual_seed(0)
    if kind == "smooth":
        return min_max(resize(torch.rand(n, 1, 5, 6, generator=generator), size))[:, 0]
    if kind == "noise":
        return torch.rand(n, *size, generator=generator)
    sparse = torch.rand(n, *size, generator=generator) > 0.45  # two levels, holes and islands
    return sparse.float() * 0.8


@pytest.mark.parametrize("contours", ["largest", "all"])
@pytest.mark.parametrize("kind", ["smooth", "noise", "sparse"])
def test_box_ious(kind, contours):
    values = maps(kind)
    boxes = [
        torch.tensor([[3 + i, 4, 20, 12 + i], [0, 0, 9, 9 + i]][: 1 + i % 2]) for i in range(6)
    ]
    found = box_ious(values, boxes, contours)
    for image, true, ours in zip(values.numpy(), boxes, found, strict=True):
        theirs = by_contours(image, true.tolist(), contours == "all")
        np.testing.assert_allclose(ours.numpy(), theirs, atol=1e-6)
