"""The command line: `explain`, `methods`, `train-fcam` (`cli_train`), `evaluate` (`cli_evaluate`).

Without arguments, `captum-ext explain` explains a photograph by every layer method. What
takes long to import is imported only where it is used, so that `--help` and `methods` are quick.
"""

import argparse
import io
import logging
import os
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from captum_ext import __version__

if TYPE_CHECKING:
    import torch
    from captum.attr import Attribution
    from matplotlib.figure import Figure
    from torch import Tensor

    from captum_ext.attr.layer.template import ReshapeTransform
    from captum_ext.demo import LoadedModel

_PERTURBATIONS_PER_EVAL = 16  # the fastest on a CPU, by a little


@dataclass(frozen=True)
class Method:
    """One layer method of the command line.

    Attributes:
        name: on the command line.
        title: in the picture.
        class_name: in `captum_ext.attr`, or in `captum.attr` for Captum's own.
        family: "gradient", "masking" or "other".
        gradients: whether it needs gradients.
        passes: forward passes for an image; K is the number of the layer's channels.
        authors: of the paper.
        year: of the paper.
        rectify: whether `attribute` is asked for the positive part, as the papers do.
        seeded: whether it draws noise from a `generator`.
    """

    name: str
    title: str
    class_name: str
    family: str
    gradients: bool
    passes: str
    authors: str
    year: int
    rectify: bool = True
    seeded: bool = False


# fmt: off
METHODS = (
    Method("cam", "CAM", "LayerClassActivationMap", "other", False,
           "1", "Zhou et al.", 2016),
    Method("grad-cam", "Grad-CAM", "LayerGradCam", "gradient", True,
           "1", "Selvaraju et al.", 2017),
    Method("grad-cam++", "Grad-CAM++", "LayerGradCamPlusPlus", "gradient", True,
           "1", "Chattopadhay et al.", 2018),
    Method("smooth-grad-cam++", "Smooth Grad-CAM++", "LayerSmoothGradCamPlusPlus", "gradient", True,
           "26", "Omeiza et al.", 2019, seeded=True),
    Method("sharpen-focus", "Sharpen Focus", "LayerSharpenFocus", "gradient", True,
           "1", "Wang et al.", 2019),
    Method("xgrad-cam", "XGrad-CAM", "LayerXGradCam", "gradient", True,
           "1", "Fu et al.", 2020),
    Method("hires-cam", "HiResCAM", "LayerHiResCam", "gradient", True,
           "1", "Draelos and Carin", 2020),
    Method("layer-cam", "LayerCAM", "LayerCam", "gradient", True,
           "1", "Jiang et al.", 2021),
    Method("eigen-cam", "Eigen-CAM", "LayerEigenCam", "other", False,
           "1", "Muhammad and Yeasin", 2020),
    Method("score-cam", "Score-CAM", "LayerScoreCam", "masking", False,
           "1 + K", "Wang et al.", 2020),
    Method("ablation-cam", "Ablation-CAM", "LayerAblationCam", "masking", False,
           "1 + K*", "Desai and Ramaswamy", 2020),
    Method("group-cam", "Group-CAM", "LayerGroupCam", "masking", True,
           "34", "Zhang et al.", 2021, rectify=False),
)
# fmt: on


@dataclass(frozen=True)
class Explanation:
    """What a method gave: the map at the size of the input, (H, W), and the seconds it took."""

    method: Method
    map: "Tensor"
    seconds: float


# --- captum-ext explain --------------------------------------------------------------------------


def explain(arguments: argparse.Namespace) -> None:
    """Run `captum-ext explain`.

    Raises:
        InputError: anything that the user can put right.
    """
    output = Path(arguments.output)
    check_output(output, arguments.image)
    methods = find_methods(arguments.method, arguments.image)
    from captum_ext import demo

    image = demo.load_image(arguments.image)
    device = find_device(arguments.device)
    loaded = demo.load_model(arguments.model, arguments.weights)
    loaded.module.to(device)
    target = None if arguments.target is None else loaded.class_index(arguments.target)
    x = loaded.preprocess(image).to(device)
    layer, reshape_transform = demo.find_layer(loaded, x, arguments.layer)
    probabilities = demo.probabilities(loaded, x)
    target = int(probabilities.argmax()) if target is None else target

    explanations, notes = run_methods(
        loaded, x, target, methods, layer, reshape_transform, keep_going=not arguments.method
    )
    for note in notes:
        _say("note", note)
    figure = draw(loaded, image, explanations, probabilities, target, layer)
    save(figure, output)
    print(report(loaded, explanations, probabilities, target, layer))
    print(f"\nwritten to {output}")


