"""The pictures that `train-fcam` learns from, in one folder for each class."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from captum_ext._errors import InputError
    from captum_ext.zoo import LoadedModel


class PictureFolder:
    """The pictures in one folder for each class; it remembers those that it cannot read.

    Pictures are read as `explain` reads them: upright, and in RGB.

    Args:
        root: the folder.

    Attributes:
        classes: the names of the folders, in the order of the labels.
        samples: (file, label) of each picture.
        is_unreadable: (n,), bool, in memory shared by the processes that read pictures.

    Raises:
        InputError: no folder, or a folder without pictures by class.
    """

    def __init__(self, root: str) -> None:
        import torch

        from captum_ext.datasets import ClassFolders

        check_is_folder(root)
        try:
            self._folders = ClassFolders(root)
        except FileNotFoundError as error:
            raise class_folders_error(root, error) from error
        self.root, self.classes, self.samples = root, self._folders.classes, self._folders.samples
        self.is_unreadable = torch.zeros(
            len(self.samples), dtype=torch.bool, device="cpu"
        ).share_memory_()

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        try:
            example = self._folders[index]
        except OSError:  # `fit_fcam` leaves the picture out
            self.is_unreadable[index] = True
            raise
        return example.image, example.target

    def reason(self, index: int) -> str:
        """The reason why a picture was left out, from a second attempt to read it."""
        try:
            self[index]
        except OSError as error:
            return str(error)
        return f"{self.samples[index][0]!r} could not be read at first"

    def unreadable_indices(self) -> list[int]:
        """The indices of the pictures that one of the training processes could not read."""
        import torch.distributed as dist

        indices = set(self.is_unreadable.nonzero().flatten().tolist())
        if dist.is_available() and dist.is_initialized():
            of_processes: list[Any] = [None] * dist.get_world_size()
            dist.all_gather_object(of_processes, indices)
            indices = indices.union(*of_processes)
        return sorted(indices)


def check_is_folder(root: str) -> None:
    """Raise an InputError unless `root` is a folder."""
    from captum_ext._errors import InputError

    if not Path(root).is_dir():
        raise InputError(f"the folder {root!r} does not exist or is not a folder")


def class_folders_error(root: str, error: FileNotFoundError) -> "InputError":
    """The error for a folder in which torchvision finds no folders of classes."""
    from captum_ext._checks import first_line
    from captum_ext._errors import InputError

    return InputError(
        f"the folder {root!r} must have a folder of pictures for each class ({first_line(error)})"
    )


def check_classes(folder: PictureFolder, loaded: "LoadedModel") -> str | None:
    """Return a note if the classifier has more classes than the folder.

    Raises:
        InputError: the classifier has fewer classes.
    """
    from captum_ext._errors import InputError

    n_folders, n_model = len(folder.classes), len(loaded.categories)
    if n_folders > n_model:
        raise InputError(
            f"the folder {folder.root!r} has {n_folders} classes, and {loaded.name} has {n_model}: "
            f"give the weights of a classifier of these classes"
        )
    if n_folders == n_model:
        return None
    return (
        f"the folder has {n_folders} classes and {loaded.name} {n_model}: its folders are taken "
        f"for the first of them in the order of their names, {folder.classes[0]} for class 0 "
        f"({loaded.categories[0]}) to {folder.classes[-1]} for class {n_folders - 1} "
        f"({loaded.categories[n_folders - 1]})"
    )
