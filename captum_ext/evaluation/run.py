"""`evaluate`: attributions x a data set x metrics."""

import itertools
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from captum.attr import Attribution, LayerAttribution
from torch import Generator, Tensor
from torch.nn import Module
from torch.utils.data import DataLoader
from tqdm import tqdm

from captum_ext._checks import check_choice, check_count, warn
from captum_ext._model import Forward, floating_type, random_numbers, root_module, untouched
from captum_ext.attr import UpsampleWrapper
from captum_ext.attr.fcam import fingerprint
from captum_ext.evaluation.examples import Blocks, Failure, Prepared, is_the_machines, reason
from captum_ext.evaluation.measures import make_measures
from captum_ext.evaluation.records import Explained, Record
from captum_ext.evaluation.results import Summary, summary
from captum_ext.evaluation.store import Store, Unit, Writer
from captum_ext.fcam.guides import wrapped
from captum_ext.fcam.stored import described
from captum_ext.fcam.views import IMAGENET, digest, hash_of
from captum_ext.metrics._inputs import checked_maps

TARGETS = ("label", "predicted")
FORMAT = 2  # of the files
_PATIENCE = timedelta(days=30)  # of a process that has finished, with the others
_FIRST = 64  # examples in which ground truth is looked for

Target = str | Callable[[Prepared], int] | None


class Method(NamedTuple):
    """An attribution, and what its `attribute` is called with."""

    name: str
    attribution: Attribution
    kwargs: Mapping[str, Any]

    @property
    def forward_func(self) -> Forward:
        """The model."""
        found: Forward = self.attribution.forward_func
        return found

    @property
    def where(self) -> tuple[torch.device, torch.dtype]:
        """Of the images that the model takes."""
        root = root_module(self.forward_func)
        if root is None:
            return torch.device("cpu"), torch.float32
        return next(root.parameters(), torch.empty(0)).device, floating_type(root)


class Work(NamedTuple):
    """What each process has in hand."""

    methods: Sequence[Method]
    records: Sequence[Record]
    blocks: Blocks
    store: Store
    target: Target
    seed: int
    num_workers: int
    show_progress: bool


