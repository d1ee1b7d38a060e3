"""The work of one process: it explains batches of images, measures the maps, and stores rows."""

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Generator, Tensor
from tqdm import tqdm

from captum_ext._data.files import is_resource_error
from captum_ext._data.loading import CpuLoader
from captum_ext._engine.state import preserve_state, seeded_random
from captum_ext._identity import derive_seed, digest
from captum_ext.attr._chain import call_attribute
from captum_ext.evaluation.columns import Columns, ExplainedBatch, model_scores
from captum_ext.evaluation.examples import (
    ExampleBatches,
    FailedExample,
    PreparedExample,
    failure_text,
)
from captum_ext.evaluation.methods import ConfiguredMethod, seed_generators
from captum_ext.evaluation.store import ResultStore, ResultWriter, Task
from captum_ext.metrics._inputs import checked_maps

Target = str | Callable[[PreparedExample], int] | None
Rows = list[dict[str, Any]]


class EvaluationArguments(NamedTuple):
    """The arguments of a run, as each of its processes gets them."""

    methods: Sequence[ConfiguredMethod]
    columns: Sequence[Columns]
    batches: ExampleBatches
    store: ResultStore
    target: Target
    seed: int
    num_workers: int
    show_progress: bool


def remaining_methods(evaluation: EvaluationArguments) -> dict[int, list[str]]:
    """The unfinished batches, each with the names of the methods that must still explain it."""
    finished, remaining = evaluation.store.finished_tasks(), {}
    for batch in range(len(evaluation.batches)):
        names = [m.name for m in evaluation.methods if Task(batch, m.name) not in finished]
        if names:
            remaining[batch] = names
    return remaining


def run_share(
    evaluation: EvaluationArguments,
    remaining: Mapping[int, Sequence[str]],
    writer: ResultWriter,
    rank: int = 0,
    n_processes: int = 1,
) -> None:
    """Explain and measure a process's share of the remaining batches: every n-th one."""
    batches = list(remaining)[rank::n_processes]
    methods = {method.name: method for method in evaluation.methods}
    loader = CpuLoader(
        evaluation.batches,
        batch_size=None,
        sampler=batches,
        num_workers=evaluation.num_workers,
        generator=Generator(),  # without it a number of torch's global generator is drawn
    )
    n_maps = sum(
        len(evaluation.batches.indices(batch)) * len(remaining[batch]) for batch in batches
    )
    n_failed = 0
    is_quiet = not evaluation.show_progress or rank > 0
    with tqdm(total=n_maps, unit="map", disable=is_quiet) as bar:
        for batch, examples in zip(batches, loader, strict=True):
            for method in (methods[name] for name in remaining[batch]):
                rows, seconds = _explain_batch(evaluation, method, examples)
                device, _ = method.device_and_dtype
                writer.write(Task(batch, method.name), rows, seconds, device)
                n_failed += sum(1 for row in rows if row["failure"])
                if n_failed:
                    bar.set_postfix(failed=n_failed, refresh=False)
                bar.update(len(rows))


def _explain_batch(
    evaluation: EvaluationArguments,
    method: ConfiguredMethod,
    examples: Sequence[PreparedExample | FailedExample],
) -> tuple[Rows, tuple[float, float]]:
    """The rows of a batch in its order, and the seconds of the attribution and of the metrics.

    If images raise an error together, each is explained alone.
    """
    rows: dict[int, dict[str, Any]] = {}
    seconds = [0.0, 0.0]
    groups: dict[tuple[int, ...], list[PreparedExample]] = {}
    for example in examples:
        if isinstance(example, FailedExample):
            rows[example.index] = _first_cells(method, example) | {"failure": example.reason}
        else:
            groups.setdefault(tuple(example.image.shape), []).append(example)
    for group in groups.values():
        try:
            group_rows = _explain_images(evaluation, method, group, seconds)
        except Exception as error:
            if is_resource_error(error):
                raise
            group_rows = [_explain_alone(evaluation, method, e, seconds) for e in group]
        rows |= {row["index"]: row for row in group_rows}
    attribution_s, metrics_s = (round(value, 6) for value in seconds)
    return [rows[example.index] for example in examples], (attribution_s, metrics_s)


def _explain_alone(
    evaluation: EvaluationArguments,
    method: ConfiguredMethod,
    example: PreparedExample,
    seconds: list[float],
) -> dict[str, Any]:
    """The row of one image; it has the reason where the method or a metric raises an error."""
    try:
        (row,) = _explain_images(evaluation, method, [example], seconds)
    except Exception as error:
        if is_resource_error(error):
            raise
        return _first_cells(method, example) | {"failure": failure_text(error)}
    return row


