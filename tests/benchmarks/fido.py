"""The cost of FIDO beside the passes of the network that it needs, in one run.

    python -m tests.benchmarks.fido [--device cpu|cuda] [--repeats N] [--threads N] [--steps N]
                                    [--masks N] [--json FILE] [--quick]

Three tables, in Markdown, of a ResNet-50 at 224 pixels:

- time of whole calls for one image, beside the floor: as many forward and backward passes to the
  input as FIDO does, 2 x masks a step, at the same batch size, on a batch that is there already.
  Beside them is a plain loop for the same optimisation, which also computes the gradients of the
  network's parameters. Both give the same result, which is checked first;
- memory beyond one pass of the floor, for ever larger batches and for ever more masks;
- on a GPU, a batch of 16 images beside 16 single calls.

`measuring.py` describes how it is measured. The network has random weights.
"""

import argparse
import copy
import json
import multiprocessing
import statistics
import time
import warnings
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Generator, Tensor, nn
from torchvision.models import resnet50

from captum_ext.attr import FIDO, FIDOMasks
from captum_ext.imaging import blur
from tests.benchmarks.measuring import (
    MEBI,
    Calls,
    Row,
    environment,
    markdown,
    measure,
    parse_arguments,
    peaks,
)

TARGET = 7
SIDE = 224
BATCH = 16
IMAGES = 16
L1, TV, LR, EPS, WARMUP = 5e-4, 1e-2, 10.0, 0.1, 5
SETTINGS: dict[str, Any] = {
    "dropout": "scd",
    "temperature": 1.0,
    "l1": L1,
    "tv": TV,
    "tv_norm": "l1",
    "lr": LR,
    "eps": EPS,
    "warmup": WARMUP,
}
FLOOR = "forwards and backwards to the input"
OURS = "FIDO"
LOOP = "the same optimisation, with gradients of parameters"
SINGLE = f"{IMAGES} single calls"


def network(device: torch.device) -> nn.Module:
    torch.manual_seed(0)
    model: nn.Module = resnet50().eval()
    return model.to(device)


def pictures(n: int, device: torch.device) -> Tensor:
    return torch.randn(n, 3, SIDE, SIDE, generator=Generator().manual_seed(0)).to(device)


def fido(
    model: nn.Module, x: Tensor, n_masks: int, n_steps: int, batch: int, **options: Any
) -> tuple[Tensor, FIDOMasks]:
    result: tuple[Tensor, FIDOMasks] = FIDO(model).attribute(
        x,
        target=TARGET,
        n_masks=n_masks,
        n_steps=n_steps,
        generator=Generator(x.device).manual_seed(0),
        internal_batch_size=batch,
        return_masks=True,
        **SETTINGS,
        **options,
    )
    return result


# --- references ----------------------------------------------------------------------------------


def passes(model: nn.Module, batch: Tensor, count: int) -> None:
    """Run `count` forward passes of a batch, each with the gradient of the target by the batch."""
    for _ in range(count):
        x = batch.detach().requires_grad_()
        torch.autograd.grad(model(x)[:, TARGET].sum(), x)


