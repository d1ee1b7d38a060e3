"""`evaluate`: attributions x a data set x metrics."""

import functools
import itertools
from collections import Counter
from collections.abc import Mapping, Sequence, Sized
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from captum.attr import Attribution

from captum_ext._checks import check_choice, check_count, check_seed, warn
from captum_ext._data.pixels import IMAGENET_MEAN_STD, mean_and_std
from captum_ext._data.sizes import height_width
from captum_ext._engine.state import preserve_state
from captum_ext._errors import AllFailedError, ArgumentError
from captum_ext._identity import json_value, model_digest, versioned_name
from captum_ext.evaluation.examples import Blocks, Prepared
from captum_ext.evaluation.measures import Measure, make_measures
from captum_ext.evaluation.methods import (
    Method,
    checked_methods,
    method_fingerprint,
    on_device,
)
from captum_ext.evaluation.records import Record
from captum_ext.evaluation.results import Summary, summary
from captum_ext.evaluation.store import COLUMNS, FORMAT, ResultStore, ResultWriter
from captum_ext.evaluation.units import Target, Work, run, what_is_left

TARGETS = ("label", "predicted")
_PATIENCE = timedelta(days=30)  # of a process that has finished, with the others
_FIRST = 64  # examples in which ground truth is looked for


def evaluate(
    methods: Mapping[str, Attribution | tuple[Attribution, Mapping[str, Any]]],
    data: Any,
    metrics: str | Sequence[str] | Mapping[str, Any] | None = None,
    *,
    output: str | Path,
    size: int | tuple[int, int] | None = None,
    normalize: Any = IMAGENET_MEAN_STD,
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
    random numbers come from the seed, the batch and the names of method and metric alone. (On other
    devices, or with another number of threads, models differ in the last bits.) Rows of another run
    are an error. `summary` reads them again, at any time.

    A run knows functions of yours (metrics, their options, `target`, what methods were made with, a
    model that is a plain function) by their modules, names and an attribute `version`:
    ``sharpness.version = "1"`` below a function at the top of a module, changed when what it does
    changes. Lambdas, functions inside others and callables without a version are refused;
    `functools.partial` fixes arguments. Functions of torch and other libraries need no version.

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
        normalize: (mean, std) of the channels, as the models expect pictures, or what has them as
            attributes, such as the `preprocess` of `captum_ext.zoo.load_model()`; ImageNet's if
            nothing is said. None takes tensors of floats as they are.
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
    every = checked_methods(methods)
    check_count("batch_size", batch_size)
    check_count("num_nodes", num_nodes)
    if not callable(target) and target is not None:
        check_choice("target", target, TARGETS)
    check_seed(seed)
    sides = None if size is None else height_width("size", size)
    if Path(output).exists() and not Path(output).is_dir():
        raise ArgumentError(f"`output` must be a folder, and {str(output)!r} is a file.", "output")
    blocks = Blocks(data, batch_size, sides, normalize)
    first = map(blocks.example, range(min(_FIRST, len(data))))
    some = list(itertools.islice((e for e in first if isinstance(e, Prepared)), 8))
    measures = make_measures(metrics, some)
    if blind := [m.name for m in measures if some and not any(m.serves(e) for e in some)]:
        warn(f"`metrics` {blind}: the first examples of `data` lack the boxes or masks for these.")
    digest_of = functools.cache(model_digest)  # several methods explain one model
    settings = {
        "format": FORMAT,
        "examples": len(data),
        "batch_size": batch_size,
        "data": blocks.fingerprint(),
        "size": sides,
        "normalize": None if normalize is None else _exact(normalize),
        "target": versioned_name("`target`", target) if callable(target) else str(target),
        "seed": seed,
        "methods": {method.name: method_fingerprint(method, digest_of) for method in every},
        "metrics": {m.name: json_value(f"`metrics`: {m.name}", m.options) for m in measures},
        "columns": {m.name: m.columns() for m in measures},
    }
    if target == "label" and some:
        _compare_classes(every, data, some[0])
    records, store = _records(measures), ResultStore.create(output, settings)
    work = Work(every, records, blocks, store, target, seed, num_workers, show_progress)
    if devices == 1 and num_nodes == 1:  # perhaps in one process of several, of the caller's
        with ResultWriter(store, 0) as writer:
            run(work, what_is_left(work), writer)
        found = _exported(store)
    else:
        _fabric(every, devices, num_nodes, strategy).launch(_launched, work)
        found = _exported_once(store)
    _check_came_to_something(found, output)
    return found


def _exact(normalize: Any) -> list[list[float]]:
    return [values.tolist() for values in mean_and_std(normalize, torch.float64)]


def _records(measures: Sequence[Measure]) -> list[Record]:
    """What measures write, once where several write the same."""
    records = {record.columns: record for each in measures for record in each.records}
    every_column = Counter((*COLUMNS, *itertools.chain(*records)))
    if twice := [column for column, n in every_column.items() if n > 1]:
        raise ArgumentError(
            f"`metrics`: rows have columns {twice} already: choose other names.", "metrics"
        )
    return list(records.values())


def _check_came_to_something(found: Summary, output: str | Path) -> None:
    if not any(found.images.values()):
        raise AllFailedError(
            f"Not one of {sum(found.failures.values())} rows came to anything. The first reason: "
            f"{next(iter(found.reasons.values()), None)}"
        )
    if any(found.failures.values()):
        warn(f"Some rows failed: {found.failures}. Their reasons are in {Path(output)}.")


def _compare_classes(methods: Sequence[Method], data: Any, example: Prepared) -> None:
    """Warn where labels seem to be of other classes than the models'."""
    classes = getattr(data, "classes", None)
    if not isinstance(classes, Sized) or not len(classes):
        return
    for method in {id(m.forward_func): m for m in methods}.values():
        device, kind = method.where
        try:
            with torch.no_grad(), preserve_state(method.forward_func):
                scores = method.forward_func(example.image[None].to(device, kind))
        except Exception:  # whatever it is, rows say so
            return
        if scores.dim() == 2 and 1 < scores.shape[1] != len(classes):
            warn(
                f"`data` has {len(classes)} classes and the model of {method.name} has "
                f"{scores.shape[1]}: labels are taken for indices of the model's. ClassFolders "
                f"takes them in the model's order, and `target` 'predicted' needs none."
            )


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
    methods = [on_device(fabric.device, method) for method in work.methods]
    # Shares do not take equally long, and the usual patience of half an hour may be too little.
    group = _patient_group()
    rank, world = fabric.global_rank, fabric.world_size
    try:
        with ResultWriter(work.store, rank) as writer:
            # As the first process finds it: others may look when there is more on disk.
            left = fabric.broadcast(what_is_left(work) if rank == 0 else None)
            run(work._replace(methods=methods), left, writer, rank, world)
    finally:
        for method, device in zip(work.methods, before, strict=True):
            on_device(device, method)
    if group is not None:
        dist.barrier(group)


def _exported(store: ResultStore) -> Summary:
    store.export()
    return summary(store.folder)


def _exported_once(store: ResultStore) -> Summary:
    """Where each process goes on by itself, as with "ddp", the first one makes it for all."""
    group = _patient_group()
    if group is None:
        return _exported(store)
    found = [_exported(store) if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(found, src=0, group=group)
    assert found[0] is not None
    return found[0]


def _patient_group() -> Any:
    """All processes, if there are several here."""
    if not dist.is_available() or not dist.is_initialized():
        return None
    return dist.new_group(backend="gloo", timeout=_PATIENCE)
