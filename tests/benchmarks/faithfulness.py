"""What insertion, deletion and ROAD cost beside the model's own passes, in one run.

    python -m tests.benchmarks.faithfulness [--device cpu|cuda] [--repeats N] [--threads N]
                                            [--images N] [--json FILE]

Three tables, in Markdown, of a ResNet-18 at 112 pixels:

- time of insertion and deletion of a batch of images, beside as many forward passes of batches of
  the same size, on a batch that is there already; and of the other functions beside theirs;
- memory beyond one pass, for ever more steps and for ever larger passes;
- the seconds of one imputation, and its largest error against SciPy's general solver, by the share
  of pixels removed.

How it is measured says `measuring.py`. The network has random weights; maps are of 7 x 7 cells,
upsampled, as CAMs are.
"""

import argparse
import json
import multiprocessing
import time
import warnings
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import torch
from scipy.sparse.linalg import spsolve
from torch import Generator, Tensor, nn
from torchvision.models import resnet18

from captum_ext.imaging import resize
from captum_ext.metrics import (
    average_drop,
    deletion,
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
    environment,
    markdown,
    measure,
    peaks,
    seconds_of,
)

SIDE = 112
TARGET = 7
POINTS = round(1 / STEP) + 1
BOTH = "insertion and deletion"
FORWARDS = ": forwards"


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
    """So many pictures, in batches of the same size and a rest."""
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
    insertion(model, x, maps, TARGET, step=0.5)  # what is set up once is not the call's
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
            found: list[Tensor] = []
            seconds = seconds_of(
                lambda x=x, keep=keep, found=found: found.append(
                    linear_imputation(x.double(), keep.float())
                ),
                cpu,
            )
            kept = keep.flatten().numpy()
            values, system = x.double().flatten(2)[0].numpy(), _laplacian(side, side)[~kept]
            true = spsolve(system[:, ~kept].tocsc(), -(system[:, kept] @ values[:, kept].T)).T
            error = abs(found[0].flatten(2)[0].numpy()[:, ~kept] - true).max()
            rows.append({"name": f"{side} px, {share:.0%}", "seconds": seconds, "error": error})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--repeats", type=int, default=5, help="rounds")
    parser.add_argument("--threads", type=int, default=2, help="of the CPU")
    parser.add_argument("--images", type=int, help="in the batch; 4 on a CPU, 64 on a GPU")
    parser.add_argument("--json", type=Path, help="write all numbers here")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    device = torch.device(arguments.device)
    torch.set_num_threads(arguments.threads)
    on_gpu = device.type == "cuda"
    n, size = arguments.images or (64 if on_gpu else 4), 64 if on_gpu else 16
    found = environment(device, arguments.threads)
    print(", ".join(f"{name} {value}" for name, value in found.items()), end="\n\n")

    start = time.perf_counter()
    steps = measure(partial(step_calls, n, size), bare_of, arguments.repeats, device)
    print(
        f"ResNet-18, {n} x 3 x {SIDE} x {SIDE}, {POINTS} points, at most {size} at once, "
        f"{arguments.repeats} rounds\n"
    )
    print(markdown(steps), end="\n\n")
    ours = next(row for row in steps if row["name"] == BOTH)
    print(
        f"{BOTH} take {ours['ratio']:.3f} times their own forwards ({ours['min']:.3f} to "
        f"{ours['max']:.3f}); wished: at most 1.05\n",
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
    print(f"\n{time.perf_counter() - start:.0f} seconds in all")

    if arguments.json:
        tables = {"environment": found, "steps": steps, "memory": memory, "imputation": imputation}
        arguments.json.write_text(json.dumps(tables, indent=1, default=float))


if __name__ == "__main__":
    main()
