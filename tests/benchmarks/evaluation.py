"""What `evaluate` costs: is it flat in the number of images, and what would ImageNet cost?

The command is in `metrics.py`. "flat", on the CPU: 100, 1,000 and 10,000 scenes of 32 x 32, each in
a process of its own; Grad-CAM of a small network with localisation and an insertion of 5 points, so
that what is `evaluate`'s own weighs much. Seconds and the peak of resident memory, beyond what was
there before: of the rows, and of `summary`, which is called apart. Then what it takes to see what
is done, as a resumed run does, and to write rows that are there.

"evaluate": seconds of the maps of the 12 layer CAMs, upsampled, and of each metric, for one image
of 224 x 224 and a ResNet-50 with random weights; and from these, with pen and paper, hours and
bytes for 1.28 million images and 12 methods. The slow ones are measured on fewer images, and once
if a call takes long.
"""

import multiprocessing
import statistics
import tempfile
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from captum.attr import Attribution, LayerGradCam
from torch import nn
from torchvision.models import resnet50

from captum_ext import attr
from captum_ext.cli import METHODS, Method
from captum_ext.datasets import TexturedEllipses
from captum_ext.evaluation import Explained, Prepared, Summary, evaluate, summary
from captum_ext.evaluation.examples import Blocks
from captum_ext.evaluation.measures import LOCALIZATION, make_measures
from captum_ext.evaluation.store import Store, Writer
from captum_ext.fcam.views import IMAGENET
from captum_ext.imaging import resize
from tests.benchmarks.measuring import MEBI, Row, peak_memory, seconds_of

COUNTS = (100, 1_000, 10_000)
IMAGENET_SIZE, WORKERS = 1_280_000, (1, 8, 64)
ASSUMED = 2_000  # images that a GPU takes in a second: an assumption, for the example
SIDE, BATCH, FEW = 224, 16, 4
LONG = 20  # seconds for the rounds of one call

# --- is it flat? ---------------------------------------------------------------------------------


def small_network() -> nn.Module:
    torch.manual_seed(0)
    convolution = nn.Conv2d(3, 8, 5, stride=2)
    pooled = (nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4))
    return nn.Sequential(convolution, *pooled).eval()


def rows_of(n: int, folder: Path) -> Summary:
    model = small_network()
    return evaluate(
        {"Grad-CAM": LayerGradCam(model, model[0])},
        TexturedEllipses(n, seed=0, size=(32, 32)),
        {"localization": {}, "insertion": {"step": 0.25}},
        output=folder,
        show_progress=False,
    )


def of_call(call: Callable[[], Any]) -> tuple[float, float]:
    """Seconds, and MiB at the peak."""
    seconds: list[float] = []
    cpu = torch.device("cpu")
    peak = peak_memory(lambda: seconds.append(seconds_of(call, cpu)), cpu)
    return seconds[0], peak / MEBI


def flat_row(n: int, threads: int) -> Row:
    """In a process of its own."""
    torch.set_num_threads(threads)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        rows_of(BATCH, folder / "first")
        finished = Summary({}, {}, "", {"": n}, {}, {}, {}, {})
        with patch("captum_ext.evaluation.run.summary", return_value=finished):
            made = of_call(partial(rows_of, n, folder / "run"))
        read = of_call(partial(summary, folder / "run"))
        store = Store.read(folder / "run")
        done = of_call(store.done)
        opened = of_call(lambda: Writer(store, 0).close())
        rows = list(store.rows())
        writer = Writer(Store(folder / "again", store.settings), 0)

        def write() -> None:
            for start in range(0, n, BATCH):
                writer.write(rows[start : start + BATCH], (start, "", BATCH, 0.0, 0.0, "cpu"))

        written = of_call(write)
        writer.close()
        return {
            "images": n,
            "rows": made,
            "summary": read,
            "resume": (done[0] + opened[0], max(done[1], opened[1])),
            "write": written,
            "bytes": (folder / "run" / "rows.csv").stat().st_size / n,
        }


