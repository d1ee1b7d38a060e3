"""The cost of the metrics and of `evaluate`.

    python -m tests.benchmarks.metrics [--device cpu|cuda] [--repeats N] [--threads N]
                                       [--images N] [--json FILE] [--quick]
                                       [--part boxes faithfulness torchcam flat evaluate]

- boxes, on the CPU with one thread: MaxBoxAcc with its 1000 thresholds on a map of 224 x 224. The
  maps are an upsampled class activation map of 7 x 7, a map with nearly two values, as F-CAM's, and
  noise. The references label the mask at each threshold by SciPy ("components"), or draw its
  contours by OpenCV as the authors do ("wsolevaluation"), at all thresholds or at the distinct ones
  only, at most 255 for a map of bytes. All have the same IoUs, which is checked before the timing.
  A ratio is the time of the reference over ours.
- faithfulness, torchcam: see `faithfulness.py`.
- flat, evaluate: see `evaluation.py`.

`measuring.py` describes how times are measured.
"""

import argparse
import functools
import json
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from scipy import ndimage
from torch import Tensor

from captum_ext.imaging import min_max, resize
from captum_ext.metrics import MaxBoxAcc, box_ious
from tests.benchmarks.evaluation import evaluate_tables, flat_tables
from tests.benchmarks.faithfulness import faithfulness_tables, torchcam_tables
from tests.benchmarks.measuring import (
    Calls,
    Row,
    environment,
    markdown,
    measure,
    parse_arguments,
)

SIDE = 224
TRUE_BOX = (40, 50, 150, 170)
WISHED_RATIO = 20
PARTS = ("boxes", "faithfulness", "torchcam", "flat", "evaluate")
MAP_NAMES = ("upsampled 7 x 7", "bimodal", "noise")
ALL_THRESHOLDS, DISTINCT_THRESHOLDS = "each threshold", "distinct thresholds"

Array = np.ndarray[Any, np.dtype[Any]]


def make_map(map_name: str) -> Tensor:
    """A map (1, SIDE, SIDE) in [0, 1]."""
    generator = torch.Generator().manual_seed(0)
    noise = torch.rand(1, SIDE, SIDE, generator=generator, dtype=torch.float64)
    if map_name == "noise":
        return noise
    coarse = torch.rand(1, 1, 7, 7, generator=generator, dtype=torch.float64)
    smooth = min_max(resize(coarse, (SIDE, SIDE)))[:, 0]
    if map_name == "upsampled 7 x 7":
        return smooth
    return (torch.sigmoid(40 * (smooth - 0.5)) + 0.02 * (noise - 0.5)).clamp(0, 1)


# --- the references ------------------------------------------------------------------------------


def ious_by_labels(image: Array, contours: str) -> Array:
    """The IoUs at all thresholds by "components", with SciPy's labels."""
    ious = []
    for threshold in np.arange(1000) / 1000 * image.max():
        labels, _ = ndimage.label(image > threshold, np.ones((3, 3)))
        boxes = [(x.start, y.start, x.stop, y.stop) for y, x in ndimage.find_objects(labels)]
        candidates = np.array(boxes)
        if contours == "largest":
            areas = np.bincount(labels.ravel())[1:]
            candidates = candidates[areas == areas.max()]
        ious.append(best_iou(candidates, 0))
    return np.array(ious, dtype=np.float32)


def ious_by_contours(image: Array, contours: str, distinct: bool = False) -> Array:
    """The IoUs at all thresholds by "wsolevaluation", with OpenCV's contours."""
    levels = (255 * image).astype(np.uint8)
    known: dict[int, float] = {}
    ious = []
    for tau in np.arange(0, 1, 0.001):
        threshold = int(tau * levels.max())
        if threshold not in known or not distinct:
            mask = 255 * (levels > threshold).astype(np.uint8)
            outlines, _ = cv2.findContours(mask, cv2.RETR_TREE, cv2.CHAIN_APPROX_SIMPLE)
            if contours == "largest":
                outlines = [max(outlines, key=cv2.contourArea)]
            boxes = np.array([cv2.boundingRect(outline) for outline in outlines])
            ends = np.minimum(boxes[:, :2] + boxes[:, 2:], SIDE - 1)
            known[threshold] = best_iou(np.concatenate((boxes[:, :2], ends), 1), 1)
        ious.append(known[threshold])
    return np.array(ious, dtype=np.float32)


