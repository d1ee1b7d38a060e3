"""Do finer maps find small objects? Grad-CAM, wrapped and bare, on photographs with pasted objects.

    python -m tests.benchmarks.pasted_scenes [--scenes N] [--seed N] [--methods NAME ...]
                                             [--threads N] [--output FILE] [--quick]

For each scene of `captum_ext.datasets.PastedScenes` (480 x 640), the demo's ImageNet network and
the class of the pasted objects, not the predicted one, it measures the pointing game (is the
maximum less than 15 pixels from one of the objects' boxes? is it in a box?), the share of the map's
positive mass in the boxes, and the time. Only the positive part of each map counts; a map without
one is a miss without mass. `METHODS` lists the options of the wrappers that differ from the
defaults. They keep the run short, and were not chosen by results on these scenes.

Means are over scenes. Intervals are the central 95% of 10,000 bootstrap samples of the scenes, the
same samples for each method. Differences are paired: method minus Grad-CAM at native size, scene by
scene. "Chance" is the exact expectation for a point, and for mass, spread evenly over the picture.
"Units in place" centres the units of the map at their receptive fields (`align="rf"`), in this
network 15.5 pixels down and right of the cells' centres. Seconds are medians, after one untimed
call on another scene.

A file beside FILE, with the ending .partial, has a line for each finished scene and method. A run
that was killed goes on from there if its scenes and options are the same.
"""

import argparse
import importlib.metadata
import json
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from captum.attr import Attribution, LayerGradCam
from PIL import Image
from scipy.ndimage import distance_transform_edt
from torch import Tensor, nn
from torchvision.transforms.functional import normalize, to_tensor
from tqdm import tqdm

from captum_ext import attr
from captum_ext.datasets import KINDS, PastedScenes, Scene
from captum_ext.imaging import resize
from captum_ext.metrics import boxes_to_masks, energy_pointing_game, pointing_game
from captum_ext.zoo import LoadedModel, load_model
from tests.benchmarks.measuring import parse_arguments

OUTPUT = Path(__file__).parents[2] / "tutorials" / "data" / "pasted_scenes.json"
SIZE = (480, 640)
TOLERANCES = (15, 0)
SAMPLES = 10_000
SMALL = 224

# Four windows at a time give the same result as 64, three times as fast on a CPU: malloc takes the
# activations of 64 from the kernel and gives them back each time.
SESS = {"n_scales": 12, "window": 224, "pre_filter_ratio": 0.9, "internal_batch_size": 4}
AUGMENTED = {"n_augmentations": 8, "max_angle": 0.3, "max_shift": 0.13}
FEW = AUGMENTED | {"n_augmentations": 3}

CHANCE, AT_224, NATIVE = "Chance", "Grad-CAM at 224 px", "Grad-CAM at native size"
ALIGNED = "Grad-CAM at native size, units in place"
# Each wrapper around Grad-CAM with its options, the innermost first.
METHODS: dict[str, list[tuple[str, dict[str, Any]]]] = {
    CHANCE: [],
    AT_224: [],
    NATIVE: [],
    ALIGNED: [("AugmentedSR", {"mode": "single", "n_augmentations": 1, "align": "rf"})],
    "SESS(Grad-CAM)": [("SESSWrapper", SESS)],
    "AugmentedSR(Grad-CAM)": [("AugmentedSR", AUGMENTED)],
    "SESS(AugmentedSR(Grad-CAM))": [("AugmentedSR", FEW), ("SESSWrapper", SESS)],
    "AugmentedSR(SESS(Grad-CAM))": [("SESSWrapper", SESS), ("AugmentedSR", FEW)],
}
MEASURES = {
    "hit_15": "pointing game, 15 px",
    "hit_0": "pointing game, 0 px",
    "share": "mass in boxes",
}

Row = dict[str, Any]
Method = Callable[[int, Scene], Tensor]


# --- the methods ---------------------------------------------------------------------------------


