"""The calls that `gpu.py` measures: each method, its bare passes, and the same by the peers."""

import copy
import warnings
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from captum.attr import LayerGradCam
from torch import Generator, Tensor, nn
from torchvision.models import resnet18, resnet50

from captum_ext import attr
from captum_ext.attr.wrappers._windows import scaled_size, slide_windows
from captum_ext.metrics import insertion

TARGET = 1
STEPS = 28  # of insertion, its default

Call = Callable[[], Any]


@dataclass(frozen=True)
class Sizes:
    """The sizes of a run; `chunk` is the number of images in one forward pass."""

    side: int = 224
    chunk: int = 64
    n_masks: int = 256
    n_steps: int = 4
    copies: int = 32
    scales: tuple[int, ...] = (224, 336, 448)
    quick: bool = False


QUICK = Sizes(32, 4, 8, 2, 4, (32, 48), quick=True)


@dataclass(frozen=True)
class Case:
    """One row: `bare` runs the same number of images through the bare model."""

    name: str
    ours: Call
    bare: Call
    peers: dict[str, Callable[[], Call]] = field(default_factory=dict)


def small_network() -> nn.Module:
    """Some thousand parameters, and the names of a ResNet."""
    layers = {
        "stem": nn.Sequential(nn.Conv2d(3, 4, 3, 2, 1), nn.BatchNorm2d(4), nn.ReLU(inplace=True)),
        "layer4": nn.Sequential(nn.Conv2d(4, 6, 3, 2, 1), nn.ReLU(inplace=True)),
        "avgpool": nn.AdaptiveAvgPool2d(1),
        "flatten": nn.Flatten(),
        "fc": nn.Linear(6, 4),
    }
    return nn.Sequential(OrderedDict(layers))


def network(build: Callable[[], nn.Module], x: Tensor) -> Any:
    torch.manual_seed(0)
    return build().eval().to(x)


# --- bare passes ---------------------------------------------------------------------------------


def forwards(model: nn.Module, x: Tensor, n: int, chunk: int) -> Call:
    """`n` images through the model, `chunk` at a time, on input that is there already."""
    images = x[torch.arange(min(n, chunk), device=x.device) % len(x)]

    @torch.no_grad()
    def call() -> None:
        for start in range(0, n, chunk):
            model(images[: n - start])

    return call


def passes(model: nn.Module, x: Tensor, n: int, chunk: int) -> Call:
    """The same with the gradient of the target by the images."""
    images = x[torch.arange(min(n, chunk), device=x.device) % len(x)]

    def call() -> None:
        for start in range(0, n, chunk):
            leaf = images[: n - start].detach().requires_grad_()
            torch.autograd.grad(model(leaf)[:, TARGET].sum(), leaf)

    return call


# --- peers ---------------------------------------------------------------------------------------


def by_grad_cam(name: str, model: nn.Module, x: Tensor, **options: Any) -> Call:
    import pytorch_grad_cam
    from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget

    own: Any = copy.deepcopy(model)  # it fills gradients
    targets = [ClassifierOutputTarget(TARGET)] * len(x)

    def call() -> None:
        with getattr(pytorch_grad_cam, name)(own, [own.layer4], **options) as cam:
            cam(x, targets)
        own.zero_grad()

    return call


def ablation_by_grad_cam(model: nn.Module, x: Tensor) -> Call:
    from pytorch_grad_cam.ablation_layer import AblationLayer

    return by_grad_cam("AblationCAM", model, x, ablation_layer=AblationLayer())


def sess_by_grad_cam(model: nn.Module, x: Tensor, sizes: Sizes) -> Call:
    from pytorch_grad_cam.sess import SESS
    from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget

    own: Any = copy.deepcopy(model)
    options = {"scales": list(sizes.scales), "window_size": sizes.side, "batch_size": sizes.chunk}

    def call() -> None:
        with SESS(own, [own.layer4], **options) as cam:
            cam(x, [ClassifierOutputTarget(TARGET)] * len(x))
        own.zero_grad()

    return call


def by_torchcam(name: str, model: nn.Module, x: Tensor, **options: Any) -> Call:
    from torchcam import methods

    own = copy.deepcopy(model)

    def call() -> None:
        with getattr(methods, name)(own, "layer4", **options) as cam:
            cam(TARGET, own(x))

    return call


# --- the rows ------------------------------------------------------------------------------------

ONE_PASS: dict[str, tuple[Any, str, str]] = {
    "CAM": (attr.LayerClassActivationMap, "", "CAM"),
    "Captum's Grad-CAM": (LayerGradCam, "GradCAM", "GradCAM"),
    "Grad-CAM++": (attr.LayerGradCamPlusPlus, "GradCAMPlusPlus", "GradCAMpp"),
    "XGrad-CAM": (attr.LayerXGradCam, "XGradCAM", "XGradCAM"),
    "LayerCAM": (attr.LayerCam, "LayerCAM", "LayerCAM"),
    "HiResCAM": (attr.LayerHiResCam, "HiResCAM", ""),
    "Token Grad-CAM": (attr.LayerTokenGradCam, "", ""),
    "Sharpen Focus": (attr.LayerSharpenFocus, "", ""),
    "Eigen-CAM": (attr.LayerEigenCam, "EigenCAM", ""),
    "Eigen-Grad-CAM": (attr.LayerEigenGradCam, "EigenGradCAM", ""),
}


