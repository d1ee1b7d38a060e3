"""The cost of RISE beside the forward passes that it needs, in one run.

    python -m tests.benchmarks.rise [--device cpu|cuda] [--repeats N] [--threads N] [--masks N]
                                    [--network NAME] [--json FILE] [--quick]

Two tables, in Markdown:

- time of whole calls for a batch of two images of 224 pixels, beside the floor: as many forward
  passes of the network, at the same batch size, on a batch that is there already. The network is
  a ResNet-18 on a CPU, where additional work weighs more than beside a ResNet-50, and a ResNet-50
  on a GPU. RISE and the loops below are also run with a model that does nothing. This is the work
  that they add, even on a machine that is too busy for the ratio of whole calls.

  The loops are over single images, as in libraries, and are written out here:

  - in the manner of Xplique: for each image, all grids of zeros and ones are drawn first. Then, for
    each batch of masks, the grids are resized to a little more than the image and cropped with one
    shift that is drawn for the batch, the image is repeated and multiplied, and sums of score x
    mask and of masks are kept: their quotient is the map.
  - in the manner of TorchRay: for each image and batch of masks, grids are drawn and resized, and
    cropped mask by mask, each with a shift of its own, into a tensor. The image is multiplied, the
    sigmoids of all classes are multiplied with the masks, and the sums, a map for each class, are
    divided by N. The map of the target is taken at the end.

  These loops estimate the same map (TorchRay's up to 1 / p), which is checked first, on a small
  model;
- peak memory for ever more masks, and a network that needs next to none: all of it is RISE's. The
  most masks would be 1914 MiB.

On two cores that are free it takes about three minutes.

`measuring.py` describes how it is measured. The network has random weights.
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
from torch import Tensor
from torch.nn import functional as F
from torchvision.models import get_model

from captum_ext.attr import RISE
from tests.benchmarks.measuring import (
    MEBI,
    Calls,
    Row,
    environment,
    markdown,
    measure,
    parse_arguments,
    peaks,
    speed_up,
)
from tests.networks import Lambda

TARGET = 7
SIDE = 224
IMAGES = 2
BATCH = 16  # masked images in one pass
GRID, P = 7, 0.5
MEMORY = (64, 512, 10_000)
FLOOR, OURS = "forward passes", "RISE"
XPLIQUE, TORCHRAY = "loop like Xplique's", "loop like TorchRay's"
ALONE = ", of a model that does nothing"


Model = Callable[[Tensor], Tensor]


def images(device: torch.device, n: int = IMAGES, side: int = SIDE) -> Tensor:
    return torch.randn(n, 3, side, side, generator=torch.Generator().manual_seed(1)).to(device)


# Scores of next to no cost: logits are the means of the channels.
channel_means = Lambda(lambda x: x.mean((2, 3)))


# --- the loops -----------------------------------------------------------------------------------


@torch.no_grad()
def like_xplique(model: Model, x: Tensor, target: int, n_masks: int) -> Tensor:
    height, width = x.shape[2:]
    up = [math.ceil(side * (1 + 1 / GRID)) for side in (height, width)]
    maps = []
    for image in x:
        grids = (torch.rand(n_masks, 1, GRID, GRID, device=x.device) < P).float()
        weighted = torch.zeros(height, width, device=x.device)
        mask_sum = torch.zeros_like(weighted)
        for chunk in grids.split(BATCH):
            large = F.interpolate(chunk, up, mode="bilinear")
            top = int(torch.randint(up[0] - height + 1, ()))
            left = int(torch.randint(up[1] - width + 1, ()))
            masks = large[:, :, top : top + height, left : left + width]
            repeated = image.expand(len(chunk), -1, -1, -1).clone()
            score = model(repeated * masks).softmax(1)[:, target]
            weighted += (score[:, None, None] * masks[:, 0]).sum(0)
            mask_sum += masks[:, 0].sum(0)
        maps.append(weighted / mask_sum)
    return torch.stack(maps)


@torch.no_grad()
def like_torchray(model: Model, x: Tensor, target: int, n_masks: int) -> Tensor:
    height, width = x.shape[2:]
    cell = [math.ceil(side / GRID) for side in (height, width)]
    up = [(GRID + 1) * side for side in cell]
    maps = []
    for image in x:
        weighted = None
        for start in range(0, n_masks, BATCH):
            n = min(BATCH, n_masks - start)
            grids = (torch.rand(n, 1, GRID, GRID, device=x.device) < P).float()
            large = F.interpolate(grids, up, mode="bilinear")
            masks = torch.empty(n, 1, height, width, device=x.device)
            for i in range(n):
                top, left = (int(torch.randint(side, ())) for side in cell)
                masks[i] = large[i, :, top : top + height, left : left + width]
            scores = model(image * masks).sigmoid()
            added = scores.T @ masks.flatten(1)  # (classes, H * W)
            weighted = added if weighted is None else weighted + added
        assert weighted is not None
        maps.append(weighted.unflatten(1, (height, width))[target] / n_masks)
    return torch.stack(maps)


def compare(device: torch.device) -> None:
    """Check that the maps differ by no more than their standard errors allow."""
    x, n = images(device, side=28), 4096
    x[:, 1, 4:16, 8:20] += 4
    for loop, score, estimator, factor in (
        (like_xplique, "softmax", "self-normalized", 1),
        (like_torchray, "sigmoid", "standard", 1 / P),
    ):
        ours = RISE(channel_means, score).estimate(
            x, [1], n_masks=n, grid=GRID, p=P, estimator=estimator, perturbations_per_eval=256
        )
        difference = (factor * loop(channel_means, x, 1, n) - ours.maps[0, :, 0]).abs()
        worst = float((difference / ours.standard_errors[0, :, 0]).max())
        # Two independent maps: sqrt(2); places shared by a batch of masks: somewhat more.
        assert worst < 8, f"{loop.__name__} differs by {worst:.1f} standard errors."


# --- tables --------------------------------------------------------------------------------------


def time_calls(network: str, n_masks: int, device: torch.device) -> Calls:
    torch.manual_seed(0)
    model, x = get_model(network).eval().to(device), images(device)
    if device.type == "cpu":  # the faster order there
        model = model.to(memory_format=torch.channels_last)
    batch = images(device, BATCH)
    options = {"n_masks": n_masks, "grid": GRID, "p": P, "perturbations_per_eval": BATCH // IMAGES}

    def nothing(x: Tensor) -> Tensor:
        return x.new_zeros(len(x), 1000)

    @torch.no_grad()
    def floor() -> None:
        for _ in range(n_masks * IMAGES // BATCH):
            model(batch)

    calls: Calls = {
        FLOOR: floor,
        "RISE, 10 targets, standard errors": partial(
            RISE(model).estimate, x, list(range(10)), **options
        ),
    }
    for ending, f in (("", model), (ALONE, nothing)):
        calls[OURS + ending] = partial(RISE(f).attribute, x, target=TARGET, **options)
        calls[XPLIQUE + ending] = partial(like_xplique, f, x, TARGET, n_masks)
        calls[TORCHRAY + ending] = partial(like_torchray, f, x, TARGET, n_masks)
    return calls


def memory_calls(device: torch.device) -> Calls:
    x, rise = images(device, 1), RISE(channel_means)

    def call(n: int) -> Callable[[], Tensor]:
        options = {"n_masks": n, "grid": GRID, "perturbations_per_eval": BATCH}
        return partial(rise.attribute, x, target=1, **options)

    def with_errors(n: int) -> Callable[[], object]:
        options = {"n_masks": n, "grid": GRID, "perturbations_per_eval": BATCH}
        return partial(rise.estimate, x, [1], **options)

    call(MEMORY[0])()  # the first call sets up what later ones reuse
    return {f"{n} masks": call(n) for n in MEMORY} | {
        f"{n} masks, standard errors": with_errors(n) for n in MEMORY[1:2]
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
    parser.add_argument("--network", help="of torchvision; resnet18 on a CPU, resnet50 on a GPU")
    parser.add_argument("--json", type=Path, help="write all numbers here")
    arguments = parse_arguments(parser, repeats=1, masks=BATCH)
    warnings.simplefilter("ignore")
    device = torch.device(arguments.device)
    torch.set_num_threads(arguments.threads)
    on_gpu = device.type == "cuda"
    n_masks = arguments.masks or (4096 if on_gpu else 64)
    network = arguments.network or ("resnet50" if on_gpu else "resnet18")
    if n_masks % BATCH:
        parser.error(f"--masks must be a multiple of {BATCH}")
    machine = environment(device, arguments.threads)
    print(", ".join(f"{name} {value}" for name, value in machine.items()), end="\n\n")

    start = time.perf_counter()
    compare(device)
    memory = memory_rows(device)
    print(f"Peak memory, 1 x 3 x {SIDE} x {SIDE}, {BATCH} masks at once; wished: below 200 MB\n")
    print("| | peak MiB |\n|:--|--:|")
    print("\n".join(f"| {r['name']} | {r['peak']:.0f} |" for r in memory), end="\n\n", flush=True)

    calls = partial(time_calls, network, n_masks)
    times = measure(calls, lambda name: FLOOR, arguments.repeats, device)
    print(
        f"{network}, {IMAGES} x 3 x {SIDE} x {SIDE}, {n_masks} masks, {BATCH} masked images at "
        f"once, {arguments.repeats} rounds\n"
    )
    print(markdown(times), end="\n\n")
    rows = {row["name"]: row for row in times}
    for name in (OURS, XPLIQUE, TORCHRAY):
        row, alone = rows[name], rows[name + ALONE]
        print(
            f"{name} takes {row['ratio']:.3f} times the floor ({row['min']:.3f} to "
            f"{row['max']:.3f}); it adds {alone['ratio']:.3f} ({alone['min']:.3f} to "
            f"{alone['max']:.3f}) of it, {1e3 * alone['seconds'] / n_masks / IMAGES:.2f} ms for "
            f"each mask and image"
        )
    print("wished: at most 1.10, and that RISE adds less than the loops")
    for loop in (XPLIQUE, TORCHRAY):
        print(speed_up(times, loop, OURS))
        print(speed_up(times, loop + ALONE, OURS + ALONE))
    print(f"\n{time.perf_counter() - start:.0f} seconds in all")

    if arguments.json:
        tables = {"environment": machine, "times": times, "memory": memory}
        arguments.json.write_text(json.dumps(tables, indent=1))


if __name__ == "__main__":
    main()