def make_method(name: str, network: LoadedModel) -> Method:
    """Make a function from a scene and its index to a map (1, 1, H, W).

    The index seeds the augmentations.
    """
    base = LayerGradCam(network.module, network.module.get_submodule(network.layer))
    if name == CHANCE:
        return lambda index, scene: torch.ones(1, 1, *SIZE)
    side = (SMALL, SMALL) if name == AT_224 else SIZE

    def explain(index: int, scene: Scene) -> Tensor:
        method: Attribution = base
        for wrapper, options in METHODS[name]:
            if wrapper == "AugmentedSR":
                options = options | {"generator": torch.Generator().manual_seed(index)}
            method = getattr(attr, wrapper)(method, **options)
        x = model_input(network, scene, side)
        maps = method.attribute(x, target=scene.target, relu_attributions=True)
        return resize(maps[:, :1].detach().clamp(min=0), SIZE)

    return explain


def model_input(network: LoadedModel, scene: Scene, size: tuple[int, int]) -> Tensor:
    """The uncropped scene at `size`: (1, 3, H, W)."""
    image = scene.image
    if size != SIZE:
        image = image.resize(size[::-1], Image.Resampling.BICUBIC)
    preprocess = network.preprocess
    x: Tensor = normalize(to_tensor(image), preprocess.mean, preprocess.std)
    return x[None]


def class_probability(
    network: LoadedModel, scene: Scene, size: tuple[int, int]
) -> dict[str, float]:
    """The probability and rank of the objects' class."""
    with torch.no_grad():
        shares = network.module(model_input(network, scene, size))[0].softmax(0)
    share = shares[scene.target]
    return {"probability": share.item(), "rank": 1 + int((shares > share).sum())}


# --- the measures --------------------------------------------------------------------------------