def flat_tables() -> dict[str, Any]:
    found = []
    for n in COUNTS:
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
            found.append(process.submit(flat_row, n, torch.get_num_threads()).result())
    print(
        "| images | ms of an image's row | peak MiB | ms of its summary | peak MiB | ms to see "
        "that it is done | ms to write it | bytes |\n|--:|--:|--:|--:|--:|--:|--:|--:|"
    )
    for row in found:
        (rows, at), (read, high) = row["rows"], row["summary"]
        each = [1e3 * s / row["images"] for s in (rows, read, row["resume"][0], row["write"][0])]
        print(
            f"| {row['images']:,} | {each[0]:.2f} | {at:.0f} | {each[1]:.2f} | {high:.0f} | "
            f"{each[2]:.3f} | {each[3]:.3f} | {row['bytes']:.0f} |"
        )
    first, last = found[0], found[-1]
    ratio = last["rows"][0] / last["images"] / (first["rows"][0] / first["images"])
    before = found[-2]
    more = last["images"] - before["images"]
    seconds = (last["summary"][0] - before["summary"][0]) / more
    memory = (last["summary"][1] - before["summary"][1]) / more
    print(
        f"\nWished: flat from {first['images']:,} to {last['images']:,} images; seen: a row takes "
        f"{ratio:.2f} times as long, and {last['rows'][1] - first['rows'][1]:+.0f} MiB. A further "
        f"image costs the summary {1e3 * seconds:.2f} ms for each method, and {1024 * memory:.2f} "
        f"KiB: {IMAGENET_SIZE:,} images of 12 methods, "
        f"{12 * seconds * IMAGENET_SIZE / 3600:.1f} hours, and {memory * IMAGENET_SIZE / 1024:.1f} "
        f"GiB.\n",
        flush=True,
    )
    return {"rows": found}


# --- what would ImageNet cost? -------------------------------------------------------------------


def median_seconds(call: Callable[[], Any], repeats: int, device: torch.device) -> float:
    """After an untimed call; if calls take long there are fewer, and of the longest only one."""
    first = seconds_of(call, device)
    rounds = min(repeats, int(LONG / first))
    return statistics.median([seconds_of(call, device) for _ in range(rounds)] or [first])


def made(method: Method, model: nn.Module, device: torch.device) -> Attribution:
    if method.class_name == "LayerGradCam":
        return attr.UpsampleWrapper(LayerGradCam(model, model.get_submodule("layer4")))
    options = {"generator": torch.Generator(device)} if method.seeded else {}
    return attr.UpsampleWrapper(getattr(attr, method.class_name)(model, "layer4", **options))


def few(method: Method, device: torch.device) -> int:
    """Images that it is measured on."""
    if device.type == "cuda":
        return BATCH
    return {"1": BATCH, "1 + K": 1}.get(method.passes, FEW)


@contextmanager
def counted(model: nn.Module) -> Iterator[list[int]]:
    """How many pictures each pass of the model had."""
    found: list[int] = []
    hook = model.register_forward_pre_hook(lambda _, inputs: found.append(len(inputs[0])))
    try:
        yield found
    finally:
        hook.remove()


def examples() -> list[Prepared]:
    scenes = TexturedEllipses(BATCH, seed=0, size=(SIDE, SIDE))
    return [e for e in Blocks(scenes, BATCH, None, IMAGENET)[0] if isinstance(e, Prepared)]


