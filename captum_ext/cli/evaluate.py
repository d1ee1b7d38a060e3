"""The command `captum-ext evaluate`: which method's maps are better, on a folder of pictures.

Like `cli`, it imports what takes long only where it is used.
"""

import argparse
import logging
import os
import re
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from captum_ext.cli.methods import PERTURBATIONS_PER_EVAL, Method, attribution, find_methods
from captum_ext.cli.options import (
    LARGEST_SEED,
    check_devices,
    find_device,
    integer,
    noise,
)
from captum_ext.cli.output import check_folder, say, whole
from captum_ext.cli.pictures import Folder, check_classes

if TYPE_CHECKING:
    from captum_ext.demo import LoadedModel
    from captum_ext.evaluation import Summary

METRICS = ("insertion", "deletion")
_FLAGS = {"output": "--output", "metrics": "--metrics", "size": "--size", "data": "DATA"}


def add_command(commands: Any) -> None:
    """Add `evaluate` to the subparsers of the command line."""
    one = commands.add_parser(
        "evaluate",
        help="measure which method's maps are better, on a folder of pictures",
        description="Explain each picture of a folder, with one folder for each class, by one or "
        "many layer methods, and measure their maps: figures with intervals, and paired "
        "differences. A run that was stopped goes on where it was. The exit code is 1 where a "
        "picture or a method failed; the rows say why.",
    )
    one.add_argument("data", metavar="DATA", help="a folder with a folder for each class")
    one.add_argument(
        "--model",
        required=True,
        metavar="NAME",
        help="efficientnet-lite0 or any classifier of torchvision",
    )
    one.add_argument(
        "--weights",
        metavar="FILE",
        help="a file with the model's state dict; nothing is downloaded",
    )
    one.add_argument(
        "--method",
        nargs="+",
        action="extend",
        metavar="NAME",
        help="see `captum-ext methods` (default: all)",
    )
    one.add_argument("--layer", metavar="NAME", help="a dotted name (default: the last with a map)")
    one.add_argument(
        "--metrics",
        nargs="+",
        default=METRICS,
        metavar="NAME",
        help="insertion, deletion, average_drop, increase_in_confidence, road (default: insertion "
        "and deletion)",
    )
    one.add_argument(
        "--target",
        choices=("label", "predicted"),
        default="label",
        help="what is explained (default: label)",
    )
    one.add_argument(
        "--output",
        default="evaluation",
        metavar="DIR",
        help="where rows, the summary and the picture go (default: evaluation)",
    )
    one.add_argument(
        "--size",
        type=integer(1),
        default=224,
        metavar="N",
        help="the side that whole pictures are brought to, in pixels (default: 224)",
    )
    one.add_argument("--batch-size", type=integer(1), default=16, metavar="N", help="default: 16")
    one.add_argument(
        "--seed", type=integer(0, LARGEST_SEED), default=0, metavar="N", help="default: 0"
    )
    one.add_argument(
        "--workers",
        type=integer(0),
        default=0,
        metavar="N",
        help="processes that read pictures (default: 0)",
    )
    one.add_argument(
        "--devices",
        type=integer(1),
        default=1,
        metavar="N",
        help="GPUs to run on, or processes of a CPU (default: 1)",
    )
    one.add_argument("--device", metavar="D", help="cpu, cuda, cuda:1, mps (default: a GPU if any)")
    one.set_defaults(run=evaluate)


def evaluate(arguments: argparse.Namespace) -> int:
    """Run `captum-ext evaluate`; the exit code.

    Raises:
        InputError: anything that the user can put right.
        KeyboardInterrupt: Ctrl-C; its message says how to go on.
    """
    output = Path(arguments.output)
    check_folder(output)
    methods = find_methods(arguments.method, arguments.data)
    folder = Folder(arguments.data)
    device = find_device(arguments.device)
    if arguments.devices > 1:
        check_devices(arguments.devices, device)
        _silence_lightning()
    from captum_ext import demo

    loaded = demo.load_model(arguments.model, arguments.weights)
    fewer = check_classes(folder, loaded)
    loaded.module.to(device)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("ignore")
        warnings.filterwarnings("always", category=UserWarning, module="captum_ext|__main__")
        warnings.filterwarnings("ignore", message="Some rows failed")  # which is said below
        made = _attributions(methods, loaded, arguments, bool(arguments.method))
        if fewer and _is_first():
            say("note", fewer)
        found = _evaluated(arguments, made, folder, loaded)
    if not _is_first():
        return 0
    for text in dict.fromkeys(str(warning.message) for warning in caught):
        say("note", text)
    failed = sum(found.failures.values())
    if failed:
        rows = failed + sum(found.images.values())
        say("note", f"{failed} of {rows} rows failed; their reasons are in {output}")
    with whole(output / "summary.md") as unfinished:
        unfinished.write_bytes(found.markdown().encode())
    with whole(output / "figure.png") as unfinished:
        found.figure().savefig(unfinished, format="png")
    print(found.markdown())
    print(f"written to {output}")
    return 1 if failed else 0


