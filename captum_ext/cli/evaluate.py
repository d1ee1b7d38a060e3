"""The command `captum-ext evaluate`: which method's maps are better, on a data set.

Modules that take long to import are imported only where they are used.
"""

import argparse
import functools
import logging
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from captum_ext.cli.attributions import find_attributions, make_attributions
from captum_ext.cli.config import read_config
from captum_ext.cli.evaluation_run import read_summary, run_evaluation
from captum_ext.cli.layouts import DRAWN, LAYOUTS, check_labels, open_data
from captum_ext.cli.methods import name_key
from captum_ext.cli.models import check_devices, check_input_size, find_device, random_input
from captum_ext.cli.options import COUNT, SHARED, Options, add_options
from captum_ext.cli.output import check_output_folder, collected_warnings, say
from captum_ext.cli.signatures import constant_of, defaults_of

if TYPE_CHECKING:
    from captum_ext.evaluation import Summary

_DATA_OPTIONS: Options = {
    "data": {
        "nargs": "?",
        "metavar": "DATA",
        "help": "a folder with a folder of pictures for each class, or with a data set of another "
        "--layout",
    },
    "--layout": {
        "choices": (*LAYOUTS, *DRAWN),
        "metavar": "NAME",
        "help": f"the layout of DATA: {', '.join(LAYOUTS)} (default: the one whose files it has); "
        f"or, without DATA, a set of drawn pictures: {', '.join(DRAWN)}",
    },
    "--split": {
        "metavar": "NAME",
        "help": "the part of the data set, by the layout's own name: test, val2017, a file in "
        "ImageSets/Main of voc, a folder in DATA of wsol (default: test; val2017 of coco)",
    },
    "--images": {"metavar": "DIR", "help": "for wsol, the folder with the pictures"},
    "--masks": {
        "metavar": "DIR",
        "help": "for wsol, the folder with the masks (default: --images)",
    },
    "--flagged": {
        "action": "store_true",
        "default": False,
        "help": "for voc, count objects that are flagged as difficult, too",
    },
    "--class-names": {
        "metavar": "FILE",
        "help": "a file with the names of the model's classes in their order, one on each line "
        "(default: the names of the folders, sorted, or those of the layout)",
    },
    "--pictures": COUNT | {"help": "the number of pictures to draw, where there is no DATA"},
}


def _options() -> Options:
    """The options, with the defaults and choices of `captum_ext.evaluation.evaluate`."""
    defaults = defaults_of("evaluation.run", "evaluate")
    return {
        **_DATA_OPTIONS,
        "--model": SHARED["--model"],
        "--weights": SHARED["--weights"],
        "--method": SHARED["--method"],
        "--layer": SHARED["--layer"],
        "--metrics": {
            "nargs": "+",
            "metavar": "NAME",
            "help": "metrics of captum_ext.evaluation.evaluate (default: insertion and deletion, "
            "and localization where boxes or masks are known)",
        },
        "--target": {
            "choices": constant_of("evaluation.run", "TARGETS"),
            "default": defaults["target"],
            "help": "the class to explain: the picture's label, or the class that the model "
            "predicts",
        },
        "--output": {
            "metavar": "DIR",
            "default": "evaluation",
            "help": "the folder for the rows, the summary and its figures",
        },
        "--against": {
            "metavar": "METHOD",
            "help": "the method that the others are compared with (default: the first)",
        },
        "--summarize": {
            "action": "store_true",
            "default": False,
            "help": "measure nothing, and summarize the run in --output, finished or not",
        },
        "--size": COUNT
        | {"default": 224, "help": "the side to which pictures are resized, in pixels"},
        "--batch-size": COUNT
        | {"default": defaults["batch_size"], "help": "the number of pictures in a batch"},
        "--seed": SHARED["--seed"] | {"default": defaults["seed"]},
        "--workers": SHARED["--workers"] | {"default": defaults["num_workers"]},
        "--devices": SHARED["--devices"] | {"default": defaults["devices"]},
        "--device": SHARED["--device"],
    }


def add_command(commands: Any) -> None:
    """Add `evaluate` to the subparsers of the command line."""
    parser = commands.add_parser(
        "evaluate",
        help="measure on a data set which method's maps are better",
        description="Explain each picture of a data set by several methods, and measure the maps: "
        "the means of metrics with intervals, and paired differences between methods. The same "
        "command continues a run that was stopped. The exit code is 1 if a picture or a method "
        "failed; the rows say why.",
    )
    actions, defaults = add_options(parser, _options())
    parser.add_argument(
        "--config",
        metavar="FILE",
        default=argparse.SUPPRESS,
        help="a YAML file with lines `flag: value`; flags on the command line take precedence",
    )
    parser.set_defaults(run=functools.partial(evaluate, actions, defaults))


