"""What the layer CAMs cost, beside a bare forward pass and beside the public peers, in one run.

    python -m tests.benchmarks.layer_cams [--device cpu|cuda] [--repeats N] [--threads N]
                                          [--side N] [--json FILE] [--quick]

Two tables, in Markdown:

- gradient CAMs on layer4 of a ResNet-50, 8 x 3 x 224 x 224, in units of one bare `no_grad` forward;
- masking CAMs on layer4 of a ResNet-18, one image of 224 x 224, in units of the bare forwards that
  the method needs: as many, at the same batch size, on input that is there already.

How it is measured says `measuring.py`.
"""

import argparse
import copy
import json
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

os.environ["TQDM_DISABLE"] = "1"  # grad-cam draws a bar for each image

import pytorch_grad_cam as grad_cam
import torch
import torchcam.methods as torchcam
from captum.attr import LayerGradCam
from pytorch_grad_cam.ablation_layer import AblationLayer
from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget
from torch import Tensor, nn
from torchvision.models import resnet18, resnet50

from captum_ext import attr
from tests.benchmarks.measuring import (
    Calls,
    environment,
    markdown,
    measure,
    parse_arguments,
    speed_up,
)

TARGET = 7
CHUNK = 16  # masks in one forward pass; grad-cam's default for Score-CAM

GROUPS, CHANNELS = 32, 512  # Group-CAM's default, and ResNet-18's layer4
BARE = "bare forward"
SCORE_BARE = f"bare forwards: {CHANNELS} by {CHUNK}"
GROUP_BARE = f"bare forwards for Group-CAM: 1 + {GROUPS + 1} by {CHUNK}"


# --- what is called ------------------------------------------------------------------------------


def ours(method: Callable[..., Any], model: nn.Module, x: Tensor, **kwargs: Any) -> Any:
    return lambda: method(model, model.layer4).attribute(x, target=TARGET, **kwargs)


def smooth(model: nn.Module, layer: nn.Module) -> attr.LayerSmoothGradCamPlusPlus:
    return attr.LayerSmoothGradCamPlusPlus(model, layer, n_samples=4)


def by_grad_cam(name: str, model: nn.Module, x: Tensor, **options: Any) -> Any:
    targets = [ClassifierOutputTarget(TARGET)] * len(x)

    def call() -> None:
        with getattr(grad_cam, name)(model, [model.layer4], **options) as cam:
            cam(x, targets)
        model.zero_grad()  # it fills them: each call starts without

    return call


def by_torchcam(name: str, model: nn.Module, x: Tensor, **options: Any) -> Any:
    def call() -> None:
        with getattr(torchcam, name)(model, "layer4", **options) as cam:
            gradients = isinstance(cam, torchcam.GradCAM.__base__)
            with torch.set_grad_enabled(gradients):
                scores = model(x)
            cam(TARGET, scores)

    return call


def forwards(model: nn.Module, x: Tensor, n: int, batch: int) -> Any:
    """`n` images through the model, `batch` at a time."""
    chunks = [min(batch, n - start) for start in range(0, n, batch)]
    images = x.repeat(batch, 1, 1, 1) if batch > len(x) else x

    def call() -> None:
        with torch.no_grad():
            for size in chunks:
                model(images[:size])

    return call


