"""Layer CAMs, methods that perturb, and wrappers."""

import copy
from collections.abc import Callable
from functools import partial
from importlib import import_module
from typing import Any

import torch
from captum import attr as captum
from subjects import (
    TARGETS,
    Calls,
    Two,
    anew,
    fixed,
    images,
    in_words,
    late,
    maps,
    net,
    other_models,
    resnet,
    transformer,
)
from torch import Tensor, nn

GRADIENT = ("LayerTokenGradCam", "LayerGradCamPlusPlus", "LayerSmoothGradCamPlusPlus")
GRADIENT += ("LayerXGradCam", "LayerCam", "LayerSharpenFocus", "LayerHiResCam")
MASKING = ("LayerScoreCam", "LayerAblationCam", "LayerGroupCam")
EIGEN, CAM = ("LayerEigenCam",), ("LayerClassActivationMap",)
EVERY = GRADIENT + MASKING + EIGEN + CAM
FEWER = {"LayerSmoothGradCamPlusPlus": {"n_samples": 3}, "LayerGroupCam": {"groups": 3}}


def layer_cams() -> Calls:
    attr = import_module("captum_ext.attr")

    def explain(name: str, model: Any, layer: Any, x: Any, options: Any, **kwargs: Any) -> Any:
        options = FEWER.get(name, {}) | anew(options)
        return getattr(attr, name)(model, layer, **options).attribute(x, **kwargs)

    def second(name: str, model: Any, layer: str) -> Tensor:
        x = images().requires_grad_()
        kwargs = {"target": TARGETS, "grad_kwargs": {"create_graph": True}}
        maps = explain(name, model, layer, x, {}, **kwargs)
        return torch.autograd.grad(maps.square().sum(), x)[0]

    def frozen(name: str) -> Tensor:
        model = copy.deepcopy(small).requires_grad_(False)
        with torch.no_grad():
            return explain(name, model, "relu2", images(), {}, target=TARGETS)

    small, x, gain = net(), images(), torch.tensor([1.0, -2.0])
    torch.manual_seed(4)
    dense = nn.Sequential(nn.Conv2d(3, 6, 3), nn.Tanh(), nn.Conv2d(6, 4, 3)).eval()
    x1, x3 = torch.randn(2, 3, 20), torch.randn(2, 3, 6, 8, 10)
    tokens = {"reshape_transform": late("attr", "tokens_to_grid")}
    head, ln = {"head": "fc"}, "encoder.layers.encoder_layer_1.ln_1"
    at, extra = {"target": TARGETS}, {"additional_forward_args": (None, gain)}
    swin, mobile = other_models()
    few_methods = ("LayerHiResCam", "LayerGradCamPlusPlus", *MASKING)
    last = {"reshape_transform": late("attr", "channels_last_to_first")}
    for case, names, model, layer, inputs, options, kwargs in (
        ("small", EVERY, small, "relu2", x, {}, at),
        ("several layers", EVERY[:-1], small, ["relu1", small.relu2], x, {}, at),
        ("layer input", EVERY[:-1], small, "conv2", x, {}, at | {"attribute_to_layer_input": True}),
        ("CAM at input", CAM, small, "gap", x, {}, at | {"attribute_to_layer_input": True}),
        *((f"relu {n}", (n,), small, "relu2", x, {}, at | {"relu_attributions": True})
          for n in EVERY if n != "LayerGroupCam"),
        ("channels", GRADIENT + CAM, small, "relu2", x, {}, at | {"attr_dim_summation": False}),
        ("float64", EVERY, net(dtype=torch.double), "relu2", x.double(), {}, at),
        ("bf16", EVERY, net(dtype=torch.bfloat16), "relu2", x.bfloat16(), {}, at),
        ("1-D", EVERY, net(1), "relu2", x1, {}, at),
        ("3-D", EVERY, net(3), "relu2", x3, {}, at),
        ("resnet layer4", EVERY, resnet(), "layer4", images(2, 64, 96), {}, at),
        ("resnet layer2", GRADIENT + EIGEN, resnet(), "layer2", images(2, 64, 96), {}, at),
        ("tokens", EVERY[:-1], transformer(), ln, images(2, 32), tokens, at),
        ("function", EVERY[:-1], lambda x: small(x) + 0.5, small.relu2, x, {}, at),
        ("arguments", EVERY[:-1], small, "relu2", x, {}, at | extra),
        ("tuple", EVERY, small, "relu2", (x, images(seed=1)), {}, at),
        ("tensor of targets", EVERY, small, "relu2", x, {}, {"target": torch.tensor(TARGETS)}),
        ("one target", EVERY, small, "relu2", x, {}, {"target": 1}),
        ("dense output", EVERY[:-1], dense, "0", x, {}, {"target": [(1, 2, 3), (0, 9, 20)]}),
        ("no vmap", EVERY, net(branches=True), "relu2", x, {}, at),
        ("train mode", EVERY[:-1], copy.deepcopy(small).train(), "relu2", x, {}, at),
        ("fp16", EVERY, net(dtype=torch.half), "relu2", x.half(), {}, at),
        ("layer of two tensors", few_methods, Two().eval(), "both", x, {}, at),
        ("two tensors at input", few_methods, Two().eval(), "join", x, {},
         at | {"attribute_to_layer_input": True}),
        ("channels last", few_methods, swin, "features.1", images(2, 32), last, at),
        ("mobilenet", few_methods, mobile, "features.7", images(2, 64), {}, at),
    ):  # fmt: skip
        for name in names:
            yield f"{name}: {case}", partial(explain, name, model, layer, inputs, options, **kwargs)
    for name in GRADIENT:
        yield f"{name}: second derivative", partial(second, name, small, "relu2")
        yield f"{name}: second derivative, tanh", partial(second, name, net(bounded=True), "conv2")
        yield f"{name}: frozen, no_grad", partial(frozen, name)
    groups, b = torch.tensor([0, 1, 0, 1, 2, 2, 2, 0]), images(seed=3)
    for name, options, kwargs in (
        *(("LayerScoreCam", {"score": s, "weighting": w}, {})
          for s in ("logit", "softmax", "sigmoid") for w in ("softmax", "increase", "score")),
        ("LayerScoreCam", {"score": torch.sin}, {"perturbations_per_eval": 3}),
        *(("LayerScoreCam", {}, {"baselines": baselines}) for baselines in (0.5, b, b[:1])),
        *(("LayerGroupCam", {"groups": g, "score": s}, {"baselines": b})
          for g in (1, 5, groups) for s in ("softmax", "logit")),
        *(("LayerGroupCam", {}, {"baselines": baselines, "perturbations_per_eval": 2})
          for baselines in (0.5, b)),
        *(("LayerAblationCam", {"score": s}, {}) for s in ("softmax", "sigmoid", torch.sin)),
        *(("LayerAblationCam", {"divide_by_score": d}, {"perturbations_per_eval": n})
          for d, n in ((False, 16), (True, 1), (True, 3))),
        *(("LayerAblationCam", {}, {"layer_baselines": fill})
          for fill in ("min", 0.3, torch.linspace(-1, 1, 8)[:, None, None])),
        ("LayerEigenCam", {"center": True}, {}),
        ("LayerClassActivationMap", head, {}),
        *(("LayerSmoothGradCamPlusPlus", {"generator": fixed, "samples_per_eval": n}, {})
          for n in (1, 2)),
        ("LayerSmoothGradCamPlusPlus", {"stdev_spread": 0.5, "n_samples": 4}, {}),
    ):  # fmt: skip
        label = f"{name}: {in_words(options | kwargs)}"
        yield label, partial(explain, name, small, "relu2", x, options, **(at | kwargs))
    for label, model in (("small", small), ("resnet", resnet()), ("transformer", transformer())):
        yield f"suggest_layer: {label}", partial(lambda m: attr.suggest_layer(m), model)


