"""The cost of F-CAM: its colour losses, a step of its training, and its maps, in one run.

    python -m tests.benchmarks.fcam_cost [--device cpu|cuda] [--repeats N] [--threads N]
                                         [--json FILE]

It prints three parts in Markdown, each followed by the target values:

- the CRF losses, forward and backward, of one image and of a batch: exact, with anchors, and in
  windows, at several sides. The images are photographs, since the time of an exponential depends on
  its argument, and noise has none of the usual colours. At the largest side the exact form takes
  minutes, and one untimed round would take as long again: there each form runs once, and its time
  is taken in the process that measures memory;
- a step of `FCAMModule` with the optimiser's, for a ResNet-18 and a ResNet-50, with stored maps and
  with maps of each view by Grad-CAM, beside the floor: the forward pass of the frozen classifier,
  and the decoder's forward and backward, of the same batch. The parts of the step are timed by
  themselves, which is not exactly what they take within it. Lightning's own loop is left out;
- `FCAM.foreground` beside the classifier's and the decoder's forward pass.

First, each form is compared in float64 with a reference: the losses with whole matrices, the step
with its parts put together, the maps with a plain composition.

How it is measured says `measuring.py`. Networks and decoders have random weights.
"""

import argparse
import json
import multiprocessing
import time
import warnings
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import skimage.data
import torch
from captum.attr import LayerGradCam
from torch import Generator, Tensor, nn
from torch.nn import functional as F
from torchvision import models

from captum_ext._engine.state import eval_mode
from captum_ext._identity import derive_seed
from captum_ext.attr import FCAM
from captum_ext.fcam import DenseCRFLoss, FCAMDecoder, FCAMModule, dense_crf_loss, local_crf_loss
from captum_ext.fcam.crf import CHUNK, CPU_CHUNK, _features, _products
from captum_ext.fcam.fit import crf_side
from captum_ext.fcam.guides import guide_maps
from captum_ext.fcam.losses import partial_cross_entropy
from captum_ext.fcam.views import Crops, draw_crops
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
from tests.captures import layer_activations

PHOTOGRAPHS = ("astronaut", "coffee", "chelsea", "rocket")
BATCH = 8
RADIUS, ANCHORS = 5, 512
SIDES, LONGEST = (32, 56, 112), 224
WISHED_AT = 112  # px, where the anchors shall be at least ten times as fast
# The memory that the CRF loss may need: the chunk, its matrix product, and some numbers for each
# pixel (features and their means, products, gradients).
CHUNKS, PER_PIXEL = 2, 32
SIDE, STORED = 224, 256  # of the views, and of the whole pictures that they are cropped out of
EXACT, SAMPLED, LOCAL = "exact", f"{ANCHORS} anchors", f"windows of radius {RADIUS}"
FLOOR = "floor: classifier forward, decoder forward and backward"
CACHED, ON_THE_FLY = "step, stored maps", "step, Grad-CAM of each view"
BARE, CLASSIFIER, OURS = "classifier and decoder", "classifier alone", "FCAM.foreground"
NETWORKS = {"ResNet-18": models.resnet18, "ResNet-50": models.resnet50}


