"""The command `captum-ext evaluate`: which method's maps are better, on a data set.

Like the rest of `captum_ext.cli`, it imports what takes long only where it is used.
"""

import argparse
import functools
import logging
import os
import warnings
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from captum_ext.cli.attributions import find_attributions, make_attributions
from captum_ext.cli.config import read_config
from captum_ext.cli.layouts import DRAWN, LAYOUTS, check_labels, open_data
from captum_ext.cli.measuring import evaluated, summarized
from captum_ext.cli.options import (
    LARGEST_SEED,
    add_options,
    check_devices,
    find_device,
    integer,
    noise,
)
from captum_ext.cli.output import check_folder, say

if TYPE_CHECKING:
    from torch import Tensor

    from captum_ext.evaluation import Summary
    from captum_ext.zoo import LoadedModel

# Of the options that are not given, neither to the command nor in a file. Others are None.
_DEFAULTS: Mapping[str, Any] = {
    "target": "label",
    "output": "evaluation",
    "size": 224,
    "batch_size": 16,
    "seed": 0,
    "workers": 0,
    "devices": 1,
    "summarize": False,
}


def add_command(commands: Any) -> None:
    """Add `evaluate` to the subparsers of the command line."""
    one = commands.add_parser(
        "evaluate",
        help="measure which method's maps are better, on a data set",
        description="Explain each picture of a data set by one or many methods, and measure their "
        "maps: figures with intervals, and paired differences. A run that was stopped goes on "
        "where it was. The exit code is 1 where a picture or a method failed; the rows say why.",
        argument_default=argparse.SUPPRESS,  # so that what is given is known
    )
    options = [
        one.add_argument(
            "data",
            nargs="?",
            metavar="DATA",
            help="a folder with a folder for each class, or of another --layout",
        ),
        one.add_argument(
            "--layout",
            choices=(*LAYOUTS, *DRAWN),
            metavar="NAME",
            help=f"{', '.join(LAYOUTS)}, and without DATA the drawn {', '.join(DRAWN)} (default: "
            "as the files in DATA are)",
        ),
        one.add_argument(
            "--split",
            metavar="NAME",
            help="which pictures, as the layout calls them: test, val2017, a file in "
            "ImageSets/Main of voc, a folder in DATA of wsol (default: test; val2017 of coco)",
        ),
        one.add_argument("--images", metavar="DIR", help="wsol: the folder of the pictures"),
        one.add_argument(
            "--masks", metavar="DIR", help="wsol: the folder of the masks (default: --images)"
        ),
        one.add_argument(
            "--flagged",
            action="store_true",
            default=argparse.SUPPRESS,
            help="voc: count objects that are flagged as difficult",
        ),
        one.add_argument(
            "--class-names",
            metavar="FILE",
            help="the names of the model's classes in their order, one on each line (default: the "
            "folders, sorted, or the layout's)",
        ),
        one.add_argument(
            "--pictures",
            type=integer(1),
            metavar="N",
            help="how many are drawn, where there is no DATA",
        ),
        *add_options(one, "--model", "--weights"),
        *add_options(
            one,
            "--method",
            help="see `captum-ext methods`, or FIDO, or a class of Captum that needs a model "
            "alone, such as IntegratedGradients (default: all methods of a layer)",
        ),
        *add_options(one, "--layer"),
        one.add_argument(
            "--metrics",
            nargs="+",
            metavar="NAME",
            help="of captum_ext.evaluation.evaluate (default: insertion and deletion, with "
            "localization where it is known where the objects are)",
        ),
        one.add_argument(
            "--target", choices=("label", "predicted"), help="what is explained (default: label)"
        ),
        one.add_argument(
            "--output",
            metavar="DIR",
            help="where rows, the summary and its pictures go (default: evaluation)",
        ),
        one.add_argument(
            "--against",
            metavar="METHOD",
            help="which the others are compared with (default: the first)",
        ),
        one.add_argument(
            "--summarize",
            action="store_true",
            default=argparse.SUPPRESS,
            help="only tell what is in --output, finished or not",
        ),
        one.add_argument(
            "--size",
            type=integer(1),
            metavar="N",
            help="the side that whole pictures are brought to, in pixels (default: 224)",
        ),
        one.add_argument("--batch-size", type=integer(1), metavar="N", help="default: 16"),
        one.add_argument("--seed", type=integer(0, LARGEST_SEED), metavar="N", help="default: 0"),
        one.add_argument(
            "--workers",
            type=integer(0),
            metavar="N",
            help="processes that read pictures (default: 0)",
        ),
        *add_options(one, "--devices", default=argparse.SUPPRESS),
        *add_options(one, "--device"),
    ]
    one.add_argument(
        "--config",
        metavar="FILE",
        help="a file in YAML with a line `flag: value` for each, for what is not given here",
    )
    one.set_defaults(run=functools.partial(evaluate, options))