def evaluate(
    actions: Sequence[argparse.Action],
    defaults: Mapping[str, Any],
    command_line: argparse.Namespace,
) -> int:
    """Run `captum-ext evaluate`; the exit code.

    Args:
        actions: the options that a file may have, too.
        defaults: their defaults.
        command_line: the options on the command line, and no others.

    Raises:
        InputError: anything that the user can correct.
        KeyboardInterrupt: Ctrl-C; its message says how to go on.
    """
    arguments = _settings(actions, defaults, command_line)
    output = Path(arguments.output)
    if arguments.summarize:
        summary = read_summary(arguments)
        return _write_summary(summary, output) if _is_first_process() else 0
    _check_required(arguments)
    check_output_folder(output)
    requests = find_attributions(arguments.method)
    arguments.against = _find_against(arguments.against, [request.name for request in requests])
    source = open_data(arguments)
    device = find_device(arguments.device)
    if arguments.devices > 1:
        check_devices(arguments.devices, device)
        _silence_lightning()
    from captum_ext import zoo

    loaded = zoo.load_model(arguments.model, arguments.weights)
    notes = [check_labels(source, loaded, arguments.target)]
    if arguments.layout is None and source.layout != "classes":
        notes.append(f"{arguments.data!r} has the files of --layout {source.layout}")
    loaded.module.to(device)
    with collected_warnings("Some rows failed") as warned:  # _write_summary counts them
        x = random_input(arguments.size).to(device)
        check_input_size(loaded, x)
        attributions, left_out = make_attributions(
            requests,
            loaded,
            x,
            layer=arguments.layer,
            batch_size=arguments.batch_size,
            seed=arguments.seed,
            keep_going=not arguments.method,
        )
        if _is_first_process():  # before hours are spent on the run
            for note in (*left_out, *notes):
                if note:
                    say("note", note)
        _find_against(arguments.against, list(attributions))
        summary = run_evaluation(arguments, attributions, source, loaded)
    if not _is_first_process():
        return 0
    for note in warned:
        say("note", note)
    return _write_summary(summary, output)


def _write_summary(summary: "Summary", output: Path) -> int:
    """Print and write a summary; the exit code."""
    from captum_ext._identity import atomic_write

    failed = sum(summary.failures.values())
    if failed:
        rows = failed + sum(summary.images.values())
        say("note", f"{failed} of {rows} rows failed; their reasons are in {output}")
    with atomic_write(output / "summary.md") as unfinished:
        unfinished.write_bytes(summary.markdown().encode())
    with atomic_write(output / "figure.png") as unfinished:
        summary.figure().savefig(unfinished, format="png")
    if any(summary.curves.values()):
        with atomic_write(output / "curves.png") as unfinished:
            summary.curves_figure().savefig(unfinished, format="png")
    print(summary.markdown())
    print(f"written to {output}")
    return 1 if failed else 0


# --- settings ------------------------------------------------------------------------------------


def _settings(
    actions: Sequence[argparse.Action],
    defaults: Mapping[str, Any],
    command_line: argparse.Namespace,
) -> argparse.Namespace:
    """The settings of the command line, before those of the file, before the defaults."""
    settings = dict(defaults)
    if "config" in command_line:
        settings |= read_config(command_line.config, actions, mappings=("method", "metrics"))
    return argparse.Namespace(**settings | vars(command_line))


def _check_required(arguments: argparse.Namespace) -> None:
    from captum_ext._errors import InputError

    missing = [] if arguments.data or arguments.layout in DRAWN else ["DATA"]
    missing += [] if arguments.model else ["--model"]
    if missing:
        hint = "; DATA goes in front of --method and --metrics" if "DATA" in missing else ""
        raise InputError(
            f"the following arguments are required: {', '.join(missing)}{hint} "
            f"(see captum-ext evaluate --help)"
        )


def _find_against(against: str | None, names: Sequence[str]) -> str | None:
    """The name that --against means, in any spelling.

    Raises:
        InputError: none of the names.
    """
    from captum_ext._checks import closest
    from captum_ext._errors import InputError

    if against is None or against in names:
        return against
    by_key = {name_key(name): name for name in names}
    if name_key(against) not in by_key:
        raise InputError(
            f"--against {against!r} is none of the methods. Closest: {closest(against, names)}"
        )
    return by_key[name_key(against)]


# --- processes ------------------------------------------------------------------------------------


def _silence_lightning() -> None:
    """Hide Lightning's messages about devices, and its advice."""
    from captum_ext._errors import InputError

    try:
        import lightning.fabric  # noqa: F401
    except ModuleNotFoundError as error:
        raise InputError(
            'several devices need Lightning of the extra `train`: pip install "captum_ext[train]"'
        ) from error
    for name in ("lightning.fabric", "lightning.pytorch"):  # either may be the one that speaks
        logging.getLogger(f"{name}.utilities.rank_zero").setLevel(logging.ERROR)
        logging.getLogger(name).setLevel(logging.ERROR)


def _is_first_process() -> bool:
    """Return whether this process writes messages; --devices makes others run the same command."""
    return os.environ.get("LOCAL_RANK", "0") == "0" and os.environ.get("NODE_RANK", "0") == "0"
