"""F-CAM, perception and features."""

import tempfile
from collections.abc import Callable
from functools import partial
from importlib import import_module
from typing import Any

import torch
from captum import attr as captum
from subjects import (
    QUIET,
    TARGETS,
    Calls,
    anew,
    fixed,
    images,
    in_words,
    late,
    maps,
    net,
    resnet,
    transformer,
)
from torch import Tensor


def fcam() -> Calls:
    attr, fcam = import_module("captum_ext.attr"), import_module("captum_ext.fcam")
    datasets, infill = import_module("captum_ext.datasets"), import_module("captum_ext.infill")
    model, x = resnet(), images(2, 64, 80)

    def decoder(model: Any = model, x: Tensor = x, **options: Any) -> Any:
        options = {"widths": (12, 8, 8, 4, 4)} | options
        return fcam.FCAMDecoder.reading(model, x, **options).eval()

    for options in ({}, {"center": True}, {"layers": ["layer1", "layer3"]}):
        words = in_words(options)
        yield (
            f"FCAM: {words}",
            partial(lambda o: attr.FCAM(model, decoder(**o)).attribute(x, target=TARGETS), options),
        )
    yield "FCAM: foreground", lambda: attr.FCAM(model, decoder()).foreground(x)
    yield "find_taps", lambda: fcam.find_taps(model, x)

    def fit(guide: Callable[[Any], Any], **options: Any) -> Any:
        small, seeds = net(), fcam.SeedSampler(4, 4)
        scenes = datasets.TexturedEllipses(12, 0, (40, 40))
        data = [(scene.image, scene.target) for scene in scenes]
        options = {"size": 32, "batch_size": 4, "n_epochs": 2, "seeds": seeds} | QUIET | options
        layers = ["relu1", "relu2"]
        fitted = fcam.fit_fcam(small, data, guide(small), layers=layers, widths=(6, 4), **options)
        return fitted.decoder, fitted.attribute(images(), target=TARGETS)

    guides = {
        "Grad-CAM": lambda m: captum.LayerGradCam(m, m.conv2),
        "LayerCAM": lambda m: attr.LayerCam(m, "relu2"),
        "CAM": lambda m: attr.UpsampleWrapper(attr.LayerClassActivationMap(m, "relu2")),
    }
    yield "fit_fcam: Grad-CAM", partial(fit, guides["Grad-CAM"])
    yield "fit_fcam: LayerCAM, crops", partial(fit, guides["LayerCAM"], resize=40, seed=3)

    def fit_cached() -> Any:
        boxed = datasets.TexturedEllipses(6, 1, (40, 40))
        with tempfile.TemporaryDirectory() as folder:
            cached = {"cache": f"{folder}/maps", "checkpoints": f"{folder}/run"}
            return fit(guides["CAM"], resize=40, n_epochs=3, validation=boxed, **cached)

    yield "fit_fcam: CAM, cache, checkpoints, validation", fit_cached

    def with_gradient(loss: Callable[[Tensor], Tensor]) -> Any:
        p = maps(2, 24)[:, None].clamp(0.01, 0.99).requires_grad_()
        value = loss(p)
        return value, torch.autograd.grad(value.sum(), p)[0]

    y = images(2, 24)
    for name, options in (
        *(("dense_crf_loss", o) for o in ({}, {"side": 12}, {"n_anchors": 50, "generator": fixed})),
        *(("local_crf_loss", o) for o in ({}, {"radius": 3, "sigma_rgb": 10.0})),
    ):  # fmt: skip
        yield (
            f"{name}: {in_words(options)}",
            partial(
                lambda n, o: with_gradient(lambda p: getattr(fcam, n)(p, y, **anew(o))),
                name,
                options,
            ),
        )
    yield "size_loss", lambda: with_gradient(lambda p: fcam.size_loss(p, t=2.0))
    yield "log_barrier", lambda: fcam.log_barrier(torch.linspace(-2, 2, 21), 3.0)
    seeds = torch.tensor([0, 1, -255])[torch.randint(3, (2, 24, 24), generator=fixed())]
    yield (
        "partial_cross_entropy",
        lambda: with_gradient(
            lambda p: fcam.partial_cross_entropy(torch.cat([p, 1 - p], 1), seeds)
        ),
    )
    yield "otsu", lambda: fcam.otsu((255 * maps(2, 24)).long().flatten(1))
    for options in ({}, {"n_foreground": 3, "n_background": 5, "n_minus": 0.5, "erosion": 3}):
        yield (
            f"SeedSampler: {in_words(options)}",
            partial(lambda o: fcam.SeedSampler(**o)(maps(2, 24)[:, None], fixed()), options),
        )
    for name in ("gaussian", "channel_means", "local_mean"):
        keep = (maps(2, 24)[:, None] > 0.5,) if name == "local_mean" else ()
        yield f"infill.{name}", partial(lambda n, k: getattr(infill, n)(y, *k), name, keep)


