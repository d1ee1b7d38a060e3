"""The cost of SESSWrapper and AugmentedSR, beside their floors and beside the peer, in one run.

    python -m tests.benchmarks.wrappers [--device cpu|cuda] [--repeats N] [--threads N]
                                        [--json FILE]

Three tables, in Markdown:

- SESS around Grad-CAM on layer4 of a ResNet-50, 12 scales, a photograph of 500 x 375: nothing
  filtered (r = 0), and nine tenths filtered (r = 0.9), in units of the least work for each: a
  forward pass for each of the 157 windows, and for r = 0.9 the maps of the 16 kept windows, at the
  same batch size, on windows that are cropped already;
- memory of the fusion alone at 3840 x 2160, for ever more windows;
- AugmentedSR's solver: seconds until F is within 1 % of its minimum, for the same problem and the
  same operators.

`measuring.py` describes how it is measured. The networks have random weights.
"""

import argparse
import copy
import json
import os
import statistics
import time
import warnings
from functools import partial
from pathlib import Path
from typing import Any

os.environ["TQDM_DISABLE"] = "1"

import torch
from captum.attr import LayerGradCam
from pytorch_grad_cam.sess import SESS
from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget
from skimage.data import chelsea
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models import resnet50

from captum_ext.attr import SESSWrapper
from captum_ext.attr.wrappers._fusion import WindowFusion
from captum_ext.attr.wrappers._windows import CropViews, scaled_size, slide_windows
from captum_ext.attr.wrappers.super_resolution import Observation, Solution, euclidean, solve
from tests.benchmarks.measuring import (
    Calls,
    Row,
    environment,
    markdown,
    measure,
    seconds_of,
    speed_up,
)

TARGET = 7
PHOTO = (375, 500)
LARGE = (2160, 3840)
WINDOW = (224, 224)
BATCH = 64
KEPT = 16  # 157 - int(157 * 0.9)
FLOOR_0 = "r = 0: a forward for each window"
FLOOR_9 = "r = 0.9: a forward for each window, and 16 maps"


# --- SESS ----------------------------------------------------------------------------------------


def photograph(device: torch.device) -> Tensor:
    pixels = torch.from_numpy(chelsea()).permute(2, 0, 1)[None].float() / 255
    return (F.interpolate(pixels, PHOTO, mode="bilinear").to(device) - 0.45) / 0.22


def network(device: torch.device) -> nn.Module:
    torch.manual_seed(0)
    model = resnet50().eval()
    # No map is empty, so that every window has a vote.
    model.fc.weight.data[TARGET].abs_()
    return model.to(device)


def sess_calls(device: torch.device) -> Calls:
    model, x = network(device), photograph(device)
    sizes = [scaled_size(PHOTO, 224 + 64 * i) for i in range(12)]
    windows = slide_windows(sizes, WINDOW, WINDOW)
    assert (len(windows), len(windows) - int(len(windows) * 0.9)) == (157, KEPT)
    patches = CropViews(sizes, WINDOW, False)(x, [0] * len(windows), windows, False)

    def forwards() -> None:
        with torch.no_grad():
            for chunk in patches.split(BATCH):
                model(chunk)

    def floor_9() -> None:
        forwards()
        LayerGradCam(model, model.layer4).attribute(patches[:KEPT], TARGET)

    def ours(r: float, **options: Any) -> Any:
        mine = copy.deepcopy(model)
        base = LayerGradCam(mine, mine.layer4)
        sess = SESSWrapper(base, pre_filter_ratio=r, internal_batch_size=BATCH, **options)
        return lambda: sess.attribute(x, target=TARGET)

    def theirs(r: float) -> Any:
        copied = copy.deepcopy(model)

        def call() -> Any:
            with SESS(copied, [copied.layer4], window_size=224, pre_filter_ratio=r) as peer:
                maps = peer(x, [ClassifierOutputTarget(TARGET)])
            copied.zero_grad()
            return maps

        return call

    compare(ours(0.9, fusion="reference", antialias=True, final_norm=True)(), theirs(0.9)())
    return {
        FLOOR_0: forwards,
        "r = 0: SESSWrapper(LayerGradCam)": ours(0.0),
        "r = 0: the same, reference fusion": ours(0.0, fusion="reference"),
        "r = 0: grad-cam SESS": theirs(0.0),
        FLOOR_9: floor_9,
        "r = 0.9: SESSWrapper(LayerGradCam)": ours(0.9),
        "r = 0.9: grad-cam SESS": theirs(0.9),
    }


