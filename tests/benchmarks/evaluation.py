"""Costs of `evaluate`: are they flat in the number of images, and what would ImageNet cost?

`metrics.py` has the command. "flat", on the CPU: 100, 1,000 and 10,000 scenes of 32 x 32, each in a
process of its own. Grad-CAM of a small network is measured by localisation and an insertion of 5
points, so that `evaluate` itself takes a large part. Printed are seconds, and the peak of resident
memory beyond that after a run of 16 scenes: of the rows, and of `summary`, also for four times the
rows. Then the seconds in which a resumed run sees that rows are done, and in which rows are stored.

"evaluate": seconds of the maps of the 12 layer CAMs, upsampled, and of each metric, for one image
of 224 x 224 and a ResNet-50 with random weights; and from these, with pen and paper, hours and
bytes for 1.28 million images and 12 methods. Slow methods are measured on fewer images, and only
once if a call takes long.
"""

import multiprocessing
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import Mock, patch

import torch
from captum.attr import Attribution, LayerGradCam
from torch import nn
from torchvision.models import resnet50

from captum_ext import attr
from captum_ext._data.pixels import IMAGENET_MEAN_STD
from captum_ext.cli.methods import Method, default_methods
from captum_ext.datasets import TexturedEllipses
from captum_ext.evaluation import ExplainedBatch, PreparedExample, evaluate, summary
from captum_ext.evaluation.examples import ExampleBatches
from captum_ext.evaluation.measures import LOCALIZATION, make_measures
from captum_ext.evaluation.store import ResultStore, ResultWriter, Task
from captum_ext.imaging import resize
from tests.benchmarks.faithfulness import forwards
from tests.benchmarks.measuring import MEBI, peak_memory, seconds_of

COUNTS, TIMES = (100, 1_000, 10_000), 4
IMAGENET_SIZE, WORKERS = 1_280_000, (1, 8, 64)
ASSUMED = 2_000  # images that a GPU takes in a second: an assumption, for the example
SIDE, BATCH, FEW = 224, 16, 4
LONG = 20  # seconds for the rounds of one call
PASSES = ("insertion", "deletion", "average_drop", "increase_in_confidence", "road")

# --- is it flat? ---------------------------------------------------------------------------------


def small_network() -> nn.Module:
    torch.manual_seed(0)
    convolution = nn.Conv2d(3, 8, 5, stride=2)
    pooled = (nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4))
    return nn.Sequential(convolution, *pooled).eval()


def rows_of(n: int, folder: Path) -> None:
    model = small_network()
    evaluate(
        {"Grad-CAM": LayerGradCam(model, model[0])},
        TexturedEllipses(n, seed=0, size=(32, 32)),
        {"localization": {}, "insertion": {"step": 0.25}},
        output=folder,
        show_progress=False,
    )


class Cost(NamedTuple):
    seconds: float
    cpu: float  # seconds, which say more where others work on the machine
    peak: float  # MiB beyond what was there before


def of_call(call: Callable[[], Any]) -> Cost:
    times: list[float] = []

    def timed() -> None:
        times.extend((time.perf_counter(), time.process_time()))
        call()
        times.extend((time.perf_counter(), time.process_time()))

    peak = peak_memory(timed, torch.device("cpu"))
    return Cost(times[2] - times[0], times[3] - times[1], peak / MEBI)


def making(folder: Path, n: int, threads: int) -> Cost:
    torch.set_num_threads(threads)
    rows_of(BATCH, folder / "first")
    nothing = Mock(images={"Grad-CAM": n}, failures={})
    with patch("captum_ext.evaluation.run.summary", return_value=nothing):
        return of_call(partial(rows_of, n, folder / "run"))


def reading(folder: Path, threads: int) -> Cost:
    torch.set_num_threads(threads)
    summary(folder.parent / "first")
    return of_call(partial(summary, folder))


def resuming(folder: Path) -> Cost:
    """Find the finished tasks, and open the file for further ones."""
    store = ResultStore.read(folder)
    return of_call(lambda: (store.finished_tasks(), ResultWriter(store, 0).close()))


