"""The command `captum-ext explain`: a classifier's decision on an image, by many methods."""

import argparse
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from captum_ext.cli.methods import Method, find_methods
from captum_ext.cli.models import find_device
from captum_ext.cli.options import SHARED, Options, add_options
from captum_ext.cli.output import check_output_file, collected_warnings, say, table

if TYPE_CHECKING:
    from captum.attr import Attribution
    from matplotlib.figure import Figure
    from torch import Tensor

    from captum_ext.attr.layer.base import ReshapeTransform
    from captum_ext.zoo import LoadedModel

_OPTIONS: Options = {
    "image": {
        "nargs": "?",
        "metavar": "IMAGE",
        "help": "an image file (default: a photograph of a cup of coffee)",
    },
    "--model": SHARED["--model"] | {"default": "efficientnet-lite0"},
    "--weights": SHARED["--weights"],
    "--method": SHARED["--method"],
    "--target": {
        "metavar": "INDEX|NAME",
        "help": "the class to explain (default: the one with the highest probability)",
    },
    "--layer": SHARED["--layer"],
    "--device": SHARED["--device"],
    "--output": {
        "metavar": "PNG",
        "default": "explanation.png",
        "help": "the picture to write",
    },
}


@dataclass(frozen=True)
class Explanation:
    """The map of a method, (H, W) as the input, and the seconds that it took."""

    method: Method
    map: "Tensor"
    seconds: float


def add_command(commands: Any) -> None:
    """Add `explain` to the subparsers of the command line."""
    parser = commands.add_parser(
        "explain",
        help="explain a classifier's decision on an image, and draw the maps of many methods",
        description="Explain why a classifier gives an image a class, by one or many methods, and "
        "draw their maps. Without arguments, a trained network and a photograph of a cup of coffee "
        "are used.",
    )
    _, defaults = add_options(parser, _OPTIONS)
    parser.set_defaults(run=explain, **defaults)


def explain(arguments: argparse.Namespace) -> None:
    """Run `captum-ext explain`.

    Raises:
        InputError: anything that the user can correct.
    """
    output = Path(arguments.output)
    check_output_file(output, arguments.image)
    methods = find_methods(arguments.method, arguments.image)
    at_layer = any(method.at_layer for method in methods)
    _check_methods(methods, arguments.layer)
    from captum_ext import zoo
    from captum_ext._identity import atomic_write

    with collected_warnings() as warned:
        image = zoo.load_image(arguments.image)
    device = find_device(arguments.device)
    loaded = zoo.load_model(arguments.model, arguments.weights)
    loaded.module.to(device)
    target = None if arguments.target is None else loaded.class_index(arguments.target)
    x = loaded.preprocess(image).to(device)
    layer, reshape_transform = (
        zoo.find_layer(loaded, x, arguments.layer) if at_layer else (None, None)
    )
    probabilities = zoo.probabilities(loaded, x)
    target = int(probabilities.argmax()) if target is None else target

    explanations, notes = run_methods(
        loaded, x, target, methods, layer, reshape_transform, keep_going=not arguments.method
    )
    for note in (*warned, *notes):
        say("note", note)
    figure = draw(loaded, image, explanations, probabilities, target, layer)
    with atomic_write(output) as unfinished:
        figure.savefig(unfinished, format="png")
    print(report(loaded, explanations, probabilities, target, layer))
    print(f"\nwritten to {output}")


def _check_methods(methods: Sequence[Method], layer: str | None) -> None:
    from captum_ext._errors import InputError

    for method in methods:
        if method.required:
            names = "`, `".join(method.required)
            raise InputError(
                f"{method.name} needs `{names}`, for which there is no flag: "
                f"use {method.cls.__name__} in Python, or a file of `captum-ext evaluate --config`"
            )
    if layer is not None and not any(method.at_layer for method in methods):
        raise InputError(f"{methods[0].name} takes no --layer: it explains the model as a whole")


