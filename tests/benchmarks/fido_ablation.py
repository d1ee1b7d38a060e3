"""The effect on FIDO's masks of simplified dropout, temperature, masks a step, and steps.

    python -m tests.benchmarks.fido_ablation [--images N] [--masks N ...] [--steps N ...]
        [--dropouts NAME ...] [--temperatures T ...] [--seeds N] [--repeats N] [--workers N]
        [--threads N] [--output FILE] [--figure FILE]

The pictures are held-out specimens of `captum_ext.datasets.FineGrainedParts` (224 px; the truth is
the mark, 2% to 3% of the picture), and the network is its `SmallCNN`, trained here first. Neither
was chosen by the results of any explanation. The target is the label.

The grid: concrete dropout ("cd") or the simplified one ("scd") x temperature x masks a step, with
as many seeds as asked for at 8 masks and one elsewhere; everything else as in `COMMON`. Fewer steps
are read within the run of most steps. Beside the grid, at 8 masks and with one seed, is simplified
dropout at t = 1 with one thing changed, and the named settings. For each of them and for SSR, SDR
and joint maps:

- IoU with the mark of the map above 0.5, and above the one threshold that is best for all images;
- TV (Eq. 10 of the paper): squared differences of neighbours in the soft map, summed;
- the share of the picture above 0.5;
- for joint maps, how much the IoU above 0.5 is more than Grad-CAM's at its best threshold, image by
  image; of all images, and of those where the class of the blurred image is another one. The
  network gives the other pictures, of the class that it answers where it sees no mark, the same
  answer without any of their pixels: there, nothing is needed, and an empty mask is right.

Grad-CAM of the last convolution (positive part, bilinear, min-max) is at 0.5 and at its best single
threshold: as Captum's users upsample it, and with the units in place, where the receptive fields of
the layer are centred. Chance is the whole picture.

The variance of the gradient: logits are fixed as they were at some steps of two runs at 8 masks,
and the gradient of the mean scores is taken again and again, with fresh noise, the same for all
variants. The variance over repeats, summed over pixels, objectives and images, is divided by the
squared length of the mean gradient, which is that of all repeats at all numbers of masks, less what
variance adds to it. So 1 means as much noise as signal. For one draw of the noise there is also the
error of float32 against float64 (SCD), relative to the length of the gradient.

Means are over images, after those over seeds; intervals are the central 95% of 10,000 bootstrap
samples of the images, the same for all. The images share their random masks, so the intervals are
given these masks. Seconds are those of workers that run side by side, for an image and a step, and
contain the maps that are made for the callback at each step. In concrete dropout, log theta is
taken anew for each mask: of the two dropouts' seconds, the difference is a matter of programming.

Each finished part is a line of FILE's neighbour with the ending .partial; a run that was killed
goes on from there, with the network that is beside it, if its settings are the same.
"""

import argparse
import importlib.metadata
import json
import multiprocessing
import platform
import re
import time
import zlib
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor, as_completed
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from captum.attr import LayerGradCam
from torch import Generator, Tensor
from tqdm import tqdm

from captum_ext._engine.receptive_field import receptive_field, unit_offset
from captum_ext.attr import FIDO, FIDOMasks
from captum_ext.attr._concrete_dropout import DROPOUTS
from captum_ext.attr._masked_scores import SDR, SSR, LogOddsScorer, MaskedScores
from captum_ext.datasets import PATTERNS, FineGrainedParts, SmallCNN, train_classifier
from captum_ext.datasets.fine_grained import BeetleBatch, normalized, stacked
from captum_ext.imaging import lay_over, min_max
from captum_ext.infill import Infill, gaussian
from captum_ext.metrics import mask_iou, total_variation

if TYPE_CHECKING:
    from matplotlib.figure import Figure

TUTORIALS = Path(__file__).parents[2] / "tutorials"
OUTPUT = TUTORIALS / "data" / "fido_ablation.json"
FIGURE = TUTORIALS / "fido_ablation.png"

