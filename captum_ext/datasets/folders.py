"""Pictures in folders, one for each class; the layouts of public data sets are beside this.

Of all layouts: nothing is downloaded. What a layout's text files say is checked when a data set is
made; pictures and masks are read when they are asked for. One that is missing or does not decode
raises an OSError that names it. Boxes are cut off at the image's border.

Except by `ClassFolders`, pictures are taken as they are stored: a turn that the camera has noted
(EXIF) is not made, since the boxes of these sets are in the stored pixels.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from captum_ext.datasets._files import AnyPath, LayoutFiles, some_of

if TYPE_CHECKING:
    from PIL.Image import Image


class ClassFolders(LayoutFiles):
    """Pictures in one folder for each class: ``<root>/<class>/<any folders>/<picture>``.

    The pictures are those of torchvision's `ImageFolder`, in its order. They are turned upright, as
    by `captum-ext explain`. Nothing is known of where the objects are. Names are paths under the
    root.

    Args:
        root: the folder.
        classes: names of folders, in the order of the classifier's outputs. Not all of them need to
            be there, so that some classes of ImageNet can be evaluated alone. None takes the
            folders that are there, sorted.

    Raises:
        FileNotFoundError: no folder, no class, or a class without pictures.
        ValueError: a folder that is not in `classes`.

    Example:
        >>> data = ClassFolders("photographs")  # doctest: +SKIP
        >>> data[0].name, data[0].target, data.classes  # doctest: +SKIP
        ('cat/1.jpg', 0, ('cat', 'dog'))
    """

    has_objects = False

    def __init__(self, root: AnyPath, classes: Sequence[str] | None = None) -> None:
        from torchvision.datasets.folder import IMG_EXTENSIONS, find_classes, make_dataset

        found, _ = find_classes(str(root))
        self.labels = "nameless" if classes is None else "all"
        classes = found if classes is None else classes
        unknown = sorted(set(found).difference(classes))
        if unknown:
            raise ValueError(f"`classes` lacks {some_of(unknown)}, which are folders of {root}.")
        places = {name: classes.index(name) for name in found}
        samples = make_dataset(str(root), places, extensions=IMG_EXTENSIONS)
        names = [Path(path).relative_to(root).as_posix() for path, _ in samples]
        super().__init__(samples, names, classes)

    def _image(self, path: str) -> "Image":
        from captum_ext._data.files import read_upright

        return read_upright(path)