def run_methods(
    loaded: "LoadedModel",
    x: "Tensor",
    target: int,
    methods: Iterable[Method],
    layer: str | None = None,
    reshape_transform: "ReshapeTransform | None" = None,
    keep_going: bool = True,
) -> tuple[list[Explanation], list[str]]:
    """Explain class `target` of the input `x` (1, C, H, W) by several methods.

    Args:
        loaded: the model.
        x: the input, on the model's device.
        target: a class.
        methods: the methods.
        layer: the name of a layer; None is the model's own, with its own `reshape_transform`.
        reshape_transform: of the named layer.
        keep_going: leave out a method that does not work on this model, with a note, instead of
            raising.

    Returns:
        The explanations, and the notes.

    Raises:
        InputError: a method does not work and `keep_going` is False, or none does.
    """
    from tqdm import tqdm

    from captum_ext._errors import InputError

    if layer is None:
        layer, reshape_transform = loaded.layer, loaded.reshape_transform
    explanations, notes = [], []
    bar = tqdm(methods, unit="method", leave=False, disable=None)
    with collected_warnings() as warned:
        for method in bar:
            bar.set_description(method.title)
            try:
                cam = method.attribution(loaded, layer, reshape_transform)
                explanations.append(_run(method, cam, x, target))
            except method.expected_errors as error:
                at = f"at layer {layer} of" if method.at_layer else "on"
                note = f"{method.name} does not work {at} {loaded.name}: {error}"
                if not keep_going:
                    raise InputError(note) from error
                notes.append(f"{note} (left out)")
    if not explanations:
        raise InputError(f"no method works here; name another --layer. {notes[0]}")
    return explanations, notes + warned


def _run(method: Method, cam: "Attribution", x: "Tensor", target: int) -> Explanation:
    import torch

    from captum_ext._engine.state import seeded_random
    from captum_ext.attr import UpsampleWrapper
    from captum_ext.imaging import one_channel

    arguments = method.attribute_arguments(x)
    if "show_progress" in method.arguments:
        arguments["show_progress"] = sys.stderr.isatty()
    if "generator" in method.arguments:
        arguments["generator"] = torch.Generator(x.device).manual_seed(0)
    start = time.perf_counter()
    with seeded_random(x.device, 0):  # Captum's random methods have no generator
        maps = UpsampleWrapper(cam).attribute(x, target=target, **arguments)
    cam_map = one_channel(maps.detach())[0, 0].cpu()
    seconds = time.perf_counter() - start
    if not method.zero_is_neutral:
        cam_map = cam_map - cam_map.min()
    return Explanation(method, cam_map, seconds)


def draw(
    loaded: "LoadedModel",
    image: Any,
    explanations: Sequence[Explanation],
    probabilities: "Tensor",
    target: int,
    layer: str | None,
) -> "Figure":
    """The gallery: the part of the PIL `image` that the network sees, and a panel for each map."""
    from captum_ext.gallery import gallery

    maps = {explanation.method.caption: explanation.map for explanation in explanations}
    title = f"{_class_name(loaded, target)}: {_percent(float(probabilities[target]))}"
    subtitle = loaded.name if layer is None else f"{loaded.name}, layer {layer}"
    return gallery(loaded.preprocess.view(image), maps, title, subtitle)


def report(
    loaded: "LoadedModel",
    explanations: Sequence[Explanation],
    probabilities: "Tensor",
    target: int,
    layer: str | None,
) -> str:
    """The five likeliest classes, the target, the layer if any, and each method's seconds."""
    likeliest = probabilities.topk(min(5, len(probabilities))).indices.tolist()
    rows = [("top 5" if i == 0 else "", index) for i, index in enumerate(likeliest)]
    classes = [
        (head, _percent(float(probabilities[i])).rjust(7), str(i).rjust(4), loaded.categories[i])
        for head, i in [*rows, ("target", target)]
    ]
    heads = [("model", loaded.name), *([] if layer is None else [("layer", layer)])]
    timed = [("method", "seconds", "")]
    for explanation in explanations:
        remark = "" if explanation.map.max() > 0 else "nothing speaks for the target"
        timed.append((explanation.method.name, f"{explanation.seconds:7.2f}", remark))
    return "\n\n".join(table(rows) for rows in (heads, classes, timed))


def _class_name(loaded: "LoadedModel", index: int) -> str:
    name = loaded.categories[index]
    return f"class {name}" if name == str(index) else name


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"
