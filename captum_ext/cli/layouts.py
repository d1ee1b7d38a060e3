"""Data sets by the layouts of their folders, and how their labels meet a model's classes."""

import argparse
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from captum_ext.cli.pictures import check_classes, check_is_folder, no_pictures_by_class

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
        title: what messages call it.
        n_classes: how many it has; those that are used, where files do not say how many there are.
        has_objects: whether it is known where the objects are.
    """

    data: Any
    layout: str
    title: str
    n_classes: int
    has_objects: bool


def open_data(arguments: argparse.Namespace) -> Opened:
    """The data set that the command line asks for.

    Raises:
        InputError: no such folder, options of another layout, files that do not fit together.
    """
    from captum_ext import datasets
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
    root, split = Path(arguments.data), given.get("split", "test")
    names = _class_names(given["class_names"]) if "class_names" in given else None
    data: Any
    try:
        if layout == "classes":
            data = datasets.ClassFolders(root, names)
            return Opened(data, layout, f"the folder {str(root)!r}", len(data.classes), False)
        if layout == "cub":
            data = datasets.Cub(root, split, masks=(root / "segmentations").is_dir())
            n = len(data.classes) or datasets.folders.N_CUB_CLASSES
            return Opened(data, layout, f"the layout cub of {str(root)!r}", n, True)
        if layout == "voc":
            data = datasets.Voc(
                root,
                split,
                use_flagged=bool(arguments.flagged),
                classes=datasets.VOC_CLASSES if names is None else names,
            )
            return Opened(data, layout, f"the layout voc of {str(root)!r}", len(data.classes), True)
        if "images" not in given:
            raise InputError("--layout wsol needs the folder of the pictures: give --images DIR")
        has_objects = (root / split / "localization.txt").is_file()
        data = datasets.WsolFolder(
            root,
            given["images"],
            split,
            masks=given.get("masks"),
            localization=has_objects,
        )
        n = 1 + max(target for _, target in data.samples)
        return Opened(data, layout, f"the layout wsol of {str(root)!r}", n, has_objects)
    except InputError:
        raise
    except FileNotFoundError as error:
        if layout == "classes":
            raise no_pictures_by_class(str(root), error) from error
        raise InputError(
            f"{str(error).rstrip('.')}: the layout is {layout} and the split {split!r} (--layout, "
            f"--split)"
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
    up_to = opened.layout == "wsol"  # whose files do not say how many classes there are
    has = f"{opened.title} has {f'labels up to {found - 1}' if up_to else f'{found} classes'}"
    if target == "predicted":
        if found == known or (up_to and found < known):
            return None
        return f"{has}, and {loaded.name} {known} classes: the predicted ones are explained"
    if opened.layout == "classes":
        return check_classes(opened.data, loaded, opened.title)
    if found > known or (found < known and not up_to):
        raise InputError(
            f"{has}, and {loaded.name} has {known} classes: give --weights of a classifier of "
            f"these classes, or --target predicted"
        )
    if found < known:
        return f"{has}, and {loaded.name} {known} classes: label i is taken for class i"
    return None


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
    return Opened(data, layout, f"--layout {layout}", n_classes, True)


def _class_names(file: str) -> list[str]:
    from captum_ext.demo import InputError

    try:
        names = Path(file).read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise InputError(f"--class-names {file} is no text: give a name on each line") from error
    names = [name.strip() for name in names if name.strip()]
    if not names or len(set(names)) < len(names):
        raise InputError(f"--class-names {file} must have a name on each line, each once")
    return names
