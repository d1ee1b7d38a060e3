"""Costs of the metrics and of `evaluate`, in one run.

    python -m tests.benchmarks.metrics [--device cpu|cuda] [--repeats N] [--threads N]
                                       [--images N] [--json FILE] [--quick]
                                       [--part boxes faithfulness torchcam flat evaluate]

- boxes, on the CPU with one thread: MaxBoxAcc, its 1000 thresholds on a map of 224 x 224: a class
  activation map of 7 x 7 upsampled; one that is nearly of two values, as F-CAM's are; and noise. It
  is compared with labelling by SciPy at each threshold ("components"), or drawing contours by
  OpenCV as the authors do ("wsolevaluation"), and with doing the latter only for the thresholds
  that differ, which are but 255 of a map of bytes. All have the same IoUs: this is checked before
  anything is timed. Each ratio is how many times as long as ours it takes.
- faithfulness, torchcam: see `faithfulness.py`.
- flat, evaluate: see `evaluation.py`.

How it is measured says `measuring.py`.
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
TRUE = (40, 50, 150, 170)
WISHED = 20
PARTS = ("boxes", "faithfulness", "torchcam", "flat", "evaluate")
KINDS = ("upsampled 7 x 7", "bimodal", "noise")
EVERY, DISTINCT = "each threshold", "distinct thresholds"

Array = np.ndarray[Any, np.dtype[Any]]


def a_map(pattern: str) -> Tensor:
    """(1, SIDE, SIDE) in [0, 1]."""
    generator = torch.Generator().manual_seed(0)
    noise = torch.rand(1, SIDE, SIDE, generator=generator, dtype=torch.float64)
    if pattern == "noise":
        return noise
    coarse = torch.rand(1, 1, 7, 7, generator=generator, dtype=torch.float64)
    smooth = min_max(resize(coarse, (SIDE, SIDE)))[:, 0]
    if pattern == "upsampled 7 x 7":
        return smooth
    return (torch.sigmoid(40 * (smooth - 0.5)) + 0.02 * (noise - 0.5)).clamp(0, 1)


# --- the plain way -------------------------------------------------------------------------------


def by_labels(image: Array, contours: str) -> Array:
    """The IoU at each threshold, "components", with SciPy's labels."""
    ious = []
    for cut in np.arange(1000) / 1000 * image.max():
        labels, _ = ndimage.label(image > cut, np.ones((3, 3)))
        boxes = [(x.start, y.start, x.stop, y.stop) for y, x in ndimage.find_objects(labels)]
        chosen = np.array(boxes)
        if contours == "largest":
            areas = np.bincount(labels.ravel())[1:]
            chosen = chosen[areas == areas.max()]
        ious.append(best_iou(chosen, 0))
    return np.array(ious, dtype=np.float32)


def by_contours(image: Array, contours: str, distinct: bool = False) -> Array:
    """The IoU at each threshold, "wsolevaluation", with OpenCV's contours."""
    levels = (255 * image).astype(np.uint8)
    known: dict[int, float] = {}
    ious = []
    for tau in np.arange(0, 1, 0.001):
        cut = int(tau * levels.max())
        if cut not in known or not distinct:
            mask = 255 * (levels > cut).astype(np.uint8)
            outlines, _ = cv2.findContours(mask, cv2.RETR_TREE, cv2.CHAIN_APPROX_SIMPLE)
            if contours == "largest":
                outlines = [max(outlines, key=cv2.contourArea)]
            boxes = np.array([cv2.boundingRect(outline) for outline in outlines])
            ends = np.minimum(boxes[:, :2] + boxes[:, 2:], SIDE - 1)
            known[cut] = best_iou(np.concatenate((boxes[:, :2], ends), 1), 1)
        ious.append(known[cut])
    return np.array(ious, dtype=np.float32)


def best_iou(boxes: Array, end: int) -> float:
    """IoUs of boxes (n, 4) with TRUE."""
    true = np.array(TRUE)
    low, high = np.maximum(boxes[:, :2], true[:2]), np.minimum(boxes[:, 2:], true[2:])
    shared = (high - low + end).clip(0).prod(1)
    areas = (boxes[:, 2:] - boxes[:, :2] + end).prod(1) + (true[2:] - true[:2] + end).prod()
    return float((shared / (areas - shared)).max())


PLAIN: dict[str, dict[str, Callable[[Array, str], Array]]] = {
    "components": {f"SciPy, {EVERY}": by_labels},
    "wsolevaluation": {
        f"OpenCV, {EVERY}": by_contours,
        f"OpenCV, {DISTINCT}": functools.partial(by_contours, distinct=True),
    },
}


# --- measurements ----------------------------------------------------------------------------


def box_calls(pattern: str, device: torch.device) -> Calls:
    maps, boxes = a_map(pattern).to(device), [torch.tensor([TRUE])]
    image = maps[0].cpu().numpy()
    calls: Calls = {}
    for convention, ways in PLAIN.items():
        for contours in ("largest", "all"):
            ours = box_ious(maps, boxes, contours, convention)[0].cpu().numpy()
            metric = MaxBoxAcc((0.3, 0.5, 0.7), contours, convention)
            name = f"{convention}, {contours}"
            calls[name] = functools.partial(metric.update, maps, boxes)
            for way, plain in ways.items():
                np.testing.assert_array_equal(ours, plain(image, contours))
                calls[f"{name}: {way}"] = functools.partial(plain, image, contours)
    return calls


def ours_of(name: str) -> str:
    return name.partition(":")[0]


def wish(rows: list[Row]) -> str:
    """How many times as long the plain way takes, for each of our calls."""
    seen = [
        f"{ours_of(row['name'])} {row['ratio']:.0f}" for row in rows if row["name"].endswith(EVERY)
    ]
    return f"Wished: {WISHED} times as fast as at {EVERY}; seen: {'; '.join(seen)}."


def box_tables(repeats: int, threads: int) -> dict[str, Any]:
    torch.set_num_threads(1)
    cv2.setNumThreads(1)
    tables: dict[str, Any] = {}
    for pattern in KINDS:
        build = functools.partial(box_calls, pattern)
        rows = measure(build, ours_of, repeats, torch.device("cpu"))
        print(f"MaxBoxAcc, {pattern}, {SIDE} x {SIDE}, one thread, {repeats} rounds\n")
        print(f"{markdown(rows)}\n\n{wish(rows)}\n", flush=True)
        tables[pattern] = rows
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
