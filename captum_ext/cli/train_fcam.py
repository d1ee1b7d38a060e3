"""The command `captum-ext train-fcam`: a decoder for a classifier, from a folder of pictures.

Like `cli`, it imports what takes long only where it is used.
"""

import argparse
import inspect
import logging
import re
import sys
import warnings
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from captum_ext.cli.methods import PERTURBATIONS_PER_EVAL, Method, attribution, find_methods
from captum_ext.cli.options import (
    LARGEST_SEED,
    add_options,
    check_devices,
    find_device,
    integer,
    noise,
)
from captum_ext.cli.output import check_output, say, table
from captum_ext.cli.pictures import Folder, check_classes

if TYPE_CHECKING:
    from captum.attr import Attribution
    from torch import Tensor

    from captum_ext.attr import FCAM
    from captum_ext.zoo import LoadedModel

_ENDINGS = (".pt", ".pth")

# Arguments of `fit_fcam` and their options: flag, metavar, type, help.
_OPTIONS: Mapping[str, tuple[str, str, Callable[[str], Any], str]] = {
    "n_epochs": ("--epochs", "N", integer(1), "how often each picture is seen"),
    "batch_size": ("--batch-size", "N", integer(1), "pictures in a step, of each device"),
    "size": ("--size", "N", integer(1), "the side of what the classifier sees, in pixels"),
    "resize": (
        "--resize",
        "N",
        integer(1),
        "the side that pictures are brought to before crops of --size are taken (default: --size)",
    ),
    "checkpoints": (
        "--checkpoints",
        "DIR",
        str,
        "store each epoch there, and go on from the last one (default: nothing is stored)",
    ),
    "cache": (
        "--cache",
        "DIR",
        str,
        "store the guide's maps of the whole pictures there, once (default: explain each crop)",
    ),
    "seed": ("--seed", "N", integer(0, LARGEST_SEED), "of all random numbers"),
    "num_workers": ("--workers", "N", integer(0), "processes that read pictures"),
}


def add_command(commands: Any) -> None:
    """Add `train-fcam` to the subparsers of the command line."""
    one = commands.add_parser(
        "train-fcam",
        help="train a decoder for full-resolution maps of a classifier",
        description="Train an F-CAM decoder for an image classifier, which stays as it is, on a "
        "folder with one folder of pictures for each class. What is not given is as in "
        "captum_ext.fcam.fit_fcam.",
    )
    one.add_argument("data", metavar="DATA", help="a folder with a folder for each class")
    add_options(one, "--model", required=True)
    add_options(one, "--weights")
    one.add_argument(
        "--guide",
        default="grad-cam",
        metavar="METHOD",
        help="what teaches the decoder, see `captum-ext methods` (default: grad-cam)",
    )
    add_options(one, "--layer", help="of the guide, a dotted name (default: the last with a map)")
    one.add_argument("--output", default="fcam.pt", metavar="FILE", help="default: fcam.pt")
    for name, (flag, metavar, read, said) in _OPTIONS.items():
        one.add_argument(
            flag, dest=name, metavar=metavar, type=read, help=said, default=argparse.SUPPRESS
        )
    one.add_argument(
        "--paper", action="store_true", help="the paper's settings, where no option says otherwise"
    )
    add_options(one, "--devices", help="GPUs to train on, or processes of a CPU (default: 1)")
    add_options(one, "--device")
    one.set_defaults(run=train_fcam)


