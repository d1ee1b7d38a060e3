"""The cache of a guide's maps, and the fingerprints by which a training recognises its files."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import Module
from torch.utils.data import Subset
from tqdm import tqdm

from captum_ext._data.loading import CpuLoader
from captum_ext._data.pictures import PictureDataset
from captum_ext._errors import ArgumentError
from captum_ext._identity import (
    check_same_run,
    json_value,
    model_digest,
    versioned_name,
)
from captum_ext._tensor_files import is_complete, read_tensors, write_tensors
from captum_ext.attr._fingerprint import attribution_fingerprint
from captum_ext.fcam.guides import guide_maps

if TYPE_CHECKING:
    from captum_ext.fcam.training import FCAMModule

MAPS_IN_FILE = 512


def cached_maps(
    module: "FCAMModule",
    pictures: PictureDataset,
    fingerprint: dict[str, Any],
    folder: Path,
    batch_size: int,
    num_workers: int = 0,
    show_progress: bool = False,
) -> Tensor:
    """The guide's maps of all whole pictures, (n, 1, h, w) in float16, from files or into them.

    Each file has `MAPS_IN_FILE` maps, so that a run that was killed resumes from the last file, and
    several processes may store the same maps at once.

    Args:
        module: the training's module, with the guide.
        pictures: the pictures of the training.
        fingerprint: that of `maps_fingerprint`.
        folder: the folder of the files.
        batch_size: pictures that the guide explains at once.
        num_workers: processes that read pictures.
        show_progress: whether to draw a progress bar.

    Raises:
        ValueError: the folder has maps of another run, or a file that is damaged.
    """
    # Names and labels are not enough here: maps depend on the pixels.
    of_pictures = f"{pictures.fingerprint()}, {pictures.pixel_fingerprint()}"
    fingerprint = fingerprint | {"pictures": of_pictures}
    parts: list[Tensor] = []
    starts = range(0, len(pictures), MAPS_IN_FILE)
    for start in tqdm(starts, desc="maps", disable=not show_progress):
        file = folder / f"maps-{start:08d}.pt"
        indices = range(start, min(start + MAPS_IN_FILE, len(pictures)))
        if file.exists():
            parts.append(_read_maps(file, fingerprint, len(indices), parts[:1]))
            continue
        batches = []
        loader = CpuLoader(Subset(pictures, indices), batch_size, num_workers=num_workers)
        for pixels, labels, _, is_read in loader:
            maps = guide_maps(
                module.guide,
                module.images(pixels.to(module.device)),
                labels.to(module.device),
                rectify=module.rectify,
                **module.guide_kwargs,
            )
            batches.append(torch.where(is_read[:, None, None, None], maps.cpu(), 0).half())
        parts.append(torch.cat(batches))
        write_tensors(file, {"fingerprint": fingerprint, "maps": parts[-1]})
    return torch.cat(parts)


def _read_maps(file: Path, fingerprint: dict[str, Any], n: int, earlier: list[Tensor]) -> Tensor:
    """The `n` maps in a file, if they have the fingerprint and the shape of `earlier` ones.

    Raises:
        ValueError: the file is damaged, or has the maps of another run.
    """
    problem = f"`cache`: delete {file}, as its maps cannot be read"
    saved = read_tensors(file, "cache", problem, ("fingerprint", "maps"))
    maps: Tensor = saved["maps"]
    stored = saved["fingerprint"]
    if isinstance(stored, dict):
        message = f"`cache` {file.parent} has the maps of another run"
        check_same_run(message, stored, fingerprint, argument="cache")
    if (
        not isinstance(stored, dict)
        or not is_complete(maps)
        or maps.dtype != torch.float16
        or maps.dim() != 4
        or maps.shape[:2] != (n, 1)
        or any(maps.shape[2:] != part.shape[2:] for part in earlier)
        or not bool(((maps >= 0) & (maps <= 1)).all())
    ):
        raise ArgumentError(f"{problem}: they are not {n} x 1 x h x w, from 0 to 1.", "cache")
    return maps


def maps_fingerprint(module: "FCAMModule", pictures: PictureDataset) -> dict[str, Any]:
    """The settings that the guide's maps depend on.

    Raises:
        ValueError: an option of the guide is a function without a version.
    """
    arguments = sorted(module.guide_kwargs.items())
    return {
        "classifier": model_digest(module.classifier),
        "guide": attribution_fingerprint("`guide`", module.guide, module.classifier),
        "rectify": module.rectify,
        "normalize": module.normalize.to_lists(),
        "guide_kwargs": repr([(k, json_value(f"`guide_kwargs`: {k}", v)) for k, v in arguments]),
        "pictures": pictures.fingerprint(),
        "size": list(pictures.size),
    }


def run_fingerprint(module: "FCAMModule", batch_size: int) -> dict[str, Any]:
    """The settings that a resumed run must share with the killed one, beside `maps_fingerprint`.

    Raises:
        ValueError: `crf` is a function without a version.
    """
    decoder, crf = module.decoder, module.crf
    return {
        "view": list(module.size),
        "channels": decoder.channels,
        "widths": decoder.widths,
        "center": decoder.has_center,
        "layers": decoder.layers,
        "flip": module.flip,
        "seeds": repr(sorted(vars(module.seeds).items())),
        "crf": repr(crf) if isinstance(crf, Module | None) else versioned_name("`crf`", crf),
        "weights": [module.crf_weight, module.size_weight],
        "warmup": module.warmup,
        "lr": module.lr,
        "seed": module.seed,
        "batch_size": batch_size,
        "stored_maps": module.maps is not None,
    }