def find_methods(names: Sequence[str] | None, image: str | None = None) -> tuple[Method, ...]:
    """The methods with these names, in any case; None is all of them.

    Raises:
        InputError: an unknown name.
    """
    known = {_key(method.name): method for method in METHODS}
    for name in names or ():
        if _key(name) not in known:
            from captum_ext._model import closest
            from captum_ext.demo import InputError

            hint = "; an IMAGE goes in front of --method" if image is None else ""
            raise InputError(
                f"unknown method {name!r}. Closest: "
                f"{closest(name.lower(), [method.name for method in METHODS])}{hint}"
            )
    return tuple(dict.fromkeys(known[_key(name)] for name in names)) if names else METHODS


def _key(name: str) -> str:
    return name.lower().replace("-", "").replace("_", "")


def find_device(name: str | None) -> "torch.device":
    """The device called `name`; None is the first GPU, or the CPU where there is none.

    Raises:
        InputError: a device that is unknown or cannot be used.
    """
    import torch

    from captum_ext.demo import InputError

    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            device = torch.device(name)
            torch.zeros(1, device=device).item()
    except (
        RuntimeError,
        AssertionError,
        ImportError,
    ) as error:  # what torch says of it takes many lines
        gpus = [f"cuda:{i}" for i in range(torch.cuda.device_count())]
        mps = ["mps"] if torch.backends.mps.is_available() else []
        raise InputError(
            f"the device {name!r} cannot be used here. Available: {', '.join(['cpu', *gpus, *mps])}"
        ) from error
    return device


def attribution(
    method: Method,
    loaded: "LoadedModel",
    layer: str,
    reshape_transform: "ReshapeTransform | None",
) -> "Attribution":
    """The method's attribution object.

    Grad-CAM is Captum's own where it can read the layer.
    """
    import captum.attr
    import torch

    import captum_ext.attr

    if method.name == "grad-cam" and reshape_transform is None:
        return captum.attr.LayerGradCam(loaded.module, loaded.module.get_submodule(layer))
    options: dict[str, Any] = {"reshape_transform": reshape_transform}
    if method.name == "grad-cam":
        return captum_ext.attr.LayerTokenGradCam(loaded.module, layer, **options)
    if method.seeded:
        options["generator"] = torch.Generator().manual_seed(0)
    return getattr(captum_ext.attr, method.class_name)(loaded.module, layer, **options)


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

    from captum_ext.demo import InputError

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
                note = f"{method.name} does not work at layer {layer} of {loaded.name}: {error}"
                if not keep_going:
                    raise InputError(note) from error
                notes.append(f"{note} (left out)")
    if not explanations:
        raise InputError(f"no method works here; name another --layer. {notes[0]}")
    return explanations, notes + [str(warning.message) for warning in caught]


def _run(method: Method, cam: "Attribution", x: "Tensor", target: int) -> Explanation:
    from captum_ext.attr import UpsampleWrapper

    arguments: dict[str, Any] = {"relu_attributions": True} if method.rectify else {}
    if method.family == "masking":
        arguments["perturbations_per_eval"] = _PERTURBATIONS_PER_EVAL
        arguments["show_progress"] = sys.stderr.isatty()
    start = time.perf_counter()
    found = UpsampleWrapper(cam).attribute(x, target=target, **arguments)
    return Explanation(method, found[0, 0].detach().cpu(), time.perf_counter() - start)


def draw(
    loaded: "LoadedModel",
    image: Any,
    explanations: Sequence[Explanation],
    probabilities: "Tensor",
    target: int,
    layer: str,
) -> "Figure":
    """The gallery: what the network saw of the PIL `image`, and one panel for each method."""
    from captum_ext.gallery import gallery

    maps = {f"{one.method.title} ({one.method.year})": one.map for one in explanations}
    title = f"{_class(loaded, target)}: {_percent(float(probabilities[target]))}"
    return gallery(loaded.preprocess.view(image), maps, title, f"{loaded.name}, layer {layer}")


def report(
    loaded: "LoadedModel",
    explanations: Sequence[Explanation],
    probabilities: "Tensor",
    target: int,
    layer: str,
) -> str:
    """The five likeliest classes, the target, the layer, and the seconds of each method."""
    likeliest = probabilities.topk(min(5, len(probabilities))).indices.tolist()
    rows = [("top 5" if i == 0 else "", index) for i, index in enumerate(likeliest)]
    classes = [
        (head, _percent(float(probabilities[i])).rjust(7), str(i).rjust(4), loaded.categories[i])
        for head, i in [*rows, ("target", target)]
    ]
    heads = [("model", loaded.name), ("layer", layer)]
    timed = [("method", "seconds", "")]
    for one in explanations:
        remark = "" if one.map.max() > 0 else "nothing speaks for the target"
        timed.append((one.method.name, f"{one.seconds:7.2f}", remark))
    return "\n\n".join(_table(rows) for rows in (heads, classes, timed))


def _class(loaded: "LoadedModel", index: int) -> str:
    name = loaded.categories[index]
    return f"class {name}" if name == str(index) else name


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def _table(rows: Sequence[Sequence[str]]) -> str:
    widths = [max(len(cell) for cell in column) for column in zip(*rows, strict=True)]
    lines = (
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True))
        for row in rows
    )
    return "\n".join(line.rstrip() for line in lines)