def compare(ours: Tensor, theirs: Any) -> None:
    """Check that both compute the same: with the peer's settings, the maps are equal."""
    difference = float((ours[:, 0].cpu() - torch.from_numpy(theirs)).abs().max())
    assert difference < 1e-4, f"The maps of the two libraries differ by {difference}."


# --- memory of the fusion ------------------------------------------------------------------------


def fuse(device: torch.device, fusion: str, step: int) -> int:
    """Fuse maps for all windows of a large image, 64 at a time; their number."""
    sizes = [scaled_size(LARGE, 224 + 64 * i) for i in range(12)]
    windows = slide_windows(sizes, WINDOW, (step, step))
    images = torch.empty(1, 1, 1, 1, device=device).expand(1, 3, *LARGE)
    pool = "max" if fusion == "max" else "mean"
    denominator = "soft" if fusion == "max" else fusion
    peak = torch.zeros(1, device=device)
    fused = WindowFusion(images, sizes, WINDOW, pool, denominator, 0.0, peak, False)
    windows.sort(key=fused.canvas_key)
    maps = torch.full((BATCH, 1, *WINDOW), 0.5, device=device)
    for start in range(0, len(windows), BATCH):
        chunk = windows[start : start + BATCH]
        n = len(chunk)
        fused.add(maps[:n], torch.zeros(n, device=device), [0] * n, chunk)
    fused.result()
    return len(windows)


def fusion_calls(device: torch.device) -> Calls:
    calls: Calls = {"64 maps of 224 x 224": partial(torch.ones, BATCH, 1, *WINDOW, device=device)}
    fuse(device, "soft", 224)  # the first call sets up what later ones reuse
    for fusion in ("soft", "reference", "max"):
        for step in (224, 112, 56):
            n = sum(1 for _ in windows_of(step))
            calls[f"{fusion}, {n} windows"] = partial(fuse, device, fusion, step)
    return calls


def windows_of(step: int) -> list[Any]:
    sizes = [scaled_size(LARGE, 224 + 64 * i) for i in range(12)]
    return slide_windows(sizes, WINDOW, (step, step))


# --- AugmentedSR's solver ------------------------------------------------------------------------


def problem(copies: int, device: torch.device) -> tuple[Observation, Tensor, float, float, Tensor]:
    """Three blobs of 224 x 224, seen in noisy maps of 14 x 14 of `copies` transformed copies."""
    generator = torch.Generator().manual_seed(0)
    side = torch.arange(224.0)
    truth = torch.zeros(1, 224, 224)
    for y, x, radius in ((70, 80, 28), (140, 150, 20), (60, 170, 14)):
        inside = (side[:, None] - y) ** 2 + (side - x) ** 2 <= radius**2
        truth = torch.maximum(truth, inside[None].float())
    kernel = torch.exp(-(torch.arange(-12.0, 13.0) ** 2) / (2 * 4.0**2))
    kernel = (kernel / kernel.sum())[None, None, :, None]
    truth = F.conv2d(F.conv2d(truth[None], kernel, padding="same"), kernel.mT, padding="same")[0]
    unit = torch.rand(copies, 3, generator=generator) * 2 - 1
    unit[0] = 0
    matrices = euclidean(unit[:, 0] * 0.3, unit[:, 1:] * 0.13 * 224, (224, 224))
    like = torch.zeros((), device=device)
    k = Observation(matrices.to(device), (224, 224), (224, 224), (14, 14), like=like)
    seen = k(truth.to(device))
    noise = torch.randn(seen.shape, generator=generator).to(device)
    maps = seen + 0.03 * noise * k.kept
    first = F.interpolate(maps[0][None], (224, 224), mode="bilinear")[0]
    return k, maps, 2e-4 * copies, 2e-5 * copies, first


