"""Does F-CAM localise better than the maps that teach it, and what of it is needed?

    python -m tests.benchmarks.fcam [--seeds N ...] [--train N] [--test N] [--epochs N]
                                    [--workers N] [--output FILE] [--figures STEM]

The pictures are `captum_ext.datasets.TexturedEllipses`, with distractors, and the network is its
`TinyCNN`, trained here. Data, network and decoder are drawn anew for each seed; seeds are fresh,
the recipe was fixed before. Labels train the network and the decoder. Masks and boxes of the test
pictures are for these tables alone: nothing, no epoch and no setting, is chosen by them.

Each guide explains the true label of the test pictures, is brought to [0, 1] at its own resolution
and upsampled bilinearly; then a decoder is trained by it (`fit_fcam` as it comes but for `COMMON`),
and F-CAM's maps are taken as they are. CAM is not rectified, as in the official code; the others
are. For each:

- MaxBoxAccV2, its parts at IoU 0.3, 0.5 and 0.7, MaxBoxAcc (largest region) and PxAP, in percent;
- the share of the 1000 thresholds whose BoxAcc (IoU 0.5, largest region) is at least 90% of the
  best; BoxAcc at a threshold of 0.5, and at the one that is best on `N_HELD` other pictures, whose
  boxes are used for nothing else;
- the share of pixels between 0.05 and 0.95, and the histogram of activations;
- seconds of training on one thread: of the processor, since other processes run beside it (of the
  clock is in FILE).

With the guide CAM there are also: F-CAM without the CRF, without the size loss, without both and
without warm-up; with one seed of each kind; the paper's settings as far as 64 pixels have them
(`PAPER_LIKE`); and controls. Controls are the same recipe taught by uniform noise of 8 x 8 cells,
by the maps of other pictures, and by the maps of a network with random weights; and a Gaussian in
the centre, without any training. In other scenes (no distractors; the class on a half of the
object, or on its end), guide and F-CAM again.

Figures are means over seeds, with the lowest and the highest of F-CAM's. Each finished part is a
line of FILE's neighbour with the ending .partial, and a run that was killed goes on from there.
"""

import argparse
import json
import logging
import multiprocessing
import statistics
import time
import warnings
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, as_completed
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from captum.attr import Attribution, LayerGradCam
from torch import Generator, Tensor, nn
from tqdm import tqdm

from captum_ext.attr import (
    LayerCam,
    LayerClassActivationMap,
    LayerGradCamPlusPlus,
    LayerSmoothGradCamPlusPlus,
    LayerXGradCam,
)
from captum_ext.datasets import TexturedEllipses, TinyCNN, train_classifier
from captum_ext.datasets.fine_grained import MEAN, STD, normalized
from captum_ext.datasets.textured_ellipses import EllipseBatch
from captum_ext.fcam import PAPER, DenseCRFLoss, SeedSampler, fit_fcam
from captum_ext.fcam.guides import guide_maps
from captum_ext.metrics import MaxBoxAcc, PxAP
from tests.benchmarks.fido_ablation import resume, versions

if TYPE_CHECKING:
    from matplotlib.figure import Figure

TUTORIALS = Path(__file__).parents[2] / "tutorials"
OUTPUT = TUTORIALS / "data" / "fcam.json"
FIGURES = TUTORIALS / "fcam"
SIZE = (64, 64)
BATCH = 50
N_HELD = 100

Row = dict[str, Any]

GUIDES: dict[str, Callable[[nn.Module, nn.Module], Attribution]] = {
    "CAM": LayerClassActivationMap,
    "Grad-CAM": LayerGradCam,
    "Grad-CAM++": LayerGradCamPlusPlus,
    "Smooth Grad-CAM++": lambda net, layer: LayerSmoothGradCamPlusPlus(
        net, layer, n_samples=4, generator=Generator().manual_seed(0)
    ),
    "XGrad-CAM": LayerXGradCam,
    "LayerCAM": LayerCam,
}
COMMON: Row = {
    "size": SIZE,
    "widths": (48, 24, 12),
    "layers": ["0", "2", "4"],
    "normalize": ((MEAN,) * 3, (STD,) * 3),
    "show_progress": False,
}
# The paper's crops (73 : 64 is 256 : 224), number of seeds, background, weight of the CRF by pairs,
# and no warm-up.
PAPER_LIKE: Row = {
    "resize": (73, 73),
    "seeds": SeedSampler(1, 1, n_minus=0.1),
    "crf": DenseCRFLoss(side=None),
    "crf_weight": PAPER["crf_weight"],
    "warmup": 0,
}
ABLATIONS: dict[str, Row] = {
    "without CRF": {"crf": None},
    "without size": {"size_weight": 0.0},
    "without both": {"crf": None, "size_weight": 0.0},
    "without warm-up": {"warmup": 0},
    "one seed of each kind": {"seeds": SeedSampler(1, 1)},
    "the paper's CRF weight": {"crf_weight": PAPER["crf_weight"]},
    "the paper's settings": PAPER_LIKE,
    "the paper's settings, 50 epochs": PAPER_LIKE
    | {"crf": DenseCRFLoss(side=32), "n_epochs": PAPER["n_epochs"]},
}
CONTROLS = ("noise as guide", "maps of other pictures", "random network", "centre")
SCENES: dict[str, Row] = {
    "no distractors": {"has_distractors": False},
    "no distractors, maps of other pictures": {"has_distractors": False},
    "class on one half": {"cue": "half"},
    "class on the end": {"cue": "head"},
}


