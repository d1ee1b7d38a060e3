"""The cache of a guide's maps, and the settings by which a training recognises its files."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import Module
from torch.utils.data import DataLoader, Subset
from tqdm import tqdm

from captum_ext._data.pictures import Pictures
from captum_ext._identity import check_same_run, function_name, model_digest, plain, whole_file
from captum_ext.attr._settings import attribution_settings
from captum_ext.fcam.guides import guide_maps

if TYPE_CHECKING:
    from captum_ext.fcam.training import FCAMModule

MAPS_IN_FILE = 512


def cached_maps(
    module: "FCAMModule",
    pictures: Pictures,
    settings: dict[str, Any],
    folder: Path,
    batch_size: int,
    num_workers: int = 0,
    show_progress: bool = False,
) -> Tensor:
    """The guide's maps of all whole pictures, (n, 1, h, w) in float16, from files or into them.

    Each file has `MAPS_IN_FILE` maps, so that a run that was killed goes on from the last file, and
    several processes may store the same maps at once.

    Args:
        module: the training's module, with the guide.
        pictures: the pictures of the training.
        settings: those of `map_settings`.
        folder: the folder of the files.
        batch_size: pictures that the guide explains at once.
        num_workers: processes that read pictures.
        show_progress: whether to draw a progress bar.

    Raises:
        ValueError: the folder has maps of another run.
    """
    # Names and labels are not enough here: maps depend on the pixels.
    settings = settings | {"pictures": f"{pictures.about()}, {pictures.about_pixels()}"}
    parts = []
    starts = range(0, len(pictures), MAPS_IN_FILE)
    for start in tqdm(starts, desc="maps", disable=not show_progress):
        file = folder / f"maps-{start:08d}.pt"
        if file.is_file():
            saved = torch.load(file, weights_only=True)
            message = f"`cache` {folder} has the maps of another run"
            check_same_run(message, saved["settings"], settings)
        else:
            part = Subset(pictures, range(start, min(start + MAPS_IN_FILE, len(pictures))))
            batches = []
            for pixels, labels, _, is_read in DataLoader(part, batch_size, num_workers=num_workers):
                images = module.images(pixels.to(module.device))
                maps = guide_maps(
                    module.guide,
                    images,
                    labels.to(module.device),
                    rectify=module.rectify,
                    **module.guide_kwargs,
                )
                batches.append(torch.where(is_read[:, None, None, None], maps.cpu(), 0).half())
            saved = {"settings": settings, "maps": torch.cat(batches)}
            with whole_file(file) as unfinished:
                torch.save(saved, unfinished)
        parts.append(saved["maps"])
    return torch.cat(parts)


def map_settings(module: "FCAMModule", pictures: Pictures) -> dict[str, Any]:
    """The settings that the guide's maps depend on.

    Raises:
        ValueError: an option of the guide is a function without a version.
    """
    return {
        "classifier": model_digest(module.classifier),
        "guide": attribution_settings("`guide`", module.guide, module.classifier),
        "rectify": module.rectify,
        "normalize": module.normalize.about(),
        "guide_kwargs": repr(
            [(k, plain(f"`guide_kwargs`: {k}", v)) for k, v in sorted(module.guide_kwargs.items())]
        ),
        "pictures": pictures.about(),
        "size": list(pictures.size),
    }


def run_settings(module: "FCAMModule", batch_size: int) -> dict[str, Any]:
    """The settings that a resumed run must share with the killed one, beside `map_settings`.

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
        "crf": repr(crf) if isinstance(crf, Module | None) else function_name("`crf`", crf),
        "weights": [module.crf_weight, module.size_weight],
        "warmup": module.warmup,
        "lr": module.lr,
        "seed": module.seed,
        "batch_size": batch_size,
        "stored_maps": module.maps is not None,
    }