def plain_loop(
    model: nn.Module, x: Tensor, n_masks: int, n_steps: int, batch: int
) -> tuple[Tensor, Tensor]:
    """FIDO of one image in a plain loop; the logits and the losses."""
    generator = Generator(x.device).manual_seed(0)
    infill = blur(x, 65, 10.0)
    logits = x.new_zeros(1, 2, SIDE, SIDE).requires_grad_()
    optimiser = torch.optim.AdamW([logits], lr=LR, eps=EPS, weight_decay=0.0)
    losses = []
    for step in range(n_steps):
        optimiser.zero_grad(set_to_none=True)
        model.zero_grad(set_to_none=True)
        total = x.new_zeros(())
        for start in range(0, n_masks, batch // 2):
            chunk = range(start, min(start + batch // 2, n_masks))
            noise = [torch.empty_like(logits).uniform_(generator=generator) for _ in chunk]
            u = torch.cat(noise).detach().clamp(2**-25, 1 - 2**-24)
            z = torch.sigmoid(logits + torch.log(u) - torch.log1p(-u))[:, :, None]
            output = model(((1 - z) * x + z * infill).flatten(0, 1))
            others = torch.cat((output[:, :TARGET], output[:, TARGET + 1 :]), 1)
            odds = (output[:, TARGET] - others.logsumexp(1)).reshape(-1, 2)
            loss = (odds[:, 1] - odds[:, 0]).sum() / n_masks
            loss.backward()
            total += loss.detach()
        theta = torch.sigmoid(logits)
        size = (1 - theta[:, 0]).sum() + theta[:, 1].sum()
        edges = theta.diff(dim=2).abs().sum() + theta.diff(dim=3).abs().sum()
        loss = min(1.0, step / WARMUP) * (L1 * size + TV * edges)
        loss.backward()
        losses.append(total + loss.detach())
        optimiser.step()
    return logits.detach(), torch.stack(losses)[:, None]


def compare(device: torch.device) -> None:
    """Check that FIDO and the loop end with the same logits and losses, in float64."""
    model, x = network(device).double(), pictures(1, device).double()
    _, masks = fido(model, x, 3, 3, 4)
    logits, losses = plain_loop(model, x, 3, 3, 4)
    for ours, theirs in ((masks.logits, logits), (masks.losses, losses)):
        difference = float((ours - theirs).abs().max() / theirs.abs().max())
        assert difference < 1e-6, f"FIDO and the plain loop differ by {difference}."


# --- the calls -----------------------------------------------------------------------------------


def step_calls(n_masks: int, n_steps: int, device: torch.device) -> Calls:
    model, x = network(device), pictures(1, device)
    frozen, leaky = copy.deepcopy(model).requires_grad_(False), copy.deepcopy(model)
    fido(model, x, 1, 1, 2)  # the first call sets up what later ones reuse
    size = min(BATCH, 2 * n_masks)
    batch = pictures(size, device)
    count = n_steps * (2 * n_masks) // size
    return {
        FLOOR: partial(passes, model, batch, count),
        OURS: partial(fido, model, x, n_masks, n_steps, size),
        f"{FLOOR}, parameters frozen": partial(passes, frozen, batch, count),
        f"{OURS}, parameters frozen": partial(fido, frozen, x, n_masks, n_steps, size),
        LOOP: partial(plain_loop, leaky, x, n_masks, n_steps, size),
    }


def bare_step(name: str) -> str:
    return f"{FLOOR}, parameters frozen" if name.endswith("frozen") else FLOOR


def memory_calls(device: torch.device) -> Calls:
    model, x = network(device), pictures(1, device)
    fido(model, x, 1, 1, 2)
    calls: Calls = {}
    for batch in (4, 8, 16):
        calls[f"{batch} at once: a pass"] = partial(passes, model, pictures(batch, device), 1)
        calls[f"{batch} at once: FIDO, 8 masks"] = partial(fido, model, x, 8, 2, batch)
    for n_masks in (2, 32):
        calls[f"4 at once: FIDO, {n_masks} masks"] = partial(fido, model, x, n_masks, 2, 4)
    return calls


def bare_pass(name: str) -> str:
    return f"{name.partition(':')[0]}: a pass"


def memory_rows(device: torch.device) -> list[Row]:
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
        peak = process.submit(peaks, memory_calls, device, torch.get_num_threads()).result()
    return [
        {"name": n, "peak": peak[n] / MEBI, "over_bare": (peak[n] - peak[bare_pass(n)]) / MEBI}
        for n in peak
    ]


def memory_markdown(rows: list[Row]) -> str:
    head = "| | peak MiB | over a pass |\n|:--|--:|--:|\n"
    return head + "\n".join(
        f"| {r['name']} | {r['peak']:.0f} | {r['over_bare']:+.0f} |" for r in rows
    )


def batch_calls(n_masks: int, n_steps: int, device: torch.device) -> Calls:
    model, x = network(device), pictures(IMAGES, device)

    def single() -> None:
        for image in x.split(1):
            fido(model, image, n_masks, n_steps, 64)

    calls: Calls = {SINGLE: single}
    for batch in (64, 256):
        calls[f"a batch of {IMAGES}, {batch} at once"] = partial(
            fido, model, x, n_masks, n_steps, batch
        )
    return calls


def faster(rows: list[Row], slow: str, fast: str) -> str:
    seconds = {row["name"]: row["all_seconds"] for row in rows}
    ratios = [a / b for a, b in zip(seconds[slow], seconds[fast], strict=True)]
    return (
        f"{fast}: {statistics.median(ratios):.2f} x faster than {slow} "
        f"({min(ratios):.2f} to {max(ratios):.2f})"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--repeats", type=int, default=5, help="rounds")
    parser.add_argument("--threads", type=int, default=2, help="of the CPU")
    parser.add_argument("--steps", type=int, help="of a call; 4 on a CPU, 40 on a GPU")
    parser.add_argument("--masks", type=int, default=8, help="for each objective and step")
    parser.add_argument("--json", type=Path, help="write all numbers here")
    arguments = parse_arguments(parser, repeats=1, steps=1, masks=2)
    warnings.simplefilter("ignore")
    device = torch.device(arguments.device)
    torch.set_num_threads(arguments.threads)
    n_masks, n_steps = arguments.masks, arguments.steps or (40 if device.type == "cuda" else 4)
    machine = environment(device, arguments.threads)
    print(", ".join(f"{name} {value}" for name, value in machine.items()), end="\n\n")

    start = time.perf_counter()
    compare(device)
    steps = measure(partial(step_calls, n_masks, n_steps), bare_step, arguments.repeats, device)
    print(
        f"ResNet-50, 1 x 3 x {SIDE} x {SIDE}, {n_steps} steps of 2 x {n_masks} masks, at most "
        f"{BATCH} at once, {arguments.repeats} rounds\n"
    )
    print(markdown(steps), end="\n\n")
    ours = next(row for row in steps if row["name"] == OURS)
    print(
        f"FIDO takes {ours['ratio']:.3f} times the floor ({ours['min']:.3f} to {ours['max']:.3f}); "
        f"wished: at most 1.10"
    )
    print(f"{faster(steps, LOOP, OURS)}; wished: 1.3\n", flush=True)

    memory = memory_rows(device)
    print("Peak memory of two steps\n")
    print(memory_markdown(memory), end="\n\n", flush=True)

    batches: list[Row] = []
    if device.type == "cuda":
        few = partial(batch_calls, n_masks, max(n_steps // 4, 1))
        batches = measure(few, lambda name: SINGLE, arguments.repeats, device)
        print(f"{IMAGES} images, {max(n_steps // 4, 1)} steps of 2 x {n_masks} masks\n")
        print(markdown(batches), end="\n\n")
        for row in batches[1:]:
            print(f"{faster(batches, SINGLE, row['name'])}; wished: 3")
    else:
        print(f"{IMAGES} images against {SINGLE}: not measured, this is not a GPU")
    print(f"\n{time.perf_counter() - start:.0f} seconds in all")

    if arguments.json:
        tables = {"environment": machine, "steps": steps, "memory": memory, "batches": batches}
        arguments.json.write_text(json.dumps(tables, indent=1))


if __name__ == "__main__":
    main()