# --- the picture's file --------------------------------------------------------------------------


def check_output(
    output: Path, image: str | None = None, endings: tuple[str, ...] = (".png",)
) -> None:
    """Refuse, before anything is computed, an output that could not be written.

    Raises:
        InputError: another ending, no folder, a folder that is not writable, or the image itself.
    """
    from captum_ext.demo import InputError

    folder = output.parent
    if output.suffix.lower() not in endings:
        raise InputError(
            f"the output {str(output)!r} must have a name that ends in {' or '.join(endings)}"
        )
    if not folder.is_dir():
        raise InputError(f"the output folder {str(folder)!r} does not exist: make it first")
    if output.is_dir():
        raise InputError(f"the output {str(output)!r} is a folder: give the name of a file")
    if image is not None and output.exists() and Path(image).exists() and output.samefile(image):
        raise InputError(f"the output {str(output)!r} is the image itself: give another name")
    try:
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise InputError(
            f"the output folder {str(folder)!r} is not writable ({error.strerror}): give another"
        ) from error


def save(figure: "Figure", output: Path) -> None:
    """Write the figure as a PNG: the whole file, or none."""
    unfinished = output.with_name(f".captum-ext-{os.getpid()}.png")
    try:
        figure.savefig(unfinished, format="png")
        unfinished.replace(output)
    finally:
        unfinished.unlink(missing_ok=True)


# --- captum-ext methods --------------------------------------------------------------------------


def methods(arguments: argparse.Namespace) -> None:
    """Run `captum-ext methods`."""
    rows = [("method", "class", "family", "grad", "passes", "paper")]
    for one in METHODS:
        needed = "yes" if one.gradients else "no"
        paper = f"{one.authors} {one.year}"
        rows.append((one.name, one.class_name, one.family, needed, one.passes, paper))
    print(_table(rows))
    print(
        "\ngrad: whether gradients are needed. passes: forward passes for an image, where K is\n"
        "the number of the layer's channels; * of the part behind the layer only."
    )


# --- the program ---------------------------------------------------------------------------------


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        _say("error", f"{message} (see {self.prog} --help)")
        raise SystemExit(2)


def _parser() -> argparse.ArgumentParser:
    parser = _Parser("captum-ext", description="More attribution methods for Captum.")
    parser.add_argument("--version", action="version", version=f"captum-ext {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    one = commands.add_parser(
        "explain",
        help="explain an image by layer methods, as a picture",
        description="Explain what an image classifier saw in an image, by one or many methods. "
        "Without arguments: a photograph of a cup of coffee, a trained network, and every method.",
    )
    one.add_argument(
        "image", nargs="?", metavar="IMAGE", help="an image file (default: a cup of coffee)"
    )
    one.add_argument(
        "--model",
        default="efficientnet-lite0",
        metavar="NAME",
        help="efficientnet-lite0 (default) or any classifier of torchvision",
    )
    one.add_argument(
        "--weights",
        metavar="FILE",
        help="a file with the model's state dict; nothing is downloaded",
    )
    one.add_argument(
        "--method",
        nargs="+",
        action="extend",
        metavar="NAME",
        help="see `captum-ext methods` (default: all)",
    )
    one.add_argument(
        "--target", metavar="INDEX|NAME", help="the class to explain (default: the likeliest)"
    )
    one.add_argument("--layer", metavar="NAME", help="a dotted name (default: the last with a map)")
    one.add_argument("--device", metavar="D", help="cpu, cuda, cuda:1, mps (default: a GPU if any)")
    one.add_argument(
        "--output", default="explanation.png", metavar="PNG", help="default: explanation.png"
    )
    one.set_defaults(run=explain)
    commands.add_parser("methods", help="list the methods").set_defaults(run=methods)
    from captum_ext import cli_evaluate, cli_train  # which import this module

    cli_train.add_command(commands)
    cli_evaluate.add_command(commands)
    return parser


def _say(kind: str, text: str) -> None:
    print(f"captum-ext: {kind}: {' '.join(text.split())}", file=sys.stderr)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; the exit code.

    0; 1 where a part of an evaluation failed; 2 for what the user can put right; 130 for Ctrl-C.
    """
    logging.getLogger("matplotlib").setLevel(logging.ERROR)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # a file's name may be no text at all
    arguments = _parser().parse_args(argv)
    run: Callable[[argparse.Namespace], int | None] = arguments.run
    try:
        code = run(arguments)
        sys.stdout.flush()
    except KeyboardInterrupt as stop:
        _say("stopped", str(stop) or "interrupted")
        return 130
    except BrokenPipeError:  # `captum-ext methods | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except Exception as error:
        from captum_ext.demo import InputError

        if not isinstance(error, InputError | OSError):
            raise
        _say("error", str(error))
        return 2
    return code or 0


if __name__ == "__main__":
    sys.exit(main())
