"""What the layer CAMs cost, beside a bare forward pass and beside the public peers, in one run.

    python -m tests.benchmarks.layer_cams [--device cpu|cuda] [--repeats N] [--threads N]
                                          [--json FILE]

Two tables, in Markdown:

- gradient CAMs on layer4 of a ResNet-50, 8 x 3 x 224 x 224, in units of one bare `no_grad` forward;
- masking CAMs on layer4 of a ResNet-18, one image of 224 x 224, in units of the bare forwards that
  the method needs: as many, at the same batch size, on input that is there already.

After one untimed round, calls are interleaved (A B C A B C ...), and each ratio is taken within a
round, so that a machine that slows down for a while slows both of its sides; the tables have the
median, smallest and largest ratio.

Memory is the peak beyond what was there before the call (models, inputs), in a process of its own.
On CUDA it is the allocator's. On Linux it is the kernel's high-water mark of resident memory, with
malloc told to map and unmap each large block by itself: so the mark is exact to about 1%, it agrees
with the profiler's tensor events, and unlike these it sees numpy and the scratch space of kernels.
That malloc would cost time, hence the other process.
"""

import argparse
import copy
import ctypes
import gc
import json
import multiprocessing
import os
import platform
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

os.environ["TQDM_DISABLE"] = "1"  # grad-cam draws a bar for each image

import pytorch_grad_cam as grad_cam
import torch
import torchcam.methods as torchcam
from captum.attr import LayerGradCam
from pytorch_grad_cam.ablation_layer import AblationLayer
from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget
from torch import Tensor, nn
from torchvision.models import resnet18, resnet50

from captum_ext import attr

TARGET = 7
CHUNK = 16  # masks in one forward pass; grad-cam's default for Score-CAM
MEBI = 2**20
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of glibc's mallopt

GROUPS, CHANNELS = 32, 512  # Group-CAM's default, and ResNet-18's layer4
BARE = "bare forward"
SCORE_BARE = f"bare forwards: {CHANNELS} by {CHUNK}"
GROUP_BARE = f"bare forwards for Group-CAM: 1 + {GROUPS + 1} by {CHUNK}"

Calls = dict[str, Callable[[], Any]]
Row = dict[str, Any]


# --- what is called ------------------------------------------------------------------------------


def ours(method: Callable[..., Any], model: nn.Module, x: Tensor, **kwargs: Any) -> Any:
    return lambda: method(model, model.layer4).attribute(x, target=TARGET, **kwargs)


def smooth(model: nn.Module, layer: nn.Module) -> attr.LayerSmoothGradCamPlusPlus:
    return attr.LayerSmoothGradCamPlusPlus(model, layer, n_samples=4)


def by_grad_cam(name: str, model: nn.Module, x: Tensor, **options: Any) -> Any:
    targets = [ClassifierOutputTarget(TARGET)] * len(x)

    def call() -> None:
        with getattr(grad_cam, name)(model, [model.layer4], **options) as cam:
            cam(x, targets)
        model.zero_grad()  # it fills them: each call starts without

    return call


def by_torchcam(name: str, model: nn.Module, x: Tensor, **options: Any) -> Any:
    def call() -> None:
        with getattr(torchcam, name)(model, "layer4", **options) as cam:
            gradients = isinstance(cam, torchcam.GradCAM.__base__)
            with torch.set_grad_enabled(gradients):
                scores = model(x)
            cam(TARGET, scores)

    return call


def forwards(model: nn.Module, x: Tensor, n: int, batch: int) -> Any:
    """`n` images through the model, `batch` at a time."""
    chunks = [min(batch, n - start) for start in range(0, n, batch)]
    images = x.repeat(batch, 1, 1, 1) if batch > len(x) else x

    def call() -> None:
        with torch.no_grad():
            for size in chunks:
                model(images[:size])

    return call


