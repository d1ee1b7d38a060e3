"""The command `captum-ext train-fcam`: a decoder for a classifier, from a folder of pictures.

Modules that take long to import are imported only where they are used.
"""

import argparse
import functools
import logging
import sys
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from captum_ext.cli.methods import Method, find_methods
from captum_ext.cli.models import check_devices, check_input_size, find_device, random_input
from captum_ext.cli.options import COUNT, SHARED, Options, add_options
from captum_ext.cli.output import (
    check_output_file,
    collected_warnings,
    message_with_flags,
    say,
    table,
)
from captum_ext.cli.pictures import PictureFolder, check_classes
from captum_ext.cli.signatures import defaults_of

if TYPE_CHECKING:
    from captum.attr import Attribution
    from torch import Tensor

    from captum_ext.attr import FCAM
    from captum_ext.zoo import LoadedModel

_ENDINGS = (".pt", ".pth")

# Arguments of `fit_fcam`, and their flags.
_FLAGS: Mapping[str, str] = {
    "n_epochs": "--epochs",
    "batch_size": "--batch-size",
    "size": "--size",
    "resize": "--resize",
    "checkpoints": "--checkpoints",
    "cache": "--cache",
    "seed": "--seed",
    "num_workers": "--workers",
}
_FIT_OPTIONS: Mapping[str, dict[str, Any]] = {
    "--epochs": COUNT | {"help": "the number of times that each picture is seen"},
    "--batch-size": COUNT | {"help": "the number of pictures in a step, on each device"},
    "--size": COUNT | {"help": "the side of the classifier's input, in pixels"},
    "--resize": COUNT
    | {
        "help": "the side to which pictures are resized before crops of --size are taken (default: "
        "--size)",
    },
    "--checkpoints": {
        "metavar": "DIR",
        "help": "a folder to store each epoch in; a run that was stopped continues from the last "
        "one (default: nothing is stored)",
    },
    "--cache": {
        "metavar": "DIR",
        "help": "a folder to store the guide's maps of the whole pictures in (default: each crop "
        "is explained anew)",
    },
    "--seed": SHARED["--seed"],
    "--workers": SHARED["--workers"],
}


def _options() -> Options:
    """The options, with the defaults of `captum_ext.fcam.fit_fcam`."""
    defaults = defaults_of("fcam.fit", "fit_fcam")
    fit_options = {
        flag: _FIT_OPTIONS[flag] | {"dest": name, "default": defaults[name]}
        for name, flag in _FLAGS.items()
    }
    return {
        "data": {"metavar": "DATA", "help": "a folder with a folder of pictures for each class"},
        "--model": SHARED["--model"] | {"required": True},
        "--weights": SHARED["--weights"],
        "--guide": {
            "metavar": "METHOD",
            "default": "grad-cam",
            "help": "the method whose maps teach the decoder, by its name in `captum-ext methods`",
        },
        "--layer": SHARED["--layer"],
        "--output": {
            "metavar": "FILE",
            "default": "fcam.pt",
            "help": "the file to write the decoder to",
        },
        **fit_options,
        "--paper": {
            "action": "store_true",
            "default": False,
            "help": "use the paper's settings in place of the defaults",
        },
        "--devices": SHARED["--devices"] | {"default": 1},
        "--device": SHARED["--device"],
    }


def add_command(commands: Any) -> None:
    """Add `train-fcam` to the subparsers of the command line."""
    parser = commands.add_parser(
        "train-fcam",
        help="train a decoder that gives full-resolution maps of a classifier",
        description="Train an F-CAM decoder on the features of an image classifier, which does not "
        "change. The folder of pictures needs no boxes and no masks.",
    )
    _, defaults = add_options(parser, _options())
    parser.set_defaults(run=functools.partial(train_fcam, defaults))


