"""Pictures in one folder for each class.

These rules hold for all layouts of folders in this package. Nothing is downloaded. The constructor
checks the layout's text files; indexing reads pictures and masks. A picture that is missing or does
not decode raises an OSError that names it. Boxes are clipped at the image's border.

Only `ClassFolders` turns pictures upright by the camera's note (EXIF). The other layouts keep the
stored pixels, as their boxes do.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from captum_ext._errors import ArgumentError
from captum_ext.datasets._files import AnyPath, LayoutDataset, first_of

if TYPE_CHECKING:
    from PIL.Image import Image


class ClassFolders(LayoutDataset):
    """Pictures in one folder for each class: ``<root>/<class>/<any folders>/<picture>``.

    The pictures are those of torchvision's `ImageFolder`, in its order. They are turned upright, as
    by `captum-ext explain`. There are no boxes or masks. Names are paths under the root.

    Args:
        root: the folder.
        classes: names of folders, in the order of the classifier's outputs. Folders may be missing,
            so that some classes of ImageNet can be evaluated alone. None takes the folders in the
            root, sorted.

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

        folders, _ = find_classes(str(root))
        self.root, self.labels = root, "nameless" if classes is None else "all"
        classes = folders if classes is None else classes
        unknown = sorted(set(folders).difference(classes))
        if unknown:
            raise ArgumentError(
                f"`classes` lacks {first_of(unknown)}, which are folders of {root}.", "classes"
            )
        class_to_index = {name: classes.index(name) for name in folders}
        samples = make_dataset(str(root), class_to_index, extensions=IMG_EXTENSIONS)
        names = [Path(path).relative_to(root).as_posix() for path, _ in samples]
        super().__init__(samples, names, classes)

    def _read_image(self, path: str) -> "Image":
        from captum_ext._data.files import read_upright

        return read_upright(path)