def measure(name: str, explain: Method, index: int, scene: Scene) -> Row:
    start = time.perf_counter()
    maps = explain(index, scene)
    seconds = time.perf_counter() - start
    masks = boxes_to_masks([scene.boxes], SIZE)
    row: Row = {"seconds": seconds, "share": energy_pointing_game(maps, masks).item()}
    if name == CHANCE:
        distance = distance_transform_edt(~masks[0].numpy())
        hits = {t: float((distance < max(t, 1)).mean()) for t in TOLERANCES}
    else:
        hits = {t: float(pointing_game(maps, masks, t)) for t in TOLERANCES}
        peak = maps.flatten().argmax().item()
        row["peak"] = [peak % SIZE[1], peak // SIZE[1]]
    return row | {f"hit_{tolerance}": hit for tolerance, hit in hits.items()}


def summarise(rows: list[Row], scene_kinds: list[str]) -> dict[str, dict[str, Row]]:
    """Means, intervals and seconds by the kind of scene and the method."""
    summary: dict[str, dict[str, Row]] = {}
    names = [name for name in METHODS if any(row["method"] == name for row in rows)]
    for kind in ("all", *KINDS):
        indices = [i for i, k in enumerate(scene_kinds) if kind in ("all", k)]
        if not indices:
            continue
        random = np.random.RandomState(0)
        samples = random.randint(len(indices), size=(SAMPLES, len(indices)))
        by_name = {
            name: {row["scene"]: row for row in rows if row["method"] == name} for name in names
        }
        summary[kind] = {}
        for name in names:
            row: Row = {"scenes": len(indices)}
            row["seconds"] = statistics.median(by_name[name][i]["seconds"] for i in indices)
            for key in MEASURES:
                values = np.array([by_name[name][i][key] for i in indices])
                row[key] = interval(values, samples)
                if NATIVE in names:
                    native = np.array([by_name[NATIVE][i][key] for i in indices])
                    row[f"{key}_beyond_native"] = interval(values - native, samples)
            summary[kind][name] = row
    return summary


def interval(values: np.ndarray, samples: np.ndarray) -> dict[str, float]:
    low, high = np.percentile(values[samples].mean(1), [2.5, 97.5])
    return {"mean": float(values.mean()), "low": float(low), "high": float(high)}


# --- the tables ----------------------------------------------------------------------------------


def markdown(summary: dict[str, Row]) -> str:
    differences = {"hit_15": "hits at 15 px", "share": "mass"}
    titles = [f"{title}, %" for title in MEASURES.values()]
    head = ["method", *titles, *(f"{title} beyond native" for title in differences.values())]
    head += ["s per scene"]
    lines = ["| " + " | ".join(head) + " |", "|---" + "|---:" * (len(head) - 1) + "|"]
    for name, row in summary.items():
        cells = [percent(row[key]) for key in MEASURES]
        for key in differences:
            difference = row.get(f"{key}_beyond_native")
            cells += [percent(difference) if difference and name != NATIVE else ""]
        cells += ["" if name == CHANCE else f"{row['seconds']:.2f}"]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def percent(statistic: dict[str, float]) -> str:
    mean, low, high = (100 * statistic[key] for key in ("mean", "low", "high"))
    return f"{mean:.1f} ({low:.1f} to {high:.1f})"


# --- the run -------------------------------------------------------------------------------------


def read_partial(partial: Path, settings: Row) -> list[Row]:
    """Read the finished rows of an earlier run with the same settings, or start the file."""
    lines = partial.read_text().splitlines(keepends=True) if partial.is_file() else []
    rows = [json.loads(line) for line in lines if line.endswith("\n")]
    if not rows or rows[0] != settings:
        rows = [settings]
    partial.parent.mkdir(parents=True, exist_ok=True)
    partial.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return rows[1:]


def environment(threads: int) -> dict[str, str]:
    packages = ("captum", "torch", "kornia", "pillow", "scikit-image")
    versions = {package: importlib.metadata.version(package) for package in packages}
    return versions | {
        "python": platform.python_version(),
        "machine": f"{platform.system()} {platform.machine()}",
        "threads": str(threads),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--scenes", type=int, default=60)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), default=list(METHODS))
    parser.add_argument("--threads", type=int, default=2, help="of the CPU")
    parser.add_argument("--output", type=Path, default=OUTPUT, help="where all numbers go")
    output = Path(tempfile.gettempdir()) / "pasted_scenes_quick.json"
    quick = {"scenes": 2, "methods": [CHANCE, AT_224, NATIVE, ALIGNED], "output": output}
    arguments = parse_arguments(parser, **quick)
    torch.set_num_threads(arguments.threads)

    network = load_model()
    nn.Module.requires_grad_(network.module, False)
    scenes = PastedScenes(arguments.scenes, arguments.seed, size=SIZE)
    methods = {name: make_method(name, network) for name in METHODS if name in arguments.methods}
    settings = {
        "model": network.name,
        "layer": network.layer,
        "size": list(SIZE),
        "scenes": arguments.scenes,
        "seed": arguments.seed,
        "wrappers": {name: METHODS[name] for name in methods},
        "environment": environment(arguments.threads),
    }
    settings = json.loads(json.dumps(settings))
    partial = arguments.output.with_suffix(".partial")
    rows = read_partial(partial, settings)
    done = {(row["scene"], row["method"]) for row in rows}
    missing = [(i, n) for i in range(len(scenes)) for n in methods if (i, n) not in done]
    untimed = PastedScenes(1, arguments.seed + 1, size=SIZE)[0]
    for name in {name for _, name in missing}:
        methods[name](0, untimed)
    with partial.open("a") as file:
        for index, name in tqdm(missing, unit="map"):
            row: Row = {"scene": index, "method": name}
            row |= measure(name, methods[name], index, scenes[index])
            rows.append(row)
            file.write(json.dumps(row) + "\n")
            file.flush()

    described = [
        {
            "kind": scene.kind,
            "target": scene.target,
            "boxes": scene.boxes.tolist(),
            "distractor_targets": list(scene.distractor_targets),
            "distractor_boxes": scene.distractor_boxes.tolist(),
            "native": class_probability(network, scene, SIZE),
            "at_224": class_probability(network, scene, (SMALL, SMALL)),
        }
        for scene in scenes
    ]
    summary = summarise(rows, [scene.kind for scene in scenes])
    total = sum(row["seconds"] for row in rows)
    results = settings | {"seconds": total, "summary": summary, "scene": described, "rows": rows}
    arguments.output.write_text(json.dumps(results, indent=1) + "\n")
    partial.unlink()

    for kind, by_name in summary.items():
        count = next(iter(by_name.values()))["scenes"]
        print(f"\n{count} scenes of kind: {kind}\n\n{markdown(by_name)}")
    print(f"\n{total / 60:.1f} minutes for the maps, {arguments.threads} threads")


if __name__ == "__main__":
    main()
