"""Ratios of interleaved timings, and peaks of memory: what the benchmarks measure, and how.

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
import ctypes
import gc
import multiprocessing
import platform
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch

MEBI = 2**20
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of glibc's mallopt

Calls = dict[str, Callable[[], Any]]
Row = dict[str, Any]


def parse_arguments(parser: argparse.ArgumentParser, **quick: Any) -> argparse.Namespace:
    """The arguments; with `--quick`, `quick` takes the place of the defaults.

    A quick run shows in a minute or two that a benchmark still works. Its numbers mean nothing.
    """
    parser.add_argument("--quick", action="store_true", help="only to see that it runs")
    if parser.parse_known_args()[0].quick:
        parser.set_defaults(**quick)
    return parser.parse_args()


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


def environment(device: torch.device, threads: int) -> dict[str, str]:
    """What the numbers were measured with."""
    chip = platform.processor() or platform.machine()
    if device.type == "cuda":
        chip = torch.cuda.get_device_name()
    return {"torch": torch.__version__, "device": f"{device.type} {chip}", "threads": str(threads)}