def writing(folder: Path, times: int) -> Cost:
    """Store the rows of a run `times` times in another run, as rows of further images."""
    store = ResultStore.read(folder / "run")
    rows = list(store.rows())
    settings = store.settings | {"examples": times * len(rows)}
    writer = ResultWriter(ResultStore.create(folder / "again", settings), 0)

    def write() -> None:
        for start in range(0, times * len(rows), BATCH):
            indices = range(start, min(start + BATCH, times * len(rows)))
            batch = [rows[i % len(rows)] | {"index": str(i)} for i in indices]
            writer.write(Task(start // BATCH, "Grad-CAM"), batch, (0.0, 0.0), "cpu")

    try:
        return of_call(write)
    finally:
        writer.close()


def alone(call: Callable[..., Cost], *arguments: Any) -> Cost:
    """Call a function in a new process."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
        return process.submit(call, *arguments).result()


def flat_tables() -> dict[str, Any]:
    threads, results = torch.get_num_threads(), []
    print(
        "| images | ms of an image's row | of the CPU | peak MiB | ms of its summary | peak MiB | "
        f"with {TIMES} times the rows | peak MiB | us to see that it is done | us to write it | "
        f"bytes |\n|{10 * '--:|'}--:|"
    )
    for n in COUNTS:
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            row = {
                "rows": alone(making, folder, n, threads),
                "summary": alone(reading, folder / "run", threads),
                "resume": alone(resuming, folder / "run"),
                "write": alone(writing, folder, TIMES),
                "more": alone(reading, folder / "again", threads),
            }
            files = [folder / "run" / name for name in ("results.0.sqlite", "rows.csv")]
            size = sum(file.stat().st_size for file in files) / n
        results.append({"images": n, "bytes": size, **row})
        rows, more = row["rows"], row["more"]
        print(
            f"| {n:,} | {1e3 * rows.seconds / n:.2f} | {1e3 * rows.cpu / n:.2f} | {rows.peak:.0f} "
            f"| {1e3 * row['summary'].seconds / n:.2f} | {row['summary'].peak:.0f} "
            f"| {1e3 * more.seconds / n / TIMES:.2f} | {more.peak:.0f} "
            f"| {1e6 * row['resume'].seconds / n:.0f} "
            f"| {1e6 * row['write'].seconds / n / TIMES:.0f} | {size:.0f} |",
            flush=True,
        )
    first, last = results[0], results[-1]
    clocks = [
        last["rows"][i] / last["images"] / (first["rows"][i] / first["images"]) for i in (0, 1)
    ]
    further = (TIMES - 1) * last["images"]
    seconds = (last["more"].seconds - last["summary"].seconds) / further
    memory = (last["more"].peak - last["summary"].peak) / further
    print(
        f"\nWished: flat from {first['images']:,} to {last['images']:,} images; seen: a row takes "
        f"{clocks[0]:.2f} times as long ({clocks[1]:.2f} times the CPU's time), and "
        f"{last['rows'].peak - first['rows'].peak:+.0f} MiB. A further image costs the summary "
        f"{1e3 * seconds:.2f} ms for each method, and {1024 * memory:.2f} KiB: of "
        f"{IMAGENET_SIZE:,} images and 12 methods, {12 * seconds * IMAGENET_SIZE / 3600:.1f} hours "
        f"and {memory * IMAGENET_SIZE / 1024:.1f} GiB.\n",
        flush=True,
    )
    return {"rows": results}


# --- what would ImageNet cost? -------------------------------------------------------------------


def beside(
    call: Callable[[], Any], bare: Callable[[], Any], repeats: int, device: torch.device
) -> tuple[float, float]:
    """Seconds, and the ratio to the bare forwards of the same round; medians.

    After an untimed call; if calls take long there are fewer, and of the longest only that one.
    """
    rounds = [(seconds_of(call, device), seconds_of(bare, device))]
    count = min(repeats, int(LONG / rounds[0][0]))
    if count:
        rounds = [(seconds_of(call, device), seconds_of(bare, device)) for _ in range(count)]
    seconds = statistics.median(mine for mine, _ in rounds)
    return seconds, statistics.median(mine / other for mine, other in rounds)


def made(method: Method, model: nn.Module, device: torch.device) -> Attribution:
    options = {"generator": torch.Generator(device)} if "generator" in method.options else {}
    return attr.UpsampleWrapper(method.cls(model, "layer4", **options))


def few(method: Method, device: torch.device) -> int:
    """Images that it is measured on."""
    if device.type == "cuda":
        return BATCH
    return {"1": BATCH, "1+K": 1}.get(method.passes, FEW)


@contextmanager
def counted(model: nn.Module) -> Iterator[list[int]]:
    """A list that gets the number of pictures of each pass of the model."""
    counts: list[int] = []
    hook = model.register_forward_pre_hook(lambda _, inputs: counts.append(len(inputs[0])))
    try:
        yield counts
    finally:
        hook.remove()


def examples() -> list[PreparedExample]:
    scenes = TexturedEllipses(BATCH, seed=0, size=(SIDE, SIDE))
    return [
        e
        for e in ExampleBatches(scenes, BATCH, None, IMAGENET_MEAN_STD)[0]
        if isinstance(e, PreparedExample)
    ]


def evaluate_tables(device: torch.device, repeats: int) -> dict[str, Any]:
    torch.manual_seed(0)
    model = resnet50().eval().to(device)
    known = examples()
    x = torch.stack([example.image for example in known]).to(device)
    labels = torch.tensor([example.label for example in known], device=device)
    forward = partial(forwards, model, x, len(x))
    bare = beside(forward, forward, repeats, device)[0] / len(x)
    print(
        f"ResNet-50, {SIDE} px, {BATCH} images at once; {1e3 * bare:.1f} ms for a bare forward "
        "pass of one\n\n"
        "| | passes | s for a map | in bare forwards | images |\n|:--|:--|--:|--:|--:|"
    )
    methods = {}
    for method in default_methods():
        n = few(method, device)
        options = method.attribute_arguments(x)
        if method.family == "masking":
            options["perturbations_per_eval"] = BATCH
        cam = made(method, model, device)
        call = partial(cam.attribute, x[:n], target=labels[:n], **options)
        seconds, ratio = beside(call, forward, repeats, device)
        cost = methods[method.title] = {"seconds": seconds / n, "forwards": ratio * len(x) / n}
        print(
            f"| {method.title} | {method.passes} | {cost['seconds']:.3f} "
            f"| {cost['forwards']:.1f} | {n} |",
            flush=True,
        )

    cells = torch.rand(len(x), 1, 7, 7, generator=torch.Generator().manual_seed(0)).to(device)
    maps = resize(cells, (SIDE, SIDE))[:, 0]
    print("\n| | passes | s for a map | in bare forwards | bytes |\n|:--|--:|--:|--:|--:|")
    cam = LayerGradCam(model, model.layer4)  # Captum's metrics would call it; they are not asked
    batch = ExplainedBatch(model, x, maps, labels, known, None, maps[:, None], cam, {})
    metrics = metric_costs(batch, forward, repeats, device)
    for name, cost in metrics.items():
        print(
            f"| {name} | {cost['passes']:g} | {cost['seconds']:.4f} | {cost['forwards']:.2f} "
            f"| {cost['bytes']:.0f} |"
        )
    print()
    pen_and_paper(bare, methods, metrics)
    return {"bare": bare, "methods": methods, "metrics": metrics}


def metric_costs(
    batch: ExplainedBatch, forward: Callable[[], Any], repeats: int, device: torch.device
) -> dict[str, dict[str, float]]:
    """For each group of columns and one map: seconds, pictures through the model, and bytes."""
    costs = {}
    measures = make_measures([*LOCALIZATION, *PASSES], batch.examples)
    for columns in {c.names: c for measure in measures for c in measure.columns}.values():
        name = columns.names[0]
        many = device.type == "cuda" or name not in PASSES
        part = batch.only(list(range(len(batch.examples) if many else FEW)))
        n = len(part.examples)
        with counted(batch.forward_func) as passes:  # type: ignore[arg-type]
            cells = columns.cells(part)
        seconds, ratio = beside(partial(columns.cells, part), forward, repeats, device)
        costs[name] = {
            "seconds": seconds / n,
            "forwards": ratio * len(batch.images) / n,
            "passes": sum(passes) / n,
            "bytes": sum(len(cell) + 1 for row in cells for cell in row) / n,
        }
    return costs


def pen_and_paper(
    bare: float,
    methods: Mapping[str, Mapping[str, float]],
    metrics: Mapping[str, Mapping[str, float]],
) -> None:
    """Hours, with the seconds as measured, and with a GPU's rate as assumed; bytes."""
    named = [name for name in metrics if name not in PASSES]
    wanted = {
        "maps alone": [],
        "and localisation": named,
        "and insertion, deletion": [*named, "insertion", "deletion"],
        "and ROAD": [*named, "insertion", "deletion", "road"],
    }
    head, rule = " | ".join(f"N = {n}" for n in WORKERS), "--:|" * len(WORKERS)
    measured, assumed = [], []
    for without in ((), ("Score-CAM",)):
        kept = [cost for name, cost in methods.items() if name not in without]
        for name, columns in wanted.items():
            costs = [metrics[column] for column in columns]
            seconds = sum(c["seconds"] for c in kept) + len(kept) * sum(c["seconds"] for c in costs)
            passes = sum(c["forwards"] for c in kept) + len(kept) * sum(c["passes"] for c in costs)
            # The CPU's work: localisation has no passes, and ROAD solves linear systems.
            work = [metrics[column] for column in columns if column in (*named, "road")]
            cpu_s = len(kept) * bare * sum(max(c["forwards"] - c["passes"], 0) for c in work)
            size = IMAGENET_SIZE * len(kept) * sum(c["bytes"] for c in costs) / 1e9
            label = f"| {name}{', without Score-CAM' * bool(without)} |"
            measured.append(f"{label} {seconds:.2f} | {hours_of(seconds, 0)} | {size:.0f} |")
            hours = hours_of(passes / ASSUMED + cpu_s, 1)
            assumed.append(f"{label} {passes:,.0f} | {cpu_s:.2f} | {hours} |")
    print(
        f"{IMAGENET_SIZE:,} images x {len(methods)} methods, hours on N such machines\n\n"
        f"| | s for an image | {head} | GB of rows |\n|:--|--:|{rule}--:|"
    )
    print("\n".join(measured))
    print(
        f"\nThe same on N GPUs, if each passed {ASSUMED:,} images a second, which is assumed, not "
        "measured, and if the CPU's work were as long as here and waited for\n\n"
        f"| | forwards for an image | s of the CPU | {head} |\n|:--|--:|--:|{rule}"
    )
    print("\n".join(assumed), end="\n\n", flush=True)


def hours_of(seconds: float, digits: int) -> str:
    """The hours for all images with each number of workers."""
    hours = (IMAGENET_SIZE * seconds / 3600 / n for n in WORKERS)
    return " | ".join(f"{each:,.{digits}f}" for each in hours)