def perturbation() -> Calls:
    attr, tta = import_module("captum_ext.attr"), import_module("captum_ext.tta")
    x, model = images(2, 64, 72), resnet()

    def rise(x: Any, options: Any = None, model: Any = model, **kwargs: Any) -> Any:
        return attr.RISE(model, **options or {}).attribute(
            x, **anew({"target": TARGETS, "n_masks": 50, "generator": fixed} | kwargs)
        )

    for options, kwargs in (
        *(({}, k) for k in ({}, {"estimator": "self-normalized"}, {"generator": None})),
        *(({}, k) for k in ({"p": 0.2, "grid": (3, 5)}, {"baselines": 0.5}, {"target": 4})),
        ({}, {"tolerance": 0.02, "n_masks": 200, "perturbations_per_eval": 7}),
        *(({"score": s}, {}) for s in ("logit", "sigmoid", torch.sin)),
    ):
        yield f"RISE: {in_words(options | kwargs)}", partial(rise, x, options, **kwargs)
    yield "RISE: 1-D", partial(rise, torch.randn(2, 3, 20), model=net(1), grid=4)
    yield "RISE: 3-D", partial(rise, torch.randn(2, 3, 6, 8, 10), model=net(3), grid=3)
    yield "RISE: float64", partial(rise, x.double(), model=net(dtype=torch.double))
    yield "RISE: bf16", partial(rise, x.bfloat16(), model=net(dtype=torch.bfloat16))
    yield (
        "RISE: estimate",
        lambda: attr.RISE(model).estimate(
            x, [0, TARGETS, 5], n_masks=40, tolerance=0.05, generator=fixed()
        ),
    )

    def fido(options: Any = None, model: Any = model, x: Tensor = x, **kwargs: Any) -> Any:
        kwargs = {"target": TARGETS, "n_steps": 4, "n_masks": 2, "generator": fixed} | kwargs
        return attr.FIDO(model, **options or {}).attribute(x, return_masks=True, **anew(kwargs))

    for kwargs in (
        *({"objective": o, "dropout": d} for o in ("ssr", "sdr", "joint") for d in ("scd", "cd")),
        *({"baselines": b} for b in ("blur", "mean", "zeros", "local", "noise", 0.5)),
        {"mask_size": 8}, {"mask_size": (9, 7), "internal_batch_size": 1}, {"generator": None},
        {"temperature": 0.1, "tv_norm": "l2", "warmup": 2, "l1": 1e-3, "lr": 1.0, "eps": 0.5},
    ):  # fmt: skip
        yield f"FIDO: {in_words(kwargs)}", partial(fido, **kwargs)
    yield "FIDO: released", lambda: fido(**{**attr.FIDO.RELEASED, "n_steps": 2})
    yield "FIDO: paper", lambda: fido(**{**attr.FIDO.PAPER, "n_steps": 2})
    prob = nn.Sequential(net(), nn.Softmax(1))
    yield "FIDO: probabilities", partial(fido, {"outputs": "probabilities"}, prob, images())
    yield "FIDO: float64", partial(fido, {}, net(dtype=torch.double), images().double())

    m = maps(2, 64)
    for kwargs in (
        {}, {"sigma": 2.0}, {"margin": 3, "square": True}, {"threshold": 0.8, "min_size": 20},
    ):  # fmt: skip
        yield f"mask_boxes: {in_words(kwargs)}", partial(lambda k: tta.mask_boxes(m, **k), kwargs)
    y, big = images(2, 64), images(2, 96, seed=1)
    for kwargs in (
        {}, {"score": "logit", "sigma": 2.0, "square": True}, {"size": (48, 56)},
        {"originals": big}, {"originals": big, "views": torch.tensor([[8, 4, 72, 68]] * 2)},
        {"margin": 4, "internal_batch_size": 1},
    ):  # fmt: skip
        yield (
            f"crop_tta: {in_words(kwargs)}",
            partial(lambda k: tta.crop_tta(model, y, m, **k), kwargs),
        )


