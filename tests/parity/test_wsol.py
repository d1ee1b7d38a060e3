"""Boxes and their accuracy against OpenCV's contours, as the authors of MaxBoxAcc use them."""

import numpy as np
import pytest
import torch

from captum_ext.imaging import min_max, resize
from captum_ext.metrics import box_ious
from tests.metrics.by_thresholds import hard_maps, iou, random_boxes

cv2 = pytest.importorskip("cv2")


def by_contours(image, true, all_contours):
    """The evaluation of one map, threshold by threshold, with cv2.findContours."""
    height, width = image.shape
    levels = (image.astype(np.float64) * 255).astype(np.uint8)
    by_threshold = {}
    for threshold in {int(tau * levels.max()) for tau in np.arange(0, 1, 0.001)}:
        mask = 255 * (levels > threshold).astype(np.uint8)
        contours, _ = cv2.findContours(mask, cv2.RETR_TREE, cv2.CHAIN_APPROX_SIMPLE)
        if contours and not all_contours:
            contours = [max(contours, key=cv2.contourArea)]
        boxes = [(0, 0, 0, 0)] if not contours else []
        for contour in contours:
            x, y, w, h = cv2.boundingRect(contour)
            boxes.append((x, y, min(x + w, width - 1), min(y + h, height - 1)))
        by_threshold[threshold] = max(iou(box, other, 1) for box in boxes for other in true)
    ious = [by_threshold[int(tau * levels.max())] for tau in np.arange(0, 1, 0.001)]
    return np.array(ious, dtype=np.float32)


def maps(pattern, n=6, size=(28, 37)):
    generator = torch.Generator().manual_seed(0)
    if pattern == "smooth":
        return min_max(resize(torch.rand(n, 1, 5, 6, generator=generator), size))[:, 0]
    if pattern == "noise":
        return torch.rand(n, *size, generator=generator)
    sparse = torch.rand(n, *size, generator=generator) > 0.45  # two levels, holes and islands
    return sparse.float() * 0.8


@pytest.mark.parametrize("contours", ["largest", "all"])
@pytest.mark.parametrize("pattern", ["smooth", "noise", "sparse"])
def test_box_ious_are_those_of_opencvs_contours(pattern, contours):
    values = maps(pattern)
    boxes = [
        torch.tensor([[3 + i, 4, 20, 12 + i], [0, 0, 9, 9 + i]][: 1 + i % 2]) for i in range(6)
    ]
    ious = box_ious(values, boxes, contours, "wsolevaluation")
    for image, true, ours in zip(values.numpy(), boxes, ious, strict=True):
        theirs = by_contours(image, true.tolist(), contours == "all")
        np.testing.assert_array_equal(ours.numpy(), theirs)


@pytest.mark.parametrize("contours", ["largest", "all"])
@pytest.mark.parametrize("seed", range(8))
def test_box_ious_of_240_hard_maps_are_those_of_opencvs_contours(seed, contours):
    for i, (name, image) in enumerate(hard_maps(seed)):
        true = random_boxes(30 * seed + i, image.shape)
        values = torch.from_numpy(image)[None]
        ious = box_ious(values, [torch.tensor(true)], contours, "wsolevaluation")
        theirs = by_contours(image, true, contours == "all")
        np.testing.assert_array_equal(ious[0].numpy(), theirs, err_msg=name)