def train_fcam(defaults: Mapping[str, Any], command_line: argparse.Namespace) -> None:
    """Run `captum-ext train-fcam`.

    Args:
        defaults: the options' defaults.
        command_line: the options on the command line, and no others.

    Raises:
        InputError: anything that the user can correct.
        KeyboardInterrupt: Ctrl-C; its message says what was stored.
    """
    arguments = argparse.Namespace(**{**defaults, **vars(command_line)})
    output = Path(arguments.output)
    _check_files(output, arguments.weights, arguments.checkpoints)
    (method,) = find_methods([arguments.guide], arguments.data, at_layer=True)
    fit_fcam, settings = _fit_settings(arguments, command_line)
    folder = PictureFolder(arguments.data)
    device = find_device(arguments.device)
    if arguments.devices > 1:  # without it, `fit_fcam` trains on the classifier's device
        check_devices(arguments.devices, device)
        settings["trainer"] = {"devices": arguments.devices}
    from captum_ext import zoo

    loaded = zoo.load_model(arguments.model, arguments.weights)
    classes_note = check_classes(folder, loaded)
    loaded.module.to(device)
    checkpoint = _checkpoint(settings["checkpoints"])

    # Warnings of other processes do not come here, so the folder remembers unreadable pictures.
    with collected_warnings(".* cannot be read and (is|are) left out") as notes:
        x = random_input(settings["size"]).to(device)
        check_input_size(loaded, x)
        feature_layers = _find_feature_layers(loaded, x)
        layer, reshape_transform = zoo.find_layer(loaded, x, arguments.layer)
        guide, guide_kwargs = _guide(method, loaded, layer, reshape_transform, x)
        if classes_note and _is_first_process():  # before hours are spent on the training
            say("note", classes_note)
        fcam = _fit(
            lambda: fit_fcam(
                loaded.module,
                folder,
                guide,
                layers=feature_layers,
                normalize=(loaded.preprocess.mean, loaded.preprocess.std),
                guide_kwargs=guide_kwargs,
                rectify=method.name != "cam",  # as in the authors' code
                **settings,
            ),
            settings["checkpoints"],
            folder,
        )
    unreadable = folder.unreadable_indices()
    if not _is_first_process():
        return
    if unreadable:
        notes.append(f"{len(unreadable)} of {len(folder)} pictures were left out:")
        notes += map(folder.reason, unreadable)
    for note in notes:
        say("note", note)
    fcam.save(output)
    rows = [
        ("model", loaded.name),
        ("guide", f"{method.name} at layer {layer}"),
        ("decoder", f"reads {', '.join(feature_layers)}"),
        ("pictures", f"{len(folder) - len(unreadable)} of {len(folder.classes)} classes"),
        ("epochs", str(settings["n_epochs"])),
        *([("went on", f"from {checkpoint}")] if checkpoint else []),
    ]
    print(table(rows))
    print(f"\nwritten to {output}; load it by\n\n{_recipe(arguments, output)}")


def _recipe(arguments: argparse.Namespace, output: Path) -> str:
    """The lines of Python that load the decoder."""
    names = [arguments.model] + ([] if arguments.weights is None else [arguments.weights])
    return (
        f"    from captum_ext.attr import FCAM\n"
        f"    from captum_ext.zoo import load_model\n\n"
        f"    model = load_model({', '.join(map(repr, names))}).module\n"
        f"    fcam = FCAM.load({str(output)!r}, model)"
    )


# --- the model -----------------------------------------------------------------------------------


def _find_feature_layers(loaded: "LoadedModel", x: "Tensor") -> list[str]:
    """The layers that a decoder reads at the size of `x`.

    Raises:
        InputError: the model has no features for a decoder.
    """
    from captum_ext._errors import InputError
    from captum_ext.fcam import find_feature_layers

    try:
        return find_feature_layers(loaded.module, x)
    except ValueError as error:
        raise InputError(
            f"{loaded.name} has no spatial features of several resolutions at {x.shape[2]} x "
            f"{x.shape[3]} pixels, which a decoder needs: give a convolutional --model, or a "
            f"larger --size"
        ) from error


