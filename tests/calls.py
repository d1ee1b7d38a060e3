"""One call of everything that computes, by name, for tests that change its surroundings.

A call takes the `Subjects`, which are made beforehand, and makes everything else itself.
"""

import copy
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from captum.attr import FeatureAblation, LayerGradCam, Saliency
from torch import Generator, Tensor
from torch.utils._pytree import tree_flatten, tree_leaves

from captum_ext import imaging, infill, metrics
from captum_ext.attr import (
    FCAM,
    FIDO,
    RISE,
    AugmentedSR,
    LayerAblationCam,
    LayerClassActivationMap,
    LayerGroupCam,
    SESSWrapper,
    UpsampleWrapper,
    suggest_layer,
)
from captum_ext.attr.wrappers.super_resolution import SOLVERS
from captum_ext.datasets import FineGrainedParts, PastedScenes, TexturedEllipses
from captum_ext.evaluation import evaluate
from captum_ext.fcam import (
    FCAMDecoder,
    LocalCRFLoss,
    SeedSampler,
    SizeLoss,
    dense_crf_loss,
    find_feature_layers,
    otsu,
    partial_cross_entropy,
)
from captum_ext.features import ActivationMaximization, maximally_activating_patches
from captum_ext.perception import (
    LayerEncoder,
    PerceptionDecoder,
    PerceptionVisualization,
    perception_loss,
)
from captum_ext.tta import crop_tta, mask_boxes
from tests.methods import METHODS
from tests.networks import named_net, strided_net

Call = Callable[["Subjects"], Any]
TARGET = [1, 2]


