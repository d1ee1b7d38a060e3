"""What RISE costs beside the forward passes that it cannot do without, in one run.

    python -m tests.benchmarks.rise [--device cpu|cuda] [--repeats N] [--threads N] [--masks N]
                                    [--json FILE]

Two tables, in Markdown:

- time of whole calls for a batch of two images of 224 pixels, ResNet-50, beside the floor: as many
  forward passes, at the same batch size, on a batch that is there already. RISE of a model that
  does nothing says what it adds, also where the machine is too busy for the ratio of the two.
  Beside them, two loops over single images as libraries have them, written down here:

  - in the manner of Xplique: for each image, all grids of zeros and ones are drawn first. Then, for
    each batch of masks, the grids are resized to a little more than the image and all cut at one
    place that is drawn for the batch, the image is repeated and multiplied, and sums of score x
    mask and of masks are kept: their quotient is the map.
  - in the manner of TorchRay: for each image and batch of masks, grids are drawn and resized, and
    then, mask after mask, cut each at a place of its own into a tensor that waits for them; the
    image is multiplied, all scores are softmaxed, and the sum of score x mask is divided by N p.

  That these loops estimate the same map is checked first, on a small model;
- peak memory for ever more masks, and a network that needs next to none: all of it is RISE's.

How it is measured says `measuring.py`. The network has random weights.
"""

import argparse
import json
import math
import multiprocessing
import time
import warnings
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models import resnet50

from captum_ext.attr import RISE
from tests.benchmarks.measuring import (
    MEBI,
    Calls,
    Row,
    environment,
    markdown,
    measure,
    peaks,
    speed_up,
)

TARGET = 7
SIDE = 224
IMAGES = 2
BATCH = 16  # masked images in one pass
GRID, P = 7, 0.5
MEMORY = (100, 1_000, 10_000)
FLOOR, OURS, ALONE = "forward passes", "RISE", "RISE, of a model that does nothing"
XPLIQUE, TORCHRAY = "loop like Xplique's", "loop like TorchRay's"


def images(device: torch.device, n: int = IMAGES, side: int = SIDE) -> Tensor:
    return torch.randn(n, 3, side, side, generator=torch.Generator().manual_seed(1)).to(device)


class Means(nn.Module):
    """Scores of next to no cost: logits are the means of the channels."""

    def forward(self, x: Tensor) -> Tensor:
        return x.mean((2, 3))


# --- the loops -----------------------------------------------------------------------------------


@torch.no_grad()
def like_xplique(model: nn.Module, x: Tensor, target: int, n_masks: int) -> Tensor:
    height, width = x.shape[2:]
    up = [math.ceil(side * (1 + 1 / GRID)) for side in (height, width)]
    maps = []
    for image in x:
        grids = (torch.rand(n_masks, 1, GRID, GRID, device=x.device) < P).float()
        weighted = torch.zeros(height, width, device=x.device)
        shown = torch.zeros_like(weighted)
        for chunk in grids.split(BATCH):
            large = F.interpolate(chunk, up, mode="bilinear")
            top = int(torch.randint(up[0] - height + 1, ()))
            left = int(torch.randint(up[1] - width + 1, ()))
            masks = large[:, :, top : top + height, left : left + width]
            repeated = image.expand(len(chunk), -1, -1, -1).clone()
            score = model(repeated * masks).softmax(1)[:, target]
            weighted += (score[:, None, None] * masks[:, 0]).sum(0)
            shown += masks[:, 0].sum(0)
        maps.append(weighted / shown)
    return torch.stack(maps)


@torch.no_grad()
def like_torchray(model: nn.Module, x: Tensor, target: int, n_masks: int) -> Tensor:
    height, width = x.shape[2:]
    cell = [math.ceil(side / GRID) for side in (height, width)]
    up = [(GRID + 1) * side for side in cell]
    maps = []
    for image in x:
        weighted = torch.zeros(height, width, device=x.device)
        for start in range(0, n_masks, BATCH):
            n = min(BATCH, n_masks - start)
            grids = (torch.rand(n, 1, GRID, GRID, device=x.device) < P).float()
            large = F.interpolate(grids, up, mode="bilinear")
            masks = torch.empty(n, 1, height, width, device=x.device)
            for i in range(n):
                top, left = (int(torch.randint(side, ())) for side in cell)
                masks[i] = large[i, :, top : top + height, left : left + width]
            score = model(image * masks).softmax(1)[:, target]
            weighted += (score[:, None, None] * masks[:, 0]).sum(0)
        maps.append(weighted / (n_masks * P))
    return torch.stack(maps)


