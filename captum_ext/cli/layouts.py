"""Data sets by the layouts of their folders, and how their labels meet a model's classes."""

import argparse
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from captum_ext.cli.pictures import check_is_folder, no_pictures_by_class

if TYPE_CHECKING:
    from captum_ext.demo import LoadedModel

# The options that each layout has beyond DATA.
LAYOUTS: Mapping[str, tuple[str, ...]] = {
    "classes": ("class_names",),
    "cub": ("split",),
    "voc": ("split", "flagged", "class_names"),
    "wsol": ("split", "images", "masks"),
    "pasted-scenes": ("pictures",),
    "textured-ellipses": ("pictures",),
    "fine-grained-parts": ("pictures",),
}
DRAWN = ("pasted-scenes", "textured-ellipses", "fine-grained-parts")  # which need no folder
OPTIONS = tuple(dict.fromkeys(option for options in LAYOUTS.values() for option in options))

_SPLITS = ("test", "val", "train-fullsup", "train-weaksup")  # of wsolevaluation
_MARKS: Mapping[str, Callable[[Path], bool]] = {
    "cub": lambda root: all(
        (root / f"{name}.txt").is_file() for name in ("images", "image_class_labels")
    ),
    "voc": lambda root: (root / "Annotations").is_dir() and (root / "ImageSets/Main").is_dir(),
    "wsol": lambda root: any((root / split / "image_ids.txt").is_file() for split in _SPLITS),
}


class Opened(NamedTuple):
    """A data set, and what the command line knows of it.

    Attributes:
        data: as `captum_ext.evaluation.evaluate` takes it.
        layout: its layout.
        title: what messages call the origin of its classes.
        n_classes: how many it has.
        labels: "all" where these must be all classes of a model, "nameless" where names may be
            given for them, "used" where there may be more of them, since labels are all that is
            known.
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
    from captum_ext.demo import InputError

    layout = arguments.layout
    if layout not in DRAWN:
        check_is_folder(arguments.data)
        layout = layout or find_layout(arguments.data)
    given = {name: vars(arguments)[name] for name in OPTIONS if vars(arguments)[name]}
    for name in given.keys() - set(LAYOUTS[layout]):
        fitting = " or ".join(key for key, options in LAYOUTS.items() if name in options)
        raise InputError(f"--{name.replace('_', '-')} is for --layout {fitting}, not for {layout}")
    if layout in DRAWN:
        return _drawn(layout, arguments)
    try:
        return _READERS[layout](arguments.data, given)
    except InputError:
        raise
    except FileNotFoundError as error:
        if layout == "classes":
            raise no_pictures_by_class(arguments.data, error) from error
        raise InputError(
            f"{str(error).rstrip('.')}: the layout is {layout} and the split "
            f"{given.get('split', 'test')!r} (--layout, --split)"
        ) from error
    except ValueError as error:
        said = str(error).replace("`split`", "--split").replace("`classes`", "--class-names")
        raise InputError(said) from error


def find_layout(root: str) -> str:
    """The layout whose files a folder has; that of folders by class where it has none of them.

    Raises:
        InputError: the files of several layouts, or of one in a folder inside.
    """
    from captum_ext.demo import InputError

    folder = Path(root)
    found = [layout for layout, has in _MARKS.items() if has(folder)]
    if len(found) > 1:
        raise InputError(
            f"the folder {root!r} has the files of {' and '.join(found)}: give --layout"
        )
    if found:
        return found[0]
    for inside in sorted(child for child in folder.iterdir() if child.is_dir()):
        for layout, has in _MARKS.items():
            if has(inside):
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
    from captum_ext.demo import InputError

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


# --- the layouts ---------------------------------------------------------------------------------


def _by_class(root: str, given: Mapping[str, Any]) -> Opened:
    from captum_ext.datasets import ClassFolders

    names, title = _class_names(given)
    data = ClassFolders(root, names)
    labels = "nameless" if names is None else "all"
    title = title or f"the folder {root!r}"
    return Opened(data, "classes", title, len(data.classes), labels, has_objects=False)


def _cub(root: str, given: Mapping[str, Any]) -> Opened:
    from captum_ext.datasets import Cub
    from captum_ext.datasets.cub import N_CUB_CLASSES

    has_masks = (Path(root) / "segmentations").is_dir()
    data = Cub(root, given.get("split", "test"), masks=has_masks)
    return Opened(data, "cub", f"CUB in {root!r}", len(data.classes) or N_CUB_CLASSES)


def _voc(root: str, given: Mapping[str, Any]) -> Opened:
    from captum_ext.datasets import VOC_CLASSES, Voc

    names, title = _class_names(given)
    data = Voc(
        root,
        given.get("split", "test"),
        use_flagged="flagged" in given,
        classes=VOC_CLASSES if names is None else names,
    )
    return Opened(data, "voc", title or f"VOC in {root!r}", len(data.classes))


def _wsol(root: str, given: Mapping[str, Any]) -> Opened:
    from captum_ext.datasets import WsolFolder
    from captum_ext.demo import InputError

    if "images" not in given:
        raise InputError("--layout wsol needs the folder of the pictures: give --images DIR")
    split = given.get("split", "test")
    has_objects = (Path(root) / split / "localization.txt").is_file()
    data = WsolFolder(
        root, given["images"], split, masks=given.get("masks"), localization=has_objects
    )
    n = 1 + max(target for _, target in data.samples)
    return Opened(data, "wsol", f"the folder {root!r}", n, "used", has_objects)


_READERS: Mapping[str, Callable[[str, Mapping[str, Any]], Opened]] = {
    "classes": _by_class,
    "cub": _cub,
    "voc": _voc,
    "wsol": _wsol,
}


def _drawn(layout: str, arguments: argparse.Namespace) -> Opened:
    from captum_ext import datasets
    from captum_ext.demo import InputError

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


def _class_names(given: Mapping[str, Any]) -> tuple[list[str] | None, str]:
    """The names in the file of --class-names, and what messages call it; None without it."""
    from captum_ext.demo import InputError

    if "class_names" not in given:
        return None, ""
    title = f"--class-names {given['class_names']}"
    try:
        lines = Path(given["class_names"]).read_text(encoding="utf-8").splitlines()
    except FileNotFoundError as error:
        raise InputError(f"{title}: there is no such file") from error
    except UnicodeDecodeError as error:
        raise InputError(f"{title} is no text: give a name on each line") from error
    names = [line.strip() for line in lines if line.strip()]
    if not names or len(set(names)) < len(names):
        raise InputError(f"{title} must have a name on each line, each once")
    return names, title