TRAINING = {"n": 4000, "seed": 0, "n_epochs": 10}
TEST_SEED = 1
GROUP, BATCH = 10, 20  # images of a part, and masked images in a pass
SEEDED = 8  # masks
MAPS = ("ssr", "sdr", "joint")
CAMS = ("grad_cam", "grad_cam in place")
THRESHOLDS = [round(0.05 * i, 2) for i in range(1, 20)]
SAMPLES = 10_000
# The weights, norm and optimiser of the published code: FIDO's defaults.
COMMON = {"l1": 5e-4, "tv": 1e-2, "tv_norm": "l1", "lr": 10.0, "eps": 0.1, "warmup": 5}
# A coarse mask has a sixteenth of the pixels, and a quarter of the edges.
BESIDE: dict[str, dict[str, Any]] = {
    "l1 = 1e-3": {"l1": 1e-3},
    "l1 = 2e-4": {"l1": 2e-4},
    "TV of squares": {"tv_norm": "l2"},
    "mask of 56 x 56, weights to match": {"mask_size": 56, "l1": 8e-3, "tv": 4e-2},
    "infill: mean": {"baselines": "mean"},
    "infill: noise": {"baselines": "noise"},
    "FIDO.PAPER": dict(FIDO.PAPER),
    "FIDO.RELEASED": dict(FIDO.RELEASED),
}
REFERENCE = ("cd", 0.1)
SIMPLIFIED = ("scd", 1.0)

Row = dict[str, Any]
Variant = tuple[str, float]


def title(variant: Variant) -> str:
    return f"{variant[0].upper()}, t = {variant[1]:g}"


# --- the network and the pictures ----------------------------------------------------------------


def trained(path: Path, settings: Row, threads: int) -> tuple[SmallCNN, Row]:
    """The network at the path if it was trained with the same settings; else one trained now."""
    settings = settings | {"versions": versions()}
    network = SmallCNN(len(PATTERNS)).eval()
    if path.is_file():
        saved = torch.load(path, weights_only=True)
        if saved["settings"] == settings:
            network.load_state_dict(saved["state"])
            return network, saved["about"]
    torch.set_num_threads(threads)
    start = time.perf_counter()
    data = FineGrainedParts(settings["n"], settings["seed"])
    network = train_classifier(data, n_epochs=settings["n_epochs"], show_progress=True)
    about = {"seconds": time.perf_counter() - start, "threads": threads}
    about |= accuracy(network, FineGrainedParts(800, TEST_SEED))
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(".unfinished.partial")
    torch.save({"settings": settings, "state": network.state_dict(), "about": about}, unfinished)
    unfinished.replace(path)
    return network, about


def accuracy(network: SmallCNN, data: FineGrainedParts) -> dict[str, float]:
    """The accuracy on the specimens, with and without their marks."""
    right: dict[str, float] = {"accuracy": 0, "without_marks": 0}
    for i in range(len(data)):
        for key, specimen in zip(right, (data[i], data.variant(i, None)), strict=True):
            with torch.no_grad():
                answer = network(normalized(stacked([specimen.image]))).argmax()
            right[key] += int(answer) == specimen.target
    return {key: count / len(data) for key, count in right.items()}


@cache
def loaded(path: Path, n_images: int) -> tuple[SmallCNN, BeetleBatch]:
    """The network and the pictures, once for each process."""
    network = SmallCNN(len(PATTERNS)).eval().requires_grad_(False)
    network.load_state_dict(torch.load(path, weights_only=True)["state"])
    return network, FineGrainedParts(n_images, TEST_SEED).batch()


def prepare(threads: int) -> None:
    """Set up a worker. Malloc keeps its blocks, which the kernel then need not clear again."""
    import ctypes

    torch.set_num_threads(threads)
    if platform.libc_ver()[0] == "glibc":
        for parameter in (-1, -3):  # M_TRIM_THRESHOLD, M_MMAP_THRESHOLD
            ctypes.CDLL(None).mallopt(parameter, 2**30)


# --- the grid ------------------------------------------------------------------------------------


def cells(variants: list[Variant], masks: list[int], n_seeds: int) -> list[Row]:
    return [
        {"dropout": dropout, "temperature": temperature, "n_masks": n_masks, "seed": seed}
        for n_masks in sorted(masks, reverse=True)
        for dropout, temperature in variants
        for seed in range(n_seeds if n_masks == SEEDED else 1)
    ]


def cells_beside() -> list[Row]:
    dropout, temperature = SIMPLIFIED
    common = {"dropout": dropout, "temperature": temperature, "n_masks": SEEDED, "seed": 0}
    return [{**common, "beside": name} for name in BESIDE]


