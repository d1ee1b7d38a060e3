"""How many of the situations of public bug reports each layer method survives, in a table.

    python -m tests.parity.survival [--why]

Each library is called as its own documentation does it. The criteria, the same for all, are those
of the modules `situations_of_*`. `--why` prints what went wrong, too.

Measured in November 2026 with torch 2.14.1, captum 0.9.0, torchcam 0.5.0, grad-cam 1.5.7, of 36:
all of our methods 36, Captum's LayerGradCam 31, torchcam's 29 (GradCAM, GradCAMpp, XGradCAM), 30
(LayerCAM), 31 (ScoreCAM) and 33 (CAM), grad-cam's 21 (GradCAM, GradCAMPlusPlus, XGradCAM), 22
(HiResCAM, LayerCAM, EigenGradCAM), 25 (AblationCAM, ScoreCAM) and 27 (EigenCAM). Threads race: a
peer may survive them now and then.
"""

import argparse
import logging
import multiprocessing
import os
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from importlib import metadata
from typing import Any

os.environ["TQDM_DISABLE"] = "1"  # grad-cam draws a bar for each image

import captum.attr
import torch
from torch import Tensor, nn

from captum_ext.attr import LayerClassActivationMap, LayerSmoothGradCamPlusPlus
from tests.methods import METHODS
from tests.parity import situations_of_inputs, situations_of_models
from tests.parity.situations_of_inputs import eight_threads
from tests.parity.survival_subjects import Explain, Method, unwrap

SITUATIONS = [*situations_of_models.SITUATIONS, *situations_of_inputs.SITUATIONS]
TORCHCAM = ["CAM", "GradCAM", "GradCAMpp", "XGradCAM", "LayerCAM", "ScoreCAM"]
GRAD_CAM = [
    "GradCAM",
    "GradCAMPlusPlus",
    "XGradCAM",
    "HiResCAM",
    "LayerCAM",
    "EigenCAM",
    "EigenGradCAM",
    "AblationCAM",
    "ScoreCAM",
]


class NotSupportedError(TypeError):
    """The library has no way to pass this."""


@contextmanager
def captum_style(cls: Callable[..., Any], model: nn.Module, layer: nn.Module) -> Iterator[Explain]:
    """Captum's way, and ours: nothing to open or to close."""
    method = cls(model, layer)

    def explain(inputs: Any, target: Any, *extra: Any) -> Tensor:
        maps: Tensor = method.attribute(
            inputs, target=target, additional_forward_args=extra or None
        )
        return maps

    yield explain


@contextmanager
def torchcam_style(name: str, model: nn.Module, layer: nn.Module) -> Iterator[Explain]:
    """torchcam's way: the user runs the model, then asks for the maps of that run."""
    from torchcam import methods

    with getattr(methods, name)(model, layer) as cam:

        def explain(inputs: Any, target: Any, *extra: Any) -> Tensor:
            inputs = (inputs,) if isinstance(inputs, Tensor) else inputs
            (maps,) = cam(target, model(*inputs, *extra))
            return maps

        yield explain


@contextmanager
def grad_cam_style(name: str, model: nn.Module, layer: nn.Module) -> Iterator[Explain]:
    """grad-cam's way: one tensor, and an object for each example's target."""
    import pytorch_grad_cam
    from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget

    with getattr(pytorch_grad_cam, name)(model=model, target_layers=[layer]) as cam:

        def explain(inputs: Any, target: Any, *extra: Any) -> Tensor:
            if extra or not isinstance(inputs, Tensor):
                raise NotSupportedError("grad-cam takes one tensor and nothing else")
            targets = target if isinstance(target, list) else [target] * len(inputs)
            maps = cam(inputs, [ClassifierOutputTarget(t) for t in targets])
            return torch.from_numpy(maps)

        yield explain


def _methods(library: str, style: Callable[..., Any], names: dict[str, Any]) -> list[Method]:
    return [Method(library, name, partial(style, call)) for name, call in names.items()]


def _class_activation_map(model: nn.Module, layer: nn.Module) -> LayerClassActivationMap:
    """A ReLU follows the layer: CAM takes the head's rows all the same only where it is named."""
    return LayerClassActivationMap(model, layer, head=unwrap(model).fc)


def our_methods() -> list[Method]:
    """All layer methods; Smooth Grad-CAM++ without noise, since maps are compared."""
    without_noise = partial(LayerSmoothGradCamPlusPlus, n_samples=2, stdev_spread=0.0)
    ours = {**METHODS, "CAM": _class_activation_map, "Smooth Grad-CAM++": without_noise}
    return _methods("captum_ext", captum_style, ours)


def peers() -> list[Method]:
    return [
        *_methods("captum", captum_style, {"LayerGradCam": captum.attr.LayerGradCam}),
        *_methods("torchcam", torchcam_style, {name: name for name in TORCHCAM}),
        *_methods("grad-cam", grad_cam_style, {name: name for name in GRAD_CAM}),
    ]


def attempt(situation: Callable[[Method], None], method: Method) -> str:
    """What went wrong; empty where nothing did."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            situation(method)
    except Exception as error:
        last = traceback.extract_tb(error.__traceback__)[-1]
        return f"{type(error).__name__}: {error} ({last.name})"
    return ""


def attempt_in_a_fork(situation: Callable[[Method], None], method: Method) -> str:
    """The same in a process of its own: threads of grad-cam can crash theirs."""
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=lambda: sender.send(attempt(situation, method)))
    process.start()
    sender.close()
    try:
        error: str = receiver.recv()
    except EOFError:
        process.join()
        error = f"the process died, exit code {process.exitcode}"
    process.join()
    return error


def failures(method: Method) -> dict[str, str]:
    """The situations that the method does not survive, with the error of each."""
    errors = {}
    for situation in SITUATIONS:
        threads_of_a_peer = situation is eight_threads and method.library != "captum_ext"
        error = (attempt_in_a_fork if threads_of_a_peer else attempt)(situation, method)
        if error:
            errors[situation.__name__] = error
    return errors


def survived(errors: dict[str, str]) -> str:
    return f"survived {len(SITUATIONS) - len(errors)} of {len(SITUATIONS)}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--why", action="store_true", help="print the errors, too")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    logging.disable()  # torchcam names the head that it found
    versions = [f"{name} {metadata.version(name)}" for name in ("captum", "torchcam", "grad-cam")]
    print(f"torch {torch.__version__}, {', '.join(versions)}\n")
    print(f"| method | survived of {len(SITUATIONS)} | not survived |\n|:--|--:|:--|")
    for method in [*our_methods(), *peers()]:
        errors = failures(method)
        names = ", ".join(name.replace("_", " ") for name in errors)
        print(f"| {method} | {len(SITUATIONS) - len(errors)} | {names} |", flush=True)
        if arguments.why:
            for name, error in errors.items():
                print(f"    {name}: {error}")


if __name__ == "__main__":
    main()