def _explain_images(
    evaluation: EvaluationArguments,
    method: ConfiguredMethod,
    examples: list[PreparedExample],
    seconds: list[float],
) -> Rows:
    """The rows of images of one size. Errors of the method and of the metrics are raised.

    `seconds`, of the attribution and of the metrics, are added up.
    """
    device, dtype = method.device_and_dtype
    images = torch.stack([example.image for example in examples]).to(device, dtype)
    seed = derive_seed(evaluation.seed, examples[0].index, int(digest(method.name), 16))
    with (
        torch.enable_grad(),
        seeded_random(device, seed),
        preserve_state(method.forward_func),
        seed_generators(method, seed),
    ):
        start = _now(device)
        target = _target_tensor(evaluation.target, method, images, examples)
        maps = call_attribute(method.attribution, images.clone(), target=target, **method.kwargs)
        explained = _now(device)
        seconds[0] += explained - start
        maps = maps[0] if isinstance(maps, tuple) else maps
        rows = [_first_cells(method, example) for example in examples]
        for i, row in enumerate(rows):
            if target is not None:
                row["target"] = int(target[i])
            row["failure"] = _map_error(maps, i, images)
        valid = [i for i, row in enumerate(rows) if not row["failure"]]
        if valid:
            attributions = maps if maps.dim() == 4 else maps[:, None]
            batch = ExplainedBatch(
                method.forward_func,
                images[valid],
                checked_maps(maps.detach()[valid]),
                None if target is None else target[valid],
                [examples[i] for i in valid],
                method.kwargs.get("additional_forward_args"),
                attributions.detach()[valid],
                method.attribution,
                method.kwargs,
            )
            _add_cells(evaluation.columns, method, batch, [rows[i] for i in valid], seed)
        seconds[1] += _now(device) - explained
    return rows


def _add_cells(
    columns: Sequence[Columns],
    method: ConfiguredMethod,
    batch: ExplainedBatch,
    rows: Rows,
    seed: int,
) -> None:
    """Add the cells of the metrics to the rows, one for each image of the batch."""
    for group in columns:
        indices = [i for i, example in enumerate(batch.examples) if group.is_defined_for(example)]
        if not indices:
            continue
        # A seed of their own: cells do not depend on the other metrics and their order.
        group_seed = derive_seed(seed, int(digest(group.names), 16))
        with seeded_random(batch.images.device, group_seed), seed_generators(method, group_seed):
            cells = group.cells(batch.only(indices))
        for i, values in zip(indices, cells, strict=True):
            rows[i] |= zip(group.names, values, strict=True)


def _map_error(maps: Any, index: int, images: Tensor) -> str:
    """The reason why the map of an image cannot be measured; an empty text if it can."""
    if not isinstance(maps, Tensor) or maps.dim() not in (3, 4) or len(maps) != len(images):
        got = tuple(maps.shape) if isinstance(maps, Tensor) else type(maps).__name__
        return f"there is no map (C, H, W) of each image, but {got}"
    if maps.shape[-2:] != images.shape[2:]:
        return (
            f"the map is of {maps.shape[-2]} x {maps.shape[-1]} pixels and the image of "
            f"{images.shape[2]} x {images.shape[3]}: UpsampleWrapper makes them agree"
        )
    if not bool(torch.isfinite(maps[index]).all()):
        return "the map has values that are not finite"
    return ""


def _target_tensor(
    target: Target, method: ConfiguredMethod, images: Tensor, examples: Sequence[PreparedExample]
) -> Tensor | None:
    """The class to explain of each image (B,); None for models with one output."""
    if target is None:
        return None
    if target == "predicted":
        extra = method.kwargs.get("additional_forward_args")
        scores = model_scores(method.forward_func, images, extra)
        if scores.dim() != 2:
            raise ValueError(
                f"`target` 'predicted' needs a model with scores (B, K), got "
                f"{tuple(scores.shape)}: None is for models with one output."
            )
        return scores.argmax(1)
    labels = [e.label if isinstance(target, str) else int(target(e)) for e in examples]
    if min(labels) < 0:
        raise ValueError(f"`target` must be indices of classes, at least 0, got {labels}.")
    return torch.tensor(labels, device=images.device)


def _first_cells(
    method: ConfiguredMethod, example: PreparedExample | FailedExample
) -> dict[str, Any]:
    """A row without the results."""
    row: dict[str, Any] = {"index": example.index, "name": example.name, "method": method.name}
    if isinstance(example, PreparedExample):
        row["label"] = example.label
    return row


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