def compare(device: torch.device) -> None:
    """That the same is timed: the maps differ by no more than their standard errors allow."""
    x, n = images(device, side=28), 4096
    x[:, 1, 4:16, 8:20] += 4
    for loop, estimator in ((like_xplique, "self-normalized"), (like_torchray, "standard")):
        ours = RISE(Means()).estimate(
            x, [1], n_masks=n, grid=GRID, p=P, estimator=estimator, perturbations_per_eval=256
        )
        difference = (loop(Means(), x, 1, n) - ours.maps[0, :, 0]).abs()
        worst = float((difference / ours.standard_errors[0, :, 0]).max())
        # Two independent maps: sqrt(2); places shared by a batch of masks: somewhat more.
        assert worst < 8, f"{loop.__name__} differs by {worst:.1f} standard errors."


# --- tables --------------------------------------------------------------------------------------


def time_calls(n_masks: int, device: torch.device) -> Calls:
    torch.manual_seed(0)
    model, x = resnet50().eval().to(device), images(device)
    batch = images(device, BATCH)
    rise, nothing = RISE(model), RISE(lambda x: x.new_zeros(len(x), 10))
    options = {"n_masks": n_masks, "grid": GRID, "p": P, "perturbations_per_eval": BATCH // IMAGES}

    @torch.no_grad()
    def floor() -> None:
        for _ in range(n_masks * IMAGES // BATCH):
            model(batch)

    return {
        FLOOR: floor,
        OURS: partial(rise.attribute, x, target=TARGET, **options),
        "RISE, 10 targets, standard errors": partial(rise.estimate, x, list(range(10)), **options),
        ALONE: partial(nothing.attribute, x, target=TARGET, **options),
        XPLIQUE: partial(like_xplique, model, x, TARGET, n_masks),
        TORCHRAY: partial(like_torchray, model, x, TARGET, n_masks),
    }


def memory_calls(device: torch.device) -> Calls:
    x, rise = images(device, 1), RISE(Means())

    def call(n: int) -> Callable[[], Tensor]:
        options = {"n_masks": n, "grid": GRID, "perturbations_per_eval": BATCH}
        return partial(rise.attribute, x, target=1, **options)

    def with_errors(n: int) -> Callable[[], object]:
        options = {"n_masks": n, "grid": GRID, "perturbations_per_eval": BATCH}
        return partial(rise.estimate, x, [1], **options)

    call(MEMORY[0])()  # what is set up once is not the masks'
    return {f"{n} masks": call(n) for n in MEMORY} | {
        f"{n} masks, standard errors": with_errors(n) for n in MEMORY[-1:]
    }


def memory_rows(device: torch.device) -> list[Row]:
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
        peak = process.submit(peaks, memory_calls, device, torch.get_num_threads()).result()
    return [{"name": name, "peak": value / MEBI} for name, value in peak.items()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--repeats", type=int, default=5, help="rounds")
    parser.add_argument("--threads", type=int, default=2, help="of the CPU")
    parser.add_argument("--masks", type=int, help="of a call; 64 on a CPU, 4096 on a GPU")
    parser.add_argument("--json", type=Path, help="write all numbers here")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    device = torch.device(arguments.device)
    torch.set_num_threads(arguments.threads)
    n_masks = arguments.masks or (4096 if device.type == "cuda" else 64)
    if n_masks % BATCH:
        parser.error(f"--masks must be a multiple of {BATCH}")
    found = environment(device, arguments.threads)
    print(", ".join(f"{name} {value}" for name, value in found.items()), end="\n\n")

    start = time.perf_counter()
    compare(device)
    memory = memory_rows(device)
    print(f"Peak memory, 1 x 3 x {SIDE} x {SIDE}, {BATCH} masks at once; wished: below 200 MB\n")
    print("| | peak MiB |\n|:--|--:|")
    print("\n".join(f"| {r['name']} | {r['peak']:.0f} |" for r in memory), end="\n\n", flush=True)

    times = measure(partial(time_calls, n_masks), lambda name: FLOOR, arguments.repeats, device)
    print(
        f"ResNet-50, {IMAGES} x 3 x {SIDE} x {SIDE}, {n_masks} masks, {BATCH} masked images at "
        f"once, {arguments.repeats} rounds\n"
    )
    print(markdown(times), end="\n\n")
    ours = next(row for row in times if row["name"] == OURS)
    print(
        f"RISE takes {ours['ratio']:.3f} times the floor ({ours['min']:.3f} to {ours['max']:.3f}); "
        f"wished: at most 1.10"
    )
    for loop in (XPLIQUE, TORCHRAY):
        print(speed_up(times, loop, OURS))
    print(f"\n{time.perf_counter() - start:.0f} seconds in all")

    if arguments.json:
        tables = {"environment": found, "times": times, "memory": memory}
        arguments.json.write_text(json.dumps(tables, indent=1))


if __name__ == "__main__":
    main()