def cam_cases(x: Tensor, sizes: Sizes) -> list[Case]:
    """Methods of one pass, in units of one bare forward pass of the batch."""
    model = network(small_network if sizes.quick else resnet50, x)
    bare = forwards(model, x, len(x), len(x))
    cases = []
    for name, (cls, grad_cam, torchcam) in ONE_PASS.items():
        peers: dict[str, Callable[[], Call]] = {}
        if grad_cam:
            peers["grad-cam"] = partial(by_grad_cam, grad_cam, model, x)
        if torchcam:
            head = {"fc_layer": "fc"} if torchcam == "CAM" else {}
            peers["torchcam"] = partial(by_torchcam, torchcam, model, x, **head)
        ours = partial(cls(model, model.layer4).attribute, x, target=TARGET)
        cases.append(Case(name, ours, bare, peers))
    return cases


def masking_cases(x: Tensor, sizes: Sizes) -> list[Case]:
    """Methods of many passes, in units of the bare passes of as many images."""
    model, chunk = network(small_network if sizes.quick else resnet18, x), sizes.chunk
    each = {"perturbations_per_eval": max(1, chunk // len(x))}
    channels = model.fc.in_features

    def run(n: int) -> Call:
        return forwards(model, x, n * len(x), chunk)

    def generator() -> Generator:
        return Generator(x.device).manual_seed(0)

    def layer(cls: Any) -> Call:
        return partial(cls(model, model.layer4).attribute, x, target=TARGET, **each)

    maps = torch.rand(len(x), *x.shape[2:], generator=generator(), device=x.device)
    fido = {"n_steps": sizes.n_steps, "n_masks": 8, "internal_batch_size": chunk}
    return [
        Case(
            "Score-CAM",
            layer(attr.LayerScoreCam),
            run(channels),
            {
                "grad-cam": partial(by_grad_cam, "ScoreCAM", model, x),
                "torchcam": partial(by_torchcam, "ScoreCAM", model, x, batch_size=chunk),
            },
        ),
        Case(
            "Ablation-CAM (the same passes)",
            layer(attr.LayerAblationCam),
            run(channels),
            {"grad-cam": partial(ablation_by_grad_cam, model, x)},
        ),
        Case("Group-CAM", layer(attr.LayerGroupCam), run(34)),
        Case(
            f"RISE, {sizes.n_masks} masks",
            lambda: attr.RISE(model).attribute(
                x, target=TARGET, n_masks=sizes.n_masks, generator=generator(), **each
            ),
            run(sizes.n_masks),
        ),
        Case(
            f"FIDO, {sizes.n_steps} steps (passes with gradients)",
            lambda: attr.FIDO(model).attribute(x, target=TARGET, generator=generator(), **fido),
            passes(model, x, 16 * sizes.n_steps * len(x), chunk),
        ),
        Case(
            f"insertion, {STEPS} steps",
            partial(insertion, model, x, maps, TARGET, internal_batch_size=chunk),
            run(STEPS + 1),
        ),
    ]


def wrapper_cases(x: Tensor, sizes: Sizes) -> list[Case]:
    """Wrappers around Captum's Grad-CAM, in units of a bare forward pass of each view."""
    model, side = network(small_network if sizes.quick else resnet18, x), sizes.side
    base, batches = LayerGradCam(model, model.layer4), {"internal_batch_size": sizes.chunk}
    sess = attr.SESSWrapper(base, scales=list(sizes.scales), window=side, **batches)
    scaled = [scaled_size((side, side), short) for short in sizes.scales]
    windows = len(slide_windows(scaled, (side, side), (side, side)))

    def augmented() -> None:
        generator = Generator(x.device).manual_seed(0)
        options = {"n_augmentations": sizes.copies, "generator": generator, **batches}
        attr.AugmentedSR(base, **options).attribute(x, target=TARGET)

    return [
        Case(
            f"SESS, {windows} windows",
            partial(sess.attribute, x, target=TARGET),
            forwards(model, x, windows * len(x), sizes.chunk),
            {"grad-cam": partial(sess_by_grad_cam, model, x, sizes)},
        ),
        Case(
            f"AugmentedSR, {sizes.copies} copies",
            augmented,
            forwards(model, x, sizes.copies * len(x), sizes.chunk),
        ),
    ]


def training_cases(x: Tensor, sizes: Sizes) -> list[Case]:
    """A step of F-CAM in units of the classifier's forward and the decoder's two passes."""
    from captum_ext.fcam import DenseCRFLoss, FCAMDecoder, FCAMModule

    warnings.filterwarnings("ignore", module="lightning")  # there is no Trainer
    model, side = network(small_network if sizes.quick else resnet18, x), sizes.side
    decoder = FCAMDecoder.reading(model, x[:1]).to(x.device)
    guide = LayerGradCam(model, model.layer4)
    module = FCAMModule(model, decoder, guide, (side, side), crf=DenseCRFLoss(), warmup=0)
    module = module.to(x.device).train()
    optimiser = torch.optim.SGD(module.decoder.parameters(), lr=1e-3)
    pixels = torch.randint(0, 256, (len(x), 3, side, side), device=x.device, dtype=torch.uint8)
    indices = torch.arange(len(x), device=x.device)
    batch = (pixels, indices % 4, indices, torch.ones_like(indices, dtype=torch.bool))
    gradient = torch.ones_like(module(x))

    def step() -> None:
        optimiser.zero_grad()
        module.training_step(batch, 0).backward()
        optimiser.step()

    def bare() -> None:
        module.decoder.zero_grad()
        module(x).backward(gradient)

    return [Case("F-CAM step (classifier, decoder and its gradient)", step, bare)]


PARTS = {
    "CAMs": cam_cases,
    "masks": masking_cases,
    "wrappers": wrapper_cases,
    "F-CAM": training_cases,
}
