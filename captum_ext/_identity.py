"""Fingerprints of models, functions and runs, to recognise stored work; atomic writes of files.

- `digest` is a short hash of any values with a stable `repr`.
- `tensor_digests` are hashes of each parameter and buffer of a model, `model_digest` is one of all.
- `versioned_name` is the fingerprint of a function, `json_value` that of any option.
- `check_same_run` compares the settings of a run, which contain these, with the stored ones.
- `derive_seed` mixes numbers to a seed. It is not a fingerprint.
"""

import glob
import hashlib
import secrets
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import Module
from torch.utils._pytree import tree_map

from captum_ext._engine.modules import Forward, gather_shards, require_module
from captum_ext._errors import ArgumentError, InputError
from captum_ext._repr import bounded_repr

try:
    import fcntl
except ImportError:  # Windows has no such locks: partial files of killed processes stay there
    fcntl = None  # type: ignore[assignment]

# Functions of these packages need no version: users do not edit them.
LIBRARIES = sys.stdlib_module_names | {
    *("captum", "captum_ext", "kornia", "lightning", "numpy", "PIL", "scipy", "skimage", "timm"),
    *("torch", "torchmetrics", "torchvision", "transformers"),
}
_LISTED_CHANGES = 20  # in an error


def digest(values: Any) -> str:
    """A hash of values by their `repr`, 16 hexadecimal digits."""
    return hashlib.sha256(repr(values).encode()).hexdigest()[:16]


def derive_seed(*numbers: int) -> int:
    """Mix several numbers into a seed. The result is the same on every machine."""
    sequence = np.random.SeedSequence([n % 2**32 for n in numbers])
    return int(sequence.generate_state(2, np.uint64)[0]) >> 1


# --- models --------------------------------------------------------------------------------------


def tensor_digests(forward_func: Forward) -> dict[str, str]:
    """A digest of each parameter and buffer of the model, by name.

    Raises:
        ValueError: `forward_func` is a plain function, so that its parameters are unknown.
    """
    digests = {}
    for name, value in require_module(forward_func).state_dict().items():
        if isinstance(value, Tensor):
            flat = gather_shards(value).cpu().contiguous().flatten().view(torch.uint8)
            head = f"{value.dtype}{tuple(value.shape)}".encode()
            digests[name] = hashlib.sha256(head + flat.numpy().tobytes()).hexdigest()[:16]
    return digests


def model_digest(forward_func: Forward) -> str:
    """One digest of all of the model's parameters and buffers."""
    return digest(sorted(tensor_digests(forward_func).items()))


# --- functions and other options -----------------------------------------------------------------


