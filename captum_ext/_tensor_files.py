"""Files of tensors and plain values: decoders, checkpoints and caches.

They are written by `torch.save`, whole or not at all. `read_tensors` runs no code in them, and
compares the checksums in them, which `torch.load` ignores.
"""

import zipfile
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import IO, Any, TypeVar

import torch
from torch import Tensor
from torch.nn import Module

from captum_ext._checks import first_line
from captum_ext._engine.modules import Forward, module_device, require_module
from captum_ext._errors import ArgumentError
from captum_ext._identity import atomic_write, tensor_digests
from captum_ext._repr import bounded_repr

_Decoder = TypeVar("_Decoder", bound=Module)


def write_tensors(path: str | Path, content: Mapping[str, Any]) -> None:
    """Write tensors and plain values to a file. Missing folders are made."""
    with atomic_write(path) as unfinished, unfinished.open("wb") as file:
        torch.save(content, file)  # given the name, it would hide the reason why a write failed


def read_tensors(path: str | Path, argument: str, problem: str, keys: Iterable[str]) -> Any:
    """Read a file of `write_tensors`, to the CPU.

    Only tensors and plain values are read (`weights_only`).

    Args:
        path: the file.
        argument: the argument that names it.
        problem: the beginning of errors, such as "`path` a.pt has no decoder in it".
        keys: the keys that the content must have.

    Returns:
        The content, a dict.

    Raises:
        ValueError: the file is of another format, incomplete or damaged, or lacks a key.
        OSError: the file does not exist, or its permissions forbid to read it.
    """
    path = Path(path)
    if path.exists() and not path.is_file():
        raise ArgumentError(f"{problem}: it is not a file.", argument)
    with path.open("rb") as file:
        if not zipfile.is_zipfile(file):
            reason = "it is incomplete, or of another format"
            raise ArgumentError(f"{problem}: {reason}.", argument)
        damage = find_damage(file, compressed=False)
        if damage:
            raise ArgumentError(f"{problem}: it is damaged ({damage}).", argument)
        file.seek(0)
        try:
            content = torch.load(file, map_location="cpu", weights_only=True)
        except Exception as error:  # torch raises many types for files of other formats
            reason = f"it has more than tensors and plain values, or is damaged ({type(error)})"
            raise ArgumentError(f"{problem}: {reason}.", argument) from error
    missing = [key for key in keys if not isinstance(content, dict) or key not in content]
    if missing:
        raise ArgumentError(f"{problem}: it has no {missing[0]!r}.", argument)
    return content


def find_damage(file: IO[bytes], *, compressed: bool = True) -> str:
    """Compare the checksum of each entry of a ZIP file, as `torch.save` writes them.

    Args:
        file: the file, open for reading.
        compressed: whether entries may be compressed, which `torch.save` never does: a small file
            could become a large content.

    Returns:
        The damage, or an empty text. A file without any checksum has no known damage: after
        `torch.serialization.set_crc32_options(False)`, `torch.save` writes none.
    """
    try:
        with zipfile.ZipFile(file) as archive:
            entries = archive.infolist()
            packed = [e.filename for e in entries if e.compress_type != zipfile.ZIP_STORED]
            if packed and not compressed:
                return f"{packed[0]} is compressed"
            name = archive.testzip() if any(entry.CRC for entry in entries) else None
    except Exception as error:  # zipfile raises many types for damaged files
        return first_line(error)
    return f"the checksum of {name} differs" if name else ""


def misfit(
    state: Any, expected: Mapping[str, Tensor], finite: Callable[[str], bool] = lambda name: True
) -> str:
    """The first difference between stored weights and those that they are for, or an empty text.

    Args:
        state: the stored weights, which may be anything.
        expected: tensors of the same names, shapes and kinds of numbers. Values do not matter.
        finite: whether the tensor of this name must be finite.
    """
    if not isinstance(state, Mapping):
        return f"its weights are {bounded_repr(state)}"
    for name in (*expected, *state):
        if name not in state:
            return f"it has no {name!r}"
        if name not in expected:
            return f"it has {bounded_repr(name)}, which does not belong there"
        value, like = state[name], expected[name]
        if not is_complete(value) or value.is_floating_point() != like.is_floating_point():
            return f"{name!r} is {bounded_repr(value)}, and should be a dense {like.dtype}"
        if value.shape != like.shape:
            return f"{name!r} has the shape {tuple(value.shape)}, not {tuple(like.shape)}"
        if finite(name) and not bool(torch.isfinite(value).all()):
            return f"{name!r} is not finite"
    return ""


def is_complete(value: Any) -> bool:
    """Return whether a value is a tensor of real numbers with all its elements in memory.

    Others, such as sparse and expanded ones, may stand for much more memory than their file has.
    """
    return (
        isinstance(value, Tensor)
        and value.layout == torch.strided
        and value.device.type != "meta"
        and not value.is_complex()
        and not value.is_quantized
        and value.untyped_storage().nbytes() >= value.numel() * value.element_size()
    )


# --- decoders ------------------------------------------------------------------------------------


