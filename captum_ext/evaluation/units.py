"""What one process does: it explains batches of images, and writes their rows."""

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any, NamedTuple

import torch
from torch import Generator, Tensor
from torch.utils.data import DataLoader
from tqdm import tqdm

from captum_ext._compat import _run_forward
from captum_ext._data.files import is_resource_error
from captum_ext._engine.state import preserve_state, seeded_random
from captum_ext._identity import derive_seed, digest
from captum_ext.evaluation.examples import Blocks, Failure, Prepared, reason
from captum_ext.evaluation.methods import Method, seeded
from captum_ext.evaluation.records import Explained, Record
from captum_ext.evaluation.store import ResultStore, ResultWriter, Task
from captum_ext.metrics._inputs import checked_maps

Target = str | Callable[[Prepared], int] | None


class Work(NamedTuple):
    """What each process has in hand."""

    methods: Sequence[Method]
    records: Sequence[Record]
    blocks: Blocks
    store: ResultStore
    target: Target
    seed: int
    num_workers: int
    show_progress: bool


def what_is_left(work: Work) -> dict[int, list[str]]:
    """The batches that are not finished, and the methods that have yet to explain each."""
    done, left = work.store.finished_tasks(), {}
    for block in range(len(work.blocks)):
        names = [m.name for m in work.methods if Task(block, m.name) not in done]
        if names:
            left[block] = names
    return left


def run(
    work: Work,
    left: Mapping[int, Sequence[str]],
    writer: ResultWriter,
    rank: int = 0,
    world: int = 1,
) -> None:
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
    failed = 0
    with tqdm(
        total=sum(len(work.blocks.indices(block)) * len(left[block]) for block in todo),
        unit="map",
        disable=not work.show_progress or rank > 0,
    ) as bar:
        for block, examples in zip(todo, loader, strict=True):
            for method in (methods[name] for name in left[block]):
                rows, seconds = _unit(work, method, examples)
                writer.write(Task(block, method.name), rows, seconds, method.where[0])
                failed += sum(1 for row in rows if row["failure"])
                if failed:
                    bar.set_postfix(failed=failed, refresh=False)
                bar.update(len(rows))


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
            if is_resource_error(error):
                raise
            found = []
            for example in group:
                try:
                    found += _explained(work, method, [example], seconds)
                except Exception as own:
                    if is_resource_error(own):
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
        kept.enter_context(preserve_state(method.forward_func))
        number = derive_seed(work.seed, examples[0].index, int(digest(method.name), 16))
        kept.enter_context(seeded_random(device, number))
        kept.enter_context(seeded(method, number))
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
            each = maps if maps.dim() == 4 else maps[:, None]
            found = Explained(
                method.forward_func,
                images[good],
                finite,
                chosen,
                [examples[place] for place in good],
                extra,
                each.detach()[good],
                method.attribution,
                method.kwargs,
            )
            for record in work.records:
                served = [i for i, e in enumerate(found.examples) if record.serves(e)]
                if served:
                    # Of its own: metrics may come in another order, and others be left out.
                    own = derive_seed(number, int(digest(record.columns), 16))
                    with seeded_random(device, own), seeded(method, own):
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
        with torch.no_grad():
            scores = _run_forward(method.forward_func, images, None, extra)
        if scores.dim() != 2:
            raise ValueError(
                f"`target` 'predicted' needs a model with scores (B, K), got "
                f"{tuple(scores.shape)}: None is for models with one output."
            )
        predicted: Tensor = scores.argmax(1)
        return predicted
    labels = [e.label if isinstance(target, str) else int(target(e)) for e in examples]
    if min(labels) < 0:
        raise ValueError(f"`target` must be indices of classes, at least 0, got {labels}.")
    return torch.tensor(labels, device=images.device)


def _row(method: Method, example: Prepared | Failure) -> dict[str, Any]:
    row: dict[str, Any] = {"index": example.index, "name": example.name, "method": method.name}
    if isinstance(example, Prepared):
        row["label"] = example.label
    return row


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