def versioned_name(where: str, function: Any) -> str:
    """The fingerprint of a function: its name and its version.

    A user's function needs an attribute `version`, a string or an integer, such as the line
    ``sharpness.version = "1"`` below its definition. Callable objects may have it in their class.
    Users change the version when they change the function; its code is not compared.

    Functions of the packages in `LIBRARIES` need no version. Those that a library function returns
    are known by the values in their closure, a `functools.partial` by its function and its fixed
    arguments, and modules and their methods by their weights.

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
        return "NoneType"
    if isinstance(function, partial):
        fixed = (function.args, sorted(function.keywords.items()))
        args, keywords = tree_map(partial(_json_leaf, where), fixed)
        return f"{versioned_name(where, function.func)}, {args}, {keywords}"
    definition = function if hasattr(function, "__qualname__") else type(function)
    name, version = str(definition.__qualname__), getattr(function, "version", None)
    owner = function if isinstance(function, Module) else getattr(function, "__self__", None)
    if isinstance(owner, Module):
        return f"{name} {model_digest(owner)}"
    library = _library(definition) in LIBRARIES
    if "<" in name and library and definition is function:
        cells = getattr(function, "__closure__", None) or ()
        return f"{name}, {json_value(where, [cell.cell_contents for cell in cells])}"
    if "<" in name:  # a lambda, or a function inside another
        last = name.rpartition(".")[2]
        short_name = "function" if "<" in last else last
        raise ValueError(
            f"{where} is {name}, which stored work cannot recognise: define it at the top of a "
            f'module, `def {short_name}(...)`, with the line `{short_name}.version = "1"` below. '
            f"functools.partial fixes arguments, and a torch.nn.Module is known by its weights."
        )
    if isinstance(version, str | int):
        return f"{name if library else f'{definition.__module__}.{name}'} version {version}"
    if library and (definition is function or " at 0x" not in repr(function)):
        return name if definition is function else repr(function)
    raise ValueError(
        f"{where} is {name}, without a version, so stored work cannot recognise it: add the line "
        f'`{name}.version = "1"`, and change the version whenever you change the function.'
    )


def _library(definition: Any) -> str:
    """The top-level package of a function; also for methods of built-in types."""
    owner = getattr(definition, "__objclass__", None) or getattr(definition, "__self__", None)
    module = getattr(definition, "__module__", None) or getattr(owner, "__module__", None)
    return str(module).partition(".")[0]


def json_value(where: str, value: Any) -> Any:
    """Convert an option to a value that JSON can store and that is the same in each process.

    Args:
        where: the argument, as errors name it.
        value: the option. Functions become their `versioned_name`, tensors a digest.

    Raises:
        ValueError: a function without a version, or an object whose `repr` has an address.
    """
    if isinstance(value, Mapping):
        return {str(key): json_value(where, item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [json_value(where, item) for item in value]
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
        return f"set {sorted(repr(json_value(where, item)) for item in value)}"
    if isinstance(value, torch.Generator):
        return "a Generator"  # its state is no setting
    if isinstance(value, Mapping):
        return json_value(where, value)
    if callable(value):
        return versioned_name(where, value)
    if " at 0x" in repr(value):
        raise ValueError(
            f"{where} is a {type(value).__name__}, which stored work cannot recognise: give its "
            f"class a `__repr__` that shows its values."
        )
    return repr(value)


# --- runs ----------------------------------------------------------------------------------------


def describe_changes(saved: Mapping[str, Any], current: Mapping[str, Any]) -> str:
    """List the entries that differ, for an error message; an empty string if none does."""
    changed = [name for name in current if saved.get(name) != current[name]]
    parts = [
        f"{name} was {bounded_repr(saved.get(name), 1000)} and is "
        f"{bounded_repr(current[name], 1000)}"
        for name in changed[:_LISTED_CHANGES]
    ]
    if len(changed) > len(parts):
        parts.append(f"{len(changed) - len(parts)} more")
    return "; ".join(parts)


def check_same_run(
    problem: str,
    saved: Mapping[str, Any],
    current: Mapping[str, Any],
    container: str = "folder",
    argument: str = "",
) -> None:
    """Raise an ArgumentError if the settings of this run differ from those of the stored work.

    Args:
        problem: the beginning of the error, such as "`cache` maps has the maps of another run".
        saved: the settings of the stored work.
        current: the settings of this run.
        container: "folder" or "file", which the error advises to rename or delete.
        argument: the argument that names the stored work.
    """
    changed = describe_changes(saved, current)
    if changed:
        message = f"{problem}: {changed}. Name another {container}, or delete it."
        raise ArgumentError(message, argument, "another_run")


# --- files ---------------------------------------------------------------------------------------


def check_can_be_file(path: Path) -> None:
    """Raise an InputError if a file cannot be written there: a link, a folder, a device, a pipe."""
    if path.is_symlink():
        raise InputError(
            f"{str(path)!r} is a symbolic link, through which nothing is written: remove it, or "
            f"name another file"
        )
    if path.exists() and not path.is_file():  # a file would take the name of a device
        thing = "folder" if path.is_dir() else "device or a pipe"
        raise InputError(f"{str(path)!r} is a {thing}: give the name of a file")


@contextmanager
def atomic_write(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path; at the end, rename the file there to `path`.

    So `path` never holds a part of a file. If the block raises, nothing is written to `path`, and
    the temporary file is removed. A process that is killed leaves its temporary file behind; the
    next `atomic_write` of the same `path` removes it.

    Raises:
        InputError: `path` is a symbolic link, a folder, a device or a pipe.
        OSError: the disk is full, or the folder is not writable; the error names the file.
    """
    path = Path(path)
    check_can_be_file(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    _remove_abandoned(path)
    # Others who may write to the folder cannot put a link at a name that they do not know.
    unfinished = path.with_name(f".{path.name}.{secrets.token_hex(8)}.partial")
    try:
        with _locked(unfinished):
            yield unfinished
            unfinished.replace(path)
    except (OSError, RuntimeError) as error:
        # A writer of torch's fails after its file, with an error of its own.
        cause = error if isinstance(error, OSError) else error.__context__
        if isinstance(cause, OSError) and cause.errno and cause.filename is None:
            raise OSError(cause.errno, cause.strerror, str(path)) from error
        raise
    finally:
        unfinished.unlink(missing_ok=True)


@contextmanager
def _locked(file: Path) -> Iterator[None]:
    """A block with a new, empty file that is locked, so that `_remove_abandoned` leaves it."""
    if fcntl is None:
        yield
        return
    while True:
        with file.open("wb") as stream:
            with suppress(OSError):  # a file system without locks
                fcntl.flock(stream, fcntl.LOCK_EX)
            if file.exists():  # it was not removed before it was locked
                yield
                return


def _remove_abandoned(path: Path) -> None:
    """Remove the temporary files of `path` whose processes were killed: nobody locks them."""
    if fcntl is None:
        return
    for file in path.parent.glob(f".{glob.escape(path.name)}.*.partial"):
        with suppress(OSError), file.open("rb") as stream:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
            file.unlink()
