"""The cost of insertion, deletion and ROAD, beside the model's passes and beside torchcam.

Tables, in Markdown, of a ResNet-18 at 112 pixels, whose command is in `metrics.py`:

- time of insertion and deletion of a batch of images, beside as many forward passes of batches of
  the same size, on a batch that is there already; and of the other functions beside theirs;
- memory beyond one pass, for ever more steps and for ever larger passes;
- the seconds of one imputation, and its largest error against SciPy's general solver, by the share
  of pixels removed;
- torchcam's metrics, given the same maps, target, steps, baseline and size of a pass. Their figures
  are ours, which is checked first. They share other passes: torchcam runs the bare baseline and
  the image once for both curves (56 pictures for each image where ours runs 58), the latter with
  a graph; its classification metric runs 2 pictures where our two functions run 4.

`measuring.py` describes how it is measured. The network has random weights; maps have 7 x 7
cells, upsampled, as those of CAMs.
"""

import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
from scipy.sparse.linalg import spsolve
from torch import Generator, Tensor, nn
from torchcam.metrics import ClassificationMetric, DeletionInsertionMetric
from torchvision.models import resnet18

from captum_ext.imaging import min_max, resize
from captum_ext.metrics import (
    average_drop,
    deletion,
    increase_in_confidence,
    insertion,
    linear_imputation,
    overall_score,
    road,
)
from captum_ext.metrics.curves import STEP
from captum_ext.metrics.road import PERCENTILES, _laplacian
from tests.benchmarks.measuring import (
    MEBI,
    Calls,
    Row,
    markdown,
    measure,
    peaks,
    seconds_of,
    speed_up,
)

SIDE = 112
TARGET = 7
POINTS = round(1 / STEP) + 1
BOTH = "insertion and deletion"
FORWARDS = ": forwards"
THEIRS = "torchcam, "


def network(device: torch.device) -> nn.Module:
    torch.manual_seed(0)
    model: nn.Module = resnet18().eval()
    return model.to(device)


def pictures(n: int, device: torch.device, side: int = SIDE) -> tuple[Tensor, Tensor]:
    generator = Generator().manual_seed(0)
    x = torch.randn(n, 3, side, side, generator=generator)
    cells = torch.randn(n, 1, 7, 7, generator=generator)
    return x.to(device), resize(cells, (side, side)).to(device)


def forwards(model: nn.Module, batch: Tensor, count: int) -> None:
    """Run `count` pictures, in batches of the same size and a rest."""
    with torch.no_grad():
        for start in range(0, count, len(batch)):
            model(batch[: count - start])


# --- the calls -----------------------------------------------------------------------------------


def step_calls(n: int, size: int, device: torch.device) -> Calls:
    model, (x, maps) = network(device), pictures(n, device)
    batch = pictures(size, device)[0]
    options: dict[str, Any] = {"internal_batch_size": size}
    ours = {
        BOTH: (overall_score, 2 * [n * POINTS]),
        "average drop": (average_drop, [2 * n]),
        "ROAD": (road, 2 * [n * len(PERCENTILES)]),
    }
    calls: Calls = {}
    for name, (function, counts) in ours.items():

        def bare(counts: list[int] = counts) -> None:
            for count in counts:
                forwards(model, batch, count)

        calls[name + FORWARDS] = bare
        calls[name] = partial(function, model, x, maps, TARGET, **options)
    return calls


def bare_of(name: str) -> str:
    return name.removesuffix(FORWARDS) + FORWARDS


def memory_calls(device: torch.device) -> Calls:
    model, (x, maps) = network(device), pictures(4, device)
    insertion(model, x, maps, TARGET, step=0.5)  # the first call sets up what later ones reuse
    calls: Calls = {}
    for size in (4, 8, 16):
        calls[f"{size} at once: a pass"] = partial(forwards, model, pictures(size, device)[0], size)
        calls[f"{size} at once: deletion, 29 points"] = partial(
            deletion, model, x, maps, TARGET, internal_batch_size=size
        )
    for points in (3, 113):
        calls[f"4 at once: deletion, {points} points"] = partial(
            deletion, model, x, maps, TARGET, step=1 / (points - 1), internal_batch_size=4
        )
    return calls


def memory_rows(device: torch.device) -> list[Row]:
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
        peak = process.submit(peaks, memory_calls, device, torch.get_num_threads()).result()
    rows = []
    for name in peak:
        over = peak[name] - peak[f"{name.partition(':')[0]}: a pass"]
        rows.append({"name": name, "peak": peak[name] / MEBI, "over_bare": over / MEBI})
    return rows


def imputation_rows() -> list[Row]:
    """One picture, blobs of missing pixels; on the CPU, where it is always done."""
    cpu, rows = torch.device("cpu"), []
    for side in (SIDE, 224):
        x, maps = pictures(1, cpu, side)
        for share in (0.1, 0.5, 0.9):
            keep = maps <= maps.quantile(1 - share)
            imputed: list[Tensor] = []
            seconds = seconds_of(
                lambda x=x, keep=keep, imputed=imputed: imputed.append(
                    linear_imputation(x.double(), keep.float())
                ),
                cpu,
            )
            kept = keep.flatten().numpy()
            values, system = x.double().flatten(2)[0].numpy(), _laplacian(side, side)[~kept]
            true = spsolve(system[:, ~kept].tocsc(), -(system[:, kept] @ values[:, kept].T)).T
            error = abs(imputed[0].flatten(2)[0].numpy()[:, ~kept] - true).max()
            rows.append({"name": f"{side} px, {share:.0%}", "seconds": seconds, "error": error})
    return rows