def perception() -> Calls:
    p, datasets = import_module("captum_ext.perception"), import_module("captum_ext.datasets")
    model, x, target = resnet(), images(2, 64, 80), {"target": TARGETS}

    def encoder(layer: str = "layer3", model: Any = model) -> Any:
        return p.LayerEncoder(model, layer)

    def picture(options: Any = None, call: str = "visualize") -> Any:
        decoder = p.PerceptionDecoder.reading(encoder(), x, widths=(8, 6, 4, 4)).eval()
        method = captum.LayerGradCam(model, model.layer4)
        made = p.PerceptionVisualization(method, encoder(), decoder, **options or {})
        return getattr(made, call)(x, **(target if call in ("visualize", "mask") else {}))

    for layer in ("layer1", "layer4"):
        yield f"LayerEncoder: {layer}", partial(lambda n: encoder(n)(x), layer)
    yield "LayerEncoder: pictures", lambda: encoder().pictures(x)
    for options in ({}, {"scale": "min-max", "threshold": 0.3, "gamma": 0.6, "background": 0.0}):
        yield f"PerceptionVisualization: {in_words(options)}", partial(picture, options)
    for call in ("reconstruct", "mask", "quality"):
        yield f"PerceptionVisualization.{call}", partial(picture, call=call)
    a, b = (maps(6, 24, seed=s).view(2, 3, 24, 24) for s in (0, 1))
    yield "structural_similarity", lambda: p.structural_similarity(a, b)
    yield "deep_similarity", lambda: p.deep_similarity(a, b)
    yield "perception_loss", lambda: p.perception_loss(a, b, a.square(), b.square())
    yield "composite", lambda: p.composite(a, b[:, :1], 0.3)

    def fit() -> Any:
        data = [scene.image for scene in datasets.TexturedEllipses(12, 0, (40, 40))]
        options = {"size": 32, "n_epochs": 2, "batch_size": 4, "widths": (6,), "convolutions": (1,)}
        return p.fit_perception(encoder("relu2", net()), data, **options, **QUIET)

    yield "fit_perception", fit


def features() -> Calls:
    features = import_module("captum_ext.features")
    data = [(picture, 0) for picture in maps(30, 56).view(10, 3, 56, 56)]
    ln = "encoder.layers.encoder_layer_1.ln_1"
    tokens = {"reshape_transform": late("attr", "tokens_to_grid")}

    def patches(model: Any, layer: str, **options: Any) -> Any:
        options = {"n": 3, "size": 32, "units": [0, 5, 2], "batch_size": 4} | options
        patches = features.maximally_activating_patches(model, layer, data, **options)
        return patches, patches.crops(data, unit=5), patches.picture_boxes(data, unit=5)

    for model, layer, options in (
        (net(), "relu1", {}), (net(), "relu2", {"per_image": 2}), (net(), "gap", {}),
        (net(), "relu2", {"receptive_field": "effective", "energy": 0.8}),
        (net(), "relu2", {"receptive_field": "image", "shard": (1, 2)}),
        (resnet(), "layer2", {"size": (64, 48), "units": [5, 100]}), (transformer(), ln, tokens),
    ):  # fmt: skip
        words = in_words({"layer": layer} | options)
        yield f"maximally_activating_patches: {words}", partial(patches, model, layer, **options)

    def top(per_image: int) -> Any:
        top = features.TopActivations(3, per_image)
        for i in range(0, 6, 2):
            activations = maps(6, 8).view(6, 1, 8, 8)[i : i + 2].repeat(1, 2, 1, 1)
            top.update(activations, torch.arange(i, i + 2))
        return top.values, top.places, top.positions

    yield "TopActivations", partial(top, 1)
    yield "TopActivations: two of an image", partial(top, 2)

    def maximize(layer: Any, options: Any, target: Any = TARGETS, start: Any = (3, 32, 32)) -> Any:
        options = anew({"n_steps": 6, "noise": 0.1, "generator": fixed} | options)
        made = features.ActivationMaximization(net(), layer, normalize=options.pop("norm", None))
        return made.maximize(start, target, **options)

    norm = ((0.5, 0.5, 0.5), (0.25, 0.25, 0.25))
    for layer, options, *rest in (
        (None, {}), (None, {"parametrization": "pixel", "tv": 0.01, "jitter": 0}),
        (None, {"norm": norm, "clip": True}), (None, {"optimizer": "gradient", "lr": 0.1}),
        (None, {"optimizer": "normalized", "blur_every": 2}, TARGETS, images()),
        ("relu2", {}, [2, 3]), ("relu1", {"parametrization": "pixel"}, (1, 7, 6)),
    ):  # fmt: skip
        words = in_words({"layer": layer} | options)
        yield f"ActivationMaximization: {words}", partial(maximize, layer, options, *rest)
