"""The command `captum-ext explain`: what a classifier saw in a picture, by each method."""

import argparse
import sys
import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from captum_ext.cli.methods import (
    METHODS,
    Method,
    arguments_of,
    attribution,
    find_methods,
)
from captum_ext.cli.options import add_options, find_device
from captum_ext.cli.output import check_output, say, table

if TYPE_CHECKING:
    from captum.attr import Attribution
    from matplotlib.figure import Figure
    from torch import Tensor

    from captum_ext.attr.layer.base import ReshapeTransform
    from captum_ext.zoo import LoadedModel


@dataclass(frozen=True)
class Explanation:
    """What a method gave: the map to be drawn, (H, W) as the input, and the seconds it took."""

    method: Method
    map: "Tensor"
    seconds: float


def add_command(commands: Any) -> None:
    """Add `explain` to the subparsers of the command line."""
    one = commands.add_parser(
        "explain",
        help="explain an image by many methods, as a picture",
        description="Explain what an image classifier saw in an image, by one or many methods. "
        "Without arguments: a photograph of a cup of coffee, a trained network, and every "
        "method of a layer.",
    )
    one.add_argument(
        "image", nargs="?", metavar="IMAGE", help="an image file (default: a cup of coffee)"
    )
    add_options(
        one,
        "--model",
        default="efficientnet-lite0",
        help="efficientnet-lite0 (default) or any classifier of torchvision",
    )
    add_options(one, "--weights", "--method")
    one.add_argument(
        "--target", metavar="INDEX|NAME", help="the class to explain (default: the likeliest)"
    )
    add_options(one, "--layer", "--device")
    one.add_argument(
        "--output", default="explanation.png", metavar="PNG", help="default: explanation.png"
    )
    one.set_defaults(run=explain)


def explain(arguments: argparse.Namespace) -> None:
    """Run `captum-ext explain`.

    Raises:
        InputError: anything that the user can put right.
    """
    output = Path(arguments.output)
    check_output(output, arguments.image)
    methods = find_methods(arguments.method, arguments.image)
    at_layer = any(method.at_layer for method in methods)
    from captum_ext import zoo
    from captum_ext._errors import InputError
    from captum_ext._identity import atomic_write

    if arguments.layer is not None and not at_layer:
        raise InputError(f"{methods[0].name} takes no --layer: it explains the whole model")

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
    for note in notes:
        say("note", note)
    figure = draw(loaded, image, explanations, probabilities, target, layer)
    with atomic_write(output) as unfinished:
        figure.savefig(unfinished, format="png")
    print(report(loaded, explanations, probabilities, target, layer))
    print(f"\nwritten to {output}")


def run_methods(
    loaded: "LoadedModel",
    x: "Tensor",
    target: int,
    methods: Sequence[Method] = METHODS,
    layer: str | None = None,
    reshape_transform: "ReshapeTransform | None" = None,
    keep_going: bool = True,
) -> tuple[list[Explanation], list[str]]:
    """Explain class `target` of the input `x` (1, C, H, W) by each method.

    Args:
        loaded: the model.
        x: the input, on the model's device.
        target: a class.
        methods: which.
        layer: its name; None is the model's own, with its own `reshape_transform`.
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
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("ignore")
        warnings.filterwarnings("always", category=UserWarning, module="captum_ext|__main__")
        for method in bar:
            bar.set_description(method.title)
            try:
                explanations.append(
                    _run(method, attribution(method, loaded, layer, reshape_transform), x, target)
                )
            except (ValueError, RuntimeError, AssertionError) as error:
                where = f"at layer {layer} of" if method.at_layer else "on"
                note = f"{method.name} does not work {where} {loaded.name}: {error}"
                if not keep_going:
                    raise InputError(note) from error
                notes.append(f"{note} (left out)")
    if not explanations:
        raise InputError(f"no method works here; name another --layer. {notes[0]}")
    return explanations, notes + [str(warning.message) for warning in caught]


def _run(method: Method, cam: "Attribution", x: "Tensor", target: int) -> Explanation:
    import torch

    from captum_ext.attr import UpsampleWrapper

    arguments = arguments_of(method)
    if method.family == "masking":
        arguments["show_progress"] = sys.stderr.isatty()
    if method.n_masks is not None:
        arguments["generator"] = torch.Generator(x.device).manual_seed(0)
    start = time.perf_counter()
    found = UpsampleWrapper(cam).attribute(x, target=target, **arguments)[0, 0].detach().cpu()
    seconds = time.perf_counter() - start
    return Explanation(method, found if method.has_zero else found - found.min(), seconds)


def draw(
    loaded: "LoadedModel",
    image: Any,
    explanations: Sequence[Explanation],
    probabilities: "Tensor",
    target: int,
    layer: str | None,
) -> "Figure":
    """The gallery: what the network saw of the PIL `image`, and one panel for each method."""
    from captum_ext.gallery import gallery

    maps = {f"{one.method.title} ({one.method.year})": one.map for one in explanations}
    title = f"{_class(loaded, target)}: {_percent(float(probabilities[target]))}"
    where = loaded.name if layer is None else f"{loaded.name}, layer {layer}"
    return gallery(loaded.preprocess.view(image), maps, title, where)


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
    for one in explanations:
        remark = "" if one.map.max() > 0 else "nothing speaks for the target"
        timed.append((one.method.name, f"{one.seconds:7.2f}", remark))
    return "\n\n".join(table(rows) for rows in (heads, classes, timed))


def _class(loaded: "LoadedModel", index: int) -> str:
    name = loaded.categories[index]
    return f"class {name}" if name == str(index) else name


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"