def gradient_calls(side: int, device: torch.device) -> Calls:
    torch.manual_seed(0)
    model = resnet50().eval().to(device)
    x = torch.randn(8, 3, side, side, device=device)
    forwards(model, x, len(x), len(x))()  # what is set up once is no method's memory
    # Each library its own copy: hooks, modes and gradients of one are no concern of the others.
    mine, captums, pgcs, tcs = (copy.deepcopy(model) for _ in range(4))
    return {
        BARE: forwards(model, x, len(x), len(x)),
        "LayerClassActivationMap": ours(attr.LayerClassActivationMap, mine, x),
        "LayerEigenCam": ours(attr.LayerEigenCam, mine, x),
        "LayerGradCamPlusPlus": ours(attr.LayerGradCamPlusPlus, mine, x),
        "LayerXGradCam": ours(attr.LayerXGradCam, mine, x),
        "LayerCam": ours(attr.LayerCam, mine, x),
        "LayerHiResCam": ours(attr.LayerHiResCam, mine, x),
        "LayerSharpenFocus": ours(attr.LayerSharpenFocus, mine, x),
        "LayerTokenGradCam": ours(attr.LayerTokenGradCam, mine, x),
        "LayerSmoothGradCamPlusPlus, 1 + 4 passes": ours(smooth, mine, x),
        "captum LayerGradCam": ours(LayerGradCam, captums, x),
        "grad-cam GradCAM": by_grad_cam("GradCAM", pgcs, x),
        "grad-cam GradCAMPlusPlus": by_grad_cam("GradCAMPlusPlus", pgcs, x),
        "grad-cam EigenCAM": by_grad_cam("EigenCAM", pgcs, x),
        "torchcam GradCAM": by_torchcam("GradCAM", tcs, x),
        "torchcam CAM": by_torchcam("CAM", tcs, x, fc_layer="fc"),
    }


def masking_calls(side: int, device: torch.device) -> Calls:
    torch.manual_seed(0)
    model = resnet18().eval().to(device)
    # So that no channel is flat: ours would not run it, and all are to run the same 512.
    nn.init.ones_(model.layer4[-1].bn2.bias)
    x = torch.randn(1, 3, side, side, device=device)
    forwards(model, x, CHUNK, CHUNK)()
    mine, pgcs, tcs = (copy.deepcopy(model) for _ in range(3))
    image, group_masks = forwards(model, x, 1, 1), forwards(model, x, GROUPS + 1, CHUNK)
    each = {"perturbations_per_eval": CHUNK}
    return {
        SCORE_BARE: forwards(model, x, CHANNELS, CHUNK),
        "LayerScoreCam": ours(attr.LayerScoreCam, mine, x, **each),
        "grad-cam ScoreCAM": by_grad_cam("ScoreCAM", pgcs, x),
        "torchcam ScoreCAM": by_torchcam("ScoreCAM", tcs, x, batch_size=CHUNK),
        "LayerAblationCam": ours(attr.LayerAblationCam, mine, x, **each),
        "grad-cam AblationCAM": by_grad_cam("AblationCAM", pgcs, x, ablation_layer=AblationLayer()),
        GROUP_BARE: lambda: (image(), group_masks()),
        "LayerGroupCam": ours(attr.LayerGroupCam, mine, x, **each),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--repeats", type=int, default=11, help="rounds; at most 3 of the masking")
    parser.add_argument("--threads", type=int, default=2, help="of the CPU")
    parser.add_argument("--json", type=Path, help="write all numbers here")
    parser.add_argument("--side", type=int, default=224, help="of the images, in pixels")
    arguments = parse_arguments(parser, repeats=1, side=64)
    device, side = torch.device(arguments.device), arguments.side
    torch.set_num_threads(arguments.threads)
    found = environment(device, arguments.threads)
    print(", ".join(f"{name} {value}" for name, value in found.items()), end="\n\n")

    gradient = measure(partial(gradient_calls, side), lambda name: BARE, arguments.repeats, device)
    print(f"ResNet-50, layer4, 8 x 3 x {side} x {side}, {arguments.repeats} rounds\n")
    print(markdown(gradient), end="\n\n")
    print(speed_up(gradient, "grad-cam GradCAM", "LayerGradCamPlusPlus"), end="\n\n", flush=True)

    repeats = min(3, arguments.repeats)
    masking = measure(
        partial(masking_calls, side),
        lambda name: GROUP_BARE if "Group" in name else SCORE_BARE,
        repeats,
        device,
    )
    print(f"ResNet-18, layer4, 1 x 3 x {side} x {side}, {repeats} rounds\n")
    print(markdown(masking), end="\n\n")
    print(speed_up(masking, "grad-cam AblationCAM", "LayerAblationCam"))

    if arguments.json:
        tables = {"environment": found, "gradient": gradient, "masking": masking}
        arguments.json.write_text(json.dumps(tables, indent=1))


if __name__ == "__main__":
    main()