def run_cell(path: Path, n_images: int, cell: Row, first: int, steps: list[int]) -> Row:
    """One cell for a group of images."""
    network, batch = loaded(path, n_images)
    part = slice(first, first + GROUP)
    kept: dict[int, FIDOMasks] = {}
    start = time.perf_counter()
    optimise(network, batch, part, cell, max(steps), keeper(kept, steps))
    seconds = time.perf_counter() - start
    return {
        "kind": "cell",
        **cell,
        "first": first,
        "seconds": seconds,
        "found": {str(s): measured(kept[s], batch.parts[part]) for s in steps},
    }


def optimise(
    network: SmallCNN,
    batch: BeetleBatch,
    part: slice,
    cell: Row,
    n_steps: int,
    callback: Callable[[int, FIDOMasks], None],
) -> None:
    chosen = {key: cell[key] for key in ("n_masks", "dropout", "temperature")}
    options = COMMON | chosen | BESIDE.get(cell.get("beside", ""), {}) | {"n_steps": n_steps}
    FIDO(network).attribute(
        batch.images[part],
        target=batch.targets[part],
        generator=Generator().manual_seed(cell["seed"]),
        internal_batch_size=BATCH,
        callback=callback,
        **options,
    )


def keeper(kept: dict[int, FIDOMasks], steps: Iterable[int]) -> Callable[[int, FIDOMasks], None]:
    def keep(step: int, masks: FIDOMasks) -> None:
        if step in steps:
            kept[step] = masks

    return keep


def measured(masks: FIDOMasks, parts: Tensor) -> Row:
    row: Row = {"largest_logit": masks.logits.abs().max().item()}
    for name in MAPS:
        values = getattr(masks, name)[:, 0]
        row[name] = measures(values, parts)
    return row


def measures(maps: Tensor, parts: Tensor) -> Row:
    """The measures of each image, and the sum over images of the IoU at each threshold."""
    return {
        "iou": mask_iou(maps > 0.5, parts).tolist(),
        "tv": total_variation(maps).tolist(),
        "area": (maps > 0.5).float().mean((1, 2)).tolist(),
        "iou_at": [mask_iou(maps > t, parts).sum().item() for t in THRESHOLDS],
    }


def grad_cam(path: Path, n_images: int) -> Row:
    network, batch = loaded(path, n_images)
    images, layer = batch.images, network.last
    coarse = LayerGradCam(network, layer).attribute(
        images, target=batch.targets, relu_attributions=True
    )
    size, cells = (images.shape[2], images.shape[3]), (coarse.shape[2], coarse.shape[3])
    offset = unit_offset(receptive_field(network, layer, images[:1], None), size, cells)
    row: Row = {"kind": "beside", "offset": offset}
    row["chance"] = batch.parts.float().mean((1, 2)).tolist()
    with torch.no_grad():
        answers = network(gaussian(images)).argmax(1)
    row["needed"] = (answers != batch.targets).tolist()
    for name, shift in (("grad_cam", (0.0, 0.0)), ("grad_cam in place", offset)):
        maps = min_max(lay_over(coarse.detach(), size, shift))[:, 0]
        row[name] = {f"{t:g}": mask_iou(maps > t, batch.parts).tolist() for t in THRESHOLDS}
    return row


# --- the variance of the gradient ----------------------------------------------------------------


def run_variance(
    path: Path,
    n_images: int,
    source: Variant,
    variants: list[Variant],
    masks: list[int],
    steps: list[int],
    repeats: int,
) -> Row:
    """All variants' gradients at the logits of one run."""
    network, batch = loaded(path, n_images)
    part = slice(0, n_images)
    kept: dict[int, FIDOMasks] = {}
    cell: Row = {"dropout": source[0], "temperature": source[1], "n_masks": SEEDED, "seed": 0}
    optimise(network, batch, part, cell, max(steps), keeper(kept, steps))
    logits = {step: kept[step].logits for step in steps}
    if source == SIMPLIFIED:
        logits = {0: torch.zeros_like(kept[max(steps)].logits), **logits}
    start = time.perf_counter()
    stages = []
    for step, values in logits.items():
        stage: Row = {"step": step, "largest_logit": values.abs().max().item(), "variants": []}
        for dropout, t in variants:
            noise = variance(network, batch, values, (dropout, t), masks, repeats)
            error = rounding(network, batch, values, (dropout, t))
            stage["variants"].append(
                {"dropout": dropout, "temperature": t, **noise, "error": error}
            )
        stages.append(stage)
    seconds = time.perf_counter() - start
    return {"kind": "variance", "source": list(source), "seconds": seconds, "stages": stages}