def best_iou(boxes: Array, inclusive: int) -> float:
    """The best IoU of boxes (n, 4) with TRUE_BOX."""
    true = np.array(TRUE_BOX)
    low, high = np.maximum(boxes[:, :2], true[:2]), np.minimum(boxes[:, 2:], true[2:])
    shared = (high - low + inclusive).clip(0).prod(1)
    areas = (boxes[:, 2:] - boxes[:, :2] + inclusive).prod(1)
    union = areas + (true[2:] - true[:2] + inclusive).prod() - shared
    return float((shared / union).max())


REFERENCES: dict[str, dict[str, Callable[[Array, str], Array]]] = {
    "components": {f"SciPy, {ALL_THRESHOLDS}": ious_by_labels},
    "wsolevaluation": {
        f"OpenCV, {ALL_THRESHOLDS}": ious_by_contours,
        f"OpenCV, {DISTINCT_THRESHOLDS}": functools.partial(ious_by_contours, distinct=True),
    },
}


# --- tables --------------------------------------------------------------------------------------


def make_box_calls(map_name: str, device: torch.device) -> Calls:
    maps, boxes = make_map(map_name).to(device), [torch.tensor([TRUE_BOX])]
    image = maps[0].cpu().numpy()
    calls: Calls = {}
    for convention, references in REFERENCES.items():
        for contours in ("largest", "all"):
            ours = box_ious(maps, boxes, contours, convention)[0].cpu().numpy()
            metric = MaxBoxAcc((0.3, 0.5, 0.7), contours, convention)
            name = f"{convention}, {contours}"
            calls[name] = functools.partial(metric.update, maps, boxes)
            for title, reference in references.items():
                np.testing.assert_array_equal(ours, reference(image, contours))
                calls[f"{name}: {title}"] = functools.partial(reference, image, contours)
    return calls


def baseline_of(name: str) -> str:
    return name.partition(":")[0]


def ratio_sentence(rows: list[Row]) -> str:
    """A sentence with the wished ratio and the measured ones."""
    measured = [
        f"{baseline_of(row['name'])} {row['ratio']:.0f}"
        for row in rows
        if row["name"].endswith(ALL_THRESHOLDS)
    ]
    wished = f"Wished: {WISHED_RATIO} times as fast as at {ALL_THRESHOLDS}"
    return f"{wished}; measured: {'; '.join(measured)}."


def box_tables(repeats: int, threads: int) -> dict[str, Any]:
    torch.set_num_threads(1)
    cv2.setNumThreads(1)
    tables: dict[str, Any] = {}
    for map_name in MAP_NAMES:
        build = functools.partial(make_box_calls, map_name)
        rows = measure(build, baseline_of, repeats, torch.device("cpu"))
        print(f"MaxBoxAcc, {map_name}, {SIDE} x {SIDE}, one thread, {repeats} rounds\n")
        print(f"{markdown(rows)}\n\n{ratio_sentence(rows)}\n", flush=True)
        tables[map_name] = rows
    torch.set_num_threads(threads)
    return tables


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--repeats", type=int, default=5, help="rounds")
    parser.add_argument("--threads", type=int, default=2, help="of the CPU")
    parser.add_argument("--images", type=int, help="in a batch of faithfulness and torchcam")
    parser.add_argument("--json", type=Path, help="write all numbers here")
    parser.add_argument("--part", nargs="+", choices=PARTS, default=PARTS, help="all, if not named")
    arguments = parse_arguments(parser, repeats=1, images=2, part=PARTS[:3])
    warnings.simplefilter("ignore")
    device, repeats, images = torch.device(arguments.device), arguments.repeats, arguments.images
    torch.set_num_threads(arguments.threads)
    tables: dict[str, Any] = {"environment": environment(device, arguments.threads), "seconds": {}}
    print(", ".join(f"{k} {v}" for k, v in tables["environment"].items()), end="\n\n")
    parts: dict[str, Callable[[], dict[str, Any]]] = {
        "boxes": lambda: box_tables(repeats, arguments.threads),
        "faithfulness": lambda: faithfulness_tables(device, repeats, images),
        "torchcam": lambda: torchcam_tables(device, repeats, images),
        "flat": flat_tables,
        "evaluate": lambda: evaluate_tables(device, repeats),
    }
    for part in arguments.part:
        start = time.perf_counter()
        tables[part] = parts[part]()
        tables["seconds"][part] = time.perf_counter() - start
        print(f"({part}: {tables['seconds'][part]:.0f} seconds)\n", flush=True)
        if arguments.json:
            arguments.json.write_text(json.dumps(tables, indent=1, default=float))


if __name__ == "__main__":
    main()
