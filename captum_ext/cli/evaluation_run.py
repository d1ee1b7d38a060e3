"""The run of `captum-ext evaluate`: `captum_ext.evaluation`, with flags in its errors."""

import argparse
import sys
import tempfile
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from captum_ext.cli.layouts import DataSource
from captum_ext.cli.output import message_with_flags

if TYPE_CHECKING:
    from captum_ext.evaluation import Summary
    from captum_ext.zoo import LoadedModel

_FAITHFULNESS = ("insertion", "deletion")
_TRIAL_PICTURES = 8  # options of metrics are tried on the first of these that can be read
_FLAGS = {
    "output": "--output",
    "methods": "--method",
    "metrics": "--metrics",
    "size": "--size",
    "data": "DATA",
    "against": "--against",
}


def run_evaluation(
    arguments: argparse.Namespace,
    attributions: Mapping[str, Any],
    source: DataSource,
    loaded: "LoadedModel",
) -> "Summary":
    """Run `captum_ext.evaluation.evaluate`.

    Args:
        arguments: of the command.
        attributions: as `evaluate` takes them.
        source: the data set.
        loaded: the model.

    Raises:
        InputError: an argument that the user can correct.
        KeyboardInterrupt: Ctrl-C; its message says how to go on.
    """
    import torch

    from captum_ext import evaluation
    from captum_ext._errors import AllFailedError, InputError

    metrics = arguments.metrics
    if metrics is None:
        metrics = (*(["localization"] if source.has_objects else []), *_FAITHFULNESS)
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
                _try_metrics(metrics, attributions, source.data, settings)
        summary = evaluation.evaluate(
            attributions,
            source.data,
            metrics,
            output=arguments.output,
            **settings,
            num_workers=arguments.workers,
            show_progress=sys.stdout.isatty() and sys.stderr.isatty(),
            devices=arguments.devices,
        )
        return summary if arguments.against is None else read_summary(arguments)
    except KeyboardInterrupt:
        raise KeyboardInterrupt("interrupted; the same command resumes the run") from None
    except torch.cuda.OutOfMemoryError as error:
        raise InputError(
            "the GPU has too little memory: give a lower --batch-size (and another --output, once "
            "a batch is finished)"
        ) from error
    except AllFailedError as error:
        raise InputError(str(error)) from error
    except (ValueError, TypeError, RuntimeError) as error:
        if getattr(error, "argument", None) not in _FLAGS:  # the mistake is ours
            raise
        raise InputError(message_with_flags(error, _FLAGS)) from error


def _try_metrics(
    metrics: Mapping[str, Any],
    attributions: Mapping[str, Any],
    data: Any,
    settings: Mapping[str, Any],
) -> None:
    """Measure one picture first, because a wrong option would make every row fail, after hours.

    Raises:
        InputError: options that a metric does not take.
    """
    import torch

    from captum_ext import evaluation
    from captum_ext._errors import InputError

    refusal = None
    name = next(iter(attributions))
    for index in range(min(_TRIAL_PICTURES, len(data))):
        try:
            picture = data[index]
        except (OSError, ValueError):  # its rows will say so
            continue
        try:
            with tempfile.TemporaryDirectory() as folder:
                evaluation.evaluate(
                    {name: attributions[name]},
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
        message = message_with_flags(refusal, _FLAGS)
        raise InputError(f"the options of metrics: {message}") from refusal


def read_summary(arguments: argparse.Namespace) -> "Summary":
    """The summary of the rows in the output folder.

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
        raise InputError(message_with_flags(error, _FLAGS)) from error
