"""Each kind of file with tensors that this package stores: how it is made, and how it is read."""

import pickle
import warnings
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torchvision
from captum.attr import LayerGradCam
from torch import nn

from captum_ext import zoo
from captum_ext.attr import FCAM
from captum_ext.datasets import TexturedEllipses
from captum_ext.fcam import FCAMDecoder, fit_fcam
from captum_ext.features import maximally_activating_patches
from captum_ext.perception import LayerEncoder, PerceptionDecoder, fit_perception
from tests.networks import dropout_net, three_stage_net, two_stage_net

SCENES = [(scene.image, scene.target) for scene in TexturedEllipses(8, 0, (32, 32))]
FIT = {"size": 32, "widths": (4, 4), "n_epochs": 2, "batch_size": 4, "show_progress": False}


@dataclass(frozen=True)
class StoredFile:
    """A kind of file.

    Attributes:
        name: the file's name in its folder.
        run: makes the file in a folder, or reads the one that is there, and returns a result.
        is_checked_by_the_model: whether only the model of the file knows what belongs in it.
    """

    name: str
    run: Callable[[Path], Any]
    is_checked_by_the_model: bool = False


def _fcam_decoder(folder: Path) -> Any:
    model, file = two_stage_net(), folder / "fcam.pt"
    if not file.exists():
        decoder = FCAMDecoder.reading(model, torch.rand(1, 3, 32, 32), widths=(8, 4))
        FCAM(model, decoder.eval()).save(file)
    return FCAM.load(file, model).decoder.state_dict()


def _perception_decoder(folder: Path) -> Any:
    encoder, file = LayerEncoder(dropout_net(), "1"), folder / "perception.pt"
    if not file.exists():
        PerceptionDecoder.reading(encoder, torch.rand(1, 3, 32, 32), [8, 4], [2, 1]).save(
            file, encoder
        )
    return PerceptionDecoder.load(file, encoder).state_dict()


def _patches(folder: Path) -> Any:
    found = maximally_activating_patches(
        three_stage_net().eval(), "1", SCENES, n=3, size=32, checkpoint=folder / "top.pt"
    )
    return {"values": found.values, "indices": found.indices}


def _fcam(**folders: Path) -> Any:
    model = three_stage_net().eval()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return fit_fcam(
            model, SCENES, LayerGradCam(model, model[2]), **FIT, **folders
        ).decoder.state_dict()


def _fcam_cache(folder: Path) -> Any:
    return _fcam(cache=folder)


def _fcam_checkpoint(folder: Path) -> Any:
    return _fcam(checkpoints=folder)


def _perception_checkpoint(folder: Path) -> Any:
    encoder, options = LayerEncoder(dropout_net(), "1"), FIT | {"convolutions": (1, 1)}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return fit_perception(encoder, SCENES, **options, checkpoints=folder).state_dict()


def _weights(folder: Path) -> Any:
    file = folder / "weights.pt"
    if not file.exists():
        torch.save(torchvision.models.squeezenet1_1(num_classes=3).state_dict(), file)
    return zoo.load_model("squeezenet1_1", file).module.state_dict()


STORED_FILES = {
    "decoder of F-CAM": StoredFile("fcam.pt", _fcam_decoder),
    "decoder of Perception Visualization": StoredFile("perception.pt", _perception_decoder),
    "checkpoint of patches": StoredFile("top.pt", _patches),
    "cache of F-CAM": StoredFile("maps-00000000.pt", _fcam_cache),
    "checkpoint of F-CAM": StoredFile("last.ckpt", _fcam_checkpoint),
    "checkpoint of Perception Visualization": StoredFile("last.ckpt", _perception_checkpoint),
    "weights": StoredFile("weights.pt", _weights),
}


class FileToucher:
    """An object whose pickle makes a file when it is read."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> Any:
        return (open, (str(self.file), "w"))


def write_pickle(file: Path, touched: Path) -> None:
    """Replace the file by a pickle that makes the file `touched`."""
    file.write_bytes(pickle.dumps(FileToucher(touched)))


def write_hostile_entry(file: Path, touched: Path) -> None:
    """Add an object that makes the file `touched` to the content of a file of torch.save."""
    content = torch.load(file, map_location="cpu", weights_only=True)
    torch.save({**content, "more": FileToucher(touched)}, file)


def zero_bytes(file: Path, touched: Path) -> None:
    """Set 64 bytes of the largest tensor to zero."""
    with zipfile.ZipFile(file) as archive:
        tensors = [entry for entry in archive.infolist() if "/data/" in entry.filename]
        largest = max(tensors, key=lambda entry: entry.file_size)
        content = archive.read(largest)
    start = next(i for i, byte in enumerate(content) if byte)
    data = bytearray(file.read_bytes())
    position = data.index(content) + start
    data[position : position + 64] = bytes(64)
    file.write_bytes(data)


def compress(file: Path, touched: Path) -> None:
    """Compress the entries of the file."""
    with zipfile.ZipFile(file) as archive:
        entries = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in entries.items():
            archive.writestr(name, content)


def make_folder(file: Path, touched: Path) -> None:
    file.unlink()
    file.mkdir()


DAMAGES: dict[str, Callable[[Path, Path], None]] = {
    "64 zeroed bytes": zero_bytes,
    "half of the file": lambda file, _: (
        file.write_bytes(file.read_bytes()[: file.stat().st_size // 2]) and None
    ),
    "without its end": lambda file, _: file.write_bytes(file.read_bytes()[:-30]) and None,
    "empty": lambda file, _: file.write_bytes(b"") and None,
    "text": lambda file, _: file.write_text("widths: 8\n") and None,
    "folder": make_folder,
    "another content": lambda file, _: torch.save({"some": "thing"}, file),
    "a list": lambda file, _: torch.save([1, 2], file),
    "a module": lambda file, _: torch.save(nn.Linear(1, 1), file),
    "a pickle that runs code": write_pickle,
    "an entry that runs code": write_hostile_entry,
}
