"""The pictures that a command is given, and whether their classes are the model's."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from captum_ext._errors import InputError
    from captum_ext.zoo import LoadedModel


class Folder:
    """The pictures of a folder with a folder for each class, and which of them cannot be read.

    Pictures are read as `explain` reads them: upright, and in RGB.

    Args:
        root: the folder.

    Attributes:
        classes: the names of the folders, in the order of the labels.
        samples: (file, label) of each picture.
        unread: (n,), bool, in memory that all processes that read pictures share.

    Raises:
        InputError: no folder, or one without such pictures.
    """

    def __init__(self, root: str) -> None:
        import torch

        from captum_ext.datasets import ClassFolders

        check_is_folder(root)
        try:
            self._folders = ClassFolders(root)
        except FileNotFoundError as error:
            raise no_pictures_by_class(root, error) from error
        self.root, self.classes, self.samples = root, self._folders.classes, self._folders.samples
        self.unread = torch.zeros(len(self.samples), dtype=torch.bool).share_memory_()

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        try:
            example = self._folders[index]
        except OSError:  # which `fit_fcam` leaves out
            self.unread[index] = True
            raise
        return example.image, example.target

    def why(self, index: int) -> str:
        """Why a picture is left out: it is tried once more."""
        try:
            self[index]
        except OSError as error:
            return str(error)
        return f"{self.samples[index][0]!r} could not be read at first"

    def unread_in_all(self) -> list[int]:
        """The pictures that could not be read, in any of the processes that trained."""
        import torch.distributed as dist

        found = set(self.unread.nonzero().flatten().tolist())
        if dist.is_available() and dist.is_initialized():
            others: list[Any] = [None] * dist.get_world_size()
            dist.all_gather_object(others, found)
            found = found.union(*others)
        return sorted(found)


def check_is_folder(root: str) -> None:
    """Raise an InputError unless there is such a folder."""
    from captum_ext._errors import InputError

    if not Path(root).is_dir():
        raise InputError(f"the folder {root!r} does not exist or is not a folder")


def no_pictures_by_class(root: str, error: FileNotFoundError) -> "InputError":
    """What torchvision says of a folder that is not by class, as an error of the user's."""
    from captum_ext._errors import InputError

    first = str(error).partition(". ")[0].rstrip(".")
    return InputError(f"the folder {root!r} must have a folder of pictures for each class: {first}")


def check_classes(folder: Any, loaded: "LoadedModel", title: str) -> str | None:
    """A remark where the classifier has more classes than the folder.

    Args:
        folder: has `classes`.
        loaded: the classifier.
        title: what the folder is called.

    Raises:
        InputError: it has fewer.
    """
    from captum_ext._errors import InputError

    found, known = len(folder.classes), len(loaded.categories)
    if found > known:
        raise InputError(
            f"{title} has {found} classes, and {loaded.name} has {known}: give the weights of a "
            f"classifier of these classes"
        )
    if found == known:
        return None
    return (
        f"the folder has {found} classes and {loaded.name} {known}: its folders are taken for the "
        f"first of them in the order of their names, {folder.classes[0]} for class 0 "
        f"({loaded.categories[0]}) to {folder.classes[-1]} for class {found - 1} "
        f"({loaded.categories[found - 1]})"
    )
