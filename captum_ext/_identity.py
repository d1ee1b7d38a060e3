"""Fingerprints of models, functions and runs, to recognise stored work; atomic writes of files."""

import hashlib
import io
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor
from torch.nn import Module
from torch.utils._pytree import tree_map

from captum_ext._engine.modules import Forward, require_module
from captum_ext._errors import ArgumentError

# Functions of these need no version: they do not change under a user's hands.
LIBRARIES = sys.stdlib_module_names | {
    *("captum", "captum_ext", "kornia", "lightning", "numpy", "PIL", "scipy", "skimage", "timm"),
    *("torch", "torchmetrics", "torchvision", "transformers"),
}
_Decoder = TypeVar("_Decoder", bound=Module)


def digest(values: Any) -> str:
    """A short digest of values."""
    return hashlib.sha256(repr(values).encode()).hexdigest()[:16]


def derive_seed(*numbers: int) -> int:
    """A seed from several numbers, well mixed and the same on every machine."""
    return int(
        np.random.SeedSequence([n % 2**32 for n in numbers]).generate_state(2, np.uint64)[0] >> 1
    )


# --- models --------------------------------------------------------------------------------------


def tensor_digests(forward_func: Forward) -> dict[str, str]:
    """A digest of each parameter and buffer of the model, by name.

    Raises:
        ValueError: a plain function, whose parameters are not known.
    """
    digests = {}
    for name, value in require_module(forward_func).state_dict().items():
        if isinstance(value, Tensor):
            flat = value.detach().cpu().contiguous().flatten().view(torch.uint8)
            head = f"{value.dtype}{tuple(value.shape)}".encode()
            digests[name] = hashlib.sha256(head + flat.numpy().tobytes()).hexdigest()[:16]
    return digests


def model_digest(forward_func: Forward) -> str:
    """One digest of all of the model's parameters and buffers."""
    return digest(sorted(tensor_digests(forward_func).items()))


# --- functions and other options -----------------------------------------------------------------


def versioned_name(where: str, function: Any) -> str:
    """The name and the version by which stored work knows a function again.

    A user's function has an attribute `version`, a text or an integer: the line
    ``sharpness.version = "1"`` below its definition, or an attribute of a callable object or its
    class. It changes when what the function does changes: the code itself is not looked at. The
    name is that in its module, after the module's. Functions of the libraries that this package
    stands on need none, and have their name alone; those made by a library's function have the
    values that are in them, too. A `functools.partial` has the name and version of its function,
    and what it fixes. A module, and a method of one, has its weights.

    Args:
        where: the argument, as errors name it.
        function: a callable, or None.

    Raises:
        ValueError: a lambda, a function inside another, or a callable without a version.

    Example:
        >>> versioned_name("`score`", torch.sigmoid)
        '_VariableFunctionsClass.sigmoid'
        >>> versioned_name("`score`", partial(round, ndigits=2))
        "round, (), [('ndigits', 2)]"
    """
    if function is None:
        return "NoneType"  # as in files that were written before
    if isinstance(function, partial):
        given = (function.args, sorted(function.keywords.items()))
        args, keywords = tree_map(partial(_json_leaf, where), given)
        return f"{versioned_name(where, function.func)}, {args}, {keywords}"
    named = function if hasattr(function, "__qualname__") else type(function)
    name, version = str(named.__qualname__), getattr(function, "version", None)
    owner = function if isinstance(function, Module) else getattr(function, "__self__", None)
    if isinstance(owner, Module):
        return f"{name} {model_digest(owner)}"
    library = _library(named) in LIBRARIES
    if "<" in name and library and named is function:
        cells = getattr(function, "__closure__", None) or ()
        return f"{name}, {json_value(where, [cell.cell_contents for cell in cells])}"
    if "<" in name:  # a lambda, or inside another function
        last = name.rpartition(".")[2]
        own = "function" if "<" in last else last
        raise ValueError(
            f"{where} is {name}, which stored work cannot know again: define it at the top of a "
            f'module, `def {own}(...)`, with the line `{own}.version = "1"` below. '
            f"functools.partial fixes arguments, and a torch.nn.Module is known by its weights."
        )
    if isinstance(version, str | int):
        return f"{name if library else f'{named.__module__}.{name}'} version {version}"
    if library and (named is function or " at 0x" not in repr(function)):
        return name if named is function else repr(function)
    raise ValueError(
        f"{where} is {name}, without a version by which stored work could know it again: add the "
        f'line `{name}.version = "1"`, and change it when what it does changes.'
    )


def _library(named: Any) -> str:
    """The package of a function, also of a method of a built-in type."""
    owner = getattr(named, "__objclass__", None) or getattr(named, "__self__", None)
    module = getattr(named, "__module__", None) or getattr(owner, "__module__", None)
    return str(module).partition(".")[0]