def _guide(
    method: Method, loaded: "LoadedModel", layer: str, reshape_transform: Any, x: "Tensor"
) -> tuple["Attribution", dict[str, Any]]:
    """The guide and the arguments of its `attribute`, tried on `x`.

    Raises:
        InputError: it does not work at the layer, or gives no maps there.
    """
    import torch

    from captum_ext._errors import ArgumentError, InputError
    from captum_ext.fcam.guides import guide_maps

    arguments = method.batching()
    try:
        guide = method.attribution(loaded, layer, reshape_transform)
        target = torch.zeros(1, dtype=torch.int64, device=x.device)
        guide_maps(guide, x, target, **arguments)
    except method.expected_errors as error:
        if isinstance(error, ArgumentError) and error.code == "single_cell":
            raise InputError(
                f"{method.name} at layer {layer} of {loaded.name} gives maps of a single pixel: "
                f"give a larger --size, or a --layer in front of it"
            ) from error
        raise InputError(
            f"{method.name} does not work at layer {layer} of {loaded.name}: {error}"
        ) from error
    return guide, arguments


# --- the training --------------------------------------------------------------------------------


def _fit_settings(
    arguments: argparse.Namespace, command_line: argparse.Namespace
) -> tuple[Callable[..., "FCAM"], dict[str, Any]]:
    """`fit_fcam` and its settings: those of the command line, the paper's, or the defaults.

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
    for name in ("lightning.pytorch", "lightning.fabric"):  # they name devices and give advice
        logging.getLogger(name).setLevel(logging.ERROR)
    settings = {name: vars(arguments)[name] for name in _FLAGS}
    settings |= PAPER if arguments.paper else {}
    settings |= {name: vars(arguments)[name] for name in _FLAGS if name in command_line}
    settings["show_progress"] = sys.stdout.isatty() and sys.stderr.isatty()
    return fit_fcam, settings


def _fit(fit: Callable[[], "FCAM"], checkpoints: str | None, folder: PictureFolder) -> "FCAM":
    """Call `fit`, with its errors in the flags of the command line."""
    import torch

    from captum_ext._errors import InputError

    try:
        return fit()
    except (KeyboardInterrupt, SystemExit) as stop:  # Lightning raises the latter for SIGTERM
        file = _checkpoint(checkpoints)
        stored = f"; the same command resumes from {file}" if file else ""
        if isinstance(stop, KeyboardInterrupt):
            raise KeyboardInterrupt(f"interrupted{stored}") from None
        say("stopped", f"terminated{stored}")
        raise
    except FloatingPointError as error:
        file = _checkpoint(checkpoints)
        stored = f" The last checkpoint is {file}" if file else ""
        raise InputError(f"{error}{stored}") from error
    except torch.cuda.OutOfMemoryError as error:
        raise InputError("the GPU has too little memory: give a lower --batch-size") from error
    except (ValueError, TypeError) as error:
        if bool(folder.is_unreadable.all()):
            raise InputError(
                f"none of the {len(folder)} pictures can be read; the first: {folder.reason(0)}"
            ) from error
        flags = {**_FLAGS, "guide": "--guide", "checkpoints": f"--checkpoints {checkpoints}"}
        if getattr(error, "argument", None) not in flags:  # the mistake is ours
            raise
        raise InputError(message_with_flags(error, flags)) from error


def _checkpoint(folder: str | None) -> Path | None:
    """The file that a stopped run continues from; None where there is none."""
    file = Path(folder or "") / "last.ckpt"
    return file if folder and file.is_file() else None


def _is_first_process() -> bool:
    """Return whether this process writes files and messages; --devices makes others train too."""
    from lightning.pytorch.utilities import rank_zero_only

    return not getattr(rank_zero_only, "rank", 0)


# --- the decoder's file --------------------------------------------------------------------------


def _check_files(output: Path, weights: str | None, checkpoints: str | None) -> None:
    from captum_ext._errors import InputError

    check_output_file(output, endings=_ENDINGS)
    if weights and output.exists() and Path(weights).exists() and output.samefile(weights):
        raise InputError(f"the output {str(output)!r} is the weights file: give another name")
    if checkpoints is not None and Path(checkpoints).exists() and not Path(checkpoints).is_dir():
        raise InputError(f"--checkpoints {checkpoints} is a file: give a folder")
    file = _checkpoint(checkpoints)
    if file and not zipfile.is_zipfile(file):
        raise InputError(f"{str(file)!r} is not a checkpoint: name another folder, or delete it")
