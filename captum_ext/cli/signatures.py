"""Defaults and choices of the library's functions, read from its source.

Importing the functions would import torch, for which nobody wants to wait who asks for `--help`.
"""

import ast
from pathlib import Path
from typing import Any

import captum_ext

_ROOT = Path(captum_ext.__file__).parent


def defaults_of(module: str, function: str) -> dict[str, Any]:
    """The keyword-only arguments of a function that have a literal as their default.

    Args:
        module: below `captum_ext`, such as "evaluation.run".
        function: its name there.
    """
    (node,) = (
        node
        for node in _body(module)
        if isinstance(node, ast.FunctionDef) and node.name == function
    )
    defaults = zip(node.args.kwonlyargs, node.args.kw_defaults, strict=True)
    return {a.arg: default.value for a, default in defaults if isinstance(default, ast.Constant)}


def constant_of(module: str, name: str) -> Any:
    """The literal that a module assigns to a name."""
    (value,) = (
        node.value
        for node in _body(module)
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == name
    )
    return ast.literal_eval(value)


def _body(module: str) -> list[ast.stmt]:
    file = _ROOT.joinpath(*module.split(".")).with_suffix(".py")
    return ast.parse(file.read_text(encoding="utf-8")).body
