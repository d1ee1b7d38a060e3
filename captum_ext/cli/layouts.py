"""Data sets by the layouts of their folders, and how their labels meet a model's classes."""

import argparse
from collections.abc import Callable, Mapping
from inspect import Parameter, signature
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from captum_ext.cli.pictures import check_is_folder, no_pictures_by_class

if TYPE_CHECKING:
    from captum_ext.zoo import LoadedModel

# The layouts of folders, and their classes in `captum_ext.datasets`.
LAYOUTS: Mapping[str, str] = {
    "classes": "ClassFolders",
    "cub": "Cub",
    "voc": "Voc",
    "wsol": "WsolFolder",
    "coco": "Coco",
}
DRAWN = ("pasted-scenes", "textured-ellipses", "fine-grained-parts")  # which need no folder
# Options beyond DATA, and the arguments that they are for.
OPTIONS: Mapping[str, str] = {
    "split": "split",
    "images": "images",
    "masks": "masks",
    "flagged": "use_flagged",
    "class_names": "classes",
    "pictures": "n",
}


class Opened(NamedTuple):
    """A data set, and what the command line knows of it.

    Attributes:
        data: as `captum_ext.evaluation.evaluate` takes it.
        layout: its layout.
        title: what messages call the origin of its classes.
        n_classes: how many it has.
        labels: see `captum_ext.datasets._files.LayoutFiles`, as for the next.
        has_objects: whether it is known where the objects are.
    """

    data: Any
    layout: str
    title: str
    n_classes: int
    labels: str = "all"
    has_objects: bool = True


def open_data(arguments: argparse.Namespace) -> Opened:
    """The data set that the command line asks for.

    Raises:
        InputError: no such folder, options of another layout, files that do not fit together.
    """
    from captum_ext._errors import InputError

    layout = arguments.layout
    if layout not in DRAWN:
        check_is_folder(arguments.data)
        layout = layout or find_layout(arguments.data)
    given = {name: vars(arguments)[name] for name in OPTIONS if vars(arguments)[name]}
    for name in given.keys() - _options(layout).keys():
        fitting = " or ".join(key for key in (*LAYOUTS, *DRAWN) if name in _options(key))
        raise InputError(f"--{name.replace('_', '-')} is for --layout {fitting}, not for {layout}")
    if layout in DRAWN:
        return _drawn(layout, arguments)
    if "images" not in given and _options(layout).get("images") is Parameter.empty:
        raise InputError(f"--layout {layout} needs the folder of the pictures: give --images DIR")
    title = f"the folder {arguments.data!r}"
    if "class_names" in given:
        title = f"--class-names {given['class_names']}"
        given["class_names"] = _class_names(given["class_names"], title)
    try:
        data = _reader(layout)(arguments.data, **{OPTIONS[name]: v for name, v in given.items()})
    except FileNotFoundError as error:
        if layout == "classes":
            raise no_pictures_by_class(arguments.data, error) from error
        split = given.get("split", _options(layout).get("split"))
        raise InputError(
            f"{str(error).rstrip('.')}: the layout is {layout} and the split {split!r} (--layout, "
            f"--split)"
        ) from error
    except ValueError as error:
        said = str(error).replace("`split`", "--split").replace("`classes`", "--class-names")
        raise InputError(said) from error
    return Opened(data, layout, title, data.n_classes, data.labels, data.has_objects)


def _layout(name: str) -> Any:
    """The class of a layout that is not drawn."""
    from captum_ext import datasets

    return getattr(datasets, LAYOUTS[name])


def _reader(name: str) -> Callable[..., Any]:
    """What makes a data set of a folder."""
    kind = _layout(name)
    reader: Callable[..., Any] = getattr(kind, "from_folder", kind)
    return reader


def _options(name: str) -> dict[str, Any]:
    """The options that a layout has, and the defaults of their arguments."""
    known = {"n": None} if name in DRAWN else signature(_reader(name)).parameters
    return {
        option: getattr(known[argument], "default", None)
        for option, argument in OPTIONS.items()
        if argument in known
    }


def find_layout(root: str) -> str:
    """The layout whose files a folder has; that of folders by class where it has none of them.

    Raises:
        InputError: the files of several layouts, or of one in a folder inside.
    """
    from captum_ext._errors import InputError

    folder = Path(root)
    found = [layout for layout in LAYOUTS if _layout(layout).is_in(folder)]
    if len(found) > 1:
        raise InputError(
            f"the folder {root!r} has the files of {' and '.join(found)}: give --layout"
        )
    if found:
        return found[0]
    for inside in sorted(child for child in folder.iterdir() if child.is_dir()):
        for layout in LAYOUTS:
            if _layout(layout).is_in(inside):
                raise InputError(
                    f"the folder {root!r} has no files of a layout, but {str(inside)!r} has those "
                    f"of {layout}: give that one, or --layout classes"
                )
    return "classes"


def check_labels(opened: Opened, loaded: "LoadedModel", target: str) -> str | None:
    """A remark where the classes of a data set are not all of the model's.

    Raises:
        InputError: labels that are explained and are no classes of the model, or other ones.
    """
    from captum_ext._errors import InputError

    found, known = opened.n_classes, len(loaded.categories)
    has = f"{opened.title} has {found} classes"
    if opened.labels == "used":
        has = f"{opened.title} has labels up to {found - 1}"
    if target == "predicted":
        if found == known or (opened.labels == "used" and found < known):
            return None
        return f"{has}, and {loaded.name} {known} classes: the predicted ones are explained"
    if found > known or (found < known and opened.labels != "used"):
        names = (
            ", --class-names with them in the model's order" if opened.labels == "nameless" else ""
        )
        raise InputError(
            f"{has}, and {loaded.name} has {known} classes: give --weights of a classifier of "
            f"these classes{names}, or --target predicted"
        )
    if found < known:
        return f"{has}, and {loaded.name} {known} classes: label i is taken for class i"
    return None


def _drawn(layout: str, arguments: argparse.Namespace) -> Opened:
    from captum_ext import datasets
    from captum_ext._errors import InputError

    if arguments.data is not None:
        raise InputError(f"--layout {layout} is drawn: leave out DATA, {arguments.data!r}")
    kind, n_classes = {
        "pasted-scenes": (datasets.PastedScenes, 1000),  # its objects are of ImageNet
        "textured-ellipses": (datasets.TexturedEllipses, len(datasets.TEXTURES)),
        "fine-grained-parts": (datasets.FineGrainedParts, len(datasets.PATTERNS)),
    }[layout]
    options = {} if arguments.pictures is None else {"n": arguments.pictures}
    data: Any = kind(seed=arguments.seed, **options)
    return Opened(data, layout, f"--layout {layout}", n_classes)


def _class_names(file: str, title: str) -> list[str]:
    """The names in the file of --class-names, which messages call `title`."""
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