class Subjects:
    """A network, images and ground truth, and decoders for the network."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        self.net, self.strided_net = named_net().to(dtype), strided_net().to(dtype)
        generator = Generator().manual_seed(5)
        self.x = torch.rand(2, 3, 16, 16, generator=generator).to(dtype)
        self.maps = torch.rand(2, 16, 16, generator=generator).to(dtype)
        self.attributions = self.maps[:, None].expand(2, 3, 16, 16).contiguous()
        self.masks = torch.zeros(2, 16, 16, dtype=torch.bool)
        self.masks[:, 4:9, 3:12] = True
        self.ignored = torch.zeros_like(self.masks)
        self.ignored[:, :2] = True
        self.boxes = [torch.tensor([[3, 4, 12, 9]]), torch.tensor([[3, 4, 12, 9], [0, 0, 4, 4]])]
        torch.manual_seed(1)
        self.fcam = FCAMDecoder([6, 6], [8, 4], layers=["relu1", "relu2"]).eval().to(dtype)
        encoder = LayerEncoder(self.net, "relu2")
        self.perception = PerceptionDecoder.reading(encoder, self.x, [4], [1]).eval().to(dtype)
        self.metrics = {name: make() for name, make in OBJECTS.items()}
        self.size_loss = SizeLoss()
        self.pictures = [
            SimpleNamespace(
                image=picture.clone(), target=i + 1, boxes=boxes, mask=mask, name=f"picture {i}"
            )
            for i, (picture, boxes, mask) in enumerate(
                zip(self.x.float(), self.boxes, self.masks, strict=True)
            )
        ]


def seeded() -> Generator:
    return Generator().manual_seed(0)


# --- methods and wrappers ------------------------------------------------------------------------


def layer_method(name: str, layer: str = "relu2") -> Call:
    options = {"head": "fc"} if name == "CAM" else {}
    return lambda s: METHODS[name](s.net, layer, **options).attribute(s.x, target=TARGET)


def sess(base: Any, **options: Any) -> SESSWrapper:
    options = {"scales": [12, 16], "window": 12, "pre_filter_ratio": 0.4, **options}
    return SESSWrapper(base, **{"sign": "absolute", **options})


def augmented(base: Any, **options: Any) -> AugmentedSR:
    options = {"n_augmentations": 3, "sign": "absolute", "generator": seeded(), **options}
    return AugmentedSR(base, **options)


def rise(s: Subjects, **options: Any) -> Any:
    options = {"n_masks": 20, "grid": 4, "generator": seeded(), **options}
    return RISE(s.net).attribute(s.x, target=TARGET, **options)


def fido(s: Subjects, **options: Any) -> Any:
    options = {"n_steps": 2, "n_masks": 2, "generator": seeded(), **options}
    return FIDO(s.net).attribute(s.x, target=TARGET, return_masks=True, **options)


def explain(s: Subjects, method: Any, **arguments: Any) -> Any:
    return method.attribute(s.x, target=TARGET, **arguments)


def cam(s: Subjects) -> LayerClassActivationMap:
    return LayerClassActivationMap(s.net, "relu2", head="fc")


def quadrants() -> Tensor:
    high = (torch.arange(16, device="cpu") >= 8).long()
    return (2 * high[:, None] + high)[None, None]


ATTRIBUTIONS: dict[str, Call] = {
    **{name: layer_method(name) for name in METHODS},
    "Ablation-CAM, min": lambda s: explain(
        s, LayerAblationCam(s.net, "relu2"), layer_baselines="min"
    ),
    "Group-CAM, groups": lambda s: explain(
        s, LayerGroupCam(s.net, "relu2", groups=torch.tensor([0, 1, 0, 1, 2, 2], device="cpu"))
    ),
    "RISE": rise,
    "RISE, blur": lambda s: rise(s, baselines="blur", estimator="self-normalized"),
    "RISE, tolerance": lambda s: RISE(s.net).estimate(
        s.x, [0, TARGET], n_masks=40, grid=4, tolerance=0.5, generator=seeded()
    ),
    **{
        f"FIDO, {name}": lambda s, options=options: fido(s, **options)
        for name, options in {
            "joint": {},
            "ssr": {"objective": "ssr", "baselines": "noise", "mask_size": 4},
            "cd": {"dropout": "cd", "baselines": "local", "tv_norm": "l2"},
        }.items()
    },
    "FCAM": lambda s: explain(s, FCAM(s.net, s.fcam)),
    "Upsample(Captum's Grad-CAM)": lambda s: explain(
        s, UpsampleWrapper(LayerGradCam(s.net, s.net.relu2))
    ),
    **{
        f"Upsample, {mode}": lambda s, mode=mode: explain(s, UpsampleWrapper(cam(s), mode))
        for mode in ("bicubic", "nearest-exact", "area")
    },
    "Upsample, tanh": lambda s: explain(s, UpsampleWrapper(cam(s), normalize="tanh")),
    **{
        f"SESS, {name}": lambda s, options=options: explain(s, sess(cam(s), **options))
        for name, options in {
            "soft": {},
            "one pass": {"pre_filter_ratio": 0.0},
            "reference": {"fusion": "reference", "antialias": True},
            "signed": {"sign": "signed"},
            "weighted": {"fusion": "weighted", "final_norm": True},
            "max": {"pool": "max", "scales": "sqrt2"},
            "rf": {"align": "rf", "step": 6},
        }.items()
    },
    "SESS(FeatureAblation)": lambda s: explain(
        s, sess(FeatureAblation(s.net)), feature_mask=quadrants(), baselines=s.x * 0
    ),
    "SESS(Saliency)": lambda s: explain(s, sess(Saliency(s.net))),
    "SESS(SR)": lambda s: explain(s, sess(augmented(cam(s)))),
    **{
        f"SR, {name}": lambda s, options=options: explain(s, augmented(cam(s), **options))
        for name, options in {
            **{mode: {"mode": mode} for mode in ("auto", "mean", "max", "single", "sr")},
            **{solver: {"mode": "sr", "solver": solver} for solver in SOLVERS},
            "official": {"preset": "official", "mode": "sr", "max_iterations": 3},
            "fill": {"fill": 0.5, "downsample": 2, "mode": "sr"},
            "reflection": {"fill": "reflection", "normalize": "per_map", "align": "rf"},
        }.items()
    },
    "SR(Saliency), tta": lambda s: explain(
        s, augmented(Saliency(s.net), mode="tta", internal_batch_size=2)
    ),
    "suggestions": lambda s: suggest_layer(s.net),
}  # fmt: skip

# --- metrics -------------------------------------------------------------------------------------


def score(function: Callable[..., Any], **options: Any) -> Call:
    return lambda s: function(s.net, s.x, s.attributions, TARGET, **options)


METRICS: dict[str, Call] = {
    **{
        f"{function.__name__}, {baselines}": score(function, baselines=baselines)
        for function in (metrics.insertion, metrics.deletion, metrics.average_drop)
        for baselines in (None, "noise", "local", "mean", 0.5)
    },
    "overall_score": score(metrics.overall_score),
    "overall_score, generator": lambda s: score(metrics.overall_score, generator=seeded())(s),
    "increase_in_confidence": score(metrics.increase_in_confidence),
    "road": score(metrics.road),
    "linear_imputation": lambda s: metrics.linear_imputation(s.x, s.masks[:, None]),
    "pointing_game": lambda s: metrics.pointing_game(s.maps, s.masks, 2),
    "energy_pointing_game": lambda s: metrics.energy_pointing_game(s.maps, s.masks),
    **{
        f"box_ious, {contours}, {convention}": lambda s, options=(contours, convention): (
            metrics.box_ious(s.maps, s.boxes, *options)
        )
        for contours in ("largest", "all")
        for convention in ("components", "wsolevaluation")
    },
    "box_from_map": lambda s: metrics.box_from_map(s.maps),
    "best_box_iou": lambda s: metrics.best_box_iou(metrics.box_from_map(s.maps), s.boxes),
    "boxes_to_masks": lambda s: metrics.boxes_to_masks(s.boxes, (16, 16)),
    "masks_to_boxes": lambda s: metrics.masks_to_boxes(s.masks),
    "mask_iou": lambda s: metrics.mask_iou(s.masks, s.masks.roll(2, 2)),
    "center_gaussian": lambda s: metrics.center_gaussian((5, 6), device="cpu"),
    "in_top_k": lambda s: metrics.in_top_k(s.maps[:, 0], torch.tensor(TARGET, device="cpu"), 5),
    "pixel_counts": lambda s: metrics.pixel_counts(s.maps, s.masks, s.ignored),
    "pixel_iou": lambda s: metrics.pixel_iou(s.maps, s.masks, s.ignored),
    "total_variation": lambda s: metrics.total_variation(s.maps),
}


BATCHES: dict[str, Call] = {
    "PointingGame": lambda s: (s.maps, s.masks),
    "PointingGame, classes": lambda s: (s.maps, s.masks, torch.tensor(TARGET, device="cpu")),
    "EnergyPointingGame": lambda s: (s.maps, s.masks),
    "MaxBoxAcc": lambda s: (s.maps, s.boxes),
    "PxAP": lambda s: (s.maps, s.masks, s.ignored),
    "PxIoU": lambda s: (s.maps, s.masks),
    "Insertion": lambda s: (score(metrics.insertion)(s),),
    "Deletion": lambda s: (score(metrics.deletion)(s),),
    "Overall": lambda s: (score(metrics.overall_score)(s),),
    "AverageDrop": lambda s: (score(metrics.average_drop)(s),),
    "IncreaseInConfidence": lambda s: (score(metrics.increase_in_confidence)(s),),
    "Road": lambda s: (score(metrics.road)(s),),
}
OBJECTS: dict[str, Callable[[], Any]] = {
    **{name: getattr(metrics, name) for name in BATCHES if "," not in name},
    "PointingGame, classes": lambda: metrics.PointingGame(2, 4, "macro"),
    "MaxBoxAcc": lambda: metrics.MaxBoxAcc((0.3, 0.5), "all"),
}


def computed(s: "Subjects", name: str) -> Any:
    """The result of a metric object after two batches."""
    metric = copy.deepcopy(s.metrics[name])
    for _ in range(2):
        metric.update(*BATCHES[name](s))
    return metric.compute()


METRICS |= {name: lambda s, name=name: computed(s, name) for name in BATCHES}


# --- everything else -----------------------------------------------------------------------------


def evaluated(s: Subjects) -> str:
    """The exported rows of a run with all metrics."""
    columns = [
        "localization", "top_1_localization", "insertion", "deletion", "overall_score",
        "average_drop", "increase_in_confidence", "road", "total_variation", "infidelity",
        "sensitivity_max",
    ]  # fmt: skip
    methods = {"CAM": cam(s), "RISE": (RISE(s.net), {"n_masks": 20, "grid": 4})}
    with tempfile.TemporaryDirectory() as folder:
        evaluate(
            methods, s.pictures, columns, output=folder, show_progress=False, size=16, batch_size=2
        )
        return (Path(folder) / "rows.csv").read_text()


def ascended(s: Subjects, **options: Any) -> Any:
    options = {"n_steps": 2, "generator": seeded(), "noise": 0.1, **options}
    result = ActivationMaximization(s.net, normalize=([0.5] * 3, [0.5] * 3)).maximize(
        (3, 16, 16), TARGET, **options
    )
    return result.images, result.pictures, result.scores


def patches(s: Subjects) -> Any:
    top = maximally_activating_patches(
        s.net, "relu2", [(p.image, 0) for p in s.pictures], n=2, size=16, show_progress=False
    )
    return top.values, top.indices, top.positions, top.boxes


def perceived(s: Subjects) -> Any:
    encoder = LayerEncoder(s.net, "relu2")
    return tuple(PerceptionVisualization(cam(s), encoder, s.perception).visualize(s.x, target=1))


def scene_tensors(data: Any) -> Any:
    return tree_leaves([vars(scene) for scene in data])


OTHER: dict[str, Call] = {
    "evaluate": evaluated,
    "maximize": ascended,
    "maximize, pixels": lambda s: ascended(s, parametrization="pixel", optimizer="normalized"),
    "patches": patches,
    "perception": perceived,
    "perception_loss": lambda s: perception_loss(s.x, s.x.flip(3), s.x, s.x.flip(2)),
    "crop_tta": lambda s: crop_tta(s.net, s.x, s.maps, threshold=0.7, sigma=1.0),
    "mask_boxes": lambda s: mask_boxes(s.maps, 0.7, margin=1),
    "find_feature_layers": lambda s: find_feature_layers(s.strided_net, s.x),
    "seeds": lambda s: SeedSampler(4, 4)(s.maps[:, None], seeded()),
    "otsu": lambda s: otsu((s.maps * 255).long().reshape(2, -1)),
    "size": lambda s: s.size_loss(s.x[:, :2].softmax(1)),
    "partial cross-entropy": lambda s: partial_cross_entropy(s.x[:, :2], s.masks.long()),
    "dense CRF": lambda s: dense_crf_loss(
        s.maps[:, None], s.x * 255, n_anchors=20, generator=seeded()
    ),
    "local CRF": lambda s: LocalCRFLoss(2)(s.maps[:, None], s.x * 255),
    "resize": lambda s: imaging.resize(s.x, (9, 20), antialias=True),
    "lay_over": lambda s: imaging.lay_over(s.x[:, :, :4, :4], (16, 16), (1.0, -2.0)),
    "warp": lambda s: imaging.warp(s.x, torch.eye(3, device="cpu")[None].repeat(2, 1, 1), fill=0.3),
    "blur": lambda s: imaging.blur(s.x, 5, 2.0),
    "percentile": lambda s: imaging.percentile(s.x, 90.0),
    "min_max": lambda s: imaging.min_max(s.x),
    "one_channel": lambda s: imaging.one_channel(s.attributions),
    "gaussian": lambda s: infill.gaussian(s.x, 2.0),
    "local_mean": lambda s: infill.local_mean(s.x, s.masks[:, None].to(s.x.dtype)),
    "PastedScenes": lambda s: scene_tensors(PastedScenes(1, size=(160, 160))),
    "FineGrainedParts": lambda s: scene_tensors(FineGrainedParts(2, size=(64, 64))),
    "TexturedEllipses": lambda s: scene_tensors(TexturedEllipses(2)),
}
CALLS = {**ATTRIBUTIONS, **METRICS, **OTHER}


def run(name: str, subjects: Subjects) -> list[Any]:
    """The tensors and other leaves of a call's result, in their order."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return [
            leaf.detach() if isinstance(leaf, Tensor) else leaf
            for leaf in tree_flatten(CALLS[name](subjects))[0]
        ]


def are_equal(results: list[Any], others: list[Any]) -> bool:
    """Return whether the leaves are equal to the bit, with their dtypes and devices."""
    return len(results) == len(others) and all(map(_is_same, results, others))


def _is_same(a: Any, b: Any) -> bool:
    if not isinstance(a, Tensor):
        return type(a) is type(b) and (not isinstance(a, str | int | float) or a == b)
    same_form = (a.dtype, a.device, a.shape) == (b.dtype, b.device, b.shape)
    return same_form and torch.equal(a.nan_to_num(7), b.nan_to_num(7))
