"""Data sets by the layouts of their folders, and checks of their labels."""

import argparse
from collections.abc import Callable, Mapping
from inspect import Parameter, signature
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from captum_ext.cli.output import message_with_flags
from captum_ext.cli.pictures import check_is_folder, class_folders_error

if TYPE_CHECKING:
    from captum_ext.zoo import LoadedModel

# Layouts of folders, and their classes in `captum_ext.datasets`.
LAYOUTS: Mapping[str, str] = {
    "classes": "ClassFolders",
    "cub": "Cub",
    "voc": "Voc",
    "wsol": "WsolFolder",
    "coco": "Coco",
}
DRAWN = ("pasted-scenes", "textured-ellipses", "fine-grained-parts")  # they need no folder
# Names of options in a namespace, and the arguments of the classes that they stand for.
ARGUMENTS: Mapping[str, str] = {
    "split": "split",
    "images": "images",
    "masks": "masks",
    "flagged": "use_flagged",
    "class_names": "classes",
    "pictures": "n",
}


class DataSource(NamedTuple):
    """A data set with its layout and its labels.

    Attributes:
        data: the data set, as `captum_ext.evaluation.evaluate` takes it.
        layout: the name of the layout.
        title: the name of the source of its classes in messages.
        n_classes: the number of classes.
        labels: "all", "nameless" or "used", see `captum_ext.datasets._files.LayoutDataset`.
        has_objects: whether boxes or masks of objects are known.
    """

    data: Any
    layout: str
    title: str
    n_classes: int
    labels: str = "all"
    has_objects: bool = True


def open_data(arguments: argparse.Namespace) -> DataSource:
    """The data set of the command line.

    Raises:
        InputError: no such folder, options of another layout, files that do not fit together.
    """
    from captum_ext._errors import InputError

    layout = arguments.layout
    if layout not in DRAWN:
        check_is_folder(arguments.data)
        layout = layout or find_layout(arguments.data)
    options = {name: vars(arguments)[name] for name in ARGUMENTS if vars(arguments)[name]}
    for name in options.keys() - _layout_defaults(layout).keys():
        fitting = " or ".join(key for key in (*LAYOUTS, *DRAWN) if name in _layout_defaults(key))
        raise InputError(f"--{name.replace('_', '-')} is for --layout {fitting}, not for {layout}")
    if layout in DRAWN:
        return _drawn_data(layout, arguments)
    if "images" not in options and _layout_defaults(layout).get("images") is Parameter.empty:
        raise InputError(f"--layout {layout} needs the folder of the pictures: give --images DIR")
    title = f"the folder {arguments.data!r}"
    if "class_names" in options:
        title = f"--class-names {options['class_names']}"
        options["class_names"] = _class_names(options["class_names"], title)
    try:
        data = _reader(layout)(
            arguments.data, **{ARGUMENTS[name]: value for name, value in options.items()}
        )
    except FileNotFoundError as error:
        if layout == "classes":
            raise class_folders_error(arguments.data, error) from error
        split = options.get("split", _layout_defaults(layout).get("split"))
        raise InputError(
            f"{str(error).rstrip('.')}: the layout is {layout} and the split {split!r} (--layout, "
            f"--split)"
        ) from error
    except ValueError as error:
        flags = {"split": "--split", "classes": "--class-names"}
        raise InputError(message_with_flags(error, flags)) from error
    return DataSource(data, layout, title, data.n_classes, data.labels, data.has_objects)


def _layout_class(name: str) -> Any:
    """The class of a layout of folders."""
    from captum_ext import datasets

    return getattr(datasets, LAYOUTS[name])


def _reader(name: str) -> Callable[..., Any]:
    """The class or function that makes a data set of a folder."""
    cls = _layout_class(name)
    reader: Callable[..., Any] = getattr(cls, "from_folder", cls)
    return reader


def _layout_defaults(layout: str) -> dict[str, Any]:
    """The options of a layout, with the defaults of the arguments that they set."""
    known = {"n": None} if layout in DRAWN else signature(_reader(layout)).parameters
    return {
        option: getattr(known[argument], "default", None)
        for option, argument in ARGUMENTS.items()
        if argument in known
    }


def find_layout(root: str) -> str:
    """The layout that the files in a folder have; "classes" where they have no other.

    Raises:
        InputError: the folder has the files of several layouts, or a folder in it has those of one.
    """
    from captum_ext._errors import InputError

    folder = Path(root)
    layouts = [layout for layout in LAYOUTS if _layout_class(layout).matches(folder)]
    if len(layouts) > 1:
        raise InputError(
            f"the folder {root!r} has the files of {' and '.join(layouts)}: give --layout"
        )
    if layouts:
        return layouts[0]
    for inside in sorted(child for child in folder.iterdir() if child.is_dir()):
        for layout in LAYOUTS:
            if _layout_class(layout).matches(inside):
                raise InputError(
                    f"the folder {root!r} has no files of a layout, but {str(inside)!r} has those "
                    f"of {layout}: give that one, or --layout classes"
                )
    return "classes"


def check_labels(source: DataSource, loaded: "LoadedModel", target: str) -> str | None:
    """A note where a data set has other classes than the model; None where they agree.

    Args:
        source: the data set.
        loaded: the model.
        target: "label" or "predicted", the class that is explained.

    Raises:
        InputError: labels are explained that need not be the model's classes.
    """
    from captum_ext._errors import InputError

    n_data, n_model = source.n_classes, len(loaded.categories)
    has = f"{source.title} has {n_data} classes"
    if source.labels == "used":
        has = f"{source.title} has labels up to {n_data - 1}"
    if target == "predicted":
        if n_data == n_model or (source.labels == "used" and n_data < n_model):
            return None
        return f"{has}, and {loaded.name} {n_model} classes: the predicted ones are explained"
    if n_data > n_model or (n_data < n_model and source.labels != "used"):
        names = (
            ", --class-names with them in the model's order" if source.labels == "nameless" else ""
        )
        raise InputError(
            f"{has}, and {loaded.name} has {n_model} classes: give --weights of a classifier of "
            f"these classes{names}, or --target predicted"
        )
    if n_data < n_model:
        return f"{has}, and {loaded.name} {n_model} classes: label i is taken for class i"
    return None


def _drawn_data(layout: str, arguments: argparse.Namespace) -> DataSource:
    from captum_ext import datasets
    from captum_ext._errors import InputError

    if arguments.data is not None:
        raise InputError(f"--layout {layout} is drawn: leave out DATA, {arguments.data!r}")
    cls, n_classes = {
        "pasted-scenes": (datasets.PastedScenes, 1000),  # with objects of ImageNet's classes
        "textured-ellipses": (datasets.TexturedEllipses, len(datasets.TEXTURES)),
        "fine-grained-parts": (datasets.FineGrainedParts, len(datasets.PATTERNS)),
    }[layout]
    options = {} if arguments.pictures is None else {"n": arguments.pictures}
    data: Any = cls(seed=arguments.seed, **options)
    return DataSource(data, layout, f"--layout {layout}", n_classes)


def _class_names(file: str, title: str) -> list[str]:
    """The names in a file; messages call it `title`."""
    from captum_ext._errors import InputError

    try:
        lines = Path(file).read_text(encoding="utf-8").splitlines()
    except FileNotFoundError as error:
        raise InputError(f"{title}: there is no such file") from error
    except UnicodeDecodeError as error:
        raise InputError(f"{title} is no text: give a name on each line") from error
    names = [line.strip() for line in lines if line.strip()]
    if not names or len(set(names)) < len(names):
        raise InputError(f"{title} must have a name on each line, each once")
    return names