def evaluate(
    methods: Mapping[str, Attribution | tuple[Attribution, Mapping[str, Any]]],
    data: Any,
    metrics: str | Sequence[str] | Mapping[str, Any] | None = None,
    *,
    output: str | Path,
    size: int | tuple[int, int] | None = None,
    normalize: tuple[Sequence[float], Sequence[float]] | None = IMAGENET,
    target: Target = "label",
    batch_size: int = 16,
    seed: int = 0,
    num_workers: int = 0,
    show_progress: bool = True,
    devices: int | Sequence[int] = 1,
    num_nodes: int = 1,
    strategy: Any = "auto",
) -> Summary:
    """Measure how good the maps of attribution methods are, on a data set.

    Rows are appended to ``output/rows.csv`` as they come, one for each image and method. A run that
    was killed, at any moment, goes on where it was when it is called again, and ends with the same
    rows, in another order at most: images are taken in fixed batches of consecutive ones, and
    random numbers come from the seed, the batch and the method's name alone. (On other devices, or
    with another number of threads, models differ in the last bits.) Rows of another run are an
    error. `summary` reads them again, at any time.

    A picture that cannot be read, ground truth that cannot be right, a method that raises and a map
    that is not finite or of another size than the image become rows with the reason, and the rest
    goes on. Of a batch that raises, images are taken one by one. What is the machine's fault, such
    as too little memory, is raised.

    Args:
        methods: any attributions of Captum or of this package by the names they go by, each with
            arguments of its `attribute` or without: ``{"IG": (IntegratedGradients(model),
            {"n_steps": 20})}``. Layer attributions are laid over the image by `UpsampleWrapper`.
            Each explains its own model, on that model's device.
        data: examples with attributes `image`, `target` and, as far as known, `boxes` (n, 4) or
            `box`, `mask` or `part` (H, W), `ignored` (H, W) and `name`; or (picture, label) or
            (picture, label, boxes). Pictures are PIL images or tensors (C, H, W) of bytes or of
            floats in [0, 1]; boxes are (x1, y1, x2, y2) in the picture's pixels, half-open.
        metrics: "localization" (None, too) is what the ground truth allows of "pointing_game",
            "energy", "max_box_acc", "max_box_acc_v2", "pxap" and "px_iou". Further ones cost passes
            of the model: "top_1_localization" and "top_5_localization" (boxes count only where the
            model is right), "insertion", "deletion", "overall_score" (out of the rows of both),
            "average_drop", "increase_in_confidence", "road", and Captum's "infidelity" (to Gaussian
            `noise` of 0.1, or a `perturb_func`; normalised, since maps have scales of their own)
            and "sensitivity_max", which explains each image anew eleven times. "total_variation"
            takes only the map. One or more of these names, or a mapping from them
            to their options: ``{"localization": {}, "insertion": {"step": 0.1}}``. Other names map
            to functions of `Explained` that give a number for each image; an attribute
            `higher_is_better` of the function, where there is one, says which way is up. The
            pointing game and the energy take boxes, and masks where there are none. Maps are
            min-maxed for boxes, pixels and the total variation.
        output: a folder, which all processes share.
        size: (H, W) that pictures are brought to, or one number for both; maps, boxes and masks are
            in these pixels. None leaves pictures as they are, and explains those of one size
            together.
        normalize: (mean, std) of the channels, as the models expect pictures. None takes tensors of
            floats as they are.
        target: what is explained: each image's "label", the class "predicted" by the method's
            model, a callable of the `Prepared`, or None, for models with one output.
        batch_size: images that a method explains at once.
        seed: of all random numbers, those of Captum's methods too; generators that methods were
            made with are seeded likewise, and then as before.
        num_workers: processes that read pictures, for each device.
        show_progress: whether to draw a progress bar.
        devices: how many, or which: with more than one, Lightning's Fabric starts a process for
            each (the extra `train`), on GPUs where the models are on one, and each takes every
            n-th batch. Methods and data must pickle, unless the strategy forks.
        num_nodes: machines, each with so many devices.
        strategy: Fabric's, such as "ddp", "ddp_spawn" or "ddp_fork".

    Returns:
        The `Summary`: figures with intervals, differences, failures.

    Raises:
        ValueError: an argument out of range, an empty data set, the folder of another run.
        TypeError: methods that are no attributions.
        RuntimeError: nothing came to anything; inside `torch.inference_mode`.

    Example:
        >>> from captum.attr import IntegratedGradients, LayerGradCam
        >>> methods = {"Grad-CAM": LayerGradCam(model, model.layer4),
        ...            "IG": IntegratedGradients(model)}  # doctest: +SKIP
        >>> found = evaluate(methods, data, output="run")  # doctest: +SKIP
        >>> print(found.markdown())  # doctest: +SKIP
    """
    if torch.is_inference_mode_enabled():
        raise RuntimeError("Gradients are not to be had inside torch.inference_mode().")
    every = [_method(name, value) for name, value in _items(methods)]
    for argument, count in (("batch_size", batch_size), ("num_nodes", num_nodes)):
        check_count(argument, count)
    if not callable(target) and target is not None:
        check_choice("target", target, TARGETS)
    if isinstance(seed, bool) or not isinstance(seed, int):
        raise TypeError(f"`seed` must be an integer, got {seed!r}.")
    sides = (size, size) if isinstance(size, int) else size
    if sides is not None:
        if len(sides) != 2:
            raise ValueError(f"`size` must be one or two numbers of pixels, got {size!r}.")
        for side in sides:
            check_count("size", side)
        sides = (sides[0], sides[1])
    blocks = Blocks(data, batch_size, sides, normalize)
    first = (blocks.example(index) for index in range(min(_FIRST, len(data))))
    known = itertools.islice((e for e in first if isinstance(e, Prepared)), 8)
    measures = make_measures(metrics, list(known))
    settings = {
        "format": FORMAT,
        "examples": len(data),
        "batch_size": batch_size,
        "data": blocks.about(),
        "size": sides,
        "normalize": normalize,
        "target": _in_words(target),
        "seed": seed,
        "methods": {method.name: _about(method) for method in every},
        "metrics": {m.name: {k: _plain(v) for k, v in m.options.items()} for m in measures},
        "columns": {m.name: m.columns() for m in measures},
    }
    store = Store(output, settings)
    records = {r.columns: r for m in measures for r in m.records}  # of several measures, once
    work = Work(
        every, list(records.values()), blocks, store, target, seed, num_workers, show_progress
    )
    if devices == 1 and num_nodes == 1:
        run(work, what_is_left(work))
    else:
        fabric = _fabric(every, devices, num_nodes, strategy)
        fabric.launch(_launched, work)
    found = summary(output)
    if not any(found.images.values()):
        raise RuntimeError(
            f"Not one of {sum(found.failures.values())} rows came to anything. The first reason: "
            f"{next(iter(found.reasons.values()))}"
        )
    if any(found.failures.values()):
        warn(f"Some rows failed: {found.failures}. Their reasons are in {store.folder}.")
    return found