def photographs(n: int, side: int, device: torch.device) -> Tensor:
    """(n, 3, side, side), uint8; from the fourth on mirrored."""
    pictures = []
    for index in range(n):
        picture = getattr(skimage.data, PHOTOGRAPHS[index % len(PHOTOGRAPHS)])()
        pixels = torch.from_numpy(picture.copy()).permute(2, 0, 1)[None].float()
        pixels = F.interpolate(pixels, (side, side), mode="bilinear", antialias=True)
        pictures.append(pixels.flip(3) if index // len(PHOTOGRAPHS) % 2 else pixels)
    return torch.cat(pictures).round().clamp(0, 255).byte().to(device)


def network(name: str, device: torch.device) -> nn.Module:
    torch.manual_seed(0)
    model: nn.Module = NETWORKS[name]().eval()
    return model.to(device)


def decoder_of(model: nn.Module, side: int = SIDE) -> FCAMDecoder:
    torch.manual_seed(1)
    weight = next(model.parameters())
    return FCAMDecoder.reading(model, weight.new_zeros(1, 3, side, side)).to(weight)


def captured(model: nn.Module, names: list[str], x: Tensor) -> list[Tensor]:
    """The features of the named layers, by plain hooks and without copies."""
    outputs: dict[str, Tensor] = {}

    def keep(name: str, module: nn.Module, args: Any, output: Tensor) -> None:
        outputs[name] = output

    handles = [model.get_submodule(n).register_forward_hook(partial(keep, n)) for n in names]
    try:
        with torch.no_grad():
            model(x)
    finally:
        for handle in handles:
            handle.remove()
    return [outputs[name] for name in names]


def decoded(model: nn.Module, decoder: FCAMDecoder, x: Tensor) -> Tensor:
    assert decoder.layers is not None
    logits: Tensor = decoder(captured(model, decoder.layers, x), (x.shape[2], x.shape[3]))
    return logits


# --- the colour losses ---------------------------------------------------------------------------


def crf_losses() -> dict[str, Callable[[Tensor, Tensor], Tensor]]:
    return {
        EXACT: partial(dense_crf_loss, side=None),
        SAMPLED: partial(dense_crf_loss, side=None, n_anchors=ANCHORS),
        LOCAL: partial(local_crf_loss, radius=RADIUS),
    }


def forward_backward(loss: Callable[[Tensor, Tensor], Tensor], p: Tensor, images: Tensor) -> None:
    p = p.detach().requires_grad_()
    torch.autograd.grad(loss(p, images), p)


def crf_calls(side: int, sizes: tuple[int, ...], device: torch.device) -> Calls:
    calls: Calls = {}
    for n in sizes:
        images = photographs(n, side, device)
        p = torch.rand(n, 1, side, side, generator=Generator().manual_seed(0)).to(device)
        for name, loss in crf_losses().items():
            calls[f"{side} px, {n}: {name}"] = partial(forward_backward, loss, p, images)
    return calls


def bare_crf(name: str) -> str:
    return f"{name.partition(':')[0]}: {EXACT}"


def once(
    build: Callable[[torch.device], Calls], device: torch.device, threads: int
) -> tuple[dict[str, float], dict[str, float]]:
    """Peak and seconds of each call, run once (on a GPU twice); for a process of its own."""
    seconds: dict[str, float] = {}

    def timed(name: str, call: Callable[[], Any]) -> None:
        seconds[name] = seconds_of(call, device)

    def build_timed(device: torch.device) -> Calls:
        return {name: partial(timed, name, call) for name, call in build(device).items()}

    return peaks(build_timed, device, threads), seconds


def measure_once(
    build: Callable[[torch.device], Calls], bare: Callable[[str], str], device: torch.device
) -> list[Row]:
    """Rows as `measure` gives them, of calls that take too long to be repeated."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
        peak, seconds = process.submit(once, build, device, torch.get_num_threads()).result()
    rows = []
    for name in peak:
        ratio = seconds[name] / seconds[bare(name)]
        rows.append(
            {
                "name": name,
                "seconds": seconds[name],
                "ratio": ratio,
                "min": ratio,
                "max": ratio,
                "peak": peak[name] / MEBI,
                "over_bare": (peak[name] - peak[bare(name)]) / MEBI,
                "all_seconds": [seconds[name]],
            }
        )
    return rows


def crf_rows(repeats: int, device: torch.device) -> list[Row]:
    rows: list[Row] = []
    for side in SIDES:
        rows += measure(partial(crf_calls, side, (1, BATCH)), bare_crf, repeats, device)
    rows += measure_once(partial(crf_calls, LONGEST, (1, BATCH)), bare_crf, device)
    for row in rows:
        head, _, form = row["name"].partition(": ")
        side, n = (int(part) for part in head.split(" px, "))
        row |= {"side": side, "n": n, "form": form}
        row["matrices"] = n * side**4 * 4 / MEBI  # of all images, in float32
        row["chunk"] = (CPU_CHUNK if device.type == "cpu" else CHUNK) * 4 / MEBI
        row["bound"] = CHUNKS * row["chunk"] + PER_PIXEL * n * side**2 * 4 / MEBI
    return rows


def crf_markdown(rows: list[Row]) -> str:
    head = (
        "| side | images | form | s | of the exact form | min | max | peak MiB | may be MiB | "
        "the matrix: MiB |\n|--:|--:|:--|--:|--:|--:|--:|--:|--:|--:|\n"
    )
    return head + "\n".join(
        f"| {r['side']} | {r['n']} | {r['form']} | {r['seconds']:.4f} | {r['ratio']:.3f} | "
        f"{r['min']:.3f} | {r['max']:.3f} | {r['peak']:.1f} | {r['bound']:.0f} | "
        f"{r['matrices']:.0f} |"
        for r in rows
    )


def crf_wishes(rows: list[Row]) -> str:
    seen = ", ".join(
        f"{r['ratio']:.3f} for {r['n']} (1/{1 / r['ratio']:.0f})"
        for r in rows
        if r["side"] == WISHED_AT and r["form"] == SAMPLED
    )
    worst = max(rows, key=lambda r: r["peak"] / r["bound"])
    most = max(rows, key=lambda r: r["matrices"])
    return (
        f"Wished: {ANCHORS} anchors take at most 1/10 of the exact form at {WISHED_AT} px, and "
        f"memory is at most {CHUNKS} chunks of {rows[0]['chunk']:g} MiB and {PER_PIXEL} numbers "
        f"for each pixel; seen: {seen}; at most {worst['peak'] / worst['bound']:.2f} of that "
        f"memory ({worst['name']}), and {most['peak']:.0f} MiB where the matrices have "
        f"{most['matrices'] / 1024:.0f} GiB."
    )


def compare_crf(device: torch.device) -> None:
    """The losses and their gradients against whole matrices, and all pixels as anchors."""
    images = photographs(2, 12, device).double()
    p = torch.rand(2, 1, 12, 12, dtype=torch.float64, device=device).requires_grad_()
    lines = torch.arange(12, device=device)
    where = torch.cartesian_prod(lines, lines).double()
    colours = images.flatten(2).transpose(1, 2)
    far, unlike = torch.cdist(where, where).square(), torch.cdist(colours, colours).square()
    window = (where[:, None] - where).abs().amax(2) <= RADIUS
    others = window & ~torch.eye(144, dtype=torch.bool, device=device)
    q = p.flatten(1)

    def energy(sigma_xy: float, sigma_rgb: float, kept: Tensor) -> Tensor:
        a = torch.exp(-far / (2 * sigma_xy**2) - unlike / (2 * sigma_rgb**2)) * kept
        return 2 * torch.einsum("ni,nij,nj->n", q, a, 1 - q).mean()

    same("the exact loss", dense_crf_loss(p, images), energy(1200 / 224, 15.0, window | True), p, 2)
    same("the local loss", local_crf_loss(p, images, radius=RADIUS), energy(6, 25.5, others), p, 1)
    features = _features(images, 15.0, 100 / 224)
    shuffled = torch.randperm(144, device=device)
    exact, sampled = (_products(features, q.detach(), anchors) for anchors in (None, shuffled))
    for a, b in zip(exact, sampled, strict=True):
        close("all pixels as anchors", a, b)


def same(name: str, ours: Tensor, theirs: Tensor, p: Tensor, power: int) -> None:
    """That two losses and their gradients agree; the second is to be divided by P^power."""
    theirs = theirs / 144**power
    close(name, ours, theirs)
    (mine,), (other,) = (torch.autograd.grad(loss, p, retain_graph=True) for loss in (ours, theirs))
    close(f"{name}'s gradient", mine, other)


def close(name: str, ours: Tensor, theirs: Tensor, tolerance: float = 1e-9) -> None:
    difference = float((ours - theirs).abs().max() / theirs.abs().max())
    assert difference < tolerance, f"{name}: {difference} from what it should be."


# --- a step of training --------------------------------------------------------------------------


def module_of(
    model: nn.Module, pixels: Tensor, labels: Tensor, cached: bool, side: int = SIDE
) -> FCAMModule:
    """With `fit_fcam`'s settings, after the warm-up; it has a decoder of its own, in train mode."""
    layer = model.get_submodule("layer4")
    module = FCAMModule(
        model,
        decoder_of(model, side),
        LayerGradCam(model, layer),
        (side, side),
        crf=DenseCRFLoss(side=crf_side((side, side))),
        warmup=0,
    ).to(pixels.device)
    if cached:
        module.maps = guide_maps(module.guide, module.images(pixels), labels).half()
    return module.train()


def batch_of(
    n: int, picture_size: int, device: torch.device
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    pixels = photographs(n, picture_size, device)
    indices = torch.arange(n, device=device)
    return pixels, 7 * indices, indices, torch.ones(n, dtype=torch.bool, device=device)


def step(module: FCAMModule, optimiser: torch.optim.Optimizer, batch: Any) -> None:
    optimiser.zero_grad(set_to_none=True)
    module.training_step(batch, 0).backward()
    optimiser.step()


def floor(model: nn.Module, decoder: FCAMDecoder, images: Tensor, gradient: Tensor) -> None:
    for parameter in decoder.parameters():
        parameter.grad = None
    decoded(model, decoder, images).backward(gradient)


class Parts:
    """The parts of a step, one by one, each with the results of the parts before."""

    def __init__(self, module: FCAMModule, batch: Any) -> None:
        self.module, self.batch = module, batch
        self.generator = Generator(batch[0].device).manual_seed(derive_seed(module.seed, 0, 0, 0))
        self.optimiser = module.configure_optimizers()
        for group in self.optimiser.param_groups:
            group["lr"] = 0.0  # as much work, and the gradients of the parts lead nowhere
        self.whole = tuple(batch[0].shape[2:])
        self.view, self.colors, self.images = self.views()
        self.maps = self.guide()
        self.features = self.classifier()
        self.logits = self.decoder_forward()
        self.labelled = self.seeds()
        self.probabilities = self.logits.detach()[batch[3]].softmax(1)

    def views(self) -> tuple[Crops, Tensor, Tensor]:
        module, pixels = self.module, self.batch[0]
        view = draw_crops(len(pixels), self.whole, module.size, module.flip, self.generator)
        colors = view.crop(pixels)
        return view, colors, module.normalize(colors / 255)

    def guide(self) -> Tensor:
        _, labels, indices, _ = self.batch
        with eval_mode(self.module.classifier):
            maps: Tensor = self.module.guide_maps(
                self.images, labels, indices, self.view, self.whole
            )
        return maps

    def classifier(self) -> list[Tensor]:
        """The forward pass as `FCAMModule.forward` runs it, with copies of the features."""
        module = self.module
        activations, _ = layer_activations(module.classifier, module._layers[0], (self.images,))
        return [tensors[0] for tensors in activations]

    def decoder_forward(self) -> Tensor:
        logits: Tensor = self.module.decoder(self.features, self.module.size)
        return logits

    def decoder(self) -> None:
        self.optimiser.zero_grad(set_to_none=True)
        self.decoder_forward().backward(self.logits.detach())

    def seeds(self) -> Tensor:
        labelled: Tensor = self.module.seeds(self.maps, self.generator)
        return labelled

    def seed_loss(self) -> None:
        logits = self.logits.detach().requires_grad_()
        partial_cross_entropy(logits, self.labelled).backward()

    def softmax(self) -> None:
        logits = self.logits.detach().requires_grad_()
        logits[self.batch[3]].softmax(1).backward(self.probabilities)

    def crf(self) -> None:
        assert self.module.crf is not None
        kept = self.probabilities.detach().requires_grad_()
        self.module.crf(kept[:, 1:], self.colors[self.batch[3]]).backward()

    def size(self) -> None:
        kept = self.probabilities.detach().requires_grad_()
        self.module.size_loss(kept).backward()

    def total(self) -> Tensor:
        """The loss of all parts, put together."""
        module = self.module
        assert module.crf is not None
        kept = self.logits[self.batch[3]].softmax(1)
        total: Tensor = partial_cross_entropy(self.logits, self.labelled)
        total = total + module.crf_weight * module.crf(kept[:, 1:], self.colors[self.batch[3]])
        size: Tensor = module.size_loss(kept)
        return total + module.size_weight * size


def step_calls(name: str, device: torch.device) -> Calls:
    warnings.simplefilter("ignore")  # of Lightning, in the other process too: there is no Trainer
    model = network(name, device)
    batch = batch_of(BATCH, STORED, device)
    modules = [module_of(model, batch[0], batch[1], cached) for cached in (True, False)]
    cached, fly = (Parts(module, batch) for module in modules)
    spare = decoder_of(model).train()
    gradient = cached.logits.detach()
    return {
        FLOOR: partial(floor, model, spare, cached.images, gradient),
        CACHED: partial(step, cached.module, cached.optimiser, batch),
        ON_THE_FLY: partial(step, fly.module, fly.optimiser, batch),
        "guide: Grad-CAM of each view": fly.guide,
        "guide: stored maps": cached.guide,
        "views": cached.views,
        "classifier forward": cached.classifier,
        "decoder forward and backward": cached.decoder,
        "seeds": cached.seeds,
        "seed loss": cached.seed_loss,
        "softmax of what was read": cached.softmax,
        f"CRF loss, side {crf_side((SIDE, SIDE))}": cached.crf,
        "size loss": cached.size,
        "optimiser": cached.optimiser.step,
    }


def step_wish(network: str, rows: list[Row]) -> str:
    row_of = {row["name"]: row for row in rows}
    seconds = {name: row["seconds"] for name, row in row_of.items()}
    parts = [name for name in row_of if name not in (FLOOR, CACHED, ON_THE_FLY)]
    parts.remove("guide: Grad-CAM of each view")
    shares = ", ".join(
        f"{name} {100 * seconds[name] / seconds[CACHED]:.1f}%"
        for name in sorted(parts, key=lambda name: -seconds[name])
    )
    all_parts = 100 * sum(seconds[name] for name in parts) / seconds[CACHED]
    cached, fly = row_of[CACHED], row_of[ON_THE_FLY]
    return (
        f"Wished: a step with stored maps takes at most 1.5 times the floor; seen: {network}, "
        f"{cached['ratio']:.2f} ({cached['min']:.2f} to {cached['max']:.2f}), and with Grad-CAM of "
        f"each view {fly['ratio']:.2f} ({fly['min']:.2f} to {fly['max']:.2f}). Of the step with "
        f"stored maps: {shares}; together {all_parts:.0f}%."
    )


def compare_step(device: torch.device) -> None:
    """The step is its parts put together, and stored maps are those of whole pictures."""
    model = network("ResNet-18", device)
    batch = batch_of(2, 80, device)
    for cached in (True, False):
        module = module_of(model, batch[0], batch[1], cached, 64)
        parts = Parts(module, batch)
        assert bool((parts.labelled >= 0).any()), "There are no seeds."
        theirs = parts.total()
        named = dict(module.decoder.named_parameters())
        expected = torch.autograd.grad(theirs, list(named.values()))
        plain = decoded(model, module.decoder, parts.images)
        close("the step's logits", parts.logits, plain, 1e-5)
        ours = module.training_step(batch, 0)
        close("the step's loss", ours, theirs, 1e-5)
        for a, b in zip(torch.autograd.grad(ours, list(named.values())), expected, strict=True):
            close("the step's gradients", a, b, 1e-3)
    modules = [module_of(model, batch[0], batch[1], cached, 80) for cached in (True, False)]
    maps = []
    for module in modules:
        module.flip = False
        maps.append(Parts(module, batch).maps)
    close("stored maps", maps[0], maps[1], 1e-3)  # they are in float16


# --- maps ----------------------------------------------------------------------------------------


def composed(model: nn.Module, decoder: FCAMDecoder, x: Tensor) -> Tensor:
    with torch.no_grad():
        return decoded(model, decoder, x).softmax(1)[:, 1:]


def alone(model: nn.Module, x: Tensor) -> None:
    with torch.no_grad():
        model(x)


def map_calls(device: torch.device) -> Calls:
    calls: Calls = {}
    for name in NETWORKS:
        model = network(name, device)
        decoder = decoder_of(model).eval()
        fcam = FCAM(model, decoder)
        for n in (1, BATCH):
            x = photographs(n, SIDE, device) / 255
            head = f"{name}, {n} image{'s' * (n > 1)}"
            calls[f"{head}: {BARE}"] = partial(composed, model, decoder, x)
            calls[f"{head}: {OURS}"] = partial(fcam.foreground, x)
            calls[f"{head}: {CLASSIFIER}"] = partial(alone, model, x)
    return calls


def bare_map(name: str) -> str:
    return f"{name.partition(':')[0]}: {BARE}"


def map_wish(rows: list[Row]) -> str:
    seconds = {row["name"]: row["seconds"] for row in rows}
    seen = "; ".join(
        f"{row['name'].partition(':')[0]} {row['ratio']:.3f} ({row['min']:.3f} to "
        f"{row['max']:.3f}), and {row['seconds'] / seconds[head]:.1f} times the classifier alone"
        for row in rows
        if row["name"].endswith(OURS) and (head := f"{row['name'].partition(':')[0]}: {CLASSIFIER}")
    )
    return f"Wished: a map takes at most 1.1 times the classifier and the decoder; seen: {seen}."


def compare_maps(device: torch.device) -> None:
    for name in NETWORKS:
        model = network(name, device).double()
        decoder = decoder_of(model, 64).eval()
        x = photographs(2, 64, device).double() / 255
        close("a map", FCAM(model, decoder).foreground(x), composed(model, decoder, x))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--repeats", type=int, default=5, help="rounds")
    parser.add_argument("--threads", type=int, default=2, help="of the CPU")
    parser.add_argument("--json", type=Path, help="write all numbers here")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    device, repeats = torch.device(arguments.device), arguments.repeats
    torch.set_num_threads(arguments.threads)
    machine = environment(device, arguments.threads)
    print(", ".join(f"{name} {value}" for name, value in machine.items()), end="\n\n")

    start = time.perf_counter()
    compare_crf(device)
    compare_step(device)
    compare_maps(device)

    crf = crf_rows(repeats, device)
    print(f"CRF losses, forward and backward, {repeats} rounds, at {LONGEST} px one\n")
    print(f"{crf_markdown(crf)}\n\n{crf_wishes(crf)}\n", flush=True)
    steps: dict[str, list[Row]] = {}
    for name in NETWORKS:
        rows = measure(partial(step_calls, name), lambda name: FLOOR, repeats, device)
        print(
            f"{name}, a step of training of {BATCH} views of {SIDE} px, {repeats} rounds; ratios "
            f"are to the floor\n\n{markdown(rows)}\n\n{step_wish(name, rows)}\n",
            flush=True,
        )
        steps[name] = rows

    maps = measure(map_calls, bare_map, repeats, device)
    print(f"Maps at {SIDE} px, {repeats} rounds\n\n{markdown(maps)}\n\n{map_wish(maps)}")
    print(f"\n{time.perf_counter() - start:.0f} seconds in all")

    if arguments.json:
        tables = {"environment": machine, "crf": crf, "steps": steps, "maps": maps}
        arguments.json.write_text(json.dumps(tables, indent=1))


if __name__ == "__main__":
    main()