def _attributions(
    methods: Sequence[Method],
    loaded: "LoadedModel",
    arguments: argparse.Namespace,
    named: bool,
) -> dict[str, Any]:
    """The methods that work on this model, tried on noise, and arguments of their `attribute`."""
    import torch

    from captum_ext import demo
    from captum_ext.demo import InputError

    device = next(loaded.module.parameters()).device
    x = noise(arguments.size).to(device)
    try:
        demo.probabilities(loaded, x)
    except InputError:
        raise
    except (RuntimeError, ValueError, AssertionError) as error:
        raise InputError(
            f"{loaded.name} does not take pictures of {arguments.size} x {arguments.size} pixels "
            f"({error}): give another --size"
        ) from error
    layer, reshape_transform = demo.find_layer(loaded, x, arguments.layer)
    made: dict[str, Any] = {}
    target = torch.zeros(1, dtype=torch.int64, device=device)
    for method in methods:
        kwargs: dict[str, Any] = {"relu_attributions": True} if method.rectify else {}
        if method.family == "masking":
            kwargs["perturbations_per_eval"] = PERTURBATIONS_PER_EVAL
        try:
            one = attribution(method, loaded, layer, reshape_transform)
            one.attribute(x, target=target, **kwargs)
        except (ValueError, RuntimeError, AssertionError) as error:
            said = f"{method.name} does not work at layer {layer} of {loaded.name}: {error}"
            if named:
                raise InputError(said) from error
            if _is_first():
                say("note", f"{said} (left out)")
            continue
        made[method.name] = (one, kwargs)
    if not made:
        raise InputError(f"no method works at layer {layer} of {loaded.name}: name another --layer")
    return made


def _evaluated(
    arguments: argparse.Namespace, made: dict[str, Any], folder: Folder, loaded: "LoadedModel"
) -> "Summary":
    """What the library finds, with its errors in the words of the command line."""
    import torch

    from captum_ext import evaluation
    from captum_ext.demo import InputError

    try:
        return evaluation.evaluate(
            made,
            folder,
            arguments.metrics,
            output=arguments.output,
            size=arguments.size,
            normalize=(loaded.preprocess.mean, loaded.preprocess.std),
            target=arguments.target,
            batch_size=arguments.batch_size,
            seed=arguments.seed,
            num_workers=arguments.workers,
            show_progress=sys.stdout.isatty() and sys.stderr.isatty(),
            devices=arguments.devices,
        )
    except KeyboardInterrupt:
        raise KeyboardInterrupt("interrupted; the same command goes on where it was") from None
    except torch.cuda.OutOfMemoryError as error:
        raise InputError("the GPU has too little memory: give a lower --batch-size") from error
    except (ValueError, RuntimeError) as error:
        said = re.sub(r"`(\w+)`", lambda name: _FLAGS.get(name[1], name[0]), str(error))
        if said == str(error) and not said.startswith("Not one of"):  # a mistake of ours
            raise
        raise InputError(said) from error


def _silence_lightning() -> None:
    """It tells of devices found, and gives advice."""
    from captum_ext.demo import InputError

    try:
        import lightning.fabric  # noqa: F401
    except ModuleNotFoundError as error:
        raise InputError(
            'several devices need Lightning of the extra `train`: pip install "captum_ext[train]"'
        ) from error
    logging.getLogger("lightning.fabric").setLevel(logging.ERROR)


def _is_first() -> bool:
    """Whether this process speaks; with --devices, others may run the same command."""
    return os.environ.get("LOCAL_RANK", "0") == "0" and os.environ.get("NODE_RANK", "0") == "0"