# --- torchcam ------------------------------------------------------------------------------------


class FixedMaps:
    """An extractor for torchcam that returns fixed maps."""

    def __init__(self, model: nn.Module, maps: Tensor) -> None:
        self.model, self.maps = model, maps

    def __call__(self, *arguments: Any, **options: Any) -> list[Tensor]:
        return [self.maps]

    def fuse_cams(self, cams: list[Tensor]) -> Tensor:
        return cams[0]

    def _hooks_off(self) -> nullcontext[None]:
        return nullcontext()


def torchcam_calls(n: int, size: int, device: torch.device) -> Calls:
    model, (x, maps) = network(device), pictures(n, device)
    maps = min_max(maps)
    batch = pictures(size, device)[0]
    extractor, softmax = FixedMaps(model, maps[:, 0]), partial(torch.softmax, dim=-1)
    options: dict[str, Any] = {"internal_batch_size": size}

    def theirs() -> DeletionInsertionMetric:
        metric = DeletionInsertionMetric(extractor, softmax, steps=POINTS - 1, batch_size=size)
        metric.update(x, TARGET)
        return metric

    def ours() -> Any:
        return overall_score(model, x, maps, TARGET, insertion_baselines="zeros", **options)

    def their_drop() -> ClassificationMetric:
        metric = ClassificationMetric(extractor, softmax)
        metric.update(x, TARGET)
        return metric

    def our_drop() -> tuple[Tensor, Tensor]:
        drop = average_drop(model, x, maps, TARGET, **options)
        return drop, increase_in_confidence(model, x, maps, TARGET, **options)

    def bare(counts: list[int]) -> None:
        for count in counts:
            forwards(model, batch, count)

    scores, expected = ours(), theirs().summary()
    for curve, key in ((scores.insertion, "insertion_auc"), (scores.deletion, "deletion_auc")):
        torch.testing.assert_close(curve.auc.mean().item(), expected[key], rtol=1e-3, atol=1e-6)
    (drop, increase), expected = our_drop(), their_drop().summary()
    torch.testing.assert_close(drop.mean().item(), expected["avg_drop"], rtol=1e-3, atol=1e-4)
    assert increase.float().mean().item() == expected["conf_increase"]
    drops = "average drop and increase"
    return {
        BOTH + FORWARDS: partial(bare, 2 * [n * POINTS]),
        BOTH: ours,
        THEIRS + BOTH: theirs,
        drops + FORWARDS: partial(bare, 4 * [n]),
        drops: our_drop,
        THEIRS + drops: their_drop,
    }


def bare_of_both(name: str) -> str:
    return bare_of(name.removeprefix(THEIRS))


# --- tables --------------------------------------------------------------------------------------


def sizes(images: int | None, device: torch.device) -> tuple[int, int]:
    """Images in the batch, and pictures in a pass."""
    on_gpu = device.type == "cuda"
    return images or (64 if on_gpu else 4), 64 if on_gpu else 16


def setting(n: int, size: int, repeats: int) -> str:
    return (
        f"ResNet-18, {n} x 3 x {SIDE} x {SIDE}, {POINTS} points, at most {size} at once, "
        f"{repeats} rounds"
    )


def faithfulness_tables(device: torch.device, repeats: int, images: int | None) -> dict[str, Any]:
    n, size = sizes(images, device)
    steps = measure(partial(step_calls, n, size), bare_of, repeats, device)
    print(f"{setting(n, size, repeats)}\n\n{markdown(steps)}\n")
    ours = next(row for row in steps if row["name"] == BOTH)
    print(
        f"Wished: {BOTH} take at most 1.05 times their own forwards; seen: {ours['ratio']:.3f} "
        f"({ours['min']:.3f} to {ours['max']:.3f}).\n",
        flush=True,
    )
    memory = memory_rows(device)
    print("Peak memory, 4 images\n\n| | peak MiB | over a pass |\n|:--|--:|--:|")
    for row in memory:
        print(f"| {row['name']} | {row['peak']:.0f} | {row['over_bare']:+.0f} |")

    imputation = imputation_rows()
    print("\nOne imputation\n\n| | ms | error |\n|:--|--:|--:|")
    for row in imputation:
        print(f"| {row['name']} | {1e3 * row['seconds']:.0f} | {row['error']:.0e} |")
    print(flush=True)
    return {"steps": steps, "memory": memory, "imputation": imputation}


def torchcam_tables(device: torch.device, repeats: int, images: int | None) -> dict[str, Any]:
    n, size = sizes(images, device)
    rows = measure(partial(torchcam_calls, n, size), bare_of_both, repeats, device)
    wished = "Wished, on a GPU: 5 times as fast as torchcam's." if device.type == "cuda" else ""
    print(f"{setting(n, size, repeats)}, maps given\n\n{markdown(rows)}\n")
    print(f"{speed_up(rows, THEIRS + BOTH, BOTH)}. {wished}\n", flush=True)
    return {"torchcam": rows}