def train_fcam(arguments: argparse.Namespace) -> None:
    """Run `captum-ext train-fcam`.

    Raises:
        InputError: anything that the user can put right.
        KeyboardInterrupt: Ctrl-C; its message says what was stored.
    """
    output = Path(arguments.output)
    _check_files(output, arguments.weights, getattr(arguments, "checkpoints", None))
    (method,) = find_methods([arguments.guide], arguments.data, at_layer=True)
    fit_fcam, settings = _trainer(arguments)
    folder = Folder(arguments.data)
    device = find_device(arguments.device)
    if arguments.devices > 1:  # as it comes, `fit_fcam` trains where the classifier is
        check_devices(arguments.devices, device)
        settings["trainer"] = {"devices": arguments.devices}
    from captum_ext import zoo

    loaded = zoo.load_model(arguments.model, arguments.weights)
    fewer = check_classes(folder, loaded, f"the folder {folder.root!r}")
    loaded.module.to(device)
    checkpoint = _checkpoint(settings["checkpoints"])

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("ignore")
        warnings.filterwarnings("always", category=UserWarning, module="captum_ext|__main__")
        # The folder keeps these itself: warnings of other processes do not come here.
        warnings.filterwarnings("ignore", message=".* cannot be read and (is|are) left out")
        x = noise(settings["size"]).to(device)
        taps = _check_sees(loaded, x)
        layer, reshape_transform = zoo.find_layer(loaded, x, arguments.layer)
        guide, guide_kwargs = _guide(method, loaded, layer, reshape_transform, x)
        if fewer and _is_first():  # before hours are spent on it
            say("note", fewer)
        fcam = _fit(
            lambda: fit_fcam(
                loaded.module,
                folder,
                guide,
                layers=taps,
                normalize=(loaded.preprocess.mean, loaded.preprocess.std),
                guide_kwargs=guide_kwargs,
                rectify=method.name != "cam",  # as the authors have it
                **settings,
            ),
            settings["checkpoints"],
            folder,
        )
    unread = folder.unread_in_all()
    if not _is_first():
        return
    for text in dict.fromkeys(str(warning.message) for warning in caught):
        say("note", text)
    if unread:
        say("note", f"{len(unread)} of {len(folder)} pictures were left out:")
    for index in unread:
        say("note", folder.why(index))
    fcam.save(output)
    rows = [
        ("model", loaded.name),
        ("guide", f"{method.name} at layer {layer}"),
        ("decoder", f"reads {', '.join(taps)}"),
        ("pictures", f"{len(folder) - len(unread)} of {len(folder.classes)} classes"),
        ("epochs", str(settings["n_epochs"])),
        *([("went on", f"from {checkpoint}")] if checkpoint else []),
    ]
    print(table(rows))
    print(f"\nwritten to {output}; load it by\n\n{_recipe(arguments, output)}")


def _recipe(arguments: argparse.Namespace, output: Path) -> str:
    """The lines of Python that load the decoder."""
    given = [arguments.model] + ([] if arguments.weights is None else [arguments.weights])
    return (
        f"    from captum_ext.attr import FCAM\n"
        f"    from captum_ext.zoo import load_model\n\n"
        f"    model = load_model({', '.join(map(repr, given))}).module\n"
        f"    fcam = FCAM.load({str(output)!r}, model)"
    )


# --- the model -----------------------------------------------------------------------------------


def _check_sees(loaded: "LoadedModel", x: "Tensor") -> list[str]:
    """The layers that a decoder reads at the size of `x`.

    Raises:
        InputError: the model does not take this size, or has no features for a decoder.
    """
    from captum_ext._errors import InputError
    from captum_ext.fcam import find_taps
    from captum_ext.zoo import probabilities

    pixels = f"{x.shape[2]} x {x.shape[3]} pixels"
    try:
        probabilities(loaded, x)
    except InputError:
        raise
    except (RuntimeError, ValueError, AssertionError) as error:
        raise InputError(
            f"{loaded.name} does not take pictures of {pixels} ({error}): give another --size"
        ) from error
    try:
        return find_taps(loaded.module, x)
    except ValueError as error:
        raise InputError(
            f"{loaded.name} has no spatial features of several resolutions at {pixels}, which a "
            f"decoder needs: give a convolutional --model, or a larger --size"
        ) from error


def _guide(
    method: Method, loaded: "LoadedModel", layer: str, reshape_transform: Any, x: "Tensor"
) -> tuple["Attribution", dict[str, Any]]:
    """The guide and the arguments of its `attribute`, after it has explained `x`.

    Raises:
        InputError: it does not work there, or its maps are no maps.
    """
    import torch

    from captum_ext._errors import InputError
    from captum_ext.fcam.guides import guide_maps

    masking = method.family == "masking"
    kwargs: dict[str, Any] = {"perturbations_per_eval": PERTURBATIONS_PER_EVAL} if masking else {}
    try:
        guide = attribution(method, loaded, layer, reshape_transform)
        target = torch.zeros(1, dtype=torch.int64, device=x.device)
        guide_maps(guide, x, target, **kwargs)
    except (ValueError, RuntimeError, AssertionError) as error:
        if "of a single pixel" in str(error):
            raise InputError(
                f"{method.name} at layer {layer} of {loaded.name} gives maps of a single pixel: "
                f"give a larger --size, or a --layer in front of it"
            ) from error
        raise InputError(
            f"{method.name} does not work at layer {layer} of {loaded.name}: {error}"
        ) from error
    return guide, kwargs