def gradients(
    network: SmallCNN,
    batch: BeetleBatch,
    n_masks: int,
    dropout: Callable[[Tensor, Tensor], Tensor],
) -> MaskedScores:
    """The object that gives the gradient of the scores by the logits, as `FIDO` uses it."""
    return MaskedScores(
        LogOddsScorer(network, "logits", batch.targets, None, batch.images),
        batch.images,
        Infill(batch.images),
        dropout,
        (SSR, SDR),
        n_masks,
        BATCH,
    )


def variance(
    network: SmallCNN,
    batch: BeetleBatch,
    logits: Tensor,
    variant: Variant,
    masks: list[int],
    repeats: int,
) -> Row:
    """For each number of masks: the variance over repeats, over the squared mean gradient."""
    dropout, t = variant
    sums, spreads = torch.zeros_like(logits, dtype=torch.float64), {}
    for n_masks in masks:
        term = gradients(network, batch, n_masks, partial(DROPOUTS[dropout], temperature=t))
        total = torch.zeros_like(sums)
        squares = torch.zeros_like(sums)
        for repeat in range(repeats):
            gradient = term(logits, Generator().manual_seed(1000 * n_masks + repeat))[1].double()
            total += gradient
            squares += gradient.square()
        spread = (squares - total.square() / repeats).clamp(min=0) / (repeats - 1)
        spreads[n_masks] = spread.sum().item()
        sums += n_masks * total
    count = repeats * sum(masks)
    of_mean = sum(n**2 * repeats * spreads[n] for n in masks) / count**2
    signal = (sums / count).square().sum().item() - of_mean
    return {
        "signal": signal,
        "variance": {str(n): spreads[n] for n in masks},
        "ratio": {str(n): spreads[n] / signal if signal > 0 else None for n in masks},
    }


def rounding(network: SmallCNN, batch: BeetleBatch, logits: Tensor, variant: Variant) -> float:
    """|g32 - g64| / |g64| for one draw of noise, g64 from the simplified dropout in float64."""
    dropout, t = variant
    drawn: list[Tensor] = []

    def recorded(values: Tensor, uniform: Tensor) -> Tensor:
        drawn.append(uniform)
        return DROPOUTS[dropout](values, uniform, temperature=t)

    def replayed(values: Tensor, uniform: Tensor) -> Tensor:
        return DROPOUTS["scd"](values, drawn.pop(0).double(), temperature=t)

    single = gradients(network, batch, SEEDED, recorded)(logits, Generator().manual_seed(0))[1]
    double = SmallCNN(len(PATTERNS)).double().eval().requires_grad_(False)
    double.load_state_dict(network.state_dict())
    twice = BeetleBatch(batch.images.double(), batch.targets, batch.parts)
    true = gradients(double, twice, SEEDED, replayed)(logits.double(), Generator())[1]
    return float((single.double() - true).norm() / true.norm())


# --- the summary ---------------------------------------------------------------------------------