# --- the pictures and the network ----------------------------------------------------------------


@cache
def setting(
    seed: int, n_train: int, n_test: int, scene: str
) -> tuple[EllipseBatch, EllipseBatch, EllipseBatch, TinyCNN]:
    """Pictures to train, to choose a threshold and to test; and the network."""
    train, held, test = (
        TexturedEllipses(n, 3 * seed + i, SIZE, **SCENES.get(scene, {}))
        for i, n in enumerate((n_train, N_HELD, n_test))
    )
    return train.batch(), held.batch(), test.batch(), train_classifier(train, seed=seed)


class Given(Attribution):
    """Maps that do not come from the picture: noise, or the map of another picture."""

    def __init__(self, forward_func: nn.Module, maps: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__(forward_func)
        self.maps = maps

    def attribute(self, inputs: Tensor, target: Tensor) -> Tensor:
        return self.maps(inputs, target)


def guide_of(name: str, network: TinyCNN, seed: int) -> Attribution:
    """The attribution that teaches."""
    generator = Generator().manual_seed(seed)
    cam = LayerClassActivationMap(network, network[4])
    if name == "noise as guide":
        return Given(network, lambda x, y: torch.rand(len(x), 1, 8, 8, generator=generator))
    if name.endswith("maps of other pictures"):
        return Given(network, lambda x, y: cam.attribute(x, target=y).detach().roll(1, 0))
    return GUIDES.get(name, LayerClassActivationMap)(network, network[4])


# --- a part --------------------------------------------------------------------------------------


def run(name: str, seed: int, n_train: int, n_test: int, n_epochs: int) -> Row:
    """A guide or a variant, without and with F-CAM."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    train, held, test, network = setting(seed, n_train, n_test, name if name in SCENES else "")
    with torch.no_grad():
        answers = network(normalized(test.pixels)).argmax(1)
    accuracy = (answers == test.targets).float().mean().item()
    row: Row = {"kind": "part", "name": name, "seed": seed, "accuracy": accuracy}
    if name == "centre":
        row["fcam"] = measured(lambda pictures: centre(len(pictures.pixels)), test, held)
        return row
    if name == "random network":
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            network = TinyCNN(4).eval()
    guide = guide_of(name, network, seed)
    rectify = not isinstance(guide, LayerClassActivationMap | Given)

    def guides(pictures: EllipseBatch) -> Tensor:
        batches = zip(pictures.pixels.split(BATCH), pictures.targets.split(BATCH), strict=True)
        maps = [guide_maps(guide, normalized(x), y, SIZE, rectify=rectify) for x, y in batches]
        return torch.cat(maps)[:, 0]

    row["guide"] = measured(guides, test, held)
    data = list(zip(train.pixels, train.targets.tolist(), strict=True))
    options = COMMON | {"rectify": rectify, "n_epochs": n_epochs} | ABLATIONS.get(name, {})
    start, work = time.perf_counter(), time.process_time()
    fcam = fit_fcam(network, data, guide, seed=seed, **options)
    row |= {"seconds": time.process_time() - work, "wall": time.perf_counter() - start}

    def decoded(pictures: EllipseBatch) -> Tensor:
        maps = [fcam.foreground(normalized(x)) for x in pictures.pixels.split(BATCH)]
        return torch.cat(maps)[:, 0]

    row["fcam"] = measured(decoded, test, held)
    return row


def centre(n: int) -> Tensor:
    y, x = torch.meshgrid(*[torch.linspace(-1, 1, side) for side in SIZE], indexing="ij")
    return torch.exp(-(x**2 + y**2) / 0.5).expand(n, -1, -1)


def measured(
    explain: Callable[[EllipseBatch], Tensor], test: EllipseBatch, held: EllipseBatch
) -> Row:
    """All of one method's figures, in percent."""
    maps, boxes = explain(test), [box[None] for box in test.boxes]
    v2 = MaxBoxAcc((0.3, 0.5, 0.7), "all", "wsolevaluation")
    v1, others = (MaxBoxAcc(convention="wsolevaluation") for _ in range(2))
    pixels = PxAP()
    others.update(explain(held), [box[None] for box in held.boxes])
    for metric in (v2, v1):
        metric.update(maps, boxes)
    pixels.update(maps, test.masks)
    curve = v1.curves()[0]
    counts = torch.histc(maps.float(), 20, 0, 1)
    return {
        "v2": 100 * v2.compute().item(),
        "at": (100 * v2.curves().amax(1)).tolist(),
        "v1": 100 * v1.compute().item(),
        "pxap": 100 * pixels.compute().item(),
        "width": 100 * (curve >= 0.9 * curve.max()).float().mean().item(),
        "fixed": 100 * curve[500].item(),
        "transferred": 100 * curve[others.curves()[0].argmax()].item(),
        "between": 100 * ((maps > 0.05) & (maps < 0.95)).float().mean().item(),
        "histogram": (counts / counts.sum()).tolist(),
        "curve": (100 * curve[::10]).tolist(),
    }


# --- the table and the figures -------------------------------------------------------------------


def summarise(rows: list[Row]) -> dict[str, Row]:
    """For each name, the values of each figure for all seeds."""
    summary: dict[str, Row] = {}
    for name in parts():
        of_name = sorted((r for r in rows if r["name"] == name), key=lambda r: r["seed"])
        summary[name] = {
            which: {key: [row[which][key] for row in of_name] for key in of_name[0][which]}
            for which in ("guide", "fcam")
            if which in of_name[0]
        }
        summary[name]["seconds"] = [row.get("seconds") for row in of_name]
        summary[name]["accuracy"] = [row["accuracy"] for row in of_name]
    return summary


def parts() -> list[str]:
    return [*GUIDES, *ABLATIONS, *CONTROLS, *SCENES]


COLUMNS = {
    "MaxBoxAccV2": "v2",
    "MaxBoxAcc": "v1",
    "PxAP": "pxap",
    "thresholds within 90%": "width",
    "BoxAcc at 0.5": "fixed",
    "at another set's best": "transferred",
    "pixels in (.05, .95)": "between",
}


def markdown(summary: dict[str, Row]) -> str:
    """Means, of guide and F-CAM, with the lowest and the highest of F-CAM."""
    head = ["", *COLUMNS, "V2 at IoU .3 / .5 / .7", "s"]
    lines = ["| " + " | ".join(head) + " |", "|---" + "|---:" * (len(head) - 1) + "|"]
    for name, figures in summary.items():
        both = "guide" in figures and name not in ABLATIONS
        cells = []
        for key in COLUMNS.values():
            cell = spread(figures["fcam"][key])
            cells.append(f"{statistics.mean(figures['guide'][key]):.1f} → {cell}" if both else cell)
        cells.append(" → ".join(levels(figures[w]) for w in (["guide"] if both else []) + ["fcam"]))
        known = figures["seconds"][0] is not None
        cells.append(f"{statistics.mean(figures['seconds']):.0f}" if known else "")
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def levels(row: Row) -> str:
    return " / ".join(f"{value:.0f}" for value in np.mean(row["at"], 0))


def wishes(summary: dict[str, Row]) -> str:
    """The gains of F-CAM over each guide, with their target values."""
    lines = ["Wished of at least four guides: 15 points of V2, 8 of PxAP, twice the thresholds."]
    for name in GUIDES:
        guide, fcam = summary[name]["guide"], summary[name]["fcam"]
        gains = {
            key: [f - g for f, g in zip(fcam[key], guide[key], strict=True)]
            for key in ("v2", "pxap")
        }
        wider = statistics.mean(fcam["width"]) / statistics.mean(guide["width"])
        held = (
            statistics.mean(gains["v2"]) >= 15 and statistics.mean(gains["pxap"]) >= 8
        ) and wider >= 2
        lines.append(
            f"- {name}: V2 {spread(gains['v2'])}, PxAP {spread(gains['pxap'])}, {wider:.1f} times "
            f"as many thresholds: {'held' if held else 'missed'}"
        )
    return "\n".join(lines)


def spread(values: list[float]) -> str:
    return f"{statistics.mean(values):.1f} ({min(values):.1f} to {max(values):.1f})"


def figure_of_curves(summary: dict[str, Row]) -> "Figure":
    """BoxAcc at each threshold, of each guide without and with F-CAM."""
    from matplotlib.figure import Figure

    drawing = Figure(figsize=(12, 6), layout="constrained")
    thresholds = np.arange(100) / 100
    for axis, name in zip(
        drawing.subplots(2, 3, sharex=True, sharey=True).flat, GUIDES, strict=True
    ):
        for which, color in (("guide", "tab:grey"), ("fcam", "tab:blue")):
            curves = np.array(summary[name][which]["curve"])
            label = name if which == "guide" else "F-CAM"
            axis.plot(thresholds, curves.mean(0), color=color, label=label)
            axis.fill_between(thresholds, curves.min(0), curves.max(0), color=color, alpha=0.15)
        axis.legend(loc="lower left", fontsize="small")
        axis.set(ylim=(0, 100))
    drawing.supxlabel("threshold")
    drawing.supylabel("BoxAcc (IoU 0.5), %")
    return drawing


def figure_of_histograms(summary: dict[str, Row]) -> "Figure":
    """The activations of each guide without and with F-CAM."""
    from matplotlib.figure import Figure

    drawing = Figure(figsize=(12, 6), layout="constrained")
    positions = (np.arange(20) + 0.5) / 20
    for axis, name in zip(
        drawing.subplots(2, 3, sharex=True, sharey=True).flat, GUIDES, strict=True
    ):
        for which, color in (("guide", "tab:grey"), ("fcam", "tab:blue")):
            shares = 100 * np.mean(summary[name][which]["histogram"], 0)
            label = name if which == "guide" else "F-CAM"
            axis.bar(positions, shares, 0.05, color=color, alpha=0.5, label=label)
        axis.legend(fontsize="small")
        axis.set_yscale("log")
    drawing.supxlabel("activation")
    drawing.supylabel("pixels, %")
    return drawing


# --- the run -------------------------------------------------------------------------------------


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[101, 102, 103])
    parser.add_argument("--train", type=int, default=1000, help="pictures")
    parser.add_argument("--test", type=int, default=200, help="pictures")
    parser.add_argument("--epochs", type=int, default=5, help="of each decoder")
    parser.add_argument("--workers", type=int, default=2, help="processes of one thread")
    parser.add_argument("--output", type=Path, default=OUTPUT, help="where all numbers go")
    parser.add_argument("--figures", type=Path, default=FIGURES, help="the stem of their names")
    arguments = parser.parse_args()
    begin = time.perf_counter()
    settings: Row = {
        "seeds": arguments.seeds,
        "train": arguments.train,
        "test": arguments.test,
        "epochs": arguments.epochs,
        "common": repr(COMMON),
        "ablations": repr(list(ABLATIONS)),
        "environment": versions(),
    }
    partial_file = arguments.output.with_suffix(".partial")
    partial_file.parent.mkdir(parents=True, exist_ok=True)
    rows = resume(partial_file, json.loads(json.dumps(settings)))
    done = {(row["name"], row["seed"]) for row in rows}
    before = max((row.get("elapsed", 0.0) for row in rows), default=0.0)
    counts = (arguments.train, arguments.test, arguments.epochs)
    left = [(n, s) for s in arguments.seeds for n in parts() if (n, s) not in done]
    spawn = multiprocessing.get_context("spawn")
    with (
        ProcessPoolExecutor(arguments.workers, spawn) as processes,
        partial_file.open("a") as file,
    ):
        futures = [processes.submit(partial(run, n, s, *counts)) for n, s in left]
        for future in tqdm(as_completed(futures), total=len(futures), unit="part"):
            rows.append(future.result() | {"elapsed": before + time.perf_counter() - begin})
            file.write(json.dumps(rows[-1]) + "\n")
            file.flush()
    summary = summarise(rows)
    seconds = before + time.perf_counter() - begin
    table, judged = markdown(summary), wishes(summary)
    content = settings | {"seconds": seconds, "table": table, "wishes": judged, "rows": rows}
    arguments.output.write_text(json.dumps(content) + "\n")
    for name, draw in (("curves", figure_of_curves), ("histograms", figure_of_histograms)):
        draw(summary).savefig(f"{arguments.figures}_{name}.png", dpi=80)
    partial_file.unlink()
    accuracies = summary["CAM"]["accuracy"]
    print(f"\n{len(arguments.seeds)} seeds, accuracy {spread([100 * a for a in accuracies])} %\n")
    print(table, judged, sep="\n\n", end="\n\n")
    print(f"{seconds / 60:.0f} minutes")


if __name__ == "__main__":
    main()