def gradient_calls(device: torch.device) -> Calls:
    torch.manual_seed(0)
    model = resnet50().eval().to(device)
    x = torch.randn(8, 3, 224, 224, device=device)
    forwards(model, x, len(x), len(x))()  # what is set up once is no method's memory
    # Each library its own copy: hooks, modes and gradients of one are no concern of the others.
    mine, captums, pgcs, tcs = (copy.deepcopy(model) for _ in range(4))
    return {
        BARE: forwards(model, x, len(x), len(x)),
        "LayerClassActivationMap": ours(attr.LayerClassActivationMap, mine, x),
        "LayerEigenCam": ours(attr.LayerEigenCam, mine, x),
        "LayerGradCamPlusPlus": ours(attr.LayerGradCamPlusPlus, mine, x),
        "LayerXGradCam": ours(attr.LayerXGradCam, mine, x),
        "LayerCam": ours(attr.LayerCam, mine, x),
        "LayerHiResCam": ours(attr.LayerHiResCam, mine, x),
        "LayerSharpenFocus": ours(attr.LayerSharpenFocus, mine, x),
        "LayerTokenGradCam": ours(attr.LayerTokenGradCam, mine, x),
        "LayerSmoothGradCamPlusPlus, 1 + 4 passes": ours(smooth, mine, x),
        "captum LayerGradCam": ours(LayerGradCam, captums, x),
        "grad-cam GradCAM": by_grad_cam("GradCAM", pgcs, x),
        "grad-cam GradCAMPlusPlus": by_grad_cam("GradCAMPlusPlus", pgcs, x),
        "grad-cam EigenCAM": by_grad_cam("EigenCAM", pgcs, x),
        "torchcam GradCAM": by_torchcam("GradCAM", tcs, x),
        "torchcam CAM": by_torchcam("CAM", tcs, x, fc_layer="fc"),
    }


def masking_calls(device: torch.device) -> Calls:
    torch.manual_seed(0)
    model = resnet18().eval().to(device)
    # So that no channel is flat: ours would not run it, and all are to run the same 512.
    nn.init.ones_(model.layer4[-1].bn2.bias)
    x = torch.randn(1, 3, 224, 224, device=device)
    forwards(model, x, CHUNK, CHUNK)()
    mine, pgcs, tcs = (copy.deepcopy(model) for _ in range(3))
    image, group_masks = forwards(model, x, 1, 1), forwards(model, x, GROUPS + 1, CHUNK)
    each = {"perturbations_per_eval": CHUNK}
    return {
        SCORE_BARE: forwards(model, x, CHANNELS, CHUNK),
        "LayerScoreCam": ours(attr.LayerScoreCam, mine, x, **each),
        "grad-cam ScoreCAM": by_grad_cam("ScoreCAM", pgcs, x),
        "torchcam ScoreCAM": by_torchcam("ScoreCAM", tcs, x, batch_size=CHUNK),
        "LayerAblationCam": ours(attr.LayerAblationCam, mine, x, **each),
        "grad-cam AblationCAM": by_grad_cam("AblationCAM", pgcs, x, ablation_layer=AblationLayer()),
        GROUP_BARE: lambda: (image(), group_masks()),
        "LayerGroupCam": ours(attr.LayerGroupCam, mine, x, **each),
    }


# --- measuring -----------------------------------------------------------------------------------