def summarise(rows: list[Row], variants: list[Variant], masks: list[int], steps: list[int]) -> Row:
    beside = next(row for row in rows if row["kind"] == "beside")
    n_images = len(beside["chance"])
    samples = np.random.RandomState(0).randint(n_images, size=(SAMPLES, n_images))
    summary: Row = {"chance": interval(np.array(beside["chance"]), samples), "cells": []}
    summary["beside"] = []
    needed = np.array(beside["needed"])
    resampled = np.random.RandomState(1).randint(needed.sum(), size=(SAMPLES, needed.sum()))
    summary["needed"] = int(needed.sum())
    cams: dict[str, np.ndarray] = {}
    cams_needed: dict[str, np.ndarray] = {}
    for name in CAMS:
        ious = {t: np.array(values) for t, values in beside[name].items()}
        best = max(ious, key=lambda t: ious[t].mean())
        cams[name] = ious[best]
        summary[name] = {"threshold": float(best), "iou_best": interval(ious[best], samples)}
        summary[name]["iou"] = interval(ious["0.5"], samples)
        cams_needed[name] = max((v[needed] for v in ious.values()), key=np.mean)
        summary[name]["iou_needed"] = interval(cams_needed[name], resampled)
    grid = [
        {"dropout": dropout, "temperature": temperature, "n_masks": n_masks}
        for dropout, temperature in variants
        for n_masks in sorted(masks)
    ]
    named = [{key: cell[key] for key in cell if key != "seed"} for cell in cells_beside()]
    for step in steps:
        reference: Row | None = None
        if REFERENCE in variants and SEEDED in masks:
            dropout, temperature = REFERENCE
            key = {"dropout": dropout, "temperature": temperature, "n_masks": SEEDED}
            reference = {name: gathered(of_cell(rows, key), step, name, "tv") for name in MAPS}
        for key in grid + named:
            cell = of_cell(rows, key)
            if not cell:
                continue
            n_seeds = len({row["seed"] for row in cell})
            seconds = sum(row["seconds"] for row in cell)
            options = BESIDE.get(key.get("beside", ""), {})
            ran = {k: options.get(k, key[k]) for k in ("dropout", "temperature", "n_masks")}
            entry: Row = (
                key
                | ran
                | {
                    "steps": step,
                    "seeds": n_seeds,
                    "seconds_per_image_and_step": seconds / (n_seeds * n_images * max(steps)),
                    "largest_logit": max(r["found"][str(step)]["largest_logit"] for r in cell),
                }
            )
            for name in MAPS:
                values = {k: gathered(cell, step, name, k) for k in ("iou", "tv", "area")}
                at = np.array([row["found"][str(step)][name]["iou_at"] for row in cell])
                at = at.sum(0) / (n_images * n_seeds)
                entry[name] = {k: interval(v, samples) for k, v in values.items()}
                entry[name] |= {
                    "iou_best": float(at.max()),
                    "threshold": THRESHOLDS[int(at.argmax())],
                }
                if name == "joint":
                    entry["over"] = {c: interval(values["iou"] - cams[c], samples) for c in CAMS}
                    ious_needed = values["iou"][needed]
                    entry["iou_needed"] = interval(ious_needed, resampled)
                    entry["over_needed"] = {
                        c: interval(ious_needed - cams_needed[c], resampled) for c in CAMS
                    }
                if reference is not None:
                    entry[name]["tv_ratio"] = ratio(values["tv"], reference[name], samples)
            summary["beside" if "beside" in key else "cells"].append(entry)
    return summary


def of_cell(rows: list[Row], key: Row) -> list[Row]:
    """The parts of a cell: all seeds, all groups of images."""
    same = ("dropout", "temperature", "n_masks", "beside")
    cells = [row for row in rows if row["kind"] == "cell"]
    return [row for row in cells if all(row.get(k) == key.get(k) for k in same)]


def gathered(cell: list[Row], step: int, name: str, key: str) -> np.ndarray:
    """One number for each image, its mean over seeds."""
    by_seed = [
        np.concatenate(
            [
                row["found"][str(step)][name][key]
                for row in sorted(cell, key=lambda row: row["first"])
                if row["seed"] == seed
            ]
        )
        for seed in sorted({row["seed"] for row in cell})
    ]
    means: np.ndarray = np.stack(by_seed).mean(0)
    return means


def interval(values: np.ndarray, samples: np.ndarray) -> dict[str, float]:
    low, high = np.percentile(values[samples].mean(1), [2.5, 97.5])
    return {"mean": float(values.mean()), "low": float(low), "high": float(high)}


def ratio(values: np.ndarray, by: np.ndarray, samples: np.ndarray) -> dict[str, float]:
    """The ratio of the means, on the same samples."""
    low, high = np.percentile(values[samples].mean(1) / by[samples].mean(1), [2.5, 97.5])
    return {"mean": float(values.mean() / by.mean()), "low": float(low), "high": float(high)}


# --- tables and figure ---------------------------------------------------------------------------