def evaluate(options: Sequence[argparse.Action], given: argparse.Namespace) -> int:
    """Run `captum-ext evaluate`; the exit code.

    Raises:
        InputError: anything that the user can put right.
        KeyboardInterrupt: Ctrl-C; its message says how to go on.
    """
    arguments = _settings(options, given)
    output = Path(arguments.output)
    if arguments.summarize:
        found = summarized(arguments)
        return _told(found, output) if _is_first() else 0
    _check_required(arguments)
    check_folder(output)
    asked = find_attributions(arguments.method)
    _check_against(arguments.against, [one.name for one in asked])
    opened = open_data(arguments)
    device = find_device(arguments.device)
    if arguments.devices > 1:
        check_devices(arguments.devices, device)
        _silence_lightning()
    from captum_ext import zoo

    loaded = zoo.load_model(arguments.model, arguments.weights)
    notes = [check_labels(opened, loaded, arguments.target)]
    if arguments.layout is None and opened.layout != "classes":
        notes.append(f"{arguments.data!r} has the files of --layout {opened.layout}")
    loaded.module.to(device)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("ignore")
        warnings.filterwarnings("always", category=UserWarning, module="captum_ext|__main__")
        warnings.filterwarnings("ignore", message="Some rows failed")  # which is said below
        x = noise(arguments.size).to(device)
        _check_takes(loaded, x)
        made, left_out = make_attributions(
            asked,
            loaded,
            x,
            layer=arguments.layer,
            batch_size=arguments.batch_size,
            seed=arguments.seed,
            keep_going=not arguments.method,
        )
        if _is_first():  # before hours are spent on it
            for note in (*left_out, *notes):
                if note:
                    say("note", note)
        _check_against(arguments.against, list(made))
        found = evaluated(arguments, made, opened, loaded)
    if not _is_first():
        return 0
    for text in dict.fromkeys(str(warning.message) for warning in caught):
        say("note", text)
    return _told(found, output)


def _told(found: "Summary", output: Path) -> int:
    """Print and write a summary; the exit code."""
    from captum_ext._identity import atomic_write

    failed = sum(found.failures.values())
    if failed:
        rows = failed + sum(found.images.values())
        say("note", f"{failed} of {rows} rows failed; their reasons are in {output}")
    with atomic_write(output / "summary.md") as unfinished:
        unfinished.write_bytes(found.markdown().encode())
    with atomic_write(output / "figure.png") as unfinished:
        found.figure().savefig(unfinished, format="png")
    if any(found.curves.values()):
        with atomic_write(output / "curves.png") as unfinished:
            found.curves_figure().savefig(unfinished, format="png")
    print(found.markdown())
    print(f"written to {output}")
    return 1 if failed else 0


# --- what is asked for ---------------------------------------------------------------------------


def _settings(options: Sequence[argparse.Action], given: argparse.Namespace) -> argparse.Namespace:
    """What the command line gives, before what the file says, before the defaults."""
    settings = {option.dest: _DEFAULTS.get(option.dest) for option in options}
    if "config" in given:
        settings |= read_config(given.config, options, mappings=("method", "metrics"))
    return argparse.Namespace(**settings | vars(given))


def _check_required(arguments: argparse.Namespace) -> None:
    from captum_ext._errors import InputError

    lacking = [] if arguments.data or arguments.layout in DRAWN else ["DATA"]
    lacking += [] if arguments.model else ["--model"]
    if lacking:
        hint = "; DATA goes in front of --method and --metrics" if "DATA" in lacking else ""
        raise InputError(
            f"the following arguments are required: {', '.join(lacking)}{hint} "
            f"(see captum-ext evaluate --help)"
        )


def _check_against(against: str | None, names: Iterable[str]) -> None:
    from captum_ext._checks import closest
    from captum_ext._errors import InputError

    if against is not None and against not in names:
        raise InputError(
            f"--against {against!r} is none of the methods. Closest: {closest(against, [*names])}"
        )


def _check_takes(loaded: "LoadedModel", x: "Tensor") -> None:
    """Raise an InputError where the model does not take pictures of this size."""
    from captum_ext._errors import InputError
    from captum_ext.zoo import probabilities

    try:
        probabilities(loaded, x)
    except InputError:
        raise
    except (RuntimeError, ValueError, AssertionError) as error:
        raise InputError(
            f"{loaded.name} does not take pictures of {x.shape[2]} x {x.shape[3]} pixels "
            f"({error}): give another --size"
        ) from error


# --- processes ------------------------------------------------------------------------------------


def _silence_lightning() -> None:
    """It tells of devices found, and gives advice."""
    from captum_ext._errors import InputError

    try:
        import lightning.fabric  # noqa: F401
    except ModuleNotFoundError as error:
        raise InputError(
            'several devices need Lightning of the extra `train`: pip install "captum_ext[train]"'
        ) from error
    for name in ("lightning.fabric", "lightning.pytorch"):  # whichever was imported last speaks
        logging.getLogger(f"{name}.utilities.rank_zero").setLevel(logging.ERROR)
        logging.getLogger(name).setLevel(logging.ERROR)


def _is_first() -> bool:
    """Whether this process speaks; with --devices, others may run the same command."""
    return os.environ.get("LOCAL_RANK", "0") == "0" and os.environ.get("NODE_RANK", "0") == "0"