class SavedDecoder:
    """Format of decoder files: the weights, the options, and the fingerprint of the classifier.

    Args:
        name: the decoder's class or method, for errors.
        sizes: the names of the decoder's options that are sizes of its tensors: a number, or a list
            of numbers with one for each block.
        options: the names of its other options.
    """

    def __init__(self, name: str, sizes: Iterable[str], options: Iterable[str]) -> None:
        self.name, self.sizes, self.options = name, tuple(sizes), tuple(options)

    def save(self, path: str | Path, decoder: Module, classifier: Forward, **options: Any) -> None:
        """Write a decoder to a file. Missing folders are made.

        Args:
            path: the file.
            decoder: the decoder.
            classifier: the classifier that it was trained with.
            **options: the decoder's options, as plain values.

        Raises:
            ValueError: the classifier is a plain function.
        """
        root = require_module(classifier)
        content = {"decoder": decoder.state_dict(), **options}
        content |= {"classifier": tensor_digests(root), "dtypes": _dtypes(root)}
        write_tensors(path, content)

    def load(
        self,
        path: str | Path,
        classifier: Forward,
        make: Callable[[dict[str, Any]], _Decoder],
    ) -> _Decoder:
        """Load a decoder to its classifier's device, in eval mode.

        Nothing of the decoder's size is allocated before the options fit the stored tensors.

        Args:
            path: the file.
            classifier: the classifier that the decoder was trained with.
            make: makes a decoder with random weights from a dict with the options.

        Raises:
            ValueError: the file has no such decoder, or a damaged one; the classifier is not the
                one of the file, or has other weights, or weights of another dtype.
            FileNotFoundError: there is no such file.
        """
        problem = f"`path` {path} has no decoder of {self.name} in it"
        keys = ("decoder", "classifier", *self.sizes, *self.options)
        saved = read_tensors(path, "path", problem, keys)
        root = require_module(classifier)
        _check_classifier(saved, root, path, problem)
        wrong = self._wrong_size(saved)
        if wrong:
            raise ArgumentError(f"{problem}: {wrong}.", "path")
        try:
            with torch.device("meta"):
                decoder = make(saved)
        except Exception as error:
            reason = f"its options make no decoder ({first_line(error)})"
            raise ArgumentError(f"{problem}: {reason}.", "path") from error
        wrong = misfit(saved["decoder"], decoder.state_dict())
        if wrong:
            raise ArgumentError(
                f"`path` {path}: its weights are damaged, or of another architecture than its "
                f"options: {wrong}.",
                "path",
            )
        device = module_device(root)
        decoder.to_empty(device="cpu").load_state_dict(saved["decoder"])
        return decoder.to(device).eval()

    def _wrong_size(self, saved: Mapping[str, Any]) -> str:
        """The first option that is no size of the stored tensors, as a text, or an empty one.

        No list is longer than the number of tensors, and no number above their largest size.
        """
        state = saved["decoder"]
        if not isinstance(state, Mapping) or not all(map(is_complete, state.values())):
            return "its weights are not dense tensors"
        largest = max([len(state), *(size for value in state.values() for size in value.shape)])
        for name in self.sizes:
            value = saved[name]
            numbers = value if isinstance(value, list) else [value]
            if len(numbers) > len(state) or not all(
                type(number) is int and 1 <= number <= largest for number in numbers
            ):
                return f"its {name!r} are {bounded_repr(value)}, but its tensors have other sizes"
        return ""


def _dtypes(root: Module) -> dict[str, str]:
    """The dtypes of the parameters and buffers, by name."""
    return {k: str(v.dtype) for k, v in root.state_dict().items() if isinstance(v, Tensor)}


def _is_text(value: Any) -> bool:
    """Return whether a value is a dict of texts by their names."""
    return isinstance(value, dict) and all(
        isinstance(key, str) and isinstance(text, str) for key, text in value.items()
    )


def _check_classifier(
    file: Mapping[str, Any], root: Module, path: str | Path, problem: str
) -> None:
    """Raise a ValueError unless a decoder's classifier is the one in its file."""
    current, dtypes = tensor_digests(root), _dtypes(root)
    saved, saved_dtypes = file["classifier"], file.get("dtypes", dtypes)
    if not _is_text(saved) or not _is_text(saved_dtypes):
        raise ArgumentError(f"{problem}: it has no fingerprint of a classifier.", "path")
    missing, added = sorted(saved.keys() - current), sorted(current.keys() - saved)
    changed = sorted(name for name in saved.keys() & current if saved[name] != current[name])
    cast = [name for name in changed if saved_dtypes.get(name) != dtypes[name]]
    if cast and cast == changed and not missing and not added:
        example = cast[0]
        raise ArgumentError(
            f"`forward_func` has {len(cast)} tensors in another dtype than when the decoder in "
            f"{path} was saved ({example} is {dtypes[example]} and was {saved_dtypes[example]}, "
            f"...), so they cannot be compared. Load the decoder first, and convert the classifier "
            f"after that.",
            "forward_func",
        )
    differences = [
        f"{len(names)} tensors {difference} ({', '.join(names[:3])}, ...)"
        for names, difference in (
            (missing, "are not in this one"),
            (added, "are not in that one"),
            (changed, "have other values here"),
        )
        if names
    ]
    if differences:
        raise ArgumentError(
            f"`forward_func` is not the classifier that the decoder in {path} was trained with: "
            f"{'; '.join(differences)}. Load its weights first, or train a new decoder.",
            "forward_func",
        )