def markdown(summary: Row) -> str:
    head = ["variant", "masks", "steps"]
    head += [f"{name} {measure}" for name in MAPS for measure in ("IoU", "TV")]
    head += ["joint TV ratio", "joint area, %", "joint IoU, best threshold"]
    head += ["joint over Grad-CAM", "in place", "joint IoU, needed", "over Grad-CAM", "in place"]
    head += ["ms a step"]
    table = ["| " + " | ".join(head) + " |", "|---" + "|---:" * (len(head) - 1) + "|"]
    for cell in summary["cells"] + summary["beside"]:
        joint = cell["joint"]
        name = cell.get("beside") or title((cell["dropout"], cell["temperature"]))
        fields = [name, cell["n_masks"], cell["steps"]]
        for name in MAPS:
            fields += [ranged(cell[name]["iou"]), f"{cell[name]['tv']['mean']:.0f}"]
        fields += [ranged(joint["tv_ratio"]) if "tv_ratio" in joint else ""]
        fields += [f"{100 * joint['area']['mean']:.1f}"]
        fields += [f"{joint['iou_best']:.3f} at {joint['threshold']:g}"]
        fields += [signed(cell["over"][c]) for c in CAMS]
        fields += [ranged(cell["iou_needed"])]
        fields += [signed(cell["over_needed"][c]) for c in CAMS]
        fields += [f"{1000 * cell['seconds_per_image_and_step']:.1f}"]
        table.append("| " + " | ".join(map(str, fields)) + " |")
    table += [""]
    for name in CAMS:
        cam = summary[name]
        table[-1] += (
            f"{name.replace('grad_cam', 'Grad-CAM')}: IoU {ranged(cam['iou_best'])} at its "
        )
        table[-1] += f"best threshold, {cam['threshold']:g}; {ranged(cam['iou'])} at 0.5; "
        table[-1] += f"{ranged(cam['iou_needed'])} at its best for the needed. "
    table[-1] += f"Needed: the {summary['needed']} images whose blurred form has another class. "
    table[-1] += f"Chance, the whole picture: {ranged(summary['chance'])}."
    return "\n".join(table)


def signed(value: dict[str, float]) -> str:
    return f"{value['mean']:+.3f} ({value['low']:+.3f} to {value['high']:+.3f})"


def variance_markdown(rows: list[Row]) -> str:
    stages = list(staged(rows))
    if not stages:
        return ""
    masks = list(stages[0][1]["variants"][0]["ratio"])
    head = ["logits of", "largest", "variant", *(f"{n} masks" for n in masks), "float32 error"]
    lines = ["| " + " | ".join(head) + " |", "|---|---:|---" + "|---:" * (len(masks) + 1) + "|"]
    for name, stage in stages:
        for variant in stage["variants"]:
            fields = [name, f"{stage['largest_logit']:.1f}"]
            fields += [title((variant["dropout"], variant["temperature"]))]
            fields += ["" if r is None else f"{r:.3g}" for r in variant["ratio"].values()]
            lines.append("| " + " | ".join([*fields, f"{variant['error']:.1e}"]) + " |")
    return "\n".join(lines)


def staged(rows: list[Row]) -> Iterable[tuple[str, Row]]:
    for row in sorted(rows, key=lambda row: row.get("source") != list(SIMPLIFIED)):
        if row["kind"] == "variance":
            for stage in row["stages"]:
                source = title((row["source"][0], row["source"][1]))
                name = f"step {stage['step']} of {source}" if stage["step"] else "the start"
                yield name, stage


def ranged(value: dict[str, float]) -> str:
    return f"{value['mean']:.3f} ({value['low']:.3f} to {value['high']:.3f})"


