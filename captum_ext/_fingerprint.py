"""By what a stored decoder or run knows its model and its settings again."""

import hashlib
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module

from captum_ext._engine.modules import Forward, root_module


def fingerprint(forward_func: Forward) -> dict[str, str]:
    """A digest of each parameter and buffer of the model, by name.

    Raises:
        ValueError: a plain function, whose parameters are not known.
    """
    root = root_module(forward_func)
    if root is None:
        raise ValueError(f"`forward_func` must be a torch.nn.Module, got {forward_func!r}.")
    digests = {}
    for name, value in root.state_dict().items():
        if isinstance(value, Tensor):
            flat = value.detach().cpu().contiguous().flatten().view(torch.uint8)
            head = f"{value.dtype}{tuple(value.shape)}".encode()
            digests[name] = hashlib.sha256(head + flat.numpy().tobytes()).hexdigest()[:16]
    return digests


def dtypes_of(root: Module) -> dict[str, str]:
    return {k: str(v.dtype) for k, v in root.state_dict().items() if isinstance(v, Tensor)}


def check_same(
    file: dict[str, Any], found: dict[str, str], dtypes: dict[str, str], path: str | Path
) -> None:
    saved, before = file["classifier"], file.get("dtypes", {})
    missing, added = sorted(saved.keys() - found), sorted(found.keys() - saved)
    changed = sorted(name for name in saved.keys() & found if saved[name] != found[name])
    cast = [name for name in changed if before.get(name, dtypes[name]) != dtypes[name]]
    if cast and cast == changed and not missing and not added:
        one = cast[0]
        raise ValueError(
            f"`forward_func` has {len(cast)} tensors in another dtype than when the decoder in "
            f"{path} was saved ({one} is {dtypes[one]} and was {before[one]}, ...), so they cannot "
            f"be compared. Load the decoder first, and convert the classifier after that."
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
        raise ValueError(
            f"`forward_func` is not the classifier that the decoder in {path} was trained with: "
            f"{'; '.join(said)}. Load the classifier's weights first, or train a decoder for it."
        )


def changes(saved: Mapping[str, Any], found: Mapping[str, Any]) -> str:
    """What is not as it was, in words."""
    changed = [name for name in found if saved.get(name) != found[name]]
    return "; ".join(f"{name} was {saved.get(name)!r} and is {found[name]!r}" for name in changed)


def named_function(function: Any) -> str:
    """By what a function is known again: its name, and what a partial one fixes."""
    if isinstance(function, partial):
        return (
            f"{named_function(function.func)}, {function.args}, {sorted(function.keywords.items())}"
        )
    return str(getattr(function, "__qualname__", type(function).__qualname__))
