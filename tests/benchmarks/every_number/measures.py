"""Metrics, evaluation, data sets and imaging."""

import tempfile
from functools import partial
from importlib import import_module
from typing import Any

import numpy as np
import torch
from captum import attr as captum
from subjects import (
    QUIET,
    Calls,
    anew,
    fixed,
    images,
    in_words,
    maps,
    net,
    resnet,
)
from torch import Tensor


def metrics() -> Calls:
    m = import_module("captum_ext.metrics")
    model, x, a = resnet(), images(4, 48, seed=2), maps(4, 48, seed=3)
    target, masks = [1, 3, 0, 7], maps(4, 48, seed=4) > 0.6
    ignored = maps(4, 48, seed=5) > 0.9
    boxes = [torch.tensor([[5, 6, 30, 40]]), torch.tensor([[0, 0, 9, 9], [20, 10, 48, 33]])] * 2
    box, tv = torch.tensor([[3, 4, 20, 20]]).repeat(4, 1), ("squared", "absolute")

    def faith(name: str, a: Tensor = a, **options: Any) -> Any:
        return getattr(m, name)(model, x, a, target, **anew(options))

    by_curve = {"insertion": "Insertion", "deletion": "Deletion", "overall_score": "Overall"}
    by_map = {"average_drop": "AverageDrop", "increase_in_confidence": "IncreaseInConfidence"}
    for name, cls in (*by_curve.items(), *by_map.items(), ("road", "Road")):
        for options in (
            {}, {"score": "sigmoid"}, {"generator": fixed}, {"internal_batch_size": 3},
            *([] if name in ("average_drop",) else [{"score": "logit"}]),
            *([{"step": 100}, {"step": 0.3}] if name in by_curve else []),
            *([{"baselines": b, "generator": fixed} for b in ("mean", "noise", "local", 0.5)]
              if name not in ("overall_score", "road") else []),
            *([{"percentiles": (5, 55), "noise": 0.1}] if name == "road" else []),
        ):  # fmt: skip
            yield f"{name}: {in_words(options)}", partial(faith, name, **options)
        yield f"{name}: signed, channels", partial(faith, name, x * a[:, None])

        def mean(name: str, cls: str) -> Any:
            metric = getattr(m, cls)()
            metric.update(faith(name))
            metric.update(faith(name, a.square().flip(2)))
            return metric.compute()

        yield cls, partial(mean, name, cls)
    keep = (maps(4, 48) > 0.5)[:, None]
    for name, args in (
        ("pointing_game", (a, masks)), ("pointing_game", (a, masks, 0)),
        ("energy_pointing_game", (a, masks)), ("mask_iou", (a > 0.5, masks)),
        *(("total_variation", (a[:, None], norm)) for norm in tv), ("box_from_map", (a,)),
        ("box_from_map", (a, 0.6)), ("best_box_iou", (box, boxes)), ("pixel_counts", (a, masks)),
        ("pixel_counts", (a, masks, ignored)), ("pixel_iou", (a, masks, ignored)),
        ("boxes_to_masks", (boxes, (48, 40))), ("masks_to_boxes", (masks,)),
        ("center_gaussian", ((9, 12), 0.3)), ("linear_imputation", (x, keep)),
        *(("in_top_k", (x[:, 0, 0], torch.tensor(target), k)) for k in (5, 20)),
        *(("box_ious", (a, boxes, c, v)) for c in ("largest", "all")
          for v in ("components", "wsolevaluation")),
    ):  # fmt: skip
        words = in_words({i: arg for i, arg in enumerate(args) if not isinstance(arg, Tensor)})
        yield (
            f"{name}: {words}, {len(args)}",
            partial(lambda n, args: getattr(m, n)(*args), name, args),
        )

    def figure(name: str, options: Any, truth: Any, readings: Any = ("compute",)) -> Any:
        metric = getattr(m, name)(**options)
        for i in (0, 2):
            metric.update(a[i : i + 2], *(t[i : i + 2] for t in truth))
        return [getattr(metric, reading)() for reading in readings]

    three = {"iou_thresholds": (0.3, 0.5, 0.7), "contours": "all"}
    right = torch.tensor([True, False, True, True])
    for name, options, *rest in (
        ("PointingGame", {"tolerance": 3}, (masks,)), ("EnergyPointingGame", {}, (masks,)),
        *((n, {"num_classes": 8, "average": "macro"}, (masks, torch.tensor(target), right))
          for n in ("PointingGame", "EnergyPointingGame")),
        ("MaxBoxAcc", {}, (boxes,)), ("MaxBoxAcc", three, (boxes,), ("compute", "curves")),
        ("MaxBoxAcc", {"iou_thresholds": (0.1,), "convention": "wsolevaluation"}, (boxes, right)),
        ("PxAP", {}, (masks,)), ("PxAP", {"sync_on_compute": False}, (masks, ignored)),
        ("PxIoU", {}, (masks, ignored), ("compute", "curve", "threshold")),
    ):  # fmt: skip
        yield f"{name}: {in_words(options)}, {len(rest[0])}", partial(figure, name, options, *rest)