def figure(results: Row) -> "Figure":
    """IoU and TV of the joint maps and the gradient's variance, by masks a step.

    Args:
        results: the contents of the output file.
    """
    from matplotlib.figure import Figure

    summary, steps = results["summary"], results["steps"]
    drawing = Figure(figsize=(12, 7), layout="constrained")
    axes = drawing.subplots(2, max(len(steps), 2), squeeze=False)
    for axis, step in zip(axes[0], steps, strict=False):
        lines(axis, summary, step, "iou")
        for name in CAMS:
            cam = summary[name]
            axis.axhline(cam["iou_best"]["mean"], color="grey", linestyle=":")
            axis.annotate(
                f"{name.replace('grad_cam', 'Grad-CAM')} above {cam['threshold']:g}",
                (0.99, cam["iou_best"]["mean"]),
                xycoords=("axes fraction", "data"),
                va="bottom",
                ha="right",
                color="grey",
            )
        axis.set(title=f"Joint mask above 0.5, {step} steps", ylabel="IoU with the part")
        axis.legend(fontsize="small")
        if axis is not axes[0, 0]:
            axis.sharey(axes[0, 0])
    axes[0, 0].set_ylim(0, 1)
    lines(axes[1, 0], summary, steps[-1], "tv")
    axes[1, 0].set(title=f"Joint map, {steps[-1]} steps", ylabel="TV (Eq. 10)")
    axes[1, 0].set_ylim(bottom=0)
    name = f"step {steps[-1]} of {title(SIMPLIFIED)}"
    stage = dict(staged(results["rows"])).get(name)
    if stage is not None:
        for variant in stage["variants"]:
            style = look((variant["dropout"], variant["temperature"]))
            masks = [int(n) for n in variant["ratio"]]
            axes[1, 1].plot(masks, list(variant["ratio"].values()), **style)
        axes[1, 1].axhline(1, color="grey", linestyle=":")
        axes[1, 1].set(title=f"Gradient at {name}", ylabel="variance / signal", yscale="log")
    for axis in axes.flat:
        axis.set_xscale("log", base=2)
        axis.xaxis.set_major_formatter("{x:g}")
        axis.set_xlabel("masks per step and objective")
    return drawing


def lines(axis: Any, summary: Row, step: int, key: str) -> None:
    variants = sorted({(cell["dropout"], cell["temperature"]) for cell in summary["cells"]})
    for variant in variants:
        cells = [
            cell
            for cell in summary["cells"]
            if (cell["dropout"], cell["temperature"]) == variant and cell["steps"] == step
        ]
        masks = [cell["n_masks"] for cell in cells]
        intervals = [cell["joint"][key] for cell in cells]
        style = look(variant)
        axis.plot(masks, [f["mean"] for f in intervals], **style, label=title(variant))
        low, high = ([f[end] for f in intervals] for end in ("low", "high"))
        axis.fill_between(masks, low, high, color=style["color"], alpha=0.08, linewidth=0)


def look(variant: Variant) -> Row:
    """The colour is the temperature. Both dropouts are visible where one covers the other."""
    dropout, temperature = variant
    style = {"color": "tab:orange" if temperature < 0.5 else "tab:blue"}
    if dropout == "cd":
        return style | {"marker": "o", "markersize": 10, "linewidth": 5, "alpha": 0.35}
    return style | {"marker": "x", "linestyle": "--", "linewidth": 1.5, "zorder": 3}


# --- the run -------------------------------------------------------------------------------------


def resume(partial_file: Path, settings: Row) -> list[Row]:
    """The finished rows of an earlier run with the same settings; else a fresh file."""
    text = partial_file.read_text() if partial_file.is_file() else ""
    rows = [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]
    if not rows or rows[0] != settings:
        rows = [settings]
    partial_file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return rows[1:]


def versions() -> dict[str, str]:
    packages = ("captum", "torch", "numpy", "pillow", "kornia")
    return {package: importlib.metadata.version(package) for package in packages}


def described(options: dict[str, Any]) -> str:
    """The options as text that is equal in each process: functions without their addresses."""
    return re.sub(r" at 0x[0-9a-f]+", "", repr(options))