def wrappers() -> Calls:
    attr = import_module("captum_ext.attr")
    model, small, x = resnet(), net(), images(2, 72, 96)
    bases: dict[str, Callable[[], Any]] = {
        "Grad-CAM": lambda: captum.LayerGradCam(model, model.layer3),
        "layers": lambda: attr.LayerCam(model, ["layer3", "layer4"]),
        "LayerCAM": lambda: attr.UpsampleWrapper(bases["layers"](), fuse="mean"),
        "ours": lambda: attr.LayerTokenGradCam(model, "layer3"),
        "Score-CAM": lambda: attr.LayerScoreCam(small, "relu2"),
        "IG": lambda: captum.IntegratedGradients(model),
        "Saliency": lambda: captum.Saliency(small),
        "Occlusion": lambda: captum.Occlusion(small),
        "RISE": lambda: attr.RISE(small),
        "SR": lambda: attr.AugmentedSR(
            captum.LayerGradCam(model, model.layer3), n_augmentations=3, max_iterations=5
        ),
    }
    extra: dict[str, dict[str, Any]] = {
        "IG": {"n_steps": 3, "baselines": 0.1},
        "Occlusion": {"sliding_window_shapes": (3, 16, 16), "strides": (3, 8, 8)},
        "RISE": {"n_masks": 12, "grid": 4, "generator": fixed},
    }

    def wrap(name: str, base: str, options: Any, noise: bool = False, **kwargs: Any) -> Any:
        kwargs = anew({"target": TARGETS} | extra.get(base, {}) | kwargs)
        method = getattr(attr, name)(bases[base](), **anew(options))
        if noise:
            method, kwargs = captum.NoiseTunnel(method), kwargs | {"nt_samples": 2, "stdevs": 0.1}
        return method.attribute(x, **kwargs)

    sess = {"scales": (64, 80), "window": 64}
    sr = {"n_augmentations": 5, "max_iterations": 8, "generator": fixed}
    for name, base, default, options in (
        *(("UpsampleWrapper", "layers", {}, {"mode": m})
          for m in ("bilinear", "bicubic", "nearest", "nearest-exact", "area")),
        *(("UpsampleWrapper", "layers", {}, {"fuse": f, "normalize": n})
          for f in ("max", "mean") for n in ("none", "minmax", "tanh")),
        ("UpsampleWrapper", "Grad-CAM", {}, {"align_corners": True}),
        ("UpsampleWrapper", "Score-CAM", {}, {}),
        *(("SESSWrapper", b, sess, {}) for b in ("Grad-CAM", "LayerCAM", "ours", "Score-CAM")),
        *(("SESSWrapper", b, sess, {}) for b in ("IG", "Saliency", "Occlusion", "RISE", "SR")),
        *(("SESSWrapper", "ours", sess, {"fusion": f, "theta": t})
          for f, t in (("soft", 0.1), ("reference", 0.1), ("coverage", 0), ("weighted", 0))),
        *(("SESSWrapper", "Grad-CAM", sess, {"pool": p, "sign": s})
          for p, s in (("max", "positive"), ("max", "negative"), ("mean", "absolute"))),
        *(("SESSWrapper", "Saliency", sess, {"channel_reduction": r, "percentile": 90.0})
          for r in ("sum", "max_abs")),
        *(("SESSWrapper", "ours", sess, {"score": s}) for s in ("sigmoid", "logit")),
        ("SESSWrapper", "Grad-CAM", sess, {"pre_filter_ratio": 0.5, "smooth": False}),
        ("SESSWrapper", "ours", sess, {"step": 24, "antialias": True, "final_norm": True}),
        ("SESSWrapper", "ours", sess, {"align": "rf", "sign": "signed", "internal_batch_size": 2}),
        ("SESSWrapper", "ours", {}, {"n_scales": 3, "window": (40, 48)}),
        ("SESSWrapper", "ours", {}, {"scales": "sqrt2", "window": 48}),
        *(("AugmentedSR", "Grad-CAM", sr, {"mode": m})
          for m in ("auto", "sr", "mean", "max", "single")),
        *(("AugmentedSR", "IG", sr, {"mode": m, "fill": f})
          for m, f in (("tta", "border"), ("mean", "reflection"), ("max", 0.3))),
        *(("AugmentedSR", "ours", sr, {"solver": s}) for s in ("mfista", "condat-vu", "adam")),
        *(("AugmentedSR", "ours", sr, {"downsample": d}) for d in ("bilinear", "gaussian", (4, 5))),
        *(("AugmentedSR", "ours", sr, {"normalize": n, "sign": s})
          for n, s in (("per_map", "signed"), ("none", "absolute"))),
        ("AugmentedSR", "ours", sr, {"preset": "official", "align": "rf"}),
        ("AugmentedSR", "LayerCAM", sr, {"sr_size": 40, "internal_batch_size": 3}),
        ("AugmentedSR", "Occlusion", sr, {"mode": "sr", "downsample": 8}),
        ("AugmentedSR", "Grad-CAM", sr, {"generator": None}),
    ):  # fmt: skip
        yield f"{name}({base}): {in_words(options)}", partial(wrap, name, base, default | options)
    yield "SESSWrapper: coverage", partial(wrap, "SESSWrapper", "ours", sess, return_coverage=True)
    yield "AugmentedSR: history", partial(wrap, "AugmentedSR", "ours", sr, return_history=True)
    for name, default in (("UpsampleWrapper", {}), ("SESSWrapper", sess), ("AugmentedSR", sr)):
        yield f"NoiseTunnel({name})", partial(wrap, name, "Grad-CAM", default, noise=True)
