"""The command `captum-ext train-fcam`: a decoder for a classifier, from a folder of pictures.

Like `cli`, it imports what takes long only where it is used.
"""

import argparse
import inspect
import logging
import os
import re
import sys
import warnings
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from captum_ext.cli import (
    _PERTURBATIONS_PER_EVAL,
    Method,
    _say,
    _table,
    attribution,
    check_output,
    find_device,
    find_methods,
)

if TYPE_CHECKING:
    import torch
    from captum.attr import Attribution
    from torch import Tensor

    from captum_ext.attr import FCAM
    from captum_ext.demo import LoadedModel

_ENDINGS = (".pt", ".pth")
_LARGEST_SEED = 2**32 - 1


def _integer(low: int, high: int | None = None) -> Callable[[str], int]:
    def read(text: str) -> int:
        value = int(text)
        if value < low or (high is not None and value > high):
            end = "or more" if high is None else f"to {high}"
            raise argparse.ArgumentTypeError(f"{value} is not {low} {end}")
        return value

    read.__name__ = "integer"  # argparse's message has it
    return read


# Arguments of `fit_fcam` and their options: flag, metavar, type, help.
_OPTIONS: Mapping[str, tuple[str, str, Callable[[str], Any], str]] = {
    "n_epochs": ("--epochs", "N", _integer(1), "how often each picture is seen"),
    "batch_size": ("--batch-size", "N", _integer(1), "pictures in a step, of each device"),
    "size": ("--size", "N", _integer(1), "the side of what the classifier sees, in pixels"),
    "resize": (
        "--resize",
        "N",
        _integer(1),
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
    "seed": ("--seed", "N", _integer(0, _LARGEST_SEED), "of all random numbers"),
    "num_workers": ("--workers", "N", _integer(0), "processes that read pictures"),
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
    one.add_argument(
        "--model",
        required=True,
        metavar="NAME",
        help="efficientnet-lite0 or any classifier of torchvision",
    )
    one.add_argument(
        "--weights",
        metavar="FILE",
        help="a file with the model's state dict; nothing is downloaded",
    )
    one.add_argument(
        "--guide",
        default="grad-cam",
        metavar="METHOD",
        help="what teaches the decoder, see `captum-ext methods` (default: grad-cam)",
    )
    one.add_argument(
        "--layer", metavar="NAME", help="of the guide, a dotted name (default: the last with a map)"
    )
    one.add_argument("--output", default="fcam.pt", metavar="FILE", help="default: fcam.pt")
    for name, (flag, metavar, read, said) in _OPTIONS.items():
        one.add_argument(
            flag, dest=name, metavar=metavar, type=read, help=said, default=argparse.SUPPRESS
        )
    one.add_argument(
        "--paper", action="store_true", help="the paper's settings, where no option says otherwise"
    )
    one.add_argument(
        "--devices",
        default=1,
        type=_integer(1),
        metavar="N",
        help="GPUs to train on, or processes of a CPU (default: 1)",
    )
    one.add_argument("--device", metavar="D", help="cpu, cuda, cuda:1, mps (default: a GPU if any)")
    one.set_defaults(run=train_fcam)


def train_fcam(arguments: argparse.Namespace) -> None:
    """Run `captum-ext train-fcam`.

    Raises:
        InputError: anything that the user can put right.
        KeyboardInterrupt: Ctrl-C; its message says what was stored.
    """
    output = Path(arguments.output)
    _check_files(output, arguments.weights, getattr(arguments, "checkpoints", None))
    (method,) = find_methods([arguments.guide], arguments.data)
    fit_fcam, settings = _trainer(arguments)
    folder = Folder(arguments.data)
    device = find_device(arguments.device)
    if arguments.devices > 1:  # as it comes, `fit_fcam` trains where the classifier is
        _check_devices(arguments.devices, device)
        settings["trainer"] = {"devices": arguments.devices}
    from captum_ext import demo

    loaded = demo.load_model(arguments.model, arguments.weights)
    fewer = _check_classes(folder, loaded)
    loaded.module.to(device)
    checkpoint = _checkpoint(settings["checkpoints"])

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("ignore")
        warnings.filterwarnings("always", category=UserWarning, module="captum_ext|__main__")
        # The folder keeps these itself: warnings of other processes do not come here.
        warnings.filterwarnings("ignore", message=".* cannot be read and (is|are) left out")
        x = _noise(settings["size"]).to(device)
        taps = _check_sees(loaded, x)
        layer, reshape_transform = demo.find_layer(loaded, x, arguments.layer)
        guide, guide_kwargs = _guide(method, loaded, layer, reshape_transform, x)
        if fewer and _is_first():  # before hours are spent on it
            _say("note", fewer)
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
        _say("note", text)
    if unread:
        _say("note", f"{len(unread)} of {len(folder)} pictures were left out:")
    for index in unread:
        _say("note", folder.why(index))
    save(fcam, output)
    rows = [
        ("model", loaded.name),
        ("guide", f"{method.name} at layer {layer}"),
        ("decoder", f"reads {', '.join(taps)}"),
        ("pictures", f"{len(folder) - len(unread)} of {len(folder.classes)} classes"),
        ("epochs", str(settings["n_epochs"])),
        *([("went on", f"from {checkpoint}")] if checkpoint else []),
    ]
    print(_table(rows))
    print(f"\nwritten to {output}; load it by\n\n{_recipe(arguments, output)}")


def _recipe(arguments: argparse.Namespace, output: Path) -> str:
    """The lines of Python that load the decoder."""
    given = [arguments.model] + ([] if arguments.weights is None else [arguments.weights])
    return (
        f"    from captum_ext.attr import FCAM\n"
        f"    from captum_ext.demo import load_model\n\n"
        f"    model = load_model({', '.join(map(repr, given))}).module\n"
        f"    fcam = FCAM.load({str(output)!r}, model)"
    )


# --- the pictures --------------------------------------------------------------------------------


class Folder:
    """The pictures of a folder with a folder for each class, and which of them cannot be read.

    Pictures are read as `explain` reads them: upright, and in RGB.

    Args:
        root: the folder.

    Attributes:
        classes: the names of the folders, in the order of the labels.
        samples: (file, label) of each picture.
        unread: (n,), bool, in memory that all processes that read pictures share.

    Raises:
        InputError: no folder, or one without such pictures.
    """

    def __init__(self, root: str) -> None:
        import torch
        from torchvision.datasets import ImageFolder

        from captum_ext.demo import InputError, load_image

        if not Path(root).is_dir():
            raise InputError(f"the folder {root!r} does not exist or is not a folder")
        try:
            self._folder = ImageFolder(root, loader=load_image)
        except FileNotFoundError as error:
            first = str(error).partition(". ")[0].rstrip(".")
            raise InputError(
                f"the folder {root!r} must have a folder of pictures for each class: {first}"
            ) from error
        self.root = root
        self.classes: list[str] = self._folder.classes
        self.samples: list[tuple[str, int]] = self._folder.samples
        self.unread = torch.zeros(len(self.samples), dtype=torch.bool).share_memory_()

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        from captum_ext.demo import InputError

        try:
            picture, label = self._folder[index]
        except InputError as error:
            self.unread[index] = True
            raise OSError(str(error)) from error  # what `fit_fcam` leaves out
        return picture, label

    def why(self, index: int) -> str:
        """Why a picture is left out: it is tried once more."""
        try:
            self[index]
        except OSError as error:
            return str(error)
        return f"{self.samples[index][0]!r} could not be read at first"

    def unread_in_all(self) -> list[int]:
        """The pictures that could not be read, in any of the processes that trained."""
        import torch.distributed as dist

        found = set(self.unread.nonzero().flatten().tolist())
        if dist.is_available() and dist.is_initialized():
            others: list[Any] = [None] * dist.get_world_size()
            dist.all_gather_object(others, found)
            found = found.union(*others)
        return sorted(found)


def _check_classes(folder: Folder, loaded: "LoadedModel") -> str | None:
    """A remark where the classifier has more classes than the folder.

    Raises:
        InputError: it has fewer.
    """
    from captum_ext.demo import InputError

    found, known = len(folder.classes), len(loaded.categories)
    if found > known:
        raise InputError(
            f"the folder {folder.root!r} has {found} classes, and {loaded.name} has {known}: give "
            f"the weights of a classifier of these classes"
        )
    if found == known:
        return None
    return (
        f"the folder has {found} classes and {loaded.name} {known}: its folders are taken for the "
        f"first of them in the order of their names, {folder.classes[0]} for class 0 "
        f"({loaded.categories[0]}) to {folder.classes[-1]} for class {found - 1} "
        f"({loaded.categories[found - 1]})"
    )


# --- the model -----------------------------------------------------------------------------------


def _noise(size: int) -> "Tensor":
    import torch

    return torch.rand(1, 3, size, size, generator=torch.Generator().manual_seed(0))


def _check_sees(loaded: "LoadedModel", x: "Tensor") -> list[str]:
    """The layers that a decoder reads at the size of `x`.

    Raises:
        InputError: the model does not take this size, or has no features for a decoder.
    """
    from captum_ext.demo import InputError, probabilities
    from captum_ext.fcam import find_taps

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

    from captum_ext.demo import InputError
    from captum_ext.fcam.guides import guidance

    masking = method.family == "masking"
    kwargs: dict[str, Any] = {"perturbations_per_eval": _PERTURBATIONS_PER_EVAL} if masking else {}
    try:
        guide = attribution(method, loaded, layer, reshape_transform)
        target = torch.zeros(1, dtype=torch.int64, device=x.device)
        guidance(guide, x, target, **kwargs)
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
    from captum_ext.demo import InputError

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

    from captum_ext.demo import InputError

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


def _check_devices(count: int, device: "torch.device") -> None:
    import torch

    from captum_ext.demo import InputError

    if device.type == "cpu":
        return
    gpus = torch.cuda.device_count() if device.type == "cuda" else 1
    if count > gpus:
        raise InputError(f"--devices {count} are more than the GPUs here, {gpus}")
    if device.index is not None:
        raise InputError(f"--devices {count} begin at the first GPU: leave out --device {device}")


def _is_first() -> bool:
    """Whether this process writes and speaks; with --devices, others run the same command."""
    from lightning.pytorch.utilities import rank_zero_only

    return not getattr(rank_zero_only, "rank", 0)


# --- the decoder's file --------------------------------------------------------------------------


def _check_files(output: Path, weights: str | None, checkpoints: str | None) -> None:
    from captum_ext.demo import InputError

    check_output(output, endings=_ENDINGS)
    if weights and output.exists() and Path(weights).exists() and output.samefile(weights):
        raise InputError(f"the output {str(output)!r} is the weights file: give another name")
    if checkpoints is not None and Path(checkpoints).exists() and not Path(checkpoints).is_dir():
        raise InputError(f"--checkpoints {checkpoints} is a file: give a folder")
    file = _checkpoint(checkpoints)
    if file and not zipfile.is_zipfile(file):
        raise InputError(f"{str(file)!r} is not a checkpoint: name another folder, or delete it")


def save(fcam: "FCAM", output: Path) -> None:
    """Write the decoder: the whole file, or none."""
    unfinished = output.with_name(f".captum-ext-{os.getpid()}.pt")
    try:
        fcam.save(unfinished)
        unfinished.replace(output)
    finally:
        unfinished.unlink(missing_ok=True)