def identity(row: Row) -> tuple[Any, ...]:
    keys = ("kind", "dropout", "temperature", "n_masks", "seed", "first", "source", "beside")
    return tuple(str(row.get(key)) for key in keys)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--images", type=int, default=40)
    parser.add_argument("--masks", type=int, nargs="+", default=[2, 4, 8, 16, 32])
    parser.add_argument("--steps", type=int, nargs="+", default=[30, 100])
    parser.add_argument("--dropouts", nargs="+", choices=list(DROPOUTS), default=["cd", "scd"])
    parser.add_argument("--temperatures", type=float, nargs="+", default=[0.1, 1.0])
    parser.add_argument("--seeds", type=int, default=3, help=f"at {SEEDED} masks")
    parser.add_argument("--repeats", type=int, default=24, help="of each gradient; 0 for none")
    parser.add_argument("--variance-images", type=int, default=4)
    parser.add_argument("--variance-masks", type=int, nargs="+", default=[1, 2, 4, 8, 16, 32])
    parser.add_argument("--train-images", type=int, default=TRAINING["n"])
    parser.add_argument("--workers", type=int, default=2, help="processes")
    parser.add_argument("--threads", type=int, default=1, help="of each")
    parser.add_argument("--output", type=Path, default=OUTPUT, help="where all numbers go")
    parser.add_argument("--figure", type=Path, default=FIGURE)
    arguments = parser.parse_args()
    begin = time.perf_counter()

    path = arguments.output.with_suffix(".network.partial")
    training = TRAINING | {"n": arguments.train_images}
    network, about = trained(path, training, arguments.workers * arguments.threads)
    print(f"the network: {json.dumps(about)}", flush=True)
    masks, steps = sorted(arguments.masks), sorted(arguments.steps)
    variants = [(d, t) for d in arguments.dropouts for t in arguments.temperatures]
    settings: Row = {
        "images": arguments.images,
        "masks": masks,
        "steps": steps,
        "variants": variants,
        "seeds": arguments.seeds,
        "repeats": arguments.repeats,
        "variance_images": arguments.variance_images,
        "variance_masks": arguments.variance_masks,
        "common": COMMON,
        "beside": {name: described(options) for name, options in BESIDE.items()},
        "training": training,
        "network": about | {"checksum": checksum(network)},
        "environment": versions()
        | {
            "python": platform.python_version(),
            "machine": f"{platform.system()} {platform.machine()}",
            "workers": arguments.workers,
            "threads": arguments.threads,
        },
    }
    settings = json.loads(json.dumps(settings))
    partial_file = arguments.output.with_suffix(".partial")
    rows = resume(partial_file, settings)
    done = {identity(row) for row in rows}
    before = max((row.get("elapsed", 0.0) for row in rows), default=0.0)  # earlier runs' time

    jobs: list[tuple[Row, Callable[[], Row]]] = []
    for cell in cells(variants, masks, arguments.seeds) + cells_beside():
        for first in range(0, arguments.images, GROUP):
            call = partial(run_cell, path, arguments.images, cell, first, steps)
            jobs.append(({"kind": "cell", **cell, "first": first}, call))
    if arguments.repeats:
        rest = (variants, arguments.variance_masks, steps, arguments.repeats)
        for source in (SIMPLIFIED, REFERENCE):
            call = partial(run_variance, path, arguments.variance_images, source, *rest)
            jobs.insert(0, ({"kind": "variance", "source": list(source)}, call))
    jobs.append(({"kind": "beside"}, partial(grad_cam, path, arguments.images)))
    left = [call for key, call in jobs if identity(key) not in done]
    with (
        ProcessPoolExecutor(
            arguments.workers,
            multiprocessing.get_context("spawn"),
            initializer=prepare,
            initargs=(arguments.threads,),
        ) as processes,
        partial_file.open("a") as file,
    ):
        futures = [processes.submit(call) for call in left]
        for future in tqdm(as_completed(futures), total=len(futures), unit="part"):
            elapsed = before + time.perf_counter() - begin
            rows.append(future.result() | {"elapsed": elapsed})
            file.write(json.dumps(rows[-1]) + "\n")
            file.flush()

    summary = summarise(rows, variants, masks, steps)
    results = settings | {
        "seconds": before + time.perf_counter() - begin,
        "seconds_of_parts": sum(row.get("seconds", 0) for row in rows),
        "summary": summary,
        "rows": rows,
    }
    arguments.output.write_text(json.dumps(results) + "\n")
    figure(json.loads(arguments.output.read_text())).savefig(arguments.figure, dpi=100)
    for name in (partial_file, path):
        name.unlink()
    print(f"\n{arguments.images} images, {json.dumps(settings['environment'])}\n")
    print(markdown(summary), end="\n\n")
    print(variance_markdown(rows), end="\n\n")
    cost = [row for row in rows if row["kind"] == "cell"]
    spent = sum(row["seconds"] for row in cost)
    passes = sum(2 * row["n_masks"] * images_of(row) * max(steps) for row in cost)
    print(f"{1000 * spent / passes:.2f} ms a masked image; {results['seconds'] / 60:.1f} minutes")


def images_of(row: Row) -> int:
    first_step = next(iter(row["found"].values()))
    return len(first_step["joint"]["iou"])


def checksum(network: SmallCNN) -> int:
    state = network.state_dict().values()
    return zlib.crc32(b"".join(value.numpy().tobytes() for value in state))


if __name__ == "__main__":
    main()