def solver_rows(copies: int, repeats: int, device: torch.device) -> list[Row]:
    """Seconds until F is within 1 % of F*; a subgradient method has 40 x the time of ours."""
    k, maps, tv, l2, first = problem(copies, device)

    def run(**options: Any) -> Solution:
        vars(k).pop("majorant", None)  # cached by the last call, but part of the cost
        return solve(k, maps, tv=tv, l2=l2, **options)

    best = float(run(solver="mfista", max_iterations=400, tolerance=0.0).history.min())
    reference = float(run(solver="condat-vu", max_iterations=1500).history.min())
    best = min(best, reference)
    starts = {"mfista from 0": ("mfista", None), "adam 1e-3 from 0": ("adam", None)}
    starts["adam 1e-3 from the upsampled first map"] = ("adam", first)
    mine = 0.0
    rows = []
    for name, (solver, start) in starts.items():
        options: dict[str, Any] = {"solver": solver, "start": start, "tolerance": 0.0}
        if solver == "mfista":
            steps, gap = arrival(run(max_iterations=60, **options).history[0], best)
        else:
            short = partial(run, max_iterations=20, **options)
            seconds_per_step = statistics.median(seconds_of(short, device) for _ in range(3)) / 20
            cap = max(200, round(40 * mine / seconds_per_step))
            steps, gap = arrival(run(max_iterations=cap, **options).history[0], best)
        timed = partial(run, max_iterations=steps, **options)
        times = [seconds_of(timed, device) for _ in range(repeats if solver == "mfista" else 1)]
        mine = mine or statistics.median(times)
        rows.append(
            {
                "name": f"{copies} copies: {name}",
                "iterations": steps,
                "seconds": statistics.median(times),
                "gap": gap,
                "times_mfista": statistics.median(times) / mine,
                "minimum": best,
                "condat_vu_after_1500": reference,
            }
        )
    return rows


def arrival(history: Tensor, best: float) -> tuple[int, float]:
    """The first iteration within 1 % of the minimum, or the last; and how far it is from it."""
    gaps = history / best - 1
    within = (gaps <= 0.01).nonzero()
    at = int(within[0]) if len(within) else len(history) - 1
    return at, float(gaps[at])


def solver_markdown(rows: list[Row]) -> str:
    head = "| | iterations | seconds | F / F* - 1 | x MFISTA |\n|:--|--:|--:|--:|--:|\n"
    return head + "\n".join(
        f"| {r['name']} | {r['iterations']} | {r['seconds']:.2f} | {r['gap']:.4f} "
        f"| {r['times_mfista']:.1f} |"
        for r in rows
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--repeats", type=int, default=3, help="rounds")
    parser.add_argument("--threads", type=int, default=2, help="of the CPU")
    parser.add_argument("--json", type=Path, help="write all numbers here")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    device = torch.device(arguments.device)
    torch.set_num_threads(arguments.threads)
    machine = environment(device, arguments.threads)
    print(", ".join(f"{name} {value}" for name, value in machine.items()), end="\n\n")

    start = time.perf_counter()
    solver = [row for copies in (32, 100) for row in solver_rows(copies, arguments.repeats, device)]
    print("AugmentedSR's solver, 224 x 224 from maps of 14 x 14, until within 1 % of F*\n")
    print(solver_markdown(solver), end="\n\n", flush=True)

    fusion = measure(fusion_calls, lambda name: "64 maps of 224 x 224", 1, device)
    print("Fusion at 3840 x 2160\n")
    print(markdown(fusion), end="\n\n", flush=True)

    sess = measure(
        sess_calls,
        lambda name: FLOOR_9 if name.startswith("r = 0.9") else FLOOR_0,
        arguments.repeats,
        device,
    )
    print(f"ResNet-50, layer4, 1 x 3 x 375 x 500, 12 scales, {arguments.repeats} rounds\n")
    print(markdown(sess), end="\n\n")
    for r in ("r = 0", "r = 0.9"):
        print(speed_up(sess, f"{r}: grad-cam SESS", f"{r}: SESSWrapper(LayerGradCam)"))
    print(f"\n{time.perf_counter() - start:.0f} seconds in all")

    if arguments.json:
        tables = {"environment": machine, "solver": solver, "fusion": fusion, "sess": sess}
        arguments.json.write_text(json.dumps(tables, indent=1))


if __name__ == "__main__":
    main()
