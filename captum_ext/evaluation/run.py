"""`evaluate`: measure attribution methods on a data set by several metrics."""

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
from captum_ext.evaluation.columns import Columns
from captum_ext.evaluation.examples import ExampleBatches, PreparedExample
from captum_ext.evaluation.measures import Measure, make_measures
from captum_ext.evaluation.methods import (
    ConfiguredMethod,
    configured_methods,
    method_fingerprint,
    move_to_device,
)
from captum_ext.evaluation.results import Summary, summary
from captum_ext.evaluation.store import COLUMNS, FORMAT, ResultStore, ResultWriter
from captum_ext.evaluation.worker import EvaluationArguments, Target, remaining_methods, run_share

TARGETS = ("label", "predicted")
_PATIENCE = timedelta(days=30)  # in which the slowest process ends
_N_FIRST = 64  # examples that are searched for ground truth
_N_SAMPLES = 8  # readable ones among them that are enough


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

    Each image and method gives a row. Results are stored in ``output`` while they are computed, and
    exported to ``output/rows.csv`` at the end. A run that was killed at any moment continues when
    it is called again, and ends with the same ``rows.csv``, byte for byte. For that, batches have
    fixed images, and random numbers depend only on the seed, the batch, and the names of method and
    metric. (On other devices, or with another number of threads, models differ in the last bits.)
    `summary` reads the results at any time. A folder with results of other arguments is an error,
    and so is a second process or thread that writes to the folder.

    A run recognises your own functions (metrics, their options, `target`, options of methods, a
    model that is a plain function) by their module, name and attribute `version`: write
    ``sharpness.version = "1"`` below a function at the top of a module, and change it when the
    function changes. Lambdas, functions inside others and callables without a version are refused;
    `functools.partial` fixes arguments. Functions of torch and other libraries need no version.

    Some failures become rows with the reason, and the run continues: a picture that cannot be read,
    invalid ground truth, an error of a method or a metric, a map that is not finite or has another
    size than the image. If a batch raises an error, its images are explained one by one. Errors of
    the machine, such as too little memory, are raised.

    Args:
        methods: attributions of Captum or of this package by name, each with or without arguments
            of its `attribute`: ``{"IG": (IntegratedGradients(model), {"n_steps": 20})}``. Maps of
            layers are resized to the image by `UpsampleWrapper`. Each method explains its own
            model, on that model's device.
        data: examples with attributes `image`, `target` and optionally `boxes` (n, 4) or `box`,
            `mask` or `part` (H, W), `ignored` (H, W) and `name`; or tuples (picture, label) or
            (picture, label, boxes). Pictures are PIL images or tensors (C, H, W) of bytes or of
            floats in [0, 1]; boxes are (x1, y1, x2, y2) in the picture's pixels, half-open.
        metrics: one or more names, or a mapping from names to options:
            ``{"localization": {}, "insertion": {"step": 0.1}}``. "localization", the meaning of
            None, stands for those of "pointing_game", "energy", "max_box_acc", "max_box_acc_v2",
            "pxap" and "px_iou" for which there is ground truth. The following need additional
            passes of the model: "top_1_localization" and "top_5_localization" (a box counts only
            where the model is right), "insertion", "deletion", "overall_score" (insertion minus
            deletion), "average_drop", "increase_in_confidence", "road", and Captum's "infidelity"
            (to Gaussian `noise` of 0.1, or a `perturb_func`; normalised, because maps have
            different scales) and "sensitivity_max", which explains each image eleven times more.
            "total_variation" needs only the map. Other names map to your own functions of an
            `ExplainedBatch`, which return a number for each image; where lower is better, give them
            an attribute `higher_is_better = False`. The pointing game and the energy use boxes, or
            masks where there is no box. Maps are scaled to [0, 1] by their minimum and maximum for
            boxes, pixels and the total variation.
        output: a folder, which all processes share.
        size: (H, W) to resize pictures to, or one number for both; maps, boxes and masks have this
            size. None keeps pictures as they are, and explains those of one size together.
        normalize: (mean, std) of the channels, as the models expect pictures, or an object with
            attributes `mean` and `std`, such as the `preprocess` of
            `captum_ext.zoo.load_model()`; ImageNet's by default. None takes tensors of floats
            without change.
        target: the class to explain: each image's "label", the class "predicted" by the method's
            model, a function of the `PreparedExample`, or None for models with one output.
        batch_size: images that a method explains at once.
        seed: of all random numbers, including those of Captum's methods. Generators that methods
            were made with are seeded for each batch, and restored.
        num_workers: processes that read pictures, for each device.
        show_progress: whether to draw a progress bar.
        devices: their number, or a list of them. For more than one, Lightning's Fabric starts a
            process for each (the extra `train`), on GPUs where the models are on one; each process
            takes every n-th batch. Methods and data must pickle, unless the strategy forks.
        num_nodes: machines, each with that many devices.
        strategy: Fabric's, such as "ddp", "ddp_spawn" or "ddp_fork".

    Returns:
        The `Summary`: figures with intervals, differences, failures.

    Raises:
        ValueError: an argument out of range, an empty data set, a folder of another run.
        TypeError: methods that are no attributions.
        RuntimeError: all rows failed; another process or thread writes to the folder; the call is
            inside `torch.inference_mode`.

    Example:
        >>> from captum.attr import IntegratedGradients, LayerGradCam
        >>> methods = {"Grad-CAM": LayerGradCam(model, model.layer4),
        ...            "IG": IntegratedGradients(model)}  # doctest: +SKIP
        >>> result = evaluate(methods, data, output="run")  # doctest: +SKIP
        >>> print(result.markdown())  # doctest: +SKIP
    """
    if torch.is_inference_mode_enabled():
        raise RuntimeError("There are no gradients inside torch.inference_mode(): leave it first.")
    configured = configured_methods(methods)
    check_count("batch_size", batch_size)
    check_count("num_nodes", num_nodes)
    if not callable(target) and target is not None:
        check_choice("target", target, TARGETS)
    check_seed(seed)
    sides = None if size is None else height_width("size", size)
    if Path(output).exists() and not Path(output).is_dir():
        raise ArgumentError(f"`output` must be a folder, and {str(output)!r} is a file.")
    batches = ExampleBatches(data, batch_size, sides, normalize)
    samples = _sample_examples(batches)
    measures = make_measures(metrics, samples)
    digest_of = functools.cache(model_digest)  # for models that several methods explain
    settings = {
        "format": FORMAT,
        "examples": len(data),
        "batch_size": batch_size,
        "data": batches.fingerprint(),
        "size": sides,
        "normalize": None if normalize is None else _mean_std_lists(normalize),
        "target": versioned_name("`target`", target) if callable(target) else str(target),
        "seed": seed,
        "methods": {method.name: method_fingerprint(method, digest_of) for method in configured},
        "metrics": {m.name: json_value(f"`metrics`: {m.name}", m.options) for m in measures},
        "columns": {m.name: m.column_names() for m in measures},
    }
    _warn_of_missing_ground_truth(measures, samples)
    if target == "label" and samples:
        _warn_of_other_classes(configured, data, samples[0])
    columns, store = _distinct_columns(measures), ResultStore.create(output, settings)
    evaluation = EvaluationArguments(
        configured, columns, batches, store, target, seed, num_workers, show_progress
    )
    if devices == 1 and num_nodes == 1:
        result = _run_here(evaluation)
    else:
        _fabric(configured, devices, num_nodes, strategy).launch(_run_in_process, evaluation)
        result = _export_in_first_process(store)
    _check_failures(result, output)
    return result


def _sample_examples(batches: ExampleBatches) -> list[PreparedExample]:
    """Some of the first examples that can be read."""
    first = map(batches.example, range(min(_N_FIRST, len(batches.data))))
    return list(itertools.islice((e for e in first if isinstance(e, PreparedExample)), _N_SAMPLES))


def _mean_std_lists(normalize: Any) -> list[list[float]]:
    return [values.tolist() for values in mean_and_std(normalize, torch.float64)]


def _distinct_columns(measures: Sequence[Measure]) -> list[Columns]:
    """The columns of all measures; those that several measures share, once.

    Raises:
        ValueError: different columns with one name.
    """
    columns = {c.names: c for measure in measures for c in measure.columns}
    counts = Counter((*COLUMNS, *itertools.chain(*columns)))
    if duplicates := [name for name, count in counts.items() if count > 1]:
        raise ArgumentError(
            f"`metrics`: rows have columns {duplicates} already: choose other names."
        )
    return list(columns.values())


def _check_failures(result: Summary, output: str | Path) -> None:
    """Warn of failed rows, or raise a RuntimeError if all failed."""
    if not any(result.images.values()):
        raise AllFailedError(
            f"All {sum(result.failures.values())} rows failed. The first reason: "
            f"{next(iter(result.reasons.values()), None)}"
        )
    if any(result.failures.values()):
        warn(f"Some rows failed: {result.failures}. Their reasons are in {Path(output)}.")


def _warn_of_missing_ground_truth(
    measures: Sequence[Measure], samples: Sequence[PreparedExample]
) -> None:
    names = [m.name for m in measures if samples and not any(map(m.is_defined_for, samples))]
    if names:
        warn(f"`metrics` {names}: the first examples of `data` lack the boxes or masks for these.")


def _warn_of_other_classes(
    methods: Sequence[ConfiguredMethod], data: Any, example: PreparedExample
) -> None:
    """Warn where a data set and a model have different numbers of classes."""
    classes = getattr(data, "classes", None)
    if not isinstance(classes, Sized) or not len(classes):
        return
    for method in {id(m.forward_func): m for m in methods}.values():
        try:
            with torch.no_grad(), preserve_state(method.forward_func):
                scores = method.forward_func(example.image[None].to(*method.device_and_dtype))
        except Exception:  # of any kind; the rows have the reason
            return
        if scores.dim() == 2 and 1 < scores.shape[1] != len(classes):
            warn(
                f"`data` has {len(classes)} classes and the model of {method.name} has "
                f"{scores.shape[1]}: labels are taken for indices of the model's. ClassFolders "
                f"takes them in the model's order, and `target` 'predicted' needs none."
            )


def _run_here(evaluation: EvaluationArguments) -> Summary:
    """Run in this process alone, which may be one of several that the caller started."""
    with ResultWriter(evaluation.store, 0) as writer:
        run_share(evaluation, remaining_methods(evaluation), writer)
    return _export(evaluation.store)


# --- several processes ---------------------------------------------------------------------------


def _fabric(
    methods: Sequence[ConfiguredMethod], devices: Any, num_nodes: int, strategy: Any
) -> Any:
    try:
        from lightning.fabric import Fabric
    except ModuleNotFoundError as error:
        raise ImportError(
            'Several devices need Lightning: pip install "captum_ext[train]".'
        ) from error
    device, _ = methods[0].device_and_dtype
    return Fabric(accelerator=device.type, devices=devices, num_nodes=num_nodes, strategy=strategy)


def _run_in_process(fabric: Any, evaluation: EvaluationArguments) -> None:
    """Explain the share of one process. Shares may differ in size: only the folder is shared."""
    old_devices = [method.device_and_dtype[0] for method in evaluation.methods]
    methods = [move_to_device(fabric.device, method) for method in evaluation.methods]
    # Some shares take longer than others, and the default timeout is half an hour.
    group = _patient_group()
    rank, n_processes = fabric.global_rank, fabric.world_size
    try:
        with ResultWriter(evaluation.store, rank) as writer:
            # All processes use the list of the first: later ones would see new results.
            remaining = fabric.broadcast(remaining_methods(evaluation) if rank == 0 else None)
            share = evaluation._replace(methods=methods)
            run_share(share, remaining, writer, rank, n_processes)
    finally:
        for method, device in zip(evaluation.methods, old_devices, strict=True):
            move_to_device(device, method)
    if group is not None:
        dist.barrier(group)


def _export(store: ResultStore) -> Summary:
    store.export()
    return summary(store.folder)


def _export_in_first_process(store: ResultStore) -> Summary:
    """The summary. With "ddp" each process continues here, and the first one makes it for all."""
    group = _patient_group()
    if group is None:
        return _export(store)
    result = [_export(store) if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(result, src=0, group=group)
    assert result[0] is not None
    return result[0]


def _patient_group() -> Any:
    """A group of all processes with a long timeout; None if there is only one process."""
    if not dist.is_available() or not dist.is_initialized():
        return None
    return dist.new_group(backend="gloo", timeout=_PATIENCE)