# --- one process ---------------------------------------------------------------------------------


def what_is_left(work: Work) -> dict[int, list[str]]:
    """The batches that are not finished, and the methods that have yet to explain each."""
    done, left = work.store.done(), {}
    for block in range(len(work.blocks)):
        names = [m.name for m in work.methods if Unit(block, m.name) not in done]
        if names:
            left[block] = names
    return left


def run(work: Work, left: Mapping[int, Sequence[str]], rank: int = 0, world: int = 1) -> None:
    """Do a process's share of what is left: every n-th batch, of n processes."""
    todo = list(left)[rank::world]
    methods = {method.name: method for method in work.methods}
    loader = DataLoader(
        work.blocks,
        batch_size=None,
        sampler=todo,
        num_workers=work.num_workers,
        generator=Generator(),  # else a number of torch's global ones would be drawn
    )
    writer = Writer(work.store, rank)
    failed = 0
    try:
        with tqdm(
            total=sum(len(work.blocks.indices(block)) * len(left[block]) for block in todo),
            unit="map",
            disable=not work.show_progress or rank > 0,
        ) as bar:
            for block, examples in zip(todo, loader, strict=True):
                for method in (methods[name] for name in left[block]):
                    rows, seconds = _unit(work, method, examples)
                    device = method.where[0]
                    writer.write(rows, (block, method.name, len(rows), *seconds, device))
                    failed += sum(1 for row in rows if row["failure"])
                    if failed:
                        bar.set_postfix(failed=failed, refresh=False)
                    bar.update(len(rows))
    finally:
        writer.close()


def _unit(
    work: Work, method: Method, examples: Sequence[Prepared | Failure]
) -> tuple[list[dict[str, Any]], tuple[float, float]]:
    """Rows of a batch, in its order, and the seconds of the attribution and of the metrics."""
    rows: dict[int, dict[str, Any]] = {}
    seconds = [0.0, 0.0]
    sizes: dict[tuple[int, ...], list[Prepared]] = {}
    for example in examples:
        if isinstance(example, Failure):
            rows[example.index] = _row(method, example) | {"failure": example.reason}
        else:
            sizes.setdefault(tuple(example.image.shape), []).append(example)
    for group in sizes.values():
        try:
            found = _explained(work, method, group, seconds)
        except Exception as error:
            if is_the_machines(error):
                raise
            found = []
            for example in group:
                try:
                    found += _explained(work, method, [example], seconds)
                except Exception as own:
                    if is_the_machines(own):
                        raise
                    found.append(_row(method, example) | {"failure": reason(own)})
        rows |= {row["index"]: row for row in found}
    return [rows[example.index] for example in examples], (
        round(seconds[0], 6),
        round(seconds[1], 6),
    )