# --- the training --------------------------------------------------------------------------------


def _trainer(arguments: argparse.Namespace) -> tuple[Callable[..., "FCAM"], dict[str, Any]]:
    """`fit_fcam`, and its settings: its own, the paper's where asked for, and what was given.

    Raises:
        InputError: Lightning is not installed.
    """
    from captum_ext._errors import InputError

    try:
        from captum_ext.fcam import PAPER, fit_fcam
    except ImportError as error:
        if isinstance(error.__cause__, ModuleNotFoundError):
            raise InputError(
                'train-fcam needs Lightning of the extra `train`: pip install "captum_ext[train]"'
            ) from error
        raise
    for name in ("lightning.pytorch", "lightning.fabric"):  # devices found, and advice
        logging.getLogger(name).setLevel(logging.ERROR)
    defaults = inspect.signature(fit_fcam).parameters
    settings = {name: defaults[name].default for name in _OPTIONS}
    settings |= PAPER if arguments.paper else {}
    settings |= {name: vars(arguments)[name] for name in _OPTIONS if name in arguments}
    settings["show_progress"] = sys.stdout.isatty() and sys.stderr.isatty()
    return fit_fcam, settings


def _fit(fit: Callable[[], "FCAM"], checkpoints: str | None, folder: Folder) -> "FCAM":
    """What `fit` gives, with its errors in the words of the command line."""
    import torch

    from captum_ext._errors import InputError

    try:
        return fit()
    except KeyboardInterrupt:
        file = _checkpoint(checkpoints)
        stored = f"; the same command goes on from {file}" if file else ""
        raise KeyboardInterrupt(f"interrupted{stored}") from None
    except FloatingPointError as error:
        file = _checkpoint(checkpoints)
        stored = f" The last checkpoint is {file}" if file else ""
        raise InputError(f"{error}{stored}") from error
    except torch.cuda.OutOfMemoryError as error:
        raise InputError("the GPU has too little memory: give a lower --batch-size") from error
    except ValueError as error:
        if bool(folder.unread.all()):
            first = folder.why(0)
            raise InputError(
                f"none of the {len(folder)} pictures can be read; the first: {first}"
            ) from error
        flags = {f"`{name}`": option[0] for name, option in _OPTIONS.items()}
        flags["`guide`"] = "--guide"
        flags["`checkpoints`"] += f" {checkpoints}"
        said = re.sub(r"`\w+`", lambda found: flags.get(found[0], found[0]), str(error))
        if said == str(error):  # nothing that was given, so a mistake of ours
            raise
        raise InputError(said) from error


def _checkpoint(folder: str | None) -> Path | None:
    """Where a run goes on from; None where it begins."""
    file = Path(folder or "") / "last.ckpt"
    return file if folder and file.is_file() else None


def _is_first() -> bool:
    """Whether this process writes and speaks; with --devices, others run the same command."""
    from lightning.pytorch.utilities import rank_zero_only

    return not getattr(rank_zero_only, "rank", 0)


# --- the decoder's file --------------------------------------------------------------------------


def _check_files(output: Path, weights: str | None, checkpoints: str | None) -> None:
    from captum_ext._errors import InputError

    check_output(output, endings=_ENDINGS)
    if weights and output.exists() and Path(weights).exists() and output.samefile(weights):
        raise InputError(f"the output {str(output)!r} is the weights file: give another name")
    if checkpoints is not None and Path(checkpoints).exists() and not Path(checkpoints).is_dir():
        raise InputError(f"--checkpoints {checkpoints} is a file: give a folder")
    file = _checkpoint(checkpoints)
    if file and not zipfile.is_zipfile(file):
        raise InputError(f"{str(file)!r} is not a checkpoint: name another folder, or delete it")
