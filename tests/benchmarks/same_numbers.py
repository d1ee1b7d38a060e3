"""Compares the numbers of all methods with those of another commit, to the last bit.

    python -m tests.benchmarks.same_numbers [REV] [--only PATTERN]
                                            [--save FILE.pt] [--against FILE.pt]

REV (HEAD~1) is checked out into a temporary worktree. The folder `every_number` of this tree is run
in a fresh process for each of the two trees, on one thread of the CPU, so that commits without it
can be compared. This tree is taken as it stands, with uncommitted changes. `--save` writes
its numbers and compares nothing; `--against` compares with such a file instead of a commit.
`--only` takes the rows in whose name the regular expression is found. The exit code is 1 where a
row differs or fails. A whole tree takes about a minute.

A difference is the largest in any tensor of the row: absolute, and as a share of the largest number
in that tensor. Numbers are those of one machine: another processor, or another torch, has its own.
"""

import argparse
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = Path(__file__).with_name("every_number")
SAME = "same bits"

Row = Mapping[str, Tensor] | str  # a string is an error


def numbers(tree: Path, only: str) -> dict[str, Row]:
    """The rows of `every_number`, with the package of that tree."""
    threads = ("OMP", "MKL", "OPENBLAS", "NUMEXPR")
    environment = os.environ | {f"{name}_NUM_THREADS": "1" for name in threads}
    environment |= {"PYTHONPATH": str(tree), "PYTHONHASHSEED": "0", "CUDA_VISIBLE_DEVICES": ""}
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "numbers.pt")
        # -P: the other benchmarks, which lie beside the script, are no modules of its.
        command = [sys.executable, "-P", str(SCRIPT), str(file), str(tree), only]
        subprocess.run(command, cwd=folder, env=environment, check=True)
        return load(file)


def numbers_of(rev: str, only: str) -> dict[str, Row]:
    """The numbers of a commit."""
    git = ["git", "-C", str(ROOT), "worktree"]
    with tempfile.TemporaryDirectory() as folder:
        tree = Path(folder, "tree")
        subprocess.run([*git, "add", "--quiet", "--detach", str(tree), rev], check=True)
        try:
            return numbers(tree, only)
        finally:
            subprocess.run([*git, "remove", "--force", str(tree)], check=True)


def load(file: Path) -> dict[str, Row]:
    rows: dict[str, Row] = torch.load(file, weights_only=True)
    return rows


def difference(old: Row | None, new: Row | None) -> str:
    """The text of a row of the table."""
    if old is None or new is None:
        return "only here" if old is None else "only there"
    if isinstance(old, str) or isinstance(new, str):
        failed = [
            f"{where} {row}"
            for where, row in (("before:", old), ("now:", new))
            if isinstance(row, str)
        ]
        return "error " + "; ".join(failed)
    if old.keys() != new.keys():
        return f"other parts: {sorted(old.keys() ^ new.keys())}"
    absolute = relative = 0.0
    is_same = True
    for part, a in old.items():
        b = new[part]
        if (a.dtype, a.shape) != (b.dtype, b.shape):
            return f"part {part!r} was {a.dtype}, {tuple(a.shape)}: {b.dtype}, {tuple(b.shape)}"
        if bits(a) == bits(b):
            continue
        is_same = False
        off = torch.where(a == b, 0, (a.double() - b.double()).abs())
        off[a.isnan() & b.isnan()] = 0
        largest = float(off.nan_to_num(torch.inf).max())
        absolute = max(absolute, largest)
        relative = max(relative, largest / max(float(a.double().abs().nan_to_num().max()), 1e-300))
    return SAME if is_same else f"{absolute:.2e} absolute, {relative:.2e} relative"


def bits(x: Tensor) -> bytes:
    return x.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def table(old: Mapping[str, Row], new: Mapping[str, Row]) -> tuple[str, int]:
    """The table in Markdown, and how many rows differ."""
    differences = {name: difference(old.get(name), new.get(name)) for name in old | new}
    differing = {name: text for name, text in differences.items() if text != SAME}
    lines = [f"| {name} | {text} |" for name, text in differences.items()]
    n_same = len(differences) - len(differing)
    lines += ["", f"{len(differences)} rows, {n_same} of them with the same bits."]
    lines += [f"- {name}: {text}" for name, text in differing.items()]
    return "\n".join(["| | |", "|:--|:--|", *lines]), len(differing)


def main(arguments: Any = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("rev", nargs="?", default="HEAD~1")
    parser.add_argument("--only", default="", metavar="PATTERN")
    parser.add_argument("--save", type=Path, metavar="FILE.pt")
    parser.add_argument("--against", type=Path, metavar="FILE.pt")
    options = parser.parse_args(arguments)
    new = numbers(ROOT, options.only)
    if options.save is not None:
        torch.save(new, options.save)
        failed = [f"- {name}: {row}" for name, row in new.items() if isinstance(row, str)]
        print("\n".join([f"{len(new)} rows in {options.save}", *failed]))
        return int(bool(failed))
    if options.against is None:
        old = numbers_of(options.rev, options.only)
    else:
        rows = load(options.against).items()
        old = {name: row for name, row in rows if re.search(options.only, name)}
    text, n_differing = table(old, new)
    print(text)
    return int(n_differing > 0)


if __name__ == "__main__":
    sys.exit(main())