def _explained(
    work: Work, method: Method, examples: list[Prepared], seconds: list[float]
) -> list[dict[str, Any]]:
    """Rows of images of one size. What raises here is the method's or a metric's."""
    device, kind = method.where
    images = torch.stack([example.image for example in examples]).to(device, kind)
    extra = method.kwargs.get("additional_forward_args")
    with ExitStack() as kept:
        kept.enter_context(torch.enable_grad())
        kept.enter_context(untouched(method.forward_func))
        number = hash_of(work.seed, examples[0].index, int(digest(method.name), 16))
        kept.enter_context(random_numbers(device, number))
        kept.enter_context(_seeded(method, number))
        begin = _now(device)
        target = _target(work.target, method, images, examples)
        maps = method.attribution.attribute(images.clone(), target=target, **method.kwargs)
        middle = _now(device)
        seconds[0] += middle - begin
        maps = maps[0] if isinstance(maps, tuple) else maps
        rows, good = [], []
        for place, example in enumerate(examples):
            row = _row(method, example)
            if target is not None:
                row["target"] = int(target[place])
            row["failure"] = _what_is_wrong(maps, place, images)
            rows.append(row)
            if not row["failure"]:
                good.append(place)
        if good:
            finite = checked_maps(maps.detach()[good])
            chosen = None if target is None else target[good]
            found = Explained(
                method.forward_func,
                images[good],
                finite,
                chosen,
                [examples[place] for place in good],
                extra,
                maps.detach()[good],
                method.attribution,
                method.kwargs,
            )
            for record in work.records:
                served = [i for i, e in enumerate(found.examples) if record.serves(e)]
                if served:
                    cells = record.cells(found.only(served))
                    for i, each in zip(served, cells, strict=True):
                        rows[good[i]] |= zip(record.columns, each, strict=True)
        seconds[1] += _now(device) - middle
    return rows


def _what_is_wrong(maps: Any, place: int, images: Tensor) -> str:
    """Of the map of one image; nothing, if it can be measured."""
    if not isinstance(maps, Tensor) or maps.dim() not in (3, 4) or len(maps) != len(images):
        shown = tuple(maps.shape) if isinstance(maps, Tensor) else type(maps).__name__
        return f"there is no map (C, H, W) of each image, but {shown}"
    if maps.shape[-2:] != images.shape[2:]:
        return (
            f"the map is of {maps.shape[-2]} x {maps.shape[-1]} pixels and the image of "
            f"{images.shape[2]} x {images.shape[3]}: UpsampleWrapper makes them agree"
        )
    if not bool(torch.isfinite(maps[place]).all()):
        return "the map has values that are not finite"
    return ""


def _target(
    target: Target, method: Method, images: Tensor, examples: Sequence[Prepared]
) -> Tensor | None:
    if target is None:
        return None
    if target == "predicted":
        extra = method.kwargs.get("additional_forward_args")
        extra = extra if isinstance(extra, tuple) else () if extra is None else (extra,)
        with torch.no_grad():
            predicted: Tensor = method.forward_func(images, *extra).argmax(1)
        return predicted
    labels = [e.label if isinstance(target, str) else int(target(e)) for e in examples]
    return torch.tensor(labels, device=images.device)


def _row(method: Method, example: Prepared | Failure) -> dict[str, Any]:
    row: dict[str, Any] = {"index": example.index, "name": example.name, "method": method.name}
    if isinstance(example, Prepared):
        row["label"] = example.label
    return row


@contextmanager
def _seeded(method: Method, seed: int) -> Iterator[None]:
    """A method's own generators, and those among its arguments, from a seed; then as before."""
    found: list[Generator] = []
    inner: Attribution | None = method.attribution
    while inner is not None:
        found += [value for value in vars(inner).values() if isinstance(value, Generator)]
        inner = wrapped(inner)
    found += [value for value in method.kwargs.values() if isinstance(value, Generator)]
    states = [generator.get_state() for generator in found]
    for generator in found:
        generator.manual_seed(seed)
    try:
        yield
    finally:
        for generator, state in zip(found, states, strict=True):
            generator.set_state(state)


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


# --- several processes ---------------------------------------------------------------------------


