"""The library's evaluation, with its errors in the words of the command line."""

import argparse
import re
import sys
import tempfile
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from captum_ext.cli.layouts import Opened

if TYPE_CHECKING:
    from captum_ext.evaluation import Summary
    from captum_ext.zoo import LoadedModel

_FAITHFULNESS = ("insertion", "deletion")
_TRIED = 8  # pictures, of which one can be read, on which options of metrics are tried
_FLAGS = {
    "output": "--output",
    "methods": "--method",
    "metrics": "--metrics",
    "size": "--size",
    "data": "DATA",
    "against": "--against",
}


def evaluated(
    arguments: argparse.Namespace, made: Mapping[str, Any], opened: Opened, loaded: "LoadedModel"
) -> "Summary":
    """What the library finds, with its errors in the words of the command line.

    Raises:
        InputError: what the library refuses of what was given.
        KeyboardInterrupt: Ctrl-C; its message says how to go on.
    """
    import torch

    from captum_ext import evaluation
    from captum_ext._errors import InputError

    metrics = arguments.metrics
    if metrics is None:
        metrics = (*(["localization"] if opened.has_objects else []), *_FAITHFULNESS)
    settings: dict[str, Any] = {
        "size": arguments.size,
        "normalize": (loaded.preprocess.mean, loaded.preprocess.std),
        "target": arguments.target,
        "batch_size": arguments.batch_size,
        "seed": arguments.seed,
    }
    try:
        if isinstance(metrics, Mapping):
            metrics = {name: {} if value is None else value for name, value in metrics.items()}
            if any(metrics.values()):
                _try_metrics(metrics, made, opened.data, settings)
        found = evaluation.evaluate(
            made,
            opened.data,
            metrics,
            output=arguments.output,
            **settings,
            num_workers=arguments.workers,
            show_progress=sys.stdout.isatty() and sys.stderr.isatty(),
            devices=arguments.devices,
        )
        return found if arguments.against is None else summarized(arguments)
    except KeyboardInterrupt:
        raise KeyboardInterrupt("interrupted; the same command goes on where it was") from None
    except torch.cuda.OutOfMemoryError as error:
        raise InputError(
            "the GPU has too little memory: give a lower --batch-size (and another --output, once "
            "a batch is finished)"
        ) from error
    except InputError:
        raise
    except (ValueError, RuntimeError) as error:
        said = _in_flags(error)
        if said == str(error) and not said.startswith("Not one of"):  # a mistake of ours
            raise
        raise InputError(said) from error


def _try_metrics(
    metrics: Mapping[str, Any], made: Mapping[str, Any], data: Any, settings: Mapping[str, Any]
) -> None:
    """Measure one picture: a wrong option would be the failure of each row, after hours.

    Raises:
        InputError: options that a metric does not take.
    """
    import torch

    from captum_ext import evaluation
    from captum_ext._errors import InputError

    refusal = None
    name = next(iter(made))
    for index in range(min(_TRIED, len(data))):
        try:
            picture = data[index]
        except (OSError, ValueError):  # rows will say so
            continue
        try:
            with tempfile.TemporaryDirectory() as folder:
                evaluation.evaluate(
                    {name: made[name]},
                    [picture],
                    metrics,
                    output=folder,
                    **settings,
                    show_progress=False,
                )
            return
        except torch.cuda.OutOfMemoryError:
            raise
        except (TypeError, ValueError, RuntimeError) as error:
            refusal = error
    if refusal is not None:
        raise InputError(f"the options of metrics: {_in_flags(refusal)}") from refusal


def summarized(arguments: argparse.Namespace) -> "Summary":
    """What is in the folder of a run.

    Raises:
        InputError: there is no run, or it has no such method.
    """
    from captum_ext import evaluation
    from captum_ext._errors import InputError

    try:
        return evaluation.summary(arguments.output, against=arguments.against)
    except FileNotFoundError as error:
        raise InputError(f"there is no run in --output {arguments.output}") from error
    except ValueError as error:
        raise InputError(_in_flags(error)) from error


def _in_flags(error: Exception) -> str:
    """What an error of the library says, with flags for its arguments."""
    return re.sub(r"`(\w+)`", lambda name: _FLAGS.get(name[1], name[0]), str(error))
