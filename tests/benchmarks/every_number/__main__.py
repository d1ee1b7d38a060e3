"""Numbers of every method on fixed seeds, by name; `same_numbers.py` compares them.

This folder is run by its path, `python -P every_number FILE.pt TREE [PATTERN]`, with the tree that
is to be looked at first on PYTHONPATH, and one thread. It uses public names alone and looks them up
when a row is made, so that it serves other commits too: a name that a commit lacks is an error in
its rows. Each section gives (name, call), and a call gives anything that holds numbers.
"""

import dataclasses
import logging
import random
import re
import sys
import time
import warnings
from collections.abc import Iterator, Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

import attributions
import learned
import measures
import numpy as np
import torch
from torch import Tensor, nn

SECTIONS = (
    *(attributions.layer_cams, attributions.perturbation, attributions.wrappers),
    *(learned.fcam, learned.perception, learned.features),
    *(measures.metrics, measures.evaluation, measures.datasets_and_imaging),
)


def flat(value: Any, path: str = "") -> Iterator[tuple[str, Tensor]]:
    """The tensors in any result; fields go by their position, which a new name does not change."""
    if isinstance(value, nn.Module):
        value = value.state_dict()
    if dataclasses.is_dataclass(value):
        value = [getattr(value, field.name) for field in dataclasses.fields(value)]
    if isinstance(value, Tensor):
        yield path, value.detach().clone()
    elif isinstance(value, bool | int | float | np.number | np.ndarray):
        yield path, torch.tensor(value)
    elif isinstance(value, str):
        yield path, torch.tensor(list(value.encode()), dtype=torch.uint8)
    elif isinstance(value, Mapping):
        for key in value:
            yield from flat(value[key], f"{path}[{key!r}]")
    elif isinstance(value, list | tuple):
        for i, part in enumerate(value):
            yield from flat(part, f"{path}[{i}]")
    elif value is not None:
        raise TypeError(f"There are no numbers in {type(value)}.")


def every_number(only: str) -> dict[str, dict[str, Tensor] | str]:
    """Name -> the tensors of a call, or its error in words."""
    rows: dict[str, dict[str, Tensor] | str] = {}
    for section in SECTIONS:
        start, before = time.perf_counter(), len(rows)
        try:
            calls = list(section())
        except Exception as error:  # the package that a section is about cannot be imported
            rows[section.__name__] = f"{type(error).__name__}: {error}"
            continue
        for name, call in calls:
            if name in rows:
                raise ValueError(f"Two rows are called {name!r}.")
            if not re.search(only, name):
                continue
            for seed in (random.seed, np.random.seed, torch.manual_seed):
                seed(0)
            try:
                rows[name] = dict(flat(call()))
            except Exception as error:
                rows[name] = f"{type(error).__name__}: {error}"
        seconds = time.perf_counter() - start
        print(f"{section.__name__}: {len(rows) - before} rows, {seconds:.0f} s", file=sys.stderr)
    return rows


def main(file: str, tree: str, only: str = "") -> None:
    imported = Path(import_module("captum_ext").__file__ or "").resolve()
    if not imported.is_relative_to(Path(tree).resolve()):
        raise RuntimeError(f"captum_ext is that of {imported}, not of {tree}.")
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    torch.save(every_number(only), file)


if __name__ == "__main__":
    main(*sys.argv[1:])
