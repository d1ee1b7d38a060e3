"""Do finer maps find small objects? Grad-CAM, wrapped and bare, on photographs with pasted objects.

    python -m tests.benchmarks.pasted_scenes [--scenes N] [--seed N] [--methods NAME ...]
                                             [--threads N] [--output FILE] [--quick]

For each scene of `captum_ext.datasets.PastedScenes` (480 x 640), the demo's ImageNet network and
the class of the pasted objects, whatever the network says of the scene: the pointing game (is the
maximum less than 15 pixels from one of the objects' boxes? is it in one?), the share of the map's
positive mass in the boxes, and the time. The positive part of each map counts; a map that has none
is a miss without mass. The wrappers have their default options but for those in `METHODS`, which
are what keeps the run short; none was chosen by its results on these scenes.

Means are over scenes, their intervals the central 95% of 10,000 bootstrap samples of the scenes,
the same samples for each method. The columns of differences are paired: method minus Grad-CAM at
native size, scene by scene. "Chance" is the exact expectation for a point, and for mass, spread
evenly over the picture. "Units in place" lays the map over the image where the receptive fields of
its units are centred (`align="rf"`), in this network 15.5 pixels down and right of the cells'
centres. Seconds are medians, after one untimed call on another scene.

Each finished scene and method is a line of FILE's neighbour with the ending .partial; a run that
was killed goes on from there if its scenes and options are the same.
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

# Four windows at a time change no result; on a CPU they are three times as fast as 64, whose
# activations malloc takes from the kernel and gives back each time.
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


def build(name: str, network: LoadedModel) -> Method:
    """Gives the map, (1, 1, H, W), of a scene and its number, which seeds the augmentations."""
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
    """The whole scene at `size`, nothing cut off: (1, 3, H, W)."""
    image = scene.image
    if size != SIZE:
        image = image.resize(size[::-1], Image.Resampling.BICUBIC)
    preprocess = network.preprocess
    x: Tensor = normalize(to_tensor(image), preprocess.mean, preprocess.std)
    return x[None]


def seen(network: LoadedModel, scene: Scene, size: tuple[int, int]) -> dict[str, float]:
    """The network's score and probability of the objects' class."""
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


def summarise(rows: list[Row], kinds: list[str]) -> dict[str, dict[str, Row]]:
    """For each kind of scene and method: each measure's mean and interval, and the seconds."""
    summary: dict[str, dict[str, Row]] = {}
    names = [name for name in METHODS if any(row["method"] == name for row in rows)]
    for kind in ("all", *KINDS):
        chosen = [i for i, k in enumerate(kinds) if kind in ("all", k)]
        if not chosen:
            continue
        random = np.random.RandomState(0)
        samples = random.randint(len(chosen), size=(SAMPLES, len(chosen)))
        by_name = {
            name: {row["scene"]: row for row in rows if row["method"] == name} for name in names
        }
        summary[kind] = {}
        for name in names:
            figures: Row = {"scenes": len(chosen)}
            figures["seconds"] = statistics.median(by_name[name][i]["seconds"] for i in chosen)
            for key in MEASURES:
                values = np.array([by_name[name][i][key] for i in chosen])
                figures[key] = interval(values, samples)
                if NATIVE in names:
                    native = np.array([by_name[NATIVE][i][key] for i in chosen])
                    figures[f"{key}_beyond_native"] = interval(values - native, samples)
            summary[kind][name] = figures
    return summary


def interval(values: np.ndarray, samples: np.ndarray) -> dict[str, float]:
    low, high = np.percentile(values[samples].mean(1), [2.5, 97.5])
    return {"mean": float(values.mean()), "low": float(low), "high": float(high)}


# --- the tables ----------------------------------------------------------------------------------


def markdown(summary: dict[str, Row]) -> str:
    beyond = {"hit_15": "hits at 15 px", "share": "mass"}
    shown = [f"{title}, %" for title in MEASURES.values()]
    head = ["method", *shown, *(f"{title} beyond native" for title in beyond.values())]
    head += ["s per scene"]
    lines = ["| " + " | ".join(head) + " |", "|---" + "|---:" * (len(head) - 1) + "|"]
    for name, figures in summary.items():
        cells = [percent(figures[key]) for key in MEASURES]
        for key in beyond:
            difference = figures.get(f"{key}_beyond_native")
            cells += [percent(difference) if difference and name != NATIVE else ""]
        cells += ["" if name == CHANCE else f"{figures['seconds']:.2f}"]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def percent(figure: dict[str, float]) -> str:
    mean, low, high = (100 * figure[key] for key in ("mean", "low", "high"))
    return f"{mean:.1f} ({low:.1f} to {high:.1f})"


# --- the run -------------------------------------------------------------------------------------


def resume(partial: Path, settings: Row) -> list[Row]:
    """The finished rows of an earlier run with the same settings; else a fresh file."""
    lines = partial.read_text().splitlines(keepends=True) if partial.is_file() else []
    whole = [json.loads(line) for line in lines if line.endswith("\n")]
    if not whole or whole[0] != settings:
        whole = [settings]
    partial.parent.mkdir(parents=True, exist_ok=True)
    partial.write_text("".join(json.dumps(row) + "\n" for row in whole))
    return whole[1:]


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
    methods = {name: build(name, network) for name in METHODS if name in arguments.methods}
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
    rows = resume(partial, settings)
    done = {(row["scene"], row["method"]) for row in rows}
    left = [(i, n) for i in range(len(scenes)) for n in methods if (i, n) not in done]
    other = PastedScenes(1, arguments.seed + 1, size=SIZE)[0]
    for name in {name for _, name in left}:
        methods[name](0, other)
    with partial.open("a") as file:
        for index, name in tqdm(left, unit="map"):
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
            "native": seen(network, scene, SIZE),
            "at_224": seen(network, scene, (SMALL, SMALL)),
        }
        for scene in scenes
    ]
    summary = summarise(rows, [scene.kind for scene in scenes])
    total = sum(row["seconds"] for row in rows)
    content = settings | {"seconds": total, "summary": summary, "scene": described, "rows": rows}
    arguments.output.write_text(json.dumps(content, indent=1) + "\n")
    partial.unlink()

    for kind, by_name in summary.items():
        count = next(iter(by_name.values()))["scenes"]
        print(f"\n{count} scenes of kind: {kind}\n\n{markdown(by_name)}")
    print(f"\n{total / 60:.1f} minutes for the maps, {arguments.threads} threads")


if __name__ == "__main__":
    main()