def measure(
    build: Callable[[torch.device], Calls],
    bare: Callable[[str], str],
    repeats: int,
    device: torch.device,
) -> list[Row]:
    """One row for each call; `bare` gives the name of the call that a call is divided by."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
        peak = process.submit(peaks, build, device, torch.get_num_threads()).result()
    calls = build(device)
    for call in calls.values():
        call()  # imports, kernels and scratch space of the first time are not timed
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(repeats):
        for name, call in calls.items():
            seconds[name].append(seconds_of(call, device))
    rows = []
    for name in calls:
        ratios = [a / b for a, b in zip(seconds[name], seconds[bare(name)], strict=True)]
        rows.append(
            {
                "name": name,
                "seconds": statistics.median(seconds[name]),
                "ratio": statistics.median(ratios),
                "min": min(ratios),
                "max": max(ratios),
                "peak": peak[name] / MEBI,
                "over_bare": (peak[name] - peak[bare(name)]) / MEBI,
                "all_seconds": seconds[name],
            }
        )
    return rows


def seconds_of(call: Callable[[], Any], device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    call()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def peaks(
    build: Callable[[torch.device], Calls], device: torch.device, threads: int
) -> dict[str, float]:
    """The peak memory of each call in bytes; for a process of its own."""
    if platform.system() == "Linux":
        for parameter in (M_MMAP_THRESHOLD, M_TRIM_THRESHOLD):
            ctypes.CDLL(None).mallopt(parameter, 2**18)
    torch.set_num_threads(threads)
    return {name: peak_memory(call, device) for name, call in build(device).items()}


def peak_memory(call: Callable[[], Any], device: torch.device) -> float:
    """Bytes at the peak of the call, beyond what was there before."""
    gc.collect()
    if device.type == "cuda":
        call()  # cuBLAS keeps a workspace from the first time on
        gc.collect()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        return torch.cuda.max_memory_allocated() - before
    if platform.system() != "Linux":
        return float("nan")
    before = _status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM
    call()
    return _status("VmHWM") - before


def _status(key: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key + ":"))


# --- printing ------------------------------------------------------------------------------------


def markdown(rows: list[Row]) -> str:
    head = "| | ms | ratio | min | max | peak MiB | over bare |\n|:--|--:|--:|--:|--:|--:|--:|\n"
    return head + "\n".join(
        f"| {r['name']} | {1e3 * r['seconds']:.0f} | {r['ratio']:.2f} | {r['min']:.2f} "
        f"| {r['max']:.2f} | {r['peak']:.0f} | {r['over_bare']:+.0f} |"
        for r in rows
    )


def speed_up(rows: list[Row], slow: str, fast: str) -> str:
    seconds = {row["name"]: row["all_seconds"] for row in rows}
    ratios = [a / b for a, b in zip(seconds[slow], seconds[fast], strict=True)]
    return (
        f"{fast} is {statistics.median(ratios):.1f} x faster than {slow} "
        f"({min(ratios):.1f} to {max(ratios):.1f})"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--repeats", type=int, default=11, help="rounds; at most 3 of the masking")
    parser.add_argument("--threads", type=int, default=2, help="of the CPU")
    parser.add_argument("--json", type=Path, help="write all numbers here")
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    torch.set_num_threads(arguments.threads)
    chip = (
        torch.cuda.get_device_name()
        if device.type == "cuda"
        else platform.processor() or platform.machine()
    )
    print(f"torch {torch.__version__}, {device.type} {chip}, {arguments.threads} threads\n")

    gradient = measure(gradient_calls, lambda name: BARE, arguments.repeats, device)
    print(f"ResNet-50, layer4, 8 x 3 x 224 x 224, {arguments.repeats} rounds\n")
    print(markdown(gradient), end="\n\n")
    print(speed_up(gradient, "grad-cam GradCAM", "LayerGradCamPlusPlus"), end="\n\n", flush=True)

    repeats = min(3, arguments.repeats)
    masking = measure(
        masking_calls, lambda name: GROUP_BARE if "Group" in name else SCORE_BARE, repeats, device
    )
    print(f"ResNet-18, layer4, 1 x 3 x 224 x 224, {repeats} rounds\n")
    print(markdown(masking), end="\n\n")
    print(speed_up(masking, "grad-cam AblationCAM", "LayerAblationCam"))

    if arguments.json:
        environment = {"torch": torch.__version__, "device": f"{device.type} {chip}"}
        environment["threads"] = str(arguments.threads)
        found = {"environment": environment, "gradient": gradient, "masking": masking}
        arguments.json.write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
