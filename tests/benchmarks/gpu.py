"""The cost of all methods on a GPU, beside bare passes and the peers, in at most five minutes.

    python -m tests.benchmarks.gpu [--device cuda|cpu] [--minutes N] [--repeats N] [--quick]

A Markdown table for each batch size (1, 32) and dtype (float32, bfloat16), with

- the milliseconds of the bare passes, the same number of images through the bare model;
- ours, grad-cam and torchcam in units of them: the median of interleaved rounds;
- the peak memory beyond models and inputs, and in brackets that of the bare passes;
- kernel launches, and in brackets those of the bare passes;
- copies from the device to the host, each of which waits for the device: none is wanted.

A peer that is missing or fails says so in its column. float32 has TF32 where torch has it by
default. On a machine without a GPU it says so and ends; `--device cpu --quick` runs the script
itself on a small network: its numbers mean nothing.
"""

import argparse
import gc
import os
import statistics
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from typing import Any

os.environ["TQDM_DISABLE"] = "1"  # grad-cam draws a bar for each image

import torch

from tests.benchmarks.gpu_calls import PARTS, QUICK, Call, Case, Sizes
from tests.benchmarks.measuring import MEBI, environment, parse_arguments, peak_memory, seconds_of

PEERS = ("grad-cam", "torchcam")
HEAD = ["", "bare ms", "ours", *PEERS, "peak MiB", "launches", "to host"]
LONG = 1.0  # seconds, from which one round is enough


def build_calls(case: Case) -> dict[str, Call | str]:
    """The calls of a row after one untimed run each; of those that fail, what they say."""
    calls: dict[str, Call | str] = {"bare": case.bare, "ours": case.ours}
    case.bare()
    case.ours()
    for name, build in case.peers.items():
        try:
            call = build()
            call()
        except ImportError:
            calls[name] = "not installed"
        except Exception as error:
            calls[name] = f"fails: {type(error).__name__}"
        else:
            calls[name] = call
    return calls


def time_rounds(
    calls: dict[str, Call], repeats: int, device: torch.device
) -> dict[str, list[float]]:
    """Seconds of each call in interleaved rounds; a long row has one round."""
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(repeats):
        for name, call in calls.items():
            seconds[name].append(seconds_of(call, device))
        if sum(times[0] for times in seconds.values()) > LONG:
            break
    return seconds


def count_launches(events: Iterable[Any]) -> tuple[int, int]:
    """The kernel launches, and the copies from the device to the host."""
    names = [event.name for event in events]
    launches = sum("LaunchKernel" in name for name in names)
    return launches, sum(name.startswith("Memcpy DtoH") for name in names)


def profile(call: Call, device: torch.device) -> tuple[int, int]:
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
        call()
        torch.cuda.synchronize(device)
    return count_launches(profiler.events() or [])


def row_of(case: Case, repeats: int, device: torch.device) -> list[str]:
    """The cells of a row."""
    built = build_calls(case)
    calls = {name: call for name, call in built.items() if not isinstance(call, str)}
    seconds = time_rounds(calls, repeats, device)
    cells = [case.name, f"{1e3 * statistics.median(seconds['bare']):.1f}"]
    for name in ("ours", *PEERS):
        if name in seconds:
            ratios = [a / b for a, b in zip(seconds[name], seconds["bare"], strict=True)]
            cells.append(f"{statistics.median(ratios):.2f}")
        else:
            cells.append(str(built.get(name, "")))
    peaks = [peak_memory(call, device) / MEBI for call in (case.ours, case.bare)]
    cells.append("{:.0f} ({:.0f})".format(*peaks))
    if device.type != "cuda":
        return [*cells, "", ""]
    (launches, copies), (bare, _) = (profile(call, device) for call in (case.ours, case.bare))
    return [*cells, f"{launches} ({bare})", str(copies)]


def line(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"


def cases_of(
    part: Callable[..., list[Case]], x: torch.Tensor, sizes: Sizes
) -> Iterator[Case | str]:
    """The rows of a part, or one that says why it cannot be built."""
    try:
        yield from part(x, sizes)
    except Exception as error:
        yield f"{part.__name__}: {type(error).__name__}: {error}"


def table(
    batch: int, dtype: torch.dtype, sizes: Sizes, repeats: int, device: torch.device, end: float
) -> Iterator[str]:
    """The lines of one table; past `end` on the monotonic clock, rows say that no time was left."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(batch, 3, sizes.side, sizes.side, generator=generator).to(device, dtype)
    yield from ("", f"{batch} x 3 x {sizes.side} x {sizes.side}, {dtype}", "")
    yield from (line(HEAD), line([":--", *["--:"] * (len(HEAD) - 1)]))
    for part in PARTS.values():
        for case in cases_of(part, x, sizes):
            if isinstance(case, str):
                yield line([case, *[""] * (len(HEAD) - 1)])
                continue
            try:
                if time.monotonic() > end:
                    raise TimeoutError("no time was left")
                yield line(row_of(case, repeats, device))
            except Exception as error:
                why = f"{type(error).__name__}: {error}".replace("\n", " ")[:160]
                yield line([case.name, "", why, *[""] * (len(HEAD) - 3)])
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--minutes", type=float, default=4.5, help="no row starts later")
    parser.add_argument("--repeats", type=int, default=5, help="rounds of a short row")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 32])
    arguments = parse_arguments(parser, repeats=1, batches=[1, 2])
    device = torch.device(arguments.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        print("There is no GPU here, so nothing was measured.")
        return
    warnings.simplefilter("ignore")
    sizes = QUICK if arguments.quick else Sizes()
    start = time.monotonic()
    machine = environment(device, torch.get_num_threads())
    print(", ".join(f"{name} {value}" for name, value in machine.items()))
    for batch in arguments.batches:
        for dtype in (torch.float32, torch.bfloat16):
            end = start + 60 * arguments.minutes
            for text in table(batch, dtype, sizes, arguments.repeats, device, end):
                print(text, flush=True)
    print(f"\n{time.monotonic() - start:.0f} seconds in all")


if __name__ == "__main__":
    main()