def json_value(where: str, value: Any) -> Any:
    """A value that JSON has, and that is the same in each process."""
    if isinstance(value, Mapping):
        return {str(key): json_value(where, each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [json_value(where, each) for each in value]
    return _json_leaf(where, value)


def _json_leaf(where: str, value: Any) -> Any:
    if isinstance(value, np.generic) or (isinstance(value, Tensor) and not value.dim()):
        value = value.item()
    if isinstance(value, int | float | str | None):
        return value
    if isinstance(value, Tensor):
        return f"tensor {digest((tuple(value.shape), value.flatten().tolist()))}"
    if isinstance(value, np.ndarray):
        return f"array {digest((value.shape, json_value(where, value.flatten().tolist())))}"
    if isinstance(value, set | frozenset):
        return f"set {sorted(repr(json_value(where, each)) for each in value)}"
    if isinstance(value, torch.Generator):
        return "a Generator"  # what it has drawn so far is no setting
    if isinstance(value, Mapping):
        return json_value(where, value)
    if callable(value):
        return versioned_name(where, value)
    if " at 0x" in repr(value):
        raise ValueError(
            f"{where} is a {type(value).__name__}, which stored work cannot know again: give the "
            f"class a `__repr__` that shows its values."
        )
    return repr(value)


# --- runs ----------------------------------------------------------------------------------------


def describe_changes(saved: Mapping[str, Any], found: Mapping[str, Any]) -> str:
    """The entries that differ, in words."""
    changed = [name for name in found if saved.get(name) != found[name]]
    return "; ".join(f"{name} was {saved.get(name)!r} and is {found[name]!r}" for name in changed)


def check_same_run(
    stored: str,
    saved: Mapping[str, Any],
    found: Mapping[str, Any],
    kind: str = "folder",
    argument: str = "",
) -> None:
    """Raise an ArgumentError where settings are not those of the stored work.

    Args:
        stored: the beginning of the error, such as "`cache` maps has the maps of another run".
        saved: settings of the stored work.
        found: settings of this run.
        kind: "folder" or "file", which another name is advised for.
        argument: the argument that names the stored work.
    """
    changed = describe_changes(saved, found)
    if changed:
        message = f"{stored}: {changed}. Name another {kind}, or delete it."
        raise ArgumentError(message, argument, "another_run")


@contextmanager
def atomic_write(path: str | Path) -> Iterator[Path]:
    """Where to write a file that is to be there whole, or not at all."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        yield unfinished
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)


# --- decoders ------------------------------------------------------------------------------------


class SavedDecoder:
    """The file of a decoder: its weights, its options, and the fingerprint of its classifier.

    Args:
        name: of the kind of decoder, for errors.
        options: the names of what it was made with.
    """

    def __init__(self, name: str, options: Sequence[str]) -> None:
        self.name, self.options = name, tuple(options)

    def save(self, path: str | Path, decoder: Module, classifier: Forward, **options: Any) -> None:
        """Write the file, and its folder where there is none.

        Raises:
            ValueError: the classifier is a plain function.
        """
        root = require_module(classifier)
        content = {"decoder": decoder.state_dict(), **options}
        content |= {"classifier": tensor_digests(root), "dtypes": _dtypes(root)}
        with atomic_write(path) as unfinished:
            torch.save(content, unfinished)

    def load(
        self,
        path: str | Path,
        classifier: Forward,
        make: Callable[[dict[str, Any]], _Decoder],
    ) -> _Decoder:
        """The decoder on its classifier's device, in eval mode.

        Only tensors and plain values are read (`weights_only`).

        Args:
            path: the file.
            classifier: the one that the decoder was trained with.
            make: a decoder from its options, without its weights.

        Raises:
            ValueError: the file is no such decoder; the classifier is another one, or has other
                weights, or these in another dtype.
            FileNotFoundError: there is no such file.
        """
        content = io.BytesIO(Path(path).read_bytes())
        try:
            saved = torch.load(content, map_location="cpu", weights_only=True)
        except Exception as error:  # torch has many kinds of them for what it did not write
            raise ArgumentError(
                f"`path` {path} has no decoder of {self.name} in it.", "path"
            ) from error
        needed = {"decoder", "classifier", *self.options}
        if not isinstance(saved, dict) or not needed <= saved.keys():
            raise ArgumentError(f"`path` {path} has no decoder of {self.name} in it.", "path")
        root = require_module(classifier)
        _check_classifier(saved, root, path)
        decoder = make(saved)
        try:
            decoder.load_state_dict(saved["decoder"])
        except RuntimeError as error:
            raise ArgumentError(
                f"`path` {path}: its weights are of another architecture than it says: "
                f"{str(error).splitlines()[1].strip()}",
                "path",
            ) from error
        some = next(root.parameters(), torch.empty(0))
        return decoder.to(some.device).eval()


def _dtypes(root: Module) -> dict[str, str]:
    return {k: str(v.dtype) for k, v in root.state_dict().items() if isinstance(v, Tensor)}


def _check_classifier(file: Mapping[str, Any], root: Module, path: str | Path) -> None:
    found, dtypes = tensor_digests(root), _dtypes(root)
    saved, before = file["classifier"], file.get("dtypes", {})
    missing, added = sorted(saved.keys() - found), sorted(found.keys() - saved)
    changed = sorted(name for name in saved.keys() & found if saved[name] != found[name])
    cast = [name for name in changed if before.get(name, dtypes[name]) != dtypes[name]]
    if cast and cast == changed and not missing and not added:
        one = cast[0]
        raise ArgumentError(
            f"`forward_func` has {len(cast)} tensors in another dtype than when the decoder in "
            f"{path} was saved ({one} is {dtypes[one]} and was {before[one]}, ...), so they cannot "
            f"be compared. Load the decoder first, and convert the classifier after that.",
            "forward_func",
        )
    said = [
        f"{len(names)} of its tensors {what} ({', '.join(names[:3])}, ...)"
        for names, what in (
            (missing, "are not in this one"),
            (added, "of this one are not in that"),
            (changed, "have other values here"),
        )
        if names
    ]
    if said:
        raise ArgumentError(
            f"`forward_func` is not the classifier that the decoder in {path} was trained with: "
            f"{'; '.join(said)}. Load the classifier's weights first, or train a decoder for it.",
            "forward_func",
        )