def evaluate_tables(device: torch.device, repeats: int) -> dict[str, Any]:
    torch.manual_seed(0)
    model = resnet50().eval().to(device)
    known = examples()
    x = torch.stack([example.image for example in known]).to(device)
    labels = torch.tensor([example.label for example in known], device=device)
    with torch.no_grad():
        bare = median_seconds(lambda: model(x), repeats, device) / len(x)

    print(
        f"ResNet-50, {SIDE} px, {BATCH} images at once; {1e3 * bare:.1f} ms for a bare forward "
        "pass of one\n\n"
        "| | passes | s for a map | in bare forwards | images |\n|:--|:--|--:|--:|--:|"
    )
    methods = {}
    for method in METHODS:
        n = few(method, device)
        options: dict[str, Any] = {"relu_attributions": True} if method.rectify else {}
        if method.family == "masking":
            options["perturbations_per_eval"] = BATCH
        cam = made(method, model, device)
        call = partial(cam.attribute, x[:n], target=labels[:n], **options)
        seconds = methods[method.title] = median_seconds(call, repeats, device) / n
        print(
            f"| {method.title} | {method.passes} | {seconds:.3f} | {seconds / bare:.1f} | {n} |",
            flush=True,
        )

    cells = torch.rand(len(x), 1, 7, 7, generator=torch.Generator().manual_seed(0)).to(device)
    maps = resize(cells, (SIDE, SIDE))[:, 0]
    print("\n| | passes | s for a map | in bare forwards | bytes |\n|:--|--:|--:|--:|--:|")
    metrics = metric_costs(Explained(model, x, maps, labels, known), repeats, device)
    for name, cost in metrics.items():
        print(
            f"| {name} | {cost['passes']:g} | {cost['seconds']:.4f} | {cost['seconds'] / bare:.2f} "
            f"| {cost['bytes']:.0f} |"
        )
    print()
    pen_and_paper(bare, methods, metrics)
    return {"bare": bare, "methods": methods, "metrics": metrics}


def metric_costs(
    found: Explained, repeats: int, device: torch.device
) -> dict[str, dict[str, float]]:
    """Seconds, pictures through the model and bytes in a row, for one map."""
    names = [kind.name for kind in LOCALIZATION]
    names += ["insertion", "deletion", "average_drop", "increase_in_confidence", "road"]
    costs = {}
    for measure in make_measures(names, found.examples):
        many = device.type == "cuda" or measure.name in names[: len(LOCALIZATION)]
        some = found.only(list(range(len(found.examples) if many else FEW)))
        n = len(some.examples)
        with counted(found.forward_func) as passes:  # type: ignore[arg-type]
            cells = measure.cells(some)
        costs[measure.name] = {
            "seconds": median_seconds(partial(measure.cells, some), repeats, device) / n,
            "passes": sum(passes) / n,
            "on_cpu": measure.name in (*names[: len(LOCALIZATION)], "road"),
            "bytes": sum(len(cell) + 1 for cell in cells) / n,
        }
    return costs


def pen_and_paper(
    bare: float, methods: Mapping[str, float], metrics: Mapping[str, Mapping[str, float]]
) -> None:
    """Hours, with the seconds as measured, and with a GPU's rate as assumed; bytes."""
    named = [kind.name for kind in LOCALIZATION]
    wanted = {
        "maps alone": [],
        "and localisation": named,
        "and insertion, deletion": [*named, "insertion", "deletion"],
        "and ROAD": [*named, "insertion", "deletion", "road"],
    }
    head, rule = " | ".join(f"N = {n}" for n in WORKERS), "--:|" * len(WORKERS)
    measured, assumed = [], []
    for without in ((), ("Score-CAM",)):
        kept = {name: seconds for name, seconds in methods.items() if name not in without}
        for name, columns in wanted.items():
            costs = [metrics[column] for column in columns]
            seconds = sum(kept.values()) + len(kept) * sum(c["seconds"] for c in costs)
            forwards = sum(kept.values()) / bare + len(kept) * sum(c["passes"] for c in costs)
            # The CPU's work: localisation has no passes, and ROAD solves linear systems.
            work = [c["seconds"] - c["passes"] * bare for c in costs if c["on_cpu"]]
            beside = len(kept) * sum(max(each, 0) for each in work)
            size = IMAGENET_SIZE * len(kept) * sum(c["bytes"] for c in costs) / 1e9
            label = f"| {name}{', without Score-CAM' * bool(without)} |"
            measured.append(f"{label} {seconds:.2f} | {hours_of(seconds, 0)} | {size:.0f} |")
            told = hours_of(forwards / ASSUMED + beside, 1)
            assumed.append(f"{label} {forwards:,.0f} | {beside:.2f} | {told} |")
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
    """For all images, on each number of workers."""
    hours = (IMAGENET_SIZE * seconds / 3600 / n for n in WORKERS)
    return " | ".join(f"{each:,.{digits}f}" for each in hours)