def _fabric(methods: Sequence[Method], devices: Any, num_nodes: int, strategy: Any) -> Any:
    try:
        from lightning.fabric import Fabric
    except ModuleNotFoundError as error:
        raise ImportError(
            'Several devices need Lightning: pip install "captum_ext[train]".'
        ) from error
    kind = methods[0].where[0].type
    return Fabric(accelerator=kind, devices=devices, num_nodes=num_nodes, strategy=strategy)


def _launched(fabric: Any, work: Work) -> None:
    """In each process. They share nothing but the folder, so that shares need not be equal."""
    before = [method.where[0] for method in work.methods]
    methods = [_on(fabric.device, method) for method in work.methods]
    # Shares do not take equally long, and the usual patience of half an hour may be too little.
    alike = dist.is_available() and dist.is_initialized()
    group: Any = dist.new_group(backend="gloo", timeout=_PATIENCE) if alike else None
    # As the first process finds it: others may look when there is more on disk.
    left = fabric.broadcast(what_is_left(work) if fabric.is_global_zero else None)
    try:
        run(work._replace(methods=methods), left, fabric.global_rank, fabric.world_size)
    finally:
        for method, device in zip(work.methods, before, strict=True):
            _on(device, method)
    if alike:
        dist.barrier(group)


def _on(device: torch.device, method: Method) -> Method:
    """A method whose model, other modules (a decoder) and tensors are on the device."""
    root = root_module(method.forward_func)
    if root is not None:
        root.to(device)
    inner: Attribution | None = method.attribution
    while inner is not None:
        for name, value in vars(inner).items():
            if isinstance(value, Module | Tensor):
                setattr(inner, name, value.to(device))  # a module stays the same object
        inner = wrapped(inner)
    kwargs = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in method.kwargs.items()}
    return method._replace(kwargs=kwargs)


# --- settings ------------------------------------------------------------------------------------


def _items(methods: Any) -> list[tuple[str, Any]]:
    if not isinstance(methods, Mapping) or not methods:
        raise TypeError(
            f"`methods` must be a mapping from names to attributions, at least one, got "
            f"{methods!r}."
        )
    for name in methods:
        if not isinstance(name, str) or not name or name.splitlines() != [name]:
            raise TypeError(f"`methods` must have names of one line, got {name!r}.")
    return list(methods.items())


def _method(name: str, value: Any) -> Method:
    attribution, kwargs = value if isinstance(value, tuple) and len(value) == 2 else (value, {})
    if not isinstance(attribution, Attribution) or not isinstance(kwargs, Mapping):
        raise TypeError(
            f"`methods`: {name} must be a Captum Attribution, or (Attribution, arguments of "
            f"`attribute`), got {value!r}."
        )
    taken = {"inputs", "target", "return_convergence_delta"} & kwargs.keys()
    if taken:
        raise ValueError(f"`methods`: {name}: {sorted(taken)} cannot be given.")
    if isinstance(attribution, LayerAttribution):
        attribution = UpsampleWrapper(attribution)
    return Method(name, attribution, kwargs)


def _about(method: Method) -> str:
    """A method, its options, its arguments and its model, as far as they can be known."""
    root = root_module(method.forward_func)
    if root is None:
        made, model = method.attribution.get_name(), _in_words(method.forward_func)
    else:
        made = described(method.attribution, root)
        model = f"{type(root).__name__} {digest(sorted(fingerprint(root).items()))}"
    arguments = [f"{key}={_plain(value)!r}" for key, value in sorted(method.kwargs.items())]
    return f"{made}, of {model}, called with ({', '.join(arguments)})"


def _plain(value: Any) -> Any:
    """Something that JSON has, and that is the same in each process."""
    if isinstance(value, int | float | str | None):
        return value
    if isinstance(value, list | tuple):
        return [_plain(each) for each in value]
    if isinstance(value, Tensor):
        return f"tensor {digest((tuple(value.shape), value.flatten().tolist()))}"
    return _in_words(value)


def _in_words(value: Any) -> str:
    if isinstance(value, str | None):
        return str(value)
    name = getattr(value, "__qualname__", None)
    return str(name) if name else f"a {type(value).__name__}"