def evaluation() -> Calls:
    ev, attr = import_module("captum_ext.evaluation"), import_module("captum_ext.attr")
    datasets = import_module("captum_ext.datasets")
    names = ["localization", "top_1_localization", "top_5_localization", "insertion", "deletion"]
    names += ["overall_score", "average_drop", "increase_in_confidence", "road"]
    names += ["infidelity", "sensitivity_max", "total_variation"]

    def run(metrics: Any, **options: Any) -> Any:
        model, data = net(), datasets.TexturedEllipses(7, 0, (40, 40))
        methods = {
            "LayerCAM": attr.UpsampleWrapper(attr.LayerCam(model, "relu2")),
            "IG": (captum.IntegratedGradients(model), {"n_steps": 3}),
            "RISE": (attr.RISE(model), {"n_masks": 20}),
        }
        with tempfile.TemporaryDirectory() as folder:
            options = {"output": folder, "size": 32, "batch_size": 3} | QUIET | options
            result = ev.evaluate(methods, data, metrics, **options)
            again = ev.summary(folder, against="IG", resamples=50)
        parts = (result, again)
        return [(s.figures, s.differences, s.images, s.failures, s.curves) for s in parts]

    yield "evaluate: localization", partial(run, None)
    yield "evaluate: every metric", partial(run, names, seed=3)
    yield (
        "evaluate: options, predicted target",
        partial(
            run,
            {"pointing_game": {"tolerance": 3}, "insertion": {"step": 0.25}},
            target="predicted",
        ),
    )


def datasets_and_imaging() -> Calls:
    d, imaging = import_module("captum_ext.datasets"), import_module("captum_ext.imaging")

    def examples(name: str, *args: Any) -> Any:
        return [
            (np.array(e.image), e.target, e.name, e.boxes, e.mask) for e in getattr(d, name)(*args)
        ]

    for name, args in (
        ("TexturedEllipses", (3, 0)), ("TexturedEllipses", (3, 1, (40, 50), "half", False)),
        ("FineGrainedParts", (3, 0, (64, 64))), ("PastedScenes", (3, 0, "mixed", (160, 200))),
    ):  # fmt: skip
        yield f"{name}{args}", partial(examples, name, *args)
    yield (
        "train_classifier",
        lambda: d.train_classifier(d.TexturedEllipses(24, 0), n_epochs=1, batch_size=8),
    )
    x = images(2, 20, 24)
    turn = torch.tensor([[[0.9, -0.2, 1.5], [0.2, 0.9, -2.0]]]).repeat(2, 1, 1)
    for name, options in (
        *(("resize", {"size": s, "mode": m}) for s in ((33, 11), (20, 24), (7, 50))
          for m in ("bilinear", "bicubic", "nearest", "nearest-exact", "area")),
        *(("resize", {"size": (9, 40), "antialias": a, "align_corners": c, "mode": m})
          for a, c in ((True, False), (False, True)) for m in ("bilinear", "bicubic")),
        ("lay_over", {"size": (31, 29), "offset": (1.5, -2.25)}),
        *(("warp", {"matrices": turn, "mode": m, "fill": f}) for m in ("bilinear", "nearest")
          for f in ("zeros", "border", "reflection", 0.5)),
        ("blur", {}), ("blur", {"kernel_size": 5, "sigma": 1.0}), ("percentile", {"q": 90.0}),
        ("one_channel", {}), ("min_max", {}),
    ):  # fmt: skip
        yield (
            f"imaging.{name}: {in_words(options)}",
            partial(lambda n, o: getattr(imaging, n)(x, **o), name, options),
        )
    for shape, size in (((2, 3, 9), (20,)), ((2, 3, 4, 5, 6), (7, 9, 3))):
        yield (
            f"imaging.resize: {len(size)}-D",
            partial(lambda s, size: imaging.resize(torch.randn(s), size), shape, size),
        )
